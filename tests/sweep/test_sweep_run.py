"""Running sweeps: equal rows however they are run, failures isolated, kills survived. With the fake core."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from test_sweep_fake_core import NAMES, command, environment, run, write_inputs

import moejax
from moejax.checks import NoResultError
from moejax.registry import Registry
from moejax.sweep import commands, load, load_arrays, load_runs, load_timings, read_spec
from moejax.sweep import trial as core
from moejax.sweep.execution import provenance
from moejax.sweep.execution import worker as chunk
from moejax.sweep.execution.location import worker_settings
from moejax.sweep.execution.work_queue import GIVE_UP_AFTER
from moejax.sweep.plan.chunks import NOT_PREPARED, RAISED, WORKER_DIED, ChunkCell, ChunkTask
from moejax.sweep.plan.plan import make_plan
from moejax.sweep.plan.plugins import module_name, read_plugin, use_plugins
from moejax.sweep.report.status import read_status
from moejax.sweep.report.summary import summarise
from moejax.sweep.store import schema
from moejax.sweep.store.schema import StoreError


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Inputs of a sweep with the fake core in this process; the real core comes back afterwards."""
    # figures take seconds, and have tests of their own
    monkeypatch.setattr("moejax.sweep.report.figures.write_figures", lambda figures, folder: [])
    # on a busy machine these programs, too, take long enough for the cache, where a later run would find them
    shortest = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3600.0)
    real = {name: getattr(core, name) for name in NAMES}
    toml, plugin = write_inputs(tmp_path)
    module = module_name(read_plugin(plugin))
    yield toml, plugin
    for name, value in real.items():
        setattr(core, name, value)
    sys.modules.pop(module, None)
    chunk._prepared.cache_clear()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def sweep(fake, out: Path, *overrides: str, **options) -> dict:
    toml, plugin = fake
    options = {"workers": 1, "quiet": True, **options}
    return commands.sweep(toml, plugin=[plugin], out=out, set=list(overrides), **options)


def canonical(table: pd.DataFrame) -> pd.DataFrame:
    """Rows sorted by what they are, for tables of specs in another order."""
    names = ["method", "activation", "num_samples", "noise_std", "trial"]
    return table.sort_values(names, ignore_index=True)


def test_a_sweep_makes_every_row_and_a_second_run_reuses_them(fake, tmp_path, capsys):
    out = tmp_path / "run"
    first = sweep(fake, out, quiet=False)
    table = load(out)
    assert len(table) == first["trials_run"] == 2 * 3 * 2 * 30
    assert list(table.columns[:3]) == ["activation", "dim", "num_experts"]
    assert list(table.columns[-2:]) == ["status", "reason"]
    assert set(core.METRICS) <= set(table.columns)
    assert not table.duplicated(["method", "noise_std", "num_samples", "trial"]).any()
    bad = table[table["status"] == 1]
    assert (bad["reason"] == "non-finite").all()
    assert bad["recovery_error"].isna().all()
    assert (out / "summary.csv").stat().st_size > 1000
    assert "median error ± MCSE" in capsys.readouterr().out
    times = load_timings(out)

    second = sweep(fake, out, quiet=False)
    assert (second["trials_run"], second["trials_reused"], second["compilations"]) == (0, 360, 0)
    assert "nothing to run: all 360 trials" in capsys.readouterr().out
    pd.testing.assert_frame_equal(load(out), table, check_exact=True)
    pd.testing.assert_frame_equal(load_timings(out), times)
    run_record = load_runs(out)[0]
    assert run_record["precision"] in ("float32", "float64")
    assert {"moejax", "jax", "python"} <= set(run_record["versions"])
    assert run_record["trials"] == 360
    assert run_record["wall_seconds"] > 0


def test_methods_share_data(fake, tmp_path):
    sweep(fake, tmp_path / "run")
    table = load(tmp_path / "run")
    wide = table.pivot_table(
        index=["noise_std", "num_samples", "trial"], columns="method", values="recovery_error"
    ).dropna()
    np.testing.assert_allclose(wide["joint_em"], 0.2 * wide["spectral"], rtol=1e-5)


