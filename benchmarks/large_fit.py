"""A fit of more rows than fit in memory: `python benchmarks/large_fit.py [--rows 1e8] [--dim 10] [--experts 3] [--folder DIR]`.

It writes a synthetic Parquet dataset (float32, 2^20 rows a file), unless the folder has it, reads it once, and fits it in a process
of its own. Printed are the seconds of reading alone, the seconds of each pass over all rows and their ratio to reading, the peak
memory of the fit, the error E of the experts, and the log-likelihood against the truth's. With `--compare`, the same rows are also
fitted in memory, and the largest differences of the two fits are printed.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tyro

import moejax

ROWS_IN_FILE = 2**20
NOISE_STD = 0.3
GATING_NORM = 2.0
TRUTH = "_truth.json"


@dataclasses.dataclass
class Arguments:
    """Sizes of the data."""

    rows: float = 1e8
    dim: int = 10
    experts: int = 3
    method: str = "spectral_em"
    folder: Path | None = None
    """Folder of the data; one that has them already is used again. Default: a temporary one."""
    seed: int = 0
    compare: bool = False
    """Fit in memory too; ten times the memory of the file is needed."""


def truth_of(arguments: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """(k, d) orthonormal experts and (k, d) gates orthogonal to them, the last gate zero."""
    k, d = arguments.experts, arguments.dim
    basis = np.linalg.qr(np.random.default_rng(arguments.seed).normal(size=(d, d)))[0].T
    gating = np.zeros((k, d))
    gating[:-1] = GATING_NORM * basis[k : 2 * k - 1]
    return basis[:k], gating


def data_of(arguments: Arguments) -> list[int]:
    """Everything that the rows depend on."""
    return [int(arguments.rows), arguments.dim, arguments.experts, arguments.seed]


def facts_of(folder: Path) -> dict[str, Any]:
    """The file that `write` leaves beside the rows."""
    return json.loads((folder / TRUTH).read_text())


def write(folder: Path, arguments: Arguments) -> None:
    """Write the files; the log-likelihood of the truth goes into TRUTH."""
    experts, gating = truth_of(arguments)
    rows, total = int(arguments.rows), 0.0
    for number, first in enumerate(range(0, rows, ROWS_IN_FILE)):
        n = min(ROWS_IN_FILE, rows - first)
        random = np.random.default_rng([arguments.seed, number])
        x = random.standard_normal((n, arguments.dim), np.float32)
        logits = x @ gating.T.astype(np.float32)
        chosen = np.argmax(logits + random.gumbel(size=logits.shape).astype(np.float32), axis=1)
        means = x @ experts.T.astype(np.float32)
        y = (means[np.arange(n), chosen] + NOISE_STD * random.standard_normal(n)).astype(np.float32)
        joint = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        joint = joint - 0.5 * ((y[:, None] - means) / NOISE_STD) ** 2 - np.log(NOISE_STD * np.sqrt(2 * np.pi))
        total += float(np.logaddexp.reduce(joint, axis=1).astype(np.float64).sum())
        columns = {f"x{j + 1}": x[:, j] for j in range(arguments.dim)} | {"y": y}
        pyarrow.parquet.write_table(
            pyarrow.table(columns),
            folder / f"part-{number:05d}.parquet",
            row_group_size=2**18,
            compression="none",
            use_dictionary=False,
        )
    (folder / TRUTH).write_text(json.dumps({"data": data_of(arguments), "log_likelihood": total}))


def seconds_to_read(folder: Path) -> float:
    """Read every column of every file once, in batches, on one thread."""
    started = time.perf_counter()
    for file in sorted(folder.glob("*.parquet")):
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as opened:
            for batch in opened.iter_batches(2**16, use_threads=False):
                for column in batch.columns:
                    column.to_numpy()
    return time.perf_counter() - started


FIT = """
import json, resource, sys, time
import jax
import numpy as np
jax.config.update("jax_enable_x64", True)
import moejax
from moejax import FileSource, FitOptions
from moejax.fitting.pipeline import fit_rows
folder, experts, method, seed, in_memory = json.loads(sys.argv[1])
passes, begun = [], time.perf_counter()
def observe(progress):
    global begun
    if not passes or progress.name != passes[-1][0]:
        begun = time.perf_counter()
        passes.append([progress.name, 0.0])
    passes[-1][1] = time.perf_counter() - begun
