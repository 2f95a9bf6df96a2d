"""The keys of stored results outlive every move and merge of the code: those of the sweeps of version 0.1.0 do."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from moejax.sweep.plan.plan import make_plan
from moejax.sweep.plan.plugins import run_plugins
from moejax.sweep.spec.parse import read_spec

SPECS = Path(__file__).parent / "specs_of_0_1_0"
"""The sweeps as they were then; those of the repository have other grids now."""


@pytest.mark.parametrize(
    ("name", "num_cells", "digest"),
    [
        ("bias-floor", 12, "a894aadc65b54b36"),
        ("convergence", 30, "610977dbb41b0d77"),
        ("dimension", 24, "e96d757e0909e0ca"),
        ("gating-scale", 96, "e478f3b0ab414ae8"),
        ("hard-cases", 18, "9a86de38d4c232aa"),
        ("input-distribution", 36, "4133ec7f92581ab7"),
        ("noise", 50, "214ebeec3409b6f8"),
        ("non-linearity", 280, "db3c2765de717efb"),
        ("num-experts", 24, "dbb85d19089ad135"),
        ("phase-diagram", 504, "cc69c7536540b013"),
        ("quickstart", 36, "527e97875d1f3702"),
        ("restarts", 9, "ea23e8046ae557c0"),
        ("sample-size", 168, "8bf7098deefa9f4d"),
    ],
)
def test_cells_of_version_0_1_0_keep_their_hashes(name, num_cells, digest):
    checked = read_spec(SPECS / f"{name}.toml", ())
    plan = make_plan(checked, run_plugins(checked.plugins), vmap_width=1, worker_memory_bytes=2**31)
    hashes = sorted(cell.result_hash for cell in plan.cells)
    assert len(hashes) == num_cells
    assert hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16] == digest