def test_rows_do_not_depend_on_order_nor_on_the_rest_of_the_spec(fake, tmp_path):
    sweep(fake, tmp_path / "a")
    sweep(
        fake,
        tmp_path / "b",
        "methods=joint_em,spectral",
        "num_samples=[100, 512, 60, 40]",
        "noise_std=[0.5, 0.1, 0.3]",
        "trials=40",
    )
    small, large = load(tmp_path / "a"), load(tmp_path / "b")
    kept = large["noise_std"].isin([0.1, 0.5]) & (large["num_samples"] != 512) & (large["trial"] < 30)
    pd.testing.assert_frame_equal(canonical(large[kept]), canonical(small), check_exact=True)


@pytest.mark.slow
def test_a_larger_spec_adds_to_the_same_folder(fake, tmp_path):
    sweep(fake, tmp_path / "run", "noise_std=0.1")
    more = sweep(fake, tmp_path / "run", "trials=35")
    assert (more["trials_reused"], more["trials_run"]) == (180, 6 * 70 - 180)
    sweep(fake, tmp_path / "run", "noise_std=0.5")
    table = load(tmp_path / "run")
    assert len(table) == 6 * 30  # a smaller spec's table has none of the larger one's trials
    assert (table["trial"] < 30).all()
    assert len(load(tmp_path / "run", all_specs=True)) == 6 * 70
    status = read_status(tmp_path / "run")
    assert (status.done, status.planned) == (180, 180)


def test_another_seed_is_another_result(fake, tmp_path):
    sweep(fake, tmp_path / "run", "noise_std=0.1")
    again = sweep(fake, tmp_path / "run", "noise_std=0.1", "seed=1")
    assert again["trials_reused"] == 0
    rows = load(tmp_path / "run", all_specs=True)
    assert rows["recovery_error"].nunique() == len(rows.dropna(subset="recovery_error"))


def test_equal_cells_run_once(fake, tmp_path):
    toml, plugin = fake
    doubled = toml.read_text() + "[[zip]]\nactivation = ['linear', 'linear']\n"
    toml.write_text(doubled)
    sweep((toml, plugin), tmp_path / "run")
    assert len(load(tmp_path / "run")) == 360


def test_what_the_persistent_cache_holds_is_not_a_compilation():
    constant = int.from_bytes(os.urandom(4)) / 2**32  # a program that no earlier run has left in the cache

    def program(x):
        return jax.numpy.sin(x) + constant

    shortest = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        counts = []
        for _ in range(2):
            before, _ = chunk.compilations_so_far()
            jax.jit(program)(np.ones(3))
            counts.append(chunk.compilations_so_far()[0] - before)
            jax.clear_caches()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    assert counts == [1, 0]


def test_compilations_are_counted_and_few(fake, tmp_path):
    """4 noise levels x 5 sample sizes in one bucket x 100 seeds: one compilation for each method."""
    bucket = ("dim=5", "noise_std=[0.1, 0.2, 0.3, 0.4]", "num_samples=[33, 40, 50, 60, 64]")
    counts = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: counts.append(event) if event == chunk.COMPILE_EVENT else None
    )
    result = sweep(fake, tmp_path / "run", *bucket, "trials=100")
    assert result["trials_run"] == 4 * 5 * 100 * 2
    assert result["compilations"] == 2
    assert len(counts) == 2
    resumed = sweep(fake, tmp_path / "run", *bucket, "trials=101")
    assert resumed["trials_run"] == 4 * 5 * 2
    assert result["padded_trials"] < 0.05 * result["trials_run"]


