"""Executors run chunks: in this process, or on the workers of a Dask cluster (`dask_executor`).

An executor takes one chunk per slot of a worker and returns outcomes as they come. The engine decides where chunks
run, and on retries and isolation; Dask supervises the processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from moejax.checks import describe
from moejax.sweep.execution.worker import run_chunk


class ClusterError(OSError):
    """A cluster that cannot be used or was lost; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a submitted chunk: a result, or the reason why there is none."""

    ticket: int
    result: Any | None
    """A `ChunkResult` of `run_chunk`."""
    reason: str = ""
    worker_died: bool = False


class Executor(Protocol):
    """The interface that the engine uses to run chunks."""

    slots: int
    """Chunks that a worker may hold: the running one, and those that wait behind it."""

    def workers(self) -> list[str]:
        """Names of the workers that are alive."""
        ...

    def news(self) -> list[str]:
        """Lines to report since the last call, for example on a wait for workers."""
        ...

    def submit(self, worker: str, ticket: int, task: Any, run: Callable[[Any], Any] = run_chunk) -> None:
        """Start a chunk on a worker: `run(task)`."""
        ...

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes since the last call; it waits at most this long for the first one."""
        ...

    def close(self) -> None:
        """End running chunks, and the workers that were started for them."""
        ...


class InProcessExecutor:
    """Runs each chunk in this process, when `wait` is called."""

    slots = 1

    def __init__(self) -> None:
        self._submitted: list[tuple[int, Any, Callable[[Any], Any]]] = []

    def workers(self) -> list[str]:
        """The name of the only worker, this process."""
        return ["this process"]

    def news(self) -> list[str]:
        """No lines: this process is always there."""
        return []

    def submit(self, worker: str, ticket: int, task: Any, run: Callable[[Any], Any] = run_chunk) -> None:
        """Keep a chunk until `wait` is called."""
        self._submitted.append((ticket, task, run))

    def wait(self, seconds: float) -> list[Outcome]:
        """Run all chunks that were submitted; it takes as long as they do."""
        outcomes = []
        while self._submitted:
            ticket, task, run = self._submitted.pop(0)
            try:
                outcomes.append(Outcome(ticket, run(task)))
            except Exception as error:  # a trial may raise any error; the engine isolates it
                outcomes.append(Outcome(ticket, None, describe(error)))
        return outcomes

    def close(self) -> None:
        """Drop the chunks that have not run."""
        self._submitted.clear()


@dataclasses.dataclass
class Workers:
    """The workers of one command: started when they are first needed, kept with their programs, ended by `close`."""

    start: Callable[[], Executor]
    description: str
    """Description in words, for the provenance."""
    xla_flags: str = ""
    join_first: bool = False
    """True if they are a cluster, which `join` joins."""
    warning: str | None = None
    """Warning that `join` passes to the user."""
    _executor: Executor | None = None

    def join(self, note: Callable[[str], None]) -> None:
        """Join a cluster, so that a wrong address changes nothing on disk."""
        if self.join_first:
            self.executor()
        if self.warning is not None:
            note(self.warning)

    def executor(self) -> Executor:
        """The executor; it is started on the first call."""
        if self._executor is None:
            self._executor = self.start()
        return self._executor

    def close(self) -> None:
        """End the workers, if they were started."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()
