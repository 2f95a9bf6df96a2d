"""Thousands of inputs: `python benchmarks/wide.py [--sizes 200:40000:2 ..] [--growth] [--threshold] [--correlated]`.

Fits planted mixtures of linear experts by `spectral_wide`, in single precision on one thread: orthonormal experts, gates of norm 2
orthogonal to them, sigma 0.1. A size is d:n:k. For each it prints the seconds of a fit that is compiled, its passes over the
inputs, the error E of the moments alone and of the fit, the distance of the gates from the true ones relative to their norm, the
status, the memory that the program takes beside the inputs, and that of one d x d matrix.

`--growth` prints exponents: the time of one product with T2 as n, d and the number of vectors grow. `--threshold` prints the
n / d at which an expert of mixing weight 1 / k leaves the noise of T2, from E[l^2], and measured: the squared cosine of the
experts with the leading eigenvectors. `--correlated` compares `fit` by `spectral_wide` and by `spectral_em` on 200 inputs with
correlations rho^|i - j|.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import argparse
import mmap
import time

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from moejax.methods import MethodConfig, Problem, get_method
from moejax.model.activations import get_activation
from moejax.model.metrics import recovery_error
from moejax.model.status import Status
from moejax.moments.leading_subspace import leading_subspace, second_moment_product
from moejax.moments.spectral import host_transforms

NOISE_STD, GATING_NORM = 0.1, 2.0
ROWS_OF_BLOCK = 4096


def planted(dim: int, num_rows: int, num_experts: int, seed: int = 0):
    """Inputs (n, d) and labels (n,) on the device, experts and gates (k, d); generated in blocks, without a copy."""
    random = np.random.default_rng(seed)
    k = num_experts
    rows = np.linalg.qr(random.normal(size=(dim, 2 * k - 1)))[0].T
    experts, gates = rows[:k], np.zeros((k, dim))
    gates[:-1] = GATING_NORM * rows[k:]
    memory = mmap.mmap(-1, 4 * dim * num_rows)  # aligned, so that the device takes it as it is
    x = np.frombuffer(memory, np.float32).reshape(num_rows, dim)
    y = np.empty(num_rows, np.float32)
    directions = np.concatenate([experts, gates]).T.astype(np.float32)
    for first in range(0, num_rows, ROWS_OF_BLOCK):
        block = x[first : first + ROWS_OF_BLOCK]
        random.standard_normal(block.shape, np.float32, block)
        means, logits = np.split(block @ directions, 2, axis=1)
        chosen = np.argmax(logits + random.gumbel(size=logits.shape), axis=1)
        noise = NOISE_STD * random.standard_normal(len(block))
        y[first : first + ROWS_OF_BLOCK] = means[np.arange(len(block)), chosen] + noise
    return jnp.from_dlpack(x), jnp.asarray(y), experts, gates


def gate_error(experts: np.ndarray, gates: np.ndarray, params) -> float:
    """The distance of the gates from the true ones over their norm, experts matched by cosines, gates minus their means."""
    found = np.asarray(params.experts)
    order = np.argmax(experts @ (found / np.linalg.norm(found, axis=1, keepdims=True)).T, axis=1)
    fitted = np.asarray(params.gating)[order]
    centred, truth = fitted - fitted.mean(axis=0), gates - gates.mean(axis=0)
    return float(np.linalg.norm(centred - truth) / np.linalg.norm(truth))


def problem_of(x: jax.Array, y: jax.Array, num_experts: int) -> Problem:
    """The problem of a method, with the transforms at the true noise."""
    transforms = host_transforms("linear", NOISE_STD, 3, "weighted", num_experts)
    transforms = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), transforms)
    return Problem(x, y, jnp.ones_like(y), jnp.asarray(NOISE_STD, jnp.float32), transforms)


def fit_line(dim: int, num_rows: int, num_experts: int) -> str:
    """A row of the table."""
    x, y, experts, gates = planted(dim, num_rows, num_experts)
    config = MethodConfig(fn=get_activation("linear"), num_experts=num_experts, order=3)
    method = get_method("spectral_wide")
    problem = problem_of(x, y, num_experts)
    with jax.default_matmul_precision("highest"):
        program = jax.jit(lambda key, problem: method(key, problem, config)).lower(jax.random.key(0), problem)
        program = program.compile()
    begin = time.perf_counter()
    result = jax.block_until_ready(program(jax.random.key(0), problem))
    seconds = time.perf_counter() - begin
    moments, fitted = (
        float(recovery_error(experts, found)) for found in (result.spectral.experts, result.params.experts)
    )
    memory = program.memory_analysis().temp_size_in_bytes
    return (
        f"| {dim:,} | {num_rows:,} | {num_experts} | {seconds:.1f} | {int(result.num_iterations)} | {moments:.4f} | {fitted:.5f} | "
        f"{gate_error(experts, gates, result.params):.2f} | {Status(int(result.status)).words} | {x.nbytes / 2**20:,.0f} | "
        f"{memory / 2**20:,.0f} | {4 * dim**2 / 2**20:,.0f} |"
    )


def seconds_of_product(dim: int, num_rows: int, width: int) -> float:
    """The least time of three products of T2 with a block of that many vectors."""
    x = jax.random.normal(jax.random.key(0), (num_rows, dim), jnp.float32)
    vectors = jax.random.normal(jax.random.key(1), (dim, width), jnp.float32)
    labels = x[:, 0]
    program = jax.jit(second_moment_product)
    program(x, labels, vectors).block_until_ready()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        program(x, labels, vectors).block_until_ready()
        times.append(time.perf_counter() - begin)
    return min(times)


def growth() -> None:
    """Print the exponents of the time of a product in n, d and the number of vectors."""
    base = {"dim": 2000, "num_rows": 20_000, "width": 8}
    for name, values in (
        ("num_rows", (20_000, 40_000, 80_000)),
        ("dim", (2000, 4000, 8000)),
        ("width", (8, 16, 32)),
    ):
        times = [seconds_of_product(**(base | {name: value})) for value in values]
        slope = np.polyfit(np.log(values), np.log(times), 1)[0]
        listed = ", ".join(
            f"{value:,}: {seconds:.3f} s" for value, seconds in zip(values, times, strict=True)
        )
        print(f"one product, {name} {listed}: exponent {slope:.2f}", flush=True)


def threshold(dim: int = 1000) -> None:
    """Print where the experts leave the noise of T2."""
    for k in (2, 5):
        second = host_transforms("linear", NOISE_STD, 3, "least_norm", k).second
        predicted = k**2 * float(second.second_moment)
        for ratio in (1.0, 2.0, 4.0, 8.0):
            n = int(ratio * predicted * dim)
            x, y, experts, _ = planted(dim, n, k)
            labels = problem_of(x, y, k).transforms.second(y)
            found = jax.jit(leading_subspace, static_argnames="num_vectors")(
                jax.random.key(0), x, labels, num_vectors=k
            )
            cosines = np.sum((experts @ np.asarray(found.eigenvectors)) ** 2, axis=1)
            values = ", ".join(f"{value:.3f}" for value in (*found.eigenvalues, found.next_eigenvalue))
            print(
                f"k = {k}: threshold n / d = {predicted:.2f} for equal weights; at n / d = {n / dim:.1f} squared cosines "
                f"{cosines.min():.2f} to {cosines.max():.2f}, eigenvalues {values} (the last by noise), "
                f"{int(found.num_passes)} passes",
                flush=True,
            )


def correlated(dim: int = 200, num_rows: int = 20_000) -> None:
    """Print the errors and passes of two methods for inputs with correlations rho^|i - j|."""
    random = np.random.default_rng(0)
    rows = np.linalg.qr(random.normal(size=(dim, 3)))[0].T
    print(
        "| rho | method | E | passes | log-likelihood | input_correlation | status |\n|---|---|---|---|---|---|---|"
    )
    for rho in (0.0, 0.5, 0.8):
        x = random.normal(size=(num_rows, dim))
        for column in range(1, dim):
            x[:, column] = rho * x[:, column - 1] + np.sqrt(1 - rho**2) * x[:, column]
        first = random.random(num_rows) < 1 / (1 + np.exp(-GATING_NORM * x @ rows[2]))
        y = np.where(first, x @ rows[0], x @ rows[1]) + NOISE_STD * random.normal(size=num_rows)
        for method in ("spectral_wide", "spectral_em"):
            fit = moejax.fit(jax.random.key(0), x, y, num_experts=2, method=method)
            error, found = float(recovery_error(rows[:2], fit.params.experts)), fit.diagnostics
            correlation = found.get("input_correlation", np.nan)
            print(
                f"| {rho} | {method} | {error:.5f} | {found['num_passes']} | {fit.log_likelihood:.1f} | {correlation:.2f} | "
                f"{fit.status} |",
                flush=True,
            )


def main() -> None:
    """Print the table, or what the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=["200:40000:2", "200:40000:5", "2000:40000:2"])
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--threshold", action="store_true")
    parser.add_argument("--correlated", action="store_true")
    arguments = parser.parse_args()
    if arguments.growth:
        growth()
    if arguments.threshold:
        threshold()
    if arguments.correlated:
        correlated()
    if arguments.growth or arguments.threshold or arguments.correlated:
        return
    print(
        "| d | n | k | seconds | passes | E, moments | E | gates | status | inputs, MiB | beside, MiB | d x d, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for size in arguments.sizes:
        print(fit_line(*map(int, size.split(":"))), flush=True)


if __name__ == "__main__":
    main()
