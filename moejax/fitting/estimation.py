"""From a prepared problem to a result: the method is run, and its estimate described in the units of the data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import scipy.special

from moejax.environment import compiled_fast
from moejax.fitting.adapted import adapted, with_first_family
from moejax.fitting.diagnostics import collapse_status, diagnose
from moejax.fitting.expert_order import in_order, order_of_experts
from moejax.fitting.label_units import labels_note
from moejax.fitting.predictive import density_of
from moejax.fitting.preparation import Prepared, Sample, TooManyExpertsError, prepare
from moejax.fitting.result import NO_LARGE_MATRIX, FitResult, FittedInOwnUnits
from moejax.fitting.selection import criteria, left_out, numbers_to_try, selection_table
from moejax.fitting.uncertainty import Uncertainty, uncertainty
from moejax.methods.finalists import RULED_OUT
from moejax.methods.global_search import SAME_OPTIMUM
from moejax.methods.method import Method, MethodConfig, MethodResult, Problem, lookup_method
from moejax.methods.options import FitOptions
from moejax.model.activations import activation_name
from moejax.model.families import channel_name, is_registered
from moejax.model.family import Channel, Family, as_family
from moejax.model.mixture import HostParams, MoEParams, log_joint, permute_experts, weighted_sum
from moejax.model.status import Status

RISES = 2
"""With num_experts="auto", no more experts are tried after so many numbers whose BIC is not the least so far."""
LARGEST_SHORTFALL = 0.5
"""An estimate at most this many nats below a maximum counts as the maximum: one standard error in one direction."""


def fit_sample(
    key: jax.Array,
    sample: Sample,
    num_experts: int,
    noise_std: np.ndarray | None,
    options: FitOptions,
    least_noise: np.ndarray | None = None,
) -> FitResult:
    """A fit of one number of experts to a sample.

    Args:
        key: PRNG key.
        sample: the checked sample.
        num_experts: k.
        noise_std: () or (m,) if it is known.
        options: the checked options.
        least_noise: as in `prepare`.

    Raises:
        TooManyExpertsError, ValueError: as in `fit`.
    """
    base = options.channel
    first = with_first_family(options, sample)
    prepared = prepare(sample, num_experts, noise_std, first, least_noise=least_noise)
    problem, config = prepared.problem, prepared.config
    result = run_method(key, problem, options.method, config)
    if isinstance(base, Family) and base.adapt is not None:
        result, config = adapted(result, problem, config, base)
        prepared = prepared._replace(config=config)
    value, posterior = evaluate(result.params, problem, config.fn)
    # before the covariance, whose entries are those of the ordered parameters
    result, posterior = in_order(result, posterior, problem, prepared.units)
    known = None
    if not sample.several_outputs and not lookup_method(options.method).wide:
        known = uncertainty(result.params, problem, options.covariance, config)
    summary = described(Estimate(result, value, posterior, known), prepared, sample, options)
    if options.average == 1:
        return summary
    members = best_distinct(result, problem, config, options.average)
    notes = list(summary.diagnostics["notes"])
    if len(members) < options.average:
        notes.append(f"average: {len(members)} distinct optima were found, not {options.average}")
    return dataclasses.replace(
        summary,
        _averaged=tuple(
            FittedInOwnUnits(params, None, prepared.units, config.noise, config.fit_intercept)
            for params in members
        ),
        diagnostics=summary.diagnostics | {"notes": notes},
    )


def best_distinct(
    result: MethodResult, problem: Problem, config: MethodConfig, count: int
) -> list[HostParams]:
    """The best optima of a search, the result first, with experts in canonical order; fewer than `count` if fewer are distinct.

    Two are distinct if their log-densities of the sample differ by SAME_OPTIMUM or more, as a sum of squares. One that is behind
    the best by more than RULED_OUT standard errors of the difference (Vuong 1989) is no optimum to average over.
    """
    weights, x, y = (np.asarray(a, np.float64) for a in (problem.weights, problem.x, problem.y))
    assert result.finalists is not None, "the method keeps its finalists"
    values = np.asarray(result.finalists.log_likelihoods, np.float64)
    chosen: list[HostParams] = []
    profiles: list[np.ndarray] = []
    for index in np.argsort(-values, kind="stable"):
        if not np.isfinite(values[index]) or len(chosen) == count:
            break
        params = HostParams(*(np.asarray(leaf[index], np.float64) for leaf in result.finalists.params))
        density = density_of(params, x, config.fn)
        profile = density.log_density(y)
        behind = profiles[0] - profile if profiles else np.zeros_like(profile)
        error = np.sqrt(weights @ (behind - weights @ behind / weights.sum()) ** 2)
        distinct = all(weights @ (profile - other) ** 2 >= SAME_OPTIMUM for other in profiles)
        if distinct and weights @ behind <= RULED_OUT * error:
            counts = weights @ scipy.special.softmax(density.log_joint(y), axis=1)
            first = params.experts.reshape(len(counts), -1)[:, 0]
            chosen.append(permute_experts(params, order_of_experts(counts, first)))
            profiles.append(profile)
    return chosen


class Estimate(NamedTuple):
    """An estimate in the units of the fit."""

    result: MethodResult
    log_likelihood: jax.Array | float
    """() nats, of all rows."""
    posterior: jax.Array
    """(n, k) responsibilities in the problem's sample."""
    uncertainty: Uncertainty | None
    """None for several outputs."""


