"""A time estimate from a few timed trials: one chunk of every bucket is run, its results dropped."""

from __future__ import annotations

from moejax.sweep.execution.worker import run_chunk
from moejax.sweep.plan.chunks import ChunkCell, ChunkTask, WorkerSettings
from moejax.sweep.plan.estimate import BucketTiming
from moejax.sweep.plan.plan import Bucket, Plan

WARM_SECONDS = 5.0
"""A first chunk that took longer than this (compilation excluded) is not timed a second time."""


def time_bucket(plan: Plan, bucket: Bucket, settings: WorkerSettings) -> BucketTiming:
    """Compile and run one whole chunk of a bucket; the compiled shape is the one that the sweep will use."""
    cells = [plan.cells[position] for position in bucket.cells[: bucket.chunk_size]]
    task = ChunkTask(
        cells=tuple(ChunkCell(cell.data, cell.algorithm, cell.data_hash) for cell in cells),
        cell_of=tuple(index % len(cells) for index in range(bucket.chunk_size)),
        trial_of=tuple(index // len(cells) for index in range(bucket.chunk_size)),
        seed=plan.spec.seed,
        padded_num_samples=bucket.static.padded_num_samples,
        size=bucket.chunk_size,
        vmap_width=bucket.vmap_width,
        settings=settings,
    )
    cold = run_chunk(task)
    seconds = cold.wall_seconds - cold.compile_seconds
    if seconds < WARM_SECONDS:
        seconds = run_chunk(task).wall_seconds
    return BucketTiming(cold.compile_seconds, seconds)
