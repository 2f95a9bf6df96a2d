"""`run`, the function for sweeps in Python, and the command `moejax sweep`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.checks import NoResultError
from moejax.console import make_console, make_notes, print_json
from moejax.environment import pinned_random_numbers
from moejax.registry import nearest
from moejax.sweep.commands.reading import print_results, write_results
from moejax.sweep.execution.location import OwnProcess, Place, worker_settings
from moejax.sweep.execution.signals import exit_status, stopped_by_signals
from moejax.sweep.execution.worker import configure
from moejax.sweep.plan.plan import Plan, make_plan
from moejax.sweep.plan.plugins import run_plugins
from moejax.sweep.spec.overrides import override_texts
from moejax.sweep.spec.parse import SpecSource, read_spec

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from moejax.sweep.execution.coordinator import PlannedSweep
    from moejax.sweep.execution.engine import RunSummary


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep: those of `moejax sweep` of the same names; `--help` explains them."""

    out: Path | str | None = None
    workers: int | None = None
    set: Sequence[str] = ()
    plugin: Sequence[Path] = ()
    cluster: str | None = None
    security: Path | None = None
    worker_timeout: float | None = None
    vmap_width: int | None = None
    retry_failed: bool = False
    repair: bool = False
    across_versions: bool = False


def run(
    spec: SpecSource,
    *,
    out: Path | str | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    plugins: Sequence[Path | str] = (),
    quiet: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Run a sweep, or continue it, and return its table: trials that are in the run folder are not run again.

    The folder is the same as from `moejax sweep`, without the summary and the figures, which `moejax report` adds. Afterwards the
    environment, JAX's configuration and signal handlers are as before. Trials in this process use its XLA settings, perhaps with
    several threads: their numbers may differ in the last digits from those of workers.

    Args:
        spec: a TOML file, a mapping with its keys and tables, or a checked `Spec`.
        out: the run folder; default runs/NAME, with the name of the spec.
        dry_run: run and write nothing, and return a table of the compiled programs.
        workers: number of processes; 1 is this process. Default: one per core, or one per GPU; a script then needs
            `if __name__ == "__main__":`.
        overrides: key -> value, or KEY=VALUE texts, which replace values of the spec.
        plugins: Python files that register names of the spec, in addition to the spec's own.
        quiet: print nothing; otherwise progress and notes on stderr.
        options: `cluster`, `security`, `worker_timeout`, `vmap_width`, `retry_failed`, `repair` and `across_versions`;
            `moejax sweep --help` explains them.

    Returns:
        The table of `moejax.sweep.load`.

    Raises:
        ValueError: the spec or an option.
        OSError: the folder, the store or the cluster.
        NoResultError: every trial failed.

    Examples:
        >>> spec = {"methods": ["joint_em"], "trials": 2, "grid": {"num_samples": [100, 200, 500]}}
        >>> moejax.sweep.run(spec, dry_run=True)[["label", "cells"]]
                                     label  cells
        0  joint_em linear d=10 k=3 n<=256      2
        1  joint_em linear d=10 k=3 n<=512      1
    """
    import pandas as pd

    from moejax.sweep.execution.dask_cluster import log_levels_kept
    from moejax.sweep.store.read import load

    _refuse_unknown(options)
    texts = override_texts(overrides) if isinstance(overrides, Mapping) else tuple(overrides)
    given = SweepOptions(out, workers, texts, [Path(plugin) for plugin in plugins], **options)
    with stopped_by_signals(), pinned_random_numbers(), log_levels_kept():
        planned = _Run.planned(spec, given)
        if dry_run:
            return pd.DataFrame(_programs(planned.sweep.plan))
        planned.refuse_if_nothing_worked(planned.execute(make_notes(quiet=quiet), quiet))
    return load(planned.sweep.folder)


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    """Refuse an option that `run` does not have; it names four of `SweepOptions` among its own arguments."""
    own = [name for name, kind in inspect.signature(run).parameters.items() if kind.kind is kind.KEYWORD_ONLY]
    others = [field.name for field in dataclasses.fields(SweepOptions)]
    others = [name for name in others if name not in ("out", "workers", "set", "plugin")]
    for name in options:
        if name not in others:
            raise ValueError(f"{name}: unknown option of moejax.sweep.run; {nearest(name, own + others)}")


def sweep(
    spec: Path,
    *,
    dry_run: bool = False,
    pilot: bool = False,
    quiet: bool = False,
    as_json: bool = False,
    own_process: OwnProcess | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a sweep, or continue it: trials that are in the store are not run again.

    Args:
        spec: the TOML file.
        dry_run: print cells, compilations and memory; run and write nothing.
        pilot: with dry_run, time one chunk of every program and estimate the total time. Otherwise time a trial of every method
            and activation first, and choose the chunk sizes by these times.
        quiet: no progress and no tables.
        as_json: print the result as JSON.
        own_process: see `Place.prepare`.
        options: fields of `SweepOptions`.

    Raises:
        ValueError: the spec or an option; OSError: the folder, the store or the cluster. NoResultError: every trial failed.
            SystemExit: after Ctrl-C, SIGTERM or SIGHUP.
    """
    tables = make_console(quiet=quiet or as_json)
    with stopped_by_signals(), pinned_random_numbers():
        planned = _Run.planned(spec, SweepOptions(**options), own_process)
        done = None if dry_run else _run_or_exit(planned, quiet, pilot)
        result = _dry_run(planned, pilot, tables) if done is None else _tell(planned, done, tables)
        if as_json:
            print_json(result)
        if done is not None:
            planned.refuse_if_nothing_worked(done)
    return result


@dataclasses.dataclass(frozen=True)
class _Run:
    """A sweep that is planned, and the place where it runs."""

    options: SweepOptions
    place: Place
    sweep: PlannedSweep

    @classmethod
    def planned(cls, spec: SpecSource, options: SweepOptions, own_process: OwnProcess | None = None) -> _Run:
        """Check options and spec, and plan; nothing runs yet."""
        from moejax.sweep.execution.coordinator import PlannedSweep

        place = Place(options.workers, options.cluster, options.security, options.worker_timeout)
        if options.vmap_width is not None and options.vmap_width < 1:
            raise ValueError(f"--vmap-width {options.vmap_width}: expected a number of at least 1")
        checked = read_spec(spec, options.set)
        place.prepare(own_process)
        plan = make_plan(
            checked, run_plugins((*checked.plugins, *options.plugin)), **place.limits(options.vmap_width)
        )
        folder = Path("runs") / checked.name if options.out is None else Path(options.out)
        return cls(options, place, PlannedSweep(plan, folder, tuple(options.set), options.across_versions))

    def execute(self, notes: Console, quiet: bool, pilot: bool = False) -> RunSummary:
        """Run the missing trials; notes, and unless `quiet` the progress, go to the console `notes`.

        With `pilot`, the chunk sizes follow from trials that are timed first.
        """
        from moejax.sweep.execution.coordinator import run_sweeps
        from moejax.sweep.execution.pilot import pilot_costs
        from moejax.sweep.report.progress import sweep_progress

        plan = self.sweep.plan
        settings = worker_settings(plan.plugins)
        costs = None
        if pilot:
            configure(settings)
            costs = pilot_costs(plan, settings, lambda line: notes.print(line, soft_wrap=True))
        chunks = sum(plan.chunks_of(bucket) for bucket in plan.buckets)
        with contextlib.closing(self.place.start_workers(chunks, settings)) as workers:
            return run_sweeps(
                [self.sweep],
                plan,
                workers,
                settings,
                sweep_progress(notes, quiet),
                lambda line: notes.print(line, soft_wrap=True),
                retry_failed=self.options.retry_failed,
                repair=self.options.repair,
                costs=costs,
                limits=self.place.limits(self.options.vmap_width),
            )

    def refuse_if_nothing_worked(self, done: RunSummary) -> None:
        """Raise NoResultError if no trial has a result."""
        from moejax.sweep.execution.work_queue import summarise_failures

        if done.nothing_worked:
            reasons = f": {summarise_failures(done.failures)}" if done.failures else ""
            raise NoResultError(
                f"{self.sweep.folder}: no trial has a result{reasons}; mend the cause, and run the same command with --retry-failed"
            )


def _run_or_exit(planned: _Run, quiet: bool, pilot: bool) -> RunSummary:
    """Run. After a stop, print the trials that are kept and the command that resumes, and end the program."""
    notes = make_notes()
    try:
        return planned.execute(notes, quiet, pilot)
    except KeyboardInterrupt as stop:
        kept = getattr(stop, "__notes__", None)
        if not kept:  # no trial had begun
            raise
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        notes.print(f"stopped: {kept[0]}; to resume: {command}", soft_wrap=True)
        raise SystemExit(exit_status(stop)) from None


def _tell(planned: _Run, done: RunSummary, tables: Console) -> dict[str, Any]:
    """Write summary and figures, and print the results of a run."""
    from moejax.console import duration
    from moejax.sweep.execution.work_queue import summarise_failures

    folder = planned.sweep.folder
    summary, written = write_results(folder)
    failed = f" ({done.broken_before:,} failed: --retry-failed runs them again)" if done.broken_before else ""
    if not done.trials_run:
        lines = [f"nothing to run: all {done.trials_reused:,} trials are in {folder} already{failed}"]
    else:
        reused = f", {done.trials_reused:,} reused{failed}" if done.trials_reused else ""
        lines = [
            f"{done.trials_run:,} trials run in {duration(done.wall_seconds)} "
            f"({done.trials_run / max(done.wall_seconds, 1e-9):.1f}/s on {planned.place.description}; "
            f"{done.compilations} compilations, {duration(done.compile_seconds)}){reused}"
        ]
    if done.failures:
        lines.append(f"{done.failures.total():,} trials not ok: {summarise_failures(done.failures)}")
    if done.not_tried:
        lines.append(
            f"{done.not_tried:,} trials not tried, because their programs never worked; the same command tries them again"
        )
    for line in lines:
        tables.print(line, soft_wrap=True)
    print_results(tables, summary, written)
    result = {"folder": str(folder), "written": [str(path) for path in written], **dataclasses.asdict(done)}
    return result | {"failures": dict(done.failures)}  # asdict would make pairs of a Counter


def _dry_run(planned: _Run, pilot: bool, tables: Console) -> dict[str, Any]:
    from moejax.sweep.execution.pilot import time_bucket
    from moejax.sweep.plan.estimate import total_seconds
    from moejax.sweep.report.terminal import print_plan

    plan, place = planned.sweep.plan, planned.place
    timings = []
    if pilot:
        settings = worker_settings(plan.plugins)
        configure(settings)
        timings = [time_bucket(plan, bucket, settings) for bucket in plan.buckets]
    print_plan(tables, plan, place.workers, timings)
    script = place.job_script()
    if script is not None:
        tables.print("job script of a worker:")
        tables.print(script, markup=False, highlight=False, soft_wrap=True)
    return {
        "cells": len(plan.cells),
        "trials": plan.first_trials,
        "most_trials": plan.most_trials,
        "duplicates": plan.duplicates,
        "programs": _programs(plan),
        "estimated_seconds": total_seconds(plan, timings, place.workers) if timings else None,
        "job_script": script,
    }


def _programs(plan: Plan) -> list[dict[str, Any]]:
    """The compiled programs of a plan."""
    return [
        {
            "label": bucket.label,
            "cells": len(bucket.cells),
            "chunks": plan.chunks_of(bucket),
            "chunk_size": bucket.chunk_size,
            "vmap_width": bucket.vmap_width,
            "chunk_bytes": bucket.chunk_bytes,
        }
        for bucket in plan.buckets
    ]