def described(estimate: Estimate, prepared: Prepared, sample: Sample, options: FitOptions) -> FitResult:
    """The estimate in the units of the data, with its diagnostics.

    Args:
        estimate: in the units of the fit.
        prepared: the problem that it solves.
        sample: the sample in the units of the data; its weights sum to the number of rows that the log-likelihood counts.
        options: the checked options.
    """
    problem, config, units, order_reason = prepared
    result, value, posterior, known = estimate
    # a density of the fitted labels is the density of y times the unit
    per_sample = float(np.sum(np.log(np.broadcast_to(units.labels.scale, sample.y.shape[1:]))))
    of_unit = float(sample.weights.sum()) * per_sample
    history = np.asarray(result.history, np.float64) - of_unit
    diagnostics = {
        "activation": activation_name(options.activation),
        "family_parameters": as_family(options.channel).num_parameters,
        "has_dispersion": as_family(config.fn).has_dispersion,
        "family": channel_name(config.fn) if isinstance(config.fn, Family) else "gaussian",
        "method": options.method,
        "noise": config.noise,
        "fit_intercept": config.has_expert_biases,
        "order": config.order or None,
        "order_choice": order_reason,
        "moment_noise_std": (np.asarray(problem.noise_std, np.float64) * units.labels.scale).tolist(),
        "mixing_weights": np.asarray(result.mixing_weights).tolist(),
        "num_passes": int(result.num_iterations),
        "num_samples": float(sample.weights.sum()),
        "has_offset": sample.offset is not None,
        **diagnose(result, problem, np.asarray(posterior, np.float64), units, config, known),
    }
    if "optima" in diagnostics:
        diagnostics["optima"] = [value - of_unit for value in diagnostics["optima"]]
    note = None
    if not isinstance(config.fn, Family):
        note = labels_note(sample.y, sample.weights, config.fn, diagnostics["activation"])
    if note is not None:
        diagnostics["notes"].insert(0, note)
    status = Status(int(result.status)).words
    collapsed = diagnostics["collapsed_experts"]
    if collapsed:
        status = collapse_status(collapsed)
    at_maximum = known is not None and not collapsed and float(known.shortfall) < LARGEST_SHORTFALL
    if known is not None and not collapsed and not at_maximum:
        diagnostics["notes"].append(
            "no standard errors: they are for a maximum of the likelihood, and the estimate is not at one"
        )
    if lookup_method(options.method).wide:
        diagnostics["notes"].append(f"no standard errors: {NO_LARGE_MATRIX}")
    covariance = known.covariance if known is not None and at_maximum else None
    unregistered_family = (
        config.fn if isinstance(config.fn, Family) and not is_registered(config.fn) else None
    )
    kept, covariance = jax.tree.map(np.asarray, (result.params, covariance))
    fitted = FittedInOwnUnits(kept, covariance, units, config.noise, config.has_expert_biases, config.columns)
    return FitResult(
        units.params(result.params),
        float(value) - of_unit,
        history[np.isfinite(history)],
        diagnostics,
        status,
        fitted.errors(units),
        _fitted=fitted,
        _family=unregistered_family,
    )


