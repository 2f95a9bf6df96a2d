"""Trials a second of a sweep, with one process and with two: `python benchmarks/throughput.py [ACTIVATION ...]`.

Complete `spectral_em` trials (sample, moments, tensor power, gating EM, polish, metrics) at d=10, k=3, n=10^4, sigma=0.1, in
float32, through the command line. The steady state is from the end of each worker's first chunk, which compiles,
to the end of its last but one. Aim: 100 trials a second on two cores, 85% of it inside the compiled program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from moejax.sweep import load, load_timings

SPEC = """
name = "throughput"
methods = ["spectral_em"]
trials = {trials}
activation = "{activation}"
dim = 10
num_experts = 3
num_samples = 10000
noise_std = 0.1
"""


def steady_state(timings: pd.DataFrame) -> tuple[float, float]:
    """(trials a second, share of the wall time inside the compiled program), added up over the processes."""
    chunks = timings.groupby(["chunk", "process"], as_index=False).agg(
        trials=("trial", "size"),
        started=("started", "first"),
        wall=("wall_seconds", "first"),
        execute=("execute_seconds", "first"),
    )
    rate = inside = window = 0.0
    for _, own in chunks.sort_values("started").groupby("process"):
        begin = own["started"].iloc[0] + own["wall"].iloc[0]
        inner = own.iloc[1:-1]
        span = (inner["started"] + inner["wall"]).max() - begin
        rate += inner["trials"].sum() / span
        inside += inner["execute"].sum()
        window += span
    return rate, inside / window


def start(
    folder: Path, activation: str, trials: int, workers: int, cache: Path
) -> tuple[subprocess.Popen, Path]:
    """Start one sweep; returns its process, and the folder of its rows."""
    spec = folder / f"{activation}-{workers}-{time.monotonic_ns()}.toml"
    spec.write_text(SPEC.format(activation=activation, trials=trials))
    out = spec.with_suffix("")
    command = [sys.executable, "-m", "moejax.cli", "sweep", str(spec), "--out", str(out)]
    command += ["--workers", str(workers), "--quiet"]
    environment = os.environ | {"MOEJAX_CACHE_DIR": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL), out


def sweep(*arguments: Any, side_by_side: int = 1) -> tuple[float, float]:
    """Run equal sweeps at the same time and print a line each; returns the sum of the rates, and the last's compile seconds."""
    total = compile_seconds = 0.0
    for process, out in [start(*arguments) for _ in range(side_by_side)]:
        if process.wait() != 0:
            raise SystemExit(f"the sweep of {out.name} ended with status {process.returncode}")
        table, timings = load(out), load_timings(out)
        rate, inside = steady_state(timings)
        total += rate
        compile_seconds = timings.groupby("chunk")["compile_seconds"].first().sum()
        good = (table["recovery_error"] < 1e-3).mean()
        _, activation, _, workers, _ = arguments
        print(
            f"{activation:10s} {workers} worker{'s' if workers > 1 else ' '}  {rate:6.1f} trials/s  "
            f"{100 * inside:3.0f}% inside the program  E < 1e-3 in {100 * good:.1f}% of {len(table)}  "
            f"compile {compile_seconds:.1f} s",
            flush=True,
        )
    return total, compile_seconds


def main() -> None:
    """Time one worker with a cold cache, one with a warm one, two workers, then two independent sweeps."""
    for activation in sys.argv[1:] or ["linear", "tanh", "relu"]:
        with tempfile.TemporaryDirectory() as name:
            folder, cache = Path(name), Path(name) / "cache"
            _, cold = sweep(folder, activation, 1000, 1, cache)
            one, warm = sweep(folder, activation, 1000, 1, cache)
            two, _ = sweep(folder, activation, 2000, 2, cache)
            apart, _ = sweep(folder, activation, 1000, 1, cache, side_by_side=2)
            print(
                f"{activation:10s} two workers / one: {two / one:.2f}x; two sweeps side by side / one (the machine's own limit): "
                f"{apart / one:.2f}x; compile {cold:.1f} s cold, {warm:.1f} s from the cache"
            )


if __name__ == "__main__":
    main()
