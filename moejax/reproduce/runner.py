"""`moejax reproduce`: every figure and table of experiments/, from the repository only.

Stores are in runs/NAME, where a second call finds finished trials; results are in results/NAME: table.csv, figure.png, figure.pdf,
claims.json, manifest.json. A quick run does not replace results of a full run: if there are any, it writes to runs/quick/results.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from moejax.console import make_console, make_notes, print_json
from moejax.environment import pinned_random_numbers
from moejax.reproduce.experiment import EXPERIMENTS_FOLDER, ExperimentFile, load_experiments
from moejax.reproduce.gallery import write_gallery
from moejax.reproduce.results_folder import RunFacts, read_manifest, rows_that_raised, write_results
from moejax.sweep.spec.overrides import override_texts

if TYPE_CHECKING:
    import pandas as pd

    from moejax.reproduce.cell_functions import StudySpec, StudyUnit
    from moejax.sweep.execution.engine import RunSummary
    from moejax.sweep.execution.executors import Workers
    from moejax.sweep.execution.location import Place
    from moejax.sweep.plan.plan import Plan

RESULTS_FOLDER, RUNS_FOLDER = "results", "runs"
OPENING_NAME = "opening.md"
"""The beginning of the gallery, in the folder of experiments (`write_gallery`)."""


def reproduce(
    names: Sequence[str] = (),
    *,
    root: Path = Path(),
    quick: bool = False,
    seed: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    across_versions: bool = False,
    quiet: bool = False,
    as_json: bool = False,
    own_process: Callable[[Place], None] | None = None,
) -> dict[str, Any]:
    """Make the figures and tables of all or of the named experiments; finished trials are not run again.

    Args:
        names: names of experiments; empty for all.
        root: folder with experiments/ and sweeps/; runs/ and results/ are made there.
        quick: the small version of each, all of them as one sweep.
        seed: replaces the specs' seed; the results go to separate folders.
        out: folder of the results.
        workers: number of processes; default: one per core, or one per GPU.
        dry_run: print the plan; run and write nothing.
        across_versions: continue even if a run folder holds results of another version or source of moejax, or of another JAX.
        quiet: no progress and no tables.
        as_json: print the result as JSON.
        own_process: see `moejax.sweep.execution.location.Place.prepare`.

    Raises:
        ValueError: a name, a spec, an experiment's figure; OSError: a folder or a store. SystemExit: after
            Ctrl-C, SIGTERM or SIGHUP.
    """
    from moejax.sweep.execution.location import Place
    from moejax.sweep.execution.signals import exit_status, stopped_by_signals

    place = Place(workers)
    root = Path(root)
    experiments = load_experiments(root, names, quick=quick, seed=seed)
    with pinned_random_numbers():
        place.prepare(own_process)
        session = Session(root, experiments, quick, seed, out, place, across_versions, quiet or as_json)
        session.print_plan()
        result: dict[str, Any] = {
            "programs": session.num_programs,
            "experiments": [e.name for e in experiments],
        }
        try:
            if not dry_run:
                with stopped_by_signals():
                    result |= session.run()
        except KeyboardInterrupt as stop:
            command = shlex.join(_canonical_command(names, quick, seed, across_versions))
            make_notes().print(f"stopped: what has ended is kept; to resume: {command}", soft_wrap=True)
            raise SystemExit(exit_status(stop)) from None
    if as_json:
        print_json(result)
    return result


def _canonical_command(
    names: Sequence[str], quick: bool, seed: int | None, across_versions: bool = False
) -> list[str]:
    options = (["--quick"] if quick else []) + ([] if seed is None else ["--seed", str(seed)])
    options += ["--across-versions"] if across_versions else []
    return ["moejax", "reproduce", *names, *options]


class Session:
    """One call of `reproduce`: its plans, its run folders, and the rows that come out of them."""

    def __init__(
        self,
        root: Path,
        experiments: Sequence[ExperimentFile],
        quick: bool,
        seed: int | None,
        out: Path | None,
        place: Place,
        across_versions: bool,
        quiet: bool,
    ):
        from moejax.reproduce.cell_functions import read_study, study_units
        from moejax.sweep.execution.location import worker_settings
        from moejax.sweep.plan.plan import make_plan
        from moejax.sweep.plan.plugins import run_plugins
        from moejax.sweep.spec.parse import read_spec

        self.root, self.quick, self.seed, self.place = root, quick, seed, place
        self.across_versions = across_versions
        self.quiet = quiet
        self.tables = make_console(quiet=quiet)
        self.notes = make_notes(quiet=quiet)
        self.out = out
        self.sweeps = [experiment for experiment in experiments if not experiment.is_study]
        self.studies = [experiment for experiment in experiments if experiment.is_study]
        self.limits = place.limits()
        self.plans: dict[str, Plan] = {}
        for experiment in self.sweeps:
            spec = read_spec(experiment.spec_path, override_texts(experiment.overrides))
            self.plans[experiment.name] = make_plan(spec, run_plugins(spec.plugins), **self.limits)
        self.study_specs: dict[str, StudySpec] = {}
        self.units: dict[str, list[StudyUnit]] = {}
        for experiment in self.studies:
            spec = self.part_of(experiment, read_study(experiment.spec_path, experiment.overrides))
            self.study_specs[experiment.name] = spec
            self.units[experiment.name] = study_units(
                experiment.path,
                spec,
                self.folder(experiment),
                program=experiment.declared.program,
                double_precision=experiment.declared.precision == "float64",
                settings=worker_settings(),
            )

    def part_of(self, experiment: ExperimentFile, spec: StudySpec) -> StudySpec:
        """The cells of a study that run; here all."""
        return spec

    def trials_of(self, experiment: ExperimentFile) -> frozenset[int] | None:
        """The trials of every cell of a sweep that run; None: all."""
        return None

    def folder(self, experiment: ExperimentFile) -> Path:
        """The run folder."""
        tag = "" if self.seed is None else f"seed-{self.seed}"
        return self.root / RUNS_FOLDER / tag / experiment.name

    @property
    def num_programs(self) -> int:
        """Number of compiled programs; a program that experiments of one group share counts once."""
        studies = sum(self._study_programs(experiment) for experiment in self.studies)
        return studies + sum(
            len({bucket.static for experiment in group for bucket in self.plans[experiment.name].buckets})
            for group in self.groups()
        )

    def _study_programs(self, experiment: ExperimentFile) -> int:
        """Number of programs of a study: its units in which some cell compiles, by `compiles`."""
        compiles = experiment.declared.compiles or (lambda cell: True)
        return sum(any(compiles(dict(cell)) for cell in unit.cells) for unit in self.units[experiment.name])

    def groups(self) -> list[list[ExperimentFile]]:
        """Groups of sweeps that run as one: with --quick all of them (except those that stop by precision), else each alone."""
        if not self.quick:
            return [[experiment] for experiment in self.sweeps]
        groups: dict[Any, list[ExperimentFile]] = {}
        for experiment in self.sweeps:
            spec = self.plans[experiment.name].spec
            key = spec.seed if spec.precision is None else experiment.name
            groups.setdefault(key, []).append(experiment)
        return list(groups.values())

    def print_plan(self) -> None:
        """Print cells, trials and programs of every experiment, and the time that the committed results took."""
        from moejax.console import duration

        seconds = {e.name: self._last_seconds(e) for e in (*self.sweeps, *self.studies)}
        times = {name: duration(value) if value else "" for name, value in seconds.items()}
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("experiment", "cells", "trials", "programs", "not shared", "last full run"):
            table.add_column(name, justify="left" if name == "experiment" else "right", no_wrap=True)
        seen: set[Any] = set()
        for experiment in self.sweeps:
            plan = self.plans[experiment.name]
            own = {bucket.static for bucket in plan.buckets}
            table.add_row(
                experiment.name,
                f"{len(plan.cells):,}",
                f"{plan.most_trials:,}",
                f"{len(own)}",
                f"{len(own - seen)}",
                times[experiment.name],
            )
            seen |= own if self.quick else set()
        for experiment in self.studies:
            count = self._study_programs(experiment)
            cells = len(self.study_specs[experiment.name].cells)
            table.add_row(experiment.name, f"{cells:,}", "", f"{count}", f"{count}", times[experiment.name])
        self.tables.print(table)
        self.tables.print(f"{self.num_programs} programs to compile on {self.place.description}")
        if len(seconds) > 1 and all(seconds.values()):
            self.tables.print(f"last full runs together: {duration(sum(seconds.values()))}")

    def _last_seconds(self, experiment: ExperimentFile) -> float:
        """Wall time of the committed full run; 0 if there is none."""
        manifest = read_manifest(self.root / RESULTS_FOLDER / experiment.name)
        return 0.0 if manifest is None or manifest.get("quick") else manifest.get("wall_seconds", 0.0)

    def run(self) -> dict[str, Any]:
        """Run all experiments and write their results; failures of single experiments are reported at the end."""
        from moejax.console import duration
        from moejax.sweep.execution.location import worker_settings
        from moejax.sweep.execution.worker import compilations_so_far

        started, compiled_before = time.monotonic(), compilations_so_far()[0]
        folder, failures = self._results_folder(), []
        compilations, written = 0, []

        def finish(experiment: ExperimentFile, table: pd.DataFrame, facts: RunFacts) -> None:
            raised, all_raised = rows_that_raised(table)
            if all_raised:
                failures.append(f"{experiment.name}: {raised}")
                return
            try:
                command = shlex.join(_canonical_command([experiment.name], self.quick, self.seed))
                results = folder / experiment.name
                write_results(
                    experiment, table, facts, results, command=command, quick=self.quick, root=self.root
                )
                written.append(results)
                self.notes.print(f"  written: {results}", soft_wrap=True)
                if raised:
                    self.notes.print(f"  {raised}", soft_wrap=True)
            except Exception as error:  # an experiment's own code may raise any error: the others go on
                if os.environ.get("MOEJAX_TRACEBACK"):
                    raise
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if raised:
                    problem = f"{raised} (then {problem})"
                failures.append(f"{experiment.name}: {problem}")

        with contextlib.closing(
            self.place.start_workers(max(self.num_programs, 1), worker_settings())
        ) as workers:
            for group in self.groups():
                names = ", ".join(experiment.name for experiment in group)
                self.notes.print(names, soft_wrap=True)
                summary = self.run_group(group, workers)
                compilations += summary.compilations
                self.notes.print(
                    f"  {summary.trials_run:,} trials run, {summary.trials_reused:,} reused, "
                    f"{summary.compilations} compilations, {duration(summary.wall_seconds)}"
                )
                for experiment in group:
                    finish(experiment, *self.sweep_rows(experiment))
            for experiment in self.studies:
                self.notes.print(experiment.name)
                table, facts = self.study_rows(experiment, workers)
                compilations += facts.compilations
                finish(experiment, table, facts)
        if self.place.workers > 1:  # otherwise this process is the worker, and its compilations are counted
            compilations += compilations_so_far()[0] - compiled_before
        opening = self.root / EXPERIMENTS_FOLDER / OPENING_NAME
        write_gallery(folder, load_experiments(self.root, quick=self.quick), opening)
        seconds = time.monotonic() - started
        self.tables.print(
            f"{len(written)} experiments in {duration(seconds)}, {compilations} compilations; "
            f"figures and tables in {folder}",
            soft_wrap=True,
        )
        if failures:
            raise ValueError("; ".join(failures))
        return {"results": str(folder), "seconds": seconds, "compilations": compilations}

    def run_group(self, group: Sequence[ExperimentFile], workers: Workers) -> RunSummary:
        """Run the missing trials of sweeps that run as one."""
        from moejax.sweep.execution.coordinator import PlannedSweep, run_sweeps
        from moejax.sweep.execution.location import worker_settings
        from moejax.sweep.plan.plan import join_plans
        from moejax.sweep.report.progress import sweep_progress

        plans = [self.plans[experiment.name] for experiment in group]
        plan = join_plans(plans, **self.limits)
        sweeps = [
            PlannedSweep(
                self.plans[experiment.name],
                self.folder(experiment),
                override_texts(experiment.overrides),
                self.across_versions,
                self.trials_of(experiment),
            )
            for experiment in group
        ]
        progress = sweep_progress(self.notes, self.quiet)
        return run_sweeps(
            sweeps,
            plan,
            workers,
            worker_settings(plan.plugins),
            progress,
            lambda line: self.notes.print(line, soft_wrap=True),
        )

    def sweep_rows(self, experiment: ExperimentFile) -> tuple[pd.DataFrame, RunFacts]:
        """The table of a sweep that has run, and the record of its runs."""
        from moejax.sweep.store.read import load, load_chunks, load_runs

        folder = self.folder(experiment)
        table = load(folder, seconds=experiment.declared.seconds, result_hash=True)
        wanted = table["trial"] < self.plans[experiment.name].spec.most_trials
        # an earlier, larger run may have left more rows of these cells
        table = table[wanted].reset_index(drop=True)
        extend = experiment.declared.extend
        table = (table if extend is None else extend(table, folder)).drop(columns="result_hash")
        runs = [run for run in load_runs(folder) if run["trials"]]
        chunks = load_chunks(folder)
        return table, RunFacts(
            spec_json=self.plans[experiment.name].spec.to_json(),
            runs=[{name: run[name] for name in ("git", "trials", "xla_flags")} for run in runs],
            started=runs[0]["started"] if runs else time.time(),
            wall_seconds=sum(run["wall_seconds"] or 0.0 for run in runs),
            worker_seconds=float(chunks["wall_seconds"].sum()),
            compile_seconds=float(chunks["compile_seconds"].sum()),
            compilations=int(chunks["compilations"].sum()),
            precision=runs[-1]["precision"] if runs else "",
            workers=self.place.description,
        )

    def study_rows(self, experiment: ExperimentFile, workers: Workers) -> tuple[pd.DataFrame, RunFacts]:
        """Run the missing cells of a study; its table, and the record of its run."""
        from moejax.environment import git_state
        from moejax.reproduce.cell_functions import run_study

        started = time.monotonic()
        run = run_study(
            self.units[experiment.name],
            workers.executor,
            lambda line: self.notes.print(f"  {line}"),
            self.across_versions,
        )
        extend = experiment.declared.extend
        table = run.table if extend is None else extend(run.table, self.folder(experiment))
        return table, RunFacts(
            spec_json=self.study_specs[experiment.name].to_json(),
            runs=[
                {
                    "git": git_state(Path(__file__).parent),
                    "trials": len(run.table),
                    "xla_flags": workers.xla_flags,
                }
            ],
            started=run.started,
            # for a resumed study, at least the time that its workers took
            wall_seconds=max(time.monotonic() - started, run.worker_seconds / self.place.workers),
            worker_seconds=run.worker_seconds,
            compile_seconds=run.compile_seconds,
            compilations=run.compilations,
            precision=experiment.declared.precision,
            workers=self.place.description,
        )

    def _results_folder(self) -> Path:
        """The folder of the results: a quick run, or one with another seed, never replaces those of a full run."""
        if self.out is not None:
            return Path(self.out)
        if self.seed is not None:
            return self.root / RUNS_FOLDER / f"seed-{self.seed}" / RESULTS_FOLDER
        folder = self.root / RESULTS_FOLDER
        manifests = [read_manifest(folder / experiment.name) for experiment in self.sweeps + self.studies]
        if self.quick and any(manifest is not None and not manifest.get("quick") for manifest in manifests):
            return self.root / RUNS_FOLDER / "quick" / RESULTS_FOLDER
        return folder
