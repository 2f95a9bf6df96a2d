"""Several plans as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.sweep.plan.plan import Bucket, Cell, Plan, set_chunk_size


@dataclasses.dataclass(frozen=True)
class JointPlan:
    """The plans of several parts as one; `offsets[p]` is the position of part p's first cell."""

    plan: Plan
    offsets: tuple[int, ...]
    targets: tuple[int, ...]
    """Trials of each cell."""


def join_plans(
    plans: Sequence[Plan], *, vmap_width: int = 1, worker_memory_bytes: int | None = None
) -> JointPlan:
    """Put the cells of several plans into common buckets.

    A single plan stays as it is, with its rule of precision if it has one.

    Raises:
        ValueError: several plans of which one stops by precision, or whose seeds differ.
    """
    if len(plans) == 1:
        (plan,) = plans
        return JointPlan(plan, (0,), (plan.spec.first_target,) * len(plan.cells))
    seeds = {plan.spec.seed for plan in plans}
    if len(seeds) > 1:
        raise ValueError(f"seed: expected one for all sweeps that run together, got {sorted(seeds)}")
    for plan in plans:
        if plan.spec.precision is not None:
            raise ValueError(
                f"precision: {plan.spec.name} stops by precision and runs alone; give it trials to run it with others"
            )
    cells: list[Cell] = []
    buckets: list[Bucket] = []
    offsets: list[int] = []
    targets: list[int] = []
    bucket_of: dict[Any, int] = {}
    for plan in plans:
        offsets.append(len(cells))
        for cell in plan.cells:
            mine = plan.buckets[cell.bucket]
            index = bucket_of.setdefault(mine.static, len(buckets))
            if index == len(buckets):
                buckets.append(dataclasses.replace(mine, index=index, cells=[]))
            buckets[index].cells.append(len(cells))
            cells.append(dataclasses.replace(cell, bucket=index))
            targets.append(plan.spec.first_target)
    for bucket in buckets:
        wanted = sum(targets[position] for position in bucket.cells)
        set_chunk_size(bucket, wanted, vmap_width, worker_memory_bytes)
    plugins = {plugin.digest: plugin for plan in plans for plugin in plan.plugins}
    joint = Plan(
        plans[0].spec, cells, buckets, sum(plan.duplicates for plan in plans), tuple(plugins.values())
    )
    return JointPlan(joint, tuple(offsets), tuple(targets))
