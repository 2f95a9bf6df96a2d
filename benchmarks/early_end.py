"""The cost of a search that ends with its independent starts: `python benchmarks/early_end.py [--problems 24]`.

Each problem is a small planted mixture of linear experts, drawn anew: two or four inputs, two or three experts, 200 to 800 rows,
noise .2 to 1. It is searched three times with one key: by the rule, by the rule without its condition on the gain
(`global_search.LEAST_GAIN`), and with all generations. Printed are the nats by which the third is better than the other two, and
the gain of the best fit over one expert, in nats for each further parameter. "-" where the search did not end early.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

import moejax
from moejax.likelihood.predictors import num_free_parameters
from moejax.methods import global_search

RULES = {
    "rule": {},
    "without": {"LEAST_GAIN": -np.inf},
    "whole": {"LARGEST_UNSEEN": -1.0},
}


def fits(seed: int) -> tuple[dict[str, moejax.FitResult], float, str]:
    """The fits of a problem by the three rules, the log-likelihood of one expert, and the problem in words."""
    rng = np.random.default_rng(seed)
    d, k, n = (int(rng.choice(values)) for values in ([2, 4], [2, 3], [200, 400, 800]))
    noise_std = float(rng.choice([0.2, 0.4, 0.7, 1.0]))
    gates = rng.normal(size=(k, d)) * rng.choice([0.3, 1.0, 3.0])
    experts = rng.normal(size=(k, d))
    truth = moejax.make_params(
        experts / np.linalg.norm(experts, axis=1, keepdims=True), gates, noise_std=noise_std
    )
    x, y, _ = moejax.sample(jax.random.key(seed), truth, "linear", n)
    found = {}
    for name, constants in RULES.items():
        before = {constant: getattr(global_search, constant) for constant in constants}
        vars(global_search).update(constants)
        jax.clear_caches()  # the constants are part of the programs
        found[name] = moejax.fit(jax.random.key(1), x, y, num_experts=k)
        vars(global_search).update(before)
    one = moejax.fit(jax.random.key(1), x, y, num_experts=1).log_likelihood
    return found, one, f"d = {d}, k = {k}, n = {n}, σ = {noise_std}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    options = parser.parse_args()
    print(
        "| problem | behind, by the rule | behind, without the gain | nats a parameter |\n|---|---|---|---|"
    )
    for seed in range(options.first, options.first + options.problems):
        found, one, words = fits(seed)
        k, d = found["whole"].params.gating.shape
        more = num_free_parameters(k, d, "shared", False) - num_free_parameters(1, d, "shared", False)
        best = found["whole"].log_likelihood
        behind = (
            f"{best - found[name].log_likelihood:.2f}"
            if found[name].diagnostics["search_end"].startswith("its")
            else "-"
            for name in ("rule", "without")
        )
        print(f"| {words} | {' | '.join(behind)} | {(best - one) / more:.1f} |", flush=True)


if __name__ == "__main__":
    main()
