"""The result store: one SQLite file per sweep, written by the coordinator alone.

A trial is done when its row is committed, and by nothing else: there are no flags that a kill could leave
behind. Rows are inserted or ignored, never changed. The rows of a chunk and what it recorded are one change: whatever
interrupts it, all of it is there or nothing.
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
"""Chunks that end within this time share a commit: a kill loses no more work than this, and what runs."""
BUSY_MILLISECONDS = 2000
"""SQLite itself waits this long for another program; no signal is heard meanwhile."""
FIRST_WORD_SECONDS = 4.0
"""When the first line says that another program holds the store; each later one comes after twice the time."""

T = TypeVar("T")


class CellTrials(NamedTuple):
    """What a store has of a cell."""

    values: dict[int, float]
    """Trial -> value of the metric that was asked for; NaN if there is none."""
    broken: list[int]
    """The trials that have no result: those that `forget_failures` would delete."""


class Store:
    """The coordinator's hold on a run folder. Use as a context manager.

    The folder is held and checked when the store is made, and written only from when the context is entered: a folder that is
    refused is as it was.

    Raises:
        StoreError: one line for each way in which the folder cannot be used; see `schema`.
    """

    def __init__(
        self,
        folder: Path,
        check: Callable[[Sequence[dict[str, Any]]], None] | None = None,
        note: Callable[[str], None] = lambda line: None,
    ):
        """Hold a folder.

        Args:
            folder: of the run; made if it is not there.
            check: given the provenance of the earlier runs that committed a trial; raises if the folder is refused.
            note: told a line now and then while another program holds the store.
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
        """A change has begun and is not known to be whole."""
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
        """Commit what is whole and give the folder up; closing twice does nothing."""
        try:
            if self._open:
                with clear_errors(self.path):
                    self.commit()
                    with contextlib.suppress(sqlite3.OperationalError):  # held by another program: so be it
                        self._connection.execute("PRAGMA optimize")
        finally:
            if self._open:
                self._open = False
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()  # also folds the log into the file
            self._let_go()

    def _let_go(self) -> None:
        """Give up the folder; a new one in which nothing was written is removed again."""
        if self._made and not self._lock.closed and not self.path.exists():
            with contextlib.suppress(OSError):
                (self.folder / LOCK_NAME).unlink()
                self.folder.rmdir()
        self._lock.close()

    @property
    def journal_mode(self) -> str:
        """ "wal", or "delete" where the file system cannot do WAL."""
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
        """Complete the record of this run (a killed run has none; its chunks say what it did)."""
        names = ("run", "provenance", "started", "wall_seconds", "compile_seconds")
        with self._writing():
            row = self._connection.execute(
                "SELECT run, provenance, started FROM runs WHERE run = ?", (self._run,)
            ).fetchone()
            values = (*row, wall_seconds, compile_seconds)
            self._insert("runs", {name: [v] for name, v in zip(names, values, strict=True)}, "REPLACE")
        self.commit()

    def forget_failures(self) -> None:
        """Delete the rows that the engine marked as failed (not what the core judged), to run them again."""
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
            for name, rows in result.arrays.items():  # of those that ran: the rest have nothing to record
                self._insert(
                    "arrays",
                    {key: [values[index] for index in recorded] for key, values in keys.items()}
                    | {"name": [name] * len(recorded), "content": [_npy(rows[index]) for index in recorded]},
                )
        self.commit_if_due()

    def _next(self, table: str, key: str) -> int:
        return self._connection.execute(f"SELECT coalesce(max({key}), 0) + 1 FROM {table}").fetchone()[0]

    def _insert(self, table: str, columns: Mapping[str, Sequence[Any]], on_conflict: str = "IGNORE") -> None:
        """Insert rows, given by columns, with their digests; of rows that are there already the old ones stay."""
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
        """Make everything added so far durable; of a change that was interrupted, nothing is left."""
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
        """Do something that needs the store for itself, and wait, visibly, while another program holds it."""
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
        """Make one change within the open transaction, or a new one: all of it, or nothing if it is interrupted.

        After an error of SQLite nothing is left of the whole transaction.
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
            self._drop_half()  # if this is interrupted too, the commit does it
            raise

    def _drop_half(self) -> None:
        """Undo the change that was interrupted; none is open if it came just before its beginning or after its end."""
        try:
            self._connection.execute("ROLLBACK TO change")
            self._connection.execute("RELEASE change")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # else: "no such savepoint"
                raise
        self._half_made = False

    def _roll_back(self) -> None:
        self._half_made = False
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")


def _add_metric_columns(connection: sqlite3.Connection) -> None:
    """A metric that is new since the store was made gets a column; old rows have no value there."""
    have = columns_of(connection, "trials")
    for name in core.metric_names():
        if name not in have:
            connection.execute(f'ALTER TABLE trials ADD COLUMN "{name}" REAL')


def read_provenance(path: Path) -> list[dict[str, Any]]:
    """Check a store that nobody else writes, and read the provenance of the runs that committed a trial, oldest first.

    Raises:
        StoreError: damaged, not a store, or from a newer version.
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
    """Values of a column as Python's own numbers, which is how they are read back."""
    convert = {"INTEGER": int, "REAL": float}.get(kind, lambda value: value)
    return [None if value is None else convert(value) for value in values]


def _text(reason: str | None) -> str | None:
    """A reason that can be stored: without half characters, which a file name may bring into a message."""
    return None if reason is None else reason.encode(errors="replace").decode()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
