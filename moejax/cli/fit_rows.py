"""`moejax fit` of rows that do not fit in memory: a folder of files, read in batches, by threads or by the workers of a cluster."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moejax.checks import require
from moejax.cli.options import Fit
from moejax.console import duration, make_notes
from moejax.environment import cache_folder
from moejax.fitting.pipeline import fit_rows
from moejax.fitting.result import FitResult
from moejax.fitting.streaming.files import FileSource
from moejax.fitting.streaming.fit import PassProgress
from moejax.fitting.streaming.remote import RemoteTask, run_remotely
from moejax.fitting.streaming.runners import Task, run_here
from moejax.fitting.streaming.source import Source
from moejax.fitting.tables import Dataset
from moejax.methods.options import FitOptions

if TYPE_CHECKING:
    from moejax.sweep.execution.executors import Executor

LINE_SECONDS = 15.0
"""Time between two lines of progress where there is no terminal."""
MOST_DEATHS = 3
"""A partition on which so many workers died is given up."""
CHECKPOINT = ".checkpoint.npz"


def reads_in_batches(command: Fit) -> bool:
    """True if the command is about rows that are read in batches: a folder, `--stream`, or a cluster."""
    return (
        command.stream or command.cluster is not None or (command.data is not None and command.data.is_dir())
    )


def fit_in_batches(
    command: Fit, num_experts: int | str | list[int], options: FitOptions
) -> tuple[Dataset, FitResult]:
    """The fit, and the random subsample of the rows as a table.

    Args:
        command: the command.
        num_experts: k, or several.
        options: of the fit.

    Raises:
        ValueError: about the data or an option, in one line; OSError: a file cannot be read, or the cluster is lost.
    """
    if command.data is None or command.target is None:
        raise ValueError("DATA: expected a file or a folder and --target COLUMN, to be read in batches")
    named = command.cluster is None or isinstance(options.activation, str)
    require(named, "--activation", "a registered name with --cluster", command.activation)
    source = FileSource(
        command.data,
        command.target,
        skip_bad_rows=command.skip_bad_rows,
        separator=command.separator,
        decimal=command.decimal,
    )
    quiet = command.common.quiet or command.common.json
    notes = make_notes(quiet=quiet)
    checkpoint = _checkpoint(command, source)
    with contextlib.ExitStack() as stack:
        runner = run_here if command.cluster is None else stack.enter_context(_cluster(command, notes.print))
        observer = stack.enter_context(_progress(notes, quiet))
        try:
            from moejax.sweep.execution.signals import stopped_by_signals

            with stopped_by_signals():
                fitted = fit_rows(
                    jax.random.key(command.seed),
                    source,
                    num_experts=num_experts,
                    noise_std=command.noise_std,
                    options=options,
                    checkpoint=checkpoint,
                    runner=runner,
                    observer=observer,
                    note=lambda line: notes.print(line, soft_wrap=True),
                )
        except (KeyboardInterrupt, OSError):
            if checkpoint is not None and checkpoint.exists():
                notes.print(f"kept in {checkpoint}: the same command continues", soft_wrap=True)
            raise
    result, sample = fitted.result, fitted.sample
    found = result.diagnostics
    told = [f"parameters, likelihood and errors are those of all {found['num_rows']:,} rows"]
    if found["subsample_rows"] < found["num_rows"]:
        told.append(
            f"RMSE, R^2, shares and the standardised units are those of {found['subsample_rows']:,} random rows"
        )
    if found["skipped_rows"]:
        told.append(f"{found['skipped_rows']:,} bad rows were left out")
    table = Dataset(
        sample.x,
        sample.y,
        source.input_names,
        (source.target_name,),
        str(command.data),
        (*source.notes, *told),
    )
    return table, result


def _checkpoint(command: Fit, source: FileSource) -> Path | None:
    """The file from which the same command continues: in --out, else in the cache; None if there is no cache."""
    if command.out is not None:
        return command.out / CHECKPOINT
    cache = cache_folder()
    if cache is None:
        return None
    facts = (source.identity, command.num_experts, command.method, command.activation, command.seed)
    folder = cache / "fits"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a cache that cannot be written: nothing is kept
    return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npz"


@contextlib.contextmanager
def _progress(notes: Any, quiet: bool) -> Iterator[Callable[[PassProgress], None]]:
    """A bar on a terminal, an occasional line elsewhere: rows, rows a second, time left in this pass."""
    begun, first, last_line, name = time.monotonic(), 0, time.monotonic(), ""
    bar = None
    if not quiet and notes.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
        )
        bar = Progress(*columns, console=notes, transient=True)
    shown = None if bar is None else bar.add_task("", total=None, counts="")

    def observe(progress: PassProgress) -> None:
        nonlocal begun, first, last_line, name
        now = time.monotonic()
        if progress.name != name:
            begun, first, name = now, progress.rows_done, progress.name
        rate = (progress.rows_done - first) / max(now - begun, 1e-3)
        counts = f"{progress.rows_done:,} rows, {rate:,.0f} rows/s"
        if progress.rows is not None and rate > 0:
            counts += f", {duration((progress.rows - progress.rows_done) / rate)} left"
        if bar is not None and shown is not None:
            bar.update(
                shown, description=name, completed=progress.rows_done, total=progress.rows, counts=counts
            )
        elif not quiet and now - last_line > LINE_SECONDS and rate > 0:
            last_line = now
            notes.print(f"{name}: {counts}")

    with bar if bar is not None else contextlib.nullcontext():
        yield observe


@contextlib.contextmanager
def _cluster(command: Fit, note: Callable[[str], None]) -> Iterator[ClusterRunner]:
    """The workers of --cluster, checked as for a sweep."""
    from moejax.sweep.execution.dask_cluster import cluster_executor
    from moejax.sweep.execution.dask_executor import Admission
    from moejax.sweep.execution.security import unencrypted_warning
    from moejax.sweep.plan.chunks import WorkerSettings
    from moejax.sweep.plan.plugins import run_plugins

    assert command.cluster is not None
    precise = bool(jax.config.values["jax_enable_x64"])
    cache, plugins = jax.config.values["jax_compilation_cache_dir"], run_plugins(command.plugin)
    admission = Admission.of(WorkerSettings(precise, cache, plugins))
    executor = cluster_executor(command.cluster, command.security, admission)
    warning = unencrypted_warning(command.cluster)
    if warning is not None:
        note(warning)
    try:
        yield ClusterRunner(executor, note)
    finally:
        executor.close()


class ClusterRunner:
    """Runs a task on the workers of a cluster. A partition stays with its worker, which keeps its rows, while both last."""

    def __init__(self, executor: Executor, note: Callable[[str], None]):
        """Use an executor's workers; `note` gets a line for each event."""
        self._executor, self._note = executor, note
        self._home: dict[int, str] = {}
        self._tickets = 0

    def __call__(
        self, task: Task, source: Source, indices: Sequence[int], on_rows: Callable[[int], None]
    ) -> Iterator[tuple[int, Any]]:
        """(index, sum) of each of these partitions, as they end.

        Raises:
            ValueError: a row is bad; OSError: a file cannot be read by a worker, a partition ends every worker, or the cluster is
                lost.
        """
        todo, running = list(indices), dict[int, tuple[int, str]]()
        deaths = Counter[int]()
        identity, partitions = source.identity, source.partitions
        while todo or running:
            for line in self._executor.news():
                self._note(line)
            self._submit(
                todo, running, lambda index: RemoteTask(task, source, identity, index, partitions[index])
            )
            for outcome in self._executor.wait(0.2):
                index, worker = running.pop(outcome.ticket)
                if outcome.result is not None:
                    if outcome.result.error is not None:
                        raise outcome.result.error
                    self._home[index] = worker
                    on_rows(outcome.result.rows)
                    yield index, outcome.result.total
                elif outcome.worker_died and deaths[index] + 1 < MOST_DEATHS:
                    deaths[index] += 1
                    self._note(f"{outcome.reason}; its partition goes to another")
                    todo.insert(0, index)
                else:
                    raise OSError(f"{partitions[index]}: {outcome.reason}")

    def _submit(
        self, todo: list[int], running: dict[int, tuple[int, str]], message: Callable[[int], RemoteTask]
    ) -> None:
        """Fill the workers' slots, each with its own partitions first."""
        workers = self._executor.workers()
        for worker in workers:
            free = self._executor.slots - sum(at == worker for _, at in running.values())
            for _ in range(min(free, len(todo))):
                own = (i for i in todo if self._home.get(i) == worker)
                others = (i for i in todo if self._home.get(i) not in workers)
                index = next(own, next(others, None))
                if index is None:
                    break
                todo.remove(index)
                self._tickets += 1
                running[self._tickets] = (index, worker)
                self._executor.submit(worker, self._tickets, message(index), run=run_remotely)
