"""A fit of rows that do not fit in memory.

One pass surveys the rows and draws a random subsample. The whole method runs on the subsample. From its estimate, damped Newton
steps on the log-likelihood of all rows (`moejax.likelihood.polish`) climb to the maximum. The estimate of a subsample of m of n
rows is off by the order of 1 / sqrt(m), and each Newton step about squares the error: a handful of passes suffices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.fitting.arguments import key_data
from moejax.fitting.estimation import Estimate, described, evaluate, fit_each, run_method
from moejax.fitting.expert_order import curvature_in_order, order_in, reordered
from moejax.fitting.preparation import Prepared, Sample, meaning_of_weights, prepare
from moejax.fitting.result import FitResult
from moejax.fitting.streaming.checkpoint import Checkpoint
from moejax.fitting.streaming.runners import Runner, Task, gathered, own_share, run_here
from moejax.fitting.streaming.source import Source
from moejax.fitting.streaming.sums import LikelihoodTask, Sums, Wanted
from moejax.fitting.streaming.survey import (
    Survey,
    SurveyTask,
    empty_survey,
    largest_key,
    moments_of_survey,
    num_chosen,
    smallest,
)
from moejax.fitting.uncertainty import Uncertainty, uncertainty_of
from moejax.fitting.whitening import map_of_moments
from moejax.likelihood.blocks import SampleScale
from moejax.likelihood.collapse import held_noises, label_rounding
from moejax.likelihood.derivatives import Curvature, penalised
from moejax.likelihood.polish import Ascent, AscentRules, ascend, ascent_rules, first_ascent
from moejax.likelihood.predictors import free_parameters, params_from_free, predictors_of
from moejax.methods.method import MethodConfig, least_noise_of
from moejax.methods.options import FitOptions, WeightsAre
from moejax.methods.population import in_precision_of
from moejax.model.activations import activation_name, get_activation, values_on_host
from moejax.model.family import as_family, channel_facts
from moejax.model.mixture import MoEParams, mean_gates
from moejax.model.status import Status

METHODS = ("multistart", "spectral_em", "joint_em")
"""Methods that end at a maximum of the likelihood, as the passes over all rows do."""
MOST_PASSES = 50
"""Passes of Newton's method over all rows, at most."""
TOLERANCE = 1e-4
"""It has converged if the next step promises fewer nats, as in `polish`."""


class PassProgress(NamedTuple):
    """The state of a pass over the rows."""

    name: str
    """Purpose of the pass, in words."""
    rows_done: int
    """Rows that it has read."""
    rows: int | None
    """Rows of the source; None if they are not counted yet."""


Observer = Callable[[PassProgress], None]


class SourceFit(NamedTuple):
    """A fit of a source, and its subsample."""

    result: FitResult
    sample: Sample
    """The random rows on which the method was run."""
    weights_are: WeightsAre
    """The meaning of the weights that was assumed."""


class _Passes:
    """Passes over the rows of a source, each summed partition by partition, and continued after a kill."""

    def __init__(self, source: Source, runner: Runner, checkpoint: Checkpoint, observer: Observer):
        self.source, self.checkpoint = source, checkpoint
        self._runner, self._observer = runner, observer
        counts = [source.rows_of(partition) for partition in source.partitions]
        self.rows = None if None in counts else sum(count for count in counts if count is not None)

    def total(self, key: str, name: str, task: Task, like: Any) -> Any:
        """The sum of a task over all rows.

        Args:
            key: of the pass in the checkpoint.
            name: of the pass for the observer.
            task: the sum over a partition.
            like: a tree of the sum's structure.

        Raises:
            ValueError: a row is bad; OSError: a file cannot be read.
        """
        kept = self.checkpoint.get(key, (np.zeros(0), 0, like))
        done, rows, total = ([], 0, None) if kept is None else (kept[0].tolist(), int(kept[1]), kept[2])
        counted = rows

        def on_rows(more: int) -> None:
            nonlocal counted
            counted += more
            self._observer(PassProgress(name, counted, self.rows))

        self._observer(PassProgress(name, counted, self.rows))
        pending = [index for index in own_share(len(self.source.partitions)) if index not in set(done)]
        error = None
        try:
            for index, part in self._runner(task, self.source, pending, on_rows):
                total, done = task.merge(total, part), [*done, index]
                if total is not None:
                    self.checkpoint.put(key, (np.asarray(done), counted, total), at_once=False)
        except (ValueError, OSError) as raised:  # raised below, in every process
            error = raised
            if isinstance(raised, OSError):  # a disk or a cluster that may come back
                self.checkpoint.write()
        except KeyboardInterrupt:
            self.checkpoint.write()
            raise
        answers = gathered((error, total))
        for failed, _ in answers:
            if failed is not None:
                raise failed
        return functools.reduce(task.merge, (part for _, part in answers))


