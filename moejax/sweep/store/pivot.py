"""Pivots of the table of trials: a statistic for each combination of values of two groups of fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from moejax.registry import nearest
from moejax.sweep.monte_carlo import (
    mean_and_mcse,
    median_and_mcse,
    root_mean_square_and_mcse,
    success_and_mcse,
)
from moejax.sweep.spec.fields import METHOD_FIELD, show
from moejax.sweep.store.read import FIELD_COLUMNS

SUCCESS_RATE, SUCCESS_METRIC, COUNT = "success_rate", "recovery_error", "trials"
STATISTICS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "median": median_and_mcse,
    "mean": mean_and_mcse,
    "rmse": root_mean_square_and_mcse,
}
MCSE = "_mcse"


@dataclasses.dataclass(frozen=True)
class Pivot:
    """The rows, columns and value of a pivot, checked against a table."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    value: str
    """A metric, `success_rate` or `trials`."""
    statistic: str
    """Of the metric: a key of STATISTICS."""

    @classmethod
    def parse(cls, texts: Sequence[str], table: pd.DataFrame, option: str = "--pivot") -> Pivot:
        """The pivot that the words ROWS COLUMNS VALUE describe.

        Args:
            texts: fields of the rows and of the columns, such as "num_samples,noise_std"; and a metric, STATISTIC:METRIC,
                `success_rate` or `trials`.
            table: the table of trials.
            option: its name in messages.

        Raises:
            ValueError: a field, a metric or a statistic is unknown, or a field is given twice.
        """
        fields = [*FIELD_COLUMNS, METHOD_FIELD]
        groups = [tuple(name.strip() for name in text.split(",") if name.strip()) for text in texts[:2]]
        for word, group in zip(("ROWS", "COLUMNS"), groups, strict=True):
            if not group:
                raise ValueError(f"{option}: {word}: expected a field, such as num_samples or method")
            for name in group:
                if name not in fields:
                    raise ValueError(f"{option}: {word}: {name} is no field; {nearest(name, fields)}")
        both = [*groups[0], *groups[1]]
        for name in both:
            if both.count(name) > 1:
                raise ValueError(f"{option}: {name}: given twice; expected different fields")
        statistic, _, value = texts[2].rpartition(":")
        metrics = [str(name) for name in table if name not in (*fields, "trial", "status", "reason")]
        if statistic and statistic not in STATISTICS:
            raise ValueError(
                f"{option}: VALUE: {statistic}: unknown statistic; {nearest(statistic, STATISTICS)}"
            )
        known = metrics if statistic else [*metrics, SUCCESS_RATE, COUNT]
        if value not in known:
            raise ValueError(f"{option}: VALUE: {value}: unknown column; {nearest(value, known)}")
        return cls(groups[0], groups[1], value, statistic or "median")

    @property
    def title(self) -> str:
        """The statistic in words."""
        what = self.value if self.value in (SUCCESS_RATE, COUNT) else f"{self.statistic} of {self.value}"
        return f"{what} by {', '.join(self.rows)} and {', '.join(self.columns)}"

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """A row per combination of values of the row fields that occurs, in the table's order.

        Columns: the row fields; for each combination of values of the column fields the statistic, and in the next column, whose
        name ends with `_mcse`, its Monte Carlo standard error. Trials of all other fields are pooled. Trials without a finite
        number are left out, and are no success.
        """
        sides = [_numbered(table, names) for names in (self.rows, self.columns)]
        (row_of, row_values), (column_of, column_values) = sides
        heads = [_head(self.columns, values) for values in column_values.itertuples(index=False)]
        result = row_values.copy()
        for column, head in enumerate(heads):
            estimates = [
                self._estimate(table[(row_of == row) & (column_of == column)])
                for row in range(len(row_values))
            ]
            result[head] = [value for value, _ in estimates]
            if self.value != COUNT:
                result[head + MCSE] = [mcse for _, mcse in estimates]
        return result

    def _estimate(self, trials: pd.DataFrame) -> tuple[float, float]:
        if self.value == COUNT:
            return len(trials), np.nan
        if self.value == SUCCESS_RATE:
            values, function = trials[SUCCESS_METRIC].to_numpy(dtype=float), success_and_mcse
        else:
            values, function = trials[self.value].to_numpy(dtype=float), STATISTICS[self.statistic]
            values = values[np.isfinite(values)]
        if not values.size:
            return np.nan, np.nan
        value, mcse = function(values[None, :])
        return float(value[0]), float(mcse[0])


def _numbered(table: pd.DataFrame, fields: Sequence[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """(rows,) the number of the group of every row, in order of appearance; and the values of the groups."""
    texts = pd.DataFrame({name: table[name].map(show) for name in fields})
    number = texts.groupby(list(fields), sort=False).ngroup().to_numpy()
    _, first = np.unique(number, return_index=True)
    return number, table.iloc[first][list(fields)].reset_index(drop=True)


def _head(fields: Sequence[str], values: Sequence[object]) -> str:
    """The name of a column, such as "spectral, noise_std=0.1"."""
    return ", ".join(
        str(value) if name == METHOD_FIELD else f"{name}={value if isinstance(value, str) else show(value)}"
        for name, value in zip(fields, values, strict=True)
    )
