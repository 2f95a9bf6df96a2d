"""Time of a dry run of 100,000 cells: `python benchmarks/sweep_plan.py`. Aim: under 10 seconds."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPEC = """
name = "hundred-thousand"
methods = ["spectral", "spectral_em"]
trials = 10
[grid]
activation = ["linear", "relu", "sigmoid", "tanh", "gelu"]
noise_std = [0.05, 0.1, 0.2, 0.4]
dim = [8, 10, 12, 16, 20]
num_experts = [2, 3, 4]
gating_norm = [0.0, 0.5, 1.0, 2.0]
gating_angle = [90.0, 60.0, 30.0, 0.0]
num_samples = [1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000, 16000, 24000]
"""

RUN = """
import sys
from pathlib import Path
from moejax.sweep import commands
commands.sweep(Path(sys.argv[1]), dry_run=True)
"""


def main() -> None:
    """Time the whole process, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "spec.toml"
        spec.write_text(SPEC)
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(spec)], capture_output=True, text=True, check=True
        )
    print(done.stdout.splitlines()[0])
    print(f"dry run: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
