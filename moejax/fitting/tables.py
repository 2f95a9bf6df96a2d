"""Data sets with names, and tables of numbers from CSV and Parquet files.

A table is read completely, or refused with one line that names the file and the row: no column is lost or added silently, and no
date becomes a number. Columns of text become indicators of their levels. Notes of the data set report omissions and assumptions.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from moejax.checks import brief, brief_text, require
from moejax.fitting.categories import Category, category_of, indicators, is_text
from moejax.fitting.delimited_text import SEPARATORS, Column, column_of, text_columns
from moejax.registry import nearest

SEPARATOR_WORDS = {"tab": "\t", r"\t": "\t"}
"""Separators by words, which are easier to write in a shell."""
DECIMALS = (".", ",")
TEXT_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_UNNAMED = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")
"""An empty name, or the name that pandas gave to a column without one when it read and wrote the file before."""
UNNAMED_INDEX = re.compile(r"__index_level_\d+__")
"""The name under which pandas writes an index without one into a Parquet file."""


class Dataset(NamedTuple):
    """A regression data set with names."""

    x: np.ndarray
    """(n, d)"""
    y: np.ndarray
    """(n,); (n, m) if there are m > 1 targets."""
    input_names: tuple[str, ...]
    target_names: tuple[str, ...]
    """(m,)"""
    source: str = ""
    """The origin of the data, and whether the file is the published one."""
    notes: tuple[str, ...] = ()
    """A sentence for each omission from the file, and for each choice between two ways to read it."""
    categories: tuple[Category, ...] = ()
    """The columns of text, whose indicators are among the inputs."""
    offset: np.ndarray | None = None
    """(n,) known addend to the linear predictors of the experts, if there is one."""
    offset_name: str | None = None
    """The column of the offset, which is no input."""

    @property
    def target_name(self) -> str:
        """The targets' names joined in one string."""
        return ", ".join(self.target_names)

    def with_target(self, target: str) -> Dataset:
        """The same inputs with one of the targets, y (n,).

        Raises:
            ValueError: no such target; the message names the nearest, or all.
        """
        if target not in self.target_names:
            raise ValueError(f"target: unknown name {target!r}; {nearest(target, self.target_names)}")
        y = self.y if self.y.ndim == 1 else self.y[:, self.target_names.index(target)]
        return self._replace(y=y, target_names=(target,))

    def with_offset(self, name: str) -> Dataset:
        """The same data with one of the inputs as offset instead.

        Raises:
            ValueError: no such input of numbers, or no other input.
        """
        encoded = {indicator for category in self.categories for indicator in category.indicator_names}
        names = [one for one in self.input_names if one not in encoded]
        if name not in names:
            raise ValueError(f"offset: unknown column of numbers {name!r}; {nearest(name, names)}")
        require(len(self.input_names) > 1, "offset", "a column beside the inputs, and one input", name)
        place = self.input_names.index(name)
        inputs = self.input_names[:place] + self.input_names[place + 1 :]
        x, offset = np.delete(self.x, place, axis=1), self.x[:, place]
        return self._replace(x=x, input_names=inputs, offset=offset, offset_name=name)


class Columns(NamedTuple):
    """The columns of a file; all entries are finite numbers."""

    names: tuple[str, ...]
    """(p,), each once."""
    values: np.ndarray
    """(n, p)"""
    notes: tuple[str, ...]
    """Notes, as in `Dataset`."""


def read_table(
    path: Path, target: str, *, separator: str | None = None, decimal: str | None = None
) -> Dataset:
    """A CSV or Parquet file of numbers and of categories; all columns but the target are inputs.

    A column of text is replaced by indicators of its levels (`moejax.fitting.categories`), with a note. A few words in a column of
    numbers are wrong cells, and are refused.

    Args:
        path: a file that `read_columns` reads.
        target: the column to explain.
        separator: as in `read_columns`.
        decimal: as in `read_columns`.

    Raises:
        ValueError: a file that cannot be read as such a table, no such target, nothing but the target, or a target that is
            constant; the message names the file, the column and the row.
        OSError: the file cannot be read.
    """
    columns, notes = named_columns(Path(path), separator, decimal)
    names = tuple(column.name for column in columns)
    if target not in names:
        raise ValueError(f"{path}: no target column {target!r}; {nearest(target, names)}")
    if len(names) < 2:
        raise ValueError(f"{path}: expected input columns beside the target {target!r}, got none")
    place = names.index(target)
    y = numbers_of(Path(path), [columns[place]])[:, 0]
    inputs, categories, x = _inputs(Path(path), [column for column in columns if column.name != target])
    if y.min() == y.max():
        raise ValueError(f"{path}: target column {target!r} is constant ({y[0]:g})")
    notes = (*notes, *(category.note for category in categories))
    return Dataset(x, y, inputs, (target,), str(path), notes, categories)