started = time.perf_counter()
source, options = FileSource(folder, "y"), FitOptions(method=method, fit_intercept=True)
if in_memory:
    batches = [batch for part in source.partitions for batch in source.batches(part, 2**16)]
    x, y = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("x", "y"))
    del batches
    started = time.perf_counter()
    result = moejax.fit(jax.random.key(seed), x, y, num_experts=experts, **vars(options))
else:
    result = fit_rows(
        jax.random.key(seed), source, num_experts=experts, noise_std=None, options=options, observer=observe
    ).result
print(json.dumps({
    "seconds": time.perf_counter() - started, "passes": passes, "status": result.status,
    "log_likelihood": result.log_likelihood, "experts": result.params.experts.tolist(),
    "errors": result.standard_errors.experts.tolist(), "params": [leaf.tolist() for leaf in result.params],
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


def fitted(folder: Path, arguments: Arguments, *, in_memory: bool) -> dict[str, Any]:
    """A fit in a process of its own."""
    names = ("experts", "method", "seed")
    given = [str(folder), *(getattr(arguments, name) for name in names), in_memory]
    command = [sys.executable, "-c", FIT, json.dumps(given)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def largest_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """By field of the parameters, the experts of both in the order of their first coefficients, and the gates against the last."""
    fields = []
    for fit in (one, other):
        params = moejax.MoEParams(*map(np.asarray, fit["params"]))
        order = np.argsort(params.experts[:, 0])
        params = moejax.MoEParams(*(leaf[order] for leaf in params))
        last = (params.gating[-1:], params.gating_bias[-1:])
        fields.append(
            params._replace(gating=params.gating - last[0], gating_bias=params.gating_bias - last[1])
        )
    return {
        name: float(np.abs(getattr(fields[0], name) - getattr(fields[1], name)).max())
        for name in moejax.MoEParams._fields
    }


def main() -> None:
    """Write, read, fit, print."""
    arguments = tyro.cli(Arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / TRUTH).exists() or facts_of(folder)["data"] != data_of(arguments):
            started = time.perf_counter()
            write(folder, arguments)
            print(f"written in {time.perf_counter() - started:.0f} s", flush=True)
        size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
        reading = seconds_to_read(folder)
        rows = f"{arguments.rows:.3g} rows, d = {arguments.dim}"
        print(f"{rows}: {size / 1e9:.2f} GB, read once in {reading:.1f} s", flush=True)
        found = fitted(folder, arguments, in_memory=False)
        for name, seconds in found["passes"]:
            rate = arguments.rows / seconds / 1e6
            print(f"  {name:30s} {seconds:7.1f} s  {seconds / reading:5.2f} x reading  {rate:5.2f} M rows/s")
        experts, _ = truth_of(arguments)
        error = float(moejax.recovery_error(experts, np.asarray(found["params"][0])))
        gain = found["log_likelihood"] - facts_of(folder)["log_likelihood"]
        print(
            f"status {found['status']}, {found['seconds']:.0f} s in all, peak memory {found['peak'] / 1e9:.2f} GB; "
            f"E = {error:.2e}; "
            f"mean standard error of a coefficient {np.mean(found['errors']):.2e}; "
            f"log-likelihood {found['log_likelihood']:.1f}, {gain:+.1f} nats against the truth's",
            flush=True,
        )
        if arguments.compare:
            whole = fitted(folder, arguments, in_memory=True)
            differences = ", ".join(
                f"{name} {gap:.1e}" for name, gap in largest_differences(found, whole).items()
            )
            print(
                f"in memory: status {whole['status']}, {whole['seconds']:.0f} s, peak memory {whole['peak'] / 1e9:.2f} GB; largest "
                f"differences: {differences}, log-likelihood {abs(found['log_likelihood'] - whole['log_likelihood']):.1e} nats"
            )


if __name__ == "__main__":
    main()
