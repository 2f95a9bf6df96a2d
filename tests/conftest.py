"""Tests run in double precision with strict promotion: a silent float32 or a silent broadcast is an error."""

import gc
import os
from pathlib import Path

# Read when NumPy is imported. The threads of two processes on two cores would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from moejax import registry as registry_module
from moejax.registry import registered_state
from moejax.sweep import plugins
from moejax.sweep.executors import compile_without_optimisation

# Nearly all of the suite's time goes to compilation. Processes that tests start inherit the flags, and those of the caller win:
# XLA_FLAGS=--xla_backend_optimization_level=2 (and --xla_cpu_use_fusion_emitters=true) tests the programs that users get.
compile_without_optimisation()

gc.set_threshold(
    100_000, 20, 100
)  # the objects of compiled programs live on; looking for garbage among them takes a tenth of the time
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# programs compiled by one test are found by the next, also in other processes
_cache = Path(os.environ.get("MOEJAX_TEST_CACHE", Path(__file__).parents[1] / ".pytest_cache" / "programs"))
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def single_precision():
    """JAX's default precision, for the tests of float32."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(autouse=True)
def double_precision_again():
    """The command line sets the precision of its process: a test that calls it must not change that of the next one."""
    yield
    if not jax.config.values["jax_enable_x64"]:
        jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True)
def registered_names_again():
    """What a test registers is gone after it, and a plugin that it used is out of use."""
    before = [(registry, dict(registry._values)) for registry in registry_module._registries]
    yield
    for registry, values in before:
        if registry._values != values:
            registry._values = values
            registered_state.cache_clear()
            plugins._used.clear()


def pytest_collection_modifyitems(items):
    """The processes of pytest-xdist must agree on every test's name, which an object's address in it would prevent."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"tests named after an address in memory: {', '.join(unstable[:5])}")
