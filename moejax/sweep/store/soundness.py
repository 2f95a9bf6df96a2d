"""Checks that a store is undamaged: SQLite's own checks, a digest for every row, and for older stores types and shapes."""

from __future__ import annotations

import io
import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.sweep.spec.fields import FIELDS, METHOD_FIELD
from moejax.sweep.spec.precision import PrecisionRule
from moejax.sweep.store.digests import DIGEST_COLUMN, digests_hold, well_typed
from moejax.sweep.store.schema import clear_errors, columns_of, damaged, expected_columns

BATCH_ROWS = 20_000
FIRST_VERSION_WITH_DIGESTS = 2
TABLES_OF_TRIALS = ("trials", "timings", "arrays")
"""The tables that grow with the number of trials."""
PROVENANCE_TYPES: Mapping[str, tuple[type, ...]] = {
    "spec": (str,),
    "spec_file": (str,),
    "spec_text": (str,),
    "overrides": (list,),
    "plugins": (list,),
    "git": (dict, type(None)),
    "versions": (dict,),
    "precision": (str,),
    "host": (str,),
    "processor": (str,),
    "workers": (str,),
}
"""Keys of a provenance that its readers use, with their types."""
_sound: dict[Path, tuple[Any, bool]] = {}
"""Stores that this process found sound: the file's stamp at that time, and true if the trials were checked."""


def check_store(connection: sqlite3.Connection, path: Path, *, most_trials: int | None = None) -> None:
    """Refuse a store that is damaged. A file that has not changed since its last check is not checked again.

    Args:
        connection: connection to the store.
        path: the file of the store.
        most_trials: with more trials than this, the tables that grow with them are not read; callers then do not use them.

    Raises:
        StoreError: one line on the damage, and on the way to keep the sound rows.
    """
    stamp = _stamp(path)
    known = _sound.get(path.resolve())
    if known is not None and known[0] == stamp and (known[1] or most_trials is not None):
        return
    decode = connection.text_factory
    with clear_errors(path):
        connection.execute("BEGIN")  # a consistent view of the store while a sweep writes
        connection.text_factory = bytes  # so that a text that is not UTF-8 is a finding, not an exception
        try:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                return  # killed before its tables were committed
            _check_tables(connection, path)
            count = connection.execute("SELECT count(*) FROM trials").fetchone()[0]
            whole = most_trials is None or count <= most_trials
            findings = [
                finding
                for table in expected_columns()
                if whole or table not in TABLES_OF_TRIALS
                for finding in [_finding(connection, table)]
                if finding
            ]
            if findings:
                raise damaged(path, "; ".join(findings))
            _check_references(connection, path, whole)
        finally:
            connection.text_factory = decode
            connection.execute("ROLLBACK")
    _sound[path.resolve()] = (stamp, whole)


