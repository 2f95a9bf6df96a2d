"""The queue of trials: it chooses the next chunk for a worker, and handles failed chunks."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from moejax.console import shorten
from moejax.sweep.plan.chunks import ENGINE_STATUS_REASONS
from moejax.sweep.plan.plan import Plan

MAX_ATTEMPTS_ALONE = 2
"""A trial that fails this often on its own becomes a failed row."""
GIVE_UP_AFTER = 4
"""A program is given up after this many of its trials failed alone and none succeeded."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Trials of one bucket that run together; (plan position of the cell, trial) each."""

    bucket: int
    trials: tuple[tuple[int, int], ...]
    attempts: int = 0
    alone: int = 0
    """Attempts with a single trial."""

    @property
    def suspect(self) -> bool:
        """True for a part of a failed chunk: it runs with nothing else on its worker."""
        return self.attempts > 0


@dataclasses.dataclass(frozen=True)
class FailedTrials:
    """Trials that become failed rows."""

    chunk: Chunk
    status: int
    reason: str


@dataclasses.dataclass(frozen=True)
class GivenUp:
    """Trials of a program that never worked: they were not tried, and have no rows."""

    bucket: int
    trials: int
    reason: str


@dataclasses.dataclass
class _BucketQueue:
    pending: deque[Iterator[tuple[int, int]]]
    count: int = 0
    """Trials not yet handed out."""
    workers: set[str] = dataclasses.field(default_factory=set)
    """Workers that have this bucket's program compiled (or are compiling it)."""
    chunk_seconds: float = 0.0
    """Mean wall time of a chunk so far, without compilation."""
    chunks_done: int = 0
    compile_seconds: float = 0.0
    succeeded: bool = False
    isolated: int = 0
    """Trials that failed alone."""
    given_up: bool = False


class WorkQueue:
    """Pending trials by bucket.

    A worker stays with a bucket that it has compiled. Then it takes a bucket that no worker has started, the
    largest first. It helps with another worker's bucket only if that saves more time than one more
    compilation costs.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._buckets = [_BucketQueue(deque()) for _ in plan.buckets]
        self._suspects: list[Chunk] = []

    def add(self, position: int, trials: Iterable[int], count: int) -> None:
        """Queue `count` trials of a cell; they are drawn from the iterable when they are handed out."""
        if count:
            queue = self._buckets[self._plan.cells[position].bucket]
            queue.pending.append(zip(itertools.repeat(position), trials))
            queue.count += count

    def __len__(self) -> int:
        return sum(queue.count for queue in self._buckets) + sum(
            len(chunk.trials) for chunk in self._suspects
        )

    def take(self, worker: str, idle: bool) -> Chunk | None:
        """The next chunk for a worker, or None if it should get none; `idle` is true if nothing else runs there."""
        if idle and self._suspects:
            return self._suspects.pop()
        index = self._choose(worker)
        if index is None:
            return None
        queue = self._buckets[index]
        queue.workers.add(worker)
        trials = tuple(itertools.islice(self._drain(queue), self._plan.buckets[index].chunk_size))
        queue.count -= len(trials)
        return Chunk(index, trials)

    def again(self, chunk: Chunk) -> None:
        """Queue a chunk again whose failure was not its own."""
        self._suspects.append(chunk)

    def forget_worker(self, worker: str) -> None:
        """Remove a lost worker from the lists of workers with compiled programs."""
        for queue in self._buckets:
            queue.workers.discard(worker)

    def succeeded(self, chunk: Chunk, wall_seconds: float, compile_seconds: float) -> None:
        """Update times and counts after a chunk that succeeded."""
        queue = self._buckets[chunk.bucket]
        queue.succeeded = True
        queue.chunks_done += 1
        queue.chunk_seconds += (wall_seconds - compile_seconds - queue.chunk_seconds) / queue.chunks_done
        queue.compile_seconds = max(queue.compile_seconds, compile_seconds)

    def failed(
        self, chunk: Chunk, status: int, reason: str, worker_died: bool
    ) -> tuple[FailedTrials | None, GivenUp | None]:
        """Decide on a chunk that raised or whose worker died.

        The first time that its worker dies, the whole chunk is run again (the machine may be the cause).
        Otherwise it is halved until the bad trial is alone; that trial becomes a failed row.

        Returns:
            Trials that become failed rows, and trials that are given up: the rest of a program of which GIVE_UP_AFTER trials
            failed alone and none succeeded.
        """
        queue = self._buckets[chunk.bucket]
        if queue.given_up:  # this chunk ran on another worker at that time
            return None, GivenUp(chunk.bucket, len(chunk.trials), reason)
        if len(chunk.trials) > 1:
            if worker_died and not chunk.suspect:
                self._suspects.append(dataclasses.replace(chunk, attempts=1))
                return None, None
            middle = len(chunk.trials) // 2
            for part in (chunk.trials[middle:], chunk.trials[:middle]):
                self._suspects.append(Chunk(chunk.bucket, part, chunk.attempts + 1))
            return None, None
        tried = dataclasses.replace(chunk, attempts=chunk.attempts + 1, alone=chunk.alone + 1)
        if tried.alone < MAX_ATTEMPTS_ALONE:
            self._suspects.append(tried)
            return None, None
        queue.isolated += 1
        if worker_died:
            reason = ENGINE_STATUS_REASONS[status]  # the table of times names the worker
        failed = FailedTrials(tried, status, reason)
        if queue.isolated < GIVE_UP_AFTER or queue.succeeded:
            return failed, None
        return failed, GivenUp(chunk.bucket, self._drop(chunk.bucket), reason)

    def _drop(self, bucket: int) -> int:
        """Take a program's trials out of the queue; returns their number."""
        queue = self._buckets[bucket]
        count = queue.count + sum(len(chunk.trials) for chunk in self._suspects if chunk.bucket == bucket)
        self._suspects = [chunk for chunk in self._suspects if chunk.bucket != bucket]
        queue.pending.clear()
        queue.count, queue.given_up = 0, True
        return count

    def _choose(self, worker: str) -> int | None:
        waiting = [index for index, queue in enumerate(self._buckets) if queue.count]
        if not waiting:
            return None
        compiled = [index for index in waiting if worker in self._buckets[index].workers]
        if compiled:
            return compiled[0]
        fresh = [index for index in waiting if not self._buckets[index].workers]
        if fresh:
            return max(fresh, key=self._work_left)
        return max(
            (index for index in waiting if self._worth_helping(index)), key=self._work_left, default=None
        )

    def _work_left(self, index: int) -> float:
        return self._buckets[index].count * self._plan.buckets[index].work

    def _worth_helping(self, index: int) -> bool:
        queue = self._buckets[index]
        if not queue.chunks_done:
            return False  # its first worker is still compiling, so times are not known
        chunks = queue.count / self._plan.buckets[index].chunk_size
        seconds = chunks * queue.chunk_seconds
        helpers = len(queue.workers)
        return seconds / helpers - seconds / (helpers + 1) > queue.compile_seconds

    @staticmethod
    def _drain(queue: _BucketQueue) -> Iterator[tuple[int, int]]:
        while queue.pending:
            yield from queue.pending[0]
            queue.pending.popleft()


def summarise_failures(failures: Counter[str]) -> str:
    """One line for the end of a run: the reasons of failed trials, the most frequent first."""
    parts = [f"{count} x {shorten(reason)}" for reason, count in failures.most_common(3)]
    rest = len(failures) - len(parts)
    return "; ".join(parts) + (f"; and {rest} more reasons" if rest > 0 else "")
