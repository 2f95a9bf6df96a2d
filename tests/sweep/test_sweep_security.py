"""A sweep's cluster takes functions from who has its certificates, and from nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sqlite3
import ssl
import stat
import subprocess
import time
from pathlib import Path

import dask
import psutil
import pytest
from test_sweep_certificates import certificates  # noqa: F401 - a fixture
from test_sweep_fake_core import command, environment, write_inputs
from test_sweep_run import fake, started, sweep  # noqa: F401 - a fixture

from moejax.sweep.execution.dask_cluster import (
    local_executor,
    slurm_cluster,
    slurm_executor,
    slurm_job_script,
)
from moejax.sweep.execution.executors import ClusterError, InProcessExecutor
from moejax.sweep.execution.security import (
    ROLES,
    private_scratch_folder,
    read_security_file,
    temporary_security,
)
from moejax.sweep.execution.slurm import read_slurm_file
from moejax.sweep.store.schema import STORE_NAME

SECONDS = 30.0


def wait_until(condition, process: subprocess.Popen | None = None):
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return found


def listening(process: psutil.Process) -> dict[tuple[str, int], int]:
    """Address and port of each listening socket of a process and those that it started, with the process."""
    tree = {process.pid, *(child.pid for child in process.children(recursive=True))}
    sockets = [each for each in psutil.net_connections("inet") if each.pid in tree]
    # a socket of UDP that is not connected receives from anyone
    return {
        (each.laddr.ip, each.laddr.port): each.pid
        for each in sockets
        if each.status == psutil.CONN_LISTEN or (each.type != 1 and not each.raddr)
    }


def intruders() -> dict[str, tuple[str, dict]]:
    """Scheme and connection arguments of those who have no certificate of the cluster; none looks at the cluster's own."""
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    another = temporary_security().get_connection_args("client")["ssl_context"]
    for context in (nobody, another):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return {
        "without TLS": ("tcp", {}),
        "without a certificate": ("tls", {"ssl_context": nobody}),
        "with another certificate": ("tls", {"ssl_context": another}),
    }


def send_function(port: int, mark: Path, scheme: str, arguments: dict) -> bool:
    """Send a function that makes a file to a scheduler, nanny or worker of this machine; whether it ran."""
    from distributed.core import connect
    from distributed.protocol.pickle import dumps

    async def send(operation: str) -> None:
        comm = await connect(f"{scheme}://127.0.0.1:{port}", timeout=5, **arguments)
        try:
            message = {"op": operation, "function": dumps(mark.touch), "args": dumps(()), "kwargs": dumps({})}
            await comm.write({**message, "wait": True, "reply": True})
            await asyncio.wait_for(comm.read(), 5)
        finally:
            comm.abort()

    mark.unlink(missing_ok=True)
    for operation in ("run", "run_function"):  # of workers and nannies, and of schedulers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("logging.Logger.callHandlers", lambda *_: None)
            try:
                asyncio.run(send(operation))
            except OSError:
                continue
    return mark.exists()


def assert_closed(process: psutil.Process, mark: Path) -> None:
    sockets = listening(process)
    assert {address for address, _ in sockets} <= {"127.0.0.1", "::1"}
    for _, port in sockets:
        for name, intruder in intruders().items():
            assert not send_function(port, mark, *intruder), name


@pytest.mark.slow
def test_nobody_else_reaches_the_processes_of_a_sweep(tmp_path):
    toml, plugin = write_inputs(tmp_path)
    process = started(
        command(toml, plugin, tmp_path / "run", workers=2, quiet=True, set=["trials=400"]),
        FAKE_CORE_SLEEP="60",
    )
    try:
        tree = psutil.Process(process.pid)
        wait_until(
            lambda: len(set(listening(tree).values())) == 3, process
        )  # two workers, and the coordinator
        assert len(listening(tree)) == 5  # a scheduler, two nannies, two workers
        assert_closed(tree, tmp_path / "mark")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def a_users_dask_settings():
    """For clusters of the user's own; each of them would end or stall the workers of a sweep."""
    settings = {
        "worker.lifetime.duration": "1s",
        "worker.multiprocessing-method": "fork",
        "worker.memory.terminate": 0.01,
        "scheduler.worker-ttl": "1s",
        "nanny.environ.OMP_NUM_THREADS": 64,
    }
    with dask.config.set({f"distributed.{name}": value for name, value in settings.items()}):
        yield


def test_functions_run_for_who_has_the_certificates(tmp_path, a_users_dask_settings):
    """The attack of these tests works where it is let in."""
    executor = local_executor(2)
    try:
        inside = dask.config.get("distributed")
        assert inside["worker"]["lifetime"]["duration"] is None
        assert inside["worker"]["multiprocessing-method"] == "spawn"
        assert inside["nanny"]["environ"] != {"OMP_NUM_THREADS": 64}
        wait_until(lambda: len(executor.workers()) == 2)
        for worker in executor._client.scheduler_info()["workers"].values():
            assert worker["local_directory"].startswith(private_scratch_folder())
        friend = executor._client.security.get_connection_args("client")
        for _, port in listening(psutil.Process()):
            assert send_function(port, tmp_path / "mark", "tls", friend)
        assert_closed(psutil.Process(), tmp_path / "mark")
        executor.submit(executor.workers()[0], 0, [1, 2, 3], run=len)
        (outcome,) = executor.wait(SECONDS)
        assert outcome.result == 3
        time.sleep(1.5)  # longer than a worker would live
        assert len(executor.workers()) == 2
    finally:
        executor.close()
    assert dask.config.get("distributed.worker.lifetime.duration") == "1s"


