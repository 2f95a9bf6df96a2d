"""How often does a default fit find the best known optimum on real data? `python benchmarks/global_optimum.py [DATASET ...]`.

Airfoil and Concrete, standardised, linear experts with intercepts, shared noise, k = 2, 3, 4. The reference is the best of 2,000
EM fits of up to 800 passes from random starts: experts uniform on the unit sphere for whitened inputs, zero gates, no biases, the
labels' standard deviation as noise; `--reference FILE` stores it (half an hour on one core). A fit counts as a hit within one nat
of it. A fit
ended early if its independent starts sufficed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from moejax.fitting.datasets import load
from moejax.fitting.whitening import input_map
from moejax.likelihood import joint_em
from moejax.methods import MethodConfig, Problem, random_starts

KEYS, STARTS, PASSES, BATCH = 10, 2000, 800, 100


def standardised(name: str) -> tuple[np.ndarray, np.ndarray]:
    data = load(name)
    return (data.x - data.x.mean(0)) / data.x.std(0), (data.y - data.y.mean()) / data.y.std()


def random_start_optima(x: np.ndarray, y: np.ndarray, num_experts: int) -> np.ndarray:
    """(STARTS,) log-likelihoods at the end of EM."""
    whitening = input_map(x, np.ones(len(y)), centre=True)
    z, labels = jnp.asarray((x - whitening.mean) @ whitening.matrix), jnp.asarray(y)
    problem = Problem(z, labels, jnp.ones_like(labels), jnp.std(labels), None)
    linear = moejax.model.activations.get_activation("linear")
    config = MethodConfig(fn=linear, num_experts=num_experts, order=0, fit_intercept=True)
    starts = random_starts(jax.random.key(12345), problem, config, STARTS, jnp.std(labels))

    @jax.jit
    def climb(starts, problem):
        def run(start):
            data = (problem.x, problem.y, problem.weights)
            return joint_em(start, *data, fn=linear, num_steps=PASSES, fit_intercept=True).log_likelihood

        return jax.lax.map(run, starts)

    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + BATCH], starts) for i in range(0, STARTS, BATCH)]
    return np.concatenate([np.asarray(climb(part, problem)) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="*", default=["airfoil", "concrete"])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--reference", type=Path, default=Path("runs/global_optimum.json"))
    options = parser.parse_args()
    known = json.loads(options.reference.read_text()) if options.reference.exists() else {}
    columns = (
        "data | k | best of 2,000 | share within 1 nat | hits of 10 | best fit | worst fit | ended early"
    )
    print(f"| {columns} | seconds (median) | first |\n|" + "---|" * 10)
    for name in options.datasets:
        x, y = standardised(name)
        for k in options.experts:
            if f"{name} {k}" not in known:
                optima = random_start_optima(x, y, k)
                known[f"{name} {k}"] = [float(optima.max()), float((optima > optima.max() - 1.0).mean())]
                options.reference.parent.mkdir(parents=True, exist_ok=True)
                options.reference.write_text(json.dumps(known))
            best, share = known[f"{name} {k}"]
            values, seconds, early = [], [], 0
            for seed in range(KEYS + 1):  # the first compiles
                begin = time.perf_counter()
                fitted = moejax.fit(jax.random.key(100 + seed), x, y, num_experts=k, fit_intercept=True)
                seconds.append(time.perf_counter() - begin)
                values.append(fitted.log_likelihood)
                early += fitted.diagnostics["search_end"].startswith("its") and seed > 0
            found = np.asarray(values[1:])
            print(
                f"| {name} | {k} | {best:.2f} | {share:.4f} | {(found > best - 1.0).sum()} | {found.max():.2f} | "
                f"{found.min():.2f} | {early} | {np.median(seconds[1:]):.1f} | {seconds[0]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
