"""The coordinator's loop: it hands out chunks, commits results, isolates failures and stops precise cells."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from moejax.environment import out_of_memory
from moejax.sweep import trial as core
from moejax.sweep.execution.executors import Executor, Outcome
from moejax.sweep.execution.signals import raise_if_stopped
from moejax.sweep.execution.work_queue import Chunk, FailedTrials, GivenUp, WorkQueue
from moejax.sweep.plan.chunks import RAISED, WORKER_DIED, ChunkResult, ChunkTask, WorkerSettings, chunk_task
from moejax.sweep.plan.costs import CostModel
from moejax.sweep.plan.plan import Plan
from moejax.sweep.store.store import COMMIT_SECONDS, Store

TELL_SECONDS = 1.0
"""The time left is computed again after this time: a plan may have thousands of programs."""


class Progress(Protocol):
    """Receiver of the engine's progress."""

    def update(
        self,
        trials_done: int,
        trials_known: int,
        work_done: float,
        work_known: float,
        seconds_left: float | None,
    ) -> None:
        """Counts so far, and the time left if it is known; `known` grows when cells ask for more trials."""

    def note(self, line: str) -> None:
        """A line on an event: a worker died, trials failed."""


@dataclasses.dataclass
class RunSummary:
    """Counts and times of one run of the engine."""

    trials_run: int = 0
    trials_reused: int = 0
    wall_seconds: float = 0.0
    compile_seconds: float = 0.0
    compilations: int = 0
    execute_seconds: float = 0.0
    padded_trials: int = 0
    """Trials that only filled the last chunk of a bucket."""
    failures: Counter[str] = dataclasses.field(default_factory=Counter)
    """Reasons for trials of this run that are not ok."""
    not_tried: int = 0
    """Trials that were not tried, because their program never worked."""
    trials_broken: int = 0
    """Trials of this run without a result: they raised, their worker died, or their cell could not be prepared."""
    broken_before: int = 0
    """Trials without a result from earlier runs."""

    @property
    def nothing_worked(self) -> bool:
        """True if no trial that the spec asks for has a result."""
        total = self.trials_run + self.trials_reused
        return total > 0 and self.trials_broken + self.broken_before == total


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the sweeps that run together."""

    plan: Plan
    store: Store
    first: int
    """Position of its first cell in the plan of all."""
    only: frozenset[int] | None = None
    """The trials of every cell that run; None: all of the plan."""

    def left_out(self, target: int) -> set[int]:
        """The trials below a target that do not run."""
        return set() if self.only is None else set(range(target)) - self.only


class Engine:
    """Runs the plan of one sweep, or of several together, with an executor; each part's rows go into its own store."""

    def __init__(
        self,
        plan: Plan,
        parts: Sequence[Part],
        start_executor: Callable[[], Executor],
        settings: WorkerSettings,
        progress: Progress,
        costs: CostModel | None = None,
    ):
        """Prepare a run.

        Args:
            plan: the joint plan, from `join_plans`.
            parts: the sweeps, in the order of the plan's cells.
            start_executor: called at most once, if there are trials to run; its owner ends it.
            settings: settings of the workers.
            progress: receives the progress of all sweeps.
            costs: seconds of trials that are known already; those of this run are added.
        """
        self._plan = plan
        self._parts = parts
        self._start_executor = start_executor
        self._settings = settings
        self._progress = progress
        self._queue = WorkQueue(plan)
        self._running: dict[int, tuple[str, Chunk, int]] = {}
        """Ticket -> (worker, chunk, trials side by side)."""
        self._workers: set[str] = set()
        self._ticket = 0
        self._work_done = self._work_known = 0.0
        self._trials_known = 0
        self._targets = [0] * len(plan.cells)
        self._left = [0] * len(plan.cells)
        """Trials of each cell that are queued or running."""
        self._values: dict[int, dict[int, float]] = {}
        """With [precision]: plan position -> trial -> value of the target metric."""
        self._costs = CostModel() if costs is None else costs
        self._done_here = [0] * len(plan.buckets)
        """Trials of each bucket that this run has settled."""
        self._left_of_bucket = [0] * len(plan.buckets)
        """Trials of each bucket that are queued or running."""
        self._told: tuple[float, float | None] = (-math.inf, None)
        """When the time left was computed last, and its value."""
        self._started: float | None = None
        self.summary = RunSummary()

    def run(self) -> RunSummary:
        """Run until every cell has the trials it needs.

        Raises:
            StoreError: the store failed; ClusterError: the cluster is lost; KeyboardInterrupt. In each
                case finished trials are committed as far as the stores allow, and the same command resumes.
        """
        self._fill()
        self._tell()
        if not len(self._queue):
            return self.summary
        executor = self._start_executor()
        started = self._started = time.monotonic()
        try:
            while True:
                raise_if_stopped()
                self._hand_out(executor)
                if not self._running and not len(self._queue):
                    break
                for line in executor.news():
                    self._progress.note(line)
                for outcome in executor.wait(COMMIT_SECONDS):
                    self._settle(outcome)
                for part in self._parts:
                    part.store.commit_if_due()
                self._tell()
        finally:
            self.summary.wall_seconds = time.monotonic() - started
            for part in self._parts:
                part.store.commit()
        return self.summary

    def _fill(self) -> None:
        """Queue the missing trials; only committed rows count."""
        rule = self._plan.spec.precision  # with a precision rule, there is a single part
        for part in self._parts:
            committed = part.store.committed(None if rule is None else rule.metric)
            for position, have in enumerate(committed, part.first):
                left_out: set[int] = set()
                if rule is None:
                    target = part.plan.spec.first_target
                    left_out = part.left_out(target) - have.values.keys()
                    self._raise_target(position, target, have.values.keys() | left_out)
                    self._trials_known -= len(left_out)
                    self._work_known -= len(left_out) * self._work(position)
                else:
                    self._values[position] = have.values
                    self._judge(position)
                target = self._targets[position]
                reused = target - self._left[position] - len(left_out)
                self.summary.trials_reused += reused
                self.summary.broken_before += sum(trial < target for trial in have.broken)
                self._work_done += reused * self._work(position)

    def _work(self, position: int) -> float:
        return self._plan.buckets[self._plan.cells[position].bucket].work

    def _raise_target(self, position: int, target: int, have: Collection[int]) -> None:
        before = self._targets[position]
        self._targets[position] = target
        self._trials_known += target - before
        self._work_known += (target - before) * self._work(position)
        missing = (trial for trial in range(before, target) if trial not in have)
        count = target - before - sum(before <= trial < target for trial in have)
        self._queue.add(position, missing, count)
        self._left[position] += count
        self._left_of_bucket[self._plan.cells[position].bucket] += count

    def _judge(self, position: int) -> None:
        """At each look, give a cell more trials, until it is precise, at its maximum, or has trials to run."""
        rule = self._plan.spec.precision
        if rule is None:
            return
        values = self._values[position]
        while self._left[position] == 0:
            first = np.array([values.get(trial, math.nan) for trial in range(self._targets[position])])
            target, _ = rule.target_after(first)
            if target <= self._targets[position]:
                return
            self._raise_target(position, target, values)

    def _hand_out(self, executor: Executor) -> None:
        loads: dict[str, list[Chunk]] = {worker: [] for worker in executor.workers()}
        for worker in self._workers - set(loads):
            self._queue.forget_worker(worker)
        self._workers = set(loads)
        for worker, chunk, _ in self._running.values():
            if worker in loads:
                loads[worker].append(chunk)
        for slot in range(executor.slots):  # every worker gets a first chunk before any gets a second
            for worker, chunks in loads.items():
                if len(chunks) > slot or any(chunk.suspect for chunk in chunks):
                    continue
                chunk = self._queue.take(worker, idle=not chunks)
                if chunk is not None:
                    chunks.append(chunk)
                    executor.submit(worker, *self._task(worker, chunk))

    def _task(self, worker: str, chunk: Chunk) -> tuple[int, ChunkTask]:
        """A new ticket, and the message for the chunk."""
        bucket = self._plan.buckets[chunk.bucket]
        self._ticket += 1
        self._running[self._ticket] = (worker, chunk, bucket.vmap_width)
        return self._ticket, chunk_task(self._plan, bucket, chunk.trials, self._settings)

    def _settle(self, outcome: Outcome) -> None:
        worker, chunk, width = self._running.pop(outcome.ticket)
        if outcome.result is not None:
            result = outcome.result
            self._queue.succeeded(chunk, result.wall_seconds, result.compile_seconds)
            self.summary.compile_seconds += result.compile_seconds
            self.summary.compilations += result.compilations
            self.summary.execute_seconds += result.execute_seconds
            size = self._plan.buckets[chunk.bucket].chunk_size
            self._costs.add(self._plan.buckets[chunk.bucket].shape, result.execute_seconds, size)
            self.summary.padded_trials += self._plan.buckets[chunk.bucket].chunk_size - len(chunk.trials)
            self._commit(chunk, result, chunk.attempts + 1)
            return
        if out_of_memory(outcome.reason) and width > 1:
            self._run_narrower(chunk, width)
            return
        if outcome.worker_died:
            self._queue.forget_worker(worker)
        label = self._plan.buckets[chunk.bucket].label
        if not chunk.suspect:  # report the first failure of a chunk, not every step of its isolation
            self._progress.note(f"{label}: {outcome.reason}; its chunk is run again in parts")
        status = WORKER_DIED if outcome.worker_died else RAISED
        failed, given_up = self._queue.failed(chunk, status, outcome.reason, outcome.worker_died)
        if failed is not None:
            if outcome.worker_died:
                self._progress.note(f"{label}: {failed.reason}: {len(failed.chunk.trials)} failed")
            self._commit(failed.chunk, _failed_result(failed), failed.chunk.attempts)
        if given_up is not None:
            self._give_up(given_up)

    def _run_narrower(self, chunk: Chunk, width: int) -> None:
        """Run a chunk again that was too large for the device's memory, with half as many trials side by side."""
        bucket = self._plan.buckets[chunk.bucket]
        if bucket.vmap_width >= width:  # otherwise another chunk has lowered the width already
            bucket.vmap_width = width // 2
            self._progress.note(
                f"{bucket.label}: memory ran out with {width} trials side by side; on with {bucket.vmap_width}"
            )
        self._queue.again(chunk)

    def _give_up(self, given_up: GivenUp) -> None:
        """Count the remaining trials of a program that never worked; the same command tries them again."""
        bucket = self._plan.buckets[given_up.bucket]
        self.summary.not_tried += given_up.trials
        self._trials_known -= given_up.trials
        self._left_of_bucket[given_up.bucket] -= given_up.trials
        self._work_known -= given_up.trials * bucket.work
        self._progress.note(
            f"{bucket.label}: given up, {given_up.trials:,} trials not tried: {given_up.reason}"
        )

    def _commit(self, chunk: Chunk, result: ChunkResult, attempts: int) -> None:
        bucket = self._plan.buckets[chunk.bucket]
        members: dict[int, list[int]] = {}
        for index, (position, _) in enumerate(chunk.trials):
            which = bisect.bisect_right(self._parts, position, key=lambda part: part.first) - 1
            members.setdefault(which, []).append(index)
        for number, (which, indices) in enumerate(members.items()):
            part = self._parts[which]
            size = max(round(bucket.chunk_size * len(indices) / len(chunk.trials)), 1)
            part.store.add_chunk(
                bucket.label,
                [(chunk.trials[index][0] - part.first, chunk.trials[index][1]) for index in indices],
                result.part(indices, compiled_here=number == 0),
                attempts,
                size,
                bucket.vmap_width,
            )
        self.summary.trials_run += len(chunk.trials)
        self._done_here[chunk.bucket] += len(chunk.trials)
        self._left_of_bucket[chunk.bucket] -= len(chunk.trials)
        self._work_done += len(chunk.trials) * bucket.work
        for index, status in enumerate(result.status.tolist()):
            self.summary.trials_broken += status < 0
            if status:
                self.summary.failures[
                    result.reasons.get(index) or core.STATUS_REASONS.get(status, str(status))
                ] += 1
        rule = self._plan.spec.precision
        touched = set()
        for index, (position, trial) in enumerate(chunk.trials):
            self._left[position] -= 1
            touched.add(position)
            if rule is not None:
                self._values[position][trial] = float(result.metrics[rule.metric][index])
        for position in touched:
            if rule is not None and self._left[position] == 0:
                self._judge(position)

    def _tell(self) -> None:
        done = self.summary.trials_run + self.summary.trials_reused
        self._progress.update(
            done, self._trials_known, self._work_done, self._work_known, self._seconds_left()
        )

    def _seconds_left(self) -> float | None:
        """The time so far, times the ratio of the modelled time of what is left to that of what is done; None at the beginning.

        Both have the compilations: those done, and as many more as there are programs without a finished chunk.
        """
        now = time.monotonic()
        if self._started is None or not any(self._done_here):
            return None
        if now < self._told[0] + TELL_SECONDS:
            return self._told[1]
        compiled = max(self.summary.compilations, 1)
        done_cost, left_cost = self.summary.compile_seconds, 0.0
        for bucket, done, trials in zip(
            self._plan.buckets, self._done_here, self._left_of_bucket, strict=True
        ):
            seconds = self._costs.seconds(bucket.shape) or 0.0
            done_cost += done * seconds
            left_cost += trials * seconds
            if trials and not done:
                left_cost += self.summary.compile_seconds / compiled
        left = (now - self._started) * left_cost / done_cost if done_cost > 0 else None
        self._told = (now, left)
        return left


def _failed_result(failed: FailedTrials) -> ChunkResult:
    """Rows for trials that could not be run."""
    trials = len(failed.chunk.trials)
    return ChunkResult(
        metrics={name: np.full(trials, np.nan) for name in core.metric_names()},
        status=np.full(trials, failed.status),
        reasons=dict.fromkeys(range(trials), failed.reason),
        arrays={},
        started=time.time(),
    )