def test_one_worker_is_this_process_and_listens_to_nobody(fake, tmp_path, monkeypatch):  # noqa: F811
    before = listening(psutil.Process())
    seen = []
    wait = InProcessExecutor.wait
    monkeypatch.setattr(
        InProcessExecutor,
        "wait",
        lambda self, seconds: seen.append(listening(psutil.Process())) or wait(self, seconds),
    )
    sweep(fake, tmp_path / "run", "trials=2", "noise_std=0.1")
    assert seen
    assert all(sockets == before for sockets in seen)


SLURM = 'workers = 1\n[job]\nmemory = "1GB"\ninterface = "lo"\n'


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """An sbatch that runs the script at once, and an scancel that kills it; yields the folder that they keep."""
    programs, jobs = tmp_path / "bin", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    scripts = {
        "sbatch": 'cp "${@: -1}" "$JOBS/1.sh"; setsid bash "$JOBS/1.sh" > "$JOBS/1.out" 2>&1 & echo $! > "$JOBS/1.pid"\n'
        'echo "Submitted batch job 1"',
        "scancel": 'touch "$JOBS/cancelled"; kill -- -"$(cat "$JOBS/1.pid")"',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    (tmp_path / "slurm.toml").write_text(SLURM)
    monkeypatch.chdir(tmp_path)
    yield jobs
    if (jobs / "1.pid").exists():
        subprocess.run([programs / "scancel"], stderr=subprocess.DEVNULL, check=False)


def certificate_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(".moejax-tls-*/*/*.pem"))


@pytest.mark.slow
def test_slurms_workers_join_with_temporary_certificates(fake_slurm, tmp_path):
    executor = slurm_executor(Path("slurm.toml"))
    try:
        wait_until(executor.workers)
        executor.submit(executor.workers()[0], 0, [1, 2], run=len)
        (outcome,) = executor.wait(SECONDS)
        assert outcome.result == 2
        files = certificate_files(tmp_path)
        assert len(files) == 8
        assert {stat.S_IMODE(file.stat().st_mode) for file in files if "key" in file.name} == {0o600}
        assert stat.S_IMODE(files[0].parent.parent.stat().st_mode) == 0o700
        ports = [int(address.rpartition(":")[2]) for address in executor.workers()]
        scheduler = executor._client.scheduler.address
        assert scheduler.startswith("tls://")
        assert len(listening(psutil.Process())) == 1  # no web pages
        for port in [*ports, int(scheduler.rpartition(":")[2])]:
            for name, intruder in intruders().items():
                assert not send_function(port, tmp_path / "mark", *intruder), name
    finally:
        executor.close()
    assert not list(tmp_path.glob(".moejax-tls-*"))
    assert (fake_slurm / "cancelled").exists()


def test_slurms_jobs_are_given_the_files_of_security(fake_slurm, tmp_path, certificates):  # noqa: F811
    script = slurm_job_script(Path("slurm.toml"), read_security_file(certificates / "security.toml", ROLES))
    for option, name in (("ca-file", "ca"), ("cert", "worker"), ("key", "worker-key")):
        assert f"--tls-{option} {certificates / name}.pem" in script
    assert "--protocol tls://" in script
    assert not certificate_files(tmp_path)
    temporary = slurm_job_script(Path("slurm.toml"))
    assert re.search(r"--tls-key \S*/\.moejax-tls-\S*/worker-key\.pem", temporary)
    assert not list(tmp_path.glob(".moejax-tls-*"))  # a dry run leaves nothing


def test_slurms_scheduler_serves_pages_only_where_they_are_asked_for(fake_slurm):
    for line, sockets in (("", 1), ('scheduler_options = {dashboard_address = "127.0.0.1:0"}', 2)):
        Path("slurm.toml").write_text(SLURM + line)
        with slurm_cluster(read_slurm_file(Path("slurm.toml")), None):
            assert len(listening(psutil.Process())) == sockets


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("security = true", r"\[job\] security: is set by --security FILE, or to temporary certificates"),
        ('protocol = "tcp://"', r"\[job\] protocol: is set here to tls://"),
        ("scheduler_options = 3", r"\[job\] scheduler_options: expected a table"),
        (
            'shared_temp_directory = "nowhere"',
            r"shared_temp_directory: nowhere cannot be written: No such file",
        ),
        (
            'shared_temp_directory = "a b"',
            r"a job script cannot name this file: expected a path without spaces",
        ),
    ],
)
def test_a_slurm_file_cannot_open_the_cluster(fake_slurm, tmp_path, line, message):
    (tmp_path / "a b").mkdir()
    Path("slurm.toml").write_text(SLURM + line)
    with pytest.raises((ValueError, ClusterError), match=message) as caught:
        slurm_job_script(Path("slurm.toml"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob(".moejax-tls-*"))


def has_begun(out: Path) -> bool:
    """Whether the store has a record of a run."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{out / STORE_NAME}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM runs").fetchone()[0] > 0
    except sqlite3.OperationalError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_with_slurm_says_how_to_resume(fake_slurm, tmp_path, number, status):
    """dask-jobqueue 0.9.0 takes SIGINT for itself when it is imported."""
    toml, plugin = write_inputs(tmp_path)
    (tmp_path / "bin" / "sbatch").write_text(
        '#!/bin/bash\ntouch "$JOBS/asked"\necho "Submitted batch job 1"\n'
    )
    arguments = command(toml, plugin, tmp_path / "run", workers=None, cluster="slurm:slurm.toml", quiet=True)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = started(arguments)
    signal.signal(signal.SIGINT, inherited)
    wait_until((fake_slurm / "asked").exists, process)
    wait_until(lambda: has_begun(tmp_path / "run"), process)
    time.sleep(0.5)
    process.send_signal(number)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == status
    assert "to resume:" in error
    assert (fake_slurm / "cancelled").exists()
    assert not list(tmp_path.glob(".moejax-tls-*"))
