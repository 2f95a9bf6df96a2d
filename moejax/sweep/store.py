"""The result store: one SQLite file per sweep, written by the coordinator alone.

A trial is done when its row is committed, and by nothing else: there are no flags that a kill could leave
behind. Rows are inserted or ignored, never changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax import trial as core
from moejax.sweep.chunk import ChunkResult
from moejax.sweep.plan import Plan
from moejax.sweep.schema import (
    STORE_NAME,
    StoreError,
    check_sound,
    clear_errors,
    connect_for_writing,
    explain,
)

LOCK_NAME = "lock"
LOCK_TRIES, LOCK_PAUSE_SECONDS = 5, 0.05
COMMIT_SECONDS = 0.25
"""Chunks that end within this time share a commit: a kill loses no more work than this, and what runs."""


class Store:
    """The coordinator's hold on a run folder. Use as a context manager.

    Raises:
        StoreError: one line for each way in which the folder cannot be used; see `schema`.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.path = self.folder / STORE_NAME
        self._made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: cannot make the run folder: {error.strerror}") from None
        self._lock = lock_folder(self.folder)
        try:
            self._connection = connect_for_writing(self.path)
            check_sound(self._connection, self.path)
            self._add_metric_columns()
        except BaseException:
            self._lock.close()
            raise
        self._run = 0
        self._cells: list[int] = []
        self._pending = False
        self._last_commit = time.monotonic()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with clear_errors(self.path):
                self.commit()
                self._connection.execute("PRAGMA optimize")
        finally:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()  # also folds the log into the file
            self._lock.close()

    @property
    def journal_mode(self) -> str:
        """ "wal", or "delete" where the file system cannot do WAL."""
        return self._connection.execute("PRAGMA journal_mode").fetchone()[0]

    def previous_provenance(self) -> list[dict[str, Any]]:
        """Provenance of the earlier runs in this folder that committed a trial, oldest first."""
        with clear_errors(self.path):
            rows = self._connection.execute(
                "SELECT provenance FROM runs WHERE run IN (SELECT run FROM chunks) ORDER BY run"
            ).fetchall()
        return [json.loads(row[0]) for row in rows]

    def begin_run(self, plan: Plan, provenance: Mapping[str, Any]) -> None:
        """Record a start of the coordinator, and its plan, in one transaction."""
        spec = plan.spec
        with self._writing():
            self._connection.executemany(
                "INSERT OR IGNORE INTO cells (result_hash, data_hash, fields) VALUES (?, ?, ?)",
                ((cell.result_hash, cell.data_hash, json.dumps(cell.fields())) for cell in plan.cells),
            )
            numbers = dict(self._connection.execute("SELECT result_hash, cell FROM cells"))
            self._cells = [numbers[cell.result_hash] for cell in plan.cells]
            self._connection.execute("DELETE FROM plan")
            self._connection.executemany(
                "INSERT INTO plan VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (
                        position,
                        self._cells[position],
                        plan.buckets[cell.bucket].label,
                        plan.buckets[cell.bucket].work,
                        spec.first_target,
                        spec.most_trials,
                    )
                    for position, cell in enumerate(plan.cells)
                ),
            )
            cursor = self._connection.execute(
                "INSERT INTO runs (provenance, started) VALUES (?, ?)", (json.dumps(provenance), time.time())
            )
            self._run = int(cursor.lastrowid or 0)
            self.commit()

    def end_run(self, wall_seconds: float, compile_seconds: float) -> None:
        """Complete the record of this run (a killed run has none; its chunks say what it did)."""
        with self._writing():
            self._connection.execute(
                "UPDATE runs SET wall_seconds = ?, compile_seconds = ? WHERE run = ?",
                (wall_seconds, compile_seconds, self._run),
            )
            self.commit()

    def forget_failures(self) -> int:
        """Delete the rows that the engine marked as failed (not what the core judged), to run them again."""
        with self._writing():
            self._connection.execute(
                "DELETE FROM timings WHERE (cell, trial) IN (SELECT cell, trial FROM trials WHERE status < 0)"
            )
            count = self._connection.execute("DELETE FROM trials WHERE status < 0").rowcount
            self.commit()
        return count

    def done_trials(self) -> dict[int, set[int]]:
        """Committed trials by the plan's cell position."""
        position_of = {cell: position for position, cell in enumerate(self._cells)}
        done: dict[int, set[int]] = {}
        with clear_errors(self.path):
            for cell, trial in self._connection.execute("SELECT cell, trial FROM trials"):
                position = position_of.get(cell)
                if position is not None:
                    done.setdefault(position, set()).add(trial)
        return done

    def metric_values(self, metric: str) -> dict[int, dict[int, float]]:
        """Committed values of a metric: plan position -> trial -> value, NaN where there is none."""
        position_of = {cell: position for position, cell in enumerate(self._cells)}
        values: dict[int, dict[int, float]] = {}
        with clear_errors(self.path):
            rows = self._connection.execute(f'SELECT cell, trial, "{metric}" FROM trials')
            for cell, trial, value in rows:
                position = position_of.get(cell)
                if position is not None:
                    values.setdefault(position, {})[trial] = math.nan if value is None else value
        return values

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
        keys = [(self._cells[position], trial) for position, trial in trials]
        names = list(result.metrics)
        columns = "".join(f', "{name}"' for name in names)
        marks = ", ?" * (4 + len(names))
        with self._writing():
            cursor = self._connection.execute(
                "INSERT INTO chunks (run, bucket, trials, size, vmap_width, host, process, device, started, "
                "wall_seconds, compile_seconds, compilations, execute_seconds) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._run, bucket, len(keys), size, vmap_width, result.host, result.process,
                    result.device, result.started, result.wall_seconds, result.compile_seconds,
                    result.compilations, result.execute_seconds,
                ),
            )  # fmt: skip
            values = zip(*(result.metrics[name].tolist() for name in names), strict=True)
            self._connection.executemany(
                f"INSERT OR IGNORE INTO trials (cell, trial, status, reason{columns}) VALUES ({marks[2:]})",
                (
                    (*key, status, result.reasons.get(position), *row)
                    for position, (key, status, row) in enumerate(
                        zip(keys, result.status.tolist(), values, strict=True)
                    )
                ),
            )
            self._connection.executemany(
                "INSERT OR IGNORE INTO timings VALUES (?, ?, ?, ?)",
                ((*key, cursor.lastrowid, attempts) for key in keys),
            )
            self._connection.executemany(
                "INSERT OR IGNORE INTO arrays VALUES (?, ?, ?, ?)",
                (
                    (*key, name, _npy(rows[position]))
                    for name, rows in result.arrays.items()
                    for position, key in enumerate(keys)
                ),
            )
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit if the last commit is `COMMIT_SECONDS` old."""
        if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything added so far durable."""
        if self._pending:
            with self._writing():
                self._connection.execute("COMMIT")
                self._pending = False
        self._last_commit = time.monotonic()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Write within the open transaction, or a new one; after an error nothing of it is left."""
        try:
            if not self._pending:
                self._connection.execute("BEGIN IMMEDIATE")
                self._pending = True
            yield
        except sqlite3.Error as error:
            self._pending = False
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise StoreError(explain(self.path, error)) from error

    def _add_metric_columns(self) -> None:
        """A metric that is new since the store was made gets a column; old rows have no value there."""
        with clear_errors(self.path):
            have = {row[1] for row in self._connection.execute("PRAGMA table_info(trials)")}
            for name in core.metric_names():
                if name not in have:
                    self._connection.execute(f'ALTER TABLE trials ADD COLUMN "{name}" REAL')


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def lock_folder(folder: Path) -> io.TextIOWrapper:
    """Hold a run folder for one coordinator; the kernel lets go when the process ends, however it ends.

    Raises:
        StoreError: another coordinator holds it, or the folder cannot be written.
    """
    try:
        handle = open(folder / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 - held until the store is closed
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with --out"
        ) from None
    try:
        _try_lock(handle)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        raise StoreError(
            f"{folder}: a sweep is already running here ({holder}); wait for it, or end it"
        ) from None
    except OSError as error:
        handle.close()
        raise StoreError(
            f"{folder}: this file system has no file locks ({error.strerror}); use --out"
        ) from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    handle.flush()
    return handle


def _try_lock(handle: io.TextIOWrapper) -> None:
    """Take the lock; a `moejax status` that looks at this very moment is waited for."""
    for _ in range(LOCK_TRIES):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_SECONDS)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_running(folder: Path) -> bool:
    """Whether a coordinator holds the folder now. Changes nothing."""
    try:
        with open(folder / LOCK_NAME, encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # never locked, or locks are not supported: nothing is known to run
    return False
