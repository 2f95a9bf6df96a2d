"""Reads a store: the tidy table of trials, and the records of the runs. This module changes no store."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moejax.checks import require
from moejax.sweep import trial as core
from moejax.sweep.plan.chunks import ENGINE_STATUS_REASONS
from moejax.sweep.spec.fields import ALGORITHM_FIELDS, DATA_FIELDS, FIELDS, METHOD_FIELD
from moejax.sweep.spec.precision import PrecisionRule
from moejax.sweep.store.digests import DIGEST_COLUMN
from moejax.sweep.store.schema import STORE_NAME, StoreError, clear_errors, columns_of, connect_for_reading
from moejax.sweep.store.soundness import check_store

ARRAY_NAMES = ("history", "path")
"""Names that the field `record` of a spec may list."""
FIELD_COLUMNS = (*DATA_FIELDS, *ALGORITHM_FIELDS)
"""Columns that identify a cell, without the method."""


def store_path(folder: Path) -> Path:
    """The store of a run folder (or the store file itself).

    Raises:
        StoreError: the path is a file of another kind.
    """
    folder = Path(folder)
    if not folder.is_file():
        return folder / STORE_NAME
    if folder.suffix != Path(STORE_NAME).suffix:
        raise StoreError(f"{folder}: is a file; expected a folder that `moejax sweep` has written")
    return folder


@contextlib.contextmanager
def reading(folder: Path | str, *, most_trials: int | None = None) -> Iterator[sqlite3.Connection]:
    """A connection to a run folder's store, checked (see `soundness.check_store`), with a consistent view while a sweep writes.

    Raises:
        StoreError: there is no store, or it is empty or damaged.
    """
    path = store_path(Path(folder))
    with contextlib.closing(connect_for_reading(path)) as connection:
        check_store(connection, path, most_trials=most_trials)
        with clear_errors(path):
            if not columns_of(connection, "plan"):
                raise StoreError(
                    f"{path}: there is nothing in this store yet (a copy needs the file -wal beside it too, if there was one)"
                )
            connection.execute("BEGIN")
            yield connection


def frame_of(connection: sqlite3.Connection, query: str) -> pd.DataFrame:
    """The rows of a query."""
    cursor = connection.execute(query)
    return pd.DataFrame.from_records(cursor.fetchall(), columns=[column[0] for column in cursor.description])


def load(
    folder: Path | str, *, all_specs: bool = False, seconds: bool = False, result_hash: bool = False
) -> pd.DataFrame:
    """Return the table of trials: one row per trial that was run, failed ones included, in the order of the spec.

    Columns: every field, `trial`, `method`, the metrics (NaN if a trial failed), `status` (0 is ok),
    `reason`.

    Args:
        folder: a run folder.
        all_specs: include rows of cells that are not in the folder's latest spec.
        seconds: add the column `seconds`, the compute time of the trial (its chunk's mean, without compilation).
        result_hash: add the column `result_hash`, which with `trial` is the key of recorded arrays and timings.

    Raises:
        StoreError: there is no store, or it cannot be read.

    Examples:
        >>> table = moejax.sweep.load("runs/quickstart")
        >>> set(table.columns) >= {"method", "num_samples", "trial", "recovery_error", "status", "reason"}
        True
    """
    cells, rows = read_rows(folder, all_specs=all_specs)
    fields = cells.take(rows["position"].to_numpy())
    fields.index = rows.index
    parts = [
        fields[[*FIELD_COLUMNS]],
        rows[["trial"]],
        fields[[METHOD_FIELD]],
        rows[[*metric_columns(rows), "status"]],
    ]
    table = pd.concat(parts, axis=1).assign(reason=status_words(rows["status"], rows["reason"]))
    keys = cells["result_hash"].take(rows["position"].to_numpy()).to_numpy()
    if seconds:
        times = load_timings(folder).set_index(["result_hash", "trial"])["seconds"]
        index = pd.MultiIndex.from_arrays([keys, rows["trial"]])
        table.insert(list(table.columns).index("status"), "seconds", times.reindex(index).to_numpy())
    return table.assign(result_hash=keys) if result_hash else table


def read_rows(folder: Path | str, *, all_specs: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and trials as two tables, which `load` joins.

    Returns:
        cells: every field, the method, `bucket`, `first_trials`, `most_trials`, `result_hash`, `data_hash`; one row
            per cell, in the spec's order. rows: `position` (of the cell), `trial`, `status`, `reason` (None: see the
            status), metrics; sorted.
    """
    with reading(folder) as connection:
        have = list(columns_of(connection, "trials"))
        others = (*core.METRICS, "cell", "trial", "status", "reason", DIGEST_COLUMN)
        own = [name for name in have if name not in others]
        metrics = [*core.METRICS, *own]  # also metrics of a plugin that is not loaded here
        columns = ", ".join(f'"{name}"' if name in have else "NULL" for name in metrics)
        cells = _cells(connection, all_specs)
        raw = connection.execute(f"SELECT cell, trial, status, reason, {columns} FROM trials").fetchall()
        latest = connection.execute("SELECT provenance FROM runs ORDER BY run DESC LIMIT 1").fetchone()
        spec = json.loads(json.loads(latest[0])["spec"]) if latest else {}
    rows = pd.DataFrame.from_records(raw, columns=["cell", "trial", "status", "reason", *metrics])
    rows[metrics] = rows[metrics].astype("float64")
    position = rows["cell"].map(pd.Series(np.arange(len(cells)), index=cells["cell"]))
    rows = rows[position.notna()].drop(columns="cell")
    rows.insert(0, "position", position[position.notna()].astype("int64"))
    rows = rows.sort_values(["position", "trial"], kind="stable", ignore_index=True)
    if not all_specs:  # an earlier spec may have asked for more trials
        targets = _targets(cells, rows, spec)
        rows = rows[rows["trial"].to_numpy() < targets[rows["position"].to_numpy()]].reset_index(drop=True)
    return cells.drop(columns="cell"), rows


def _targets(cells: pd.DataFrame, rows: pd.DataFrame, spec: Mapping[str, Any]) -> np.ndarray:
    """The number of trials of each cell that the spec asks for, given the present rows."""
    if not spec.get("precision"):
        return cells["most_trials"].to_numpy()
    rule = PrecisionRule(**spec["precision"])
    values, trials = rows[rule.metric].to_numpy(), rows["trial"].to_numpy()
    bounds = np.searchsorted(rows["position"], np.arange(len(cells) + 1))
    targets = []
    for first, last in itertools.pairwise(bounds):
        leading = int((trials[first:last] == np.arange(last - first)).sum())  # a killed run may leave gaps
        targets.append(rule.target_after(values[first : first + leading])[0])
    return np.array(targets, dtype=np.int64)


def metric_columns(rows: pd.DataFrame) -> list[str]:
    """The metrics among the columns of `read_rows`: the built-in ones, then those of plugins."""
    return [name for name in rows.columns if name not in ("position", "trial", "status", "reason")]


def status_words(status: pd.Series, reason: pd.Series) -> pd.Series:
    """The reason of each row: as recorded, else the words of its status; empty for ok."""
    words = status.map({**core.STATUS_REASONS, **ENGINE_STATUS_REASONS, 0: ""})
    words = words.fillna("status " + status.astype(str))
    return reason.where(reason.notna(), words).astype("object")


def _cells(connection: Any, all_specs: bool) -> pd.DataFrame:
    join = "LEFT JOIN" if all_specs else "JOIN"
    rows = connection.execute(
        "SELECT cell, fields, bucket, first_trials, most_trials, result_hash, data_hash "
        f"FROM cells {join} plan USING (cell) ORDER BY position IS NULL, position, cell"
    ).fetchall()
    records = [json.loads(row[1]) for row in rows]
    frame = pd.DataFrame(
        {
            name: _column([record.get(name, default_of(name)) for record in records])
            for name in (*FIELD_COLUMNS, METHOD_FIELD)
        }
    )
    frame.insert(0, "cell", [row[0] for row in rows])
    return frame.assign(
        bucket=[row[2] for row in rows],
        first_trials=[row[3] for row in rows],
        most_trials=[row[4] for row in rows],
        result_hash=[row[5] for row in rows],
        data_hash=[row[6] for row in rows],
    )


def default_of(name: str) -> Any:
    """The value that a field has in a cell of before it was added."""
    return FIELDS[name].default if name in FIELDS else None


def _column(values: list[Any]) -> pd.Series:
    """A column of field values without conversion: lists become tuples, and None stays None among numbers."""
    values = [tuple(value) if isinstance(value, list) else value for value in values]
    column = pd.Series(values, dtype="object")
    return column if any(value is None for value in values) else column.infer_objects()


def load_timings(folder: Path | str) -> pd.DataFrame:
    """Return the table of times, attempts and hosts: a row per trial, with its chunk and the version of moejax.

    Args:
        folder: a run folder.

    Raises:
        StoreError: there is no store, or it cannot be read.

    Examples:
        >>> times = moejax.sweep.load_timings("runs/quickstart")
        >>> bool((times["seconds"] >= 0).all())
        True
    """
    with reading(folder) as connection:
        frame = frame_of(
            connection,
            "SELECT result_hash, trial, attempts, chunks.*, "
            "json_extract(provenance, '$.versions.moejax') AS version "
            "FROM timings JOIN cells USING (cell) JOIN chunks USING (chunk) JOIN runs USING (run) "
            "ORDER BY cell, trial",
        )
    frame = frame.drop(columns=["trials", DIGEST_COLUMN], errors="ignore")
    return frame.assign(seconds=frame["execute_seconds"] / frame["size"])


def load_chunks(folder: Path | str) -> pd.DataFrame:
    """Times, sizes and hosts of every chunk that was run."""
    with reading(folder) as connection:
        frame = frame_of(connection, "SELECT * FROM chunks WHERE process > 0 ORDER BY chunk")
    return frame.drop(columns=DIGEST_COLUMN, errors="ignore")


def load_arrays(folder: Path | str, name: str = "history") -> dict[tuple[str, int], np.ndarray]:
    """Return the arrays that a sweep with the field `record` stores, by (result_hash, trial).

    Args:
        folder: a run folder.
        name: "history", (h,) the objective in nats at every pass; or "path", (h, 2) the recovery and the gating error there.

    Returns:
        An empty dict if the sweep did not record that name. `load(folder, result_hash=True)` has the keys.

    Raises:
        ValueError: another name.
        StoreError: there is no store, or it cannot be read.

    Examples:
        >>> histories = moejax.sweep.load_arrays("runs/quickstart", "history")  # empty without record = ["history"]
        >>> all(history.ndim == 1 for history in histories.values())
        True
    """
    require(name in ARRAY_NAMES, "name", " or ".join(map(repr, ARRAY_NAMES)), name)
    with reading(folder) as connection:
        rows = connection.execute(
            "SELECT result_hash, trial, content FROM arrays JOIN cells USING (cell) WHERE name = ?", (name,)
        ).fetchall()
    return {(key, trial): np.load(io.BytesIO(content), allow_pickle=False) for key, trial, content in rows}


def load_runs(folder: Path | str) -> list[dict[str, Any]]:
    """Return the provenance of every run in a folder, oldest first, with start (Unix seconds), times and devices.

    Args:
        folder: a run folder.

    Raises:
        StoreError: there is no store, or it cannot be read.

    Examples:
        >>> runs = moejax.sweep.load_runs("runs/quickstart")
        >>> all(run["trials"] >= 0 and "versions" in run for run in runs)
        True
    """
    with reading(folder) as connection:
        rows = connection.execute(
            "SELECT provenance, started, wall_seconds, compile_seconds, "
            "(SELECT group_concat(DISTINCT nullif(device, '')) FROM chunks WHERE chunks.run = runs.run), "
            "(SELECT coalesce(sum(trials), 0) FROM chunks WHERE chunks.run = runs.run) FROM runs ORDER BY run"
        ).fetchall()
    return [
        json.loads(provenance)
        | {
            "started": started,
            "wall_seconds": wall,
            "compile_seconds": compiling,
            "devices": devices or "",
            "trials": trials,
        }
        for provenance, started, wall, compiling, devices, trials in rows
    ]
