"""Workers that are lost, replaced, late, or not what they should be: a sweep ends, or says what it waits for."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from test_sweep_run import committed, fake, sweep  # noqa: F401 - a fixture

from moejax.environment import float_precision
from moejax.sweep import load
from moejax.sweep.execution import admission, dask_executor
from moejax.sweep.execution.dask_cluster import slurm_executor
from moejax.sweep.execution.dask_executor import Admission, DaskExecutor
from moejax.sweep.execution.executors import ClusterError
from moejax.sweep.execution.signals import Stopped, exit_status, stopped_by_signals
from moejax.sweep.plan.chunks import WorkerSettings
from moejax.sweep.store import schema

SETTINGS = WorkerSettings(enable_x64=True, compilation_cache_dir=None)


@pytest.fixture
def cluster(monkeypatch):
    """A scheduler of the tests' own process, without a worker; its workers are threads."""
    from distributed import LocalCluster

    monkeypatch.setattr(dask_executor, "WORKERS_REFRESH_SECONDS", 0.05)
    with LocalCluster(
        n_workers=0, processes=False, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=60
    ) as made:
        yield made


@contextlib.contextmanager
def executor_on(cluster, **options):
    from distributed import Client

    client = Client(cluster, set_as_default=False)
    executor = DaskExecutor(client, client.close, **options)
    try:
        yield executor
    finally:
        executor.close()


def replace_workers(cluster, number: int) -> None:
    """End all workers without their saying so to anybody who waits for them, and start others."""

    async def end() -> None:
        for name, worker in list(cluster.workers.items()):
            del cluster.worker_spec[name], cluster.workers[name]
            await worker.close(timeout=1, nanny=False, executor_wait=False)

    cluster.sync(end)
    cluster.scale(number)


