"""The commands of a sweep, as the command line calls them.

Each prints for a person (tables on stdout, progress on stderr) and returns what it printed as plain data,
which `as_json` prints instead. User errors are ValueError or OSError with one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.checks import NoResultError
from moejax.console import make_console, make_notes, print_json
from moejax.sweep.execution.location import ACCELERATOR_VMAP_WIDTH, Place, worker_settings
from moejax.sweep.execution.signals import exit_status, stopped_by_signals
from moejax.sweep.execution.worker import configure
from moejax.sweep.plan.chunks import WorkerSettings
from moejax.sweep.plan.plan import Plan, make_plan
from moejax.sweep.plan.plugins import run_plugins
from moejax.sweep.spec.parse import read_spec

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from moejax.sweep.report.figures import NamedFigure

RUNS_FOLDER = "runs"


def sweep(
    spec: Path,
    *,
    out: Path | None = None,
    dry_run: bool = False,
    pilot: bool = False,
    workers: int | None = None,
    set: Sequence[str] = (),
    plugin: Sequence[Path] = (),
    cluster: str | None = None,
    security: Path | None = None,
    worker_timeout: float | None = None,
    vmap_width: int | None = None,
    retry_failed: bool = False,
    repair: bool = False,
    across_versions: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run a sweep, or go on with it: trials that are in the store are not run again.

    Args:
        spec: the TOML file.
        out: the run folder; default runs/<name of the spec>.
        dry_run: print cells, compilations and memory; run and write nothing.
        pilot: with dry_run, time one chunk of every program and estimate the whole.
        workers: processes on this machine; 1: this process. Default: one per core, or one per GPU.
        set: KEY=VALUE overrides of the spec.
        plugin: Python files that register activations, methods, input distributions or metrics; besides the spec's own.
        cluster: tls://HOST:PORT or tcp://HOST:PORT of a Dask scheduler, or slurm:FILE.toml.
        security: TOML file that names the certificates for the cluster; see `moejax.sweep.execution.security`.
        worker_timeout: seconds without any worker after which the sweep ends; default: 120 for workers of this machine, and
            no end for a cluster.
        vmap_width: trials that run side by side in one program; default 1 on CPUs.
        retry_failed: run trials again that raised, or whose worker died.
        repair: first replace a damaged store by what is sound in it; the damaged file stays beside it.
        across_versions: go on although the folder holds results of another version or source of moejax, or of another JAX.
        quiet: no progress and no tables.
        as_json: print the result as JSON.

    Raises:
        ValueError: the spec or an option; OSError: the folder, the store or the cluster. NoResultError: every trial failed.
            SystemExit: after Ctrl-C, SIGTERM or SIGHUP.
    """
    report_to = make_notes()
    tables = make_console(quiet=quiet or as_json)
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected a number of at least 1")
    if worker_timeout is not None and not worker_timeout > 0:
        raise ValueError(f"--worker-timeout {worker_timeout}: expected a number of seconds above 0")
    if vmap_width is not None and vmap_width < 1:
        raise ValueError(f"--vmap-width {vmap_width}: expected a number of at least 1")
    if pilot and not dry_run:
        raise ValueError("--pilot: goes with --dry-run")
    with stopped_by_signals():
        checked = read_spec(spec, set)
        place = Place(workers, cluster, dry_run, security, worker_timeout)
        place.prepare()
        plan = make_plan(
            checked,
            run_plugins((*checked.plugins, *plugin)),
            vmap_width=vmap_width or (ACCELERATOR_VMAP_WIDTH if place.accelerated else 1),
            worker_memory_bytes=place.memory_bytes,
        )
        settings = worker_settings(plan)
        if dry_run:
            return _dry_run(plan, settings, place, pilot, tables, as_json)
        folder = Path(out) if out is not None else Path(RUNS_FOLDER) / checked.name
        return _run(
            plan,
            settings,
            place,
            folder,
            spec,
            set,
            retry_failed,
            repair,
            across_versions,
            report_to,
            tables,
            quiet,
            as_json,
        )


