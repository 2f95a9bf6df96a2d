"""Runs chunks on the workers of a Dask scheduler, which may come and go during a run.

A worker is checked before it gets a chunk, and a chunk stays with its worker. If the worker is lost, Dask would let the chunk wait
for ever, or give it to a worker that was not checked. So this module takes the chunk back.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import pickle
import queue
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moejax.checks import describe
from moejax.console import duration
from moejax.sweep.execution import admission
from moejax.sweep.execution.executors import ClusterError, Outcome
from moejax.sweep.execution.worker import run_chunk
from moejax.sweep.plan.chunks import WorkerSettings

if TYPE_CHECKING:
    from distributed import Client, Future

WORKERS_REFRESH_SECONDS = 0.5
NO_WORKERS_SECONDS = 120.0
"""Time without a worker of this machine after which the sweep ends with an error."""
PAUSED_REFRESH_SECONDS = 5.0
GATHER_SECONDS = 5.0
"""Time after which a missing result may be lost with its worker."""
MOST_GATHERS = 24
"""Number of waits for a result whose worker is alive; then it counts as lost."""
FIRST_WORD_SECONDS = 10.0
"""Time without a worker after which a first line reports it; the time doubles for each later line."""
_QUESTION = "exec(source, names) or names['refusal'](expected, settings)"


@dataclasses.dataclass(frozen=True)
class Admission:
    """The code and settings that a worker must have to get a chunk."""

    expected: dict[str, str]
    settings: bytes

    @classmethod
    def of(cls, settings: WorkerSettings) -> Admission:
        """An admission that requires the code and settings of this process."""
        return cls(admission.installed() | admission.numeric_settings(), pickle.dumps(settings))

    def ask(self, client: Client, worker: str, key: str) -> Future:
        """Send the question as text, which a worker without moejax, or with a different Python, can run."""
        names = {
            "source": inspect.getsource(admission),
            "names": {"__name__": "moejax_admission"},
            "expected": self.expected,
            "settings": self.settings,
        }
        return client.submit(eval, _QUESTION, names, workers=[worker], pure=False, retries=0, key=key)


class WorkerLostError(Exception):
    """A worker ended with a result that had not been fetched."""


class DaskExecutor:
    """Runs chunks on the workers of a Dask scheduler."""

    slots = 2

    def __init__(
        self,
        client: Client,
        close: Callable[[], None],
        *,
        patient: bool = False,
        worker_timeout: float | None = None,
        admission: Admission | None = None,
        about: Callable[[int, float], str] = lambda came, waited: "",
        news: Sequence[str] = (),
    ):
        """Use a client's workers.

        Args:
            client: a connected client.
            close: ends the processes that were started for this sweep.
            patient: wait for workers without limit; else for `NO_WORKERS_SECONDS`.
            worker_timeout: wait this many seconds instead.
            admission: the check of each worker; None accepts any worker.
            about: (workers that came so far, seconds without one) -> a text on the cluster's state, for a line; it may raise
                ClusterError if no worker will come.
            news: lines to report first.
        """
        self._client: Any = client  # Dask types each answer as a value or a coroutine
        self._close = close
        self._patient = patient
        self._timeout = (
            worker_timeout if worker_timeout is not None else None if patient else NO_WORKERS_SECONDS
        )
        self._admission = admission
        self._about = about
        self._ended: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._futures: dict[int, tuple[str, Future]] = {}
        self._lost: list[Outcome] = []
        self._live: list[str] = []
        self._asking: dict[str, Future] = {}
        self._answers: dict[str, str] = {}
        """Worker -> the reason why it gets no chunk; empty if it gets chunks."""
        self._paused: set[str] = set()
        self._asked_who_is_paused = -math.inf
        self._news = list(news)
        self._questions = self._came = 0
        self._refreshed = self._last_usable = time.monotonic()
        self._next_word = FIRST_WORD_SECONDS
        self._refresh()

    def workers(self) -> list[str]:
        """Names of the live workers that were admitted and are not paused."""
        if time.monotonic() - self._refreshed > WORKERS_REFRESH_SECONDS or not self._live:
            self._refresh()
        self._hear()
        usable = [
            worker for worker in self._live if self._answers.get(worker) == "" and worker not in self._paused
        ]
        self._watch(bool(usable))
        return usable

    def news(self) -> list[str]:
        """Lines since the last call, on refused workers and on the wait for workers."""
        lines, self._news = self._news, []
        return lines

    def _refresh(self) -> None:
        """Ask the scheduler for its workers; take back the chunks of lost ones."""
        threads = self._known_workers()
        self._refreshed = time.monotonic()
        self._live = sorted(threads)
        if self._refreshed - self._asked_who_is_paused > PAUSED_REFRESH_SECONDS:
            self._asked_who_is_paused = self._refreshed
            known: Any = self._client.scheduler_info()["workers"]
            self._paused = {worker for worker, facts in known.items() if facts.get("status") == "paused"}
        gone = ({*self._answers, *self._asking} | {worker for worker, _ in self._futures.values()}) - threads
        for worker in gone:
            self._answers.pop(worker, None)
        unanswered = [self._asking.pop(worker) for worker in gone if worker in self._asking]
        left = {
            ticket: (worker, future)
            for ticket, (worker, future) in self._futures.items()
            if worker in gone and not future.done()
        }
        for ticket, (worker, _) in left.items():
            del self._futures[ticket]
            self._lost.append(Outcome(ticket, None, f"worker {worker} died", worker_died=True))
        if unanswered or left:
            self._client.cancel([*unanswered, *(future for _, future in left.values())], force=True)
        for worker in self._live:
            if worker not in self._answers and worker not in self._asking:
                self._came += 1
                if self._admission is None:
                    self._answers[worker] = ""
                    continue
                self._questions += 1
                key = f"moejax-question-{os.getpid()}-{self._questions}"
                self._asking[worker] = self._admission.ask(self._client, worker, key)

    def _known_workers(self) -> set[str]:
        """The workers that the scheduler knows.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        try:
            return set(self._client.nthreads())
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"the Dask scheduler is gone ({describe(error)}); what is done is kept"
            ) from None

    def _hear(self) -> None:
        """Collect the answers that have come."""
        for worker, future in list(self._asking.items()):
            if future.status not in ("finished", "error"):
                continue
            del self._asking[worker]
            try:
                reason = self._gathered(worker, future)
            except WorkerLostError:
                continue  # `_refresh` asks new workers
            except ClusterError:
                raise
            except Exception as error:  # any error of the question on the worker
                reason = describe(error)
            self._answers[worker] = reason
            if reason:
                self._news.append(f"worker {worker} gets no trials: {reason}")

    def _watch(self, usable: bool) -> None:
        """Report the wait for workers, or end it with an error."""
        now = time.monotonic()
        if usable:
            if self._next_word > FIRST_WORD_SECONDS:
                self._news.append("there is a worker again")
            self._last_usable, self._next_word = now, FIRST_WORD_SECONDS
            return
        refused = [reason for worker in self._live if (reason := self._answers.get(worker))]
        if refused and len(refused) == len(self._live) and not self._patient:
            raise ClusterError(f"no worker can run this sweep: {refused[0]}; what is done is kept")
        waited = now - self._last_usable
        if self._timeout is not None and waited > self._timeout:
            raise ClusterError(
                f"no worker for {duration(self._timeout)} ({self._known(refused, waited)}); what is done is kept"
            )
        if waited > self._next_word:
            self._next_word *= 2
            self._news.append(
                f"no worker for {duration(waited)}: {self._known(refused, waited)}; still waiting"
            )

    def _known(self, refused: list[str], waited: float) -> str:
        parts = [] if self._live else ["the scheduler has none"]
        if self._paused:
            parts.append(f"{len(self._paused)} paused by Dask, because their memory is near its limit")
        if refused:
            parts.append(f"{len(refused)} cannot run this sweep ({refused[0]})")
        if self._asking:
            parts.append(f"{len(self._asking)} did not say yet what code they have")
        return "; ".join(part for part in (*parts, self._about(self._came, waited)) if part)

    def submit(self, worker: str, ticket: int, task: Any, run: Callable[[Any], Any] = run_chunk) -> None:
        """Start `run(task)` on a worker; Dask does not repeat it."""
        future = self._client.submit(
            run, task, workers=[worker], pure=False, retries=0, key=f"moejax-chunk-{os.getpid()}-{ticket}"
        )
        self._futures[ticket] = (worker, future)
        future.add_done_callback(lambda ended, ticket=ticket: self._ended.put((ticket, ended)))

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes since the last call, those of lost workers first; it waits at most this long for the first one."""
        outcomes, self._lost = self._lost, []
        try:
            ticket, future = self._ended.get(timeout=0.0 if outcomes else seconds)
            while True:
                worker, _ = self._futures.pop(ticket, ("", None))
                if worker:  # otherwise it was taken back
                    outcomes.append(self._outcome(ticket, worker, future))
                ticket, future = self._ended.get_nowait()
        except queue.Empty:
            return outcomes

    def _gathered(self, worker: str, future: Future) -> Any:
        """Fetch the result of a finished task from its worker.

        If the worker ends before that, the result is lost, and Dask would wait for ever to run the task on it again.

        Raises:
            WorkerLostError: the worker is gone, or does not send the result. ClusterError: the scheduler is gone. Any error
                that the task raised.
        """
        from distributed import TimeoutError as NotGathered

        for _ in range(MOST_GATHERS):
            try:
                return future.result(timeout=GATHER_SECONDS)
            except NotGathered:
                if future.status == "error":  # an error of the task itself
                    raise
                if worker not in self._known_workers():
                    break
        self._client.cancel([future], force=True)
        raise WorkerLostError(worker)

    def _outcome(self, ticket: int, worker: str, future: Future) -> Outcome:
        from distributed import KilledWorker

        if future.status == "cancelled":
            raise ClusterError("the Dask scheduler is gone; what is done is kept")
        try:
            return Outcome(ticket, self._gathered(worker, future))
        except WorkerLostError:
            self._refreshed = 0.0  # the list of workers is stale
            return Outcome(ticket, None, f"worker {worker} died", worker_died=True)
        except KilledWorker as error:
            self._refreshed = 0.0  # the list of workers is stale
            return Outcome(ticket, None, f"worker {error.last_worker.address} died", worker_died=True)
        except ClusterError:
            raise
        except Exception as error:  # raised by the chunk, on its worker
            return Outcome(ticket, None, describe(error))

    def close(self) -> None:
        """Cancel what runs, and end the processes that were started for this sweep; a second call does nothing."""
        futures = [*(future for _, future in self._futures.values()), *self._asking.values()]
        self._futures.clear()
        self._asking.clear()
        close, self._close = self._close, lambda: None  # a second close does nothing
        try:
            if futures:
                self._client.cancel(futures, force=True)
        finally:
            close()
