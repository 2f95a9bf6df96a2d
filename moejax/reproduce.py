# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (pandas has no annotations of its own that tell a Series from a DataFrame)
"""`moejax reproduce`: every figure and table of experiments/, from nothing but the repository.

An experiment is one Python file:

    SPEC = "sweeps/noise.toml"            # relative to the root
    QUICK = {"trials": 10, ...}           # what --quick changes in it
    def figure(table): ...                # results/NAME/table.csv, read back -> a matplotlib Figure

and may have `SHOWS` and `SHOWS_NOT` (a sentence each, for the gallery), `NUMBERS` (those in its sentences, see `moejax.claims`),
`summary(table) -> DataFrame` (summary.csv), `SECONDS = True` (a column of compute
seconds), `extend(table, folder)` (columns from the store's arrays, by `result_hash` and `trial`), or `run_cell(cell) ->
DataFrame` with `PROGRAM`, `PRECISION` and `compiles` where it is no recovery sweep (see `moejax.sweep.study`).

Stores are in runs/NAME, where a second call finds what is done; results are in results/NAME: table.csv, figure.png, figure.pdf,
claims.json, manifest.json. A quick run does not replace the results of a full one: it then writes to runs/quick/results.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moejax.sweep.fields import nearest
from moejax.sweep.places import SpecError

if TYPE_CHECKING:
    import pandas as pd

    from moejax.sweep.plan import Plan
    from moejax.sweep.study import StudySpec, StudyUnit

EXPERIMENTS_FOLDER, RESULTS_FOLDER, RUNS_FOLDER = "experiments", "results", "runs"
MANIFEST_NAME = "manifest.json"
PACKAGES = ("moejax", "jax", "jaxlib", "numpy", "scipy", "pandas", "matplotlib", "scikit-learn", "optax")
SIGNIFICANT_DIGITS = 7
"""Of numbers in table.csv: what single precision holds."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One file of experiments/, checked, with its spec as it will be run."""

    module: types.ModuleType
    path: Path
    spec_path: Path
    overrides: dict[str, Any]
    name: str

    @property
    def is_study(self) -> bool:
        """Whether it brings its own function instead of a sweep."""
        return hasattr(self.module, "run_cell")

    def get(self, name: str, default: Any = None) -> Any:
        """An optional name of the module."""
        return getattr(self.module, name, default)


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """How the rows of an experiment were made."""

    spec_json: str
    runs: list[dict[str, Any]]
    """Commit, dirty flag, trials and XLA's flags of every run that contributed rows."""
    started: float
    wall_seconds: float
    worker_seconds: float
    compile_seconds: float
    compilations: int
    precision: str
    workers: str


def load_experiments(
    root: Path, names: Sequence[str] = (), *, quick: bool = False, seed: int | None = None
) -> list[Experiment]:
    """The experiments of a root folder, or those that are named, in alphabetical order.

    Raises:
        ValueError: there are none, a name is unknown, or a file has no SPEC or figure.
    """
    from moejax.sweep.study import load_experiment

    files = sorted((root / EXPERIMENTS_FOLDER).glob("*.py"))
    files = [file for file in files if not file.name.startswith("_")]
    if not files:
        raise ValueError(
            f"--root {root}: no experiments there: expected {EXPERIMENTS_FOLDER}/*.py, each with SPEC and figure(table)"
        )
    known = {file.stem.replace("_", "-"): file for file in files}
    asked = [name.replace("_", "-") for name in names]
    for name, given in zip(asked, names, strict=True):
        if name not in known:
            raise ValueError(f"{given}: no such experiment; {nearest(name, known)}")
    experiments = []
    for name, file in known.items():
        if asked and name not in asked:
            continue
        module = load_experiment(file)
        for needed in ("SPEC", "figure"):
            if not hasattr(module, needed):
                raise ValueError(f"{file}: expected SPEC and figure(table), got no {needed}")
        spec_path = _spec_path(module.SPEC, root, file, name)
        overrides = dict(getattr(module, "QUICK", {})) if quick else {}
        if seed is not None:
            overrides["seed"] = seed
        experiments.append(Experiment(module, file, spec_path, overrides, name))
    return experiments


