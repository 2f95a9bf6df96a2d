"""Times of a few trials, whose results are dropped: of a chunk of every bucket, or of a trial of every method and activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moejax.checks import describe
from moejax.sweep.execution.worker import run_chunk
from moejax.sweep.plan.chunks import WorkerSettings, chunk_task
from moejax.sweep.plan.costs import CostModel
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


def pilot_costs(plan: Plan, settings: WorkerSettings, note: Callable[[str], None]) -> CostModel:
    """Time one trial of the smallest program of every method and activation, in this process; its result is dropped.

    A trial that takes less than WARM_SECONDS is timed a second time, without compilation and imports.
    """
    costs = CostModel()
    smallest: dict[tuple[str, str], Bucket] = {}
    for bucket in plan.buckets:
        key = (bucket.shape.method, bucket.shape.channel)
        if key not in smallest or bucket.work < smallest[key].work:
            smallest[key] = bucket
    for bucket in smallest.values():
        single = dataclasses.replace(bucket, chunk_size=bucket.vmap_width)
        try:
            timing = time_bucket(plan, single, settings)
        except Exception as error:  # the sweep itself reports what fails, trial by trial
            note(f"{bucket.label}: the pilot failed: {describe(error)}")
            continue
        costs.add(bucket.shape, timing.chunk_seconds, single.chunk_size)
        note(f"{bucket.label}: {1e3 * timing.chunk_seconds / single.chunk_size:.1f} ms/trial")
    return costs
