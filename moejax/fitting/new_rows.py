"""New rows for a fit, from a file: its columns are found by name, and its columns of text are encoded as those of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.checks import brief
from moejax.fitting.categories import Category, indicators
from moejax.fitting.delimited_text import Column
from moejax.fitting.tables import named_columns, numbers_of
from moejax.registry import nearest


class NewRows(NamedTuple):
    """Rows of a file in the columns of a fit."""

    x: np.ndarray
    """(n, d)"""
    y: np.ndarray | None
    """(n,) the target, if the file has it."""
    offset: np.ndarray | None
    """(n,) the offset, if the fit had one."""
    notes: tuple[str, ...]
    """A sentence for each choice that was made in reading the file."""


def read_new_rows(
    path: Path,
    input_names: Sequence[str],
    categories: Sequence[Category],
    target: str,
    offset: str | None = None,
    *,
    separator: str | None = None,
    decimal: str | None = None,
) -> NewRows:
    """Read the inputs of a fit, in its order, from a file whose columns may have any order; other columns are ignored.

    Args:
        path: a file that `read_columns` reads.
        input_names: (d,) the inputs of the fit, the indicators of its categories among them.
        categories: the columns of text.
        target: the target of the fit, which the file may have. A column without any value counts as absent.
        offset: the column of the fit's offset, if it had one.
        separator: as in `read_columns`.
        decimal: as in `read_columns`.

    Raises:
        ValueError: a column is missing, or a cell is no number or no level of the fit; OSError: the file cannot be read.
    """
    columns, notes = named_columns(path, separator, decimal)
    by_name = {column.name: column for column in columns}
    of_indicator = {name: category for category in categories for name in category.indicator_names}
    encoded: dict[str, np.ndarray] = {}

    def found(name: str, role: str = "an input") -> Column:
        if name not in by_name:
            raise ValueError(f"{path}: no column {brief(name)}, {role} of the fit; {nearest(name, by_name)}")
        return by_name[name]

    parts = []
    for name in input_names:
        category = of_indicator.get(name)
        if category is None:
            parts.append(numbers_of(path, [found(name)])[:, 0])
            continue
        if category.column not in encoded:
            encoded[category.column] = _encoded(path, category, found(category.column))
        parts.append(encoded[category.column][:, category.indicator_names.index(name)])
    y = by_name.get(target)
    is_there = y is not None and not y.empty and bool((~np.isnan(y.numbers)).any())
    if y is not None and not is_there:
        notes = (*notes, f"column {brief(target)}, the target, has no values: it was left out")
    return NewRows(
        np.stack(parts, axis=1),
        numbers_of(path, [y])[:, 0] if y is not None and is_there else None,
        None if offset is None else numbers_of(path, [found(offset, "the offset")])[:, 0],
        notes,
    )


def _encoded(path: Path, category: Category, column: Column) -> np.ndarray:
    """(n, levels) the indicators of a column of text.

    Raises:
        ValueError: a cell is no level of the fit.
    """
    # a column of numbers has no cells, and none of them is a level unless a level looks like a number
    cells = column.cells if column.cells is not None else [f"{number:.15g}" for number in column.numbers]
    if not len(cells):
        numbers_of(path, [column])  # it says that there are no rows
    try:
        return indicators(category, cells)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
