"""Tables from CSV and Parquet files: every form of a table is read the same, and what is none is refused in one line."""

import datetime
import decimal
import gzip
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from moejax.fitting import delimited_text
from moejax.fitting.tables import read_columns, read_table


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
    assert read.target_names == ("yield",)
    assert read.target_name == "yield"


@pytest.mark.parametrize(
    ("change", "target", "words"),
    [
        ({}, "yeild", ["no target column 'yeild'", "did you mean yield"]),
        ({"a": "n/k"}, "yield", ["column 'a'", "row 4", "'n/k'"]),
        ({"b": np.nan}, "yield", ["column 'b'", "row 4", "an empty cell"]),
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,yield\n", "expected rows below the header"),
        ("a,a,yield\n1,2,3\n2,3,1\n", "column 'a' is there twice"),
    ],
)
def test_tables_without_rows_and_names_that_repeat(tmp_path, text, words):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_table(path, "yield")


ROWS = [(0.5, 3, 0), (1, -1e3, 1), (2.25, 7, 5), (4, 8, 7)]
PLAIN = "a,b,y\n" + "".join(f"{a},{b},{y}\n" for a, b, y in ROWS)
"""Numbers that every form below must give again."""
X_PLAIN = np.array(ROWS)[:, :2]


def other_form(*changes):
    text = PLAIN
    for old, new in changes:
        text = text.replace(old, new)
    return text


def numbered(text, start, first='""'):
    header, *rows = text.splitlines()
    return "\n".join([f"{first},{header}", *(f'"{start + i}",{row}' for i, row in enumerate(rows))])


@pytest.mark.parametrize(
    ("suffix", "content", "notes"),
    [
        (".csv", PLAIN, []),
        (".CSV", PLAIN, []),
        (".tsv", other_form((",", "\t")), []),
        (".csv", other_form((",", "\t")), []),
        (".csv", other_form((",", ";")), []),
        (".csv", other_form((",", "|")), []),
        (".csv", other_form((",", ";"), (".", ",")), ["decimal sign"]),
        (".csv", other_form((",", ", ")), []),
        (".csv", other_form(("\n", "\r\n")), []),
        (".csv", other_form(("\n", "\r")), []),
        (".csv", "\n\n" + other_form(("\n", "\n\n")), []),
        (".csv", other_form(("a,b,y", '"a","b","y"'), ("0.5,3", '"0.5","3"')), []),
        (".csv", other_form((",0\n", ",0,\n"), (",1\n", ",1,\n"), (",5\n", ",5,\n"), (",7\n", ",7,\n")), []),
        (".csv", other_form(("\n", ",\n")), ["column 4 has neither a name nor cells"]),
        (".csv", numbered(PLAIN, 1), ["numbers the rows"]),
        (".csv", numbered(PLAIN, 0, ""), ["numbers the rows"]),
        (".csv", numbered(PLAIN, 0, "Unnamed: 0"), ["numbers the rows"]),
        (".csv", b"\xef\xbb\xbf" + PLAIN.encode(), []),
        (".csv", PLAIN.encode("utf-16"), []),
        (".csv.gz", gzip.compress(PLAIN.encode(), mtime=0), []),
        (".tsv.gz", gzip.compress(other_form((",", "\t")).encode("utf-16"), mtime=0), []),
        (".csv", other_form(("a,b,y", "b\xe9,b,y")).encode("latin-1"), ["Windows-1252"]),
        (".csv", other_form(("a,b,y", '"a, or\n""A""",b,y')), []),
    ],
)
def test_forms_of_the_same_table(tmp_path, suffix, content, notes):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    read = read_table(path, "y")
    np.testing.assert_array_equal(read.x, X_PLAIN)
    np.testing.assert_array_equal(read.y, [0, 1, 5, 7])
    assert read.input_names[1] == "b"
    assert len(read.notes) == len(notes)
    for note, words in zip(read.notes, notes, strict=True):
        assert words in note


