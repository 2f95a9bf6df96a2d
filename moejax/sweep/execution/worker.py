"""The work of a worker: it runs a chunk of trials and sends the numbers back."""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moejax.environment import pin_random_numbers
from moejax.sweep import trial as core
from moejax.sweep.plan.chunks import NOT_PREPARED, ChunkCell, ChunkResult, ChunkTask, WorkerSettings
from moejax.sweep.plan.identity import trial_key
from moejax.sweep.plan.plugins import use_plugins

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""The event that a program was compiled or loaded from the persistent cache; a load is preceded by the other event."""
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class _CompileClock:
    """Counts the compilations of this process; the seconds are also those of loading from the persistent cache."""

    def __init__(self) -> None:
        import jax.monitoring

        self.seconds = 0.0
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            self.seconds += duration_secs
            self.count += 1

    def _on_event(self, event: str, **_: str | int) -> None:
        if event == CACHE_HIT_EVENT:
            self.count -= 1


@functools.cache
def _compile_clock() -> _CompileClock:
    return _CompileClock()


def compilations_so_far() -> tuple[int, float]:
    """Compilations of this process since the first call; and their seconds, loads from the persistent cache included."""
    clock = _compile_clock()
    return clock.count, clock.seconds


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


@functools.cache
def _keep_freed_memory() -> None:
    """Stop glibc from returning the memory of a trial's arrays to the system, which would zero it for the next trial.

    That would cost a sixth of the time of a sweep (benchmarks/throughput.py). Without glibc, nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_TOP_PAD, 2**26)


def configure(settings: WorkerSettings) -> None:
    """Set the coordinator's precision, random numbers, cache and plugins in this process.

    This is done for every chunk, because a shared worker may have run chunks with other settings in between.
    """
    import jax

    _keep_freed_memory()
    pin_random_numbers()
    if jax.config.values["jax_enable_x64"] != settings.enable_x64:
        jax.config.update("jax_enable_x64", settings.enable_x64)
    if settings.compilation_cache_dir and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", settings.compilation_cache_dir)
    use_plugins(settings.plugins)


@functools.lru_cache(maxsize=512)
def _prepared(cell: ChunkCell, padded_num_samples: int, settings: WorkerSettings) -> tuple[Any, Any]:
    """(TrialSpec, Hyperparameters) of a cell; `settings` is in the key: precision changes the tables."""
    return core.prepare(cell.data, cell.algorithm, padded_num_samples)


def make_room_for_programs(share: float = 0.5) -> None:
    """Drop the compiled programs of this process when it holds more than this share of the memory maps Linux allows it.

    XLA takes about a thousand maps for a trial's program, and LLVM ends the process when there are none left. A program that
    is called again is loaded from the cache on disk. On systems other than Linux, nothing is done.
    """
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        used = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return
    if used > share * most:
        import jax

        jax.clear_caches()


def run_chunk(task: ChunkTask) -> ChunkResult:
    """Run the trials of a chunk in this process.

    Cells that cannot be prepared give failed trials; the caller isolates any other exception. The
    compiled program always gets `task.size` trials: missing ones repeat the first.
    """
    started, clock_start = time.time(), time.perf_counter()
    configure(task.settings)
    import jax

    clock = _compile_clock()
    compiled_before, count_before = clock.seconds, clock.count
    prepared: dict[int, tuple[Any, Any]] = {}
    refused: dict[int, str] = {}
    for index, cell in enumerate(task.cells):
        try:
            prepared[index] = _prepared(cell, task.padded_num_samples, task.settings)
        except ValueError as error:
            refused[index] = " ".join(str(error).split())

    positions = [position for position, cell in enumerate(task.cell_of) if cell in prepared]
    total = len(task.cell_of)
    metrics = {name: np.full(total, np.nan) for name in core.metric_names()}
    status = np.full(total, NOT_PREPARED, dtype=np.int64)
    reasons = {position: refused[cell] for position, cell in enumerate(task.cell_of) if cell in refused}
    arrays: dict[str, np.ndarray] = {}
    execute_seconds = 0.0
    if positions:
        padded = positions + positions[:1] * (task.size - len(positions))
        keys: Any = np.stack(  # NumPy arrays: a conversion here would compile one more program
            [
                trial_key(task.seed, task.cells[task.cell_of[position]].data_hash, task.trial_of[position])
                for position in padded
            ]
        )
        static = prepared[task.cell_of[positions[0]]][0]
        trees = [prepared[task.cell_of[position]][1] for position in padded]
        hyperparameters = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
        inside = time.perf_counter()
        result = jax.device_get(core.run_trials(keys, hyperparameters, static, vmap_width=task.vmap_width))
        execute_seconds = time.perf_counter() - inside - (clock.seconds - compiled_before)
        keep = len(positions)
        named = result._asdict()
        named |= named.pop("registered", {})
        for name, value in named.items():
            if name == "status":
                status[positions] = np.asarray(value)[:keep]
            elif name in metrics:
                metrics[name][positions] = np.asarray(value, dtype=np.float64)[:keep]
            elif value is not None and np.ndim(value) > 1:
                rows = np.asarray(value)[:keep]
                arrays[name] = np.zeros((total, *rows.shape[1:]), dtype=rows.dtype)
                arrays[name][positions] = rows
    if clock.seconds > compiled_before:
        make_room_for_programs()
    return ChunkResult(
        metrics=metrics,
        status=status,
        reasons=reasons,
        arrays=arrays,
        started=started,
        wall_seconds=time.perf_counter() - clock_start,
        compile_seconds=clock.seconds - compiled_before,
        compilations=clock.count - count_before,
        execute_seconds=execute_seconds,
        host=socket.gethostname(),
        process=os.getpid(),
        device=jax.devices()[0].device_kind,
    )
