"""Sweeps and fits on a GPU or TPU: `python benchmarks/accelerator.py [--platform gpu] [--widths 1 64 512]`.

Printed, for pasting into docs/evidence/performance.md:

1. rows a second of one Newton pass (value, gradient and Hessian of the log-likelihood; d = 10, k = 3) in float32 and float64, the
   time of the copy to the device, and the relative difference of the sums from those of the CPU in float64;
2. the error of the third moment with the precision of matrix products that moejax asks for ("highest") and with JAX's default,
   which on recent GPUs and TPUs rounds to 10 or 8 bits;
3. the seconds of whole fits in float32, the second one of a shape (nothing is compiled), and their estimates' errors E;
4. complete `spectral_em` trials (d = 10, k = 3, n = 10,000, noise .1, float32) a second against the number of trials side by side
   (`--vmap-width`) on the accelerator, and on all cores of the machine; the share with E < 1e-3 and the median E must agree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from throughput import SPEC

import moejax
from moejax.environment import available_cores
from moejax.fitting.streaming.sums import Wanted, batch_program
from moejax.model.instances import InstanceScales, random_params
from moejax.moments.cross_moments import whitened_moment
from moejax.sweep import load, load_timings

D, K = 10, 3


def sweep(folder: Path, activation: str, trials: int, *options: str) -> str:
    """A row of the first table: the trials of a sweep by the command line, in a process of its own."""
    spec = folder / f"{activation}-{time.monotonic_ns()}.toml"
    spec.write_text(SPEC.format(activation=activation, trials=trials))
    out = spec.with_suffix("")
    command = [sys.executable, "-m", "moejax.cli", "sweep", str(spec), "--out", str(out), "--quiet", *options]
    environment = os.environ | {"MOEJAX_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        return f"| {activation} | {' '.join(options)} | {done.stderr.strip().splitlines()[-1:]} |"
    table, timings = load(out), load_timings(out)
    chunks = timings.groupby("chunk").agg(
        trials=("trial", "size"),
        execute=("execute_seconds", "first"),
        compile=("compile_seconds", "first"),
        wall=("wall_seconds", "first"),
        started=("started", "first"),
        process=("process", "first"),
    )
    # the first chunk of a process loads its program
    last = chunks.sort_values("started").groupby("process").tail(1) if len(chunks) > 1 else chunks
    rate = (last["trials"] / last["execute"]).sum()
    good, error = (table["recovery_error"] < 1e-3).mean(), table["recovery_error"].median()
    return (
        f"| {activation} | {' '.join(options)} | {len(table)} | {rate:.0f} | {100 * good:.1f}% | {error:.2e} | "
        f"{chunks['compile'].max():.1f} |"
    )


def newton_passes(platform: str) -> None:
    """The second table."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(D, D)))[0].T
    gating = np.zeros((K, D))
    gating[:-1] = 2.0 * basis[K : 2 * K - 1]
    params = moejax.MoEParams(basis[:K], gating, np.full(K, 0.3), np.zeros(K), np.zeros(K))
    wanted = Wanted("linear", "shared", fit_intercept=True, averaged=False, score_products=False)
    reference = None
    columns = "device | precision | rows | ms a pass | M rows a second | ms to copy | error of the Hessian"
    print(f"\n| {columns} |\n" + "|---" * 7 + "|")
    for name, precision, n in (
        ("cpu", "float64", 2**20),
        ("cpu", "float32", 2**20),
        (platform, "float64", 2**20),
        (platform, "float32", 2**20),
        (platform, "float32", 2**23),
    ):
        device = jax.local_devices(backend=name)[0]
        numbers = np.random.default_rng(1)
        x = numbers.normal(size=(n, D))
        y = x @ basis[0] + 0.3 * numbers.normal(size=n)
        with jax.enable_x64(precision == "float64"), jax.default_device(device):
            given = [np.asarray(a, precision) for a in (x, y, np.ones(n))]
            shared = jax.tree.map(lambda leaf, dtype=precision: np.asarray(leaf, dtype), (params, 0.0))
            begun = time.perf_counter()
            placed = jax.block_until_ready(jax.device_put(given, device))
            copied = time.perf_counter() - begun
            program = batch_program(wanted, (device,))
            sums = jax.block_until_ready(program(shared, *placed))
            begun = time.perf_counter()
            for _ in range(5):
                jax.block_until_ready(program(shared, *placed))
            seconds = (time.perf_counter() - begun) / 5
            observed = np.asarray(sums.curvature.observed, np.float64)
        reference = observed if reference is None else reference
        gap = np.abs(observed - reference).max() / np.abs(reference).max() if n == 2**20 else float("nan")
        print(
            f"| {device.device_kind} | {precision} | {n} | {1e3 * seconds:.2f} | {n / seconds / 1e6:.1f} "
            f"| {1e3 * copied:.1f} | {gap:.1e} |",
            flush=True,
        )


