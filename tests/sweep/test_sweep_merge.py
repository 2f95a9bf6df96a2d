"""Several runs become one that every command takes; nothing contradictory is merged."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import stores
from stores import SPEC, made_up_store

import moejax
from moejax.cli import program
from moejax.sweep import commands, load, load_arrays, load_runs, load_timings
from moejax.sweep.store.schema import STORE_NAME

SIZES = SPEC.replace("num_samples = 100\n", "") + "[grid]\nnum_samples = [100, 200]\n"


def made(root, spec):
    root.mkdir()
    return made_up_store(root, spec)[1]


def test_parts_of_a_study_become_one_run(tmp_path, capsys):
    parts = [made(tmp_path / "a", SIZES), made(tmp_path / "b", SIZES.replace("100, 200", "300, 400"))]
    before = [(part / STORE_NAME).read_bytes() for part in parts]
    result = commands.merge(parts, out=tmp_path / "both")
    assert "96 trials of 8 cells from 2 runs" in capsys.readouterr().out
    assert (result["trials"], result["duplicates"]) == (96, 0)
    merged = load(tmp_path / "both")
    pd.testing.assert_frame_equal(merged, pd.concat([load(part) for part in parts], ignore_index=True))
    arrays = load_arrays(tmp_path / "both")
    for part in parts:
        for key, array in load_arrays(part).items():
            np.testing.assert_array_equal(arrays[key], array)
    assert len(load_timings(tmp_path / "both")) == 96
    runs = load_runs(tmp_path / "both")
    assert [run["trials"] for run in runs] == [48, 48, 0]
    assert runs[-1]["merged_from"] == [str(part) for part in parts]
    state = commands.status(tmp_path / "both")
    assert (state["done"], state["left"], state["planned"]) == (96, 0, 96)
    commands.report(tmp_path / "both")
    assert "300, 400" in (tmp_path / "both" / "report.html").read_text()
    assert commands.export(tmp_path / "both", tmp_path / "table.csv") == 96
    assert [(part / STORE_NAME).read_bytes() for part in parts] == before


def test_a_merge_of_the_whole_and_a_part_is_the_whole(tmp_path):
    whole = made(tmp_path / "whole", SIZES)
    part = made(tmp_path / "part", SIZES.replace("trials = 12", "trials = 6"))
    for number, folders in enumerate(([whole, part], [part, whole])):
        out = tmp_path / f"out{number}"
        assert commands.merge(folders, out=out, quiet=True)["duplicates"] == 24
        pd.testing.assert_frame_equal(load(out), load(whole))
    again = commands.merge([tmp_path / "out0", part], out=tmp_path / "again", quiet=True)
    assert (again["trials"], again["duplicates"]) == (48, 24)


def test_different_numbers_of_a_trial_are_refused(tmp_path, monkeypatch):
    first = made(tmp_path / "first", SPEC)
    original = stores.numbers
    monkeypatch.setattr(stores, "numbers", lambda seed: original(seed + 1))
    second = made(tmp_path / "second", SPEC)
    with pytest.raises(OSError, match=r"trial 0 of a cell has \w+ = .*the same trial has different numbers"):
        commands.merge([first, second], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    commands.merge([first, second], out=tmp_path / "out", keep_first=True, quiet=True)
    pd.testing.assert_frame_equal(load(tmp_path / "out"), load(first))


def test_a_result_wins_over_a_failed_trial(tmp_path, monkeypatch):
    first = made(tmp_path / "first", SPEC)  # the last trial of each chunk failed
    original = stores.numbers

    def whole(seed):
        result = original(seed)
        metrics = {name: np.where(np.isnan(v), 0.5, v) for name, v in result.metrics.items()}
        return dataclasses.replace(result, metrics=metrics, status=np.zeros(6, int), reasons={})

    monkeypatch.setattr(stores, "numbers", whole)
    second = made(tmp_path / "second", SPEC)
    for number, folders in enumerate(([first, second], [second, first])):
        out = tmp_path / f"out{number}"
        result = commands.merge(folders, out=out, quiet=True)
        assert (result["replaced"], result["duplicates"]) == (4, 20)
        pd.testing.assert_frame_equal(load(out), load(second))
        assert len(load_arrays(out)) == len(load_timings(out)) == 24


def test_contradictory_runs_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    first = made(tmp_path / "first", SPEC)
    seeded = made(tmp_path / "seeded", SPEC + "seed = 1\n")
    precise = SPEC.replace("trials = 12", "") + (
        '[precision]\ntarget = {metric = "recovery_error", mcse = 10.0}\nmin_trials = 12\nmax_trials = 24\n'
    )
    monkeypatch.setattr(moejax, "__version__", "0.0.1")
    older = made(tmp_path / "older", SPEC.replace("100", "101"))
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    precise = made(tmp_path / "precise", precise)
    out = tmp_path / "out"
    for arguments, words in (
        ([first], "expected at least two run folders"),
        ([first, first.parent / "." / "run"], "given twice"),
        ([first, tmp_path / "empty"], "there is no such store"),
        ([first, seeded], "seed: "),
        ([first, precise], "precision: "),
        ([first, older], "moejax 0.0.1, and"),
        ([first, older, "--out", seeded], "holds a run already"),
    ):
        given = ["merge", "--out", str(out), *map(str, arguments)]
        with pytest.raises(SystemExit) as caught:
            program.main(given)
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (2, 1), error
        assert words in error
        assert not out.exists()
    program.main(["merge", str(first), str(older), "--out", str(out), "--across-versions", "--json"])
    assert json.loads(capsys.readouterr().out)["trials"] == 48
