"""Kinds of `fuzz.py`: CSV and Parquet files for `read_table`.

A table of numbers is written in one of many forms, each of which must give the same numbers back or be refused; or it is damaged,
and a table that is still accepted must have finite numbers.
"""

from __future__ import annotations

import atexit
import csv
import datetime
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from moejax.fitting.tables import read_table

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-tables-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
_last = {"input": ""}
CELLS = (
    *(
        "",
        " ",
        "NA",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1e-400",
        "9" * 400,
        "1_000",
        "1,5",
        "1.000,5",
        "1 000",
        "0x10",
        "1e",
        "+",
    ),
    *(
        "True",
        "false",
        "None",
        "null",
        "1+2j",
        "2020-01-01",
        "12:30",
        "5%",
        "$5",
        "x",
        "[/x]",
        "[red]",
        "'",
        '"',
        '""',
        '"a',
        "=1+1",
    ),
    *(
        "\t",
        ";",
        "\\",
        "\n",
        "\0",
        "\x1b[31m",
        "\ufeff",
        "\u200b1",
        "１２",
        "é",
        "1e308",
        "5e-324",
        "-0",
        ".5",
        "5.",
        "00012",
    ),
)
NAMES = (
    "",
    " ",
    "a",
    "y",
    "Unnamed: 0",
    "index",
    "__index_level_0__",
    "1",
    "[/a]",
    "a,b",
    'a"b',
    "é",
    "x" * 300,
    "y ",
    "nan",
)


def last_input() -> str:
    """The beginning of the last file."""
    return _last["input"]


def _table(rng: np.random.Generator) -> pd.DataFrame:
    """Columns a, b, .. and y of numbers that a file can hold exactly."""
    rows = int(rng.choice([1, 2, 5, 30, 150]))
    columns = int(rng.integers(1, 5))
    kinds = (
        lambda: rng.normal(size=rows).round(int(rng.integers(0, 8))),
        lambda: rng.integers(-5, 2000, size=rows).astype(float),
        lambda: rng.normal(size=rows) * 10.0 ** rng.uniform(-300, 300),
        lambda: rng.integers(2, size=rows).astype(float),
        lambda: np.full(rows, 2.5),
    )
    drawn = rng.choice(len(kinds), size=columns + 1, p=[0.5, 0.25, 0.1, 0.1, 0.05])
    names = [*"abcd"[:columns], "y"]
    return pd.DataFrame({name: kinds[kind]() for name, kind in zip(names, drawn, strict=True)})


def _read(path: Path, content: bytes, **options: Any) -> Any:
    path.write_bytes(content)
    _last["input"] = f"{path.name}, {options}: {content[:1500]!r}"
    return read_table(path, "y", **options)


def _number(value: float, sign: str) -> str:
    text = repr(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
    return text.replace(".", sign)


def csv_forms(rng: np.random.Generator) -> str | None:
    """A table in one of the forms that programs write: the same numbers, or a refusal."""
    table = _table(rng)
    separator = str(rng.choice([",", ";", "\t", "|"]))
    sign = str(rng.choice([".", ","])) if separator != "," else "."
    quoting = csv.QUOTE_ALL if rng.random() < 0.2 else csv.QUOTE_MINIMAL
    ending = str(rng.choice(["\n", "\r\n", "\r"]))
    numbered = rng.random() < 0.2
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=ending)
    writer.writerow([""] * numbered + list(table.columns))
    first = int(rng.integers(2))
    for row, values in enumerate(table.to_numpy()):
        writer.writerow([str(row + first)] * numbered + [_number(value, sign) for value in values])
    body = text.getvalue()
    if rng.random() < 0.1:
        body = body.replace(separator, separator + " ")
    if rng.random() < 0.1:
        body = body.replace(ending, separator + ending).replace(separator + ending, ending, 1)
    if rng.random() < 0.1:
        body = body.replace(ending, ending + ending)
    content = body.encode(str(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])))
    suffix = ".tsv" if separator == "\t" and rng.random() < 0.5 else ".csv"
    if rng.random() < 0.2:
        content, suffix = gzip.compress(content), suffix + ".gz"
    named = rng.random() < 0.3
    options = {"separator": separator, "decimal": sign} if named else {}
    read = _read(FOLDER / f"table{suffix}", content, **options)
    expected = table.drop(columns="y").to_numpy()
    if read.x.shape != expected.shape or not np.array_equal(read.x, expected):
        return f"the inputs are not those that were written: {read.x[:2]} for {expected[:2]}"
    if not np.array_equal(read.y, table["y"]):
        return f"the target is not the one that was written: {read.y[:3]} for {table['y'][:3].tolist()}"
    return None


