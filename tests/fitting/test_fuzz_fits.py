"""Whatever is passed to the doors of a fit is taken as it is meant, or refused in one short line: Hypothesis, and the fuzz kinds.

The large version, some thousand inputs of every kind with fits behind them, is `benchmarks/fuzz.py`.
"""

import csv
import datetime
import importlib
import io
import string
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moejax.checks import brief
from moejax.fitting import arguments
from moejax.fitting.arguments import noise_levels, number_of_experts, prng_key
from moejax.fitting.array_checks import as_numbers, checked_arrays
from moejax.fitting.tables import read_columns

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

few = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**300, 10**320),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.decimals(),
    st.fractions(),
    st.dates(),
    st.sampled_from(
        [
            pd.NA,
            pd.NaT,
            np.ma.masked,
            np.float32(1),
            np.int8(-1),
            np.bool_(True),
            np.datetime64("2020"),
            object(),
            len,
        ]
    ),
    st.builds(datetime.timedelta, st.integers(-5, 5)),
    st.builds(np.zeros, st.sampled_from([(), (0,), (3,), (2, 2), (3, 1), (10**4,)])),
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=2),
        st.lists(st.lists(inner, min_size=2, max_size=2), min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def refused(check, *values):
    """The result of a check, or None if it refused the values in one short line."""
    try:
        return check(*values)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        assert 0 < len(message) < 600, message
        return None


@few
@given(ANYTHING)
def test_a_value_is_shown_in_a_short_line(value):
    text = brief(value)
    assert len(text) <= 160
    assert "\n" not in text


@few
@given(ANYTHING)
def test_any_value_as_an_array(value):
    array = refused(as_numbers, value, "x")
    assert array is None or (type(array) is np.ndarray and array.dtype == np.float64)


@few
@given(ANYTHING, ANYTHING, ANYTHING)
def test_any_values_as_a_sample(x, y, weights):
    arrays = refused(checked_arrays, x, y, weights)
    if arrays is not None:
        assert all(np.isfinite(array).all() for array in arrays)
        assert len({len(array) for array in arrays}) == 1


@few
@given(st.sampled_from(sorted(arguments.CHECKS)), ANYTHING)
def test_any_value_as_any_option(name, value):
    checked = refused(arguments.CHECKS[name], value, name)
    assert checked is None or isinstance(checked, bool | int | float | str | tuple) or callable(checked)


@few
@given(ANYTHING)
def test_any_value_as_a_number_of_experts_a_noise_and_a_key(value):
    number = refused(number_of_experts, value)
    several = isinstance(number, tuple) and min(number) >= 1
    assert number in (None, "auto") or several or (type(number) is int and number >= 1)
    for outputs in ((), (2,)):
        levels = refused(noise_levels, value, outputs)
        assert levels is None or (levels.shape in ((), outputs) and (levels > 0).all())
    assert refused(prng_key, value) is None


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
HEADERS = st.lists(
    st.text(string.ascii_letters + ' ,;"é', min_size=1, max_size=6),
    min_size=2,
    max_size=4,
    unique_by=str.strip,
)


@few
@given(st.data())
def test_a_table_of_any_numbers_is_read_as_it_was_written(tmp_path, data):
    names = data.draw(HEADERS.filter(lambda names: all(name.strip() for name in names)))
    rows = data.draw(st.lists(st.tuples(*[NUMBERS] * len(names)), min_size=1, max_size=6))
    separator, decimal = data.draw(
        st.sampled_from([(",", "."), (";", "."), (";", ","), ("\t", ","), ("|", ".")])
    )
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerow(names)
    writer.writerows([repr(value).replace(".", decimal) for value in row] for row in rows)
    path = tmp_path / "data.csv"
    path.write_bytes(text.getvalue().encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))))
    read = read_columns(path, separator=separator, decimal=decimal)
    assert read.names == tuple(name.strip() for name in names)
    np.testing.assert_array_equal(read.values, rows)
    sniffed = refused(read_columns, path)  # what is not clear is refused, never read as something else
    if sniffed is not None:
        np.testing.assert_array_equal(sniffed.values, rows)


CELLS = st.one_of(
    st.text(max_size=4), st.sampled_from(["", "1", "2.5", "1,5", "NA", "inf", "1e400", "9" * 400, "True"])
)


@few
@given(st.lists(st.lists(CELLS, max_size=4), max_size=4), st.sampled_from([",", ";", "\t", "\n"]))
def test_any_text_as_a_table(tmp_path, rows, separator):
    path = tmp_path / "data.csv"
    path.write_bytes("\n".join(separator.join(row) for row in rows).encode("utf-8", errors="surrogatepass"))
    read = refused(read_columns, path)
    assert read is None or (np.isfinite(read.values).all() and read.values.shape[1] == len(read.names))


@few
@given(st.binary(max_size=40), st.sampled_from([".csv", ".tsv", ".csv.gz", ".parquet"]))
def test_any_bytes_as_a_table(tmp_path, content, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    read = refused(read_columns, path)
    assert read is None or np.isfinite(read.values).all()


@pytest.mark.parametrize("kind", ["csv_forms", "csv_damaged", "parquet_files"])
def test_kinds_of_the_fuzz_benchmark(monkeypatch, kind):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fuzz, tables = importlib.import_module("fuzz"), importlib.import_module("fuzz_tables")
    outcomes = {"ok": 0, "refused": 0}
    for index in range(60):
        outcome, seen = fuzz.run_one(tables.KINDS[kind], fuzz.generator(kind, 1, index), 30.0)
        assert outcome in outcomes, f"{seen}\n{tables.last_input()}"
        outcomes[outcome] += 1
    assert min(outcomes.values()) > 0
    for name in ("fuzz", "fuzz_tables"):
        sys.modules.pop(name)
