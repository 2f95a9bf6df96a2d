"""The commands of a sweep, as the command line calls them.

Each prints for a person (tables on stdout, progress on stderr) and returns what it printed as plain data,
which `as_json` prints instead. User errors are ValueError or OSError with one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.console import make_console, make_notes, print_json
from moejax.environment import (
    available_cores,
    gpu_memory_bytes,
    memory_bytes,
    pin_random_numbers,
    require_devices,
    visible_gpus,
)
from moejax.sweep.chunk import WorkerSettings, configure
from moejax.sweep.executors import Executor, InProcessExecutor, use_single_thread
from moejax.sweep.plan import Plan, make_plan
from moejax.sweep.plugins import run_plugins
from moejax.sweep.signals import exit_status, stopped_by_signals
from moejax.sweep.spec import read_spec

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from moejax.sweep.figures import NamedFigure

RUNS_FOLDER = "runs"
ACCELERATOR_VMAP_WIDTH = 64
"""Trials side by side on a GPU or TPU, memory permitting; on a CPU one at a time is fastest."""


class NoResultError(RuntimeError):
    """Not one trial of a sweep has a result: the fault is rather the environment's, or the program's."""


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
        security: TOML file that names the certificates for the cluster; see `moejax.sweep.security`.
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
    from moejax.plotting import own_style
    from moejax.sweep.engine import Engine
    from moejax.sweep.progress import duration, sweep_progress
    from moejax.sweep.provenance import check_resumable, collect_provenance
    from moejax.sweep.repair import repair_store
    from moejax.sweep.store import Store
    from moejax.sweep.summary import summarise
    from moejax.sweep.work import summarise_failures

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
        from moejax.sweep.figures import make_figures

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
    from moejax.sweep.figures import write_figures
    from moejax.sweep.schema import StoreError

    try:
        write_whole(folder / "summary.csv", lambda path: summary.to_csv(path, index=False))
        return [folder / "summary.csv", *write_figures(figures, folder)]
    except OSError as error:
        raise StoreError(f"{folder}: the summary cannot be written: {error.strerror or error}") from None


def print_results(tables: Console, summary: pd.DataFrame, written: Sequence[Path]) -> None:
    """Print the summary of a run folder, and what was written."""
    from moejax.sweep.screen import print_summary

    print_summary(tables, summary)
    tables.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)


def _dry_run(
    plan: Plan, settings: WorkerSettings, place: Place, pilot: bool, tables: Console, as_json: bool
) -> dict[str, Any]:
    from moejax.sweep.pilot import time_bucket, total_seconds
    from moejax.sweep.screen import print_plan

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


class Place:
    """Where a sweep runs: this process, worker processes here, or a cluster."""

    def __init__(
        self,
        workers: int | None,
        cluster: str | None,
        dry_run: bool,
        security: Path | None = None,
        worker_timeout: float | None = None,
    ):
        self._cluster = cluster
        self._security = None if security is None else Path(security)
        self._dry_run = dry_run
        self._worker_timeout = worker_timeout
        self._gpus: tuple[str, ...] = ()
        self.accelerated = False
        self.workers = workers or 0

    def prepare(self) -> None:
        """Decide on workers; set XLA's threads, which must happen before JAX starts its backend."""
        import jax

        from moejax.sweep.security import cluster_security

        pin_random_numbers()
        platforms = jax.config.values["jax_platforms"] or os.environ.get("JAX_PLATFORMS", "")
        on_cpu = platforms == "cpu"
        self._gpus = () if on_cpu or "tpu" in platforms else visible_gpus()
        self.accelerated = bool(self._gpus) or "tpu" in platforms
        if self._cluster is not None:
            if self.workers:
                raise ValueError("--workers: the cluster has its own; leave --workers out with --cluster")
            cluster_security(self._cluster, self._security)  # bad certificates end a dry run too
            self.workers = 1
        elif self._security is not None:
            raise ValueError(
                f"--security {self._security}: goes with --cluster; workers of this machine have certificates of their own"
            )
        elif not self.workers:
            self.workers = 1 if "tpu" in platforms else len(self._gpus) or len(available_cores())
        if not self.accelerated:
            use_single_thread()
        if self.accelerated and (self.workers > 1 or self._cluster is not None):
            jax.config.update("jax_platforms", "cpu")  # the devices are the workers', not the coordinator's
        elif platforms:
            require_devices()  # a platform that was asked for and is not there would fail every trial

    @property
    def memory_bytes(self) -> int | None:
        """Memory for each worker: of this machine, or of its GPU; not known for TPUs and clusters."""
        if self._cluster is not None:
            return None
        if self.accelerated:
            return gpu_memory_bytes() if self._gpus else None
        total = memory_bytes()
        return None if total is None else total // max(self.workers, 1)

    @property
    def description(self) -> str:
        if self._cluster is not None:
            return self._cluster
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}"

    @property
    def warning(self) -> str | None:
        """A line that the user should see, if the cluster is joined without TLS."""
        from moejax.sweep.security import unencrypted_warning

        return None if self._cluster is None else unencrypted_warning(self._cluster)

    def job_script(self) -> str | None:
        """What Slurm would be given; None without Slurm."""
        if self._cluster is None or not self._cluster.startswith("slurm:"):
            return None
        from moejax.sweep.cluster import slurm_job_script
        from moejax.sweep.security import cluster_security

        security = cluster_security(self._cluster, self._security)
        return slurm_job_script(Path(self._cluster.removeprefix("slurm:")), security)

    def executor_factory(
        self, chunks: int, settings: WorkerSettings, held: contextlib.ExitStack | None = None
    ) -> Callable[[], Executor]:
        """How to start workers, no more than chunks.

        A cluster is joined at once, and left when `held` is closed: a wrong address changes nothing on disk.
        """
        from moejax.sweep import cluster
        from moejax.sweep.dask_executor import Admission

        if self._cluster is not None:
            admission = Admission.of(settings)
            joined = cluster.cluster_executor(self._cluster, self._security, admission, self._worker_timeout)
            if held is not None:
                held.callback(joined.close)
            return lambda: joined
        workers = min(self.workers, chunks)
        if workers == 1:
            return InProcessExecutor
        return lambda: cluster.local_executor(
            workers, self._gpus, Admission.of(settings), self._worker_timeout
        )