def test_truth_values_and_large_numbers(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b,y\nTrue,123456789012345678901234567890,1e308\nFALSE,0.1,-5e-324\n")
    read = read_table(path, "y")
    np.testing.assert_array_equal(read.x, [[1, 123456789012345678901234567890.0], [0, 0.1]])
    np.testing.assert_array_equal(read.y, [1e308, -5e-324])


def test_a_separator_and_a_decimal_sign_that_are_named(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a;b;y\n1,250;2,500;0,125\n2,500;3,125;1,750\n")
    np.testing.assert_array_equal(
        read_table(path, "y").x, [[1.25, 2.5], [2.5, 3.125]]
    )  # 0,125 is no thousand
    path.write_text("a,y;b,y\n1,5;2,5\n2,5;3,5\n")
    with pytest.raises(ValueError, match=r"',' and ';' both cut it into columns.*--separator"):
        read_table(path, "b,y")
    read = read_table(path, "b,y", separator=";")
    assert read.input_names == ("a,y",)
    np.testing.assert_array_equal(read.x[:, 0], [1.5, 2.5])
    path.write_text("a\ty\n1,250\t2\n2,500\t3\n")
    with pytest.raises(ValueError, match=r"'2,500' may be read in two ways.*--decimal"):
        read_table(path, "y")
    np.testing.assert_array_equal(read_table(path, "y", separator="tab", decimal=",").x[:, 0], [1.25, 2.5])
    with pytest.raises(ValueError, match=r"column 'a', row 1: expected a finite number, got '1,250'"):
        read_table(path, "y", decimal=".")
    path.write_text("a;y\n1.500;2\n2,5;3\n")
    with pytest.raises(ValueError, match=r"column 'a', row 1: expected a finite number, got '1.500'"):
        read_table(path, "y", decimal=",")
    for options, words in (
        ({"separator": "x"}, "separator: expected comma, semicolon, tab or bar, got 'x'"),
        ({"separator": 3}, "separator: expected"),
        ({"decimal": ";"}, r"decimal: expected '\.' or ',', got ';'"),
        ({"decimal": ",", "separator": ","}, "decimal: expected another sign than the separator"),
    ):
        with pytest.raises(ValueError, match=words):
            read_table(path, "y", **options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (other_form(("0.5", "7,0.5")), "row 1 .line 2.: expected 3 fields as in the header, got 4"),
        (
            other_form(("\n", ",9\n"), ("y,9", "y")),
            "row 1 .line 2.: expected 3 fields as in the header, got 4",
        ),
        (other_form((",8,7", ",8,7,1")), "row 4 .line 5.: expected 3 fields as in the header, got 4"),
        (other_form((",8,7", ",8,7,")), "row 4 .line 5.: expected 3 fields as in the header, got 4"),
        (other_form((",8,7", ",8")), "row 4 .line 5.: expected 3 fields as in the header, got 2"),
        ("# a comment\n" + PLAIN, "row 1 .line 2.: expected 1 field as in the header, got 3"),
        (other_form(("a,b,y", "a,,y")), "column 2 has no name"),
        (other_form(("a,b,y", ",b,y")), "column 1 has no name"),
        (numbered(PLAIN, 2), "column 1 has no name"),
        (other_form(("a,b", "a,a ")), "column 'a' is there twice"),
        (other_form(("0.5", "NA")), "column 'a', row 1: expected a finite number, got 'NA'"),
        (other_form(("0.5", " ")), "column 'a', row 1: .*got an empty cell"),
        (other_form(("0.5", "2020-01-01")), "column 'a', row 1: .*got '2020-01-01'"),
        (other_form(("2.25", "1_000")), "column 'a', row 3: .*got '1_000'"),
        (other_form(("2.25", "0x10")), "column 'a', row 3: .*got '0x10'"),
        (other_form(("2.25", "9" * 400)), "column 'a', row 3: .*got '999.*"),
        (other_form(("2.25", "1e400")), "column 'a', row 3: .*got '1e400'"),
        (other_form(("2.25", "nan")), "column 'a', row 3: .*got 'nan'"),
        (other_form(("2.25", "x" * 10**5)), "column 'a', row 3: .*got 'xxx.*"),
        (other_form(("2.25", '"' + "x" * 200_000)), "not a readable csv table: field larger"),
        (other_form(("2.25", '"2.25')), "row 3 .*: expected 3 fields as in the header, got 1"),
        (other_form(("2.25", "\0")), "line 4: expected text, got a NUL"),
        (PLAIN.encode("utf-16")[2:], "line 1: expected text, got a NUL"),
        (PLAIN.encode("utf-16")[:-1], "not a readable csv table: .*truncated"),
        ("\n \n", "it has no header"),
        ("a b y\n1 2 3\n", "no target column 'y'; known: a b y"),
        (",".join(f"column{i}" for i in range(1000)), r"column31, \.\. \(1000 in all\)"),
    ],
)
def test_text_that_is_no_table_of_numbers(tmp_path, content, words):
    path = tmp_path / "data.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        read_table(path, "y")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_rows_are_counted_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited_text, "_ROWS_AT_ONCE", 3)
    path = tmp_path / "data.csv"
    path.write_text("a,y\n" + "".join(f"{i},{i * i}\n" for i in range(8)))
    np.testing.assert_array_equal(read_table(path, "y").y, np.arange(8.0) ** 2)
    path.write_text("a,y\n" + "".join(f"{i},{'?' if i in (5, 7) else i}\n" for i in range(8)))
    with pytest.raises(ValueError, match=r"column 'y', row 6: expected a finite number, got '\?'"):
        read_table(path, "y")


def test_damaged_gzip(tmp_path):
    path = tmp_path / "data.csv.gz"
    whole = gzip.compress(PLAIN.encode(), mtime=0)
    for content in (whole[:-9], PLAIN.encode(), whole[:12] + b"\xff\xff" + whole[14:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole gzip file"):
            read_table(path, "y")


def frame(**columns):
    return pd.DataFrame({"a": [0.5, 1, 2.25, 4], "b": [3, -1000, 7, 8], "y": [0, 1, 5, 7]} | columns)


@pytest.mark.parametrize(
    ("table", "names", "notes"),
    [
        (frame(), {"a", "b"}, 0),
        (frame().set_index("a"), {"a", "b"}, 0),
        (frame().set_index(["a", "b"]), {"a", "b"}, 0),
        (frame().rename_axis("row"), {"a", "b", "row"}, 0),
        (frame().sort_values("y").set_index(pd.Index([9, 4, 7, 1])), {"a", "b"}, 1),
        (frame().set_index(pd.date_range("2020", periods=4)), {"a", "b"}, 1),
        (frame(a=["0.5", "1", "2.25", "4"]), {"a", "b"}, 0),
        (frame(b=pd.Categorical([3, -1000, 7, 8])), {"a", "b"}, 0),
        (frame(b=pd.array([3, -1000, 7, 8], dtype="Int16")), {"a", "b"}, 0),
        (frame(b=[decimal.Decimal(v) for v in ("3.0", "-1000.0", "7.0", "8.0")]), {"a", "b"}, 0),
        (frame(c=[True, False, True, False]), {"a", "b", "c"}, 0),
        (frame(c=np.array([1, 2, 3, 4.5], np.float16)), {"a", "b", "c"}, 0),
    ],
)
def test_parquet_keeps_every_column_that_has_a_name(tmp_path, table, names, notes):
    path = tmp_path / "data.parquet"
    table.to_parquet(path)
    read = read_table(path, "y")
    assert set(read.input_names) == names
    assert len(read.notes) == notes
    columns = {name: read.x[:, read.input_names.index(name)] for name in ("a", "b")}
    np.testing.assert_array_equal(columns["a"], X_PLAIN[:, 0])
    np.testing.assert_array_equal(columns["b"], X_PLAIN[:, 1])
    if "row" in names:
        np.testing.assert_array_equal(read.x[:, read.input_names.index("row")], np.arange(4))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            frame(t=pd.date_range("2020", periods=4)),
            r"column 't': expected numbers, got dates or durations \(timestamp",
        ),
        (frame(t=pd.to_timedelta(range(4), unit="h")), "column 't': .*duration"),
        (frame(t=[datetime.date(2020, 1, 1)] * 4), "column 't': .*date32"),
        (frame(t=[datetime.time(1)] * 4), "column 't': .*time64"),
        (frame(t=pd.Categorical(pd.date_range("2020", periods=4))), "column 't': .*timestamp"),
        (frame(t=[[1], [2], [3], [4]]), "column 't': expected numbers, got the type list"),
        (frame(t=[b"1"] * 4), "column 't': expected numbers, got the type binary"),
        (frame(t=pd.array([1, None, 3, 4], dtype="Int64")), "column 't', row 2: .*got an empty cell"),
        (frame(t=[True, None, True, False]), "column 't', row 2: .*got an empty cell"),
        (frame(t=["1", "2", "x", "4"]), "column 't', row 3: .*got 'x'"),
        (frame(t=["1", "2", "9" * 400, "4"]), "column 't', row 3: .*got '999"),
        (frame(t=[1.0, -np.inf, 2.0, 3.0]), "column 't', row 2: .*got -inf"),
        (frame(t=[None] * 4), "column 't', row 1: .*got an empty cell"),
        (frame().set_index(pd.date_range("2020", periods=4, name="day")), "column 'day': .*timestamp"),
        (frame().iloc[:0], "expected rows below the header, got none"),
    ],
)
def test_parquet_that_is_no_table_of_numbers(tmp_path, table, words):
    path = tmp_path / "data.parquet"
    table.to_parquet(path)
    with pytest.raises(ValueError, match=words) as caught:
        read_table(path, "y")
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "data.parquet"
    frame().to_parquet(path)
    whole = path.read_bytes()
    header = whole[:8] + b"\xff" * 8 + whole[16:]  # of the first page
    for content in (b"", b"PAR1", whole[:-20], b"a,b,y\n1,2,3\n", header):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable parquet table"):
            read_table(path, "y")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="separator, decimal: expected none for a Parquet file"):
        read_table(path, "y", separator=";")


