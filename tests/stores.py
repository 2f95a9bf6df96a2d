"""Stores of made-up numbers for tests: nothing is computed."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import numpy as np

from moejax.sweep import trial as core
from moejax.sweep.execution.provenance import collect_provenance
from moejax.sweep.plan.chunks import ChunkResult
from moejax.sweep.plan.plan import Plan, make_plan
from moejax.sweep.spec.parse import read_spec
from moejax.sweep.store.schema import STORE_NAME, expected_columns
from moejax.sweep.store.store import Store

SPEC = """
name = "made-up"
methods = ["spectral", "joint_em"]
trials = 12
dim = 4
num_experts = 2
num_samples = 100
record = ["history"]
"""
CHUNK = 6


def numbers(seed: int, trials: int = CHUNK) -> ChunkResult:
    """A chunk of made-up results; the last trial failed."""
    rng = np.random.default_rng(seed)
    status = np.where(np.arange(trials) == trials - 1, -1, 0)
    return ChunkResult(
        metrics={
            name: np.where(status == 0, rng.gamma(2.0, 0.02, trials), np.nan) for name in core.metric_names()
        },
        status=status,
        reasons={trials - 1: "RuntimeError: [red]no[/x]"},
        arrays={"history": rng.normal(size=(trials, 5))},
        started=1.7e9,
        wall_seconds=1.0,
        compile_seconds=0.5,
        compilations=1,
        execute_seconds=0.4,
        host="here",
        process=7,
        device="cpu",
    )


def made_up_store(root: Path, spec: str = SPEC) -> tuple[Path, Path, Plan]:
    """A finished sweep of made-up numbers: its spec file, run folder and plan."""
    toml, folder = root / "spec.toml", root / "run"
    toml.write_text(spec)
    plan = make_plan(read_spec(toml))
    with Store(folder) as store:
        store.begin_run(plan, collect_provenance(plan, (), "nobody"))
        for position in range(len(plan.cells)):
            for first in range(0, plan.spec.trials, CHUNK):
                add(store, plan, position, first)
        store.end_run(4.0, 1.0)
    return toml, folder, plan


def add(store: Store, plan: Plan, position: int, first: int) -> None:
    """Add the chunk of a cell's trials from `first` on."""
    trials = [(position, trial) for trial in range(first, first + CHUNK)]
    bucket = plan.buckets[plan.cells[position].bucket]
    store.add_chunk(bucket.label, trials, numbers(100 * position + first), 1, CHUNK, 1)


def folder_digest(folder: Path) -> str:
    """sha256 of the names and bytes of everything in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def change(folder: Path, *statements: str) -> None:
    """Run SQL on a store, as no code of ours would."""
    connection = sqlite3.connect(folder / STORE_NAME, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def make_old(folder: Path) -> None:
    """Turn a store into one of version 1, which had no digests."""
    change(folder, *(f"ALTER TABLE {table} DROP COLUMN digest" for table in expected_columns()))
    change(folder, "PRAGMA user_version=1")
