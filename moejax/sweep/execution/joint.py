"""Several sweeps as one: cells of equal shape share a compiled program, whichever spec they come from.

Each sweep keeps a store of its own, so that its table, its resume and its status are what they are when it runs alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from moejax.sweep.execution.engine import Engine, Progress, RunSummary
from moejax.sweep.execution.executors import Executor, Outcome
from moejax.sweep.execution.provenance import check_resumable, collect_provenance
from moejax.sweep.execution.worker import run_chunk
from moejax.sweep.plan.chunks import ChunkResult, WorkerSettings
from moejax.sweep.plan.joint import JointPlan
from moejax.sweep.plan.plan import Plan
from moejax.sweep.store.store import Store


@dataclasses.dataclass(frozen=True)
class Part:
    """One sweep of several."""

    plan: Plan
    folder: Path
    spec_path: Path
    overrides: tuple[str, ...] = ()
    across_versions: bool = False
    """Whether the folder may hold results of other code."""

    @property
    def trials(self) -> int:
        """Trials of every cell."""
        return self.plan.spec.first_target


def run_together(
    parts: Sequence[Part],
    joint: JointPlan,
    executor: KeptExecutor,
    settings: WorkerSettings,
    progress: Progress,
    workers: str,
) -> RunSummary:
    """Run or resume the parts, each into its own store.

    Args:
        parts: in the order of the joint plan.
        joint: of `join_plans`.
        executor: kept for the next call.
        settings: of the workers.
        progress: told how far the whole is.
        workers: in words, for the provenance.

    Raises:
        StoreError, ClusterError, KeyboardInterrupt: what has ended is committed, and the same call resumes.
    """
    provenances = [collect_provenance(part.plan, part.spec_path, part.overrides, workers) for part in parts]
    with contextlib.ExitStack() as stack:
        stores = []
        for part in parts:  # all are checked before one is written
            check = functools.partial(
                check_resumable, across_versions=part.across_versions, folder=part.folder
            )
            stores.append(stack.enter_context(contextlib.closing(Store(part.folder, check, progress.note))))
        for part, store, provenance in zip(parts, stores, provenances, strict=True):
            stack.enter_context(store).begin_run(part.plan, provenance)
        all_stores = cast(Store, _PartStores(stores, joint.offsets))
        engine = _JointEngine(joint, all_stores, lambda: executor, settings, progress)
        summary = engine.run()
        for store in stores:
            store.end_run(summary.wall_seconds, summary.compile_seconds)
    return summary


class KeptExecutor:
    """An executor whose workers, and the programs they have compiled, stay for the next sweep."""

    def __init__(self, start: Callable[[], Executor]):
        """`start` is called with the first chunk."""
        self._start = start
        self._executor: Executor | None = None

    def _running(self) -> Executor:
        if self._executor is None:
            self._executor = self._start()
        return self._executor

    @property
    def slots(self) -> int:
        return self._running().slots

    def workers(self) -> list[str]:
        return self._running().workers()

    def news(self) -> list[str]:
        return self._running().news()

    def submit(self, worker: str, ticket: int, task: Any, run: Callable[[Any], Any] = run_chunk) -> None:
        self._running().submit(worker, ticket, task, run)

    def wait(self, seconds: float) -> list[Outcome]:
        return self._running().wait(seconds)

    def close(self) -> None:
        """Does nothing: the workers stay for the next sweep; `end` stops them."""

    def end(self) -> None:
        """End the workers."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None


class _JointEngine(Engine):
    """An engine whose cells may want different numbers of trials."""

    def __init__(self, joint: JointPlan, *arguments: Any):
        self._cell_targets = joint.targets
        super().__init__(joint.plan, *arguments)

    def _fill(self) -> None:
        if self._plan.spec.precision is not None:
            return super()._fill()
        done, broken = self._store.done_trials(), self._store.broken_trials()
        for position, target in enumerate(self._cell_targets):
            self._raise_target(position, target, done.get(position, set()))
            reused = target - self._left[position]
            self.summary.trials_reused += reused
            self.summary.broken_before += sum(trial < target for trial in broken.get(position, ()))
            self._work_done += reused * self._work(position)
        return None


class _PartStores:
    """What the engine needs of a store, for several: each row goes to the store of its part."""

    def __init__(self, stores: Sequence[Store], offsets: Sequence[int]):
        self._stores = stores
        self._offsets = np.asarray(offsets)

    def _part(self, position: int) -> int:
        return int(np.searchsorted(self._offsets, position, side="right")) - 1

    def done_trials(self) -> dict[int, set[int]]:
        return self._of_all(Store.done_trials)

    def broken_trials(self) -> dict[int, set[int]]:
        return self._of_all(Store.broken_trials)

    def _of_all(self, trials_of: Callable[[Store], dict[int, set[int]]]) -> dict[int, set[int]]:
        return {
            int(offset) + position: trials
            for store, offset in zip(self._stores, self._offsets, strict=True)
            for position, trials in trials_of(store).items()
        }

    def metric_values(self, metric: str) -> Mapping[int, dict[int, float]]:
        (store,) = self._stores  # a sweep that stops by precision runs alone
        return store.metric_values(metric)

    def add_chunk(
        self,
        bucket: str,
        trials: Sequence[tuple[int, int]],
        result: ChunkResult,
        attempts: int,
        size: int,
        vmap_width: int,
    ) -> None:
        members: dict[int, list[int]] = {}
        for index, (position, _) in enumerate(trials):
            members.setdefault(self._part(position), []).append(index)
        for number, (part, indices) in enumerate(members.items()):
            offset = int(self._offsets[part])
            mine = [(trials[index][0] - offset, trials[index][1]) for index in indices]
            share = len(indices) / len(trials)
            shared = _part_of(result, indices, share, compiled_here=number == 0)
            self._stores[part].add_chunk(
                bucket, mine, shared, attempts, max(round(size * share), 1), vmap_width
            )

    def commit_if_due(self) -> None:
        for store in self._stores:
            store.commit_if_due()

    def commit(self) -> None:
        for store in self._stores:
            store.commit()


def _part_of(result: ChunkResult, indices: list[int], share: float, compiled_here: bool) -> ChunkResult:
    """The rows of one part, and its share of the times: a compilation is counted once, with the first part."""
    compile_seconds = result.compile_seconds if compiled_here else 0.0
    return dataclasses.replace(
        result,
        metrics={name: values[indices] for name, values in result.metrics.items()},
        status=result.status[indices],
        reasons={new: result.reasons[old] for new, old in enumerate(indices) if old in result.reasons},
        arrays={name: rows[indices] for name, rows in result.arrays.items()},
        wall_seconds=(result.wall_seconds - result.compile_seconds) * share + compile_seconds,
        compile_seconds=compile_seconds,
        compilations=result.compilations if compiled_here else 0,
        execute_seconds=result.execute_seconds * share,
    )
