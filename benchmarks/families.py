"""Do the estimates of every output family have the errors that theory predicts? Four parts, d = 10, k = 3, float64.

Orthonormal experts, gates of norm 1 orthogonal to them, standard normal inputs; the nuisances (norm, intercept, dispersion) are
known, and all parameters but the intercepts are fitted jointly where there is a fit.

* moments: n times the mean squared error of the experts of the moment estimate (without its polar refinement, which the formula
  does not cover), +- its Monte Carlo standard error, beside the prediction of `predicted_mse`, and the slope of the median
  recovery error (with the refinement) in n.
* efficiency: the mean squared error of `spectral_em` over the Cramer-Rao bound, as in efficiency.py.
* coverage: how often 95% intervals of experts and gates hold the truth.
* outliers: of 20 samples whose labels are replaced by N(0, 10^2) at random, in how many linear experts of noise 0.1 are found to
  a recovery error below 1e-3, by the Gaussian family, by Student's t with 3 degrees of freedom, and by moments alone (below 0.02).

    python benchmarks/families.py [moments efficiency coverage outliers] [--trials N] [--families poisson gamma ..]
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.likelihood import (
    confidence_intervals,
    covariance,
    cramer_rao_bound,
    fisher_information,
    free_parameters,
    parameter_blocks,
    standard_errors,
)
from moejax.methods import MethodConfig, Problem, get_method
from moejax.model import (
    InstanceScales,
    align,
    get_family,
    match_experts,
    random_params,
    recovery_error,
    sample,
)
from moejax.model.family import Nuisances
from moejax.moments import choose_order, host_transforms, predicted_mse

DIM, NUM_EXPERTS = 10, 3
FAMILIES = {
    "poisson": (0.0, 1.0),
    "negative_binomial": (0.5, 0.5),
    "binomial(10)": (0.0, 1.0),
    "gamma": (0.0, 0.5),
    "exponential": (0.0, 1.0),
    "student_t(3)": (0.0, 0.3),
    "laplace": (0.0, 0.2),
    "zero_inflated_poisson": (0.5, 0.25),
}
"""Intercept and dispersion of each."""
SIZES = (10_000, 40_000, 160_000)
EFFICIENT = ("poisson", "gamma", "binomial(10)", "student_t(3)")
BOUND_INPUTS = 2048
"""Inputs over which the information of one sample is averaged."""
SHARES = (0.0, 0.01, 0.05, 0.1)


def scales_of(intercept: float, dispersion: float) -> InstanceScales:
    """Orthonormal experts, gates of norm 1 orthogonal to them."""
    values = (jnp.asarray(v, float) for v in (dispersion, 1.0, 90.0, 0.0))
    return InstanceScales(*values, jnp.ones(NUM_EXPERTS), jnp.asarray(intercept))


def posed(key, family, at, transforms, num_samples):
    """A random mixture and its problem."""
    truth_key, sample_key, method_key = jax.random.split(key, 3)
    truth = random_params(truth_key, scales_of(at.intercept, at.dispersion), DIM)
    x, y, _ = sample(sample_key, truth, family, num_samples)
    level = jnp.asarray(at.dispersion, float)
    nuisances = Nuisances(*(jnp.asarray(v, float) for v in at))
    return truth, method_key, Problem(x, y, jnp.ones(num_samples), level, transforms, (), nuisances)


def over_trials(function, count, seed):
    """The results of function(key), stacked, by one program."""
    keys = jax.random.split(jax.random.key(seed), count)
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, jax.jit(lambda keys: jax.lax.map(function, keys))(keys))


def prepared(name):
    """(family, nuisances, order, transforms)."""
    family, (intercept, dispersion) = get_family(name), FAMILIES[name]
    at = Nuisances(1.0, intercept, dispersion if family.has_dispersion else 1.0)
    order = choose_order(family, at, dim=DIM, num_experts=NUM_EXPERTS).order
    return (
        family,
        at,
        order,
        jax.tree.map(jnp.asarray, host_transforms(family, at, order, "weighted", NUM_EXPERTS)),
    )


def moments(names, trials):
    """Print the table of the moment estimates."""
    print(f"{trials} trials; n MSE at n = {SIZES[-1]:,}\n")
    print("| family | predicted n MSE | measured | median E at n = 10^4, 4 10^4, 1.6 10^5 | slope |")
    print("|---|---|---|---|---|")
    for name in names:
        family, at, order, transforms = prepared(name)
        predicted = predicted_mse(family, at, order, "weighted", dim=DIM, num_experts=NUM_EXPERTS)
        medians, squares = [], None

        def errors(key, num_samples, polar, family=family, at=at, order=order, transforms=transforms):
            config = MethodConfig(family, NUM_EXPERTS, order, noise="known", num_polar_iterations=polar)
            truth, method_key, problem = posed(key, family, at, transforms, num_samples)
            experts = get_method("spectral")(method_key, problem, config).params.experts
            ordered = experts[match_experts(truth.experts, experts, False)]
            return recovery_error(truth.experts, experts), jnp.sum((ordered - truth.experts) ** 2, axis=1)

        for size in SIZES:
            found, _ = over_trials(functools.partial(errors, num_samples=size, polar=8), trials, 1)
            medians.append(np.median(found))
        _, squares = over_trials(functools.partial(errors, num_samples=SIZES[-1], polar=0), trials, 2)
        values = SIZES[-1] * squares.mean(axis=1)
        slope = np.polyfit(np.log(SIZES), np.log(medians), 1)[0]
        cells = ", ".join(f"{value:.5f}" for value in medians)
        error = values.std(ddof=1) / np.sqrt(trials)
        print(
            f"| {name} | {predicted:.0f} | {values.mean():.0f} +- {error:.0f} | {cells} | {slope:.2f} |",
            flush=True,
        )


def fitted(key, family, at, order, transforms, num_samples):
    """The truth, the sample, and the aligned estimate of `spectral_em` with its status."""
    noise = "shared" if family.has_dispersion else "known"
    config = MethodConfig(family, NUM_EXPERTS, order, noise=noise)
    truth, method_key, problem = posed(key, family, at, transforms, num_samples)
    result = get_method("spectral_em")(method_key, problem, config)
    free = {"noise": noise, "fit_intercept": False}
    return truth, problem, align(truth, result.params, False), result.status, free


def efficiency(names, trials, num_samples=20_000):
    """Print the ratios to the Cramer-Rao bound."""
    print(f"n = {num_samples:,}, {trials} trials: mean squared error / Cramer-Rao bound\n")
    print("| family | failed | experts | gates | noise | overall |\n|---|---|---|---|---|---|")
    for name in names:
        family, at, order, transforms = prepared(name)
        noise = "shared" if family.has_dispersion else "known"
        blocks = parameter_blocks(NUM_EXPERTS, DIM, noise=noise, fit_intercept=False)

        def trial(key, family=family, at=at, order=order, transforms=transforms, blocks=blocks):
            truth, problem, estimate, status, free = fitted(key, family, at, order, transforms, num_samples)
            error = free_parameters(estimate, **free) - free_parameters(truth, **free)
            information = fisher_information(truth, problem.x[:BOUND_INPUTS], family, **free)
            information = information * (num_samples / BOUND_INPUTS)
            bound = jnp.diag(cramer_rao_bound(information).matrix)
            ratios = {
                block: jnp.sum(error[at] ** 2) / jnp.sum(bound[at]) if at.size else jnp.nan
                for block, at in blocks.items()
                if block != "biases"
            }
            wrong = recovery_error(truth.experts, estimate.experts) >= 0.02
            return ratios | {"overall": error @ information @ error / error.size}, wrong | (status != 0)

        ratios, failed = over_trials(trial, trials, 3)
        cells = []
        for block in ("experts", "gates", "noise", "overall"):
            values = ratios[block]
            half = 1.96 * values.std(ddof=1) / np.sqrt(trials)
            cells.append("-" if np.isnan(values).all() else f"{values.mean():.3f} +- {half:.3f}")
        print(f"| {name} | {int(failed.sum())} | {' | '.join(cells)} |", flush=True)


def coverage(names, trials, num_samples=10_000):
    """Print the share of 95% intervals that hold the truth."""
    print(f"n = {num_samples:,}, {trials} trials: coverage of 95% intervals, +- its standard error\n")
    print("| family | failed | experts | gates | dispersion |\n|---|---|---|---|---|")
    for name in names:
        family, at, order, transforms = prepared(name)

        def trial(key, family=family, at=at, order=order, transforms=transforms):
            truth, problem, estimate, status, free = fitted(key, family, at, order, transforms, num_samples)
            of = covariance(estimate, problem.x, problem.y, family, **free)
            errors = standard_errors(of, estimate, **free)
            low, high = confidence_intervals(estimate, errors, **free, corrected=False)
            held = jax.tree.map(lambda a, b, c: ((a <= b) & (b <= c)).mean(), low, truth, high)
            gates = ((low.gating <= truth.gating) & (truth.gating <= high.gating))[:-1].mean()
            return held.experts, gates, held.noise_std, status != 0

        experts, gates, noise, failed = over_trials(trial, trials, 4)
        cells = [f"{v.mean():.3f} +- {v.std(ddof=1) / np.sqrt(trials):.3f}" for v in (experts, gates, noise)]
        cells[2] = cells[2] if family.has_dispersion else "-"
        print(f"| {name} | {int(failed.sum())} | {' | '.join(cells)} |", flush=True)


def outliers(trials, num_samples=10_000):
    """Print the successes with a share of replaced labels."""
    truth_family = get_family("gaussian")
    fits = {"gaussian": 0.1, "student_t(3)": 0.06}
    print(f"n = {num_samples:,}, {trials} samples: successes, and median recovery error\n")
    print("| labels replaced | gaussian | student_t(3) | moments alone |\n|---|---|---|---|")
    for share in SHARES:
        cells = {}
        for name, dispersion in fits.items():
            family = get_family(name)
            at = Nuisances(1.0, 0.0, dispersion)
            level = dispersion if name == "gaussian" else at
            channel = "linear" if name == "gaussian" else family
            transforms = jax.tree.map(
                jnp.asarray, host_transforms(channel, level, 3, "weighted", NUM_EXPERTS)
            )

            def trial(key, family=family, name=name, at=at, transforms=transforms, share=share):
                outlier_key, key = jax.random.split(key)
                truth, method_key, problem = posed(
                    key, truth_family, Nuisances(1.0, 0.0, 0.1), transforms, num_samples
                )
                place_key, value_key = jax.random.split(outlier_key)
                replaced = jax.random.uniform(place_key, problem.y.shape) < share
                y = jnp.where(replaced, 10.0 * jax.random.normal(value_key, problem.y.shape), problem.y)
                nuisances = Nuisances(*(jnp.asarray(v, float) for v in at))
                problem = problem._replace(y=y, nuisances=None if name == "gaussian" else nuisances)
                problem = problem._replace(noise_std=jnp.asarray(at.dispersion, float))
                errors = []
                for method in ("spectral", "spectral_em"):
                    config = MethodConfig(family, NUM_EXPERTS, 3)
                    found = get_method(method)(method_key, problem, config)
                    errors.append(recovery_error(truth.experts, found.params.experts))
                return errors

            alone, fitted_error = over_trials(trial, trials, 5)
            cells[name] = f"{int((fitted_error < 1e-3).sum())} of {trials}, {np.median(fitted_error):.1e}"
            cells["moments"] = f"{int((alone < 0.02).sum())} of {trials}, {np.median(alone):.1e}"
        print(f"| {share:.0%} | {' | '.join(cells[name] for name in (*fits, 'moments'))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("moments", "efficiency", "coverage", "outliers")
    parser.add_argument("parts", nargs="*", choices=(*parts, []), default=parts)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--families", nargs="*", choices=tuple(FAMILIES))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for part in options.parts or parts:
        print(f"## {part}")
        if part == "moments":
            moments(options.families or tuple(FAMILIES), options.trials or 40)
        elif part == "efficiency":
            efficiency(options.families or EFFICIENT, options.trials or 400)
        elif part == "coverage":
            coverage(options.families or ("poisson",), options.trials or 1000)
        else:
            outliers(options.trials or 20)
        print(flush=True)


if __name__ == "__main__":
    main()