def _spec_path(spec: Any, root: Path, file: Path, name: str) -> Path:
    """The file that SPEC names, relative to the root or to the experiment."""
    if not isinstance(spec, str | Path):
        raise SpecError(f"{file}: SPEC: expected the path of a TOML file, got {type(spec).__name__}")
    for folder in (root, file.parent):
        if (folder / spec).is_file():
            return folder / spec
    raise SpecError(f"{root / spec}: cannot read the spec of the experiment {name}: no such file")


def override_texts(overrides: dict[str, Any]) -> tuple[str, ...]:
    """The overrides as `moejax sweep --set` takes them."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in overrides.items())


def reproduce(
    names: Sequence[str] = (),
    *,
    root: Path = Path(),
    quick: bool = False,
    seed: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Make the figures and tables of the experiments, or of those that are named; what is done is not run again.

    Args:
        names: of experiments; none: all.
        root: folder with experiments/ and sweeps/; runs/ and results/ are made there.
        quick: the small version of each, all of them as one sweep.
        seed: another seed than the specs', into other folders.
        out: folder of the results.
        workers: processes; default: one per core, or one per GPU.
        dry_run: print the plan; run and write nothing.
        quiet: no progress and no tables.
        as_json: print the result as JSON.

    Raises:
        ValueError: a name, a spec, an experiment's figure; OSError: a folder or a store. SystemExit: after Ctrl-C.
    """
    from moejax.sweep.commands import INTERRUPTED_STATUS, Place

    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: expected a number of at least 1")
    root = Path(root)
    experiments = load_experiments(root, names, quick=quick, seed=seed)
    place = Place(workers, None, dry_run)
    place.prepare()
    session = _Session(root, experiments, quick, seed, out, place, quiet or as_json)
    session.print_plan()
    result: dict[str, Any] = {"programs": session.num_programs, "experiments": [e.name for e in experiments]}
    if not dry_run:
        try:
            result |= session.run()
        except KeyboardInterrupt:
            command = shlex.join(_canonical_command(names, quick, seed))
            Console(stderr=True).print(
                f"stopped: what has ended is kept; to resume: {command}", soft_wrap=True
            )
            raise SystemExit(INTERRUPTED_STATUS) from None
    if as_json:
        print(json.dumps(result))
    return result


def _canonical_command(names: Sequence[str], quick: bool, seed: int | None) -> list[str]:
    options = (["--quick"] if quick else []) + ([] if seed is None else ["--seed", str(seed)])
    return ["moejax", "reproduce", *names, *options]