def test_a_constant_target_is_refused_and_a_constant_input_is_left_to_the_fit(table, tmp_path):
    path = tmp_path / "data.csv"
    table.assign(a=2.5).to_csv(path, index=False)
    assert np.all(read_table(path, "yield").x[:, 0] == 2.5)
    table.assign(**{"yield": 2.5}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"target column 'yield' is constant \(2.5\)"):
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


@pytest.mark.parametrize(
    "levels",
    [
        3,
        [1],
        [{"kind": "range", "name": "row", "start": 0, "stop": 10**30, "step": 1}],
        [{"kind": "range", "name": "row"}],
    ],
)
def test_metadata_that_pandas_did_not_write(tmp_path, levels):
    path = tmp_path / "data.parquet"
    table = pa.table({"a": [1.0, 2.0], "y": [2.0, 1.0]})
    pa.parquet.write_table(
        table.replace_schema_metadata({"pandas": json.dumps({"index_columns": levels})}), path
    )
    assert read_table(path, "y").input_names == ("a",)
    pa.parquet.write_table(table.replace_schema_metadata({"pandas": "{"}), path)
    with pytest.raises(ValueError, match="not a readable parquet table"):
        read_table(path, "y")


def test_parquet_names_and_text_that_are_no_text(tmp_path):
    path = tmp_path / "data.parquet"
    text = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"1", b"\xff"]).buffers()[1:]])
    pa.parquet.write_table(pa.table({"a": text, "y": [2.0, 1.0]}), path)
    with pytest.raises(ValueError, match=r"column 'a': not readable text"):
        read_table(path, "y")
    pa.parquet.write_table(pa.table({"name_of_a": [1.0, 2.0], "y": [2.0, 1.0]}), path)
    path.write_bytes(path.read_bytes().replace(b"name_of_a", b"name\xff\xffof"))
    with pytest.raises(ValueError, match="not a readable parquet table"):
        read_table(path, "y")


def test_all_columns_of_a_file(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(PLAIN)
    columns = read_columns(path)
    assert columns.names == ("a", "b", "y")
    np.testing.assert_array_equal(columns.values, ROWS)
    assert columns.notes == ()
