"""The plan of a sweep: cells, buckets and chunks. It compiles no program and uses no device.

A cell is one combination of field values and a method. Cells of one static shape share a bucket: one compiled
program. A chunk is a fixed number of trials of one bucket, the unit of work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moejax.methods.method import method_names
from moejax.registry import nearest
from moejax.sweep import trial as core
from moejax.sweep.plan.costs import CostModel, TrialShape, channel_label
from moejax.sweep.plan.identity import data_hash, result_hash
from moejax.sweep.plan.plugins import Plugin, plugins_digest
from moejax.sweep.spec.fields import ALGORITHM_FIELDS, DATA_FIELDS, FIELDS, METHOD_FIELD, show
from moejax.sweep.spec.parse import Spec
from moejax.sweep.spec.positions import SpecError

WORK_PER_CHUNK = 2**20
"""A chunk holds about this many samples of the size d=10, k=3: a second of work on one core. So dispatch and commits
cost little, a kill loses little, and the last chunk does not take long."""
CHUNK_SECONDS = 1.0
"""The same where seconds are measured."""
MAX_CHUNK = 64
MEMORY_SHARE = 0.5
"""Share of a worker's memory that the trials of a chunk may use by the estimate, which is inexact."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One combination of field values and a method."""

    data: core.DataSettings
    algorithm: core.AlgorithmSettings
    data_hash: str
    result_hash: str
    bucket: int

    def fields(self) -> dict[str, Any]:
        """All fields and the method, by name: the cell's columns of the table."""
        return {
            **{name: getattr(self.data, name) for name in DATA_FIELDS},
            METHOD_FIELD: self.algorithm.method,
            **{name: getattr(self.algorithm, name) for name in ALGORITHM_FIELDS},
        }


