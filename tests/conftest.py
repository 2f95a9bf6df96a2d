"""Tests run in double precision with strict promotion: a silent float32 or a silent broadcast is an error."""

import gc
import os
import resource
import signal
from pathlib import Path

# Read when NumPy is imported. The threads of two processes on two cores would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

# A call of these rooms whose arrays have not the shapes that the signature says is an error.
jaxtyping.install_import_hook(
    ["moejax.model", "moejax.moments", "moejax.likelihood", "moejax.methods"], "array_shapes.checked"
)

from moejax.environment import compile_fast_everywhere
from moejax.methods import search_plan
from moejax.registry import registrations_undone
from moejax.sweep.plan import plugins

# LLVM compiles a program on one core faster in one piece than in 32. The two others save a tenth of the time of compilation: no
# inlining before a split that is not made, and the order of instructions that is found faster.
OWN_FLAGS = (
    "--xla_cpu_parallel_codegen_split_count=1 --xla_llvm_force_inline_before_split=false "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ["XLA_FLAGS"] = f"{OWN_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
# Nearly all of the suite's time goes to compilation. Processes that tests start inherit the flags, and those of the caller win:
# XLA_FLAGS=--xla_backend_optimization_level=2 (and --xla_cpu_use_fusion_emitters=true) tests the programs that users get.
compile_fast_everywhere(level=0)

# Started by nohup, or in the background of a script, a process ignores these; what it starts does too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Not optimised, the search of a default fit takes half a minute. Most tests ask for any good fit; those of the search itself
# take it whole (`whole_search`).
WHOLE_SEARCH = {
    "GENERATIONS_OF_CHILDREN": search_plan.GENERATIONS_OF_CHILDREN,
    "LAST_GENERATIONS": search_plan.LAST_GENERATIONS,
    "FEWEST_FOR_DESCENTS": search_plan.FEWEST_FOR_DESCENTS,
}
SHORT_SEARCH = {"GENERATIONS_OF_CHILDREN": 12, "LAST_GENERATIONS": 4, "FEWEST_FOR_DESCENTS": 10**9}


def _set_search(sizes):
    for name, value in sizes.items():
        setattr(search_plan, name, value)


_set_search(SHORT_SEARCH)


@pytest.fixture(scope="module")
def whole_search():
    """The search as users have it, in a whole module: programs of the short one are forgotten before and after."""
    jax.clear_caches()
    _set_search(WHOLE_SEARCH)
    yield
    _set_search(SHORT_SEARCH)
    jax.clear_caches()


LARGEST_PROCESS = 3 * 2**30
"""Bytes of memory from which a process forgets its programs after a module; what needs them again reads them from the cache."""


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_large_process_are_forgotten():
    """With thousands of programs in one process, the compiler (jaxlib 0.10.2) once ended it by a segmentation fault."""
    yield
    memory = Path("/proc/self/statm")
    pages = int(memory.read_text().split()[1]) if memory.exists() else 0
    if pages * resource.getpagesize() > LARGEST_PROCESS:
        jax.clear_caches()
        gc.collect()


gc.set_threshold(
    100_000, 20, 100
)  # the objects of compiled programs live on; looking for garbage among them takes a tenth of the time
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# programs compiled by one test are found by the next, also in other processes
_cache = Path(os.environ.get("MOEJAX_TEST_CACHE", Path(__file__).parents[1] / ".pytest_cache" / "programs"))
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def single_precision():
    """JAX's default precision, for the tests of float32."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(autouse=True)
def own_process_again():
    """The command line sets precision, platform and cache of its process: a test that calls it changes none of the next one."""
    platforms = jax.config.values["jax_platforms"]
    yield
    if jax.config.values["jax_compilation_cache_dir"] != str(_cache):
        jax.config.update("jax_compilation_cache_dir", str(_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        compilation_cache.reset_cache()
    if not jax.config.values["jax_enable_x64"]:
        jax.config.update("jax_enable_x64", True)
    if jax.config.values["jax_platforms"] != platforms:
        jax.config.update("jax_platforms", platforms)


@pytest.fixture(autouse=True)
def registered_names_again():
    """What a test registers is gone after it, and a plugin that it used is out of use."""
    with registrations_undone():
        yield
    plugins._used.clear()


LONG_FILES = (
    "test_sweep_run.py",
    "test_global_search.py",
    "test_reproduce.py",
    "test_estimator.py",
    "test_trial.py",
    "test_information.py",
    "test_pipeline.py",
    "test_mean_predictions.py",
    "test_tutorials.py",
    "test_compiled_programs.py",
    "test_sweep_plugins.py",
    "test_sweep_cluster.py",
    "test_sweep_security.py",
    "test_readme.py",
    "test_residual_passes.py",
    "test_baselines.py",
)
"""They come first: a process that began one of them last would keep the other waiting (`--no-loadscope-reorder`)."""


def pytest_collection_modifyitems(items):
    """The long files first. The processes of pytest-xdist must agree on every test's name: no object's address may be in it."""
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"tests named after an address in memory: {', '.join(unstable[:5])}")
