"""The tidy summary of a run folder: a row per cell and metric, each estimate with its Monte Carlo error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from moejax.sweep.monte_carlo import (
    mean_and_mcse,
    median_and_mcse,
    root_mean_square_and_mcse,
    success_and_mcse,
)
from moejax.sweep.spec.fields import METHOD_FIELD, show
from moejax.sweep.spec.precision import PrecisionRule
from moejax.sweep.store.filters import matching_rows
from moejax.sweep.store.pivot import MCSE
from moejax.sweep.store.read import FIELD_COLUMNS, load_runs, metric_columns, read_rows

ESTIMATES = ("mean", "median", "bias", "rmse", "success_rate")
ERROR_SUFFIX = "_error"
"""Metrics whose names end so are errors of an estimate: their truth is 0, so they have a bias and an RMSE."""
SUCCESS_METRIC = "recovery_error"
SMALL, LARGE = 1e-3, 1e6
"""Numbers outside this range are written with an exponent."""
SMALLEST_EXPONENT = -300
"""Powers of ten below it have few digits, or are zero."""


def summarise(folder: Path | str, where: str = "") -> pd.DataFrame:
    """Summary of the folder's latest spec, or of its cells that meet a condition on the fields and the method.

    Columns: every field, `method`, `metric`, `planned`, `trials` (run), `failed`, `missing`, `ended` (the reason
    for the number of trials), then `mean`, `median`, `bias`, `rmse`, `success_rate`, each followed
    by its `..._mcse`. A failed trial (any status but ok) counts with its values: an iteration that did not
    converge still gives an estimate. A trial without a number is left out, and is no
    success. Cells with no trial at all are rows with empty estimates.

    Raises:
        StoreError: there is no store, or it cannot be read. ValueError: the condition is not accepted, or no cell meets it.
    """
    cells, rows = cells_where(*read_rows(folder), where)
    runs = load_runs(folder)
    precision = json.loads(runs[-1]["spec"])["precision"] if runs else None
    rule = PrecisionRule(**precision) if precision else None
    counts = cell_counts(cells, rows, rule)
    parts = []
    for metric in metric_columns(rows):
        part = pd.concat([cells[[*FIELD_COLUMNS, METHOD_FIELD]], counts], axis=1)
        part.insert(len(FIELD_COLUMNS) + 1, "metric", metric)
        parts.append(
            part.assign(**_estimates(metric, rows, len(cells))).assign(position=np.arange(len(cells)))
        )
    summary = pd.concat(parts).sort_values("position", kind="stable", ignore_index=True)
    return summary.drop(columns="position")


def estimates(table: pd.DataFrame, by: Sequence[str], metric: str = SUCCESS_METRIC) -> pd.DataFrame:
    """Estimates of one metric from a tidy table of trials: a row per combination of the fields, the figures' input.

    Args:
        table: from `read.load`, or read from a table.csv.
        by: fields that identify a row; the method is added.
        metric: the column to summarise.

    Returns:
        The fields, `method`, `metric`, `trials`, `failed`, and the columns `mean` .. `success_rate_mcse` of `summarise`. Success
        is defined for the recovery error, and empty for other metrics.
    """
    fields = list(dict.fromkeys([*by, METHOD_FIELD]))
    groups = table.groupby(fields, sort=False, dropna=False)
    frame = groups.agg(
        trials=("status", "size"), failed=("status", lambda status: (status != 0).sum())
    ).reset_index()
    rows = table[[metric]].assign(position=groups.ngroup()).sort_values("position", kind="stable")
    columns = _estimates(metric, rows, len(frame))
    return frame.assign(metric=metric, **columns)


def cells_where(cells: pd.DataFrame, rows: pd.DataFrame, where: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of `read_rows` whose fields and method meet a condition, and their trials.

    Raises:
        ValueError: the condition is not accepted, or no cell meets it.
    """
    if not where:
        return cells, rows
    chosen = cells.index.isin(matching_rows(cells[[*FIELD_COLUMNS, METHOD_FIELD]], where).index)
    kept = rows[chosen[rows["position"]]]
    place = np.cumsum(chosen) - 1
    rows = kept.assign(position=place[kept["position"]]).reset_index(drop=True)
    return cells[chosen].reset_index(drop=True), rows


