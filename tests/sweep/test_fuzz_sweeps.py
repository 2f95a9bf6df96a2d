"""Small samples of what benchmarks/fuzz.py runs by the thousand: specs, --set, texts on the screen, flipped bits of a store."""

from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import made_up_store

from moejax.console import PlainConsole, error_line, shorten
from moejax.sweep import load, load_arrays, load_timings
from moejax.sweep.plan.plan import make_plan
from moejax.sweep.report.status import read_status
from moejax.sweep.report.summary import with_error
from moejax.sweep.spec.fields import FIELDS
from moejax.sweep.spec.parse import MAX_CELLS, TOP_LEVEL, parse_spec
from moejax.sweep.spec.positions import SpecError
from moejax.sweep.store.digests import row_digests
from moejax.sweep.store.schema import STORE_NAME, StoreError

small = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
numbers = st.one_of(st.integers(), st.sampled_from([10**400, 2**31, 2**63]), st.floats())
values = st.recursive(
    st.one_of(numbers, st.booleans(), st.text(max_size=20), st.sampled_from(["relu", "default", "[/x]"])),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


def toml(value: object) -> str:
    """A value as TOML; JSON differs in the words for what is not finite."""
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def refused_or_planned(text: str, overrides: tuple[str, ...] = ()) -> None:
    """What is refused is refused in a line; what is accepted is finite and small enough to be listed."""
    plan = error = None
    try:
        plan = make_plan(parse_spec(text, "fuzz.toml", overrides))
    except SpecError as refusal:
        error = str(refusal)
    if plan is None:
        assert error
        assert "\n" not in error
        assert len(error) <= 1000
        return
    assert 0 < len(plan.cells) <= MAX_CELLS
    for cell in plan.cells[:5]:
        for value in cell.fields().values():
            assert all(
                math.isfinite(v)
                for v in (value if isinstance(value, tuple) else (value,))
                if isinstance(v, float)
            )


@small
@given(st.dictionaries(st.sampled_from([*FIELDS, *TOP_LEVEL]), values, max_size=4))
def test_a_spec_of_any_values_is_planned_or_refused_in_a_line(document):
    lines = {"methods": '["joint_em"]', "trials": "2"} | {key: toml(value) for key, value in document.items()}
    lines.pop("plugins", None)
    refused_or_planned("\n".join(f"{key} = {value}" for key, value in lines.items()))


@small
@given(st.text(max_size=200))
def test_any_text_is_planned_or_refused_in_a_line(text):
    refused_or_planned('methods = ["joint_em"]\ntrials = 2\n' + text)


@small
@given(
    st.sampled_from([*FIELDS, "grid.dim", "precision.max_trials", "trials", "name"]),
    st.one_of(values.map(toml), st.text(max_size=30)),
)
def test_any_override_is_followed_or_refused_in_a_line(key, value):
    refused_or_planned('methods = ["joint_em"]\ntrials = 2\n', (f"{key}={value}",))


@small
@given(st.text(max_size=50))
def test_any_text_is_printed_as_it_is(text):
    out = io.StringIO()
    PlainConsole(file=out, width=400).print(text, soft_wrap=True)
    shown = out.getvalue()
    assert "\x1b" not in shown
    if text.isprintable():
        assert shown == text + "\n"
    assert "\n" not in error_line(text)
    assert len(shorten(text * 100)) <= 1000


@small
@given(st.floats(), st.floats(min_value=0))
def test_any_estimate_is_short(value, mcse):
    assert len(with_error(value, mcse)) <= 45


@small
@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats() | st.none(), st.text(max_size=9) | st.none()),
        min_size=1,
    )
)
def test_rows_have_equal_digests_only_if_they_are_equal(rows):
    kinds = {"a": "INTEGER", "b": "REAL", "c": "TEXT"}
    digests = row_digests(kinds, dict(zip(kinds, zip(*rows, strict=True), strict=True)), len(rows))
    same = {(a, None if b is None or math.isnan(b) else b + 0.0, c) for a, b, c in rows}
    assert len(set(digests)) == len(same)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run folder, the bytes of its store, and what is read from it."""
    _, folder, _ = made_up_store(tmp_path_factory.mktemp("sound"))
    return folder, (folder / STORE_NAME).read_bytes(), read(folder)


def read(folder) -> list[str]:
    """All that the readers make of a store."""
    arrays = sorted((key, value.tobytes()) for key, value in load_arrays(folder).items())
    return [load(folder).to_csv(), load_timings(folder).to_csv(), repr(arrays), repr(read_status(folder))]


@small
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_store_with_flipped_bits_is_read_as_it_was_or_refused(sound, flips):
    folder, content, truth = sound
    damaged = bytearray(content)
    for place, mask in flips:
        damaged[int(place * len(damaged))] ^= mask
    for beside in ("-wal", "-shm"):
        (folder / f"{STORE_NAME}{beside}").unlink(missing_ok=True)
    (folder / STORE_NAME).write_bytes(damaged)
    seen, error = truth, ""
    try:
        seen = read(folder)
    except StoreError as refusal:
        error = str(refusal)
    (folder / STORE_NAME).write_bytes(content)
    assert seen == truth
    assert "\n" not in error