def fit_source(
    key: jax.Array,
    source: Source,
    num_experts: int | str | Sequence[int],
    noise_std: np.ndarray | None,
    options: FitOptions,
    *,
    checkpoint: Path | None = None,
    runner: Runner = run_here,
    observer: Observer = lambda progress: None,
    note: Callable[[str], None] = lambda line: None,
) -> SourceFit:
    """Fit a source whose rows are read again for every pass.

    Args:
        key: PRNG key of the subsample and of the method.
        source: the rows.
        num_experts: k, or several, as in `fit`.
        noise_std: () sigma if it is known.
        options: the checked options.
        checkpoint: file from which the same fit continues after a kill; it is removed at the end. None for no file.
        runner: who reads the partitions; they must be the same in all processes of `jax.distributed`.
        observer: called after every batch.
        note: called with a line if the fit continues from its checkpoint.

    Raises:
        ValueError: a bad row (the message names its place), or what `fit` refuses; OSError: a file cannot be read.
    """
    require(options.objective == "likelihood", "objective", "'likelihood' for a source", options.objective)
    require(options.method in METHODS, "method", f"{' or '.join(METHODS)} for a source", options.method)
    require(options.average == 1, "average", "1 for a source", options.average)
    for name in ("gate", "gate_inputs", "expert_inputs"):
        default = getattr(FitOptions, name)
        given = getattr(options, name)
        require(given == default, name, f"{default!r} with a source, for now", given)
    words = "one whose parameters are known with a source, such as student_t(3) or ordinal(3,-1,1)"
    require(as_family(options.channel).num_parameters == 0, "family", words, options.family)
    require(
        checkpoint is None or jax.process_count() == 1,
        "checkpoint",
        "None with several processes",
        str(checkpoint),
    )
    identity = {
        "source": source.identity,
        "num_experts": num_experts,
        "noise_std": None if noise_std is None else noise_std.tolist(),
        "options": repr(dataclasses.replace(options, activation=activation_name(options.activation))),
        # a function by its values: its address is another in every process
        "activation": values_on_host(get_activation(options.activation), np.linspace(-3.0, 3.0, 64)).tolist(),
        "key": key_data(key),
        "precision": str(jnp.result_type(float)),
    }
    kept = Checkpoint(checkpoint, identity)
    passes = _Passes(source, runner, kept, observer)
    if kept.resumed:
        note(f"continuing from {checkpoint}")
    survey, origin = _surveyed(key, passes)
    passes.rows = survey.num_rows + survey.num_skipped
    are = meaning_of_weights(survey.weight_sum, survey.whole_weights, options.weights_are)
    # a weight of the fit, which counts equal rows, over the user's
    factor = 1.0 if are == "counts" else survey.weight_sum / survey.weight_squares
    chosen = survey.chosen
    sample = Sample(chosen.x, chosen.y, chosen.weights * factor, source.precision)
    centre = options.fit_intercept
    inputs = map_of_moments(
        moments_of_survey(survey, origin, centre=centre), centre=centre, precision=source.precision
    )

    def fit_one(k: int, least_noise: np.ndarray | None = None) -> FitResult:
        prepared = prepare(sample, k, noise_std, options, inputs, least_noise)
        place = f"k={k}" if least_noise is None else f"k={k} again"
        estimate = _estimate(key, passes, prepared, survey, factor, options, place)
        # counts and the like are those of the subsample, for as many rows as there are
        ratio = survey.weight_sum * factor / sample.weights.sum()
        problem = prepared.problem._replace(weights=prepared.problem.weights * ratio)
        everything = sample._replace(weights=sample.weights * ratio)
        result = described(estimate, prepared._replace(problem=problem), everything, options)
        found = {
            "num_rows": survey.num_rows,
            "skipped_rows": survey.num_skipped,
            "subsample_rows": len(sample.y),
            "input_names": list(source.input_names),
        }
        return dataclasses.replace(result, diagnostics=found | result.diagnostics)

    if isinstance(num_experts, int):
        result = fit_one(num_experts)
    else:
        result = fit_each(
            num_experts,
            fit_one,
            num_rows=survey.weight_sum * factor,
        )
    kept.remove()
    return SourceFit(result, sample, are)