def _run(
    plan: Plan,
    settings: WorkerSettings,
    place: Place,
    folder: Path,
    spec: Path,
    overrides: Sequence[str],
    retry_failed: bool,
    repair: bool,
    across_versions: bool,
    report_to: Console,
    tables: Console,
    quiet: bool,
    as_json: bool,
) -> dict[str, Any]:
    from moejax.console import duration
    from moejax.sweep.execution.engine import Engine
    from moejax.sweep.execution.provenance import check_resumable, collect_provenance
    from moejax.sweep.execution.work_queue import summarise_failures
    from moejax.sweep.report.pictures import own_style
    from moejax.sweep.report.progress import sweep_progress
    from moejax.sweep.report.summary import summarise
    from moejax.sweep.store.repair import repair_store
    from moejax.sweep.store.store import Store

    provenance = collect_provenance(plan, spec, overrides, place.description)

    def check(previous: Sequence[dict[str, Any]]) -> None:
        check_resumable(previous, across_versions, folder)

    def note(line: str) -> None:
        report_to.print(line, soft_wrap=True)

    if repair:
        report_to.print(repair_store(folder, check), soft_wrap=True)
    with contextlib.ExitStack() as held:
        checked = held.enter_context(
            contextlib.closing(Store(folder, check, note))
        )  # before workers are asked for
        chunks = sum(plan.chunks_of(bucket) for bucket in plan.buckets)
        start = place.executor_factory(chunks, settings, held)
        if place.warning is not None:
            report_to.print(place.warning, soft_wrap=True)
        store = held.enter_context(checked)  # from here on the folder is written
        if store.journal_mode != "wal":
            report_to.print(
                f"{folder}: this file system cannot share memory; the store uses a rollback journal"
            )
        try:
            store.begin_run(plan, provenance)
            if retry_failed:
                store.forget_failures()
            with sweep_progress(report_to, quiet) as progress:
                done = Engine(plan, store, start, settings, progress).run()
            store.end_run(done.wall_seconds, done.compile_seconds)
        except KeyboardInterrupt as stop:
            kept = sum(map(len, store.done_trials().values()))
            report_to.print(
                f"stopped: {kept:,} trials are kept in {folder}; to resume: {shlex.join(_command())}",
                soft_wrap=True,
            )
            raise SystemExit(exit_status(stop)) from None
    summary = summarise(folder)
    with own_style():
        from moejax.sweep.report.figures import make_figures

        written = write_results(folder, summary, make_figures(summary))
    failed = f" ({done.broken_before:,} failed: --retry-failed runs them again)" if done.broken_before else ""
    if not done.trials_run:
        tables.print(
            f"nothing to run: all {done.trials_reused:,} trials are in {folder} already{failed}",
            soft_wrap=True,
        )
    else:
        reused = f", {done.trials_reused:,} reused{failed}" if done.trials_reused else ""
        tables.print(
            f"{done.trials_run:,} trials run in {duration(done.wall_seconds)} "
            f"({done.trials_run / max(done.wall_seconds, 1e-9):.1f}/s on {place.description}; "
            f"{done.compilations} compilations, {duration(done.compile_seconds)}){reused}",
            soft_wrap=True,
        )
    if done.failures:
        tables.print(f"{done.failures.total():,} trials not ok: {summarise_failures(done.failures)}")
    if done.not_tried:
        tables.print(
            f"{done.not_tried:,} trials not tried, because their programs never worked; the same command tries them again",
            soft_wrap=True,
        )
    print_results(tables, summary, written)
    result: dict[str, Any] = {"folder": str(folder), "written": [str(path) for path in written]}
    result |= dataclasses.asdict(done) | {
        "failures": dict(done.failures)
    }  # asdict turns a Counter into pairs
    if as_json:
        print_json(result)
    if done.nothing_worked:
        reasons = f": {summarise_failures(done.failures)}" if done.failures else ""
        raise NoResultError(
            f"{folder}: no trial has a result{reasons}; mend the cause, and run the same command with --retry-failed"
        )
    return result


