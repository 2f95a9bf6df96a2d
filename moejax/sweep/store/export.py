"""Writes tables of trials, or parts and pivots of them, to files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moejax.files import write_whole
from moejax.sweep.store.filters import matching_rows
from moejax.sweep.store.pivot import Pivot
from moejax.sweep.store.read import load
from moejax.sweep.store.schema import StoreError

STDOUT = Path("-")


def export_table(
    folder: Path | str, file: Path | str, *, where: str = "", pivot: Sequence[str] | None = None
) -> int:
    """Write the table of trials, a part or a pivot of it to a file and return the number of rows.

    Args:
        folder: a run folder.
        file: FILE.csv, FILE.csv.gz or FILE.parquet; `-` is CSV on stdout.
        where: a condition on the columns, such as "noise_std < 0.2 and method == 'spectral_em'".
        pivot: (rows, columns, value): fields of the rows and of the columns, such as "num_samples,noise_std"; and a metric
            ("recovery_error": its median), STATISTIC:METRIC with median, mean or rmse, "success_rate" or "trials". A column
            that ends with `_mcse` has the Monte Carlo standard error of the one before.

    Raises:
        ValueError: the name has another ending; the condition or the pivot is not accepted; no row meets the condition.
        StoreError: the store or the file cannot be used.

    Examples:
        >>> moejax.sweep.export_table("runs/quickstart", "table.csv") == len(moejax.sweep.load("runs/quickstart"))
        True
        >>> from pathlib import Path
        >>> _ = moejax.sweep.export_table("runs/quickstart", "pivot.csv", pivot=("num_samples", "method", "recovery_error"))
        >>> "spectral_mcse" in Path("pivot.csv").read_text()
        True
    """
    check_table_name(file)
    table = matching_rows(load(folder), where)
    if pivot is not None:
        table = Pivot.parse(pivot, table).of(table)
    write_table(table, file)
    return len(table)


def check_table_name(file: Path | str) -> None:
    """Refuse a file name whose ending stands for no format of tables.

    Raises:
        ValueError: it is none of .csv, .csv.gz, .parquet, and not `-`.
    """
    file = Path(file)
    if file != STDOUT and not file.name.lower().endswith((".csv", ".csv.gz", ".parquet")):
        raise ValueError(
            f"{file}: unknown format {file.suffix!r}: expected a name that ends in .csv, .csv.gz or .parquet, or - for stdout"
        )


def write_table(table: pd.DataFrame, file: Path | str) -> None:
    """Write any table to FILE.csv, FILE.csv.gz or FILE.parquet, or as CSV to stdout for `-`; lists become text.

    Raises:
        ValueError: the name has another ending.
        StoreError: the file cannot be written.
    """
    check_table_name(file)
    file = Path(file)
    name = file.name.lower()
    for column in table:
        if table[column].map(lambda value: isinstance(value, tuple)).any():
            table = table.assign(**{str(column): table[column].map(_tuple_text)})
    if file == STDOUT:
        table.to_csv(sys.stdout, index=False)
        return
    packed: dict[str, Any] = {"compression": {"method": "gzip", "mtime": 0}} if name.endswith(".gz") else {}
    write = table.to_parquet if name.endswith(".parquet") else table.to_csv
    try:
        write_whole(file, lambda path: write(path, index=False, **packed))
    except OSError as error:
        raise StoreError(f"{file}: cannot be written: {error.strerror or error}") from None


def _tuple_text(value: Any) -> Any:
    """Lists and single numbers share a column: as text they fit both file formats."""
    return json.dumps(list(value)) if isinstance(value, tuple) else value if value is None else str(value)
