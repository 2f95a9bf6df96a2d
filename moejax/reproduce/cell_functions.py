"""Studies that are not recovery sweeps: an experiment's own function runs on a grid of cells, on the workers of a sweep.

The experiment's file has `run_cell(cell) -> DataFrame`; its spec is a TOML file with `study = true` and plain values; lists in
[grid] are axes. A finished cell is a Parquet file in the run folder, named by a hash of the cell and the experiment's source, so
the same command again runs only missing cells. Cells that share a compiled program run one after the other, in one process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moejax.checks import describe
from moejax.console import shorten
from moejax.registry import nearest
from moejax.reproduce.experiment import load_experiment
from moejax.sweep.execution.executors import Executor
from moejax.sweep.execution.provenance import check_same_code, made_by
from moejax.sweep.execution.signals import raise_if_stopped
from moejax.sweep.execution.worker import compilations_so_far, configure, make_room_for_programs
from moejax.sweep.plan.chunks import RAISED, WORKER_DIED, WorkerSettings
from moejax.sweep.plan.identity import canonical_json
from moejax.sweep.plan.user_code import read_user_file
from moejax.sweep.spec.fields import LONGEST_SHOWN, show
from moejax.sweep.spec.parse import MAX_CELLS, STUDY_KEY, read_spec_text
from moejax.sweep.spec.positions import SpecError, parse_toml

POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """A checked spec of a study."""

    name: str
    cells: tuple[Mapping[str, Any], ...]
    """Every combination of the axes, with the fixed values."""

    def to_json(self) -> str:
        """The cells of the run, for the provenance."""
        return json.dumps({"name": self.name, "cells": list(self.cells)})


def read_study(path: Path, overrides: Mapping[str, Any]) -> StudySpec:
    """Read the spec of a study.

    Args:
        path: the TOML file.
        overrides: key -> value, or list of values of an axis, that replaces the file's.

    Raises:
        SpecError: the file is not readable, not TOML or no study, an axis is no list, or an override has an unknown key.
    """
    document = parse_toml(read_spec_text(path), path)
    if document.pop(STUDY_KEY, None) is not True:
        raise SpecError(f"{path}: missing: {STUDY_KEY} = true, which says that it is no sweep")
    grid = document.pop("grid", {})
    if not isinstance(grid, dict):
        raise SpecError(f"{path}: grid: {show(grid)} is not accepted: expected a table, [grid]")
    for key, value in overrides.items():
        name = key.removeprefix("grid.")
        if name not in grid and name not in document:
            raise SpecError(f"{path}: {key}: unknown key; {nearest(name, [*grid, *document])}")
        target = grid if name in grid else document
        target[name] = value
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise SpecError(f"{path}: {name} = {show(values)} is not accepted: expected a list of values")
    name = str(document.pop("name", Path(path).stem))
    number = math.prod(len(values) for values in grid.values())
    if number > MAX_CELLS:
        raise SpecError(f"{path}: grid: expected at most {MAX_CELLS:,} cells, got {show(number)}")
    cells = [document | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return StudySpec(name, tuple(cells))


@dataclasses.dataclass(frozen=True)
class StudyUnit:
    """Cells of one compiled program, the message to a worker."""

    experiment: Path
    cells: tuple[Mapping[str, Any], ...]
    parts: tuple[Path, ...]
    """The Parquet file of each cell."""
    double_precision: bool
    settings: WorkerSettings


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """The outcome of a unit besides its files: failed cells, by position."""

    failures: Mapping[int, str]


def run_unit(unit: StudyUnit) -> UnitResult:
    """Run the cells of a unit in this process; each is stored on disk before the next begins."""
    configure(unit.settings)
    make_room_for_programs()
    import jax

    run_cell = load_experiment(unit.experiment).run_cell
    assert run_cell is not None
    failures = {}
    for index, (cell, part) in enumerate(zip(unit.cells, unit.parts, strict=True)):
        started, clock = time.time(), time.perf_counter()
        before = compilations_so_far()
        try:
            with jax.enable_x64(unit.double_precision):
                table = run_cell(dict(cell))
        except Exception as error:  # a study may raise any error: the other cells go on
            failures[index] = describe(error)
            continue
        count, seconds = (now - then for now, then in zip(compilations_so_far(), before, strict=True))
        facts = {
            "started": started,
            "wall_seconds": time.perf_counter() - clock,
            "compilations": count,
            "compile_seconds": seconds,
            "made_by": made_by(),
        }
        part.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        unfinished = part.with_suffix(".tmp")
        table.to_parquet(unfinished, index=False)
        unfinished.replace(part)
    return UnitResult(failures)


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """The rows of a study, and the record of its run."""

    table: pd.DataFrame
    """Cell values, the experiment's columns, `status` (0 is ok) and `reason`."""
    cells_run: int
    worker_seconds: float
    compile_seconds: float
    compilations: int
    started: float
    """Unix time of the oldest cell."""


