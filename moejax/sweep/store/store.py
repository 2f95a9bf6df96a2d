"""The result store: one SQLite file per sweep, written only by the coordinator.

A trial is done when its row is committed; there are no other flags, which a kill could leave behind.
Rows are inserted or ignored, never changed. The rows of a chunk and its recorded arrays are one change: after
an interruption, all of it is stored or nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from moejax.sweep import trial as core
from moejax.sweep.plan.chunks import ChunkResult
from moejax.sweep.plan.plan import Plan
from moejax.sweep.store.digests import DIGEST_COLUMN, row_digests
from moejax.sweep.store.lock import LOCK_NAME, is_running, lock_folder, sign_lock
from moejax.sweep.store.schema import (
    STORE_NAME,
    StoreError,
    clear_errors,
    columns_of,
    connect_for_reading,
    connect_for_writing,
    expected_columns,
    explained,
    is_busy,
)
from moejax.sweep.store.soundness import check_store

__all__ = ["COMMIT_SECONDS", "Store", "is_running", "lock_folder"]

COMMIT_SECONDS = 0.25
"""Chunks that end within this time share a commit: a kill loses at most this much work, and running chunks."""
BUSY_MILLISECONDS = 2000
"""SQLite itself waits this long for another program; signals are not handled during that time."""
FIRST_WORD_SECONDS = 4.0
"""Time after which a first line reports that another program holds the store; it doubles for each later line."""

T = TypeVar("T")


class CellTrials(NamedTuple):
    """The trials of a cell in a store."""

    values: dict[int, float]
    """Trial -> value of the requested metric; NaN if there is none."""
    broken: list[int]
    """The trials without a result, which `forget_failures` would delete."""


class Store:
    """The coordinator's lock and store of a run folder, a context manager.

    The folder is locked and checked when the object is made, and written only after the context is entered. So a folder that is
    refused stays unchanged.

    Raises:
        StoreError: one line with the reason why the folder cannot be used; see `schema`.
    """

    def __init__(
        self,
        folder: Path,
        check: Callable[[Sequence[dict[str, Any]]], None] | None = None,
        note: Callable[[str], None] = lambda line: None,
    ):
        """Lock a folder.

        Args:
            folder: the folder of the run; made if it does not exist.
            check: receives the provenance of the earlier runs that committed a trial; raises to refuse the folder.
            note: receives occasional lines while another program holds the store.
        """
        self.folder = Path(folder)
        self._note = note
        self.path = self.folder / STORE_NAME
        self._made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: cannot make the run folder: {error.strerror}") from None
        self._lock = lock_folder(self.folder)
        try:
            previous = read_provenance(self.path)
            if check is not None:
                check(previous)
        except BaseException:
            self._let_go()
            raise
        self._connection: sqlite3.Connection
        self._open = False
        self._run = 0
        self._cells: list[int] = []
        self._half_made = False
        """True while a change has begun and is not known to be complete."""
        self._last_commit = time.monotonic()

    def __enter__(self) -> Store:
        try:
            sign_lock(self._lock)
            self._connection = self._patiently(lambda: connect_for_writing(self.path))
            self._open = True
            self._connection.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
            with clear_errors(self.path):
                self._patiently(lambda: _add_metric_columns(self._connection))
                self._kinds = {table: columns_of(self._connection, table) for table in expected_columns()}
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit complete changes and release the folder; a second call does nothing."""
        try:
            if self._open:
                with clear_errors(self.path):
                    self.commit()
                    with contextlib.suppress(sqlite3.OperationalError):  # another program holds the store
                        self._connection.execute("PRAGMA optimize")
        finally:
            if self._open:
                self._open = False
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()  # this also merges the log into the file
            self._let_go()

    def _let_go(self) -> None:
        """Release the folder; a new, empty one is removed again."""
        if self._made and not self._lock.closed and not self.path.exists():
            with contextlib.suppress(OSError):
                (self.folder / LOCK_NAME).unlink()
                self.folder.rmdir()
        self._lock.close()

    @property
    def journal_mode(self) -> str:
        """The mode of SQLite's journal: "wal", or "delete" if the file system does not support WAL."""
        return self._connection.execute("PRAGMA journal_mode").fetchone()[0]

    def begin_run(self, plan: Plan, provenance: Mapping[str, Any]) -> None:
        """Record a start of the coordinator, and its plan, in one transaction."""
        spec = plan.spec
        with self._writing():
            known = dict(self._connection.execute("SELECT result_hash, cell FROM cells"))
            new = [cell for cell in plan.cells if cell.result_hash not in known]
            first = max(known.values(), default=0) + 1
            self._insert(
                "cells",
                {
                    "cell": range(first, first + len(new)),
                    "result_hash": [cell.result_hash for cell in new],
                    "data_hash": [cell.data_hash for cell in new],
                    "fields": [json.dumps(cell.fields()) for cell in new],
                },
            )
            known |= {cell.result_hash: first + index for index, cell in enumerate(new)}
            self._cells = [known[cell.result_hash] for cell in plan.cells]
            self._connection.execute("DELETE FROM plan")
            buckets = [plan.buckets[cell.bucket] for cell in plan.cells]
            self._insert(
                "plan",
                {
                    "position": range(len(buckets)),
                    "cell": self._cells,
                    "bucket": [bucket.label for bucket in buckets],
                    "work": [bucket.work for bucket in buckets],
                    "first_trials": [spec.first_target] * len(buckets),
                    "most_trials": [spec.most_trials] * len(buckets),
                },
            )
            self._run = self._next("runs", "run")
            row = {"run": self._run, "provenance": json.dumps(provenance), "started": time.time()}
            self._insert("runs", {name: [value] for name, value in row.items()})
        self.commit()

    def end_run(self, wall_seconds: float, compile_seconds: float) -> None:
        """Complete the record of this run (a killed run has no complete record, but its chunks do)."""
        names = ("run", "provenance", "started", "wall_seconds", "compile_seconds")
        with self._writing():
            row = self._connection.execute(
                "SELECT run, provenance, started FROM runs WHERE run = ?", (self._run,)
            ).fetchone()
            values = (*row, wall_seconds, compile_seconds)
            self._insert("runs", {name: [v] for name, v in zip(names, values, strict=True)}, "REPLACE")
        self.commit()

    def forget_failures(self) -> None:
        """Delete the rows that the engine marked as failed (not those that the core did), to run them again."""
        with self._writing():
            for table in ("timings", "arrays"):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE (cell, trial) IN (SELECT cell, trial FROM trials WHERE status < 0)"
                )
            self._connection.execute("DELETE FROM trials WHERE status < 0")
        self.commit()

    def committed(self, metric: str | None = None) -> list[CellTrials]:
        """The committed trials of the plan's cells, with their values of a metric, in one scan."""
        trials = [CellTrials({}, []) for _ in self._cells]
        of_cell = dict(zip(self._cells, trials, strict=True))
        value = "NULL" if metric is None else f'"{metric}"'
        with clear_errors(self.path):
            for cell, trial, status, number in self._connection.execute(
                f"SELECT cell, trial, status, {value} FROM trials"
            ):
                if cell in of_cell:
                    of_cell[cell].values[trial] = math.nan if number is None else number
                    if status < 0:
                        of_cell[cell].broken.append(trial)
        return trials

    def add_chunk(
        self,
        bucket: str,
        trials: Sequence[tuple[int, int]],
        result: ChunkResult,
        attempts: int,
        size: int,
        vmap_width: int,
    ) -> None:
        """Insert the rows of a chunk; `trials` are (plan position, trial) in the result's order.

        They are safe on disk after the next commit, which comes within `COMMIT_SECONDS` while chunks arrive.
        """
        keys = {
            "cell": [self._cells[position] for position, _ in trials],
            "trial": [trial for _, trial in trials],
        }
        recorded = [index for index, status in enumerate(result.status.tolist()) if status >= 0]
        with self._writing():
            chunk = self._next("chunks", "chunk")
            row = {
                "chunk": chunk, "run": self._run, "bucket": bucket, "trials": len(trials), "size": size,
                "vmap_width": vmap_width, "host": result.host, "process": result.process, "device": result.device,
                "started": result.started, "wall_seconds": result.wall_seconds,
                "compile_seconds": result.compile_seconds, "compilations": result.compilations,
                "execute_seconds": result.execute_seconds,
            }  # fmt: skip
            self._insert("chunks", {name: [value] for name, value in row.items()})
            self._insert(
                "trials",
                keys
                | {
                    "status": result.status.tolist(),
                    "reason": [_text(result.reasons.get(index)) for index in range(len(trials))],
                }
                | {name: values.tolist() for name, values in result.metrics.items()},
            )
            self._insert(
                "timings", keys | {"chunk": [chunk] * len(trials), "attempts": [attempts] * len(trials)}
            )
            for name, rows in result.arrays.items():  # only trials that ran have arrays to record
                self._insert(
                    "arrays",
                    {key: [values[index] for index in recorded] for key, values in keys.items()}
                    | {"name": [name] * len(recorded), "content": [_npy(rows[index]) for index in recorded]},
                )
        self.commit_if_due()

    def _next(self, table: str, key: str) -> int:
        return self._connection.execute(f"SELECT coalesce(max({key}), 0) + 1 FROM {table}").fetchone()[0]

    def _insert(self, table: str, columns: Mapping[str, Sequence[Any]], on_conflict: str = "IGNORE") -> None:
        """Insert rows, given by columns, with their digests; rows that already exist are kept."""
        kinds = self._kinds[table]
        columns = {name: _as_stored(kinds[name], values) for name, values in columns.items()}
        digests = row_digests(kinds, columns, len(next(iter(columns.values()))))
        names = ", ".join(f'"{name}"' for name in (*columns, DIGEST_COLUMN))
        marks = ", ".join("?" * (len(columns) + 1))
        self._connection.executemany(
            f"INSERT OR {on_conflict} INTO {table} ({names}) VALUES ({marks})",
            zip(*columns.values(), digests, strict=True),
        )

    def commit_if_due(self) -> None:
        """Commit if the last commit is `COMMIT_SECONDS` old."""
        if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make all complete changes durable; an interrupted change is dropped."""
        if self._connection.in_transaction:
            try:
                if self._half_made:
                    self._drop_half()
                self._patiently(lambda: self._connection.execute("COMMIT"))
            except sqlite3.Error as error:
                self._roll_back()
                raise explained(self.path, error) from error
        self._last_commit = time.monotonic()

    def _patiently(self, act: Callable[[], T]) -> T:
        """Do an act that needs exclusive access; while another program holds the store, wait and report it."""
        started, next_word = time.monotonic(), FIRST_WORD_SECONDS
        while True:
            try:
                return act()
            except (sqlite3.Error, StoreError) as error:
                if not is_busy(error):
                    raise
            waited = time.monotonic() - started
            if waited >= next_word:
                next_word = 2 * max(waited, next_word)
                self._note(
                    f"{self.path}: another program has held the store for {waited:.0f} s; still waiting for it"
                )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Make one change in the open transaction, or in a new one: completely, or not at all if it is interrupted.

        After an error of SQLite the whole transaction is undone.
        """
        connection = self._connection
        try:
            if not connection.in_transaction:
                self._patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            self._half_made = True
            connection.execute("SAVEPOINT change")
            yield
            connection.execute("RELEASE change")
            self._half_made = False
        except sqlite3.Error as error:
            self._roll_back()
            raise explained(self.path, error) from error
        except BaseException:
            self._drop_half()  # if this is interrupted too, the commit undoes the change
            raise

    def _drop_half(self) -> None:
        """Undo the interrupted change; none is open if the interruption came just before its beginning or after its end."""
        try:
            self._connection.execute("ROLLBACK TO change")
            self._connection.execute("RELEASE change")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # otherwise: "no such savepoint"
                raise
        self._half_made = False

    def _roll_back(self) -> None:
        self._half_made = False
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")