def test_dry_run_writes_nothing(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = sweep(fake, tmp_path / "run", dry_run=True, pilot=True, quiet=False)
    assert sorted(tmp_path.iterdir()) == before
    assert result["cells"] == 12
    assert len(result["programs"]) == 4
    assert result["estimated_seconds"] > 0
    assert "12 cells, 360 trials, 4 compiled programs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_experts=9", "--set: num_experts: 9 is more than dim; expected at most 4"),
        ("methods=spectrl", "methods: unknown method 'spectrl'; expected spectral or joint_em"),
        ("activation=reul", "--set: activation: unknown activation 'reul'; did you mean"),
    ],
)
def test_an_impossible_cell_is_one_line_and_changes_nothing(fake, tmp_path, override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        sweep(fake, tmp_path / "run", override)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_impossible_cell_in_a_grid_is_named(fake):
    toml, _ = fake
    text = toml.read_text().replace("num_experts = 2", "").replace("[grid]", "[grid]\nnum_experts = [2, 5]")
    toml.write_text(text)
    with pytest.raises(ValueError, match=r"spec\.toml:8: \[grid\] num_experts: 5 is more than dim") as caught:
        plan_of(fake)
    assert "in the cell noise_std = 0.1, num_samples = 40, method = " in str(caught.value)


@pytest.mark.parametrize(("activation", "status"), [("raises", RAISED), ("refuses", NOT_PREPARED)])
def test_bad_trials_are_rows_with_a_reason_and_cost_no_other(fake, tmp_path, activation, status):
    sweep(fake, tmp_path / "run", f"activation={activation}")
    table = load(tmp_path / "run")
    assert len(table) == 360
    failed = table[table["status"] == status]
    if activation == "raises":
        keys = {
            (cell.data.noise_std, cell.data.num_samples, trial)
            for cell in plan_of(fake, "activation=raises").cells
            for trial in range(30)
            if chunk.trial_key(0, cell.data_hash, trial)[0] % 40 == 7
        }
        assert {(row.noise_std, row.num_samples, row.trial) for row in failed.itertuples()} == keys
        assert (failed["reason"] == "RuntimeError: a bad trial").all()
        assert load_timings(tmp_path / "run")["attempts"].max() > 3
    else:
        assert (failed["noise_std"] == 0.5).all()
        assert len(failed) == 180
        assert failed["reason"].str.contains("no usable order").all()
    assert failed["recovery_error"].isna().all()
    again = sweep(fake, tmp_path / "run", f"activation={activation}", retry_failed=True)
    assert again["trials_run"] == len(failed)


def plan_of(fake, *overrides: str):
    plugin = read_plugin(fake[1])
    use_plugins([plugin])
    return make_plan(read_spec(fake[0], overrides), [plugin])


def test_a_program_that_never_works_is_given_up_soon(fake, tmp_path, capsys):
    """What was not tried is no row; the command fails, and goes on once the cause is mended."""
    toml, plugin = fake
    options = {"plugin": [plugin], "out": tmp_path / "run", "workers": 1, "set": ["trials=2000"]}
    with pytest.raises(NoResultError, match=r"no trial has a result: .*nothing works; .*--retry-failed"):
        commands.sweep(toml, **(options | {"set": ["trials=2000", "activation=always_raises"]}))
    said = capsys.readouterr()
    programs = said.err.count("given up, ")
    assert programs >= 1
    table = load(tmp_path / "run")
    assert len(table) == GIVE_UP_AFTER * programs
    assert (table["status"] == RAISED).all()
    not_tried = 2 * 3 * 2 * 2000 - len(table)
    assert f"{not_tried:,} trials not tried, because their programs never worked" in said.out
    assert read_status(tmp_path / "run").left == not_tried


def test_a_chunk_too_large_for_the_memory_runs_narrower(fake, tmp_path, capsys):
    done = sweep(fake, tmp_path / "run", "activation=large", quiet=False, vmap_width=16)
    assert "RESOURCE_EXHAUSTED" not in str(done["failures"])
    said = capsys.readouterr().err
    for width in (16, 8, 4):
        assert f"memory ran out with {width} trials side by side; on with {width // 2}" in said
    sweep(fake, tmp_path / "plain", "activation=large", vmap_width=1)
    pd.testing.assert_frame_equal(
        load(tmp_path / "run"), load(tmp_path / "plain"), check_exact=False, rtol=1e-6
    )


def test_an_interrupt_that_gets_lost_is_raised_again():
    """JAX's hook into garbage collection prints and forgets what is raised while it runs."""
    from moejax.sweep.execution.signals import raise_if_stopped, stopped_by_signals

    with stopped_by_signals():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_if_stopped()
        raise_if_stopped()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_trials_that_failed_before_are_counted(fake, tmp_path, capsys):
    """The same command again says what failed, and fails too where nothing has a result."""
    toml, plugin = fake
    few = {"plugin": [plugin], "out": tmp_path / "run", "workers": 1}
    failing = few | {
        "set": ["activation=always_raises", "trials=1", "noise_std=0.1", "num_samples=60", "methods=spectral"]
    }
    for _ in range(2):
        with pytest.raises(NoResultError):
            commands.sweep(toml, **failing)
    assert "all 1 trials are in" in (said := capsys.readouterr().out)
    assert "already (1 failed: --retry-failed runs them again)" in said
    with pytest.raises(NoResultError):
        commands.sweep(toml, **failing, retry_failed=True)
    sweep(fake, tmp_path / "run", "activation=refuses", "trials=5")
    sweep(fake, tmp_path / "run", "activation=refuses", "trials=5", quiet=False)
    assert "(30 failed: --retry-failed" in capsys.readouterr().out


def test_history_is_kept_where_asked_for(fake, tmp_path):
    sweep(fake, tmp_path / "run", 'record=["history"]', "trials=3")
    histories = load_arrays(tmp_path / "run")
    assert len(histories) == 36
    assert all(history.shape == (2,) for history in histories.values())
    assert load_arrays(tmp_path / "run", "path") == {}  # not recorded
    with pytest.raises(ValueError, match="name: expected 'history' or 'path', got 'histories'"):
        load_arrays(tmp_path / "run", "histories")


METRIC_PLUGIN = """
import jax.numpy as jnp
import moejax
from moejax.model.metrics import align

def worst_angle(recovery, fn):
    fitted = align(recovery.truth, recovery.fitted)
    cosines = jnp.sum(fitted.experts * recovery.truth.experts, axis=1)
    cosines = cosines / jnp.linalg.norm(fitted.experts, axis=1) / jnp.linalg.norm(recovery.truth.experts, axis=1)
    return jnp.rad2deg(jnp.arccos(cosines.min()))

moejax.register_metric("worst_angle", worst_angle)
"""


@pytest.mark.slow
def test_a_plugins_metric_is_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr("moejax.sweep.report.figures.write_figures", lambda figures, folder: [])
    toml, plugin = tmp_path / "spec.toml", tmp_path / "plugin.py"
    toml.write_text(
        'name = "m"\nmethods = ["spectral"]\ntrials = 5\ndim = 4\nnum_experts = 2\nnum_samples = 500\n'
    )
    plugin.write_text(METRIC_PLUGIN)
    commands.sweep(toml, plugin=[plugin], out=tmp_path / "run", workers=1, quiet=True)
    monkeypatch.setattr(
        "moejax.model.metrics._REGISTRY", Registry("metric")
    )  # a reader need not have the plugin
    table = load(tmp_path / "run")
    assert list(table.columns[-3:]) == ["worst_angle", "status", "reason"]
    cosines = np.cos(np.deg2rad(table["worst_angle"]))
    np.testing.assert_allclose(1.0 - cosines, table["recovery_error"], rtol=1e-3)
    assert set(summarise(tmp_path / "run")["metric"]) == {*core.METRICS, "worst_angle"}


def test_a_metric_may_not_take_the_name_of_another_column(fake, tmp_path, monkeypatch):
    moejax.register_metric("noise_std", lambda recovery, fn: recovery.held_out_y.mean())
    with pytest.raises(
        ValueError, match=r"metric: expected a name that no other column has, got 'noise_std'"
    ):
        sweep(fake, tmp_path / "run")
    with pytest.raises(ValueError, match="metric: expected an identifier"):
        moejax.register_metric("two words", lambda recovery, fn: recovery.held_out_y.mean())


def test_status_counts_what_is_done_failed_and_left(fake, tmp_path, capsys):
    with pytest.raises(NoResultError, match="30 x activation: refuses has no usable order"):
        sweep(fake, tmp_path / "run", "activation=refuses", "noise_std=0.5", "trials=5")
    state = read_status(tmp_path / "run")
    assert (state.done, state.failed, state.left, state.running) == (30, 30, 0, False)
    assert state.failures == [("activation: refuses has no usable order at noise_std = 0.5", 30)]
    commands.status(tmp_path / "run")
    assert "complete; 30 of 30 trials done, 30 of them failed, 0 left" in capsys.readouterr().out


def test_export(fake, tmp_path, capsys):
    sweep(fake, tmp_path / "run", "expert_norms=[1.0, [1.0, 2.0]]", "num_samples=40")
    table = load(tmp_path / "run")
    commands.export(tmp_path / "run", tmp_path / "t.csv")
    commands.export(tmp_path / "run", tmp_path / "t.parquet", quiet=True)
    assert "120 rows" not in capsys.readouterr().err
    csv, parquet = pd.read_csv(tmp_path / "t.csv"), pd.read_parquet(tmp_path / "t.parquet")
    for read in (csv, parquet):
        assert list(read.columns) == list(table.columns)
        np.testing.assert_array_equal(read["recovery_error"], table["recovery_error"])
        assert set(read["expert_norms"]) == {"1.0", "[1.0, 2.0]"}
    with pytest.raises(ValueError, match=r"expected a name that ends in \.csv, \.csv\.gz or \.parquet"):
        commands.export(tmp_path / "run", tmp_path / "t.xlsx")


@pytest.mark.slow
def test_precision_stops_cells_at_fixed_looks(fake, tmp_path):
    toml, plugin = fake
    text = toml.read_text().replace("trials = 30", "")
    text += (
        '[precision]\ntarget = {metric = "recovery_error", mcse = 0.03}\nmin_trials = 20\nmax_trials = 100\n'
    )
    toml.write_text(text)
    result = sweep((toml, plugin), tmp_path / "run")
    table = load(tmp_path / "run")
    summary = pd.read_csv(tmp_path / "run" / "summary.csv").query("metric == 'recovery_error'")
    assert set(summary["trials"]) <= {20, 40, 80, 100}
    assert summary["trials"].nunique() > 1
    for row in summary.itertuples():
        values = table.query(
            f"method == '{row.method}' and noise_std == {row.noise_std} and num_samples == {row.num_samples}"
        )["recovery_error"].to_numpy()
        good = values[np.isfinite(values)]
        assert row.mean_mcse == pytest.approx(good.std(ddof=1) / np.sqrt(good.size))
        assert row.ended == ("precision reached" if row.mean_mcse <= 0.03 else "max_trials reached")
        for look in (20, 40, 80):
            if look < row.trials:
                early = values[:look][np.isfinite(values[:look])]
                assert early.std(ddof=1) / np.sqrt(early.size) > 0.03
    again = sweep((toml, plugin), tmp_path / "run")
    assert (again["trials_run"], again["trials_reused"]) == (0, result["trials_run"])
    assert read_status(tmp_path / "run").left == 0


def test_a_full_disk_loses_nothing(fake, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    sweep(fake, whole, "trials=300")
    opened = schema._open

    def open_on_a_small_disk(path: Path) -> sqlite3.Connection:
        connection = opened(path)
        connection.execute("PRAGMA max_page_count=40")
        return connection

    monkeypatch.setattr(schema, "_open", open_on_a_small_disk)
    monkeypatch.setattr("moejax.sweep.store.store.COMMIT_SECONDS", 0.0)
    with pytest.raises(StoreError, match="disk is full") as caught:
        sweep(fake, tmp_path / "run", "trials=300")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    kept = load(tmp_path / "run")
    assert 0 < len(kept) < 3600
    again = sweep(fake, tmp_path / "run", "trials=300")
    assert again["trials_reused"] == len(kept)
    pd.testing.assert_frame_equal(load(tmp_path / "run"), load(whole), check_exact=True)


def test_versions_and_precisions_are_not_mixed(fake, tmp_path, monkeypatch):
    sweep(fake, tmp_path / "run")
    now = provenance.made_by()
    assert set(now) == {"moejax", "source", "jax", "jaxlib", "prng"}
    for name, what in {
        "moejax": "moejax",
        "source": "whose source has the digest",
        "jaxlib": "jaxlib",
        "prng": "random",
    }.items():
        monkeypatch.setattr(provenance, "made_by", lambda name=name: now | {name: "99.0"})
        with pytest.raises(StoreError, match=rf"{what}.* and this is 99\.0; .*--out, or --across-versions"):
            sweep(fake, tmp_path / "run")
    before = (tmp_path / "run" / "store.sqlite").read_bytes()
    sweep(fake, tmp_path / "run", across_versions=True)
    monkeypatch.undo()
    assert (tmp_path / "run" / "store.sqlite").read_bytes() != before
    monkeypatch.setattr("moejax.sweep.execution.provenance.float_precision", lambda: "float16")
    with pytest.raises(
        StoreError, match=r"this run is float16; use --precision float\d\d, or another folder"
    ):
        sweep(fake, tmp_path / "run")


def test_a_padded_chunk_gives_the_rows_of_a_whole_one(fake):
    plan = plan_of(fake)
    cell = plan.cells[0]
    settings = worker_settings(plan.plugins)

    def run_some(trials: tuple[int, ...]) -> np.ndarray:
        sent = ChunkCell(cell.data, cell.algorithm, cell.data_hash)
        task = ChunkTask((sent,), (0,) * len(trials), trials, 0, 1024, 8, 1, settings)
        return chunk.run_chunk(task).metrics["recovery_error"]

    whole = run_some(tuple(range(8)))
    np.testing.assert_array_equal(run_some((5, 2)), whole[[5, 2]])


@pytest.mark.skipif(sys.platform != "linux", reason="memory maps are limited on Linux")
def test_programs_are_dropped_where_memory_maps_run_out():
    import jax

    program = jax.jit(lambda x: x + 1)
    program(np.ones(3))
    chunk.make_room_for_programs(share=1.0)
    assert program._cache_size() == 1
    chunk.make_room_for_programs(share=0.0)
    assert program._cache_size() == 0
    np.testing.assert_array_equal(program(np.ones(3)), 2.0)


MANY = ["trials=167"]  # 12 cells: 2,004 trials


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory):
    """The run folder of a sweep by one worker that nothing disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    toml, plugin = write_inputs(folder)
    done = run(command(toml, plugin, folder / "run", workers=1, set=MANY))
    assert done.returncode == 0, done.stderr
    assert "on 1 worker" in done.stdout
    return folder / "run"


@pytest.mark.slow
def test_one_worker_and_two_give_equal_rows(fake, tmp_path, quiet_run):
    toml, plugin = fake
    done = run(command(toml, plugin, tmp_path / "run", workers=2, set=MANY))
    assert done.returncode == 0, done.stderr
    assert "on 2 workers" in done.stdout
    use_plugins([read_plugin(plugin)])
    pd.testing.assert_frame_equal(load(quiet_run), load(tmp_path / "run"), check_exact=True)
    assert load_timings(tmp_path / "run")["process"].nunique() == 2


@pytest.mark.slow
def test_killed_workers_are_replaced_and_the_bad_trial_is_isolated(fake, tmp_path):
    toml, plugin = fake
    small = ["methods=spectral", "noise_std=0.1", "num_samples=[40, 100]", "activation=kills", "trials=4"]
    for seed in range(100):
        cells = plan_of(fake, *small, f"seed={seed}").cells
        bad = [
            (cell.data.num_samples, trial)
            for cell in cells
            for trial in range(4)
            if chunk.trial_key(seed, cell.data_hash, trial)[0] % 40 == 7
        ]
        if len(bad) == 1:
            break
    done = run(command(toml, plugin, tmp_path / "run", workers=2, set=[*small, f"seed={seed}"]))
    assert done.returncode == 0, done.stderr
    assert "died; its chunk is run again in parts" in done.stderr
    table = load(tmp_path / "run")
    assert len(table) == 8
    died = table[table["status"] == WORKER_DIED]
    assert list(zip(died["num_samples"], died["trial"], strict=True)) == bad
    assert (died["reason"] == "the worker died while it ran the trial").all()


def started(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def committed(out: Path) -> pd.DataFrame:
    """Committed (result_hash, trial, chunk), read while a sweep may be writing; empty without a store."""
    path = out / schema.STORE_NAME
    if not path.exists():
        return pd.DataFrame(columns=["result_hash", "trial", "chunk"])
    connection = sqlite3.connect(path)
    try:
        return pd.read_sql_query(
            "SELECT result_hash, trial, chunk FROM timings JOIN cells USING (cell)", connection
        )
    except pd.errors.DatabaseError:
        return pd.DataFrame(columns=["result_hash", "trial", "chunk"])
    finally:
        connection.close()


def wait_for_rows(out: Path, more_than: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(committed(out)) <= more_than and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_ends_with_a_line_that_says_how_to_resume(fake, tmp_path):
    toml, plugin = fake
    arguments = command(toml, plugin, tmp_path / "run", workers=2, quiet=True, set=["trials=400"])
    # a shell starts background jobs with interrupts ignored, and so would be the sweep if these tests are one
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = started(arguments, FAKE_CORE_SLEEP="1.0")  # slow enough not to end first
    signal.signal(signal.SIGINT, inherited)
    wait_for_rows(tmp_path / "run", 0, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1, errors
    kept = len(committed(tmp_path / "run"))
    assert lines[0].startswith(f"stopped: {kept:,} trials are kept in {tmp_path / 'run'}; to resume: ")
    assert 0 < kept < 4800


def kill_and_resume(fake, tmp_path: Path, quiet_run: Path, kills: int, workers: int) -> None:
    """Kill -9 the coordinator at random moments; the table equals, byte for byte, that of a quiet run."""
    toml, plugin = fake
    out = tmp_path / "run"
    arguments = command(toml, plugin, out, workers=workers, set=MANY)
    moments = random.Random(20)
    before = committed(out)
    for _ in range(kills):
        process = started(
            arguments, FAKE_CORE_SLEEP=str(max(0.1, 0.025 * kills))
        )  # else the sweep ends first
        if moments.random() < 0.7:
            wait_for_rows(out, len(before), process)  # else the kill may come while it starts
        time.sleep(moments.uniform(0.0, 0.7))
        process.kill()
        process.communicate(timeout=60)
        after = committed(out)
        kept = before.merge(after, on=["result_hash", "trial"], suffixes=("", "_after"))
        assert len(kept) == len(before)
        assert (kept["chunk"] == kept["chunk_after"]).all()  # no committed row was computed again
        before = after
    assert len(before) < 2004
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    use_plugins([read_plugin(plugin)])
    tables = tmp_path / "table.csv", tmp_path / "quiet-table.csv"
    for folder, table in zip((out, quiet_run), tables, strict=True):
        commands.export(folder, table, quiet=True)
    assert tables[0].read_bytes() == tables[1].read_bytes()


@pytest.mark.slow
def test_killed_coordinators_resume(fake, tmp_path, quiet_run):
    # the suite has minutes, so a few; MOEJAX_KILLS=30 for the whole trial
    kill_and_resume(fake, tmp_path, quiet_run, kills=int(os.environ.get("MOEJAX_KILLS", "4")), workers=1)


@pytest.mark.slow
def test_kills_with_worker_processes(fake, tmp_path, quiet_run):
    kill_and_resume(fake, tmp_path, quiet_run, kills=2, workers=2)