@dataclasses.dataclass
class Bucket:
    """Cells that share one compiled program."""

    index: int
    static: Any
    """The core's TrialSpec."""
    label: str
    shape: TrialShape
    """The size of a trial: for chunks, and for estimates of time."""
    memory_bytes: int
    """Working memory of one trial."""
    cells: list[int]
    chunk_size: int = 0
    """Trials in a chunk: the compiled shape."""
    vmap_width: int = 1
    """Trials of a chunk that run side by side."""

    @property
    def work(self) -> float:
        """Size of a trial, in samples of the size d=10, k=3 from one start."""
        return self.shape.work

    @property
    def chunk_bytes(self) -> int:
        """Working memory of a running chunk."""
        return self.memory_bytes * self.vmap_width


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that will run, before anything runs."""

    spec: Spec
    cells: list[Cell]
    buckets: list[Bucket]
    duplicates: int
    """Number of cells left out because they equal another cell."""
    plugins: tuple[Plugin, ...]

    @property
    def first_trials(self) -> int:
        """Number of trials that are certain to run."""
        return len(self.cells) * self.spec.first_target

    @property
    def most_trials(self) -> int:
        """Number of trials if no cell stops early."""
        return len(self.cells) * self.spec.most_trials

    def chunks_of(self, bucket: Bucket) -> int:
        """Chunks of a bucket in the first round."""
        return math.ceil(len(bucket.cells) * self.spec.first_target / bucket.chunk_size)


def make_plan(
    spec: Spec,
    plugins: Sequence[Plugin] = (),
    *,
    vmap_width: int = 1,
    worker_memory_bytes: int | None = None,
) -> Plan:
    """Expand a spec into cells, drop equal ones, and group them into buckets.

    Args:
        spec: the checked spec.
        plugins: plugins that have been run in this process.
        vmap_width: trials that may run side by side; reduced if memory is short.
        worker_memory_bytes: memory of one worker; None: not limited.

    Raises:
        SpecError: an impossible cell, named with its place in the spec; or no cell at all.
    """
    with _no_garbage_collection():
        return _make_plan(spec, plugins, vmap_width, worker_memory_bytes)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off: a plan has many small objects and no garbage, and collection takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _make_plan(
    spec: Spec, plugins: Sequence[Plugin], vmap_width: int, worker_memory_bytes: int | None
) -> Plan:
    digest = plugins_digest(plugins)
    data_hashes: dict[core.DataSettings, str] = {}
    algorithms: dict[tuple[Any, ...], core.AlgorithmSettings] = {}
    bucket_of: dict[Any, int] = {}
    seen: dict[str, None] = {}
    cells: list[Cell] = []
    buckets: list[Bucket] = []
    duplicates = 0
    data_names: list[str] = []
    other_names: list[str] = []
    data_values: tuple[Any, ...] = ()
    data: core.DataSettings | None = None
    hashed = ""
    for values in spec.settings():
        if data is None:  # every cell has values of the same fields
            data_names = [name for name in DATA_FIELDS if name in values]
            other_names = [name for name in values if name not in DATA_FIELDS]
        these = tuple([values[name] for name in data_names])
        if data is None or these != data_values:  # methods, the last axis, share data
            data_values = these
            data = core.DataSettings(**dict(zip(data_names, these, strict=True)))
            found = data_hashes.get(data)
            if found is None:
                found = data_hashes[data] = data_hash(data)
            hashed = found
        chosen = tuple([(name, values[name]) for name in other_names])
        algorithm = algorithms.get(chosen)
        if algorithm is None:
            algorithm = algorithms[chosen] = core.AlgorithmSettings(**dict(chosen))
        key = result_hash(hashed, algorithm, spec.seed, digest)
        if key in seen:
            duplicates += 1
            continue
        seen[key] = None
        try:
            core.check_settings(data, algorithm)
            static = core.static_spec(data, algorithm, spec.padded_size(data.num_samples))
        except ValueError as error:
            raise _impossible(spec, values, str(error)) from None
        index = bucket_of.get(static)
        if index is None:
            index = bucket_of[static] = len(buckets)
            buckets.append(_new_bucket(index, static, data, algorithm))
        buckets[index].cells.append(len(cells))
        cells.append(Cell(data, algorithm, hashed, key, index))
    _check_excluded_methods(spec)
    if not cells:
        raise spec.places.error("every cell is excluded: nothing to run", "exclude")
    _label_apart(buckets)
    for bucket in buckets:
        wanted = len(bucket.cells) * spec.first_target
        set_chunk_size(bucket, wanted, vmap_width, worker_memory_bytes)
    return Plan(spec, cells, buckets, duplicates, tuple(plugins))


def _check_excluded_methods(spec: Spec) -> None:
    """Check that excluded methods exist: the plugins of the spec have registered theirs by now.

    Raises:
        SpecError: one does not.
    """
    known = dict.fromkeys((*spec.methods, *method_names()))
    for index, condition in enumerate(spec.excludes):
        for name in condition.get(METHOD_FIELD, ()):
            if name not in known:
                message = f"{show(name)} is no method; {nearest(name, known)}"
                raise spec.places.error(message, "exclude", METHOD_FIELD, index)


def join_plans(plans: Sequence[Plan], *, vmap_width: int = 1, worker_memory_bytes: int | None = None) -> Plan:
    """Put the cells of several plans, in order, into common buckets.

    A single plan is returned unchanged, with its rule of precision if it has one.

    Raises:
        ValueError: several plans of which one stops by precision, or whose seeds differ.
    """
    if len(plans) == 1:
        return plans[0]
    seeds = {plan.spec.seed for plan in plans}
    if len(seeds) > 1:
        raise ValueError(f"seed: expected one for all sweeps that run together, got {sorted(seeds)}")
    cells: list[Cell] = []
    buckets: dict[Any, Bucket] = {}
    trials: dict[Any, int] = {}
    for plan in plans:
        if plan.spec.precision is not None:
            raise ValueError(
                f"precision: {plan.spec.name} stops by precision and runs alone; give it trials to run it with others"
            )
        for cell in plan.cells:
            own = plan.buckets[cell.bucket]
            new = dataclasses.replace(own, index=len(buckets), cells=[])
            bucket = buckets.setdefault(own.static, new)
            bucket.cells.append(len(cells))
            cells.append(dataclasses.replace(cell, bucket=bucket.index))
            trials[own.static] = trials.get(own.static, 0) + plan.spec.first_target
    for static, bucket in buckets.items():
        set_chunk_size(bucket, trials[static], vmap_width, worker_memory_bytes)
    plugins = {plugin.digest: plugin for plan in plans for plugin in plan.plugins}
    duplicates = sum(plan.duplicates for plan in plans)
    return Plan(plans[0].spec, cells, list(buckets.values()), duplicates, tuple(plugins.values()))


def set_measured_chunk_sizes(
    plan: Plan,
    costs: CostModel,
    kept: Mapping[str, tuple[int, int]],
    *,
    vmap_width: int = 1,
    worker_memory_bytes: int | None = None,
) -> None:
    """Choose the chunk sizes of a plan by measured seconds instead of the work.

    Args:
        plan: the plan, which is changed.
        costs: the measured trials; without any, sizes stay as they are.
        kept: label -> (chunk size, width) of programs that have run: another size would be compiled again.
        vmap_width: trials that may run side by side.
        worker_memory_bytes: memory of one worker; None: not limited.
    """
    for bucket in plan.buckets:
        if bucket.label in kept:
            size, width = kept[bucket.label]
            if width == bucket.vmap_width and size % width == 0:
                bucket.chunk_size = size
                continue
        seconds = costs.seconds(bucket.shape)
        if seconds is not None:
            trials = len(bucket.cells) * plan.spec.first_target
            set_chunk_size(bucket, trials, vmap_width, worker_memory_bytes, seconds)


def set_chunk_size(
    bucket: Bucket,
    trials: int,
    vmap_width: int,
    worker_memory_bytes: int | None,
    seconds: float | None = None,
) -> None:
    """Choose a bucket's vmap width and chunk size.

    The trials planned for the bucket are split evenly into chunks no larger than the work and memory
    limits allow, so that little of the last, padded chunk is wasted. `seconds` is the measured time of a trial, if it is known:
    then a chunk takes about CHUNK_SECONDS.
    """
    width = vmap_width
    if worker_memory_bytes is not None:
        fitting = int(worker_memory_bytes * MEMORY_SHARE // max(bucket.memory_bytes, 1))
        width = max(1, min(width, fitting))
    fits = int(WORK_PER_CHUNK / bucket.work) if seconds is None else int(CHUNK_SECONDS / (seconds * width))
    most = max(width, min(MAX_CHUNK, fits * width), 1)
    even = math.ceil(trials / math.ceil(trials / most))
    bucket.vmap_width = min(width, even)
    bucket.chunk_size = math.ceil(even / bucket.vmap_width) * bucket.vmap_width


def _new_bucket(
    index: int, static: Any, data: core.DataSettings, algorithm: core.AlgorithmSettings
) -> Bucket:
    samples = static.padded_num_samples
    channel = channel_label(algorithm.fit_family or data.family, data.activation)
    shape = TrialShape(
        algorithm.method,
        channel,
        samples,
        data.dim,
        algorithm.fit_num_experts or data.num_experts,
        algorithm.num_starts or 1,
        algorithm.max_iterations,
    )
    label = f"{algorithm.method} {channel} d={data.dim} k={data.num_experts} n<={samples}"
    return Bucket(
        index=index,
        static=static,
        label=label,
        shape=shape,
        memory_bytes=int(core.trial_memory_bytes(static)),
        cells=[],
    )


def _label_apart(buckets: Sequence[Bucket]) -> None:
    """Number the labels that several buckets share."""
    counts: dict[str, int] = {}
    for bucket in buckets:
        label = bucket.label
        counts[label] = counts.get(label, 0) + 1
        if counts[label] > 1:
            bucket.label = f"{label} ({counts[label]})"


def _impossible(spec: Spec, values: Mapping[str, Any], message: str) -> SpecError:
    """The error for an impossible cell: the core's message, with the place and the cell's swept fields."""
    field = message.partition(":")[0].strip()
    known = field in FIELDS or field == METHOD_FIELD
    key = "methods" if field == METHOD_FIELD else field if known else ""
    table, index = spec.place_of(key) if known else ("", 0)
    text = message.partition(":")[2].strip() if known else message
    swept = [name for name in (*spec.swept, METHOD_FIELD) if name in values and name != field]
    cell = ", ".join(f"{name} = {show(values[name])}" for name in swept)
    where = f" (in the cell {cell}; [[exclude]] can leave it out)" if len(swept) > 1 else ""
    return spec.places.error(text + where, table, key, index)