def _add_metric_columns(connection: sqlite3.Connection) -> None:
    """Add a column for each metric that is newer than the store; old rows have no value in it."""
    have = columns_of(connection, "trials")
    for name in core.metric_names():
        if name not in have:
            connection.execute(f'ALTER TABLE trials ADD COLUMN "{name}" REAL')


def read_provenance(path: Path) -> list[dict[str, Any]]:
    """Check a store that no other program writes, and read the provenance of runs that committed a trial, oldest first.

    Raises:
        StoreError: the file is damaged, not a store, or from a newer version.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    with contextlib.closing(connect_for_reading(path, alone=True)) as connection:
        check_store(connection, path)
        with clear_errors(path):
            if not columns_of(connection, "runs"):
                return []  # killed before its tables were committed
            rows = connection.execute(
                "SELECT provenance FROM runs WHERE run IN (SELECT run FROM chunks) ORDER BY run"
            ).fetchall()
    return [json.loads(row[0]) for row in rows]


def _as_stored(kind: str, values: Sequence[Any]) -> list[Any]:
    """Values of a column as Python numbers, the type in which they are read."""
    convert = {"INTEGER": int, "REAL": float}.get(kind, lambda value: value)
    return [None if value is None else convert(value) for value in values]


def _text(reason: str | None) -> str | None:
    """A reason without lone surrogates, which a file name may bring into a message and which cannot be stored."""
    return None if reason is None else reason.encode(errors="replace").decode()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
