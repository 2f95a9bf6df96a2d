"""Tables from files: what is read, and one clear line for what cannot be."""

import numpy as np
import pandas as pd
import pytest

from moejax.datasets import load, read_table


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"a": rng.normal(size=20), "b": rng.normal(size=20), "yield": rng.normal(size=20)})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_reads_csv_and_parquet(table, tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    read = read_table(path, "yield")
    np.testing.assert_allclose(read.x, table[["a", "b"]].to_numpy(), rtol=1e-14)
    np.testing.assert_allclose(read.y, table["yield"].to_numpy(), rtol=1e-14)
    assert read.input_names == ("a", "b")
    assert read.target_name == "yield"


def test_diabetes_is_there():
    data = load("diabetes")
    assert data.x.shape == (442, 10)
    assert "bmi" in data.input_names


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"dataset: unknown name 'iris'; available: diabetes"):
        load("iris")


@pytest.mark.parametrize(
    ("change", "target", "words"),
    [
        ({}, "yeild", ["no target column 'yeild'", "nearest: yield"]),
        ({"a": "n/k"}, "yield", ["column 'a'", "row 4", "'n/k'"]),
        ({"b": np.nan}, "yield", ["column 'b'", "row 4", "nan"]),
        ({"yield": np.inf}, "yield", ["column 'yield'", "row 4", "inf"]),
    ],
)
def test_bad_cells_and_columns(table, tmp_path, change, target, words):
    table = table.astype(object)
    for column, value in change.items():
        table.loc[3, column] = value
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        read_table(path, target)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["a", "yield"])
def test_constant_columns(table, tmp_path, column):
    table[column] = 2.5
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    with pytest.raises(ValueError, match=rf"column '{column}' is constant \(2.5\)"):
        read_table(path, "yield")


def test_not_a_table(tmp_path):
    with pytest.raises(ValueError, match=r"expected a \.csv or \.parquet file"):
        read_table(tmp_path / "data.txt", "y")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(ValueError, match="not a readable csv table"):
        read_table(empty, "y")
    with pytest.raises(OSError, match=r"missing\.csv"):
        read_table(tmp_path / "missing.csv", "y")