def cell_counts(cells: pd.DataFrame, rows: pd.DataFrame, rule: PrecisionRule | None) -> pd.DataFrame:
    """For each cell: `planned`, `trials`, `failed`, `missing`, `ended`."""
    number = len(cells)
    trials = np.bincount(rows["position"], minlength=number)
    failed = np.bincount(rows["position"][rows["status"] != 0], minlength=number)
    planned = cells["first_trials"].to_numpy().copy()
    ended = np.full(number, "all trials", dtype=object)
    if rule is not None:
        values = rows[rule.metric].to_numpy()
        bounds = np.searchsorted(rows["position"], np.arange(number + 1))
        for index in range(number):
            own_rows = slice(bounds[index], bounds[index + 1])
            whole = rows["trial"].to_numpy()[own_rows]
            leading = int((whole == np.arange(whole.size)).sum())  # a killed run may leave gaps
            planned[index], reached = rule.target_after(values[own_rows][:leading])
            ended[index] = "precision reached" if reached else "max_trials reached"
    missing = np.maximum(planned - trials, 0)
    ended[missing > 0] = "unfinished"
    return pd.DataFrame(
        {"planned": planned, "trials": trials, "failed": failed, "missing": missing, "ended": ended},
        index=cells.index,
    )


def _estimates(metric: str, rows: pd.DataFrame, cells: int) -> dict[str, np.ndarray]:
    columns = {
        name: np.full(cells, np.nan) for estimate in ESTIMATES for name in (estimate, f"{estimate}_mcse")
    }

    def put(estimate: str, where: np.ndarray, pair: tuple[np.ndarray, np.ndarray]) -> None:
        columns[estimate][where], columns[f"{estimate}_mcse"][where] = pair

    values = rows[metric].to_numpy()
    positions = rows["position"].to_numpy()
    usable = np.isfinite(values)
    for where, block in _blocks(positions[usable], values[usable]):
        put("mean", where, mean_and_mcse(block))
        put("median", where, median_and_mcse(block))
        if metric.endswith(ERROR_SUFFIX):
            put("bias", where, mean_and_mcse(block))
            put("rmse", where, root_mean_square_and_mcse(block))
    if metric == SUCCESS_METRIC:
        for where, block in _blocks(positions, values):
            put("success_rate", where, success_and_mcse(block))
    return columns


def _blocks(positions: np.ndarray, values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cells with equally many values, stacked: (positions, (cells, trials) values). Positions are sorted."""
    found, starts, counts = np.unique(positions, return_index=True, return_counts=True)
    for count in np.unique(counts):
        chosen = counts == count
        yield found[chosen], values[starts[chosen][:, None] + np.arange(count)]


def swept_fields(summary: pd.DataFrame) -> list[str]:
    """The fields with more than one value, without the method; the slowest one first."""
    first_change = {}
    for name in FIELD_COLUMNS:
        values = summary[name].map(str).to_numpy()
        if not values.size:
            continue
        changed = values != values[0]
        if changed.any():
            first_change[name] = int(changed.argmax())
    return sorted(first_change, key=lambda name: -first_change[name])


def shown_pivot(table: pd.DataFrame) -> pd.DataFrame:
    """A pivot as text: every estimate with its Monte Carlo standard error, in one column."""
    shown = {}
    for name in map(str, table):
        if name in FIELD_COLUMNS or name == METHOD_FIELD:
            shown[name] = [value if isinstance(value, str) else show(value) for value in table[name]]
        elif not name.endswith(MCSE):
            errors = table.get(name + MCSE, pd.Series(math.nan, index=table.index))
            shown[name] = [
                with_error(float(value), float(error))
                for value, error in zip(table[name], errors, strict=True)
            ]
    return pd.DataFrame(shown)


def percent(share: float) -> str:
    """A share as a whole percentage; a dash if there is none."""
    return f"{share:.0%}" if math.isfinite(share) else "—"


def with_error(value: float, mcse: float) -> str:
    """An estimate and its Monte Carlo standard error with matching digits, for example 0.0123 ± 0.0004."""
    if not math.isfinite(value):
        return "—"
    if not math.isfinite(mcse) or mcse == 0:
        return f"{value:.3g}"
    places = 1 - math.floor(math.log10(mcse))  # decimal places that give two digits of the error
    size = max(abs(value), mcse)
    if not SMALL <= size < LARGE:
        exponent = math.floor(math.log10(size))
        if exponent < SMALLEST_EXPONENT:
            return f"{value:.2g} ± {mcse:.2g}"
        kept = min(max(places + exponent, 0), 12)
        return f"({value / 10**exponent:.{kept}f} ± {mcse / 10**exponent:.{kept}f})e{exponent}"
    kept = min(max(places, 0), 12)
    return f"{value:.{kept}f} ± {mcse:.{kept}f}"
