"""The progress of a sweep, from committed rows only; this works while it runs, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd

from moejax.sweep import trial as core
from moejax.sweep.plan.chunks import ENGINE_STATUS_REASONS
from moejax.sweep.plan.costs import CostModel
from moejax.sweep.spec.precision import PrecisionRule
from moejax.sweep.store.costs import shape_of
from moejax.sweep.store.lock import is_running
from moejax.sweep.store.read import frame_of, reading, store_path

RECENT_SECONDS = 60.0
"""The rate is that of the last minute in which something ended."""
MOST_CHECKED = 200_000
"""With more trials, only the commands that show their numbers check digests: reading a million takes seconds."""
_BUCKET_TIMES = """
SELECT bucket,
       coalesce(sum(warm * size), sum(size)) AS size,
       coalesce(sum(warm * seconds), sum(seconds)) AS seconds
FROM (SELECT bucket, size, wall_seconds - compile_seconds AS seconds, nullif(compile_seconds = 0, 0) AS warm
      FROM chunks WHERE process > 0)
GROUP BY bucket"""
# A bucket's first chunk also traces and imports, so it counts only if there is no other.


@dataclasses.dataclass(frozen=True)
class BucketStatus:
    """One bucket: numbers of trials, seconds per trial on one worker, and seconds left on all."""

    label: str
    done: int
    failed: int
    left: int
    trial_seconds: float | None
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of a whole sweep."""

    name: str
    running: bool
    planned: int
    done: int
    failed: int
    left: int
    rate: float | None
    """Trials per second while it last ran."""
    seconds_left: float | None
    buckets: list[BucketStatus]
    failures: list[tuple[str, int]]
    """Reasons of failed trials and their numbers, the most frequent first."""


def read_status(folder: Path | str) -> Status:
    """The state of a run folder.

    Raises:
        StoreError: there is no store, or it cannot be read.
    """
    path = store_path(Path(folder))
    with reading(folder, most_trials=MOST_CHECKED) as connection:
        plan = frame_of(
            connection,
            "SELECT cell, bucket, first_trials, fields FROM plan JOIN cells USING (cell) ORDER BY position",
        )
        counts = frame_of(
            connection,
            "SELECT cell, count(*) AS done, sum(status != 0) AS failed FROM trials JOIN plan USING (cell) "
            "WHERE trial < most_trials GROUP BY cell",
        )
        chunks = frame_of(connection, _BUCKET_TIMES)
        recent = connection.execute(
            "SELECT sum(trials), max(started + wall_seconds) - min(started), count(DISTINCT process || host) "
            "FROM chunks WHERE process > 0 AND run = (SELECT max(run) FROM chunks) "
            "AND started >= (SELECT max(started) FROM chunks) - ?",
            (RECENT_SECONDS,),
        ).fetchone()
        reasons = connection.execute(
            "SELECT status, reason, count(*) FROM trials JOIN plan USING (cell) WHERE status != 0 AND trial < most_trials "
            "GROUP BY status, reason ORDER BY 3 DESC"
        ).fetchall()
        provenance = connection.execute("SELECT provenance FROM runs ORDER BY run DESC LIMIT 1").fetchone()
        spec = (
            json.loads(json.loads(provenance[0])["spec"])
            if provenance
            else {"name": str(folder), "precision": None}
        )
        merged = plan.merge(counts, on="cell", how="left").fillna({"done": 0, "failed": 0})
        merged["target"] = merged["first_trials"]
        if spec["precision"]:
            merged["target"] = _precision_targets(connection, merged, PrecisionRule(**spec["precision"]))
    merged["left"] = np.maximum(merged["target"] - merged["done"], 0)
    workers = max(int(recent[2] or 0), 1)
    buckets = _bucket_states(merged, chunks.set_index("bucket"), workers)
    known = [bucket.seconds_left for bucket in buckets if bucket.seconds_left is not None]
    words = {**core.STATUS_REASONS, **ENGINE_STATUS_REASONS}
    return Status(
        name=spec["name"],
        running=is_running(path.parent),
        planned=int(merged["target"].sum()),
        done=int(merged["done"].sum()),
        failed=int(merged["failed"].sum()),
        left=int(merged["left"].sum()),
        rate=recent[0] / recent[1] if recent[0] and recent[1] else None,
        seconds_left=sum(known) if len(known) == len(buckets) else None,
        buckets=buckets,
        failures=[(reason or words.get(code, f"status {code}"), count) for code, reason, count in reasons],
    )


def _bucket_states(merged: pd.DataFrame, timed: pd.DataFrame, workers: int) -> list[BucketStatus]:
    """States of the buckets. The times of those that have not run are predicted from those that have."""
    fields = merged.groupby("bucket", sort=False)["fields"].first()
    shapes = {label: shape_of(json.loads(text), str(label)) for label, text in fields.items()}
    costs = CostModel()
    for label in timed.index.intersection(fields.index):
        costs.add(shapes[label], float(timed["seconds"][label]), int(timed["size"][label]))
    states = []
    for label, group in merged.groupby("bucket", sort=False):
        measured = label in timed.index
        mean = float(timed["seconds"][label] / timed["size"][label]) if measured else None
        seconds = mean if measured else costs.seconds(shapes[label])
        left = int(group["left"].sum())
        states.append(
            BucketStatus(
                label=str(label),
                done=int(group["done"].sum()),
                failed=int(group["failed"].sum()),
                left=left,
                trial_seconds=seconds,
                seconds_left=None if seconds is None else left * seconds / workers,
            )
        )
    return states


def _precision_targets(
    connection: sqlite3.Connection, merged: pd.DataFrame, rule: PrecisionRule
) -> list[int]:
    rows = connection.execute(f'SELECT cell, "{rule.metric}" FROM trials ORDER BY cell, trial').fetchall()
    values: dict[int, list[float]] = {}
    for cell, value in rows:
        values.setdefault(cell, []).append(np.nan if value is None else value)
    return [rule.target_after(np.array(values.get(cell, [])))[0] for cell in merged["cell"]]