def _damaged_text(rng: np.random.Generator, text: str) -> str:
    """Text with a few cells, names or characters replaced, left out or doubled."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        lines = text.split("\n")
        line = int(rng.integers(len(lines)))
        fields = lines[line].split(",")
        place = int(rng.integers(len(fields)))
        strange = str(rng.choice(NAMES if line == 0 else CELLS))
        change = int(rng.integers(8))
        if change <= 2:
            fields[place] = strange
        elif change == 3:
            fields.insert(place, strange)
        elif change == 4:
            fields.pop(place)
        lines[line] = ",".join(fields)
        if change == 5:
            lines.insert(line, lines[line])
        elif change == 6:
            lines.pop(line)
        text = "\n".join(lines)
        if change == 7 and text:
            at = int(rng.integers(len(text)))
            text = text[:at] + strange + text[at + int(rng.integers(3)) :]
    return text


def csv_damaged(rng: np.random.Generator) -> str | None:
    """A table with damaged cells, names, rows or bytes."""
    text = _damaged_text(rng, _table(rng).to_csv(index=bool(rng.random() < 0.2)))
    content = text.encode("utf-8", errors="replace")
    if rng.random() < 0.3:
        content = _damaged_bytes(rng, content)
    suffix = str(rng.choice([".csv", ".tsv", ".CSV", ".csv.gz"]))
    if suffix == ".csv.gz":
        content = gzip.compress(content)
        content = _damaged_bytes(rng, content) if rng.random() < 0.5 else content
    options = {}
    if rng.random() < 0.2:
        options["separator"] = rng.choice([",", ";", "tab", "x", ""])
    if rng.random() < 0.2:
        options["decimal"] = rng.choice([".", ",", ";"])
    return _finite(_read(FOLDER / f"damaged{suffix}", content, **options))


def _damaged_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    array = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(array) + 1))
        change = int(rng.integers(3))
        if change == 0:
            array[at : at + 1] = rng.bytes(1)
        elif change == 1:
            array[at:at] = rng.bytes(int(rng.integers(1, 5)))
        else:
            del array[at : at + int(rng.integers(1, 1 + max(1, len(array) // 4)))]
    return bytes(array)


def _finite(read: Any) -> str | None:
    if not (np.isfinite(read.x).all() and np.isfinite(read.y).all()):
        return "the table was read, and holds numbers that are not finite"
    if read.x.shape != (len(read.y), len(read.input_names)) or not len(read.y):
        return f"the table was read, and has shapes {read.x.shape} and {read.y.shape}"
    return None


def _arrow_column(rng: np.random.Generator, rows: int) -> pa.Array:
    """A column of one of Parquet's types."""
    numbers = rng.integers(0, 100, size=rows).tolist()
    day = datetime.date(2020, 1, 1)
    makers: tuple[Callable[[], Any], ...] = (
        lambda: pa.array(
            numbers, rng.choice([pa.int8(), pa.int64(), pa.uint16(), pa.float32(), pa.float64()])
        ),
        lambda: pa.array(np.array(numbers, np.float16)),
        lambda: pa.array([2**64 - 1 - n for n in numbers], pa.uint64()),
        lambda: pa.array([n > 50 for n in numbers]),
        lambda: pa.array([Decimal(n) / 8 for n in numbers], pa.decimal128(38, 20)),
        lambda: pa.array([str(n) for n in numbers], rng.choice([pa.string(), pa.large_string()])),
        lambda: pa.array([str(rng.choice(CELLS)) for _ in numbers]),
        lambda: pa.array([str(n) for n in numbers]).dictionary_encode(),
        lambda: pa.array(numbers).dictionary_encode(),
        lambda: pa.array([day + datetime.timedelta(n) for n in numbers]),
        lambda: pa.array(numbers, pa.timestamp(str(rng.choice(["s", "ms", "us", "ns"])))),
        lambda: pa.array(numbers, pa.duration("s")),
        lambda: pa.array([datetime.time(n % 24) for n in numbers]),
        lambda: pa.array([str(n).encode() for n in numbers]),
        lambda: pa.array([[n] for n in numbers]),
        lambda: pa.array([{"n": n} for n in numbers]),
        lambda: pa.nulls(rows),
        lambda: pa.array([n if n > 5 else None for n in numbers]),
        lambda: pa.array([float(n) if n > 5 else float(rng.choice([np.nan, np.inf])) for n in numbers]),
        lambda: pa.array([10.0**308 * n / 100 for n in numbers]),
    )
    return makers[int(rng.integers(len(makers)))]()


