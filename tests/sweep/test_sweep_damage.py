"""Stores that were interrupted, refused or damaged: whole chunks, nothing changed, and one line that says what is lost."""

from __future__ import annotations

import itertools
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from stores import CHUNK, SPEC, add, change, folder_digest, made_up_store, make_old

from moejax.cli import program as cli
from moejax.sweep import commands, load, load_arrays, load_timings
from moejax.sweep.execution.engine import RunSummary
from moejax.sweep.execution.executors import ClusterError
from moejax.sweep.execution.provenance import collect_provenance
from moejax.sweep.report.status import read_status
from moejax.sweep.report.summary import summarise
from moejax.sweep.store import soundness
from moejax.sweep.store import store as store_module
from moejax.sweep.store.digests import row_digests
from moejax.sweep.store.export import export_table
from moejax.sweep.store.repair import repair_store
from moejax.sweep.store.schema import STORE_NAME, StoreError, expected_columns
from moejax.sweep.store.store import Store

READERS: dict[str, Callable[[Path], object]] = {
    "load": load,
    "load_timings": load_timings,
    "load_arrays": load_arrays,
    "summarise": summarise,
    "status": read_status,
    "report": lambda folder: commands.report(folder, quiet=True),
    "export": lambda folder: export_table(folder, folder / "t.csv"),
    "resume": Store,
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take seconds, and have tests of their own."""
    monkeypatch.setattr("moejax.sweep.report.figures.make_figures", lambda summary: [])


def interrupted_after(lines: int, action: Callable[[], object]) -> bool:
    """Run an action with Ctrl-C at its `lines`-th line in store.py; returns whether it came to that line."""
    count = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename != store_module.__file__:
            return None
        if event == "line" and next(count) == lines:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_while_a_chunk_is_written_leaves_whole_chunks(tmp_path, again, monkeypatch):
    """At every few lines of the code that writes; `again`: once more while the half that is there is undone."""
    _, folder, plan = made_up_store(tmp_path)
    provenance = collect_provenance(plan, (), "nobody")
    line, outcomes = 0, set()
    while True:
        change(folder, *(f"DELETE FROM {table}" for table in ("arrays", "trials", "timings", "chunks")))
        with Store(folder) as store:
            store.begin_run(plan, provenance)
            add(store, plan, 0, 0)
            with monkeypatch.context() as patch:
                if again:
                    patch.setattr(Store, "_drop_half", raise_interrupt)
                came = interrupted_after(line, lambda store=store: add(store, plan, 1, 0))
        with sqlite3.connect(folder / STORE_NAME) as connection:
            counts = {
                table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("chunks", "trials", "timings", "arrays")
            }
        connection.close()
        chunks = counts["chunks"]
        assert counts["trials"] == counts["timings"] == CHUNK * chunks, line
        assert counts["arrays"] == (CHUNK - 1) * chunks, line  # a trial that failed recorded nothing
        outcomes.add(chunks)
        if not came:
            break
        line += 13 if again else 11
    assert outcomes == {1, 2}
    assert line > 30
    load(folder)


def test_what_is_kept_after_ctrl_c_is_counted_in_the_store(tmp_path, monkeypatch, capsys):
    toml, folder, _ = made_up_store(tmp_path)
    change(folder, "DELETE FROM trials WHERE trial >= 5")

    def interrupted(engine):
        engine.summary.trials_run = 1000  # what the engine believes does not count
        raise KeyboardInterrupt

    monkeypatch.setattr("moejax.sweep.execution.engine.Engine.run", interrupted)
    with pytest.raises(SystemExit) as caught:
        commands.sweep(toml, out=folder, workers=1, quiet=True)
    assert caught.value.code == 130
    assert "stopped: 10 trials are kept" in capsys.readouterr().err


def test_failures_are_counted_in_json(tmp_path, monkeypatch, capsys):
    toml, folder, _ = made_up_store(tmp_path)
    summary = RunSummary(trials_run=3, failures=Counter({"RuntimeError: no": 2}), wall_seconds=float("inf"))
    monkeypatch.setattr("moejax.sweep.execution.engine.Engine.run", lambda engine: summary)
    commands.sweep(toml, out=folder, workers=1, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["failures"] == {"RuntimeError: no": 2}
    assert printed["wall_seconds"] is None


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "bad --set": ({"set": ["dim=0"]}, "dim"),
    "unknown key": ({"set": ["dimm=3"]}, "dimm"),
    "unknown method": ({"set": ["methods=magic"]}, "magic"),
    "workers": ({"workers": 0}, "--workers"),
    "width": ({"vmap_width": 0}, "--vmap-width"),
    "no plugin": ({"plugin": [Path("nowhere.py")]}, "nowhere.py"),
    "a plugin that exits": ({"plugin": ["PLUGIN"]}, "called exit"),
    "precision": ({}, "holds float64 results"),
    "version": ({}, "holds results of moejax"),
    "version, with --retry-failed": ({"retry_failed": True}, "holds results of moejax"),
    "version, with --repair": ({"repair": True}, "holds results of moejax"),
    "cluster": ({"cluster": "tcp://127.0.0.1:9"}, "no scheduler"),
    "newer store": ({}, "newer moejax"),
    "damaged": ({}, "damaged"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_run_changes_nothing(tmp_path, monkeypatch, name):
    options, words = REFUSALS[name]
    toml, folder, _ = made_up_store(tmp_path)
    (tmp_path / "plugin.py").write_text("import sys\nsys.exit(3)\n")
    options = {"workers": 1} | options
    if options.get("plugin") == ["PLUGIN"]:
        options["plugin"] = [tmp_path / "plugin.py"]
    if "precision" in name:
        monkeypatch.setattr("moejax.sweep.execution.provenance.float_precision", lambda: "float32")
    if "version" in name:
        monkeypatch.setattr("moejax.__version__", "99")
    if name == "newer store":
        change(folder, "PRAGMA user_version=99")
    if name == "damaged":
        change(folder, "UPDATE trials SET recovery_error = 0.5 WHERE trial = 3")
    if name == "cluster":

        def no_cluster(*_):
            raise ClusterError("no scheduler")

        monkeypatch.setattr("moejax.sweep.execution.dask_cluster.cluster_executor", no_cluster)
        options.pop("workers")
    before = folder_digest(folder)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        commands.sweep(toml, out=folder, quiet=True, **options)
    assert "\n" not in str(caught.value)
    assert folder_digest(folder) == before


def test_a_refused_run_leaves_no_new_folder(tmp_path, monkeypatch):
    toml, _, _ = made_up_store(tmp_path)

    def no_cluster(*_):
        raise ClusterError("no scheduler")

    monkeypatch.setattr("moejax.sweep.execution.dask_cluster.cluster_executor", no_cluster)
    with pytest.raises(ClusterError):
        commands.sweep(toml, out=tmp_path / "other", cluster="tcp://127.0.0.1:9", quiet=True)
    assert not (tmp_path / "other").exists()


def test_of_several_sweeps_one_that_is_refused_leaves_all_as_they_were(tmp_path, monkeypatch):
    from contextlib import nullcontext

    from moejax.sweep.execution.coordinator import PlannedSweep, run_sweeps
    from moejax.sweep.execution.executors import Workers
    from moejax.sweep.execution.location import worker_settings
    from moejax.sweep.plan.plan import join_plans

    sweeps = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _, folder, plan = made_up_store(tmp_path / name)
        sweeps.append(PlannedSweep(plan, folder))
    change(sweeps[1].folder, "UPDATE runs SET provenance = '{}'")
    before = [folder_digest(sweep.folder) for sweep in sweeps]
    plan = join_plans([sweep.plan for sweep in sweeps])
    with pytest.raises(StoreError, match="damaged"):
        run_sweeps(
            sweeps, plan, Workers(pytest.fail, "nobody"), worker_settings(), nullcontext(), pytest.fail
        )
    assert [folder_digest(sweep.folder) for sweep in sweeps] == before


DAMAGE = {
    "a number": "UPDATE trials SET recovery_error = recovery_error * 1.0000001 WHERE trial = 3",
    "a type": "UPDATE trials SET gating_error = 'x' WHERE trial = 3",
    "a number that is gone": "UPDATE trials SET gating_error = NULL WHERE trial = 3",
    "a status": "UPDATE trials SET status = 4 WHERE trial = 3",
    "a cell": "UPDATE trials SET cell = 77 WHERE trial = 3 AND cell = 1",
    "a reason": "UPDATE trials SET reason = CAST(x'ff' AS TEXT) WHERE trial = 5",
    "fields": """UPDATE cells SET fields = '{"dim": 3}' WHERE cell = 1""",
    "no JSON": "UPDATE cells SET fields = '{' WHERE cell = 1",
    "JSON nested without end": f"UPDATE cells SET fields = '{'[' * 5000}'",
    "provenance": "UPDATE runs SET provenance = '[]'",
    "a spec in it": """UPDATE runs SET provenance = replace(provenance, '\\"seed\\": 0', '\\"seed\\": 1')""",
    "an array": "UPDATE arrays SET content = zeroblob(168) WHERE trial = 3",
    "a time": "UPDATE chunks SET execute_seconds = 5 WHERE chunk = 2",
    "an attempt": "UPDATE timings SET attempts = 4 WHERE trial = 3",
    "the plan": "UPDATE plan SET first_trials = 13",
    "a table": "DROP TABLE timings",
    "a column": "ALTER TABLE chunks RENAME COLUMN host TO hosts",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_one_line_for_every_reader(tmp_path, name):
    _, folder, _ = made_up_store(tmp_path)
    for read in list(READERS.values())[:-1]:
        read(folder)
    change(folder, DAMAGE[name])
    before = (folder / STORE_NAME).read_bytes()
    for read in READERS.values():
        with pytest.raises(StoreError) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        assert "damaged" in str(caught.value)
        assert "--repair" in str(caught.value)
    assert (folder / STORE_NAME).read_bytes() == before


def test_the_line_says_what_is_lost(tmp_path):
    _, folder, _ = made_up_store(tmp_path)
    change(folder, DAMAGE["a number"], "UPDATE arrays SET content = x'00' WHERE trial < 2")
    with pytest.raises(StoreError, match=r"\(2 of 24 rows of trials; 4 of 20 rows of arrays\)"):
        read_status(folder)


def test_a_flipped_bit_of_any_number_is_found(tmp_path):
    _, folder, _ = made_up_store(tmp_path)
    path = folder / STORE_NAME
    content = path.read_bytes()
    values = load(folder)["recovery_error"].dropna().to_numpy()
    rng = np.random.default_rng(0)
    for value in values[::4]:
        place = content.index(np.array(value, ">f8").tobytes())  # SQLite's byte order
        flipped = bytearray(content)
        flipped[place + rng.integers(8)] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match="1 of 24 rows of trials"):
            load(folder)


def test_a_store_that_did_not_change_is_checked_once(tmp_path, monkeypatch):
    _, folder, _ = made_up_store(tmp_path)
    load(folder)
    monkeypatch.setattr(soundness, "_check_tables", lambda *_: pytest.fail("checked again"))
    load(folder)
    read_status(folder)


def test_repair_keeps_what_is_sound_and_the_rest_is_run_again(tmp_path, capsys):
    _, folder, plan = made_up_store(tmp_path)
    whole = load(folder)
    change(folder, DAMAGE["a number"], "UPDATE arrays SET content = x'00' WHERE trial = 8 AND cell = 2")
    old = (folder / STORE_NAME).read_bytes()
    line = repair_store(folder, lambda previous: None)
    assert "21 sound trials are kept, 3 damaged ones are not" in line
    assert (folder / "store.sqlite.damaged").read_bytes() == old
    kept = load(folder, all_specs=True)
    expected = whole[(whole["trial"] != 3) & ~((whole["trial"] == 8) & (whole["method"] == "joint_em"))]
    pd.testing.assert_frame_equal(kept, expected.reset_index(drop=True), check_exact=True)
    assert len(load_arrays(folder)) == 20 - 3
    with Store(folder) as store:  # the same sweep goes on
        store.begin_run(plan, collect_provenance(plan, (), "nobody"))
        assert [sorted(set(range(12)) - set(cell.values)) for cell in store.committed()] == [[3], [3, 8]]


def test_repair_of_a_file_with_a_hole(tmp_path):
    """The pages of some rows are gone: the rows of the others are all kept, and none is made up."""
    spec = (
        'name = "many"\nmethods = ["joint_em"]\ntrials = 120\ndim = 4\nnum_experts = 2\nnum_samples = 100\n'
    )
    _, folder, _ = made_up_store(tmp_path, spec)
    whole = load(folder)
    path = folder / STORE_NAME
    content = bytearray(path.read_bytes())
    place = content.index(np.array(whole["recovery_error"][60], ">f8").tobytes())
    page = place - place % 4096
    content[page : page + 4096] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        load(folder)
    repair_store(folder, lambda previous: None)
    kept = load(folder, all_specs=True)
    assert 40 < len(kept) < 120
    merged = kept.merge(whole, how="left", on=list(kept.columns), indicator=True)
    assert (merged["_merge"] == "both").all()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            b"digest INTEGER,\n    PRIMARY KEY (cell, trial)) WITHOUT",
            b"eigest INTEGER,\n    PRIMARY KEY (cell, trial)) WITHOUT",
        ),
        (b"reason TEXT,\n    digest", b"reason TEXT \n    digest"),
        (b"status INTEGER NOT NULL,\n    reason", b"stbtus INTEGER NOT NULL,\n    reason"),
    ],
    ids=["its digests have another name", "a comma is gone", "a column has another name"],
)
def test_repair_keeps_no_row_of_a_table_whose_description_is_damaged(tmp_path, before, after):
    """Without digests a row could not be told from a damaged one, and under another name it is another number."""
    _, folder, _ = made_up_store(tmp_path)
    path = folder / STORE_NAME
    content = path.read_bytes()
    assert content.count(before) in (1, 2)  # trials and timings end alike
    path.write_bytes(content.replace(before, after))
    with pytest.raises(StoreError, match="damaged"):
        load(folder)
    assert "0 sound trials are kept, 24 damaged ones are not" in repair_store(folder, lambda previous: None)
    assert load(folder, all_specs=True).empty


def test_repair_refuses_what_cannot_be_read(tmp_path):
    _, folder, _ = made_up_store(tmp_path)
    (folder / STORE_NAME).write_bytes(b"no database" * 1000)
    before = folder_digest(folder)
    with pytest.raises(StoreError) as caught:
        repair_store(folder, lambda previous: None)
    assert "\n" not in str(caught.value)
    assert folder_digest(folder) == before


def test_a_store_without_digests_opens_and_gets_them(tmp_path):
    _, folder, plan = made_up_store(tmp_path)
    whole, times = load(folder), load_timings(folder)
    make_old(folder)
    pd.testing.assert_frame_equal(load(folder), whole, check_exact=True)
    pd.testing.assert_frame_equal(load_timings(folder), times)
    with Store(folder) as store:
        store.begin_run(plan, collect_provenance(plan, (), "nobody"))
    pd.testing.assert_frame_equal(load(folder), whole, check_exact=True)
    change(folder, DAMAGE["a number"])
    with pytest.raises(StoreError, match="2 of 24 rows of trials"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["a type", "fields", "no JSON", "JSON nested without end", "provenance", "a reason", "a cell"]
)
def test_types_and_shapes_of_an_old_store_are_checked(tmp_path, name):
    _, folder, _ = made_up_store(tmp_path)
    make_old(folder)
    change(folder, DAMAGE[name])
    for read in (load, read_status, summarise, Store):
        with pytest.raises(StoreError, match="damaged"):
            read(folder)


def test_a_store_without_rows(tmp_path):
    _, folder, _ = made_up_store(tmp_path)
    change(folder, *(f"DELETE FROM {table}" for table in expected_columns()))
    for read in list(READERS.values())[:-1]:
        read(folder)  # nothing to show, and no fault
    (folder / STORE_NAME).write_bytes(b"")
    for read in (load, read_status, summarise):
        with pytest.raises(StoreError, match="nothing in this store yet"):
            read(folder)


def test_digests_do_not_depend_on_how_a_value_is_held():
    kinds = {"cell": "INTEGER", "x": "REAL", "t": "TEXT", "later": "REAL"}
    written = {"cell": [1, 2], "x": [-0.0, float("nan")], "t": ["é", None]}
    read = {"cell": (1, 2), "x": (0.0, None), "t": ("é".encode(), None), "later": (None, None)}
    assert row_digests(kinds, written, 2) == row_digests(kinds, read, 2)
    swapped = read | {"x": (None, 0.0)}
    assert not set(row_digests(kinds, swapped, 2)) & set(row_digests(kinds, read, 2))
    one_wrong_type = row_digests(kinds, read | {"cell": (1, 2.0)}, 2)
    assert [a == b for a, b in zip(one_wrong_type, row_digests(kinds, read, 2), strict=True)] == [True, False]


def test_names_and_reasons_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")
    _, folder, _ = made_up_store(tmp_path, SPEC.replace("made-up", "[bold]a[x] :smile:"))
    cli.main(["status", str(folder)])
    shown = capsys.readouterr().out
    assert "[bold]a[x] :smile:: complete" in shown
    assert "RuntimeError: [red]no[/x]" in shown
    change(folder, "DELETE FROM plan")
    cli.main(["status", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["planned"] == 0
