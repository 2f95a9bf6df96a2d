"""Columns of text as inputs: each level but the most frequent one is a column of zeros and ones.

A coefficient of such an indicator is the difference from the reference level. The encoding is a value of its own, which encodes
new rows in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moejax.checks import brief
from moejax.fitting.delimited_text import Column
from moejax.registry import nearest

MOST_LEVELS = 50
"""A column of text with more levels is no category."""
MOST_NUMBERS = 0.05
"""A column is text if at most this share of its cells that are not missing are numbers. A level may look like one; but a few words
among numbers are wrong cells, which are refused by row."""
_MISSING = {"", "na", "nan"}
"""Cells that hold no value, as pandas and R write them."""


class Category(NamedTuple):
    """A column of text, and the columns that stand for it."""

    column: str
    reference: str
    """The most frequent level; of several, the first in alphabetical order."""
    levels: tuple[str, ...]
    """The other levels, in alphabetical order."""

    @property
    def indicator_names(self) -> tuple[str, ...]:
        """The names of the columns of zeros and ones: the column and the level."""
        return tuple(f"{self.column}={level}" for level in self.levels)

    @property
    def note(self) -> str:
        """The encoding in words."""
        names = ", ".join(map(brief, self.indicator_names)) or "no column, for it has no other level"
        return f"column {brief(self.column)} holds text: it became {names}, against its most frequent level {brief(self.reference)}"


def is_text(column: Column) -> bool:
    """True if a column of a file is text: at most MOST_NUMBERS of its cells that are not missing are numbers.

    >>> [is_text(column_of("", cells)) for cells in (["red", "blue", ""], ["1.5", "2", "n/k"], ["", ""])]
    [True, False, False]
    """
    if column.cells is None:
        return False
    present = sum(not is_missing(cell) for cell in column.cells)
    return present > 0 and int(np.count_nonzero(~np.isnan(column.numbers))) <= MOST_NUMBERS * present


def is_missing(cell: Any) -> bool:
    """True if the cell holds no value."""
    if isinstance(cell, str):
        return cell.strip().lower() in _MISSING
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and np.isnan(cell))


def category_of(column: str, cells: Sequence[Any]) -> Category:
    """The levels of a column of text.

    >>> category_of("colour", ["red", "blue", "red"])
    Category(column='colour', reference='red', levels=('blue',))

    Args:
        column: its name.
        cells: its values; white space around them is dropped.

    Raises:
        ValueError: a missing cell, or so many levels that they are no categories.
    """
    counts: Counter[str] = Counter(_levels(column, cells))
    if len(counts) > MOST_LEVELS or len(counts) == len(cells) > 1:
        raise ValueError(
            f"column {brief(column)}, row 1: expected a finite number, got {brief(cells[0])}; as categories the column has too "
            f"many levels, {len(counts)} in {len(cells)} rows (at most {MOST_LEVELS}, and fewer than rows)"
        )
    reference = min(counts, key=lambda level: (-counts[level], level))
    return Category(column, reference, tuple(sorted(set(counts) - {reference})))


def _levels(column: str, cells: Sequence[Any]) -> list[str]:
    """The levels of the cells.

    Raises:
        ValueError: a cell is missing.
    """
    for row, cell in enumerate(cells, start=1):
        if is_missing(cell):
            empty = not isinstance(cell, str) or not cell.strip()
            got = "an empty cell" if empty else f"{brief(cell)}, a missing value"
            raise ValueError(f"column {brief(column)}, row {row}: expected a level, got {got}")
    return [str(cell).strip() for cell in cells]


def indicators(category: Category, cells: Sequence[Any]) -> np.ndarray:
    """(n, levels) zeros and ones: the columns that stand for cells (n,); the reference level has zeros only.

    >>> indicators(Category("colour", "red", ("blue", "green")), ["green", "red"]).tolist()
    [[0.0, 1.0], [0.0, 0.0]]

    Raises:
        ValueError: a missing cell, or a level that the category does not have; the message names the column, the row and the value.
    """
    places = {level: place for place, level in enumerate(category.levels)} | {category.reference: -1}
    levels = _levels(category.column, cells)
    for row, level in enumerate(levels, start=1):
        if level not in places:
            raise ValueError(
                f"column {brief(category.column)}, row {row}: unknown level {brief(level)}; {nearest(level, places)}"
            )
    found = np.array([places[level] for level in levels], int)
    return np.asarray(found[:, None] == np.arange(len(category.levels))[None], np.float64)


def encoded(frame: pd.DataFrame, categories: Sequence[Category]) -> pd.DataFrame:
    """The frame with indicators in the place of every column of a category; the other columns are as they are.

    >>> frame = pd.DataFrame({"colour": ["red", "blue"], "size": [1.0, 2.0]})
    >>> encoded(frame, [Category("colour", "red", ("blue",))]).to_dict("list")
    {'colour=blue': [0.0, 1.0], 'size': [1.0, 2.0]}

    Args:
        frame: the columns by name; other columns may be there too.
        categories: the encoding, from `category_of` or `categories_from`.

    Raises:
        ValueError: a column is missing, or a cell is; or a level was not among those of the category.
    """
    by_name = {category.column: category for category in categories}
    for name in by_name:
        if name not in frame.columns:
            raise ValueError(
                f"column {brief(name)}: expected among the columns; {nearest(name, map(str, frame.columns))}"
            )
    parts = []
    for name in frame.columns:
        if name in by_name:
            category = by_name[name]
            values = indicators(category, frame[name].tolist())
            parts.append(pd.DataFrame(values, index=frame.index, columns=list(category.indicator_names)))
        else:
            parts.append(frame[[name]])
    return pd.concat(parts, axis=1)


def as_document(categories: Sequence[Category]) -> list[dict[str, Any]]:
    """The encoding as plain values, for a file."""
    return [category._asdict() | {"levels": list(category.levels)} for category in categories]


def categories_from(document: Sequence[Mapping[str, Any]]) -> tuple[Category, ...]:
    """The inverse of `as_document`.

    >>> categories_from(as_document([Category("colour", "red", ("blue",))]))
    (Category(column='colour', reference='red', levels=('blue',)),)
    """
    return tuple(Category(entry["column"], entry["reference"], tuple(entry["levels"])) for entry in document)