def study_units(
    experiment: Path,
    spec: StudySpec,
    folder: Path,
    *,
    program: Sequence[str],
    double_precision: bool,
    settings: WorkerSettings,
) -> list[StudyUnit]:
    """The cells grouped by program: cells of a group agree in the fields named by `program`."""
    digest = read_user_file(experiment, str(experiment)).digest
    groups: dict[str, list[tuple[Mapping[str, Any], Path]]] = {}
    for cell in spec.cells:
        content = canonical_json({"cell": cell, "source": digest, "double": double_precision})
        part = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.parquet"
        groups.setdefault(canonical_json([cell.get(name) for name in program]), []).append((cell, part))
    return [
        StudyUnit(
            experiment,
            tuple(cell for cell, _ in group),
            tuple(part for _, part in group),
            double_precision,
            settings,
        )
        for group in groups.values()
    ]


def run_study(
    units: Sequence[StudyUnit],
    start_executor: Callable[[], Executor],
    note: Callable[[str], None] = lambda line: None,
    across_versions: bool = False,
) -> StudyRun:
    """Run the missing cells of a study and read all of them.

    Args:
        units: from `study_units`.
        start_executor: returns the executor, which runs one unit at a time on each worker; called only if cells are missing.
        note: receives a line for every unit that ends.
        across_versions: if true, cells made by other code may stay.

    Raises:
        StoreError: other code made a finished cell. ValueError: a finished cell cannot be read.
    """
    for part in (part for unit in units for part in unit.parts):
        if part.exists():
            check_same_code(_facts(part).get("made_by", {}), across_versions, part)
    failures: dict[Path, tuple[int, str]] = {}
    waiting = [_missing(unit) for unit in units]
    waiting = [unit for unit in waiting if unit.cells]
    cells_run = sum(len(unit.cells) for unit in waiting)
    running: dict[int, tuple[str, StudyUnit]] = {}
    ticket, ended, total = 0, 0, len(waiting)
    for unit in waiting:
        unit.parts[0].parent.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        raise_if_stopped()
        executor = start_executor()
        busy = {worker for worker, _ in running.values()}
        for worker in executor.workers():  # called even if no unit waits: it detects lost units
            if worker not in busy and waiting:
                ticket += 1
                running[ticket] = (worker, waiting.pop(0))
                executor.submit(worker, ticket, running[ticket][1], run_unit)
        for line in executor.news():
            note(line)
        for outcome in executor.wait(POLL_SECONDS):
            _, unit = running.pop(outcome.ticket)
            ended += 1
            if outcome.result is not None:
                for index, reason in outcome.result.failures.items():
                    failures[unit.parts[index]] = (RAISED, reason)
            else:
                status = WORKER_DIED if outcome.worker_died else RAISED
                failures |= {part: (status, outcome.reason) for part in unit.parts if not part.exists()}
            note(f"{ended} of {total} programs done")
    return _collect(units, failures, cells_run)


def _missing(unit: StudyUnit) -> StudyUnit:
    left = [index for index, part in enumerate(unit.parts) if not part.exists()]
    return dataclasses.replace(
        unit,
        cells=tuple(unit.cells[index] for index in left),
        parts=tuple(unit.parts[index] for index in left),
    )


def _facts(part: Path) -> dict[str, Any]:
    """The record of a finished cell: times, compilations and code."""
    try:
        return json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(part, error) from None


def _unreadable(part: Path, error: Exception) -> ValueError:
    reason = shorten(" ".join(str(error).split()), LONGEST_SHOWN)
    return ValueError(
        f"{part}: a finished cell cannot be read ({reason}); remove the file and the same command runs this cell again"
    )


def _collect(
    units: Sequence[StudyUnit], failures: Mapping[Path, tuple[int, str]], cells_run: int
) -> StudyRun:
    tables, facts = [], []
    for unit in units:
        for cell, part in zip(unit.cells, unit.parts, strict=True):
            if part in failures:
                status, reason = failures[part]
                rows = pd.DataFrame([{"status": status, "reason": reason}])
            else:
                try:
                    rows = pd.read_parquet(part)
                except (OSError, ValueError) as error:
                    raise _unreadable(part, error) from None
                facts.append(_facts(part))
                for name, nothing in (("status", 0), ("reason", "")):
                    if name not in rows:
                        rows[name] = nothing
            front = pd.DataFrame(
                {
                    name: [show(value) if isinstance(value, list) else value] * len(rows)
                    for name, value in cell.items()
                }
            )
            new = [name for name in front if name not in rows]
            tables.append(pd.concat([front[new], rows], axis=1))
    table = pd.concat(tables, ignore_index=True)
    last = ["status", "reason"]
    return StudyRun(
        table=table[[name for name in table if name not in last] + last],
        cells_run=cells_run,
        worker_seconds=sum(fact["wall_seconds"] for fact in facts),
        compile_seconds=sum(fact["compile_seconds"] for fact in facts),
        compilations=sum(fact["compilations"] for fact in facts),
        started=min((fact["started"] for fact in facts), default=time.time()),
    )
