"""Growths of a mean fit and of the mixture beside it, and the criteria of each number of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.fitting.preparation import Prepared, Sample, TooManyExpertsError
from moejax.fitting.selection import criteria, left_out, num_rows_needed
from moejax.likelihood.padded import Ridge
from moejax.likelihood.predictors import num_free_parameters
from moejax.methods.growth import LARGEST_SHARE, Grown, GrowthRules
from moejax.methods.mean_search import (
    NUM_GROWTHS,
    Request,
    growths_of,
    places_for,
)
from moejax.methods.method import MethodConfig
from moejax.methods.options import FitOptions
from moejax.model.family import Family

LIKELIHOOD_GROWTHS = 2
"""Growths of the mixture, for its BIC beside the evidence of the mean."""


def why_not_mean(
    sample: Sample, noise_std: np.ndarray | None, options: FitOptions
) -> tuple[str, str, object] | None:
    """(argument, accepted values, given value) if the mean has no meaning for a fit; None if it has."""
    if sample.several_outputs:
        return "y", "one output with objective 'mean'", sample.y.shape
    if sample.offset is not None:
        return "offset", "None with objective 'mean'", sample.offset
    if isinstance(options.channel, Family):
        return "family", "'gaussian' with objective 'mean'", options.channel.name
    if noise_std is not None:
        return "noise_std", "None with objective 'mean', whose noise is estimated", noise_std.tolist()
    if options.noise != "shared" and options.objective == "mean":
        return "noise", "'shared' with objective 'mean', which has one", options.noise
    if options.log_density is not None:
        return "log_density", "None with objective 'mean', which uses no moments", options.log_density
    for name in ("gate", "gate_inputs", "expert_inputs"):
        default, given = getattr(FitOptions, name), getattr(options, name)
        if given != default:
            return name, f"{default!r} with objective 'mean'", given
    if options.method not in (FitOptions.method, "mean_fit"):
        return "method", "'multistart' with objective 'auto'", options.method
    return None


class Trial(NamedTuple):
    """Growths of one objective, and the numbers of experts among which they choose."""

    grown: Grown
    """Leaves (g, K, ..) on the host."""
    numbers: tuple[int, ...]
    refused: dict[int, str]
    """The numbers that the rows do not admit, and the reasons."""
    num_rows: float
    mean: bool
    """True for growths of a mean."""

    def evidence(self, k: int) -> float:
        """The most log evidence of k experts of a mean, or -BIC / 2 of the mixture, which approximates that of it."""
        return float(self.grown.score[self._scored(k), k - 1].max())

    def _scored(self, k: int) -> np.ndarray:
        return np.flatnonzero(np.isfinite(self.grown.score[:, k - 1]))

    @property
    def made(self) -> tuple[int, ...]:
        """The numbers that some growth made and scored."""
        return tuple(k for k in self.numbers if self._scored(k).size)


def _admitted(
    prepared: Prepared, sample: Sample, numbers: Sequence[int], options: FitOptions
) -> tuple[tuple[int, ...], dict[int, str]]:
    """The numbers of experts with a row for every coefficient, and why the others are not among them."""
    rank = prepared.units.inputs.rank
    rows = min(float((sample.weights > 0).sum()), float(sample.weights.sum()) * (1 + 1e-9))
    refused = {}
    for k in numbers:
        needed = num_rows_needed(k, rank, options.fit_intercept)
        if rows < needed:
            refused[k] = (
                f"x: expected at least {needed} rows with weight for k = {k} experts of {rank} inputs, got {rows:.6g}"
            )
    return tuple(k for k in numbers if k not in refused), refused


def fixed_ridge(options: FitOptions, dtype: np.dtype) -> Ridge | None:
    """The ridges of a mean fit that the options fix; None if the evidence finds them."""
    if options.ridge is None or options.ridge == "evidence":
        return None
    value = jnp.asarray(options.ridge, dtype)
    return Ridge(value, value)


def trials(
    key: jax.Array, prepared: Prepared, sample: Sample, numbers: Sequence[int], options: FitOptions
) -> list[Trial]:
    """Growths of a mean fit, and with objective "auto" of the mixture."""
    admitted, refused = _admitted(prepared, sample, numbers, options)
    if not admitted:
        raise TooManyExpertsError(next(iter(refused.values())))
    count = max(NUM_GROWTHS, options.average) if options.num_starts is None else options.num_starts
    require(count >= options.average, "num_starts", f"at least average = {options.average}", count)
    share = LARGEST_SHARE if len(numbers) > 1 else math.inf
    rules = GrowthRules(max(admitted), share, fixed_ridge(options, np.dtype(prepared.problem.x.dtype)))
    rows_key, mean_key, mixture_key = jax.random.split(key, 3)
    requests = [Request("mean", jax.random.split(mean_key, count), rules)]
    if options.objective == "auto":
        keys = jax.random.split(mixture_key, LIKELIHOOD_GROWTHS)
        requests.append(Request("likelihood", keys, rules._replace(ridge=None)))
    grown = growths_of(
        rows_key,
        requests,
        prepared.problem,
        config=shared_config(prepared.config),
        places=places_for(max(admitted)),
    )
    total = float(sample.weights.sum())
    return [
        Trial(one, admitted, refused, total, request.objective == "mean")
        for one, request in zip(grown, requests, strict=True)
    ]


def shared_config(config: MethodConfig) -> MethodConfig:
    """The configuration without the choices that a growth does not read, so that one program serves all of them."""
    return MethodConfig(
        fn=config.fn,
        num_experts=1,
        order=0,
        fit_intercept=config.fit_intercept,
        max_iterations=config.max_iterations,
    )


def rows_of_table(trial: Trial, prepared: Prepared, options: FitOptions) -> list[dict[str, object]]:
    """A row of criteria for each number of experts of one objective."""
    objective = "mean" if trial.mean else "likelihood"
    rank, units = prepared.units.inputs.rank, prepared.units
    offset = trial.num_rows * float(np.log(units.labels.scale))
    rows = []
    for k in trial.numbers:
        scored = np.isfinite(trial.grown.score[:, k - 1])
        ended = "the evidence fell" if trial.mean else "BIC rose"
        row = left_out(k, f"{ended}, or its coefficients would exceed half of the rows")
        if scored.any():
            best = int(np.argmax(np.where(scored, trial.grown.score[:, k - 1], -np.inf)))
            free = num_free_parameters(k, rank, "shared", options.fit_intercept)
            value = float(trial.grown.log_likelihood[best, k - 1]) - offset
            row = criteria(k, value, free, math.nan, trial.num_rows, None, "ok")
            if trial.mean:
                effective = float(trial.grown.effective[best, k - 1])
                row |= {
                    "bic": -2.0 * value + (effective + 1.0) * math.log(trial.num_rows),
                    "effective_parameters": effective,
                    "log_evidence": float(trial.grown.score[best, k - 1]) - offset,
                }
        rows.append({"objective": objective, **row})
    return rows + [{"objective": objective, **left_out(k, why)} for k, why in trial.refused.items()]
