"""Rows of text files, read in batches: every cell and every bad row."""

import numpy as np
import pandas as pd
import pytest

from moejax import FileSource

N = 6000


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    return random.normal(size=(N, 4)) * np.array([1.0, 10.0, 0.1, 3e7]), random.normal(size=N)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "semicolon"])
def test_text_files(data, tmp_path, form):
    frame = pd.DataFrame(data[0], columns=list("abcd")).assign(target=data[1])
    if form == "semicolon":
        file = tmp_path / "rows.csv"
        frame.to_csv(file, sep=";", decimal=",", index=False)
    else:
        file = tmp_path / f"rows.{form}"
        frame.to_csv(file, index=True)  # a first column without a name counts the rows
    rows = FileSource(file, target="target")
    assert rows.input_names == tuple("abcd")
    assert len(rows.notes) == 1
    batches = list(rows.batches(rows.partitions[0], 700))
    np.testing.assert_array_equal(np.concatenate([batch.x for batch in batches]), data[0])
    np.testing.assert_array_equal(np.concatenate([batch.y for batch in batches]), data[1])
    assert max(len(batch.y) for batch in batches) <= 700


def written(tmp_path, rows, name="bad.csv"):
    file = tmp_path / name
    file.write_text("a,b,y\n" + "\n".join(rows) + "\n")
    return file


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("1,x,2", r"bad.csv: column 'b', row 3: expected a finite number, got 'x'"),
        ("1,,2", r"bad.csv: column 'b', row 3: expected a finite number, got an empty cell"),
        ("1,2,nan", r"bad.csv: column 'y', row 3: expected a finite number, got "),
        ("1,2", r"bad.csv: row 3: expected 3 fields as in the header, got 2"),
        ("1,2,3,4", r"bad.csv: row 3: expected 3 fields as in the header, got 4"),
        ("1_0,2,3", r"bad.csv: column 'a', row 3: expected a finite number, got '1_0'"),
    ],
)
def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, row, line):
    file = written(tmp_path, ["1,2,3", "True, 5 ,6", row, "7,8,9", row])
    rows = FileSource(file, target="y")
    with pytest.raises(ValueError, match=line):
        list(rows.batches(rows.partitions[0], 100))
    rows = FileSource(file, target="y", skip_bad_rows=True)
    batches = list(rows.batches(rows.partitions[0], 100))
    assert sum(batch.skipped for batch in batches) == 2
    np.testing.assert_array_equal(np.concatenate([batch.y for batch in batches]), [3.0, 6.0, 9.0])


def test_lines_above_the_header_and_at_the_end_may_be_blank(tmp_path):
    file = tmp_path / "blank.csv"
    file.write_text("\n\na,y\n1,2\n\n3,4\n\n")
    rows = FileSource(file, target="y")
    (batch,) = rows.batches(rows.partitions[0], 10)
    np.testing.assert_array_equal(batch.x, [[1.0], [3.0]])
    np.testing.assert_array_equal(batch.y, [2.0, 4.0])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "it has no header"),
        (b"a,,y\n1,2,3\n", "column 2 has no name"),
        (b"a,a,y\n1,2,3\n", "column 'a' is there twice"),
        ("a,y\n1,2\n".encode("utf-16"), "expected text in UTF-8"),
        (b"a;b,y\n1;2,3\n", "both cut it into columns"),
    ],
)
def test_a_header_that_is_not_clear_is_refused(tmp_path, content, line):
    file = tmp_path / "bad.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=line):
        FileSource(file, target="y")