def fit_each(
    num_experts: str | Sequence[int],
    fit_one: Callable[[int, np.ndarray | None], FitResult],
    *,
    num_rows: float,
) -> FitResult:
    """A fit for each number of experts that the data admit; the one with the least BIC, with the table of all.

    Args:
        num_experts: the numbers to try, or "auto".
        fit_one: fits one number of experts, with a least noise of each expert as in `prepare`.
        num_rows: rows, as BIC counts them.

    Raises:
        ValueError: the data admit none.
    """
    results: dict[int, FitResult] = {}
    refusals: dict[int, str] = {}

    rises, least = 0, math.inf
    numbers = numbers_to_try(num_experts)
    for k in numbers:
        try:
            results[k] = fit_one(k, None)
        except TooManyExpertsError as error:
            refusals[k] = str(error)
            continue
        bic = -2.0 * results[k].log_likelihood + results[k].num_parameters * math.log(num_rows)
        rises = 0 if bic < least else rises + 1
        least = min(bic, least)
        if num_experts == "auto" and rises == RISES:
            refusals |= dict.fromkeys(range(k + 1, max(numbers) + 1), f"BIC rose {RISES} times before")
            break
    if not results:
        raise TooManyExpertsError(next(iter(refusals.values())))
    _with_one_floor(results, fit_one)
    rows = [left_out(k, reason) for k, reason in refusals.items()]
    for k, result in results.items():
        rows.append(
            criteria(
                k,
                result.log_likelihood,
                result.num_parameters,
                result.diagnostics["classification_entropy"],
                num_rows,
                result.diagnostics.get("second_moment_eigenvalues"),
                result.status,
            )
        )
    table = selection_table(sorted(rows, key=lambda row: row["num_experts"]))
    return dataclasses.replace(
        results[int(table.loc[table["chosen"], "num_experts"].iloc[0])], selection=table
    )


def _with_one_floor(
    results: dict[int, FitResult], fit_one: Callable[[int, np.ndarray | None], FitResult]
) -> None:
    """Repeat the fits in which an expert fits its samples exactly, all with the largest of their floors of the noise.

    The log-likelihood of such a fit depends on the floor, which depends on the other noises; only at one floor is it the number of
    experts that decides.
    """
    exact = [k for k, result in results.items() if result.diagnostics["exact_experts"]]
    if len(results) == 1 or not exact:
        return
    floor = np.max([results[k].diagnostics["noise_floor"] for k in exact], axis=0)
    for k in exact:
        results[k] = fit_one(k, floor)


def run_method(key: jax.Array, problem: Problem, method: str, config: MethodConfig) -> MethodResult:
    """The method by name, as one compiled program or in its compiled stages."""
    registered = lookup_method(method)
    with jax.default_matmul_precision("highest"):
        if registered.staged:
            return registered.method(key, problem, config)
        return _compiled(key, problem, config, registered.method)


@functools.partial(jax.jit, static_argnames=("method", "config"), compiler_options=compiled_fast())
def _compiled(key: jax.Array, problem: Problem, config: MethodConfig, method: Method) -> MethodResult:
    return method(key, problem, config)


@functools.partial(jax.jit, static_argnames="fn", compiler_options=compiled_fast())
def evaluate(params: MoEParams, problem: Problem, fn: Channel) -> tuple[jax.Array, jax.Array]:
    """() log-likelihood and (n, k) responsibilities."""
    with jax.default_matmul_precision("highest"):
        joint = log_joint(params, problem.x, problem.y, fn)
    value = weighted_sum(jax.nn.logsumexp(joint, axis=1), problem.weights)
    return value, jax.nn.softmax(joint, axis=1)
