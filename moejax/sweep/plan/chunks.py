"""The messages between the coordinator and its workers. They are pickled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.sweep import trial as core
from moejax.sweep.plan.plan import Bucket, Plan
from moejax.sweep.plan.plugins import Plugin

RAISED = -1
"""Status of a trial that raised on its own (the core's own codes are not negative)."""
WORKER_DIED = -2
"""Status of a trial whose worker died each time it ran."""
NOT_PREPARED = -3
"""Status of a trial whose cell the core refused to prepare, such as an activation without a usable order."""
ENGINE_STATUS_REASONS = {
    RAISED: "the trial raised",
    WORKER_DIED: "the worker died while it ran the trial",
    NOT_PREPARED: "the cell cannot be prepared",
}


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """Settings that must be the same in every process that runs trials."""

    enable_x64: bool
    compilation_cache_dir: str | None
    plugins: tuple[Plugin, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChunkCell:
    """A cell in the message of a chunk."""

    data: core.DataSettings
    algorithm: core.AlgorithmSettings
    data_hash: str


@dataclasses.dataclass(frozen=True)
class ChunkTask:
    """Trials of one bucket; `cell_of` and `trial_of` are (m,) m <= size, the compiled number of trials."""

    cells: tuple[ChunkCell, ...]
    cell_of: tuple[int, ...]
    trial_of: tuple[int, ...]
    seed: int
    padded_num_samples: int
    size: int
    vmap_width: int
    settings: WorkerSettings


def chunk_task(
    plan: Plan, bucket: Bucket, trials: Sequence[tuple[int, int]], settings: WorkerSettings
) -> ChunkTask:
    """The message for trials of a bucket: (plan position of the cell, trial) each."""
    positions = list(dict.fromkeys(position for position, _ in trials))
    cells = [plan.cells[position] for position in positions]
    return ChunkTask(
        cells=tuple(ChunkCell(cell.data, cell.algorithm, cell.data_hash) for cell in cells),
        cell_of=tuple(positions.index(position) for position, _ in trials),
        trial_of=tuple(trial for _, trial in trials),
        seed=plan.spec.seed,
        padded_num_samples=bucket.static.padded_num_samples,
        size=bucket.chunk_size,
        vmap_width=bucket.vmap_width,
        settings=settings,
    )


@dataclasses.dataclass(frozen=True)
class ChunkResult:
    """Numbers of the m trials of a chunk, and how they were made."""

    metrics: dict[str, np.ndarray]
    """(m,) float arrays by column; NaN if a trial failed."""
    status: np.ndarray
    """(m,) int: 0 is ok, the core's codes are positive, the engine's negative."""
    reasons: dict[int, str]
    """Position in the chunk -> reason, if the status code does not determine it."""
    arrays: dict[str, np.ndarray]
    """Recorded extras, such as histories: (m, ...)."""
    started: float
    """Unix time, seconds."""
    wall_seconds: float = 0.0
    compile_seconds: float = 0.0
    compilations: int = 0
    execute_seconds: float = 0.0
    """Wall time inside the compiled program, without compilation."""
    host: str = ""
    process: int = 0
    """Process number; 0 if the trials did not run."""
    device: str = ""

    def part(self, indices: Sequence[int], compiled_here: bool) -> ChunkResult:
        """The rows at these positions, and their share of the times; a compilation counts with one part of a chunk only."""
        share = len(indices) / len(self.status)
        if share == 1:
            return self
        rows = list(indices)
        compile_seconds = self.compile_seconds if compiled_here else 0.0
        return dataclasses.replace(
            self,
            metrics={name: values[rows] for name, values in self.metrics.items()},
            status=self.status[rows],
            reasons={new: self.reasons[old] for new, old in enumerate(rows) if old in self.reasons},
            arrays={name: values[rows] for name, values in self.arrays.items()},
            wall_seconds=(self.wall_seconds - self.compile_seconds) * share + compile_seconds,
            compile_seconds=compile_seconds,
            compilations=self.compilations if compiled_here else 0,
            execute_seconds=self.execute_seconds * share,
        )
