"""Kinds of input for fuzz.py: stores damaged in their bytes, by SQL, or by altered JSON. Their numbers are artificial."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fuzz_values import any_value, last, mutated, pick

from moejax.sweep import load, load_arrays, load_timings
from moejax.sweep import trial as core
from moejax.sweep.execution.provenance import collect_provenance
from moejax.sweep.plan.chunks import ChunkResult
from moejax.sweep.plan.plan import make_plan
from moejax.sweep.report.page import write_report
from moejax.sweep.report.status import read_status
from moejax.sweep.report.summary import summarise
from moejax.sweep.spec.fields import FIELDS
from moejax.sweep.spec.parse import read_spec
from moejax.sweep.store.repair import repair_store
from moejax.sweep.store.store import Store


def last_input() -> str:
    """The text of the last input."""
    return last[0]


STORE_SPEC = """
name = "stored"
methods = ["spectral", "joint_em"]
trials = 12
dim = 4
num_experts = 2
record = ["history"]
[grid]
noise_std = [0.1, 0.5]
num_samples = [100, 400]
"""


def made_up(rng: np.random.Generator, trials: int) -> ChunkResult:
    """A chunk of artificial numbers; one trial in ten failed."""
    failed = rng.random(trials) < 0.1
    return ChunkResult(
        metrics={name: np.where(failed, np.nan, rng.gamma(2.0, 0.02, trials)) for name in core.METRICS},
        status=np.where(failed, -1, 0),
        reasons=dict.fromkeys(np.flatnonzero(failed).tolist(), "RuntimeError: [red]no[/x]"),
        arrays={"history": rng.normal(size=(trials, 6))},
        started=1.7e9,
        wall_seconds=1.0,
        compile_seconds=0.5,
        compilations=1,
        execute_seconds=0.4,
        host="here",
        process=7,
        device="cpu",
    )


@functools.cache
def sound_folder() -> tuple[Path, bytes, dict[str, Any]]:
    """A sound run folder, its store's bytes, and the result of every reader."""
    root = Path(tempfile.mkdtemp(prefix="moejax-fuzz-"))
    spec, folder = root / "spec.toml", root / "run"
    spec.write_text(STORE_SPEC)
    plan = make_plan(read_spec(spec))
    rng = np.random.default_rng(0)
    with Store(folder) as store:
        store.begin_run(plan, collect_provenance(plan, (), "fuzz"))
        for position, cell in enumerate(plan.cells):
            for first in (0, 6):
                trials = [(position, trial) for trial in range(first, first + 6)]
                store.add_chunk(plan.buckets[cell.bucket].label, trials, made_up(rng, 6), 1, 6, 1)
        store.end_run(3.0, 1.0)
    return folder, (folder / "store.sqlite").read_bytes(), what_is_read(folder)


def what_is_read(folder: Path) -> dict[str, Any]:
    """The results of all readers of a run folder, as text for comparison."""
    table, summary, state = load(folder), summarise(folder), read_status(folder)
    timings, arrays = load_timings(folder), load_arrays(folder)
    report = write_report(folder, summary, []).read_text(encoding="utf-8")
    return {
        "table": table.to_csv(index=False),
        "summary": summary.to_csv(index=False),
        "status": repr(state),
        "timings": timings.to_csv(index=False),
        "arrays": repr(sorted((key, value.tobytes()) for key, value in arrays.items())),
        "report": report,
    }


@contextlib.contextmanager
def copy_of_store() -> Iterator[Path]:
    """A folder with a copy of the sound store."""
    _, content, _ = sound_folder()
    with tempfile.TemporaryDirectory(prefix="moejax-fuzz-") as name:
        folder = Path(name) / "run"
        folder.mkdir()
        (folder / "store.sqlite").write_bytes(content)
        (folder / "lock").write_text("process 1 on nowhere\n")
        yield folder


def compare_reading(folder: Path) -> str | None:
    """Read a store that may be damaged: a result without a refusal must be the original one."""
    truth = sound_folder()[2]
    seen = what_is_read(folder)
    different = [
        name
        for name in truth
        if seen[name].replace(str(folder), "") != truth[name].replace(str(sound_folder()[0]), "")
    ]
    return f"{', '.join(different)}: not what was written, without a word" if different else None


def store_flipped(rng: np.random.Generator) -> str | None:
    """A store with flipped bits, or bytes overwritten."""
    with copy_of_store() as folder:
        path = folder / "store.sqlite"
        content = bytearray(path.read_bytes())
        flips = []
        for _ in range(pick(rng, [1, 1, 1, 3, 30])):
            place = int(rng.integers(100 if rng.random() < 0.05 else len(content)))
            mask = 1 << int(rng.integers(8)) if rng.random() < 0.8 else int(rng.integers(1, 256))
            content[place] ^= mask
            flips.append((place, mask))
        last[0] = f"content[place] ^= mask for place, mask in {flips}"
        path.write_bytes(content)
        return read_or_repair(rng, folder)


