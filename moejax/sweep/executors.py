"""Where chunks run: in this process, or on the workers of a Dask cluster (`dask_executor`).

An executor takes one chunk per slot of a worker and hands back outcomes as they come; the policy (what
runs where, retries, isolation) is the engine's, the supervision of processes is Dask's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Protocol

from moejax.sweep.chunk import run_chunk

SINGLE_THREADED = {
    # LLVM compiles a program on one core faster in one piece than in 32.
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1",
    "NPROC": "1",  # the size of XLA's own thread pool
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


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

    def news(self) -> list[str]:
        """Lines worth telling since the last call, such as what is waited for."""
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

    def news(self) -> list[str]:
        return []

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