def write_results(folder: Path, summary: pd.DataFrame, figures: list[NamedFigure]) -> list[Path]:
    """Write summary.csv and the figures into a run folder, before anything is printed: nobody may read that to its end.

    Raises:
        StoreError: the folder cannot be written.
    """
    from moejax.files import write_whole
    from moejax.sweep.report.figures import write_figures
    from moejax.sweep.store.schema import StoreError

    try:
        write_whole(folder / "summary.csv", lambda path: summary.to_csv(path, index=False))
        return [folder / "summary.csv", *write_figures(figures, folder)]
    except OSError as error:
        raise StoreError(f"{folder}: the summary cannot be written: {error.strerror or error}") from None


def print_results(tables: Console, summary: pd.DataFrame, written: Sequence[Path]) -> None:
    """Print the summary of a run folder, and what was written."""
    from moejax.sweep.report.terminal import print_summary

    print_summary(tables, summary)
    tables.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)


def _dry_run(
    plan: Plan, settings: WorkerSettings, place: Place, pilot: bool, tables: Console, as_json: bool
) -> dict[str, Any]:
    from moejax.sweep.execution.pilot import time_bucket
    from moejax.sweep.plan.estimate import total_seconds
    from moejax.sweep.report.terminal import print_plan

    timings = []
    if pilot:
        configure(settings)
        timings = [time_bucket(plan, bucket, settings) for bucket in plan.buckets]
    print_plan(tables, plan, place.workers, timings)
    script = place.job_script()
    if script is not None:
        tables.print("job script of a worker:")
        tables.print(script, markup=False, highlight=False, soft_wrap=True)
    result = {
        "cells": len(plan.cells),
        "trials": plan.first_trials,
        "most_trials": plan.most_trials,
        "duplicates": plan.duplicates,
        "programs": [
            {
                "label": bucket.label,
                "cells": len(bucket.cells),
                "chunks": plan.chunks_of(bucket),
                "chunk_size": bucket.chunk_size,
                "vmap_width": bucket.vmap_width,
                "chunk_bytes": bucket.chunk_bytes,
            }
            for bucket in plan.buckets
        ],
        "estimated_seconds": total_seconds(plan, timings, place.workers) if timings else None,
        "job_script": script,
    }
    if as_json:
        print_json(result)
    return result


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def status(folder: Path, *, as_json: bool = False) -> dict[str, Any]:
    """Print how far a sweep is; read-only, also while it runs."""
    from moejax.sweep.report.status import read_status
    from moejax.sweep.report.terminal import print_status

    state = read_status(folder)
    print_status(make_console(quiet=as_json), state)
    result = dataclasses.asdict(state)
    if as_json:
        print_json(result)
    return result


def export(folder: Path, file: Path, *, quiet: bool = False) -> int:
    """Write the table of trials to FILE.csv, FILE.csv.gz or FILE.parquet, or to stdout for `-`; returns the number of rows."""
    from moejax.sweep.store.read import STDOUT, export_table

    rows = export_table(folder, file)
    if file != STDOUT:
        make_console(quiet=quiet).print(f"{rows:,} rows written to {file}", soft_wrap=True)
    return rows


def report(folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Write summary.csv, the figures and report.html into a run folder, and print the summary.

    Works on a sweep that is running or was stopped: missing trials are shown as missing.

    Raises:
        OSError: no store there, or the folder cannot be written.
    """
    from moejax.sweep.report.pictures import own_style
    from moejax.sweep.report.summary import summarise

    folder = Path(folder)
    tables = make_console(quiet=quiet)
    summary = summarise(folder)
    with own_style():
        from moejax.sweep.report.figures import make_figures
        from moejax.sweep.report.page import write_report

        figures = make_figures(summary)
        written = write_results(folder, summary, figures)
        written.append(write_report(folder, summary, figures))
    print_results(tables, summary, written[:-1])
    tables.print(f"report: {written[-1]}", soft_wrap=True)
    return {"folder": str(folder), "written": [str(path) for path in written]}
