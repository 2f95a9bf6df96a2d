"""Stopping by precision: trials are added in rounds until the Monte Carlo standard error is small enough.

    [precision]
    target = {metric = "recovery_error", mcse = 0.002}     # statistic = "mean" (default), "median", "success_rate"
    min_trials = 50
    max_trials = 2000

The looks are fixed in advance (min_trials, doubled each time, the last at max_trials). A look uses exactly
the trials 0..look-1. So the decision to stop a cell does not depend on the order in which trials end, or
on a resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.registry import nearest
from moejax.sweep import trial as core
from moejax.sweep.monte_carlo import mean_and_mcse, median_and_mcse, success_and_mcse
from moejax.sweep.spec.fields import finite, show, whole

if TYPE_CHECKING:
    from moejax.sweep.spec.positions import Places

STATISTICS = ("mean", "median", "success_rate")
TARGET_KEYS = ("metric", "mcse", "statistic")
PRECISION_KEYS = ("target", "min_trials", "max_trials")
DEFAULT_MIN_TRIALS = 50
MAX_TRIALS = 10**9


@dataclasses.dataclass(frozen=True)
class PrecisionRule:
    """Stop a cell once the Monte Carlo standard error of `statistic` of `metric` is at most `mcse`."""

    metric: str
    mcse: float
    statistic: str
    min_trials: int
    max_trials: int

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of trials at which a cell is judged: min_trials, doubled, the last max_trials."""
        looks = [self.min_trials]
        while looks[-1] < self.max_trials:
            looks.append(min(2 * looks[-1], self.max_trials))
        return tuple(looks)

    def standard_error(self, values: np.ndarray) -> float:
        """Monte Carlo standard error of the statistic of (t,) values; NaN is a failed trial."""
        if self.statistic == "success_rate":
            return float(success_and_mcse(values[None, :])[1][0])
        finite = values[np.isfinite(values)]
        if finite.size < 2:
            return float("inf")
        estimate = mean_and_mcse if self.statistic == "mean" else median_and_mcse
        return float(estimate(finite[None, :])[1][0])

    def target_after(self, values: np.ndarray) -> tuple[int, bool]:
        """The number of trials that a cell needs, given the values (t,) of its first t trials.

        Returns:
            (trials needed, true if the precision is reached). The first is a look; if it is at
            most t, the cell is finished.
        """
        for look in self.looks:
            if look > values.size:
                return look, False
            if self.standard_error(values[:look]) <= self.mcse:
                return look, True
        return self.looks[-1], False


def parse_precision(table: Mapping[str, Any], places: Places) -> PrecisionRule:
    """Check the [precision] table of a spec.

    Raises:
        SpecError: one line with the place, the value and the accepted values.
    """
    for key in table:
        if key not in PRECISION_KEYS:
            raise places.error(f"unknown key; {nearest(key, PRECISION_KEYS)}", "precision", key)
    metric, mcse, statistic = _checked_target(table.get("target"), places)
    if "max_trials" not in table:
        raise places.error("missing: for example max_trials = 2000", "precision", "max_trials")
    limits = {}
    for key in ("min_trials", "max_trials"):
        value = table.get(key, min(DEFAULT_MIN_TRIALS, limits.get("max_trials", DEFAULT_MIN_TRIALS)))
        trials = whole(value)
        if trials is None or not 2 <= trials <= MAX_TRIALS:
            raise places.error(
                f"{show(value)} is not accepted: expected a whole number of at least 2, and at most {MAX_TRIALS}",
                "precision",
                key,
            )
        limits[key] = trials
    if "min_trials" not in table:
        limits["min_trials"] = min(limits["min_trials"], limits["max_trials"])
    if limits["min_trials"] > limits["max_trials"]:
        raise places.error(
            f"{limits['min_trials']} is more than max_trials = {limits['max_trials']}",
            "precision",
            "min_trials",
        )
    return PrecisionRule(metric, mcse, statistic, limits["min_trials"], limits["max_trials"])


def _checked_target(target: Any, places: Places) -> tuple[str, float, str]:
    """The metric, the largest standard error of its estimate, and the statistic."""
    example = 'target = {metric = "recovery_error", mcse = 0.002}'
    if not isinstance(target, dict):
        raise places.error(f"expected {example}", "precision", "target")
    for key in target:
        if key not in TARGET_KEYS:
            raise places.error(f"unknown key {show(key)}; {nearest(key, TARGET_KEYS)}", "precision", "target")
    metric, mcse = target.get("metric"), target.get("mcse")
    if not isinstance(metric, str) or metric not in core.metric_names():
        raise places.error(
            f"metric = {show(metric)} is not accepted; {nearest(str(metric), core.metric_names())}",
            "precision",
            "target",
        )
    number = finite(mcse)
    if number is None or number <= 0:
        raise places.error(
            f"mcse = {show(mcse)} is not accepted: expected a number above 0", "precision", "target"
        )
    statistic = target.get("statistic", "mean")
    if not isinstance(statistic, str) or statistic not in STATISTICS:
        raise places.error(
            f"statistic = {show(statistic)} is not accepted; known: {', '.join(STATISTICS)}",
            "precision",
            "target",
        )
    if statistic == "success_rate" and metric != "recovery_error":
        raise places.error(
            f'metric = {show(metric)} has no success rate; it is defined for "recovery_error"',
            "precision",
            "target",
        )
    return metric, number, statistic
