r"""Fits by the mean, y ~ N(f(x), s^2), and the choice between the mean and the mixture by evidence.

Both densities have the parameters of the mixture, so that their evidence compares them. For the mean it is Laplace's approximation
with the ridges of the fit. For the mixture, which gains little by a ridge, it is -BIC / 2, BIC = -2 log-likelihood + P log n. (BIC
of a mean with its ridges is far from its evidence.) The number of experts of a mean fit is the one with the most evidence among
those whose effective coefficients are at most half of the rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from moejax.checks import require
from moejax.fitting.diagnostics import NO_MOMENTS
from moejax.fitting.estimation import Estimate, described
from moejax.fitting.expert_order import order_of_experts
from moejax.fitting.mean_trials import (
    Trial,
    fixed_ridge,
    rows_of_table,
    shared_config,
    trials,
    why_not_mean,
)
from moejax.fitting.predictive import averaged, log_gates_and_means
from moejax.fitting.preparation import Prepared, Sample, prepare
from moejax.fitting.result import FitResult, FittedInOwnUnits
from moejax.fitting.uncertainty import RidgeEffect, Uncertainty
from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.evidence import Evidence
from moejax.likelihood.information import Covariance
from moejax.likelihood.padded import mean_of, mean_sums
from moejax.methods.growth import SAME_FUNCTION
from moejax.methods.mean_search import mean_result, refined
from moejax.methods.method import MethodConfig, Problem
from moejax.methods.options import FitOptions
from moejax.methods.stages import stage
from moejax.model.family import activation_of
from moejax.model.mixture import HostParams, permute_experts

MIXTURES_TRIED = 2
"""Mixtures of the most evidence that are fitted, if the first does not end with status "ok". With exact labels none does."""
MORE_ENDS = 2
"""At least so many ends of growths more than the members of an average are climbed on all rows."""


@stage(static=("config",), fast=True)
def _products_of_scores(
    rows: jax.Array, number: jax.Array | int, variance: jax.Array, problem: Problem, *, config: MethodConfig
) -> jax.Array:
    """(P, P): sum w^2 s s', s = (y - f) J / s^2 the scores of a mean fit."""
    x, y, weights = problem.x, problem.y, problem.weights
    active = jnp.arange(rows.shape[0] // 2) < number
    design = jnp.concatenate([x.T, jnp.ones_like(y)[None]]) if config.fit_intercept else x.T
    with jax.default_matmul_precision("highest"):
        error = y - mean_of(rows, active, design, activation_of(config.fn))
        squares = jnp.where(weights > 0, weights**2 * error**2 / variance, 0.0)
        blocks = sample_blocks(x, y, squares, fit_intercept=config.fit_intercept)
        return mean_sums(rows, active, variance, blocks, activation_of(config.fn)).information


def _covariance(end: Evidence, order: np.ndarray, products: np.ndarray | None, total: float) -> Covariance:
    """Covariance of the free parameters (experts, gates less the last, log noise) of a mean fit with ordered experts.

    It is H^-1, H the Gauss-Newton matrix with its ridges, or H^-1 M H^-1 with the products M of the scores; the variance of log s
    is 1 / (2 (n - gamma)).
    """
    rows, matrix = np.asarray(end.rows), np.asarray(end.covariance, np.float64)
    places, size, k = rows.shape[0] // 2, rows.shape[1], len(order)
    if products is not None:
        matrix = matrix @ np.asarray(products, np.float64) @ matrix
    turn = np.zeros((2 * k - 1, 2 * places))
    for i, place in enumerate(order):
        turn[i, place] = 1.0
    for i, place in enumerate(order[:-1]):
        turn[k + i, places + place], turn[k + i, places + order[-1]] = 1.0, -1.0
    turn = np.kron(turn, np.eye(size))
    inside = turn @ matrix @ turn.T
    count = inside.shape[0] + 1
    full = np.zeros((count, count))
    full[:-1, :-1] = inside
    full[-1, -1] = 0.5 / max(total - float(end.effective), 1.0)
    root = np.sqrt(np.maximum(np.diag(inside), np.finfo(float).tiny))
    values = np.linalg.eigvalsh(inside / np.outer(root, root))
    condition = float(values[-1] / values[0]) if values[0] > 0 else math.inf
    return Covariance(full, np.zeros_like(full), np.diag(np.diag(full)) + 0.0, condition)  # pyright: ignore[reportArgumentType]


class _End(NamedTuple):
    """A refined optimum, with its experts in canonical order."""

    end: Evidence
    params: HostParams
    """In the units of the fit, on the host."""
    order: np.ndarray
    """(k,) places of the experts in the end's rows."""
    gates: np.ndarray
    """(n, k) P_i(x) in the problem's sample."""
    fitted: np.ndarray
    """(n,) f(x)"""


def _refined(trial: Trial, growth: int, k: int, prepared: Prepared, options: FitOptions) -> _End:
    """An end of a growth, climbed on all rows."""
    problem, config = prepared.problem, shared_config(prepared.config)
    rows, variance, ridge = jax.tree.map(
        lambda leaf: jnp.asarray(leaf[growth, k - 1], problem.x.dtype),
        (trial.grown.rows, trial.grown.variance, trial.grown.ridge),
    )
    fixed = fixed_ridge(options, np.dtype(problem.x.dtype)) is not None
    end = refined(rows, k, variance, ridge, problem, config=config, fixed_ridge=fixed)
    kept = dataclasses.replace(config, num_experts=k)
    result = mean_result(end, k, jnp.asarray(0, jnp.int32), problem, kept)
    host = HostParams(*(np.asarray(leaf, np.float64) for leaf in result.params))
    log_gates, means = log_gates_and_means(host, np.asarray(problem.x, np.float64), activation_of(config.fn))
    gates, weights = np.exp(log_gates), np.asarray(problem.weights, np.float64)
    given = prepared.units.params(host)
    order = order_of_experts(weights @ gates, given.experts[:, 0])
    host, gates = permute_experts(host, order), gates[:, order]
    return _End(end, host, order, gates, averaged(gates, means[:, order]))


def _distinct(ends: Sequence[_End], weights: np.ndarray, count: int) -> list[_End]:
    """The first `count` of ends whose functions differ."""
    kept: list[_End] = []
    for end in ends:
        same = SAME_FUNCTION * float(end.end.variance)
        if all(float(weights @ (end.fitted - other.fitted) ** 2) > same for other in kept):
            kept.append(end)
    return kept[:count]


def _finished(trial: Trial, prepared: Prepared, sample: Sample, options: FitOptions) -> FitResult:
    """The mean fit of the best ends of the growths."""
    problem = prepared.problem
    score = trial.grown.score
    best = []
    for growth in range(score.shape[0]):
        values = [(float(score[growth, k - 1]), growth, k) for k in trial.made]
        best.append(max(values))
    best = [one for one in sorted(best, reverse=True) if np.isfinite(one[0])]
    require(bool(best), "x, y", "data to which a mean can be fitted", "no finite evidence")
    weights = np.asarray(problem.weights, np.float64)
    ends: list[_End] = []
    members: list[_End] = []
    for index, (_, growth, k) in enumerate(best):
        if index >= options.average + MORE_ENDS and len(members) == options.average:
            break
        end = _refined(trial, growth, k, prepared, options)
        if np.isfinite(float(end.end.log_evidence)):
            ends = sorted([*ends, end], key=lambda end: -float(end.end.log_evidence))
            members = _distinct(ends, weights, options.average)
    require(bool(members), "x, y", "data to which a mean can be fitted", "no finite evidence")
    chosen = members[0]
    k = len(chosen.order)
    config = dataclasses.replace(prepared.config, num_experts=k, noise="shared")
    total = float(sample.weights.sum())
    covariances = [_covariance_of(member, prepared, options, total) for member in members]
    nothing = np.zeros(())
    known = Uncertainty(covariances[0], nothing, RidgeEffect(nothing, np.zeros(k - 1)))  # pyright: ignore[reportArgumentType]
    passes = jnp.asarray(
        trial.grown.num_passes.sum() + sum(int(end.end.num_passes) for end in ends), jnp.int32
    )
    found = mean_result(chosen.end, k, passes, problem, config)
    found = found._replace(params=chosen.params, mixing_weights=found.mixing_weights[chosen.order])
    estimate = Estimate(found, chosen.end.log_likelihood, jnp.asarray(chosen.gates), known)
    result = described(estimate, prepared._replace(config=config), sample, options)
    ridge = chosen.end.ridge
    # a mean fit has no moments to be biased
    notes = [note for note in result.diagnostics["notes"] if not note.startswith(NO_MOMENTS)]
    if len(members) < options.average:
        notes.append(f"average: {len(members)} distinct optima were found, not {options.average}")
    diagnostics = result.diagnostics | {
        "method": "mean_fit",
        "ridge_experts": float(ridge.experts),
        "ridge_gates": float(ridge.gates),
        "ridge_penalty": 0.0,
        "nats_below_maximum": math.nan,
        "ridge_cost": math.nan,
        "effective_parameters": float(chosen.end.effective),
        "log_evidence": float(chosen.end.log_evidence) - total * math.log(float(prepared.units.labels.scale)),
        "num_starts": score.shape[0],
        "notes": notes,
    }
    return dataclasses.replace(
        result,
        diagnostics=diagnostics,
        objective="mean",
        _averaged=tuple(
            FittedInOwnUnits(member.params, covariance, prepared.units, "shared", options.fit_intercept)
            for member, covariance in zip(members, covariances, strict=True)
        ),
    )


def _covariance_of(end: _End, prepared: Prepared, options: FitOptions, total: float) -> Covariance:
    """The covariance of an optimum by the kind that the options name."""
    products = None
    if options.covariance == "sandwich":
        config = shared_config(prepared.config)
        products = np.asarray(
            _products_of_scores(
                end.end.rows, len(end.order), end.end.variance, prepared.problem, config=config
            )
        )
    return _covariance(end.end, end.order, products, total)


def _mixture_if_better(
    mean: Trial, mixture: Trial, fit_likelihood: Callable[[int], FitResult]
) -> tuple[FitResult | None, str]:
    """The mixture with the most evidence if that is more than the mean's and its fit ends with status "ok", else None; and why."""
    of_mean, of_mixture = ({k: one.evidence(k) for k in one.made} for one in (mean, mixture))
    if not of_mixture:
        return None, "mean: no mixture has finite criteria"
    k_mean = max(of_mean, key=lambda k: of_mean[k]) if of_mean else 0
    ranked = sorted(of_mixture, key=lambda k: -of_mixture[k])
    most = of_mean.get(k_mean, -math.inf)
    by = f"{abs(most - of_mixture[ranked[0]]):.1f} nats"
    # for one expert the two densities are one, and the mean has a ridge
    if most >= of_mixture[ranked[0]] or max(k_mean, ranked[0]) == 1:
        return (
            None,
            f"mean, k = {k_mean}: its evidence is {by} above -BIC / 2 of the mixture, k = {ranked[0]}",
        )
    failures = []
    for k in [k for k in ranked if of_mixture[k] > most][:MIXTURES_TRIED]:
        result = fit_likelihood(k)
        if result.status == "ok":
            by = f"{of_mixture[k] - most:.1f} nats"
            return (
                result,
                f"likelihood, k = {k}: -BIC / 2 is {by} above the evidence of the mean, k = {k_mean}",
            )
        failures.append(f"k = {k}: {result.status}")
    return (
        None,
        f"mean: -BIC / 2 of the mixture is {by} above its evidence, but the fit is not ok ({'; '.join(failures)})",
    )


def fit_mean(
    key: jax.Array,
    sample: Sample,
    numbers: Sequence[int],
    noise_std: np.ndarray | None,
    options: FitOptions,
    fit_likelihood: Callable[[int], FitResult] | None = None,
) -> FitResult:
    """A mean fit of the number of experts with the most evidence, or the mixture if that has more.

    Args:
        key: PRNG key.
        sample: the checked sample.
        numbers: the numbers of experts among which to choose.
        noise_std: known noise; None.
        options: the checked options.
        fit_likelihood: fits a mixture of a number of experts by likelihood, for objective "auto"; None for the mean.

    Raises:
        ValueError: the mean has no meaning for these options; TooManyExpertsError: the rows admit none of the numbers.
    """
    reason = why_not_mean(sample, noise_std, options)
    if reason is not None:
        require(False, *reason)
    of_mean = dataclasses.replace(options, method="mean_fit")
    prepared = prepare(sample, 1, None, of_mean)
    trial, *others = trials(key, prepared, sample, numbers, options)
    rows = rows_of_table(trial, prepared, options)
    choice = None
    result = None
    if fit_likelihood is not None:
        (other,) = others
        rows += rows_of_table(other, prepared, options)
        result, choice = _mixture_if_better(trial, other, fit_likelihood)
    if result is None:
        result = _finished(trial, prepared, sample, options)
    diagnostics = result.diagnostics | ({} if choice is None else {"objective_choice": choice})
    table = None
    if len(numbers) > 1 or fit_likelihood is not None:
        table = pd.DataFrame(rows)
        k = result.params.experts.shape[0]
        table["chosen"] = (table["num_experts"] == k) & (table["objective"] == result.objective)
    return dataclasses.replace(result, diagnostics=diagnostics, selection=table)
