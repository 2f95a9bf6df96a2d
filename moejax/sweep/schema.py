"""The tables of a store, and how one is opened: every way that can fail ends in one clear line."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

STORE_NAME = "store.sqlite"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x6D6F6A78  # "mojx": a SQLite file that carries another is not a store
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
"""WAL needs memory shared between processes, which these do not give (SQLite manual on WAL)."""

TABLES = """
CREATE TABLE cells (
    cell INTEGER PRIMARY KEY,
    result_hash TEXT NOT NULL UNIQUE,
    data_hash TEXT NOT NULL,
    fields TEXT NOT NULL);               -- JSON: every field and the method
CREATE TABLE plan (                      -- the cells of the latest spec, in its order
    position INTEGER PRIMARY KEY,
    cell INTEGER NOT NULL UNIQUE REFERENCES cells,
    bucket TEXT NOT NULL,
    work REAL NOT NULL,                  -- size of a trial, for estimates of time
    first_trials INTEGER NOT NULL,
    most_trials INTEGER NOT NULL);
CREATE TABLE trials (                    -- one row per trial, failed ones too (metric columns are added)
    cell INTEGER NOT NULL REFERENCES cells,
    trial INTEGER NOT NULL,
    status INTEGER NOT NULL,
    reason TEXT,
    PRIMARY KEY (cell, trial)) WITHOUT ROWID;
CREATE TABLE arrays (                    -- recorded extras, as .npy
    cell INTEGER NOT NULL,
    trial INTEGER NOT NULL,
    name TEXT NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (cell, trial, name)) WITHOUT ROWID;
CREATE TABLE runs (                      -- one row per start of the coordinator: provenance
    run INTEGER PRIMARY KEY,
    provenance TEXT NOT NULL,            -- JSON
    started REAL NOT NULL,               -- Unix time, seconds
    wall_seconds REAL,
    compile_seconds REAL);
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
    execute_seconds REAL NOT NULL);
CREATE TABLE timings (                   -- which chunk a trial ran in, and how often it was tried
    cell INTEGER NOT NULL,
    trial INTEGER NOT NULL,
    chunk INTEGER NOT NULL REFERENCES chunks,
    attempts INTEGER NOT NULL,
    PRIMARY KEY (cell, trial)) WITHOUT ROWID;
"""


class StoreError(OSError):
    """A store that cannot be used; one line that says what to do. Committed rows are untouched."""


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a `StoreError` of one line."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(explain(path, error)) from error


def explain(path: Path, error: sqlite3.Error) -> str:
    """One line for an error of SQLite: what happened, and what to do."""
    message = str(error)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return (
            f"{path}: the disk is full; what was committed is kept, make room and run the same command again"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return (
            f"{path}: the store is damaged ({message}); it was not changed: move it away, or restore a copy"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"{path}: cannot be written ({message}); choose another folder with --out"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{path}: another program holds the store ({message}); end it and run the same command again"
    if code == sqlite3.SQLITE_IOERR:
        return f"{path}: reading or writing failed ({message}); what was committed is kept"
    return f"{path}: {message}"


def connect_for_writing(path: Path) -> sqlite3.Connection:
    """Open a store for the coordinator, or make it; WAL where the file system can, else a rollback journal.

    Raises:
        StoreError: damaged, not a store, from a newer version, or not writable.
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


def connect_for_reading(path: Path) -> sqlite3.Connection:
    """Open a store without the right to change it; works while a sweep is writing, and on a read-only disk.

    Raises:
        StoreError: no store there, damaged, or from a newer version.
    """
    if not path.is_file():
        raise StoreError(f"{path}: there is no such store; expected a folder that `moejax sweep` has written")
    with clear_errors(path):
        check_is_store(path)
        connection = _read_only(path)
        connection.execute("PRAGMA cache_size=-65536")
        return connection


def _read_only(path: Path) -> sqlite3.Connection:
    uri = path.resolve().as_uri() + "?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError:
        connection.close()
        if path.with_name(path.name + "-wal").exists():
            raise
        # A WAL store on a read-only disk has no shared-memory file; with no log, the file is all there is.
        return sqlite3.connect(uri + "&immutable=1", uri=True, timeout=BUSY_SECONDS)


def check_is_store(path: Path) -> None:
    """Raise `StoreError` unless the file is a sound store of this version; a new, empty file passes."""
    if path.stat().st_size == 0:
        return
    connection = _read_only(path)
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


def check_sound(connection: sqlite3.Connection, path: Path) -> None:
    """Raise `StoreError` if a page of the store is damaged."""
    with clear_errors(path):
        finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if finding != "ok":
        finding = " ".join(finding.split())
        raise StoreError(
            f"{path}: the store is damaged ({finding}); it was not changed: move it away, or restore a copy"
        )


def on_network_file_system(path: Path) -> bool:
    """Whether the folder is on a file system shared between hosts, by the kernel's table of mounts."""
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
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")  # a committed row survives a power cut
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """Make the tables, in one transaction; an existing store is left as it is. Proves that writing works."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
