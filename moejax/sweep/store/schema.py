"""The tables of a store, and the functions that open one; every failure gives one clear line."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from moejax.sweep.store.digests import DIGEST_COLUMN, row_digests

STORE_NAME = "store.sqlite"
SCHEMA_VERSION = 2
"""Version of the tables; version 1 had no digests."""
APPLICATION_ID = 0x6D6F6A78  # "mojx": a SQLite file with another application id is not a store
LONGEST_PATH = 500
"""SQLite allows 512 bytes for a path, including its own suffix."""
BUSY_SECONDS = 30.0

NETWORK_FILE_SYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "9p",
    "fuse.sshfs",
    "glusterfs",
)
"""WAL needs memory shared between processes, which these do not provide (SQLite manual on WAL)."""

TABLES = """
CREATE TABLE cells (
    cell INTEGER PRIMARY KEY,
    result_hash TEXT NOT NULL UNIQUE,
    data_hash TEXT NOT NULL,
    fields TEXT NOT NULL,                -- JSON: every field and the method
    digest INTEGER);                     -- of the row, as in every table (`digests`)
CREATE TABLE plan (                      -- the cells of the latest spec, in its order
    position INTEGER PRIMARY KEY,
    cell INTEGER NOT NULL UNIQUE REFERENCES cells,
    bucket TEXT NOT NULL,
    work REAL NOT NULL,                  -- size of a trial, for estimates of time
    first_trials INTEGER NOT NULL,
    most_trials INTEGER NOT NULL,
    digest INTEGER);
CREATE TABLE trials (                    -- one row per trial, failed ones too (metric columns are added)
    cell INTEGER NOT NULL REFERENCES cells,
    trial INTEGER NOT NULL,
    status INTEGER NOT NULL,
    reason TEXT,
    digest INTEGER,
    PRIMARY KEY (cell, trial)) WITHOUT ROWID;
CREATE TABLE arrays (                    -- recorded extras, as .npy
    cell INTEGER NOT NULL,
    trial INTEGER NOT NULL,
    name TEXT NOT NULL,
    content BLOB NOT NULL,
    digest INTEGER,
    PRIMARY KEY (cell, trial, name)) WITHOUT ROWID;
CREATE TABLE runs (                      -- one row per start of the coordinator: provenance
    run INTEGER PRIMARY KEY,
    provenance TEXT NOT NULL,            -- JSON
    started REAL NOT NULL,               -- Unix time, seconds
    wall_seconds REAL,
    compile_seconds REAL,
    digest INTEGER);
CREATE TABLE chunks (                    -- times and hosts
    chunk INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES runs,
    bucket TEXT NOT NULL,
    trials INTEGER NOT NULL,
    size INTEGER NOT NULL,               -- compiled number of trials, padding included
    vmap_width INTEGER NOT NULL,
    host TEXT NOT NULL,
    process INTEGER NOT NULL,
    device TEXT NOT NULL,
    started REAL NOT NULL,
    wall_seconds REAL NOT NULL,
    compile_seconds REAL NOT NULL,
    compilations INTEGER NOT NULL,
    execute_seconds REAL NOT NULL,
    digest INTEGER);
CREATE TABLE timings (                   -- which chunk a trial ran in, and how often it was tried
    cell INTEGER NOT NULL,
    trial INTEGER NOT NULL,
    chunk INTEGER NOT NULL REFERENCES chunks,
    attempts INTEGER NOT NULL,
    digest INTEGER,
    PRIMARY KEY (cell, trial)) WITHOUT ROWID;
"""


class StoreError(OSError):
    """A store cannot be used; the message is one line with the remedy. Committed rows are untouched."""


@functools.cache
def expected_columns() -> dict[str, dict[str, str]]:
    """Table -> column -> declared type, of a store without metrics."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(TABLES)
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: columns_of(connection, table) for table in tables}


def columns_of(connection: sqlite3.Connection, table: str) -> dict[str, str]:
    """Column -> declared type of a table; empty if it is not there."""
    return {_decoded(row[1]): _decoded(row[2]) for row in connection.execute(f"PRAGMA table_info({table})")}


def keys_of(connection: sqlite3.Connection, table: str) -> list[str]:
    """The columns of a table's primary key."""
    return [_decoded(row[1]) for row in connection.execute(f"PRAGMA table_info({table})") if row[5]]


def _decoded(name: str | bytes) -> str:
    """A name as text, from a connection that decodes texts or from one that returns bytes."""
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def damaged(path: Path, finding: str) -> StoreError:
    """The error for a damaged store: the finding, and the way to keep the sound rows."""
    finding = " ".join(finding.split())
    return StoreError(
        f"{path}: the store is damaged ({finding}); it was not changed: the same sweep with --repair keeps what is "
        "sound and runs the rest again; or move it away"
    )


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a `StoreError` of one line."""
    try:
        yield
    except sqlite3.Error as error:
        raise explained(path, error) from error


def explained(path: Path, error: sqlite3.Error) -> StoreError:
    """The `StoreError` for an error of SQLite."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_CORRUPT:
        return damaged(path, str(error))
    if code == sqlite3.SQLITE_NOTADB:
        return StoreError(
            f"{path}: the store is damaged ({error}); nothing of it can be read: move it away, or restore a copy"
        )
    return StoreError(explain(path, error))


