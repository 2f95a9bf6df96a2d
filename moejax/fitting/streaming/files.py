"""Rows in Parquet and CSV files, or in a folder of them, read in batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from moejax.checks import brief, brief_text, require
from moejax.fitting.delimited_text import Column
from moejax.fitting.streaming.source import ROWS_IN_PARTITION, Batch, all_finite
from moejax.fitting.streaming.text_rows import Dialect, Header, text_header, text_pieces
from moejax.fitting.tables import TEXT_SUFFIXES, UNNAMED_INDEX, checked_dialect, parquet_column
from moejax.registry import nearest


class FilePartition(NamedTuple):
    """Some row groups of a Parquet file, or a whole text file."""

    file: str
    groups: tuple[int, ...]
    """Row groups; empty for a text file."""
    dialect: Dialect | None
    """That of a text file; None for Parquet."""
    first_row: int
    """Number of the first row in its file, from 1."""
    num_rows: int | None
    """None for a text file, whose rows are counted as they are read."""


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A CSV or Parquet file, or a folder of files with the same columns, as a source of `fit`.

    A folder is read with all folders in it, in the order of the paths; names that begin with "." or "_" are left out, as other
    readers of such folders do. A column counts as a number by the rules of `read_table`.

    Args:
        path: a .parquet, .csv or .tsv file (text may end in .gz), or a folder of files of one of these kinds.
        target: the column to explain.
        inputs: the columns of the inputs; None for all but the target and the weights.
        weights: a column of non-negative weights; None for ones.
        skip_bad_rows: leave out rows with a cell that is no finite number, or with too many or too few cells, and count them;
            otherwise such a row is an error that names file, column and row.
        separator: of a text file, one of comma, semicolon, tab and bar; None finds it.
        decimal: "." or ","; None finds it.

    Raises:
        ValueError: no such file or column, files with different columns, or a file that is not as its name says.
        OSError: a file cannot be read.

    Examples:
        >>> import pandas as pd
        >>> truth = moejax.make_params([[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 0]], noise_std=0.1)
        >>> x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 2000)
        >>> pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": y}).to_parquet("rows.parquet")
        >>> source = moejax.FileSource("rows.parquet", target="y")
        >>> result = moejax.fit(jax.random.key(1), source=source, num_experts=2, method="spectral_em")
        >>> source.input_names, result.diagnostics["num_rows"]
        (('a', 'b', 'c'), 2000)
    """

    path: str | Path
    target: str
    inputs: tuple[str, ...] | None = None
    weights: str | None = None
    skip_bad_rows: bool = False
    separator: str | None = None
    decimal: str | None = None

    def __post_init__(self):
        """Find the files, and compare their columns."""
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "separator", checked_dialect(self.separator, self.decimal))
        given = self.separator if self.separator is not None else self.decimal
        if not all(map(_is_text, self.files)):
            require(given is None, "separator, decimal", "none for a Parquet file", given)
        names, all_inputs = self.headers[0].names, self.inputs is None
        if self.inputs is None:
            inputs = tuple(name for name in names if name not in (self.target, self.weights))
        else:
            inputs = tuple(self.inputs)
        object.__setattr__(self, "inputs", inputs)
        wanted = [self.target, *inputs, *([] if self.weights is None else [self.weights])]
        for name in wanted:
            if name not in names:
                raise ValueError(f"{self.files[0]}: no column {brief(name)}; {nearest(name, names)}")
        repeated = [name for name in wanted if wanted.count(name) > 1]
        require(not repeated, "target, inputs, weights", "different columns", repeated[:1])
        for file, header in zip(self.files, self.headers, strict=True):
            missing = [name for name in wanted if name not in header.names]
            if missing:
                raise ValueError(f"{file}: no column {brief(missing[0])}, which {self.files[0]} has")
            more = [name for name in header.names if name not in names]
            if more and all_inputs:
                raise ValueError(f"{file}: column {brief(more[0])}, which {self.files[0]} does not have")
        if not inputs:
            raise ValueError(f"{self.files[0]}: expected input columns beside {brief(self.target)}, got none")

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: a worker gets a partition with every task, and needs no list of them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """The files, in order."""
        path = Path(self.path)
        if path.is_file():
            return (path,)
        if not path.is_dir():
            path.stat()  # raises the system's error
        found = [
            file
            for file in sorted(path.rglob("*"))
            if not any(part[:1] in "._" for part in file.relative_to(path).parts) and file.is_file()
        ]
        if not found:
            raise ValueError(f"{path}: expected .parquet or .csv files in the folder, got none")
        kinds = {_is_text(file) for file in found}
        if len(kinds) > 1:
            raise ValueError(f"{path}: expected files of one kind, got {found[0].name} and others")
        return tuple(found)

    @functools.cached_property
    def headers(self) -> tuple[Header, ...]:
        """The header of each file."""
        return tuple(
            text_header(file, self.separator, self.decimal) if _is_text(file) else _parquet_header(file)
            for file in self.files
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        """The columns of the inputs."""
        assert self.inputs is not None  # set when the source was made
        return self.inputs

    @property
    def target_name(self) -> str:
        """The target."""
        return self.target

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each choice that was made in reading."""
        notes = []
        if any(header.left_out for header in self.headers):
            notes.append("a column without a name was left out, as the number of the row")
        if any(header.dialect is not None and header.dialect.decimal == "," for header in self.headers):
            notes.append("the comma was read as the decimal sign")
        return tuple(notes)

    @property
    def precision(self) -> float:
        """Machine epsilon of the coarsest column."""
        return max(header.precision for header in self.headers)

    @property
    def partitions(self) -> Sequence[FilePartition]:
        """Row groups of Parquet files, about `ROWS_IN_PARTITION` rows in each, and whole text files."""
        return self._partitions

    @functools.cached_property
    def _partitions(self) -> tuple[FilePartition, ...]:
        return tuple(
            part
            for file, header in zip(self.files, self.headers, strict=True)
            for part in (
                _row_groups(file)
                if header.dialect is None
                else [FilePartition(str(file), (), header.dialect, 1, None)]
            )
        )

    @property
    def identity(self) -> str:
        """A digest of the options, and of the files' paths, sizes and times of change."""
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        options = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return hashlib.sha256(repr((facts, options)).encode()).hexdigest()

    def rows_of(self, partition: FilePartition) -> int | None:
        """The number of rows of a partition; None for a text file."""
        return partition.num_rows

    def batches(self, partition: FilePartition, rows_at_once: int) -> Iterator[Batch]:
        """The rows of a partition, at most so many in one batch.

        Raises:
            ValueError: a row is bad and is not to be left out; the message names file, column and row.
        """
        file = Path(partition.file)
        names = [*self.input_names, self.target, *([] if self.weights is None else [self.weights])]
        if partition.dialect is None:
            pieces = _parquet_pieces(file, partition.groups, names, rows_at_once)
        else:
            pieces = text_pieces(file, partition.dialect, names, rows_at_once, self.skip_bad_rows)
        row = partition.first_row
        for columns, already_skipped in pieces:
            if columns:
                yield self._batch(file, row, columns, already_skipped)
                row += len(columns[0].numbers) + already_skipped
            elif already_skipped:
                yield Batch(np.zeros((0, len(self.input_names))), np.zeros(0), np.zeros(0), already_skipped)
                row += already_skipped

    def _batch(self, file: Path, first_row: int, columns: Sequence[Column], skipped: int) -> Batch:
        values = np.stack([column.numbers for column in columns], axis=1)
        good = np.ones(len(values), bool) if all_finite(values) else np.isfinite(values).all(axis=1)
        if self.weights is not None:
            good &= values[:, -1] >= 0
        if not good.all() and not self.skip_bad_rows:
            raise ValueError(self._about(file, first_row, columns, values, int(np.argmin(good))))
        skipped += int((~good).sum())
        d = len(self.input_names)
        if self.weights is not None:
            good &= values[:, -1] > 0
        if not good.all():
            values = values[good]
        weights = np.ones(len(values)) if self.weights is None else values[:, -1]
        return Batch(np.ascontiguousarray(values[:, :d]), values[:, d], weights, skipped)

    def _about(
        self, file: Path, first_row: int, columns: Sequence[Column], values: np.ndarray, row: int
    ) -> str:
        """One line on a bad row."""
        place = int(np.argmin(np.isfinite(values[row])))
        column, number = columns[place], values[row, place]
        if np.isfinite(number):
            column, number = columns[-1], values[row, -1]
            what = f"a weight >= 0, got {number:.6g}"
        else:
            first = int(np.argmax(~np.isfinite(column.numbers))) == row
            cell = column.first_bad if first and column.first_bad is not None else number
            empty = cell is None or (isinstance(cell, str) and not cell.strip()) or cell != cell  # noqa: PLR0124
            what = f"a finite number, got {'an empty cell' if empty else brief(cell)}"
        return (
            f"{file}: column {brief(column.name)}, row {first_row + row}: expected {what} "
            "(bad rows can be left out: skip_bad_rows, --skip-bad-rows)"
        )


def _is_text(file: Path) -> bool:
    """True for delimited text, false for Parquet.

    Raises:
        ValueError: it is neither, by its name.
    """
    name = file.name.lower()
    if name.endswith(TEXT_SUFFIXES):
        return True
    if name.endswith(".parquet"):
        return False
    raise ValueError(
        f"{file}: expected a .csv or .parquet file, a .tsv file or one of text with .gz after it"
    )


def _parquet_header(file: Path) -> Header:
    file.open("rb").close()  # raises errors of the system separately from errors of the content
    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet table: {brief_text(error)}") from error
    left_out = tuple(name for name in schema.names if UNNAMED_INDEX.fullmatch(name))
    names = tuple(name for name in schema.names if name not in left_out)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file}: column {brief(twice)} is there twice; name them apart")
    single = any(schema.field(name).type in (pyarrow.float32(), pyarrow.float16()) for name in names)
    return Header(names, left_out, None, float(np.finfo(np.float32 if single else np.float64).eps))


def _row_groups(file: Path) -> list[FilePartition]:
    """Neighbouring row groups together, about `ROWS_IN_PARTITION` rows in each partition."""
    metadata = pyarrow.parquet.read_metadata(file)
    parts: list[FilePartition] = []
    groups: list[int] = []
    first, rows = 1, 0
    for group in range(metadata.num_row_groups):
        more = metadata.row_group(group).num_rows
        if groups and rows + more > ROWS_IN_PARTITION:
            parts.append(FilePartition(str(file), tuple(groups), None, first, rows))
            groups, first, rows = [], first + rows, 0
        groups.append(group)
        rows += more
    return [*parts, FilePartition(str(file), tuple(groups), None, first, rows)] if rows else parts


def _parquet_pieces(
    file: Path, groups: Sequence[int], names: Sequence[str], rows_at_once: int
) -> Iterator[tuple[list[Column], int]]:
    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as opened:
            batches = opened.iter_batches(rows_at_once, list(groups), list(names), use_threads=False)
            for batch in batches:
                yield (
                    [
                        parquet_column(file, name, pyarrow.chunked_array([batch.column(name)]))
                        for name in names
                    ],
                    0,
                )
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet table: {brief_text(error)}") from error
