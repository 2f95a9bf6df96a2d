"""Sweeps on a Dask scheduler that is already running, and the job script that Slurm would be given."""

from __future__ import annotations

import socket
from pathlib import Path

import pandas as pd
import pytest
from dask_programs import scheduler_and_workers
from test_sweep_fake_core import command, environment, run, write_inputs

from moejax.environment import compile_fast_everywhere, single_threaded_environment
from moejax.sweep import load
from moejax.sweep.execution.certificates import make_certificates
from moejax.sweep.execution.dask_cluster import cluster_executor, slurm_job_script
from moejax.sweep.execution.executors import ClusterError

SLURM = """
workers = 64
[job]
queue = "short"
account = "stat"
memory = "4GB"
walltime = "02:00:00"
job_extra_directives = ["--gpus=1"]
job_script_prologue = ["module load python"]
"""


def one_worker(folder: Path, certificates: Path):
    """A scheduler and one worker with TLS, as docs/security.md starts them."""

    def tls(role: str) -> list[str]:
        paths = {"ca-file": "ca.pem", "cert": f"{role}.pem", "key": f"{role}-key.pem"}
        return [word for name, path in paths.items() for word in (f"--tls-{name}", str(certificates / path))]

    return scheduler_and_workers(
        folder,
        1,
        scheduler=("--protocol", "tls", "--host", "127.0.0.1", "--port", "0"),
        options={role: tls(role) for role in ("scheduler", "worker")},
        environment=environment(),
    )


@pytest.mark.slow
def test_a_running_scheduler_gives_the_rows_of_this_process(tmp_path):
    toml, plugin = write_inputs(tmp_path)
    alone = run(command(toml, plugin, tmp_path / "alone", workers=1))
    assert alone.returncode == 0, alone.stderr
    security = str(make_certificates(tmp_path / "certificates"))
    with one_worker(tmp_path, tmp_path / "certificates") as address:
        assert address.startswith("tls://")
        joined = run(
            command(toml, plugin, tmp_path / "joined", workers=None, cluster=address, security=security)
        )
        assert joined.returncode == 0, joined.stderr
        assert "without TLS" not in joined.stderr
        both = run(command(toml, plugin, tmp_path / "both", workers=2, cluster=address))
        assert both.returncode == 2
        assert "--workers: the cluster has its own" in both.stderr
    pd.testing.assert_frame_equal(load(tmp_path / "joined"), load(tmp_path / "alone"), check_exact=True)


def test_an_address_where_no_scheduler_answers_is_one_line(monkeypatch):
    monkeypatch.setattr("moejax.sweep.execution.dask_cluster.CONNECT_SECONDS", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match=rf"--cluster tcp://127.0.0.1:{port}: no Dask scheduler answers"):
        cluster_executor(f"tcp://127.0.0.1:{port}")
    with pytest.raises(
        ValueError,
        match=r"expected tls://HOST:PORT or tcp://HOST:PORT of a Dask scheduler, or slurm:FILE.toml",
    ):
        cluster_executor("somewhere")


def test_slurm_job_script_asks_for_one_single_threaded_worker(tmp_path):
    file = tmp_path / "slurm.toml"
    file.write_text(SLURM)
    script = slurm_job_script(file)
    lines = script.splitlines()
    assert lines[0].startswith("#!")
    for directive in ("-p short", "-A stat", "-n 1", "--cpus-per-task=1", "-t 02:00:00", "--gpus=1"):
        assert f"#SBATCH {directive}" in lines
    prologue = lines.index("module load python")
    worker = next(
        i for i, line in enumerate(lines) if "distributed.cli.dask_worker" in line or "dask worker" in line
    )
    threads = [i for i, line in enumerate(lines) if line.startswith("export OMP_NUM_THREADS")]
    assert prologue < threads[0] < worker
    assert "--nthreads 1" in lines[worker]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers = 0", r"workers: 0 is not accepted: expected a whole number of at least 1"),
        ("wrokers = 2", r"wrokers: unknown key; did you mean workers\?"),
        (
            "workers = 2\n[job]\nqeue = 'x'",
            r"\[job\] qeue: unknown option of dask_jobqueue; did you mean queue",
        ),
        ("workers = 2\n[job]\ncores = 2", r"\[job\] cores: is set here to one single-threaded worker"),
        ("workers = ", r"not valid TOML"),
    ],
)
def test_a_bad_slurm_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "slurm.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        slurm_job_script(file)
    assert "\n" not in str(caught.value)


def test_flags_of_the_user_come_after_those_that_compile_fast(monkeypatch):
    """XLA takes the last of two equal flags."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    compile_fast_everywhere(level=0)
    compile_fast_everywhere(level=0)
    flags = single_threaded_environment()["XLA_FLAGS"].split()
    assert flags[0] == "--xla_backend_optimization_level=0"
    assert flags.index("--xla_backend_optimization_level=2") > 0
    assert flags.count("--xla_backend_optimization_level=0") == 1
    assert "--xla_cpu_multi_thread_eigen=false" in flags
