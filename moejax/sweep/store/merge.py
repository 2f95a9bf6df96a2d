"""Makes one store of several: the cells and trials of runs on several machines, or of parts of a study."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.sweep.spec.fields import show
from moejax.sweep.store.digests import DIGEST_COLUMN
from moejax.sweep.store.lock import LOCK_NAME, lock_folder
from moejax.sweep.store.read import reading, store_path
from moejax.sweep.store.repair import fresh_store, insert_records, remove_store
from moejax.sweep.store.schema import STORE_NAME, StoreError, clear_errors, columns_of

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Merged:
    """Counts of a merge."""

    cells: int
    trials: int
    duplicates: int
    """Trials of several runs that were equal, and are kept once."""
    replaced: int
    """Trials without a result in one run (an exception, a lost worker) that have one in another."""


@dataclasses.dataclass
class _Source:
    """The rows of one store, by table, and the columns of each table."""

    folder: Path
    rows: dict[str, list[Row]]
    kinds: dict[str, dict[str, str]]

    @classmethod
    def read(cls, folder: Path) -> _Source:
        rows, kinds = {}, {}
        with reading(folder) as connection:
            for table in ("cells", "plan", "runs", "chunks", "trials", "timings", "arrays"):
                kinds[table] = columns_of(connection, table)
                names = [name for name in kinds[table] if name != DIGEST_COLUMN]
                listed = ", ".join(f'"{name}"' for name in names)
                found = connection.execute(f"SELECT {listed} FROM {table}").fetchall()
                rows[table] = [dict(zip(names, row, strict=True)) for row in found]
        rows["plan"].sort(key=lambda row: row["position"])
        return cls(folder, rows, kinds)

    @property
    def latest(self) -> dict[str, Any]:
        """The provenance of the latest run."""
        return json.loads(max(self.rows["runs"], key=lambda run: run["run"])["provenance"])


def merge_stores(
    folders: Sequence[Path],
    out: Path,
    check: Callable[[Sequence[tuple[Path, dict[str, Any]]]], None],
    *,
    keep_first: bool = False,
    command: Sequence[str] = (),
) -> Merged:
    """Write the trials of several run folders into a new one. Cells are in the order of the folders and their specs.

    A trial in several folders must have the same numbers everywhere and is kept once; a trial without a result gives way to
    one with a result.

    Args:
        folders: the run folders, which stay unchanged.
        out: the new folder; it may exist, without a store.
        check: receives folder and provenance of every run that committed a trial; raises to refuse the merge.
        keep_first: if true, the first of different numbers is kept.
        command: the command line, for the record.

    Raises:
        ValueError: fewer than two folders, or specs that contradict each other; StoreError: a store cannot be read or written,
            or the numbers of a trial differ.
    """
    stores = [store_path(folder).resolve() for folder in folders]
    for index, store in enumerate(stores):
        if store in stores[:index]:
            raise ValueError(f"{folders[index]}: given twice; expected different run folders")
    if len(folders) < 2:
        raise ValueError(f"RUN: expected at least two run folders to merge, got {len(folders)}")
    if (out / STORE_NAME).exists():
        raise StoreError(f"{out}: holds a run already; choose another folder with --out")
    sources = [_Source.read(folder) for folder in folders]
    check(
        [
            (source.folder, json.loads(run["provenance"]))
            for source in sources
            for run in source.rows["runs"]
            if any(chunk["run"] == run["run"] for chunk in source.rows["chunks"])
        ]
    )
    _check_specs(sources)
    target = _Target(keep_first)
    for source in sources:
        target.add(source)
    target.add_run(_provenance(sources, command))
    _write(target, out)
    return Merged(len(target.tables["cells"]), len(target.trials), target.duplicates, target.replaced)


def _check_specs(sources: Sequence[_Source]) -> None:
    """Refuse specs whose trials do not belong into one table: other seeds, other rules of precision."""
    specs = [json.loads(source.latest["spec"]) for source in sources]
    for source, spec in zip(sources, specs, strict=True):
        for key in ("seed", "precision"):
            if spec[key] != specs[0][key]:
                one, other = (
                    f"{spec[key] or 'no rule' if key == 'precision' else spec[key]}"
                    for spec in (specs[0], spec)
                )
                raise ValueError(
                    f"{key}: {sources[0].folder} has {one}, and {source.folder} has {other}: they make no common table"
                )


class _Target:
    """The tables of the new store."""

    def __init__(self, keep_first: bool):
        self._keep_first = keep_first
        self.tables: dict[str, list[Row]] = {
            name: [] for name in ("cells", "plan", "runs", "chunks", "timings", "arrays")
        }
        self.trials: dict[tuple[int, int], Row] = {}
        self.kinds: dict[str, dict[str, str]] = {}
        self.duplicates = self.replaced = 0
        self._cells: dict[str, int] = {}
        self._hash_of_fields: dict[str, tuple[str, Path]] = {}
        self._planned: dict[int, Row] = {}
        self._timings: dict[tuple[int, int], Row] = {}
        self._origin: dict[tuple[int, int], Path] = {}

    def add(self, source: _Source) -> None:
        """Add the rows of a store, with new numbers of cells, runs and chunks."""
        for table, kinds in source.kinds.items():
            self.kinds[table] = {**kinds, **self.kinds.get(table, {})}
        cells = {row["cell"]: self._cell(row, source.folder) for row in source.rows["cells"]}
        self._plan(source, cells)
        first_run, first_chunk = (
            max((row[key] for row in self.tables[table]), default=0)
            for table, key in (("runs", "run"), ("chunks", "chunk"))
        )
        self.tables["runs"] += [row | {"run": row["run"] + first_run} for row in source.rows["runs"]]
        self.tables["chunks"] += [
            row | {"chunk": row["chunk"] + first_chunk, "run": row["run"] + first_run}
            for row in source.rows["chunks"]
        ]
        timings = {(row["cell"], row["trial"]): row for row in source.rows["timings"]}
        taken = set()
        for row in source.rows["trials"]:
            key = (cells[row["cell"]], row["trial"])
            if not self._takes(key, row, source):
                continue
            old = (row["cell"], row["trial"])
            taken.add(old)
            self.trials[key], self._origin[key] = row | {"cell": key[0]}, source.folder
            self._timings.pop(key, None)
            if old in timings:
                self._timings[key] = timings[old] | {
                    "cell": key[0],
                    "chunk": timings[old]["chunk"] + first_chunk,
                }
        new = {(cells[cell], trial) for cell, trial in taken}
        kept = [row for row in self.tables["arrays"] if (row["cell"], row["trial"]) not in new]
        kept += [
            row | {"cell": cells[row["cell"]]}
            for row in source.rows["arrays"]
            if (row["cell"], row["trial"]) in taken
        ]
        self.tables["arrays"] = kept
        self.tables["timings"] = list(self._timings.values())

    def add_run(self, provenance: Mapping[str, Any]) -> None:
        """Record the merge as the latest run, which ran no trial."""
        run = max((row["run"] for row in self.tables["runs"]), default=0) + 1
        self.tables["runs"].append(
            {
                "run": run, "provenance": json.dumps(provenance), "started": time.time(), "wall_seconds": 0.0,
                "compile_seconds": 0.0,
            }
        )  # fmt: skip

    def _cell(self, row: Row, folder: Path) -> int:
        """The new number of a cell, which is added if no store before has it."""
        key, fields = row["result_hash"], row["fields"]
        known, other = self._hash_of_fields.setdefault(fields, (key, folder))
        if known != key:
            named = json.loads(fields)
            raise ValueError(
                f"{folder} and {other}: the cell with method = {show(named['method'])}, num_samples = {named['num_samples']} "
                "is not the same in both: their seeds or plugins differ"
            )
        if key not in self._cells:
            self._cells[key] = len(self._cells) + 1
            self.tables["cells"].append(row | {"cell": self._cells[key]})
        return self._cells[key]

    def _plan(self, source: _Source, cells: Mapping[int, int]) -> None:
        """Add the cells of a store's latest spec; of a cell in several specs, the larger number of trials counts."""
        for row in source.rows["plan"]:
            cell = cells[row["cell"]]
            if cell in self._planned:
                for name in ("first_trials", "most_trials"):
                    self._planned[cell][name] = max(self._planned[cell][name], row[name])
                continue
            self._planned[cell] = row | {"cell": cell, "position": len(self._planned)}
            self.tables["plan"].append(self._planned[cell])

    def _takes(self, key: tuple[int, int], row: Row, source: _Source) -> bool:
        """True if a trial is new, or has a result that the earlier one lacks.

        Raises:
            StoreError: it has other numbers than the earlier one.
        """
        known = self.trials.get(key)
        if known is None:
            return True
        if known["status"] < 0 or row["status"] < 0:
            better = known["status"] < 0 <= row["status"]
            self.replaced += better or row["status"] < 0 <= known["status"]
            self.duplicates += known["status"] < 0 and row["status"] < 0
            return better
        different = [
            name
            for name in row
            if name not in ("cell", "reason") and name in known and not _equal(known[name], row[name])
        ]
        if different and not self._keep_first:
            name = different[0]
            raise StoreError(
                f"{source.folder}: trial {row['trial']} of a cell has {name} = {row[name]}, and {known[name]} in "
                f"{self._origin[key]}: the same trial has different numbers; --keep-first takes those of the first folder"
            )
        self.duplicates += 1
        return False


