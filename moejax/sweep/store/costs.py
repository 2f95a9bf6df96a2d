"""Measured times and sizes of the programs of a store, for a run that resumes it."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from moejax.sweep.plan.costs import TrialShape, channel_label
from moejax.sweep.store.schema import clear_errors, columns_of, connect_for_reading

_PADDED = re.compile(r"n<=(\d+)")
"""The padded number of samples in the label of a bucket."""


class ProgramCost(NamedTuple):
    """Chunks of one bucket that have run."""

    shape: TrialShape
    seconds: float
    """In the program, without compilation."""
    trials: int
    """Padding included."""
    chunk_size: int
    vmap_width: int


def read_costs(path: Path) -> dict[str, ProgramCost]:
    """The chunks that have run, by the label of their bucket in the store's plan; `path` is a checked store that nobody writes.

    Raises:
        StoreError: it cannot be read.
    """
    if not path.exists() or not path.stat().st_size:
        return {}
    with contextlib.closing(connect_for_reading(path, alone=True)) as connection, clear_errors(path):
        if not columns_of(connection, "plan"):
            return {}
        # the first cell stands for all with this label: they share a program
        rows = connection.execute(
            "SELECT bucket, fields, min(cell), seconds, trials, size, width FROM plan JOIN cells USING (cell) JOIN "
            "(SELECT bucket, sum(execute_seconds) AS seconds, sum(size) AS trials, max(size) AS size, max(vmap_width) AS width "
            "FROM chunks WHERE process > 0 GROUP BY bucket) USING (bucket) GROUP BY bucket"
        ).fetchall()
    return {
        label: ProgramCost(shape_of(json.loads(fields), label), seconds, trials, size, width)
        for label, fields, _, seconds, trials, size, width in rows
    }


def shape_of(fields: dict, label: str) -> TrialShape:
    """The shape of a cell's trials, from its fields and the label of its bucket."""
    padded = _PADDED.search(label)
    return TrialShape(
        method=fields["method"],
        channel=channel_label(
            fields.get("fit_family") or fields.get("family", "gaussian"), fields["activation"]
        ),
        num_samples=int(padded[1]) if padded else fields["num_samples"],
        dim=fields["dim"],
        num_experts=fields.get("fit_num_experts") or fields["num_experts"],
        num_starts=fields.get("num_starts") or 1,
        max_iterations=fields.get("max_iterations") or 100,
    )