def _inputs(path: Path, columns: list[Column]) -> tuple[tuple[str, ...], tuple[Category, ...], np.ndarray]:
    """The names of the inputs, the categories among the columns, and the inputs (n, d).

    Raises:
        ValueError: a cell is neither a number nor a level, a category has too many levels, or a name is there twice.
    """
    found, names, categories = [], [], []
    for column in columns:
        if column.cells is None or not is_text(column):
            found.append(numbers_of(path, [column]))
            names.append(column.name)
            continue
        try:
            category = category_of(column.name, column.cells)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found.append(indicators(category, column.cells))
        names += category.indicator_names
        categories.append(category)
    x = np.concatenate(found, axis=1)
    for name, count in Counter(names).items():
        require(count == 1, str(path), "names that occur once, with those of categories", name)
    if not names:
        raise ValueError(f"{path}: expected inputs that vary, got columns of one level")
    return tuple(names), tuple(categories), x


def read_columns(path: Path, *, separator: str | None = None, decimal: str | None = None) -> Columns:
    """All columns of a file of numbers: .csv and .tsv with a header, also with .gz after it, and .parquet.

    The text is UTF-8, with or without a byte order mark, or UTF-16 with one; any other text is read as Windows-1252, with a note;
    the choice affects names only. The separator is the one of comma, semicolon, tab and bar that cuts the header and the first rows
    into equally many fields, if only one does. The decimal sign of a file that is not separated by commas is the comma if it stands
    in numbers where no number has a point, unless all of those could be thousands. True and False are 1 and 0.

    Every row must have as many fields as the header. A first column without a name is left out, and noted, if it counts the rows
    from 0 or 1, as pandas and R write them; any other column without a name is refused unless it is empty. In Parquet, named levels
    of a pandas index are columns and an index without a name is left out.

    Args:
        path: the file.
        separator: one of SEPARATORS, or "tab"; None finds it.
        decimal: "." or ","; None finds it.

    Raises:
        ValueError: another kind of file, another number of fields in a row, a name that is missing or occurs twice, a cell that is
            no finite number, or a separator or decimal sign that is not clear; one line that names the file and the place.
        OSError: the file cannot be read.
    """
    columns, notes = named_columns(Path(path), separator, decimal)
    return Columns(tuple(column.name for column in columns), numbers_of(Path(path), columns), notes)


def named_columns(
    path: Path, separator: str | None, decimal: str | None
) -> tuple[list[Column], tuple[str, ...]]:
    """The columns that have a name, each once, and notes on the file; their cells may be no numbers yet."""
    separator = checked_dialect(separator, decimal)
    name = path.name.lower()
    if name.endswith(TEXT_SUFFIXES):
        columns, notes = text_columns(path, separator, decimal)
    elif name.endswith(".parquet"):
        given = separator if separator is not None else decimal
        require(given is None, "separator, decimal", "none for a Parquet file", given)
        columns, notes = _parquet_columns(path)
    else:
        raise ValueError(
            f"{path}: expected a .csv or .parquet file, a .tsv file or one of text with .gz after it"
        )
    columns, left_out = _without_unnamed(path, columns)
    if not columns:
        raise ValueError(f"{path}: expected columns with a name, got none")
    return columns, (*notes, *left_out)


def checked_dialect(separator: str | None, decimal: str | None) -> str | None:
    """The separator as a sign; "tab" is one.

    Raises:
        ValueError: it, or the decimal sign, is none that is read.
    """
    separator = SEPARATOR_WORDS.get(separator, separator) if isinstance(separator, str) else separator
    good = separator is None or (isinstance(separator, str) and separator in SEPARATORS)
    require(good, "separator", "comma, semicolon, tab or bar", separator)
    good = decimal is None or (isinstance(decimal, str) and decimal in DECIMALS)
    require(good, "decimal", "'.' or ','", decimal)
    return separator


