"""Estimates of the time that a plan takes."""

from __future__ import annotations

import dataclasses

from moejax.sweep.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class BucketTiming:
    """Times of one bucket on one worker, in seconds."""

    compile_seconds: float
    chunk_seconds: float


def total_seconds(plan: Plan, timings: list[BucketTiming], workers: int) -> float:
    """Estimated wall time of the first round: buckets compiled once, chunks spread over the workers."""
    busy = sum(
        timing.compile_seconds + timing.chunk_seconds * plan.chunks_of(bucket)
        for bucket, timing in zip(plan.buckets, timings, strict=True)
    )
    return busy / workers