def matrix_products(platform: str) -> None:
    """The third table."""
    device = jax.local_devices(backend=platform)[0]
    random = np.random.default_rng(2)
    x, labels = random.normal(size=(200_000, D)), random.normal(size=200_000)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        exact = np.asarray(whitened_moment(jnp.asarray(x), jnp.asarray(labels), jnp.eye(D)[:, :K], order=3))
    print("\n| precision of matrix products | error of T3(W, W, W) over its largest entry |\n|---|---|")
    for precision in ("highest", "default"):
        with jax.default_device(device), jax.default_matmul_precision(precision):
            x32, l32 = (jnp.asarray(a, jnp.float32) for a in (x, labels))
            whitening = jnp.eye(D, dtype=jnp.float32)[:, :K]
            found = jax.jit(lambda *given: whitened_moment(*given, order=3))(x32, l32, whitening)
        print(f"| {precision} | {np.abs(np.asarray(found) - exact).max() / np.abs(exact).max():.1e} |")


def whole_fits(platform: str) -> None:
    """The third table."""
    scales = InstanceScales(
        *(jnp.asarray(v, jnp.float32) for v in (0.3, 2.0, 90.0, 0.0)), jnp.ones(K, jnp.float32)
    )
    truth = random_params(jax.random.key(0), scales, D)
    print("\n| method | rows | device | seconds, first | again | log-likelihood | E |\n" + "|---" * 7 + "|")
    for method, n in (("spectral_em", 20_000), ("spectral_em", 1_000_000), ("multistart", 20_000)):
        x, y, _ = map(np.asarray, moejax.sample(jax.random.key(1), truth, "linear", n))
        for name in ("cpu", platform):
            device = jax.local_devices(backend=name)[0]
            seconds = []
            with jax.default_device(device):
                for seed in range(2):
                    begun = time.perf_counter()
                    fitted = moejax.fit(jax.random.key(seed), x, y, num_experts=K, method=method)
                    seconds.append(time.perf_counter() - begun)
            error = float(moejax.recovery_error(np.asarray(truth.experts), fitted.params.experts))
            print(
                f"| {method} | {n} | {device.device_kind} | {seconds[0]:.1f} | {seconds[1]:.2f} "
                f"| {fitted.log_likelihood:.1f} | {error:.2e} |",
                flush=True,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", default="gpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--trials", type=int, default=4096)
    parser.add_argument("--activations", nargs="+", default=["linear", "tanh", "relu"])
    options = parser.parse_args()
    kind = jax.local_devices(backend=options.platform)[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {os.cpu_count()} cores", flush=True)
    newton_passes(options.platform)
    matrix_products(options.platform)
    whole_fits(options.platform)
    columns = "activation | options | trials | trials a second | E < 1e-3 | median E | compile, s"
    print(f"\n| {columns} |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for activation in options.activations:
            for width in options.widths if activation == options.activations[0] else options.widths[-1:]:
                trials = options.trials if width > 1 else 64
                one = ("--platform", options.platform, "--workers", "1", "--vmap-width", str(width))
                print(sweep(Path(scratch), activation, trials, *one), flush=True)
            cores = str(len(available_cores()))
            print(sweep(Path(scratch), activation, options.trials, "--platform", "cpu", "--workers", cores))


if __name__ == "__main__":
    main()