def _surveyed(key: jax.Array, passes: _Passes) -> tuple[Survey, np.ndarray]:
    """The survey of all rows, and the point from which it measures the inputs."""
    dim = len(passes.source.input_names)
    like = empty_survey(dim)
    kept = passes.checkpoint.get("survey", (like.low, like))
    if kept is not None:
        origin, survey = kept
    else:
        origin = _first_row(passes.source, dim)
        count = num_chosen(dim)
        task = SurveyTask(origin, count, largest_key(count, passes.rows), tuple(key_data(key)))
        survey = passes.total("survey of rows", "reading and checking the rows", task, like)
        if survey is None or not survey.num_rows:
            raise ValueError("source: expected rows with weight, got none")
        survey = survey._replace(chosen=smallest(survey.chosen, count))
        passes.checkpoint.drop("survey of rows")
        passes.checkpoint.put("survey", (origin, survey), at_once=True)
    counts = {name: int(getattr(survey, name)) for name in ("num_rows", "num_skipped")}
    sums = {name: float(getattr(survey, name)) for name in ("weight_sum", "weight_squares")}
    return survey._replace(**counts, **sums, whole_weights=bool(survey.whole_weights)), origin


def _first_row(source: Source, dim: int) -> np.ndarray:
    """(d,) the inputs of the first row with weight."""
    for partition in source.partitions:
        for batch in source.batches(partition, 256):
            if len(batch.y):
                return batch.x[0]
    return np.zeros(dim)


def _estimate(
    key: jax.Array,
    passes: _Passes,
    prepared: Prepared,
    survey: Survey,
    factor: float,
    options: FitOptions,
    place: str,
) -> Estimate:
    """The maximum of the likelihood of all rows that is nearest to the subsample's estimate."""
    problem, config, units, _ = prepared
    result = run_method(key, problem, options.method, config)
    start = _in_double_precision(result.params)
    with jax.enable_x64(True):
        scale = SampleScale(
            jnp.asarray(survey.weight_squares / survey.weight_sum * factor), jnp.asarray(survey.effective)
        )
    kinked, precision = channel_facts(config.fn).kinked, str(jnp.result_type(float))

    def sums_at(number: int, params: MoEParams, width: float, *, score_products: bool = False) -> Sums:
        free = (config.noise, config.fit_intercept)
        wanted = Wanted(options.activation, *free, kinked, score_products, options.family)
        at = MoEParams(*(np.asarray(leaf) for leaf in params))
        task = LikelihoodTask(units, factor, at, width, wanted, precision)
        some = jnp.zeros(())
        like = Sums(Curvature(some, some, some, some), some if score_products else None)
        this_pass = f"{place}, pass {number}"
        sums = passes.total(this_pass, this_pass, task, like)
        passes.checkpoint.drop(this_pass)
        return sums

    least = least_noise_of(problem, config)
    least = None if least is None else np.asarray(least, np.float64)
    rounding = float(label_rounding(problem.y, problem.weights))
    climb = _climb(passes.checkpoint, f"{place}, ascent", start, scale, config, sums_at, least, rounding)
    with jax.enable_x64(True):
        params = _params_at(climb.ascent.free, start, config)
        size = scale.num_samples if options.covariance == "observed" else scale.effective
        now = _with_ridge(climb.ascent.now, params, config, -config.ridge)
        here = in_precision_of(problem.x, params)
        _, posterior = evaluate(here, problem, config.fn)
        order = order_in(here, posterior, problem, units)
        if not np.array_equal(order, np.arange(len(order))):
            now = curvature_in_order(
                now, params, order, noise=config.noise, fit_intercept=config.fit_intercept
            )
            params, here = reordered(params, order), reordered(here, order)
            posterior = posterior[:, order]
        observed, products = now.observed, None
        if kinked or options.covariance == "sandwich":
            width = float(np.min(params.noise_std) * np.sqrt(params.experts.size / size))
            last = sums_at(climb.passes, params, width, score_products=options.covariance == "sandwich")
            observed, products = last.curvature.observed, last.score_products
        held = held_noises(
            params.noise_std, now.gradient, None if least is None else jnp.asarray(least), scale.num_samples
        )
        known: Uncertainty = _uncertainty(params, now, observed, products, scale.mean_weight, config, held)
    status = Status.OK if climb.converged else Status.NOT_CONVERGED
    if not np.isfinite(now.log_likelihood):
        status = Status.NOT_FINITE
    result = result._replace(
        params=params,
        mixing_weights=mean_gates(here, problem.x, problem.weights),
        history=np.asarray(climb.history),
        num_iterations=np.asarray(climb.passes + 1),
        status=np.asarray(status),
        path=None,
    )
    return Estimate(result, float(now.log_likelihood), posterior, known)


