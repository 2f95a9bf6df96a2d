"""Runs one sweep, or several together: cells of equal shape share a compiled program even if they come from different specs.

Each sweep has its own store, so that its table, its resume and its status are the same as when it runs alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.sweep.execution.engine import Engine, Part, Progress, RunSummary
from moejax.sweep.execution.executors import Workers
from moejax.sweep.execution.provenance import check_resumable, collect_provenance
from moejax.sweep.plan.chunks import WorkerSettings
from moejax.sweep.plan.costs import CostModel
from moejax.sweep.plan.plan import Plan, set_measured_chunk_sizes
from moejax.sweep.store.costs import read_costs
from moejax.sweep.store.repair import repair_store
from moejax.sweep.store.store import Store


@dataclasses.dataclass(frozen=True)
class PlannedSweep:
    """A planned sweep, and its folder."""

    plan: Plan
    folder: Path
    overrides: tuple[str, ...] = ()
    across_versions: bool = False
    """If true, the folder may hold results of other code."""
    only: frozenset[int] | None = None
    """The trials of every cell that run; None: all. A plan that stops by precision runs all."""


def run_sweeps(
    sweeps: Sequence[PlannedSweep],
    plan: Plan,
    workers: Workers,
    settings: WorkerSettings,
    progress: contextlib.AbstractContextManager[Progress],
    note: Callable[[str], None],
    *,
    retry_failed: bool = False,
    repair: bool = False,
    costs: CostModel | None = None,
    limits: Mapping[str, Any] | None = None,
) -> RunSummary:
    """Run or resume sweeps, each into its own store. All are checked before the first is written.

    Args:
        sweeps: one, or several that run together.
        plan: their joint plan, from `join_plans`, in their order.
        workers: started if there are trials to run; they stay for the next call.
        settings: settings of the workers.
        progress: context manager, entered when the run begins; receives the progress of all sweeps.
        note: receives lines about the steps before the run.
        retry_failed: run trials again that have no result.
        repair: first reduce the stores to their sound rows.
        costs: seconds of trials that a pilot has measured; those in the stores are added.
        limits: options of `make_plan` for chunk sizes by measured seconds; None: the plan's own sizes.

    Raises:
        StoreError, ClusterError, KeyboardInterrupt: finished trials are committed, and the same call resumes; a
            KeyboardInterrupt has a note on the trials kept in each folder.
    """
    provenances = [
        collect_provenance(sweep.plan, sweep.overrides, workers.description, workers.xla_flags)
        for sweep in sweeps
    ]
    parts: list[Part] = []
    costs = CostModel() if costs is None else costs
    sizes: dict[str, tuple[int, int]] = {}
    with contextlib.ExitStack() as stack:
        for sweep in sweeps:
            check = functools.partial(
                check_resumable, across_versions=sweep.across_versions, folder=sweep.folder
            )
            if repair:
                note(repair_store(sweep.folder, check))
            store = stack.enter_context(contextlib.closing(Store(sweep.folder, check, note)))
            for label, program in read_costs(store.path).items():
                costs.add(program.shape, program.seconds, program.trials)
                sizes[label] = (program.chunk_size, program.vmap_width)
            first = sum(len(part.plan.cells) for part in parts)
            parts.append(Part(sweep.plan, store, first, sweep.only))
        if limits is not None and len(sweeps) == 1:
            set_measured_chunk_sizes(plan, costs, sizes, **limits)
        workers.join(note)
        for part in parts:  # the folders are written from here on
            stack.enter_context(part.store)
            if part.store.journal_mode != "wal":
                note(
                    f"{part.store.folder}: this file system cannot share memory; the store uses a rollback journal"
                )
        try:
            for part, provenance in zip(parts, provenances, strict=True):
                part.store.begin_run(part.plan, provenance)
                if retry_failed:
                    part.store.forget_failures()
            with progress as shown:
                summary = Engine(plan, parts, workers.executor, settings, shown, costs).run()
            for part in parts:
                part.store.end_run(summary.wall_seconds, summary.compile_seconds)
        except KeyboardInterrupt as stop:
            for part in parts:
                kept = sum(len(cell.values) for cell in part.store.committed())
                stop.add_note(f"{kept:,} trials are kept in {part.store.folder}")
            raise
    return summary
