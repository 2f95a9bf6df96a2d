"""Makes a new store of the sound rows of a damaged one; the same sweep runs the other trials again."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.sweep.store.digests import DIGEST_COLUMN, row_digests
from moejax.sweep.store.lock import lock_folder
from moejax.sweep.store.schema import (
    STORE_NAME,
    StoreError,
    clear_errors,
    columns_of,
    connect_for_reading,
    connect_for_writing,
    expected_columns,
    keys_of,
)
from moejax.sweep.store.soundness import has_digests, is_provenance, sound_rows, strange_columns

DAMAGED_SUFFIX = ".damaged"
TABLES = ("cells", "runs", "chunks", "trials", "timings", "arrays")
"""Tables in the order of their references. The plan is left out: the next run writes its own."""


def repair_store(folder: Path, check: Callable[[Sequence[dict[str, Any]]], None]) -> str:
    """Replace a folder's store by one of its sound rows, and keep the old one in the folder as store.sqlite.damaged.

    Args:
        folder: the run folder.
        check: as in `Store`; it may refuse the folder, which then stays unchanged.

    Returns:
        One line on the rows that were kept.

    Raises:
        StoreError: there is no store, none of it can be read, or the folder is in use.
    """
    path = folder / STORE_NAME
    if not path.is_file():
        raise StoreError(f"{path}: there is no store to repair")
    with contextlib.closing(lock_folder(folder)):
        new = path.with_name(STORE_NAME + ".new")
        try:
            with (
                contextlib.closing(connect_for_reading(path, alone=True)) as old,
                contextlib.closing(fresh_store(new)) as target,
                clear_errors(path),
            ):
                kept, lost = _copy_sound(old, target)
                runs = target.execute(
                    "SELECT provenance FROM runs WHERE run IN (SELECT run FROM chunks)"
                ).fetchall()
                check([json.loads(row[0]) for row in runs])
                target.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                target.execute("PRAGMA journal_mode=DELETE")
            damaged = _keep_aside(path)
            new.replace(path)
        finally:
            remove_store(new)
    return f"{path}: {kept:,} sound trials are kept, {lost:,} damaged ones are not; the old store is {damaged.name}"


def fresh_store(path: Path) -> sqlite3.Connection:
    """A new, empty store; a file of that name is removed."""
    path.unlink(missing_ok=True)
    return connect_for_writing(path)


def remove_store(path: Path) -> None:
    """Remove a store that nobody uses, with SQLite's own files beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _keep_aside(path: Path) -> Path:
    """Copy the store, and move its log away, so that SQLite does not apply it to the new store."""
    damaged = path.with_name(path.name + DAMAGED_SUFFIX)
    shutil.copy2(path, damaged)
    log, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    if log.exists() and log.stat().st_size:
        log.replace(damaged.with_name(damaged.name + "-wal"))
    for file in (log, index):
        file.unlink(missing_ok=True)
    return damaged


def _copy_sound(old: sqlite3.Connection, new: sqlite3.Connection) -> tuple[int, int]:
    """Copy the sound rows whose references are sound too; returns the numbers of trials kept and not kept."""
    old.text_factory = bytes
    rows: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    kinds = {table: columns_of(old, table) for table in TABLES}
    read = 0
    for table in TABLES:
        found = _sound_records(old, table, kinds[table], rows.get("cells", {}))
        read = found.read if table == "trials" else read
        rows[table] = {tuple(record[key] for key in keys_of(new, table)): record for record in found.records}
    cells, runs, chunks = rows["cells"], rows["runs"], rows["chunks"]
    runs = rows["runs"] = {key: run for key, run in runs.items() if is_provenance(run["provenance"])}
    rows["chunks"] = {key: chunk for key, chunk in chunks.items() if (chunk["run"],) in runs}
    rows["timings"] = {
        key: timing for key, timing in rows["timings"].items() if (timing["chunk"],) in rows["chunks"]
    }
    recorded = {key: _recorded(cell["fields"]) for key, cell in cells.items()}
    rows["trials"] = {
        key: trial
        for key, trial in rows["trials"].items()
        if key[:1] in cells
        and key in rows["timings"]
        and (trial["status"] < 0 or all((*key, name) in rows["arrays"] for name in recorded[key[:1]]))
    }
    for table in ("timings", "arrays"):
        rows[table] = {key: row for key, row in rows[table].items() if key[:2] in rows["trials"]}
    new.execute("BEGIN IMMEDIATE")
    for table in TABLES:
        insert_records(new, table, kinds[table], list(rows[table].values()))
    new.execute("COMMIT")
    return len(rows["trials"]), read - len(rows["trials"])