def wait_until(condition, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_chunk_is_taken_back_when_its_only_worker_is_replaced(cluster):
    cluster.scale(1)
    with executor_on(cluster, patient=True) as executor:
        (first,) = wait_until(executor.workers)
        for ticket in (1, 2):
            executor.submit(first, ticket, 1.0, run=time.sleep)
        time.sleep(0.2)
        replace_workers(cluster, 1)
        (second,) = wait_until(lambda: [worker for worker in executor.workers() if worker != first])
        outcomes = executor.wait(5.0)
        assert sorted(outcome.ticket for outcome in outcomes) == [1, 2]
        assert all(outcome.worker_died for outcome in outcomes)
        executor.submit(second, 3, [1, 2], run=len)
        (outcome,) = wait_until(lambda: executor.wait(1.0))
        assert (outcome.ticket, outcome.result) == (3, 2)


def test_a_result_that_its_worker_does_not_give_away_is_lost(cluster, monkeypatch):
    """The worker is there: the sweep waits for a while, not for ever."""
    from distributed import Future
    from distributed import TimeoutError as NotGathered

    monkeypatch.setattr(dask_executor, "MOST_GATHERS", 3)
    asked = []

    def never(future, timeout=None):
        asked.append(timeout)
        raise NotGathered

    cluster.scale(1)
    with executor_on(cluster, patient=True) as executor:
        (worker,) = wait_until(executor.workers)
        executor.submit(worker, 1, [1, 2], run=len)
        wait_until(executor._futures[1][1].done)
        monkeypatch.setattr(Future, "result", never)
        (outcome,) = executor.wait(5.0)
        assert (outcome.ticket, outcome.worker_died, len(asked)) == (1, True, 3)


@pytest.mark.parametrize("replacements", [0, 1])
def test_a_result_that_ends_with_its_worker_is_run_again(cluster, monkeypatch, replacements):
    """The task had ended well, and nobody had fetched its result yet: Dask waits for the worker to run it once more."""
    monkeypatch.setattr(dask_executor, "GATHER_SECONDS", 0.2)
    cluster.scale(1)
    with executor_on(cluster, patient=True) as executor:
        (first,) = wait_until(executor.workers)
        executor.submit(first, 1, [1, 2], run=len)
        (_, future) = executor._futures[1]
        wait_until(future.done)
        replace_workers(cluster, replacements)
        outcomes: list = []
        waiter = threading.Thread(target=lambda: outcomes.extend(executor.wait(5.0)), daemon=True)
        waiter.start()
        waiter.join(20.0)
        assert [(outcome.ticket, outcome.worker_died) for outcome in outcomes] == [(1, True)]


def test_a_worker_that_dask_pauses_gets_nothing_and_is_told(cluster, monkeypatch):
    """Its memory is near Dask's limit: it would take no chunk up, for ever if that is the size of a JAX process."""
    from distributed import Status

    monkeypatch.setattr(dask_executor, "PAUSED_REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(dask_executor, "FIRST_WORD_SECONDS", 0.1)
    cluster.scale(1)
    with executor_on(cluster, patient=True) as executor:
        wait_until(executor.workers)
        (worker,) = cluster.workers.values()
        worker.periodic_callbacks["memory_monitor"].stop()  # it would see that there is memory enough
        worker.status = Status.paused
        wait_until(lambda: not executor.workers())
        (line, *_) = wait_until(lambda: executor.workers() or executor.news())
        assert "1 paused by Dask, because their memory is near its limit" in line
        worker.status = Status.running
        wait_until(executor.workers)


def test_a_sweep_whose_only_worker_is_replaced_has_every_row_once(fake, cluster, tmp_path, monkeypatch):  # noqa: F811
    from distributed import Client

    small = ("methods=spectral", "noise_std=0.1", "num_samples=40", "trials=400")
    sweep(fake, tmp_path / "quiet", *small)
    client = Client(cluster, set_as_default=False)
    monkeypatch.setattr(
        "moejax.sweep.execution.dask_cluster.cluster_executor",
        lambda address, security, admission, timeout: DaskExecutor(
            client, client.close, patient=True, admission=admission, worker_timeout=timeout
        ),
    )
    monkeypatch.setenv("FAKE_CORE_SLEEP", "0.3")
    cluster.scale(1)
    out = tmp_path / "run"

    def disturb() -> None:
        wait_until(lambda: len(committed(out)))
        replace_workers(cluster, 1)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    sweep(fake, out, *small, workers=None, cluster="tcp://fake:1", worker_timeout=30.0)
    disturber.join()
    pd.testing.assert_frame_equal(load(out), load(tmp_path / "quiet"), check_exact=True)


def test_a_worker_of_other_code_gets_no_chunk(cluster):
    cluster.scale(1)
    mine = Admission.of(SETTINGS)
    other = Admission(mine.expected | {"source": "0" * 64}, mine.settings)
    with executor_on(cluster, patient=True, admission=other, worker_timeout=1.0) as executor:
        lines = wait_until(lambda: executor.workers() or executor.news())
        assert "gets no trials" in lines[0]
        assert "has another source of moejax" in lines[0]
        with pytest.raises(
            ClusterError, match=r"no worker for 1\.0 s \(1 cannot run this sweep .*what is done"
        ):
            wait_until(executor.workers)
    with executor_on(cluster, patient=True, admission=mine) as executor:
        assert wait_until(executor.workers)
        assert executor.news() == []
    with (
        executor_on(cluster, admission=Admission(mine.expected | {"jax": "0.1"}, mine.settings)) as executor,
        pytest.raises(
            ClusterError, match=r"no worker can run this sweep: \S+ has jax \S+, and here is 0\.1;"
        ),
    ):
        wait_until(executor.workers)  # workers of this machine are all alike: it ends at once


@pytest.mark.parametrize("source", [None, "raise ImportError('libcuda is missing')"])
def test_a_worker_without_moejax_answers(tmp_path, source):
    """The text of the question, in a Python that has no moejax or one that cannot be imported."""
    if source is not None:
        (tmp_path / "moejax").mkdir()
        (tmp_path / "moejax" / "__init__.py").write_text(source)
    expected = {"moejax": "1", "source": "", "jax": "unknown", "jaxlib": "unknown"}
    if source is not None:
        expected["source"] = admission.source_digest(tmp_path / "moejax")
    question = Path(admission.__file__).read_text() + f"\nprint(refusal({expected!r}, b''))\n"
    answer = subprocess.run(
        [sys.executable, "-S", "-"],
        input=question,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    wanted = "No module named 'moejax'" if source is None else "ImportError: libcuda is missing"
    assert wanted in answer.stdout


def test_the_digest_of_a_source_changes_with_one_line(tmp_path):
    (tmp_path / "inner").mkdir()
    files = (tmp_path / "a.py", tmp_path / "inner" / "b.py")
    for file in files:
        file.write_text("X = 1\n")
    digests = {admission.source_digest(tmp_path)}
    for file in files:
        file.write_text("X = 2\n")
        digests.add(admission.source_digest(tmp_path))
    assert len(digests) == 3
    (tmp_path / "notes.txt").write_text("no code")
    assert admission.source_digest(tmp_path) in digests
    assert admission.numeric_settings()["precision"] == float_precision()


def test_waiting_is_told_and_ends_where_that_is_asked_for(cluster, monkeypatch):
    monkeypatch.setattr(dask_executor, "FIRST_WORD_SECONDS", 0.1)
    with executor_on(
        cluster, patient=True, worker_timeout=0.6, about=lambda came, waited: f"{came} came"
    ) as executor:
        lines: list[str] = []

        def workers() -> bool:
            lines.extend(executor.news())
            return bool(executor.workers())

        with pytest.raises(
            ClusterError, match=r"no worker for 0\.6 s \(the scheduler has none; 0 came\); what"
        ):
            wait_until(workers)
        assert [line.partition(" s: ")[0] for line in lines] == [
            f"no worker for {n}" for n in (0.1, 0.2, 0.4)
        ]
        assert lines[0].endswith("the scheduler has none; 0 came; still waiting")
    with executor_on(cluster, patient=True) as executor:
        wait_until(lambda: executor.workers() or executor.news())
        cluster.scale(1)
        wait_until(executor.workers)
        assert "there is a worker again" in executor.news()


def test_a_signal_is_an_interrupt_with_a_status_of_its_own():
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with pytest.raises(Stopped) as caught, stopped_by_signals():
            signal.raise_signal(number)
        assert exit_status(caught.value) == status
        assert signal.getsignal(number) is signal.SIG_DFL
    assert exit_status(KeyboardInterrupt()) == 130

    def stopped_inside_a_lock():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped:  # as a lock does it that was left half taken
            raise RuntimeError("cannot release un-acquired lock") from None

    with pytest.raises(Stopped) as caught, stopped_by_signals():
        stopped_inside_a_lock()
    assert exit_status(caught.value) == 143
    with pytest.raises(RuntimeError, match="of its own"), stopped_by_signals():
        raise RuntimeError("an error of its own")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)  # nohup stays what it is
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_store_that_another_program_holds_is_waited_for(fake, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("moejax.sweep.store.store.BUSY_MILLISECONDS", 50)
    monkeypatch.setattr("moejax.sweep.store.store.FIRST_WORD_SECONDS", 0.2)
    out, small = tmp_path / "run", ("methods=spectral", "noise_std=0.1", "num_samples=40")
    sweep(fake, out, *small, "trials=3")
    holder = sqlite3.connect(out / schema.STORE_NAME, isolation_level=None, check_same_thread=False)
    begin_run = schema_begin(monkeypatch, holder)
    sweep(fake, out, *small, "trials=9")
    begin_run.join()
    holder.close()
    assert len(load(out)) == 9
    assert "another program has held the store for" in capsys.readouterr().err


def schema_begin(monkeypatch, holder: sqlite3.Connection) -> threading.Timer:
    """Take the store just before a run begins, and let go a little later."""
    from moejax.sweep.store.store import Store

    release = threading.Timer(0.6, lambda: holder.execute("ROLLBACK"))
    begin_run = Store.begin_run

    def held(self, *arguments):
        holder.execute("BEGIN IMMEDIATE")
        release.start()
        begin_run(self, *arguments)

    monkeypatch.setattr(Store, "begin_run", held)
    return release


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Writes fake programs of Slurm, the only ones in PATH besides those of the system."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm.toml").write_text('workers = 2\n[job]\nmemory = "1GB"\ninterface = "lo"\n')

    def write(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\n{script}\n")
            (folder / name).chmod(0o755)

    return write


SBATCH = 'n=7; until mkdir "job$n" 2>/dev/null; do n=$((n + 1)); done; echo "Submitted batch job $n"'
REFUSES = 'echo "sbatch: error: Invalid account" >&2; exit 1'


@pytest.mark.parametrize(
    ("scripts", "message"),
    [
        ({}, "Slurm takes no job: there is no sbatch in PATH"),
        ({"sbatch": REFUSES}, "Slurm takes no job: sbatch: error: Invalid account"),
    ],
)
def test_a_slurm_that_takes_no_job_is_one_line(programs, scripts, message, capfd):
    programs(**scripts)
    with pytest.raises(ClusterError, match=message) as caught:
        slurm_executor(Path("slurm.toml"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert not list(Path().glob(".moejax-tls-*"))


def test_slurms_jobs_that_ended_are_noticed_and_those_that_wait_are_cancelled(programs, monkeypatch):
    monkeypatch.setattr(dask_executor, "FIRST_WORD_SECONDS", 0.2)
    programs(sbatch=SBATCH, scancel="echo $@ >> cancelled", squeue="cat queue")
    Path("queue").write_text("7 PENDING (Priority)\n8 PENDING (Priority)\n99 RUNNING (None)\n")
    executor = slurm_executor(Path("slurm.toml"))
    try:
        line = wait_until(lambda: executor.workers() or executor.news())[0]
        assert line.endswith("Slurm's jobs: 2 PENDING (Priority); still waiting")
        Path("queue").write_text("99 RUNNING (None)\n")
        with pytest.raises(ClusterError, match="all 2 jobs have ended; what is done is kept"):
            wait_until(executor.workers)
    finally:
        executor.close()
        executor.close()  # twice does nothing
    assert sorted(Path("cancelled").read_text().split()) == ["7", "8"]