class _Climb(NamedTuple):
    """The end of an ascent over all rows."""

    ascent: Ascent
    history: list[float]
    """Penalised log-likelihood after each pass."""
    passes: int
    converged: bool


def _climb(
    checkpoint: Checkpoint,
    place: str,
    start: MoEParams,
    scale: SampleScale,
    config: MethodConfig,
    sums_at: Callable[[int, MoEParams, float], Sums],
    least_noise: np.ndarray | None,
    rounding: float,
) -> _Climb:
    """Newton's method from `start`, on the log-likelihood of all rows less the ridge."""
    epsilon = float(jnp.finfo(jnp.result_type(float)).eps)
    with jax.enable_x64(True):
        free = free_parameters(start, noise=config.noise, fit_intercept=config.fit_intercept)
        state, history, converged = first_ascent(jnp.asarray(free)), [], False
        least = None if least_noise is None else jnp.asarray(least_noise)
        rules = ascent_rules(start, scale, config.fn, TOLERANCE, least_noise=least, rounding=rounding)
        kept = checkpoint.get(place, (state, np.zeros(0), False))
        if kept is not None:
            state = jax.tree.map(jnp.asarray, kept[0])
            history, converged = kept[1].tolist(), bool(kept[2])
        while not converged and len(history) < MOST_PASSES:
            params = _params_at(state.free + state.step.delta, start, config)
            sums = sums_at(len(history), params, float(rules.width(jnp.asarray(state.passes))))
            if not np.isfinite(sums.curvature.log_likelihood) and not history:
                break
            slack = epsilon * abs(float(sums.curvature.log_likelihood))
            candidate = _with_ridge(sums.curvature, params, config, config.ridge)
            state, done = _ascend(state, candidate, rules._replace(slack=slack))
            converged = bool(done)
            history.append(float(state.now.log_likelihood))
            checkpoint.put(place, (state, np.asarray(history), converged), at_once=True)
    return _Climb(state, history, len(history), converged)


def _params_at(free: jax.Array, like: MoEParams, config: MethodConfig) -> MoEParams:
    return params_from_free(free, like, noise=config.noise, fit_intercept=config.fit_intercept)


def _in_double_precision(params: MoEParams) -> MoEParams:
    with jax.enable_x64(True):
        return MoEParams(*(jnp.asarray(np.asarray(leaf, np.float64)) for leaf in params))


def _with_ridge(curvature: Curvature, params: MoEParams, config: MethodConfig, ridge: float) -> Curvature:
    predictors = predictors_of(params, fit_intercept=config.fit_intercept)
    return penalised(jax.tree.map(jnp.asarray, curvature), predictors, config.num_experts, ridge)


_ascend: Callable[[Ascent, Curvature, AscentRules], tuple[Ascent, jax.Array]] = jax.jit(ascend)
_uncertainty = jax.jit(uncertainty_of, static_argnames="config")
