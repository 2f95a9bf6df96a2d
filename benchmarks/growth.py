"""The growth of the cost of a pass over the data with n, d and k: `python benchmarks/growth.py`.

Processor milliseconds of one pass of joint EM (E-step and the sums of its M-step) and of one Newton pass of the polish (value,
gradient, Hessian), linear experts with intercepts, float32, one thread; medians of several. One of n, d, k varies; the others are
n = 100,000, d = 10, k = 3. The exponents are slopes of a straight line in logarithms, over all sizes and over the largest three.
Passes over 10^8 rows are those of large_fit.py, many inputs those of wide.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.derivatives import likelihood_curvature
from moejax.likelihood.em import expectation
from moejax.likelihood.m_step import Point
from moejax.likelihood.predictors import predictors_of
from moejax.model.activations import get_activation
from moejax.model.mixture import MoEParams

FIXED = {"n": 100_000, "d": 10, "k": 3}
SIZES = {
    "n": (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000),
    "d": (10, 20, 40, 80, 160, 320),
    "k": (2, 3, 4, 6, 8, 12, 16),
}
SECONDS = 2.0
"""Time for the repetitions of one pass."""


def passes(n: int, d: int, k: int) -> dict[str, Callable[[], Any]]:
    """The two passes, compiled, as functions without arguments."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(n, d)), jnp.float32)
    experts = random.normal(size=(k, d)) / np.sqrt(d)
    y = jnp.asarray(x @ experts[0] + 0.3 * random.normal(size=n), jnp.float32)
    gating = np.vstack([random.normal(size=(k - 1, d)) / np.sqrt(d), np.zeros((1, d))])
    zeros = np.zeros(k)
    params = MoEParams(*(jnp.asarray(a, jnp.float32) for a in (experts, gating, zeros + 0.3, zeros, zeros)))
    fn = get_activation("linear")

    @jax.jit
    def em(params: MoEParams, x: jax.Array, y: jax.Array) -> Any:
        blocks = sample_blocks(x, y, jnp.ones_like(y), fit_intercept=True)
        point = Point(predictors_of(params, fit_intercept=True), params.noise_std)
        return expectation(point, blocks, fn=fn, experts_free=True)

    @jax.jit
    def newton(params: MoEParams, x: jax.Array, y: jax.Array) -> Any:
        blocks = sample_blocks(x, y, jnp.ones_like(y), fit_intercept=True)
        return likelihood_curvature(params, blocks, fn=fn, noise="shared", fit_intercept=True)

    return {"EM": lambda: em(params, x, y), "Newton": lambda: newton(params, x, y)}


def milliseconds(run: Callable[[], Any]) -> float:
    """The median processor time of a pass, after one that compiles."""
    jax.block_until_ready(run())
    times, begun = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < SECONDS:
        started = time.process_time()
        jax.block_until_ready(run())
        times.append(1e3 * (time.process_time() - started))
    return float(np.median(times))


def exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    """The slope in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def main() -> None:
    """Print a table for each of n, d, k."""
    for name, sizes in SIZES.items():
        found: dict[str, list[float]] = {"EM": [], "Newton": []}
        for size in sizes:
            for kind, run in passes(**(FIXED | {name: size})).items():
                found[kind].append(milliseconds(run))
        print(
            f"\n| pass, ms | {' | '.join(f'{name} = {size:,}' for size in sizes)} | exponent | of the last three |"
        )
        print("|---" * (len(sizes) + 3) + "|")
        for kind, times in found.items():
            cells = " | ".join(f"{one:.3g}" for one in times)
            print(
                f"| {kind} | {cells} | {exponent(sizes, times):.2f} | {exponent(sizes[-3:], times[-3:]):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
