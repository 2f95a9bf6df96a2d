"""Where chunks run: in this process, or on the workers of a Dask cluster.

An executor takes one chunk per slot of a worker and hands back outcomes as they come; the policy (what
runs where, retries, isolation) is the engine's, the supervision of processes is Dask's.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from moejax.sweep.chunk import run_chunk

if TYPE_CHECKING:
    from distributed import Client, Future

SINGLE_THREADED = {
    # LLVM compiles a program on one core faster in one piece than in 32.
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1",
    "NPROC": "1",  # the size of XLA's own thread pool
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
WORKERS_REFRESH_SECONDS = 0.5
NO_WORKERS_SECONDS = 120.0


class ClusterError(OSError):
    """A cluster that cannot be used or was lost; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a submitted chunk ended: a result, or the reason why there is none."""

    ticket: int
    result: Any | None
    """A `ChunkResult` of `run_chunk`."""
    reason: str = ""
    worker_died: bool = False


class Executor(Protocol):
    """What the engine needs of a place to run chunks."""

    slots: int
    """Chunks that a worker may hold: the running one, and those that wait behind it."""

    def workers(self) -> list[str]:
        """Names of the workers that are alive."""
        ...

    def submit(self, worker: str, ticket: int, task: Any, run: Callable[[Any], Any] = run_chunk) -> None:
        """Start a chunk on a worker: `run(task)`."""
        ...

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes since the last call; waits for the first of them, at most this long."""
        ...

    def close(self) -> None:
        """End what is still running, and the workers that were started for it."""
        ...


class InProcessExecutor:
    """Runs each chunk in this process, at the time it is waited for."""

    slots = 1

    def __init__(self) -> None:
        self._submitted: list[tuple[int, Any, Callable[[Any], Any]]] = []

    def workers(self) -> list[str]:
        return ["this process"]

    def submit(self, worker: str, ticket: int, task: Any, run: Callable[[Any], Any] = run_chunk) -> None:
        self._submitted.append((ticket, task, run))

    def wait(self, seconds: float) -> list[Outcome]:
        outcomes = []
        while self._submitted:
            ticket, task, run = self._submitted.pop(0)
            try:
                outcomes.append(Outcome(ticket, run(task)))
            except Exception as error:  # any trial may raise anything: it is the engine's to isolate
                outcomes.append(Outcome(ticket, None, describe(error)))
        return outcomes

    def close(self) -> None:
        self._submitted.clear()


class DaskExecutor:
    """Runs chunks on the workers of a Dask scheduler; they come and go, and are asked for as we run."""

    slots = 2

    def __init__(self, client: Client, close: Callable[[], None], patient: bool = False):
        """`close` ends what was started for this sweep; `patient`: wait for workers as long as it takes."""
        self._client = client
        self._close = close
        self._patient = patient
        self._ended: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._futures: dict[int, Future] = {}
        self._workers: list[str] = []
        self._asked = self._seen = time.monotonic()
        self._refresh()

    def workers(self) -> list[str]:
        if time.monotonic() - self._asked > WORKERS_REFRESH_SECONDS or not self._workers:
            self._refresh()
        if not self._workers and not self._patient and time.monotonic() - self._seen > NO_WORKERS_SECONDS:
            raise ClusterError(
                f"no worker came up within {NO_WORKERS_SECONDS:.0f} seconds; what is done is kept"
            )
        return self._workers

    def _refresh(self) -> None:
        try:
            threads: Any = self._client.nthreads()  # a dict: this client is not asynchronous
            self._workers = sorted(threads)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"the Dask scheduler is gone ({describe(error)}); what is done is kept"
            ) from None
        self._asked = time.monotonic()
        if self._workers:
            self._seen = self._asked

    def submit(self, worker: str, ticket: int, task: Any, run: Callable[[Any], Any] = run_chunk) -> None:
        future = self._client.submit(
            run,
            task,
            workers=[worker],
            allow_other_workers=True,  # that worker may be gone by the time this arrives
            pure=False,
            retries=0,
            key=f"moejax-chunk-{os.getpid()}-{ticket}",
        )
        self._futures[ticket] = future
        future.add_done_callback(lambda ended, ticket=ticket: self._ended.put((ticket, ended)))

    def wait(self, seconds: float) -> list[Outcome]:
        outcomes = []
        try:
            outcomes.append(self._outcome(*self._ended.get(timeout=seconds)))
            while True:
                outcomes.append(self._outcome(*self._ended.get_nowait()))
        except queue.Empty:
            return outcomes

    def _outcome(self, ticket: int, future: Future) -> Outcome:
        from distributed import KilledWorker

        del self._futures[ticket]
        if future.status == "cancelled":
            raise ClusterError("the Dask scheduler is gone; what is done is kept")
        try:
            return Outcome(ticket, future.result())
        except KilledWorker as error:
            self._asked = 0.0  # the list of workers is stale
            return Outcome(ticket, None, f"worker {error.last_worker.address} died", worker_died=True)
        except Exception as error:  # raised by the chunk, on its worker
            return Outcome(ticket, None, describe(error))

    def close(self) -> None:
        futures = list(self._futures.values())
        self._futures.clear()
        if futures:
            self._client.cancel(futures, force=True)
        self._close()


def describe(error: BaseException) -> str:
    """Type and message of an error, on one line of reasonable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def use_single_thread() -> None:
    """Make XLA run on one thread in this process; it must be called before JAX starts its backend.

    With it, the numbers of `--workers 1` are those of any single-threaded worker, bit for bit.
    """
    for name, value in single_threaded_environment().items():
        os.environ[name] = value


def compile_without_optimisation() -> None:
    """Make XLA compile fast and run slowly, in this process and those that it starts, unless XLA_FLAGS say otherwise.

    LLVM does not optimise, and jaxlib up to 0.10 uses the older of its two code generators for CPUs: a trial compiles in a
    third of the time and runs in five times as much. It must be called before JAX starts its backend.
    """
    import jaxlib

    flags = "--xla_backend_optimization_level=0"
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) <= (0, 10):
        flags += " --xla_cpu_use_fusion_emitters=false"
    given = os.environ.get("XLA_FLAGS", "")
    if flags not in given:  # XLA takes the last of two equal flags: the user's
        os.environ["XLA_FLAGS"] = f"{flags} {given}".strip()


def single_threaded_environment() -> dict[str, Any]:
    """Environment of a single-threaded process; flags that the user gave to XLA are kept."""
    given = os.environ.get("XLA_FLAGS", "")
    flags = SINGLE_THREADED["XLA_FLAGS"]
    return SINGLE_THREADED | {"XLA_FLAGS": given if flags in given else f"{given} {flags}".strip()}