def explain(path: Path, error: sqlite3.Error) -> str:
    """One line for an error of SQLite: the cause, and the remedy."""
    message = str(error)
    if len(os.fsencode(path.absolute())) > LONGEST_PATH:
        return f"{path}: SQLite takes paths of at most {LONGEST_PATH} bytes; choose a shorter one with --out"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return (
            f"{path}: the disk is full; what was committed is kept, make room and run the same command again"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"{path}: cannot be written ({message}); choose another folder with --out"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{path}: another program holds the store ({message}); end it and run the same command again"
    if code == sqlite3.SQLITE_IOERR:
        return f"{path}: reading or writing failed ({message}); what was committed is kept"
    return f"{path}: {message}"


def is_busy(error: BaseException) -> bool:
    """True if an error of SQLite, or the `StoreError` made from one, means that another program holds the store."""
    error = error.__cause__ if isinstance(error, StoreError) and error.__cause__ is not None else error
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def connect_for_writing(path: Path) -> sqlite3.Connection:
    """Open a store for the coordinator, or make it; with WAL if the file system supports it, else with a rollback journal.

    Raises:
        StoreError: the file is damaged, not a store, from a newer version, or not writable.
    """
    with clear_errors(path):
        if path.exists():
            check_is_store(path)
        if not on_network_file_system(path):
            connection = _open(path)
            try:
                mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                _create(connection)
                if mode == "wal":
                    return connection
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (
                    sqlite3.SQLITE_PROTOCOL,
                    sqlite3.SQLITE_IOERR,
                ):
                    connection.close()
                    raise
            connection.close()  # no WAL here: shared memory or its locks are missing
        connection = _open(path)
        connection.execute("PRAGMA journal_mode=DELETE")
        _create(connection)
        return connection


def connect_for_reading(path: Path, *, alone: bool = False) -> sqlite3.Connection:
    """Open a store without the right to change it; works while a sweep is writing, and on a read-only disk.

    Args:
        path: the file of the store.
        alone: no other program writes it at this time, so SQLite need not make its additional files.

    Raises:
        StoreError: there is no store, it is from a newer version, or it is no database.
    """
    if not path.is_file():
        raise StoreError(f"{path}: there is no such store; expected a folder that `moejax sweep` has written")
    with clear_errors(path):
        check_is_store(path, alone=alone)
        connection = _read_only(path, alone)
        connection.execute("PRAGMA cache_size=-65536")
        return connection


def _read_only(path: Path, alone: bool = False) -> sqlite3.Connection:
    uri = path.resolve().as_uri() + "?mode=ro"
    log = path.with_name(path.name + "-wal")
    if alone and not (log.exists() and log.stat().st_size):
        return sqlite3.connect(uri + "&immutable=1", uri=True, timeout=BUSY_SECONDS)
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError:
        connection.close()
        if log.exists():
            raise
        # A WAL store on a read-only disk has no shared-memory file; without a log, the file is complete.
        return sqlite3.connect(uri + "&immutable=1", uri=True, timeout=BUSY_SECONDS)


def check_is_store(path: Path, *, alone: bool = False) -> None:
    """Raise `StoreError` unless the file is a store of this version or an older one; a new, empty file passes."""
    if path.stat().st_size == 0:
        return
    connection = _read_only(path, alone)
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if empty and application in (0, APPLICATION_ID):
            return  # killed before its tables were committed
        if application != APPLICATION_ID:
            raise StoreError(
                f"{path}: a SQLite file, but not a store of moejax; choose another folder with --out"
            )
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path}: written by a newer moejax (store version {version}; this one reads "
                f"{SCHEMA_VERSION}); "
                "upgrade moejax, or choose another folder with --out"
            )
    finally:
        connection.close()


def on_network_file_system(path: Path) -> bool:
    """True if the folder is on a file system shared between hosts, by the kernel's table of mounts."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False  # not Linux: SQLite's own answer to WAL decides
    folder = path.resolve().parent
    best, kind = -1, ""
    for line in mounts:
        _, mount, file_system, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if len(mount) > best and (folder == Path(mount) or Path(mount) in folder.parents):
            best, kind = len(mount), file_system
    return kind.startswith(NETWORK_FILE_SYSTEMS)


def _open(path: Path) -> sqlite3.Connection:
    # the whole path: SQLite takes a path that begins with "file:" for a URI
    connection = sqlite3.connect(path.absolute(), timeout=BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")  # a committed row survives a power cut
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """Make the tables, or convert an older store to this version, in one transaction; this also proves that writing works."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        elif connection.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
            _add_digests(connection)
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _add_digests(connection: sqlite3.Connection) -> None:
    """Add digests to the rows of an older store; they guard the rows from now on."""
    for table in expected_columns():
        if DIGEST_COLUMN not in columns_of(connection, table):
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {DIGEST_COLUMN} INTEGER")
        kinds, keys = columns_of(connection, table), keys_of(connection, table)
        names = ", ".join(f'"{name}"' for name in kinds)
        rows = connection.execute(f"SELECT {names} FROM {table}").fetchall()
        if rows:
            columns = dict(zip(kinds, zip(*rows, strict=True), strict=True))
            connection.executemany(
                f"UPDATE {table} SET {DIGEST_COLUMN} = ? WHERE {' AND '.join(f'{key} = ?' for key in keys)}",
                zip(row_digests(kinds, columns, len(rows)), *(columns[key] for key in keys), strict=True),
            )