def worker_settings(plan: Plan) -> WorkerSettings:
    """What the workers of a plan need: this process's precision and cache, the plan's plugins."""
    import jax

    return WorkerSettings(
        enable_x64=bool(jax.config.values["jax_enable_x64"]),
        compilation_cache_dir=jax.config.values["jax_compilation_cache_dir"],
        plugins=plan.plugins,
    )


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def status(folder: Path, *, as_json: bool = False) -> dict[str, Any]:
    """Print how far a sweep is; read-only, also while it runs."""
    from moejax.sweep.screen import print_status
    from moejax.sweep.status import read_status

    state = read_status(folder)
    print_status(make_console(quiet=as_json), state)
    result = dataclasses.asdict(state)
    if as_json:
        print_json(result)
    return result


def export(folder: Path, file: Path, *, quiet: bool = False) -> int:
    """Write the table of trials to FILE.csv, FILE.csv.gz or FILE.parquet, or to stdout for `-`; returns the number of rows."""
    from moejax.sweep.tables import STDOUT, export_table

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
    from moejax.plotting import own_style
    from moejax.sweep.summary import summarise

    folder = Path(folder)
    tables = make_console(quiet=quiet)
    summary = summarise(folder)
    with own_style():
        from moejax.sweep.figures import make_figures
        from moejax.sweep.report import write_report

        figures = make_figures(summary)
        written = write_results(folder, summary, figures)
        written.append(write_report(folder, summary, figures))
    print_results(tables, summary, written[:-1])
    tables.print(f"report: {written[-1]}", soft_wrap=True)
    return {"folder": str(folder), "written": [str(path) for path in written]}
