"""Rows of delimited text, read in batches."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv

from moejax.checks import brief, brief_text
from moejax.fitting.delimited_text import Column, column_of, decoded, sniffed_decimal, sniffed_separator

BYTES_TO_SNIFF = 2**18
"""Bytes at the start of a text file from which its separator and decimal sign are found."""
BYTES_AT_ONCE = 2**23
"""Bytes of a text file that are cut into cells at once."""


class Dialect(NamedTuple):
    """The rules by which the text of a file is cut into numbers."""

    separator: str
    decimal: str


class Header(NamedTuple):
    """Facts on a file that are known before its rows are read."""

    names: tuple[str, ...]
    """Columns with names, in the file's order."""
    left_out: tuple[str, ...]
    """Columns that are not read, because they have no name."""
    dialect: Dialect | None
    """None for Parquet."""
    precision: float
    """Machine epsilon of the coarsest column."""


def text_header(file: Path, separator: str | None, decimal: str | None) -> Header:
    """Names and dialect of a text file, from its first BYTES_TO_SNIFF bytes.

    Raises:
        ValueError: no text in UTF-8, no header, or a separator or decimal sign that is not clear; OSError: it cannot be read.
    """
    file.open("rb").close()
    try:
        with pyarrow.input_stream(str(file), compression="detect") as stream:
            head = stream.read(BYTES_TO_SNIFF)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable csv table: {brief_text(error)}") from error
    if len(head) == BYTES_TO_SNIFF:  # the last line may be cut, inside a letter too
        head = head[: head.rfind(b"\n") + 1]
    text, notes = decoded(file, head)
    if notes or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file}: expected text in UTF-8 to read in batches; save it so")
    separator = sniffed_separator(file, text) if separator is None else separator
    decimal = sniffed_decimal(file, text, separator) if decimal is None else decimal
    first, _ = column_names(text, separator)
    if not first:
        raise ValueError(f"{file}: not a readable csv table: it has no header")
    for name in first[1:]:
        if not name:
            raise ValueError(
                f"{file}: column {first.index('', 1) + 1} has no name; give it one in the header"
            )
        if first.count(name) > 1:
            raise ValueError(f"{file}: column {brief(name)} is there twice; name them apart")
    left_out = tuple(name for name in first[:1] if not name)
    names = tuple(name for name in first if name)
    return Header(names, left_out, Dialect(separator, decimal), float(np.finfo(np.float64).eps))


def column_names(text: str, separator: str) -> tuple[list[str], int]:
    """The cells of the first line that is not blank, and the number of lines up to its end."""
    rows = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    for row in rows:
        if row:
            return [name.strip() for name in row], rows.line_num
    return [], 0


def text_pieces(
    file: Path, dialect: Dialect, names: Sequence[str], rows_at_once: int, skip: bool
) -> Iterator[tuple[list[Column], int]]:
    """Columns of some rows, and the number of rows with too many or too few cells that were left out among them."""
    dropped: list[Any] = []

    def invalid(row: Any) -> str:
        dropped.append(row)
        return "skip" if skip else "error"

    with pyarrow.input_stream(str(file), compression="detect") as stream:
        head = stream.read(BYTES_TO_SNIFF).decode("utf-8-sig", errors="replace")
    found, lines = column_names(head, dialect.separator)
    types = dict.fromkeys(found, pyarrow.string())
    try:
        with pyarrow.csv.open_csv(
            file,
            pyarrow.csv.ReadOptions(
                use_threads=False, block_size=BYTES_AT_ONCE, skip_rows=lines, column_names=found
            ),
            pyarrow.csv.ParseOptions(delimiter=dialect.separator, invalid_row_handler=invalid),
            pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=list(names), strings_can_be_null=False
            ),
        ) as reader:
            for read in reader:
                for first in range(0, max(read.num_rows, 1), rows_at_once):
                    part = read.slice(first, rows_at_once)
                    skipped, dropped[:] = len(dropped), []
                    columns = [_text_column(name, part.column(name), dialect.decimal) for name in names]
                    yield columns, skipped
    except pyarrow.ArrowException as error:
        if dropped and not skip:
            row = dropped[-1]
            raise ValueError(
                f"{file}: row {row.number - 1 if row.number else '?'}: expected {row.expected_columns} fields as in the header, "
                f"got {row.actual_columns} (bad rows can be left out: skip_bad_rows, --skip-bad-rows)"
            ) from error
        raise ValueError(f"{file}: not a readable csv table: {brief_text(error)}") from error
    if dropped:
        yield [], len(dropped)


def _text_column(name: str, cells: pyarrow.Array, decimal: str) -> Column:
    """The numbers of cells of text: by Arrow where all are plain numbers, else by the rules of `column_of`."""
    if decimal == ".":
        try:
            trimmed = pyarrow.compute.call_function("utf8_trim_whitespace", [cells])
            numbers = trimmed.cast(pyarrow.float64())
            return Column(name, np.asarray(numbers.to_numpy(zero_copy_only=False), np.float64))
        except pyarrow.ArrowInvalid:
            return column_of(name, cells.to_pylist(), decimal)
    return column_of(name, cells.to_pylist(), decimal)
