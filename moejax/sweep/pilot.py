"""A time estimate from a few timed trials: one chunk of every bucket is run, its results dropped."""

from __future__ import annotations

import dataclasses

from moejax.sweep.chunk import ChunkCell, ChunkTask, WorkerSettings, run_chunk
from moejax.sweep.plan import Bucket, Plan

WARM_SECONDS = 5.0
"""A first chunk that ran longer than this, compilation apart, is not run again to be timed warm."""


@dataclasses.dataclass(frozen=True)
class BucketTiming:
    """What one bucket costs on one worker, in seconds."""

    compile_seconds: float
    chunk_seconds: float


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


def total_seconds(plan: Plan, timings: list[BucketTiming], workers: int) -> float:
    """Estimated wall time of the first round: buckets compiled once, chunks spread over the workers."""
    busy = sum(
        timing.compile_seconds + timing.chunk_seconds * plan.chunks_of(bucket)
        for bucket, timing in zip(plan.buckets, timings, strict=True)
    )
    return busy / workers