def _equal(one: Any, other: Any) -> bool:
    """Two stored numbers are equal; SQLite stores NaN as NULL."""
    missing = [value is None or (isinstance(value, float) and math.isnan(value)) for value in (one, other)]
    return all(missing) or one == other


def _provenance(sources: Sequence[_Source], command: Sequence[str]) -> dict[str, Any]:
    """The record of the merge: that of the first folder's latest run, with the specs of all."""
    latest = [source.latest for source in sources]
    specs = [json.loads(record["spec"]) for record in latest]
    texts = []
    for source, record in zip(sources, latest, strict=True):
        changes = "".join(f"# --set {override}\n" for override in record["overrides"])
        texts.append(
            f"# from {source.folder}: {record['spec_file']}\n{record['spec_text'].rstrip()}\n{changes}"
        )
    names = list(dict.fromkeys(spec["name"] for spec in specs))
    plugins = {
        json.dumps(plugin, sort_keys=True): plugin for record in latest for plugin in record["plugins"]
    }
    return latest[0] | {
        "spec": json.dumps(specs[0] | {"name": " + ".join(names)}),
        "spec_file": ", ".join(dict.fromkeys(str(record["spec_file"]) for record in latest)),
        "spec_text": "\n".join(texts),
        "overrides": [],
        "plugins": list(plugins.values()),
        "command": list(command),
        "workers": "merged",
        "merged_from": [str(source.folder) for source in sources],
    }


def _write(target: _Target, out: Path) -> None:
    """Write the new store under another name, then rename it: a full disk or a kill leaves no half of it."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: cannot make the run folder: {error.strerror}") from None
    path = out / STORE_NAME
    new = path.with_name(STORE_NAME + ".new")
    with contextlib.closing(lock_folder(out)):
        try:
            with contextlib.closing(fresh_store(new)) as connection, clear_errors(path):
                connection.execute("BEGIN IMMEDIATE")
                for table, rows in {**target.tables, "trials": list(target.trials.values())}.items():
                    insert_records(connection, table, target.kinds.get(table, {}), _same_columns(rows))
                connection.execute("COMMIT")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.execute("PRAGMA journal_mode=DELETE")
            new.replace(path)
        finally:
            remove_store(new)
            if made and not path.exists():
                with contextlib.suppress(OSError):
                    (out / LOCK_NAME).unlink()
                    out.rmdir()


def _same_columns(rows: Sequence[Row]) -> list[Row]:
    """Rows with the columns of all; one that a row lacks (a plugin's metric of another run) has no value there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]
