"""A partition's sum on a worker in another process, which keeps the rows that it has read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from moejax.environment import memory_bytes
from moejax.fitting.streaming.runners import Task
from moejax.fitting.streaming.source import Batch, Source

SHARE_OF_MEMORY = 8
"""A worker keeps rows in at most one part in so many of its machine's memory."""
_KEPT: OrderedDict[tuple[str, int, int], list[Batch]] = OrderedDict()
_GUARD = threading.Lock()


class RemoteTask(NamedTuple):
    """The message to a worker."""

    task: Task
    source: Source
    identity: str
    """`source.identity`, so that rows of files that have changed since are read anew."""
    number: int
    """The partition's."""
    partition: Any


class RemoteSum(NamedTuple):
    """The answer of a worker."""

    total: Any
    rows: int
    error: ValueError | OSError | None
    """Raised again by the process that asked: it is about the rows, not about the worker."""


def run_remotely(message: RemoteTask) -> RemoteSum:
    """The sum of a task over one partition."""
    counted = 0

    def count(rows: int) -> None:
        nonlocal counted
        counted += rows

    source: Any = _Kept(message.source, message.identity, message.number)
    try:
        total = message.task(source, message.number, message.partition, count)
    except (ValueError, OSError) as error:
        return RemoteSum(None, counted, error)
    return RemoteSum(total, counted, None)


class _Kept:
    """A source that keeps the batches of one partition in memory, the least recently used ones only as long as there is room."""

    def __init__(self, source: Source, identity: str, index: int):
        self._source, self._place = source, (identity, index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batches(self, partition: Any, rows_at_once: int) -> Iterator[Batch]:
        place = (*self._place, rows_at_once)
        with _GUARD:
            kept = _KEPT.get(place)
            if kept is not None:
                _KEPT.move_to_end(place)
        if kept is not None:
            yield from kept
            return
        read = []
        for batch in self._source.batches(partition, rows_at_once):
            read.append(batch)
            yield batch
        with _GUARD:
            _KEPT[place] = read
            room = (memory_bytes() or 0) // SHARE_OF_MEMORY
            while _KEPT and sum(map(_bytes, _KEPT.values())) > room:
                _KEPT.popitem(last=False)


def _bytes(batches: list[Batch]) -> int:
    return sum(batch.x.nbytes + batch.y.nbytes + batch.weights.nbytes for batch in batches)