def _stamp(path: Path) -> tuple[Any, ...]:
    """Properties of the file that change when a store is written."""
    stamps = []
    for file in (path, path.with_name(path.name + "-wal")):
        try:
            state = os.stat(file)
        except OSError:
            stamps.append(None)
        else:
            stamps.append((state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(stamps)


def _check_tables(connection: sqlite3.Connection, path: Path) -> None:
    for table, expected in expected_columns().items():
        have = columns_of(connection, table)
        missing = [name for name in expected if name not in have and name != DIGEST_COLUMN]
        if missing:
            lost = f"the table {table}" if not have else f"the column {missing[0]} of {table}"
            raise damaged(path, f"{lost} is missing")
        strange = strange_columns(table, have)
        if strange:
            raise damaged(path, f"the column {strange[0]} of {table} is not one of ours")
        if DIGEST_COLUMN not in have and has_digests(connection):
            raise damaged(path, f"the column {DIGEST_COLUMN} of {table} is missing")
    finding = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    finding = finding.decode(errors="replace") if isinstance(finding, bytes) else str(finding)
    if finding != "ok":
        raise damaged(path, finding)


def has_digests(connection: sqlite3.Connection) -> bool:
    """True if the store's version has a digest for every row; a table without that column is then damaged."""
    return connection.execute("PRAGMA user_version").fetchone()[0] >= FIRST_VERSION_WITH_DIGESTS


def strange_columns(table: str, have: Mapping[str, str]) -> list[str]:
    """Columns (name -> declared type) of a table that are neither moejax's nor a metric's."""
    expected = expected_columns()[table].items()
    return [
        name
        for name, kind in have.items()
        if (name, kind) not in expected and not _is_metric(table, name, kind)
    ]


def _is_metric(table: str, name: str, kind: str) -> bool:
    return table == "trials" and name.isidentifier() and kind == "REAL"


def _check_references(connection: sqlite3.Connection, path: Path, whole: bool) -> None:
    for table in expected_columns():
        if whole or table not in TABLES_OF_TRIALS:
            row = connection.execute(f"PRAGMA foreign_key_check({table})").fetchone()
            if row is not None:
                raise damaged(path, f"a row of {table} belongs to none of {row[2].decode(errors='replace')}")


def _finding(connection: sqlite3.Connection, table: str) -> str:
    """A text with the number of damaged rows of a table; empty if there are none."""
    kinds = columns_of(connection, table)
    total = bad = 0
    for columns, rows in _batches(connection, table, kinds):
        total += rows
        bad += rows - int(sound_rows(table, kinds, columns, rows).sum())
    return f"{bad:,} of {total:,} rows of {table}" if bad else ""


def _batches(
    connection: sqlite3.Connection, table: str, kinds: Mapping[str, str]
) -> Iterator[tuple[dict[str, Sequence[Any]], int]]:
    """The columns of a table in batches. A text in a blob column becomes NULL, because Python reads both as bytes."""
    listed = ", ".join(
        f"CASE typeof({name}) WHEN 'blob' THEN {name} END" if kind == "BLOB" else f'"{name}"'
        for name, kind in kinds.items()
    )
    cursor = connection.execute(f"SELECT {listed} FROM {table}")
    while rows := cursor.fetchmany(BATCH_ROWS):
        yield dict(zip(kinds, zip(*rows, strict=True), strict=True)), len(rows)


def sound_rows(
    table: str, kinds: Mapping[str, str], columns: Mapping[str, Sequence[Any]], rows: int
) -> np.ndarray:
    """(rows,) bool: true for undamaged rows of a table; texts are bytes.

    The digests decide. Rows of an older store have none, and are sound if their types, and the shapes of their JSON, are.
    """
    if DIGEST_COLUMN in columns:
        return digests_hold(kinds, columns, rows)
    required = [name for name, kind in expected_columns()[table].items() if name in REQUIRED[table] and kind]
    good = well_typed(kinds, columns, rows)
    for name in required:
        good &= np.array([value is not None for value in columns[name]], bool)
    shape = _SHAPES.get(table)
    if shape is not None:
        name, is_sound = shape
        good &= np.array([is_sound(value) for value in columns[name]], bool)
    return good


REQUIRED: Mapping[str, tuple[str, ...]] = {
    "cells": ("cell", "result_hash", "data_hash", "fields"),
    "plan": ("position", "cell", "bucket", "work", "first_trials", "most_trials"),
    "trials": ("cell", "trial", "status"),
    "arrays": ("cell", "trial", "name", "content"),
    "runs": ("run", "provenance", "started"),
    "chunks": ("chunk", "run", "bucket", "trials", "size", "process", "started", "wall_seconds"),
    "timings": ("cell", "trial", "chunk", "attempts"),
}
"""Columns that have a value in every row."""


def _are_fields(text: Any) -> bool:
    """True if a text is the JSON of a cell's fields."""
    values = _json_object(text)
    if values is None or not isinstance(values.get(METHOD_FIELD), str):
        return False
    for name, value in values.items():
        if name in FIELDS:
            try:
                FIELDS[name].coerce(value)
            except ValueError:
                return False
    return True


def _is_array(content: Any) -> bool:
    """True if bytes are an array in the format of `numpy.save`."""
    try:
        return np.load(io.BytesIO(content), allow_pickle=False) is not None
    except (ValueError, TypeError, EOFError, OSError):
        return False


def is_provenance(text: Any) -> bool:
    """True if a text is the JSON of a run's provenance."""
    values = _json_object(text)
    if values is None or not set(PROVENANCE_TYPES) <= set(values):
        return False
    if not all(isinstance(values[name], types) for name, types in PROVENANCE_TYPES.items()):
        return False
    git = values["git"]
    plugins = all(
        isinstance(plugin, dict) and all(isinstance(plugin.get(name), str) for name in ("path", "source"))
        for plugin in values["plugins"]
    )
    return (
        plugins
        and (git is None or (isinstance(git.get("commit"), str) and "dirty" in git))
        and isinstance(values["versions"].get("moejax"), str)
        and _is_spec(values["spec"])
    )


def _is_spec(text: str) -> bool:
    spec = _json_object(text)
    if spec is None or not isinstance(spec.get("name"), str) or type(spec.get("seed")) is not int:
        return False
    if "precision" not in spec:
        return False
    rule = spec["precision"]
    if rule is None:
        return True
    try:
        rule = PrecisionRule(**rule)
        return (
            isinstance(rule.metric, str)
            and rule.metric.isidentifier()
            and isinstance(rule.statistic, str)
            and math.isfinite(rule.mcse)
            and 2 <= rule.min_trials <= rule.max_trials < 2**63
        )
    except TypeError:
        return False


def _json_object(text: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        return None
    return value if isinstance(value, dict) else None


_SHAPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "cells": ("fields", _are_fields),
    "runs": ("provenance", is_provenance),
    "arrays": ("content", _is_array),
}
"""Table -> a column with a special format, and its check."""