def parquet_files(rng: np.random.Generator) -> str | None:
    """Parquet files of every type of column, of any index, and with damaged bytes or metadata."""
    if rng.random() < 0.4:
        table = _with_index(rng, _table(rng))
        buffer = io.BytesIO()
        table.to_parquet(buffer)
        content = buffer.getvalue()
    else:
        rows = int(rng.choice([0, 1, 3, 30]))
        names = [str(rng.choice(NAMES)) for _ in range(int(rng.integers(1, 4)))] + ["y"] * (
            rng.random() < 0.9
        )
        made = pa.table([_arrow_column(rng, rows) for _ in names], names=names)
        if rng.random() < 0.3:
            level = {"kind": "range", "name": rng.choice(["row", "y"]), "start": 0, "stop": rows, "step": 1}
            level[str(rng.choice(["start", "stop", "step", "kind"]))] = [rows, "x", None, 10**30, 0][
                int(rng.integers(5))
            ]
            words = [{"index_columns": [level]}, {"index_columns": 3}, [1], {"index_columns": [["a"]]}]
            pandas = json.dumps(words[int(rng.integers(len(words)))])
            made = made.replace_schema_metadata({"pandas": pandas if rng.random() < 0.9 else "{"})
        buffer = io.BytesIO()
        pa.parquet.write_table(made, buffer)
        content = buffer.getvalue()
    if rng.random() < 0.2:
        content = _damaged_bytes(rng, content)
    return _finite(_read(FOLDER / "table.parquet", content))


def _with_index(rng: np.random.Generator, table: pd.DataFrame) -> pd.DataFrame:
    kind = str(rng.choice(["float32", "Float64", "object", "string", "category"]))
    changes: tuple[Callable[[], pd.DataFrame], ...] = (
        lambda: table,
        lambda: table.set_index("a"),
        lambda: table.set_index("y"),
        lambda: table.rename_axis("row"),
        lambda: table.sample(frac=1.0, random_state=0),
        lambda: table.set_index(pd.date_range("2020", periods=len(table))),
        lambda: table.set_index(pd.date_range("2020", periods=len(table), name="day")),
        lambda: pd.DataFrame({name: cells.astype(kind) for name, cells in table.items()}),
        lambda: table.assign(t=pd.Timestamp("2020")),
        lambda: pd.concat([table, table], axis=1).iloc[:, : table.shape[1]],
    )
    return changes[int(rng.integers(len(changes)))]()


KINDS: dict[str, Callable[[np.random.Generator], str | None]] = {
    "csv_forms": csv_forms,
    "csv_damaged": csv_damaged,
    "parquet_files": parquet_files,
}
