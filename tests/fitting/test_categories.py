"""Columns of text as inputs: levels, indicators against pandas' own, new rows, and the cells that are refused."""

import numpy as np
import pandas as pd
import pytest

from moejax.fitting.categories import as_document, categories_from, category_of, encoded
from moejax.fitting.tables import read_table

COLOURS = ["red", "blue", "red", "green", "red", "blue"]


def table(**changes):
    columns = {"a": np.arange(6.0), "colour": COLOURS, "b": np.arange(6.0) ** 2, "y": np.arange(6.0) % 5}
    return pd.DataFrame(columns | changes)


def written(tmp_path, frame, name="data.csv"):
    path = tmp_path / name
    if name.endswith("csv"):
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
@pytest.mark.parametrize("kind", ["object", "category"])
def test_indicators_are_those_of_pandas(tmp_path, name, kind):
    frame = table()
    read = read_table(written(tmp_path, frame.astype({"colour": kind}), name), "y")
    assert read.input_names == ("a", "colour=blue", "colour=green", "b")
    theirs = pd.get_dummies(frame["colour"], dtype=float)[["blue", "green"]]
    np.testing.assert_array_equal(read.x[:, 1:3], theirs)
    np.testing.assert_array_equal(read.x[:, [0, 3]], frame[["a", "b"]])
    (category,) = read.categories
    assert (category.column, category.reference, category.levels) == ("colour", "red", ("blue", "green"))
    (note,) = read.notes
    assert note == (
        "column 'colour' holds text: it became 'colour=blue', 'colour=green', against its most frequent level 'red'"
    )


def test_new_rows_are_encoded_in_the_same_way(tmp_path):
    read = read_table(written(tmp_path, table()), "y")
    again = categories_from(as_document(read.categories))
    assert again == read.categories
    new = pd.DataFrame({"b": [1.0, 2.0], "colour": [" green", "red"], "a": [0.0, 1.0]}, index=[7, 9])
    made = encoded(new, again)
    assert made.columns.tolist() == ["b", "colour=blue", "colour=green", "a"]
    assert made.index.tolist() == [7, 9]
    np.testing.assert_array_equal(made[list(read.input_names)], [[0, 0, 1, 1], [1, 0, 0, 2]])


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["red", "bleu"], r"column 'colour', row 2: unknown level 'bleu'; did you mean blue\?"),
        (["red", np.nan], r"column 'colour', row 2: expected a level, got an empty cell"),
        (["NA", "red"], r"column 'colour', row 1: expected a level, got 'NA', a missing value"),
    ],
)
def test_new_levels_and_missing_cells_are_refused(cells, words):
    categories = [category_of("colour", COLOURS)]
    with pytest.raises(ValueError, match=words) as raised:
        encoded(pd.DataFrame({"colour": cells}), categories)
    assert "\n" not in str(raised.value)
    with pytest.raises(
        ValueError, match=r"column 'colour': expected among the columns; did you mean color\?"
    ):
        encoded(pd.DataFrame({"color": cells}), categories)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        # a few words among numbers are wrong cells, and so are a few numbers fewer than half
        (["1", "2", "?", "4", "5", "6"], r"column 'c', row 3: expected a finite number, got '\?'"),
        (["?", "2", "?", "4", "?", "?"], r"column 'c', row 1: expected a finite number, got '\?'"),
        (["", "", "", "", "", ""], r"column 'c', row 1: expected a finite number, got an empty cell"),
        (["u", "v", "", "u", "u", "v"], r"column 'c', row 3: expected a level, got an empty cell"),
        (
            list("uvwxyz"),
            r"column 'c', row 1: expected a finite number, got 'u'; .* too many levels, 6 in 6 rows",
        ),
    ],
)
def test_cells_that_are_neither_numbers_nor_levels(tmp_path, cells, words):
    path = written(tmp_path, table(c=cells))
    with pytest.raises(ValueError, match=words) as raised:
        read_table(path, "y")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_many_levels_levels_that_are_numbers_and_one_level(tmp_path):
    n = 120
    levels = [f"level {i % 51}" for i in range(n)]
    frame = pd.DataFrame({"c": levels, "y": np.arange(n)})
    with pytest.raises(
        ValueError, match=r"too many levels, 51 in 120 rows \(at most 50, and fewer than rows\)"
    ):
        read_table(written(tmp_path, frame), "y")
    few = ["7" if i == 3 else f"level {i % 50}" for i in range(n)]
    read = read_table(
        written(tmp_path, frame.assign(c=[cell.replace("level 3", "level 4") for cell in few])), "y"
    )
    assert "c=7" in read.input_names
    one = read_table(written(tmp_path, frame.assign(c="same", a=np.arange(n) ** 2)), "y")
    assert one.input_names == ("a",)
    assert "no column, for it has no other level" in one.notes[0]
    with pytest.raises(ValueError, match="expected inputs that vary, got columns of one level"):
        read_table(written(tmp_path, frame.assign(c="same")), "y")


def test_the_target_and_names_that_indicators_take(tmp_path):
    with pytest.raises(ValueError, match=r"column 'colour', row 1: expected a finite number, got 'red'"):
        read_table(written(tmp_path, table()), "colour")
    with pytest.raises(
        ValueError, match=r"names that occur once, with those of categories, got 'colour=blue'"
    ):
        read_table(written(tmp_path, table(**{"colour=blue": np.arange(6.0)})), "y")


def test_ties_are_broken_by_the_alphabet_and_white_space_is_dropped():
    category = category_of("c", ["v ", "u", " v", "u", "t"])
    assert (category.reference, category.levels) == ("u", ("t", "v"))
