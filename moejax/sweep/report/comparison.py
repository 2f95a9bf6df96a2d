"""Paired differences between two runs, or between two methods of one run.

Trials with the same data hash, seed and number have the same data. The difference of such a pair does not contain the variation
between samples, so its standard error is smaller than that of a difference of two means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from moejax.model.metrics import SUCCESS_THRESHOLD
from moejax.registry import nearest
from moejax.sweep.report.pairing import (
    MATCHED,
    Side,
    check_draws,
    chosen_methods,
    fields_apart,
    names_of,
    notes_of,
    pairs_of,
)
from moejax.sweep.report.summary import SUCCESS_METRIC
from moejax.sweep.spec.fields import METHOD_FIELD, show

BEYOND = 2.0
"""A difference of more standard errors than this has a sign."""
_LESS_IS_BETTER = ("_error", "_rmse", "num_iterations")
_MORE_IS_BETTER = ("log_likelihood",)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The paired differences of two sides, A and B.

    Examples:
        >>> comparison = moejax.sweep.compare("runs/quickstart")
        >>> isinstance(comparison, moejax.sweep.Comparison), comparison.fields, len(comparison.unpaired)
        (True, (), 0)
    """

    table: pd.DataFrame
    """A row per configuration and metric; see `compare`."""
    unpaired: pd.DataFrame
    """A row per configuration with trials of only one side: its fields, then `side` ("A" or "B") and `trials`."""
    names: tuple[str, str]
    """What A and B are: the run folder, and the method or the settings that set it apart."""
    fields: tuple[str, ...]
    """The columns of the table that name a configuration."""
    notes: tuple[str, ...]
    """Differences between the runs that the fields do not show."""


def compare(
    run_a: Path | str,
    run_b: Path | str | None = None,
    *,
    metrics: Sequence[str] = (SUCCESS_METRIC,),
    by: Sequence[str] | None = None,
    method_a: str | None = None,
    method_b: str | None = None,
    where: str = "",
) -> Comparison:
    """Compare two runs, or two methods of one run, on the trials that have the same data.

    Two trials form a pair if they have the same data fields, seed, trial and algorithm fields. An algorithm field that has one
    value in each run, but not the same, is what is compared: it need not agree. Without `method_a` and `method_b` the methods of
    a pair are equal; of a single run with two methods, the first is A and the second is B.

    Columns of the table: the fields; `metric`; `pairs`; `without_number`, pairs of which a trial has no finite number (they
    count for success only); `mean_a`, `mean_b` and `difference` (B - A) over the other pairs; `difference_mcse`, its standard
    error; `sign`, "+" or "-" for a difference beyond 2 standard errors; `better`, "A" or "B" then; for the recovery error
    `success_a`, `success_b`, `success_difference`, its error by McNemar (the square root of the number of pairs of
    which one trial succeeded, divided by the number of pairs) and `success_better`; `only_a`, `only_b`, trials without a partner.

    Args:
        run_a: a run folder.
        run_b: another; None: the same.
        metrics: columns of the table of trials.
        by: fields of a row of the result; the pairs of other fields' values are pooled. Default: all that vary.
        method_a: the method of A.
        method_b: the method of B.
        where: a condition on fields and metrics, as for `moejax export --where`, on both sides.

    Raises:
        ValueError: a name is unknown, a method must be given, or there is no pair.
        StoreError: a store cannot be read.

    Examples:
        >>> comparison = moejax.sweep.compare("runs/quickstart", method_a="spectral", method_b="joint_em")
        >>> comparison.names, bool((comparison.table["pairs"] > 0).all())
        (('spectral', 'joint_em'), True)
    """
    same = run_b is None or Path(run_b).resolve() == Path(run_a).resolve()
    a = Side.read(run_a, where)
    b = a if run_b is None or same else Side.read(run_b, where)
    _check_metrics(metrics, a, b)
    a, b, methods_differ = chosen_methods(a, b, method_a, method_b, same)
    check_draws(a, b)
    apart = [] if same else fields_apart(a, b)
    matched = [name for name in (*MATCHED, *(() if methods_differ else (METHOD_FIELD,))) if name not in apart]
    pairs, fields = pairs_of(a, b, matched)
    paired = pairs["_merge"] == "both"
    if not paired.any():
        raise ValueError(f"{a.folder} and {b.folder}: no two trials have the same data and settings")
    named = _groups(pairs, fields, by, methods_differ, apart)
    fields = _groups(pairs[paired], fields, by, methods_differ, apart)
    table = pd.concat([_differences(pairs, fields, metric) for metric in metrics], ignore_index=True)
    return Comparison(
        table=table,
        unpaired=_unpaired(pairs[~paired], named),
        names=names_of(a, b, same, methods_differ, apart),
        fields=tuple(fields),
        notes=tuple(notes_of(a, b)),
    )


def _check_metrics(metrics: Sequence[str], a: Side, b: Side) -> None:
    known = [name for name in a.metrics if name in b.metrics]
    for name in metrics:
        if name not in known:
            raise ValueError(f"--metric {name}: unknown metric; {nearest(name, known)}")


def _groups(
    paired: pd.DataFrame,
    fields: list[str],
    by: Sequence[str] | None,
    methods_differ: bool,
    apart: Sequence[str],
) -> list[str]:
    """The fields of a row of the result."""
    if by is None:
        varying = [name for name in fields if paired[name].map(show).nunique() > 1]
        return varying if methods_differ or METHOD_FIELD in varying else [*varying, METHOD_FIELD]
    for name in by:
        if name in apart or (name == METHOD_FIELD and methods_differ):
            raise ValueError(f"--by {name}: this is what A and B differ in; expected other fields")
        if name not in fields:
            raise ValueError(f"--by {name}: unknown field; {nearest(name, fields)}")
    return list(dict.fromkeys(by))


