"""What do relaxed label transforms, the third moment and annealing change?

    python benchmarks/starts.py relaxed [ACTIVATION ..]    paired errors of moments with weighted and relaxed transforms, order 3
    python benchmarks/starts.py optima [CELL ..]           how often a method ends at the optimum of the truth, or above it
    python benchmarks/starts.py search [CELL ..]           the default search with and without its runs of gradient descent

d = 10, k = 3, gates of norm 3, sigma known for `relaxed`; a CELL is ACTIVATION,k,d,n, with gates of norm 1, sigma 0.1, unknown.
Of `search`, whose keys each make one fit, the first fit is made twice, so that all times are without compilation.
The activations steep_sin, sin(2 t), and steep_tanh, tanh(4 t), are registered here. Float32, as sweeps are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np

from moejax import fit, make_params, recovery_error, register_activation, sample
from moejax.environment import PRNG
from moejax.methods import get_method, polish_from, search_plan
from moejax.model.activations import activation_facts, get_activation
from moejax.sweep.trial.prepare import prepare
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings
from moejax.sweep.trial.trial import draw_trial, measured, posed, run_trial

ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid", "sin", "linear")
SEARCH_CELLS = ("tanh,8,25,5000", "square,8,20,8000")
CELLS = ("steep_tanh,6,10,4000", "steep_sin,4,10,8000")
METHODS = {
    "third_moment": {},
    "annealed_em, one random start": {"num_starts": 1},
    "annealed_em": {},
    "joint_em": {"num_starts": 1, "max_iterations": 1000},
}
WITHIN = 5.0
"""A fit that ends at most this many nats below the polished truth has found its optimum."""


def keys(seed: int, num_trials: int) -> list[jax.Array]:
    """The random keys of the trials."""
    key = jax.random.key(seed, impl=PRNG)
    return [jax.random.fold_in(key, trial) for trial in range(num_trials)]


def print_relaxed(activations: list[str], method: str, num_samples: int, num_trials: int) -> None:
    """One line for each activation, noise and angle: medians, means and the paired difference with its standard error."""
    print(f"{method}, n = {num_samples:,}, {num_trials} instances, weighted then relaxed")
    print(f"{'activation':10s} sigma angle  median E          mean E            relaxed - weighted")
    for name in activations or ACTIVATIONS:
        for noise_std in (0.1, 0.5):
            for angle in (90.0, 45.0):
                data = DataSettings(
                    activation=name,
                    num_samples=num_samples,
                    noise_std=noise_std,
                    gating_norm=3.0,
                    gating_angle=angle,
                )
                errors = []
                for kind in ("weighted", "relaxed"):
                    spec, hyper = prepare(data, AlgorithmSettings(method=method, transform=kind, order=3))
                    run = jax.jit(functools.partial(run_trial, spec=spec))
                    errors.append([float(run(key, hyper).recovery_error) for key in keys(7, num_trials)])
                weighted, relaxed = np.asarray(errors)
                gap = relaxed - weighted
                print(
                    f"{name:10s} {noise_std:5.1f} {angle:5.0f}  {np.median(weighted):.5f} {np.median(relaxed):.5f}   "
                    f"{weighted.mean():.5f} {relaxed.mean():.5f}   {gap.mean():+.5f} +- "
                    f"{gap.std(ddof=1) / num_trials**0.5:.5f}",
                    flush=True,
                )


def print_optima(cells: list[str], num_trials: int) -> None:
    """One line for each cell and method: the share of fits that end at the optimum of the truth, and their passes."""
    for cell in cells or CELLS:
        name, k, d, n = cell.split(",")
        data = DataSettings(
            activation=name, num_experts=int(k), dim=int(d), num_samples=int(n), gating_norm=1.0
        )
        for label, options in METHODS.items():
            method, random_only = label.split(",")[0], "random" in label
            algorithm = AlgorithmSettings(method=method, noise_knowledge="estimated", **options)
            try:
                spec, hyper = prepare(data, algorithm)
            except ValueError as error:
                print(f"{cell:22s} {label:30s} {error}")
                continue

            def run(key, hyper, spec=spec, random_only=random_only):
                drawn = draw_trial(key, hyper, spec=spec)
                problem, config = posed(drawn, hyper, spec=spec)
                if random_only:
                    problem = problem._replace(transforms=None, more_transforms=(), third=None)
                    config = dataclasses.replace(config, more_orders=())
                found = get_method(spec.method)(drawn.method_key, problem, config)
                best = polish_from(drawn.truth, problem, config).log_likelihood
                ended = polish_from(found.params, problem, config).log_likelihood
                error = measured(drawn, found, hyper, spec=spec).recovery_error
                return jnp.stack([ended - best, error, found.num_iterations.astype(error.dtype)])

            compiled = jax.jit(run)
            gaps, errors, passes = np.asarray([compiled(key, hyper) for key in keys(5, num_trials)]).T
            print(
                f"{cell:22s} {label:30s} {(gaps > -WITHIN).sum()} of {num_trials}, median gap {np.median(gaps):.0f} nats, "
                f"median E {np.median(errors):.4f}, {passes.mean():.0f} passes",
                flush=True,
            )


def print_search(cells: list[str], num_trials: int) -> None:
    """One line for each cell and search: recovery errors, passes, and the seconds of a fit whose programs are compiled."""
    print(
        "cell                   search            passes, median   seconds, median   largest E   ended early"
    )
    for cell in cells or SEARCH_CELLS:
        name, *sizes = cell.split(",")
        k, d, n = map(int, sizes)
        experts, gating = jnp.eye(d)[:k], jnp.eye(d)[k : 2 * k].at[-1].set(0.0)
        truth = make_params(experts, gating, 0.1)
        even = activation_facts(get_activation(name)).parity == "even"
        for label, fewest in (("with descent", search_plan.FEWEST_FOR_DESCENTS), ("without", 10**9)):
            found = []
            for trial in range(num_trials):
                x, y, _ = sample(jax.random.key(trial), truth, name, n)
                with unittest.mock.patch.object(search_plan, "FEWEST_FOR_DESCENTS", fewest):
                    for _ in range(2 if trial == 0 else 1):
                        begun = time.perf_counter()
                        result = fit(jax.random.key(trial), x, y, num_experts=k, activation=name)
                        seconds = time.perf_counter() - begun
                error = float(recovery_error(experts, result.params.experts, even))
                early = not result.diagnostics["search_end"].startswith("all its")
                found.append((result.diagnostics["num_passes"], seconds, error, early))
            passes, seconds, errors, early = np.array(found).T
            print(
                f"{cell:22s} {label:16s} {np.median(passes):15,.0f} {np.median(seconds):17.1f} {errors.max():11.4f} "
                f"{int(early.sum())} of {num_trials}",
                flush=True,
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("relaxed", "optima", "search"))
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--method", default="spectral", choices=("spectral", "spectral_residual"))
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--trials", type=int)
    chosen = parser.parse_args()
    register_activation("steep_sin", lambda t: jnp.sin(2 * t))
    register_activation("steep_tanh", lambda t: jnp.tanh(4 * t))
    if chosen.table == "relaxed":
        print_relaxed(chosen.rows, chosen.method, chosen.num_samples, chosen.trials or 200)
    elif chosen.table == "search":
        print_search(chosen.rows, chosen.trials or 3)
    else:
        print_optima(chosen.rows, chosen.trials or 8)


if __name__ == "__main__":
    main()