def _without_unnamed(path: Path, columns: list[Column]) -> tuple[list[Column], list[str]]:
    """The columns that have a name, each once, and notes on those that were left out."""
    kept, notes = [], []
    for place, column in enumerate(columns):
        counts = any(
            np.array_equal(column.numbers, np.arange(start, start + len(column.numbers))) for start in (0, 1)
        )
        if not _UNNAMED.fullmatch(column.name):
            kept.append(column)
        elif place == 0 and counts:
            notes.append("the first column has no name and numbers the rows: it was left out")
        elif column.name:  # pandas' name for it, which is in the file itself
            kept.append(column)
        elif column.empty:
            notes.append(f"column {place + 1} has neither a name nor cells: it was left out")
        else:
            raise ValueError(
                f"{path}: column {place + 1} has no name; give it one in the header, or remove it"
            )
    seen: set[str] = set()
    for column in kept:
        if column.name in seen:
            raise ValueError(f"{path}: column {brief(column.name)} is there twice; name them apart")
        seen.add(column.name)
    return kept, notes


def numbers_of(path: Path, columns: list[Column]) -> np.ndarray:
    """(n, p) the numbers of the columns.

    Raises:
        ValueError: there is no row, or a cell is no finite number; the message names the first of the first such column.
    """
    if not len(columns[0].numbers):
        raise ValueError(f"{path}: expected rows below the header, got none")
    for column in columns:
        bad = ~np.isfinite(column.numbers)
        if bad.any():
            row, cell = int(np.argmax(bad)) + 1, column.first_bad
            empty = (
                cell is None or (isinstance(cell, str) and not cell.strip()) or cell != cell  # noqa: PLR0124 - NaN of any type
            )
            got = "an empty cell" if empty else brief(cell)
            raise ValueError(
                f"{path}: column {brief(column.name)}, row {row}: expected a finite number, got {got}"
            )
    return np.stack([column.numbers for column in columns], axis=1)


def _parquet_columns(path: Path) -> tuple[list[Column], list[str]]:
    """The columns of the file, and the named levels of the index that pandas stores next to them."""
    if not path.is_dir():
        path.open("rb").close()  # raises errors of the system separately from errors of the content
    try:
        table = pyarrow.parquet.read_table(path)
        metadata = table.schema.pandas_metadata
        fields = list(zip(table.schema.names, table.columns, strict=True))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet table: {brief_text(error)}") from error
    columns, notes = [], []
    for name, cells in fields:
        if UNNAMED_INDEX.fullmatch(name):
            notes.append("the index has no name: it was left out")
        else:
            columns.append(parquet_column(path, name, cells))
    columns += _counting_levels(metadata, table.num_rows)
    return columns, notes


def _counting_levels(metadata: Any, num_rows: int) -> list[Column]:
    """Named levels of pandas' index that are ranges: the metadata holds them as a rule, not as a column."""
    levels = metadata.get("index_columns") if isinstance(metadata, dict) else None
    found = []
    for level in levels if isinstance(levels, list) else ():
        if isinstance(level, dict) and level.get("kind") == "range" and level.get("name") is not None:
            bounds = [level.get(word) for word in ("start", "stop", "step")]
            whole = [bound for bound in bounds if type(bound) is int and abs(bound) < 2**53]
            if len(whole) < len(bounds):
                continue
            start, stop, step = whole
            if step != 0 and len(range(start, stop, step)) == num_rows:
                found.append(Column(str(level["name"]), np.arange(start, stop, step, dtype=np.float64)))
    return found


def parquet_column(path: Path, name: str, cells: pyarrow.ChunkedArray) -> Column:
    """A column of numbers, truth values or text.

    Raises:
        ValueError: it holds something else.
    """
    kind = cells.type.value_type if pyarrow.types.is_dictionary(cells.type) else cells.type
    types = pyarrow.types
    if types.is_integer(cells.type) or types.is_floating(cells.type):
        numbers = np.asarray(cells.to_numpy(), np.float64)
        bad = np.flatnonzero(~np.isfinite(numbers))
        return Column(name, numbers, cells[int(bad[0])].as_py() if len(bad) else None)
    readable = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_decimal,
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_null,
    )
    if any(is_kind(kind) for is_kind in readable):
        try:
            return column_of(name, cells.to_pylist())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: column {brief(name)}: not readable text: {brief_text(error)}"
            ) from error
    what = f"dates or durations ({kind})" if types.is_temporal(kind) else f"the type {brief_text(kind)}"
    raise ValueError(
        f"{path}: column {brief(name)}: expected numbers, got {what}; turn them into numbers first"
    )
