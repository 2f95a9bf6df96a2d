"""A time estimate from a few timed trials: one chunk of every bucket is run; its results are dropped."""

from __future__ import annotations

from moejax.sweep.execution.worker import run_chunk
from moejax.sweep.plan.chunks import WorkerSettings, chunk_task
from moejax.sweep.plan.estimate import BucketTiming
from moejax.sweep.plan.plan import Bucket, Plan

WARM_SECONDS = 5.0
"""A first chunk that took longer than this (compilation excluded) is not timed a second time."""


def time_bucket(plan: Plan, bucket: Bucket, settings: WorkerSettings) -> BucketTiming:
    """Compile and run one whole chunk of a bucket; the compiled shape is the one that the sweep will use."""
    cells = bucket.cells[: bucket.chunk_size]
    trials = [(cells[index % len(cells)], index // len(cells)) for index in range(bucket.chunk_size)]
    task = chunk_task(plan, bucket, trials, settings)
    cold = run_chunk(task)
    seconds = cold.wall_seconds - cold.compile_seconds
    if seconds < WARM_SECONDS:
        seconds = run_chunk(task).wall_seconds
    return BucketTiming(cold.compile_seconds, seconds)
