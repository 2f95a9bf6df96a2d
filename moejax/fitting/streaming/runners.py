"""Who reads which partition: threads of this process, and the processes of `jax.distributed`."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from moejax.environment import available_cores
from moejax.fitting.streaming.source import Source

WAIT_SECONDS = 0.2
"""Seconds that the main thread waits at a time, so that it hears Ctrl-C."""


class Task(Protocol):
    """A sum over rows; it can be pickled."""

    def __call__(self, source: Source, index: int, partition: Any, on_rows: Callable[[int], None]) -> Any:
        """The sum over a partition; None if it has no row. `on_rows` is called with the number of rows of each batch."""
        ...

    def merge(self, first: Any, second: Any) -> Any:
        """The sum over the rows of both; either may be None."""
        ...


class Runner(Protocol):
    """Runs a task on partitions, in any order."""

    def __call__(
        self, task: Task, source: Source, indices: Sequence[int], on_rows: Callable[[int], None]
    ) -> Iterator[tuple[int, Any]]:
        """(index, sum) of each of these partitions, as they end."""
        ...


class _StoppedError(Exception):
    """The pass was given up."""


def run_here(
    task: Task, source: Source, indices: Sequence[int], on_rows: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """Run a task by threads of this process: one reads and computes while another waits for the disk or for a device.

    Raises:
        ValueError: a row is bad; OSError: a file cannot be read.
    """
    partitions = source.partitions
    todo, ended = iter(indices), queue.SimpleQueue[tuple[int, Any, BaseException | None]]()
    stop, taking, counting = threading.Event(), threading.Lock(), threading.Lock()

    def count(rows: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with counting:
            on_rows(rows)

    def work() -> None:
        while not stop.is_set():
            with taking:
                index = next(todo, None)
            if index is None:
                return
            try:
                ended.put((index, task(source, index, partitions[index], count), None))
            except _StoppedError:
                return
            except BaseException as error:  # raised again by the main thread
                ended.put((index, None, error))
                return

    on_cpu = jax.local_devices()[0].platform == "cpu"
    lanes = len(available_cores()) if on_cpu and len(jax.local_devices()) == 1 else 2
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(lanes, len(indices)))]
    for thread in threads:
        thread.start()
    try:
        with threadpool_limits(1, "blas"):  # the lanes use the cores already
            for _ in indices:
                yield _next(ended)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _next(ended: queue.SimpleQueue) -> tuple[int, Any]:
    while True:
        try:
            index, result, error = ended.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        return index, result


def own_share(num_partitions: int) -> list[int]:
    """The partitions that this process of `jax.distributed` reads; all of them if it is the only one."""
    return list(range(jax.process_index(), num_partitions, jax.process_count()))


def gathered(value: Any) -> list[Any]:
    """The values of all processes of `jax.distributed`, in their order; each must call this once."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([len(mine)], np.int32))).reshape(-1)
    padded = np.pad(mine, (0, int(sizes.max()) - len(mine)))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
