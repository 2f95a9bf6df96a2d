"""A store of 10^6 rows: `python benchmarks/sweep_store.py`. Aims: status in 1 s, report in 30 s."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from moejax.sweep import commands, load
from moejax.sweep import trial as core
from moejax.sweep.execution.provenance import collect_provenance
from moejax.sweep.plan.chunks import ChunkResult
from moejax.sweep.plan.plan import make_plan
from moejax.sweep.report.status import read_status
from moejax.sweep.spec.parse import read_spec
from moejax.sweep.store.store import Store

SPEC = """
name = "million"
methods = ["spectral", "joint_em"]
trials = 1000
activation = "linear"
[grid]
noise_std = [0.05, 0.1, 0.2, 0.3, 0.4]
gating_norm = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0]
num_samples = [1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000, 16000, 24000]
"""


def main() -> None:
    """Fill a store with random numbers through its public functions, then time the readers."""
    with tempfile.TemporaryDirectory() as name:
        spec = Path(name) / "spec.toml"
        spec.write_text(SPEC)
        plan = make_plan(read_spec(spec))
        folder = Path(name) / "run"
        started = time.perf_counter()
        with Store(folder) as store:
            store.begin_run(plan, collect_provenance(plan, (), "benchmark"))
            for position, cell in enumerate(plan.cells):
                trials = [(position, trial) for trial in range(plan.spec.trials)]
                store.add_chunk(
                    plan.buckets[cell.bucket].label, trials, numbers(position, len(trials)), 1, 1000, 1
                )
        rows = len(plan.cells) * plan.spec.trials
        report(f"write {rows:,} rows", started)
        for label, action in {
            "status": lambda: read_status(folder),
            "load": lambda: load(folder),
            "report": lambda: commands.report(folder, quiet=True),
        }.items():
            started = time.perf_counter()
            action()
            report(label, started)


def numbers(seed: int, trials: int) -> ChunkResult:
    """A chunk of artificial results."""
    random = np.random.default_rng(seed)
    return ChunkResult(
        metrics={name: random.gamma(1.0, 0.01, trials) for name in core.METRICS},
        status=(random.random(trials) < 0.01).astype(int),
        reasons={},
        arrays={},
        started=time.time(),
        wall_seconds=1.0,
        compile_seconds=0.0,
        compilations=0,
        execute_seconds=1.0,
        host="benchmark",
        process=1,
        device="none",
    )


def report(label: str, started: float) -> None:
    """Print one timing."""
    print(f"{label}: {time.perf_counter() - started:.2f} s", flush=True)


if __name__ == "__main__":
    main()