class _Found:
    """Records of a table with decoded texts; `read` counts those that could be read, sound or not."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.read = 0


def _sound_records(
    connection: sqlite3.Connection, table: str, kinds: Mapping[str, str], cells: Mapping[tuple[Any, ...], Any]
) -> _Found:
    found = _Found()
    expected = {*expected_columns()[table]} - (set() if has_digests(connection) else {DIGEST_COLUMN})
    if not expected <= {*kinds} or strange_columns(
        table, kinds
    ):  # the description of the table is damaged: no row can be read
        with contextlib.suppress(sqlite3.DatabaseError):
            found.read = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        return found
    for rows in _readable(connection, table, list(kinds), [key[0] for key in cells]):
        columns = dict(zip(kinds, zip(*rows, strict=True), strict=True))
        found.read += len(rows)
        for sound, row in zip(sound_rows(table, kinds, columns, len(rows)), rows, strict=True):
            if sound:
                record = dict(zip(kinds, row, strict=True))
                found.records.append(
                    {
                        name: value.decode() if kinds[name] == "TEXT" and value is not None else value
                        for name, value in record.items()
                        if name != DIGEST_COLUMN
                    }
                )
    return found


def _readable(
    connection: sqlite3.Connection, table: str, names: Sequence[str], cells: Sequence[int]
) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of a table that SQLite can still read: from both ends of it, and of each cell's rows, up to the damage."""
    listed, keys = ", ".join(f'"{name}"' for name in names), keys_of(connection, table)
    try:
        yield from filter(None, [connection.execute(f"SELECT {listed} FROM {table}").fetchall()])
        return
    except sqlite3.DatabaseError:
        pass  # a page is damaged: read piece by piece
    by_cell = keys[0] == "cell" and table != "cells"
    seen: set[tuple[Any, ...]] = set()
    for cell in cells if by_cell else [None]:
        where = "" if cell is None else f"WHERE cell = {int(cell)}"
        for direction in ("ASC", "DESC"):
            order = ", ".join(f"{key} {direction}" for key in keys)
            rows = []
            with contextlib.suppress(sqlite3.DatabaseError):
                for row in connection.execute(f"SELECT {listed} FROM {table} {where} ORDER BY {order}"):
                    key = tuple(row[names.index(name)] for name in keys)
                    if key not in seen:
                        seen.add(key)
                        rows.append(row)
            if rows:
                yield rows


def _recorded(fields: str) -> list[str]:
    """The arrays that a trial of a cell with these fields must have."""
    return list(json.loads(fields).get("record") or [])


def insert_records(
    connection: sqlite3.Connection, table: str, kinds: Mapping[str, str], records: Sequence[Mapping[str, Any]]
) -> None:
    """Insert rows with their digests; columns of metrics that the table lacks are added.

    Args:
        connection: a store, in a transaction.
        table: its table.
        kinds: column -> declared type where the rows come from.
        records: rows, with the same columns and without digests.
    """
    if not records:
        return
    have = columns_of(connection, table)
    for name in kinds:
        if name not in have:  # a column of a metric
            connection.execute(f'ALTER TABLE {table} ADD COLUMN "{name}" REAL')
    kinds = columns_of(connection, table)
    names = list(records[0])
    columns = {name: [record[name] for record in records] for name in names}
    listed = ", ".join(f'"{name}"' for name in (*names, DIGEST_COLUMN))
    connection.executemany(
        f"INSERT INTO {table} ({listed}) VALUES ({', '.join('?' * (len(names) + 1))})",
        zip(*columns.values(), row_digests(kinds, columns, len(records)), strict=True),
    )
