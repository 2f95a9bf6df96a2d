"""A stand-in for the numeric core, as a plugin: small, quick to compile, able to fail on demand.

The sweep engine's tests use it in this process, in worker processes and in killed coordinators alike. It
is checked here against the real core's names, so that it cannot drift from the contract.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

from moejax.sweep import trial as core

NAMES = (
    "METRICS",
    "STATUS_REASONS",
    "TrialResult",
    "check_settings",
    "static_spec",
    "prepare",
    "run_trials",
    "trial_memory_bytes",
)

FAKE_CORE = '''
"""The fake core: replaces the functions of moejax.sweep.trial when it is run as a plugin."""
import dataclasses, os, signal, time
from typing import NamedTuple
import jax, jax.numpy as jnp, numpy as np
import moejax.sweep.trial as trial

METRICS = ("recovery_error", "gating_error", "mixing_error", "noise_error", "log_likelihood_per_sample",
           "held_out_log_likelihood", "predictive_rmse", "num_iterations")
STATUS_REASONS = {0: "", 1: "non-finite", 2: "fell below"}
FAULTS = ("large", "raises", "always_raises", "kills", "refuses")

@dataclasses.dataclass(frozen=True)
class TrialSpec:
    method: str
    activation: str
    dim: int
    num_experts: int
    padded_num_samples: int

class TrialResult(NamedTuple):
    recovery_error: jax.Array
    gating_error: jax.Array
    mixing_error: jax.Array
    noise_error: jax.Array
    log_likelihood_per_sample: jax.Array
    held_out_log_likelihood: jax.Array
    predictive_rmse: jax.Array
    num_iterations: jax.Array
    status: jax.Array
    history: object = None

def check_settings(data, algorithm):
    if data.num_experts > data.dim:
        raise ValueError(f"num_experts: {data.num_experts} is more than dim; expected at most {data.dim}")
    if algorithm.method not in ("spectral", "joint_em"):
        raise ValueError(f"method: unknown method {algorithm.method!r}; expected spectral or joint_em")
    if data.activation not in ("linear", "relu", *FAULTS):
        raise ValueError(f"activation: unknown activation {data.activation!r}; did you mean linear or relu?")

def static_spec(data, algorithm, padded_num_samples=None):
    padded = padded_num_samples or 1 << (data.num_samples - 1).bit_length()
    return TrialSpec(algorithm.method, data.activation, data.dim, data.num_experts, padded)

def prepare(data, algorithm, padded_num_samples=None):
    if data.activation == "refuses" and data.noise_std > 0.4:
        raise ValueError("activation: refuses has no usable order at noise_std = 0.5")
    return static_spec(data, algorithm, padded_num_samples), {
        "num_samples": np.int32(data.num_samples), "noise_std": np.float32(data.noise_std)}

def one_trial(key, hyperparameters, spec):
    x = jax.random.normal(jax.random.wrap_key_data(key), (spec.padded_num_samples,))
    weights = jnp.arange(spec.padded_num_samples, dtype=jnp.int32) < hyperparameters["num_samples"]
    number = hyperparameters["num_samples"].astype(x.dtype)
    noise = jnp.exp((x * weights.astype(x.dtype)).sum() / jnp.sqrt(number))
    scale = 0.2 if spec.method == "joint_em" else 1.0
    error = scale * 20 * spec.dim * hyperparameters["noise_std"].astype(x.dtype) * noise / number
    status = jnp.where(noise > 12.0, 1, 0).astype(jnp.int32)
    error = jnp.where(status == 0, error, jnp.nan)
    return TrialResult(error, error / 2, error / 3, error / 4, -error, -error, error, error, status,
                       jnp.stack([error, error / 2]))

@jax.jit
def _nothing(x):
    return x

def run_trials(keys, hyperparameters, spec, vmap_width=1):
    time.sleep(float(os.environ.get("FAKE_CORE_SLEEP", "0")))
    marks = np.asarray(keys)[:, 0] % 40
    if spec.activation == "raises" and (marks == 7).any():
        raise RuntimeError("a bad trial")
    if spec.activation == "large" and vmap_width > 2:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
    if spec.activation == "always_raises":
        raise RuntimeError("nothing works")
    if spec.activation == "kills" and (marks == 7).any():
        os.kill(os.getpid(), signal.SIGKILL)
    return _run(keys, hyperparameters, spec, vmap_width)

_run = jax.jit(
    lambda keys, hyperparameters, spec, vmap_width: jax.lax.map(
        lambda pair: one_trial(pair[0], pair[1], spec), (keys, hyperparameters), batch_size=vmap_width),
    static_argnums=(2, 3))

def trial_memory_bytes(spec):
    return 4 * spec.padded_num_samples * spec.dim

for name in ("METRICS", "STATUS_REASONS", "TrialResult", "check_settings", "static_spec", "prepare",
             "run_trials", "trial_memory_bytes"):
    setattr(trial, name, globals()[name])
'''

SPEC = """
name = "fake"
methods = ["spectral", "joint_em"]
trials = 30
dim = 4
num_experts = 2
[grid]
noise_std = [0.1, 0.5]
num_samples = [40, 60, 100]
"""


def write_inputs(folder: Path, spec: str = SPEC) -> tuple[Path, Path]:
    """Write a spec and the fake core into a folder; returns their paths."""
    plugin, toml = folder / "fake_core.py", folder / "spec.toml"
    plugin.write_text(FAKE_CORE)
    toml.write_text(spec)
    return toml, plugin


def command(toml: Path, plugin: Path, out: Path, **options: object) -> list[str]:
    """A command line that runs a sweep in its own process; user errors end it with status 2 and a line."""
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from moejax.sweep import commands\n"
        "from moejax.sweep.report import figures\n"
        "figures.write_figures = lambda figures, folder: []  # they take seconds, and have tests of their own\n"
        "if __name__ == '__main__':\n"
        "    toml, plugin, out, options = sys.argv[1:]\n"
        "    try:\n"
        "        commands.sweep(Path(toml), plugin=[Path(plugin)], out=Path(out), **json.loads(options))\n"
        "    except (ValueError, OSError) as error:\n"
        "        print(error, file=sys.stderr)\n"
        "        sys.exit(2)\n"
    )
    runner = plugin.with_name("run_sweep.py")
    runner.write_text(script)
    return [
        sys.executable,
        str(runner),
        str(toml),
        str(plugin),
        str(out),
        json.dumps({"workers": 1, **options}),
    ]


def environment(**variables: str) -> dict[str, str]:
    """The environment of such a process: this one's, on the CPU, with the repository importable."""
    root = str(Path(core.__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **variables}


def run(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run such a command to its end."""
    return subprocess.run(
        arguments, env=environment(**variables), capture_output=True, text=True, timeout=300, check=False
    )


def test_fake_core_has_the_names_of_the_real_one():
    fake: dict = {}
    real = {name: getattr(core, name) for name in NAMES}
    try:
        exec(compile(FAKE_CORE, "fake_core.py", "exec"), fake)
    finally:
        for name, value in real.items():
            setattr(core, name, value)
    assert fake["METRICS"] == tuple(real["METRICS"])
    assert {"status", *fake["METRICS"]} <= set(real["TrialResult"]._fields)
    for name in ("check_settings", "static_spec", "prepare", "trial_memory_bytes"):
        positional = list(inspect.signature(real[name]).parameters)[
            : len(inspect.signature(fake[name]).parameters)
        ]
        assert len(positional) == len(inspect.signature(fake[name]).parameters), name
    assert {"vmap_width"} <= set(inspect.signature(real["run_trials"]).parameters)
    static = real["static_spec"](core.DataSettings(num_samples=1000), core.AlgorithmSettings())
    assert static.padded_num_samples == 1024
    assert dataclasses.is_dataclass(static)
    assert hash(static) == hash(static)
