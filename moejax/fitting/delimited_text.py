"""Columns of numbers from delimited text. Encoding, separator, decimal sign and number of fields are clear, or the file is refused.

Python's CSV reader cuts the text into cells once, for the count of fields and for the numbers: a second reader might find different
fields. Numbers are correctly rounded.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.checks import brief, brief_text, require

SEPARATORS = (",", ";", "\t", "|")
_ROWS_TO_SNIFF = 100
_ROWS_AT_ONCE = 10_000
_TRUTH = {"true": 1.0, "false": 0.0}
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")
_DECIMAL_POINT = re.compile(r"\s*[+-]?\d*\.\d+([eE][+-]?\d+)?\s*")
_THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}(,\d{3})+\s*")


class Column(NamedTuple):
    """A column of the file."""

    name: str
    numbers: np.ndarray
    """(n,) NaN for a cell that is no number."""
    first_bad: Any = None
    """The first cell that is no finite number, if there is one."""
    empty: bool = False
    """True if all cells are empty."""
    cells: tuple[Any, ...] | None = None
    """All cells, if the column may be text: at least half of them are no numbers. Else None."""


def column_of(name: str, cells: Sequence[Any], decimal: str = ".") -> Column:
    """A column from cells of text, or from the values of Parquet."""
    numbers = _numbers(cells, decimal)
    bad = np.flatnonzero(~np.isfinite(numbers))
    empty = len(bad) == len(cells) and all(isinstance(cell, str) and not cell.strip() for cell in cells)
    kept = tuple(cells) if 2 * len(bad) >= len(cells) else None
    return Column(name, numbers, cells[bad[0]] if len(bad) else None, empty, kept)


def _joined(pieces: list[Column]) -> Column:
    """The concatenation of columns, one after the other."""
    bad = [piece.first_bad for piece in pieces if not np.isfinite(piece.numbers).all()]
    numbers = np.concatenate([piece.numbers for piece in pieces])
    kept = [piece.cells for piece in pieces if piece.cells is not None]
    cells = tuple(chain.from_iterable(kept)) if len(kept) == len(pieces) else None
    empty = all(piece.empty for piece in pieces)
    return Column(pieces[0].name, numbers, bad[0] if bad else None, empty, cells)


def _numbers(cells: Sequence[Any], decimal: str) -> np.ndarray:
    """(n,) the numbers of the cells, correctly rounded; NaN for cells that are no numbers, infinity for too large numbers."""
    try:  # the fast way, for text that is all numbers; float() would accept 1_000
        if decimal == "." and "_" not in "".join(cells):
            return np.fromiter(map(float, cells), np.float64, len(cells))
    except (TypeError, ValueError):
        return np.fromiter((_number(cell, decimal) for cell in cells), np.float64, len(cells))
    return np.fromiter((_number(cell, decimal) for cell in cells), np.float64, len(cells))


def _number(cell: Any, decimal: str) -> float:
    if isinstance(cell, str):
        text = cell.strip()
        if decimal == ",":
            text = "" if "." in text else text.replace(",", ".")
        if text.lower() in _TRUTH:
            return _TRUTH[text.lower()]
        cell = "" if "_" in text else text
    elif not isinstance(cell, int | float | Decimal):
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf


def text_columns(path: Path, separator: str | None, decimal: str | None) -> tuple[list[Column], list[str]]:
    """The columns below the header, and notes on assumptions made.

    Args:
        path: a file of text, compressed if its name ends in .gz.
        separator: one of SEPARATORS; None finds it.
        decimal: "." or ","; None finds it.

    Raises:
        ValueError: the text cannot be cut into rows of as many fields as the header, or can be in several ways.
        OSError: the file cannot be read.
    """
    text, notes = decoded(path, _content(path))
    try:
        separator = sniffed_separator(path, text) if separator is None else separator
        if decimal is None:
            decimal = sniffed_decimal(path, text, separator)
            notes += ["the comma was read as the decimal sign"] if decimal == "," else []
        require(decimal != separator, "decimal", "another sign than the separator", decimal)
        rows = _rows(text, separator)
        header = next(rows, None)
        if header is None:
            raise ValueError(f"{path}: not a readable csv table: it has no header")
        names = [name.strip() for name in header[1]]
        pieces: list[list[Column]] = [[column_of(name, ())] for name in names]
        checked = _checked_rows(path, rows, len(names), separator)
        while some := list(islice(checked, _ROWS_AT_ONCE)):
            for column, cells in zip(pieces, zip(*some, strict=True), strict=False):
                column.append(column_of(column[0].name, cells, decimal))
    except csv.Error as error:
        raise ValueError(f"{path}: not a readable csv table: {brief_text(error)}") from error
    return [_joined(column) for column in pieces], notes


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {brief_text(error)}") from error


def decoded(path: Path, content: bytes) -> tuple[str, list[str]]:
    """The text with Python's line ends, and a note if the encoding is a guess."""
    notes = []
    try:
        marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        if error.encoding.startswith("utf-16"):
            raise ValueError(f"{path}: not a readable csv table: {brief_text(error)}") from error
        text = content.decode("cp1252", errors="replace")
        notes.append("the text is not UTF-8: its names were read as Windows-1252")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}: line {line}: expected text, got a NUL character; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n"), notes


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The last line of each row, and its fields; blank lines are skipped."""
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    for fields in reader:
        if fields and (len(fields) > 1 or fields[0].strip()):
            yield reader.line_num, fields


def _checked_rows(
    path: Path, rows: Iterable[tuple[int, list[str]]], width: int, separator: str
) -> Iterator[list[str]]:
    """The rows. Each has as many fields as the header; or all have one more, which is empty.

    Raises:
        ValueError: a row has more or fewer fields.
    """
    ends_with_separator = None
    for row, (line, fields) in enumerate(rows, start=1):
        one_more = len(fields) == width + 1 and not fields[-1].strip()
        if ends_with_separator is None:
            ends_with_separator = one_more
        if one_more != ends_with_separator or len(fields) != width + int(one_more):
            sign = "a tab" if separator == "\t" else repr(separator)
            raise ValueError(
                f"{path}: row {row} (line {line}): expected {width} field{'s' * (width > 1)} as in the header, "
                f"got {len(fields)}; the separator is {sign}"
            )
        yield fields[:width]


def sniffed_separator(path: Path, text: str) -> str:
    """The separator that cuts the header and the first rows into equally many fields, more than one.

    If none does, it is the one that cuts the header into most fields; the rows are then refused with the reason.

    Raises:
        ValueError: several separators do.
    """
    agreeing, fields_of_header = [], {}
    for separator in SEPARATORS:
        counts = [len(fields) for _, fields in islice(_rows(text, separator), _ROWS_TO_SNIFF)]
        fields_of_header[separator] = counts[0] if counts else 0
        if len(set(counts)) == 1 and counts[0] > 1:
            agreeing.append(separator)
    if len(agreeing) > 1:
        words = " and ".join(map(repr, agreeing))
        raise ValueError(f"{path}: {words} both cut it into columns; say which is meant (--separator)")
    return agreeing[0] if agreeing else max(SEPARATORS, key=fields_of_header.__getitem__)


def sniffed_decimal(path: Path, text: str, separator: str) -> str:
    """The comma if it stands in numbers where no number has a point; else the point.

    Raises:
        ValueError: all of those numbers could be thousands as well.
    """
    if separator == ",":
        return "."
    example, clear = None, False
    for _, fields in islice(_rows(text, separator), 1, None):
        for cell in fields:
            if "," in cell:
                if not _DECIMAL_COMMA.fullmatch(cell):
                    return "."
                example, clear = cell, clear or not _THOUSANDS.fullmatch(cell)
            elif "." in cell and _DECIMAL_POINT.fullmatch(cell):
                return "."
    if example is not None and not clear:
        raise ValueError(
            f"{path}: {brief(example)} may be read in two ways; say what the comma is (--decimal)"
        )
    return "." if example is None else ","