def store_cut(rng: np.random.Generator) -> str | None:
    """A store that ends early, or has a hole."""
    with copy_of_store() as folder:
        path = folder / "store.sqlite"
        content = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            del content[int(rng.integers(len(content))) :]
        else:
            start = int(rng.integers(len(content)))
            length = int(pick(rng, [16, 512, 4096, 20000]))
            content[start : start + length] = bytes(len(content[start : start + length]))
        last[0] = f"{len(content)} bytes, {content[:16]!r}"
        path.write_bytes(content)
        return read_or_repair(rng, folder)


def store_edited(rng: np.random.Generator) -> str | None:
    """A store changed by SQL: altered rows, JSON, tables and columns."""
    with copy_of_store() as folder:
        connection = sqlite3.connect(folder / "store.sqlite", isolation_level=None)
        connection.execute("PRAGMA writable_schema=ON")
        statements = []
        for _ in range(rng.integers(1, 3)):
            with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
                statement, values = edit(
                    rng, connection
                )  # the first change may have removed the target of the second
                connection.execute(statement, values)
                statements.append((statement, values))
        connection.close()
        last[0] = repr(statements)[:5000]
        return read_or_repair(rng, folder)


def store_old(rng: np.random.Generator) -> None:
    """A store of the version without digests, changed by SQL: results may be wrong, but the only errors are refusals."""
    with copy_of_store() as folder:
        connection = sqlite3.connect(folder / "store.sqlite", isolation_level=None)
        for table in TABLES:
            connection.execute(f"ALTER TABLE {table} DROP COLUMN digest")
        connection.execute("PRAGMA user_version=1")
        statements = []
        for _ in range(rng.integers(1, 3)):
            with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
                statement, values = edit(
                    rng, connection
                )  # the first change may have removed the target of the second
                connection.execute(statement, values)
                statements.append((statement, values))
        connection.close()
        last[0] = repr(statements)[:5000]
        what_is_read(folder)
        with Store(folder):
            pass
        what_is_read(folder)


TABLES = ("cells", "plan", "trials", "arrays", "runs", "chunks", "timings")


def edit(rng: np.random.Generator, connection: sqlite3.Connection) -> tuple[str, tuple[Any, ...]]:
    """One statement that damages a store, and its values."""
    table = str(pick(rng, TABLES))
    names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    column = str(pick(rng, names)) if names else "x"
    if rng.random() < 0.05:
        drop = f"ALTER TABLE {table} DROP COLUMN {column}"
        whole = [f"DROP TABLE {table}", f"ALTER TABLE {table} RENAME TO gone", "PRAGMA user_version=1", drop]
        return str(pick(rng, whole)), ()
    if rng.random() < 0.6 and table in ("cells", "runs") and len(names) > 2:
        column = "fields" if table == "cells" else "provenance"
        row = connection.execute(f"SELECT {column} FROM {table} ORDER BY random() LIMIT 1").fetchone()
        text = row[0] if row else "{}"
        return f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (altered_json(rng, text), text)
    value: Any = any_value(rng)
    if isinstance(value, list | dict):
        value = b"\xff\xfe" if rng.random() < 0.5 else None
    return f"UPDATE {table} SET {column} = ? WHERE abs(random()) % 5 = 0", (value,)


def altered_json(rng: np.random.Generator, text: str) -> str:
    """A JSON text with one value of another type, or damaged as a text."""
    if rng.random() < 0.3:
        return mutated(rng, text)
    try:
        value = json.loads(text)
    except ValueError:  # it was altered before
        return mutated(rng, text)
    nested = isinstance(value.get("spec"), str) and rng.random() < 0.5
    target = json.loads(value["spec"]) if nested else value
    key = str(pick(rng, list(target)))
    if rng.random() < 0.2:
        del target[key]
    else:
        target[key] = any_value(rng)
    try:
        if nested:
            value["spec"] = json.dumps(target)
        return json.dumps(value)
    except (RecursionError, ValueError):
        return "[" * 3000


def read_or_repair(rng: np.random.Generator, folder: Path) -> str | None:
    """Read the store by every reader; sometimes repair it and check the kept rows."""
    if rng.random() < 0.7:
        return compare_reading(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}
    try:
        repair_store(folder, lambda previous: None)
    except OSError:
        after = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}
        after = {name: content for name, content in after.items() if content or name in before}
        if before != after:
            return f"a refused repair changed the folder: {sorted(before)} {sorted(after)}"
        raise
    columns = [*FIELDS, "method", "trial", *core.METRICS, "status", "reason"]
    truth = pd.read_csv(io.StringIO(sound_folder()[2]["table"]), dtype=str)[columns]
    kept = pd.read_csv(io.StringIO(load(folder, all_specs=True).to_csv(index=False)), dtype=str)[columns]
    strange = len(kept.merge(truth, how="left", indicator=True).query("_merge == 'left_only'"))
    if strange:
        return f"{strange} of {len(kept)} rows that a repair kept are not what was written"
    with Store(folder):
        return None


KINDS: dict[str, Callable[[np.random.Generator], str | None]] = {
    "store_flipped": store_flipped,
    "store_cut": store_cut,
    "store_edited": store_edited,
    "store_old": store_old,
}
SHARES = {"store_flipped": 2.0, "store_edited": 2.0}
