"""Numbers in sentences: each is a statistic of named rows of a committed table, with its Monte Carlo standard error.

An experiment has `shows="... an error of {ours} against {theirs} ..."` and `numbers={"ours": Number(...), ...}`. The
sentence is rendered from the table, and `claims.json` in the same folder keeps the source of every number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moejax.sweep.monte_carlo import mean_and_mcse, median_and_mcse, success_and_mcse
from moejax.sweep.report.summary import with_error

TABLE_NAME, SUMMARY_NAME = "table.csv", "summary.csv"
MISSING = "—"
"""Text for a number for which a quick run has no rows."""


@dataclasses.dataclass(frozen=True)
class Number:
    """The source of a number."""

    rows: str
    """A pandas query that chooses rows."""
    column: str = "recovery_error"
    statistic: str = "median"
    """A key of STATISTICS; "value" is that of a single row, with the column `error` as its standard error."""
    file: str = TABLE_NAME
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """A computed number."""

    number: Number
    value: float
    mcse: float
    """Monte Carlo standard error; NaN if there is none."""
    text: str
    """Text of the number in the sentence."""


Statistic = Callable[[np.ndarray], tuple[float, float]]


def _finite(estimate: Callable[[np.ndarray], Any]) -> Statistic:
    def of(values: np.ndarray) -> tuple[float, float]:
        value, mcse = estimate(values[np.isfinite(values)][None, :])
        return float(value[0]), float(mcse[0])

    return of


def _success(values: np.ndarray) -> tuple[float, float]:
    share, mcse = success_and_mcse(values[None, :])
    return float(share[0]), float(mcse[0])


STATISTICS: dict[str, Statistic] = {
    "median": _finite(median_and_mcse),
    "mean": _finite(mean_and_mcse),
    "success_rate": _success,
    "minimum": lambda values: (float(np.nanmin(values)), math.nan),
    "maximum": lambda values: (float(np.nanmax(values)), math.nan),
    "count": lambda values: (float(values.size), math.nan),
}


def compute(number: Number, tables: Mapping[str, pd.DataFrame]) -> Claim | None:
    """The number from the tables by file name; None if no row is chosen.

    Raises:
        ValueError: the statistic is unknown, or is "value" with several rows.
    """
    if number.file not in tables:
        return None
    rows = tables[number.file].query(number.rows) if number.rows else tables[number.file]
    values = rows[number.column].to_numpy(dtype=float)
    if number.statistic == "value":
        if len(values) > 1:
            raise ValueError(f"claims: expected one row for {number.rows!r}, got {len(values)}")
        if not len(values):
            return None
        value = float(values[0])
        mcse = float(rows[number.error].iloc[0]) if number.error else math.nan
    else:
        if number.statistic not in STATISTICS:
            known = ", ".join(["value", *STATISTICS])
            raise ValueError(f"claims: unknown statistic {number.statistic!r}; known: {known}")
        if number.statistic == "count" and len(rows) == 0:
            return Claim(number, 0.0, math.nan, "0")
        if not np.isfinite(values).any():
            return None
        value, mcse = STATISTICS[number.statistic](values)
    return Claim(number, value, mcse, text_of(number, value, mcse))


def text_of(number: Number, value: float, mcse: float) -> str:
    """The text of a number in a sentence, with the digits that its error allows."""
    if number.statistic == "success_rate" or number.column.endswith(("success_rate", "share")):
        percent, error = 100 * value, 100 * mcse
        if not math.isfinite(error) or error == 0:
            return f"{percent:.0f} %"
        return f"{with_error(percent, error)} %" if error < 0.5 else f"{percent:.0f} ± {error:.0f} %"
    return with_error(value, mcse)


def render(
    text: str, numbers: Mapping[str, Number], tables: Mapping[str, pd.DataFrame]
) -> tuple[str, dict[str, Claim]]:
    """A sentence with its numbers filled in, and the numbers."""
    found = {name: compute(number, tables) for name, number in numbers.items()}
    sentence = text.format(
        **{name: MISSING if claim is None else claim.text for name, claim in found.items()}
    )
    return sentence, {name: claim for name, claim in found.items() if claim is not None}


def claims_json(sentence: str, claims: Mapping[str, Claim]) -> dict[str, Any]:
    """The content of claims.json."""

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "text": sentence,
        "numbers": {
            name: dataclasses.asdict(claim.number)
            | {"value": plain(claim.value), "mcse": plain(claim.mcse), "text": claim.text}
            for name, claim in claims.items()
        },
    }


def read_results(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a results folder, by file name."""
    return {
        name: pd.read_csv(folder / name) for name in (TABLE_NAME, SUMMARY_NAME) if (folder / name).is_file()
    }