class _Session:
    """One call of `reproduce`."""

    def __init__(
        self,
        root: Path,
        experiments: Sequence[Experiment],
        quick: bool,
        seed: int | None,
        out: Path | None,
        place: Any,
        quiet: bool,
    ):
        from moejax.sweep.commands import ACCELERATOR_VMAP_WIDTH, worker_settings
        from moejax.sweep.plan import make_plan
        from moejax.sweep.plugins import run_plugins
        from moejax.sweep.spec import read_spec
        from moejax.sweep.study import read_study, study_units

        self.root, self.quick, self.seed, self.place = root, quick, seed, place
        self.quiet = quiet
        self.tables = Console(quiet=quiet)
        self.notes = Console(stderr=True, quiet=quiet)
        self.out = out
        self.sweeps = [experiment for experiment in experiments if not experiment.is_study]
        self.studies = [experiment for experiment in experiments if experiment.is_study]
        self.limits = {
            "vmap_width": ACCELERATOR_VMAP_WIDTH if place.accelerated else 1,
            "worker_memory_bytes": place.memory_bytes,
        }
        self.plans: dict[str, Plan] = {}
        for experiment in self.sweeps:
            spec = read_spec(experiment.spec_path, override_texts(experiment.overrides))
            self.plans[experiment.name] = make_plan(spec, run_plugins(spec.plugins), **self.limits)
        self.settings = {name: worker_settings(plan) for name, plan in self.plans.items()}
        self.study_specs: dict[str, StudySpec] = {}
        self.units: dict[str, list[StudyUnit]] = {}
        for experiment in self.studies:
            spec = read_study(experiment.spec_path, experiment.overrides)
            self.study_specs[experiment.name] = spec
            self.units[experiment.name] = study_units(
                experiment.path,
                spec,
                self.folder(experiment),
                program=experiment.get("PROGRAM", ()),
                double_precision=experiment.get("PRECISION", "float64") == "float64",
                settings=_plain_worker_settings(),
            )

    def folder(self, experiment: Experiment) -> Path:
        """The run folder."""
        tag = "" if self.seed is None else f"seed-{self.seed}"
        return self.root / RUNS_FOLDER / tag / experiment.name

    @property
    def num_programs(self) -> int:
        """Compiled programs, those that experiments share counted once where they run as one."""
        studies = sum(self._study_programs(experiment) for experiment in self.studies)
        return studies + sum(
            len({bucket.static for experiment in group for bucket in self.plans[experiment.name].buckets})
            for group in self.groups()
        )

    def _study_programs(self, experiment: Experiment) -> int:
        """Programs of a study: its units, but those whose cells its `compiles` says compile nothing."""
        compiles = experiment.get("compiles", lambda cell: True)
        return sum(any(compiles(dict(cell)) for cell in unit.cells) for unit in self.units[experiment.name])

    def groups(self) -> list[list[Experiment]]:
        """Sweeps that run as one: with --quick all of them (but those that stop by precision), else each alone."""
        if not self.quick:
            return [[experiment] for experiment in self.sweeps]
        groups: dict[Any, list[Experiment]] = {}
        for experiment in self.sweeps:
            spec = self.plans[experiment.name].spec
            key = spec.seed if spec.precision is None else experiment.name
            groups.setdefault(key, []).append(experiment)
        return list(groups.values())

    def print_plan(self) -> None:
        """Cells, trials and programs of every experiment, and how long the committed results took."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("experiment", "cells", "trials", "programs", "not shared", "last full run"):
            table.add_column(name, justify="left" if name == "experiment" else "right", no_wrap=True)
        seen: set[Any] = set()
        for experiment in self.sweeps:
            plan = self.plans[experiment.name]
            mine = {bucket.static for bucket in plan.buckets}
            table.add_row(
                experiment.name,
                f"{len(plan.cells):,}",
                f"{plan.most_trials:,}",
                f"{len(mine)}",
                f"{len(mine - seen)}",
                self._last_time(experiment),
            )
            seen |= mine if self.quick else set()
        for experiment in self.studies:
            count = self._study_programs(experiment)
            cells = len(self.study_specs[experiment.name].cells)
            table.add_row(
                experiment.name, f"{cells:,}", "", f"{count}", f"{count}", self._last_time(experiment)
            )
        self.tables.print(table)
        self.tables.print(f"{self.num_programs} programs to compile on {self.place.description}")

    def _last_time(self, experiment: Experiment) -> str:
        from moejax.sweep.progress import duration

        manifest = _read_manifest(self.root / RESULTS_FOLDER / experiment.name)
        if manifest is None or manifest.get("quick") or "wall_seconds" not in manifest:
            return ""
        return duration(manifest["wall_seconds"])

    def run(self) -> dict[str, Any]:
        """Run everything, write everything; failures of single experiments are told at the end."""
        from moejax.sweep.chunk import compilations_so_far
        from moejax.sweep.progress import duration
        from moejax.sweep.together import KeptExecutor

        started, compiled_before = time.monotonic(), compilations_so_far()[0]
        folder, failures = self._results_folder(), []
        start = self.place.executor_factory(max(self.num_programs, 1))
        executor = KeptExecutor(start)
        compilations, written = 0, []

        def finish(experiment: Experiment, table: pd.DataFrame, facts: RunFacts) -> None:
            try:
                written.append(self._write(experiment, table, facts, folder / experiment.name))
            except Exception as error:  # an experiment's own code may raise anything: the others go on
                if os.environ.get("MOEJAX_TRACEBACK"):
                    raise
                failures.append(f"{experiment.name}: {type(error).__name__}: {' '.join(str(error).split())}")

        try:
            for group in self.groups():
                names = ", ".join(experiment.name for experiment in group)
                self.notes.print(names, soft_wrap=True)
                summary = self._run_group(group, executor)
                compilations += summary.compilations
                self.notes.print(
                    f"  {summary.trials_run:,} trials run, {summary.trials_reused:,} reused, "
                    f"{summary.compilations} compilations, {duration(summary.wall_seconds)}"
                )
                for experiment in group:
                    finish(experiment, *self._sweep_rows(experiment))
            for experiment in self.studies:
                self.notes.print(experiment.name)
                table, facts = self._study_rows(experiment, executor)
                compilations += facts.compilations
                finish(experiment, table, facts)
        finally:
            executor.end()
        if self.place.workers > 1:  # else this process is the worker, and its compilations are counted
            compilations += compilations_so_far()[0] - compiled_before
        write_gallery(folder, load_experiments(self.root, quick=self.quick), self.root)
        seconds = time.monotonic() - started
        self.tables.print(
            f"{len(written)} experiments in {duration(seconds)}, {compilations} compilations; "
            f"figures and tables in {folder}",
            soft_wrap=True,
        )
        if failures:
            raise ValueError("; ".join(failures))
        return {"results": str(folder), "seconds": seconds, "compilations": compilations}

    def _run_group(self, group: Sequence[Experiment], executor: Any) -> Any:
        from moejax.sweep.progress import sweep_progress
        from moejax.sweep.together import Part, join_plans, run_together

        plans = [self.plans[experiment.name] for experiment in group]
        joint = join_plans(plans, **self.limits)
        parts = [
            Part(
                self.plans[experiment.name],
                self.folder(experiment),
                experiment.spec_path,
                override_texts(experiment.overrides),
            )
            for experiment in group
        ]
        settings = dataclasses.replace(self.settings[group[0].name], plugins=joint.plan.plugins)
        with sweep_progress(self.notes, self.quiet) as progress:
            return run_together(parts, joint, executor, settings, progress, self.place.description)

    def _sweep_rows(self, experiment: Experiment) -> tuple[pd.DataFrame, RunFacts]:
        from moejax.sweep.tables import load, load_chunks, load_runs

        folder = self.folder(experiment)
        table = load(folder, seconds=bool(experiment.get("SECONDS", False)), result_hash=True)
        wanted = table["trial"] < self.plans[experiment.name].spec.most_trials
        table = table[wanted].reset_index(drop=True)  # a larger run of the same cells may have left more
        extend = experiment.get("extend")
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

    def _study_rows(self, experiment: Experiment, executor: Any) -> tuple[pd.DataFrame, RunFacts]:
        from moejax.sweep.provenance import git_state
        from moejax.sweep.study import run_study

        started = time.monotonic()
        run = run_study(self.units[experiment.name], executor, lambda line: self.notes.print(f"  {line}"))
        extend = experiment.get("extend")
        table = run.table if extend is None else extend(run.table, self.folder(experiment))
        return table, RunFacts(
            spec_json=self.study_specs[experiment.name].to_json(),
            runs=[
                {
                    "git": git_state(Path(__file__).parent),
                    "trials": len(run.table),
                    "xla_flags": os.environ.get("XLA_FLAGS", ""),
                }
            ],
            started=run.started,
            wall_seconds=time.monotonic() - started,
            worker_seconds=run.worker_seconds,
            compile_seconds=run.compile_seconds,
            compilations=run.compilations,
            precision=experiment.get("PRECISION", "float64"),
            workers=self.place.description,
        )

    def _results_folder(self) -> Path:
        """Where results go: a quick run, or one of another seed, never replaces a full run's."""
        if self.out is not None:
            return Path(self.out)
        if self.seed is not None:
            return self.root / RUNS_FOLDER / f"seed-{self.seed}" / RESULTS_FOLDER
        folder = self.root / RESULTS_FOLDER
        manifests = [_read_manifest(folder / experiment.name) for experiment in self.sweeps + self.studies]
        if self.quick and any(manifest is not None and not manifest.get("quick") for manifest in manifests):
            return self.root / RUNS_FOLDER / "quick" / RESULTS_FOLDER
        return folder

    def _write(self, experiment: Experiment, table: pd.DataFrame, facts: RunFacts, folder: Path) -> Path:
        """table.csv first; everything else is made from it, read back."""
        from moejax.claims import SUMMARY_NAME, TABLE_NAME, claims_json, read_results, render

        folder.mkdir(parents=True, exist_ok=True)
        write_table(table, folder / TABLE_NAME)
        table = read_results(folder)[TABLE_NAME]
        summary = experiment.get("summary")
        if summary is not None:
            write_table(summary(table), folder / SUMMARY_NAME)
        save_figure(experiment.module.figure(table), folder)
        sentence, claims = render(
            experiment.get("SHOWS", ""), experiment.get("NUMBERS", {}), read_results(folder)
        )
        _write_json(folder / "claims.json", claims_json(sentence, claims))
        _write_json(folder / MANIFEST_NAME, self._manifest(experiment, table, facts))
        self.notes.print(f"  written: {folder}", soft_wrap=True)
        return folder

    def _manifest(self, experiment: Experiment, table: pd.DataFrame, facts: RunFacts) -> dict[str, Any]:
        from moejax.sweep.provenance import git_state, processor_name

        text = experiment.spec_path.read_text(encoding="utf-8")
        reasons = table.loc[table["status"] != 0, "reason"] if "status" in table else None
        failed = 0 if reasons is None else len(reasons)
        counted = {} if reasons is None else {str(k): int(v) for k, v in reasons.value_counts().items()}
        started = datetime.datetime.fromtimestamp(facts.started, datetime.UTC)
        return {
            "name": experiment.name,
            "command": shlex.join(_canonical_command([experiment.name], self.quick, self.seed)),
            "quick": self.quick,
            "spec_file": _relative(experiment.spec_path, self.root),
            "spec_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "spec_text": text,
            "overrides": list(override_texts(experiment.overrides)),
            "spec": json.loads(facts.spec_json),
            "git": git_state(Path(__file__).parent),
            "runs": facts.runs,
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "precision": facts.precision,
            "system": platform.platform(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "workers": facts.workers,
            "rows": len(table),
            "not_ok": failed,
            "not_ok_reasons": counted,
            "started": started.isoformat(timespec="seconds"),
            "wall_seconds": round(facts.wall_seconds, 1),
            "worker_seconds": round(facts.worker_seconds, 1),
            "compile_seconds": round(facts.compile_seconds, 1),
            "compilations": facts.compilations,
        }


def _plain_worker_settings() -> Any:
    import jax

    from moejax.sweep.chunk import WorkerSettings

    return WorkerSettings(
        enable_x64=bool(jax.config.values["jax_enable_x64"]),
        compilation_cache_dir=jax.config.values["jax_compilation_cache_dir"],
    )


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A CSV with seven significant digits; lists as text."""
    for name in table:
        if table[name].map(lambda value: isinstance(value, tuple | list)).any():
            table = table.assign(
                **{
                    str(name): table[name].map(
                        lambda v: json.dumps(list(v)) if isinstance(v, tuple | list) else v
                    )
                }
            )
    table.to_csv(path, index=False, float_format=f"%.{SIGNIFICANT_DIGITS}g")


def save_figure(figure: Any, folder: Path) -> None:
    """figure.png and figure.pdf, the same bytes for the same figure.

    Raises:
        ValueError: it is no matplotlib Figure.
    """
    from matplotlib.figure import Figure

    if not isinstance(figure, Figure):
        raise ValueError(f"figure: expected a matplotlib Figure, got {type(figure).__name__}")
    figure.savefig(folder / "figure.png", dpi=150, metadata={"Software": None})
    figure.savefig(folder / "figure.pdf", metadata={"CreationDate": None})


def write_gallery(folder: Path, experiments: Sequence[Experiment], root: Path) -> None:
    """README.md of a results folder: every figure that is there, with what it shows and does not show."""
    from moejax.claims import MISSING

    lines = [
        "# Results",
        "",
        "Made by `moejax reproduce`; this page too. Every number is followed by its Monte Carlo standard error and comes from",
        "the table that is named beside it; `claims.json` says which rows.",
        "",
    ]
    for experiment in experiments:
        results = folder / experiment.name
        manifest = _read_manifest(results)
        if manifest is None or not (results / "claims.json").is_file():
            continue
        shows = json.loads((results / "claims.json").read_text(encoding="utf-8"))["text"]
        shows = "" if MISSING in shows else shows  # a quick run may lack the rows
        name, quick = experiment.name, " (quick run)" if manifest["quick"] else ""
        source = f"[{name}/claims.json]({name}/claims.json)"
        lines += [
            f"## {name}{quick}",
            "",
            f"![{name}]({name}/figure.png)",
            "",
            *([f"{shows} {source}", ""] if shows else []),
            *([experiment.get("SHOWS_NOT"), ""] if experiment.get("SHOWS_NOT") else []),
            f"`{manifest['command']}` · [table]({name}/table.csv) · [PDF]({name}/figure.pdf) · [manifest]({name}/{MANIFEST_NAME})",
            "",
        ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a results folder."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(
        json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def _relative(path: Path, root: Path) -> str:
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