def _numbered(pairs: pd.DataFrame, fields: Sequence[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """(rows,) the number of the group of every row, in order of appearance; and the values of each group's fields."""
    if not fields:
        return np.zeros(len(pairs), int), pd.DataFrame(index=range(min(len(pairs), 1)))
    texts = pd.DataFrame({name: pairs[name].map(show) for name in fields})
    number = texts.groupby(list(fields), sort=False).ngroup().to_numpy()
    _, first = np.unique(number, return_index=True)
    return number, pairs.iloc[first][list(fields)].reset_index(drop=True)


def _differences(pairs: pd.DataFrame, fields: Sequence[str], metric: str) -> pd.DataFrame:
    """The rows of the result for one metric; groups without a pair are left out."""
    group, values = _numbered(pairs, fields)
    count = len(values)
    paired = (pairs["_merge"] == "both").to_numpy()
    one, other = (pairs[f"{metric}_{side}"].to_numpy(dtype=float) for side in "ab")
    good = paired & np.isfinite(one) & np.isfinite(other)

    def total(numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.bincount(group[rows], numbers[rows], minlength=count)

    ones = np.ones(len(pairs))
    number, finite = total(ones, paired), total(ones, good)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_a, mean_b = total(one, good) / finite, total(other, good) / finite
        difference = total(other - one, good) / finite
        error = _error_of_mean(
            group[good],
            pairs["data"].to_numpy()[good],
            pairs["trial"].to_numpy()[good],
            (other - one)[good],
            count,
        )
    sign = _signs(difference, error)
    result = values.assign(
        metric=metric, pairs=number.astype(int), without_number=(number - finite).astype(int), mean_a=mean_a, mean_b=mean_b,
        difference=difference, difference_mcse=error, sign=sign, better=[_better(metric, mark) for mark in sign],
    )  # fmt: skip
    if metric == SUCCESS_METRIC:
        won = [(side < SUCCESS_THRESHOLD).astype(float) for side in (one, other)]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = [total(side, paired) / number for side in won]
            key = pd.MultiIndex.from_arrays([group[paired], pairs["data"][paired], pairs["trial"][paired]])
            sums = pd.Series((won[1] - won[0])[paired], index=key).groupby(level=[0, 1, 2], sort=False).sum()
            squares = np.bincount(sums.index.get_level_values(0), sums.to_numpy() ** 2, minlength=count)
            success_error = np.sqrt(squares) / number
        marks = _signs(shares[1] - shares[0], success_error)
        result = result.assign(
            success_a=shares[0], success_b=shares[1], success_difference=shares[1] - shares[0],
            success_difference_mcse=success_error, success_better=[{"+": "B", "-": "A"}.get(mark, "") for mark in marks],
        )  # fmt: skip
    for column, side in (("only_a", "left_only"), ("only_b", "right_only")):
        result[column] = total(ones, (pairs["_merge"] == side).to_numpy()).astype(int)
    return result[result["pairs"] > 0]


def _error_of_mean(
    group: np.ndarray, data: np.ndarray, trial: np.ndarray, differences: np.ndarray, count: int
) -> np.ndarray:
    """(count,) standard error of each group's mean difference.

    The differences of one sample are summed first, because they are dependent. The sums D of different trials are independent,
    and those of one distribution of the data (a stratum h, with T_h trials) have one variance:
    error^2 = sum_h T_h var_h(D) / N^2 with N the number of pairs. If a stratum has a single trial, all are one stratum.
    """
    table = pd.DataFrame({"group": group, "data": data, "trial": trial, "value": differences})
    sums = table.groupby(["group", "data", "trial"], sort=False)["value"].sum()
    strata = sums.groupby(level=["group", "data"], sort=False)
    squares = (strata.var(ddof=1) * strata.count()).groupby(level="group").sum(min_count=1)
    smallest = strata.count().groupby(level="group").min()
    whole = sums.groupby(level="group")
    plain = whole.var(ddof=1) * whole.count()
    squares = squares.where(smallest > 1, plain).reindex(range(count)).to_numpy()
    return np.sqrt(squares) / np.bincount(group, minlength=count)


def _signs(difference: np.ndarray, error: np.ndarray) -> list[str]:
    beyond = np.abs(difference) > BEYOND * error
    return [
        "" if not sure or value == 0 else "+" if value > 0 else "-"
        for value, sure in zip(difference, beyond, strict=True)
    ]


def _better(metric: str, sign: str) -> str:
    """The side, "A" or "B", for a sign of B - A; empty without a sign, or if the metric's name does not say which is good."""
    if metric.endswith(_LESS_IS_BETTER):
        return {"-": "B", "+": "A"}.get(sign, "")
    return {"+": "B", "-": "A"}.get(sign, "") if any(word in metric for word in _MORE_IS_BETTER) else ""


def _unpaired(alone: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    number, values = _numbered(alone, fields)
    parts = []
    for side, merged in (("A", "left_only"), ("B", "right_only")):
        here = (alone["_merge"] == merged).to_numpy()
        trials = np.bincount(number[here], minlength=len(values))
        parts.append(values.assign(side=side, trials=trials)[trials > 0])
    return pd.concat(parts, ignore_index=True)
