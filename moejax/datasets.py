"""Real data: tables from files, and data sets by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

BUILT_IN = ("diabetes",)


class Dataset(NamedTuple):
    """A regression data set with names."""

    x: np.ndarray
    """(n, d)"""
    y: np.ndarray
    """(n,)"""
    input_names: tuple[str, ...]
    target_name: str


def load(name: str) -> Dataset:
    """A data set by name: "diabetes" (442 patients, 10 inputs; Efron et al. 2004), which scikit-learn ships.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BUILT_IN:
        raise ValueError(f"dataset: unknown name {name!r}; available: {', '.join(BUILT_IN)}")
    from sklearn.datasets import load_diabetes

    bunch: Any = load_diabetes(scaled=False)
    return Dataset(bunch.data, bunch.target, tuple(bunch.feature_names), "disease progression after one year")


def read_table(path: Path, target: str) -> Dataset:
    """A CSV or Parquet file whose every column is numeric; all columns but the target are inputs.

    Raises:
        ValueError: not a CSV or Parquet file, no such target, nothing but the target, or a cell that is no finite number; the
            message names the file, the column and the row.
        OSError: the file cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: expected a .csv or .parquet file")
    try:
        table = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a readable {suffix[1:]} table: {str(error).strip().splitlines()[0]}"
        ) from error
    table.columns = [str(column) for column in table.columns]
    if target not in table.columns:
        near = difflib.get_close_matches(target, table.columns, n=3, cutoff=0.4)
        nearest = f"nearest: {', '.join(near)}; " if near else ""
        raise ValueError(f"{path}: no target column {target!r}; {nearest}columns: {', '.join(table.columns)}")
    if table.shape[1] < 2:
        raise ValueError(f"{path}: expected input columns beside the target {target!r}, got none")
    numbers = {}
    for column in table.columns:
        numbers[column] = np.asarray(pd.to_numeric(table[column], errors="coerce"), np.float64)
        bad = ~np.isfinite(numbers[column])
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(
                f"{path}: column {column!r}, row {row + 1}: expected a finite number, got {table[column].iloc[row]!r}"
            )
    inputs = [column for column in table.columns if column != target]
    x = np.stack([numbers[column] for column in inputs], axis=1)
    constant = [column for column, values in zip(inputs, x.T, strict=True) if values.min() == values.max()]
    if constant:
        raise ValueError(
            f"{path}: column {constant[0]!r} is constant ({numbers[constant[0]][0]:g}); remove it"
        )
    y = numbers[target]
    if y.min() == y.max():
        raise ValueError(f"{path}: target column {target!r} is constant ({y[0]:g})")
    return Dataset(x, y, tuple(inputs), target)
