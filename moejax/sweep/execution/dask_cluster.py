"""Starts or joins a Dask cluster: one worker per device, one chunk at a time on each.

On CPUs a device is a core. Workers are single-threaded processes, each pinned to its core, because two XLA
programs use two cores better than one program does. XLA reads its flags and the affinity when its backend
starts, so both are set before a worker imports JAX.

Dask runs every function that it is sent. Workers of this machine listen on the loopback interface only, and accept only the
certificates of this run; `security` has the certificates of other clusters.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.checks import describe
from moejax.environment import BLAS_THREADS, single_threaded_environment
from moejax.sweep.execution.cores import CoreClaim
from moejax.sweep.execution.dask_executor import Admission, DaskExecutor
from moejax.sweep.execution.executors import ClusterError
from moejax.sweep.execution.security import (
    cluster_security,
    private_scratch_folder,
    temporary_security,
    temporary_security_in,
)
from moejax.sweep.execution.slurm import (
    SlurmFile,
    SlurmJobs,
    make_slurm_cluster,
    read_slurm_file,
    scheduler_without_pages,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from distributed import Security

CONNECT_SECONDS = 30.0
CLUSTER_NAME = "moejax"
LOOPBACK = "127.0.0.1"


def local_executor(
    workers: int,
    gpus: tuple[str, ...] = (),
    admission: Admission | None = None,
    worker_timeout: float | None = None,
) -> DaskExecutor:
    """Start worker processes on this machine.

    Args:
        workers: number of processes.
        gpus: names of the GPUs, for CUDA_VISIBLE_DEVICES, one for each worker in turn; if empty, workers run on cores.
        admission: see `DaskExecutor`.
        worker_timeout: see `DaskExecutor`.

    Raises:
        ClusterError: the workers do not start.
    """
    from dask import config as dask_config
    from distributed import Client, Nanny, SpecCluster

    _quiet()
    # Other users of this machine can connect to its loopback interface, but lack the certificates of this run.
    security = temporary_security()
    reachable = {"host": LOOPBACK, "protocol": "tls://", "security": security}
    claim = CoreClaim(private_scratch_folder())
    cores = [] if gpus else claim.take(workers)
    specs: dict[Any, Any] = {}
    for index in range(workers):
        if gpus:
            environment = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]}
            core = None
        else:
            environment = single_threaded_environment()
            core = cores[index]
        options = {
            "nthreads": 1,
            "env": environment,
            "preload": [worker_preload(core)],
            "memory_limit": 0,  # the plan sizes chunks to memory; Dask's limit would pause or kill workers
            "dashboard": False,
            "silence_logs": logging.CRITICAL,
            **reachable,
        }
        specs[index] = {"cls": Nanny, "options": options}
    options = {"port": 0, "dashboard": False, "dashboard_address": None, **reachable}
    scheduler = {"cls": scheduler_without_pages(), "options": options}
    cluster = None
    with contextlib.ExitStack() as stack:
        stack.callback(claim.release)
        stack.enter_context(dask_config.set(_local_settings()))
        stack.enter_context(_variables({} if gpus else BLAS_THREADS))
        try:
            with dask_config.set({"temporary-directory": private_scratch_folder()}):
                cluster = SpecCluster(
                    workers=specs,
                    scheduler=scheduler,
                    name=CLUSTER_NAME,
                    silence_logs=False,
                    security=security,
                )
            client = Client(cluster, timeout=CONNECT_SECONDS, set_as_default=False)
        except KeyboardInterrupt:
            _abandon(cluster)
            raise
        except (OSError, TimeoutError, RuntimeError, ValueError) as error:
            if cluster is not None:
                cluster.close()
            reason = describe(error)
            raise ClusterError(f"--workers {workers}: the workers did not start: {reason}") from error
        stack.callback(cluster.close)
        stack.callback(client.close)
        close = stack.pop_all().close
    return DaskExecutor(client, close, admission=admission, worker_timeout=worker_timeout)


def _local_settings() -> dict[str, Any]:
    """Dask's configuration while a local cluster runs: Dask's defaults and ours.

    Settings of the user for other clusters (a worker's lifetime, how processes start, limits of memory) could end or
    stall workers here. The nannies pass this configuration to their workers.
    """
    from dask import config as dask_config

    settings = {"distributed": copy.deepcopy(dask_config.merge(*dask_config.defaults)["distributed"])}
    with dask_config.set(_DASK_SETTINGS, config=settings):
        return copy.deepcopy(settings)


@contextlib.contextmanager
def _variables(needed: Mapping[str, str]) -> Iterator[None]:
    """In the block, this process has the environment variables that its workers need before their first import.

    Dask itself sets variables of this process when it starts a worker. At the end all are restored.
    """
    from dask import config as dask_config

    names = {*needed, *dask_config.get("distributed.nanny.pre-spawn-environ"), *_DASK_VARIABLES}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(needed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _abandon(cluster: Any) -> None:
    """Abandon a cluster that is still starting: its workers end with this process, and Dask's own shutdown would raise."""
    from distributed.deploy import spec

    for started in [made for made in spec.SpecCluster._instances if made.name == CLUSTER_NAME]:
        spec.SpecCluster._instances.discard(started)
    if cluster is not None:
        cluster.close(timeout=1)


def cluster_executor(
    cluster: str,
    security_file: Path | None = None,
    admission: Admission | None = None,
    worker_timeout: float | None = None,
) -> DaskExecutor:
    """The executor for `--cluster`: tls://HOST:PORT (or tcp://, ucx://), or slurm:FILE.toml.

    Raises:
        ValueError: a different form, a bad Slurm file, or bad certificates; ClusterError: it cannot be joined or started.
    """
    if cluster.startswith("slurm:"):
        path = Path(cluster.removeprefix("slurm:"))
        return slurm_executor(path, cluster_security(cluster, security_file), admission, worker_timeout)
    if "://" in cluster:
        return joined_executor(cluster, cluster_security(cluster, security_file), admission, worker_timeout)
    raise ValueError(
        f"--cluster {cluster}: expected tls://HOST:PORT or tcp://HOST:PORT of a Dask scheduler, or slurm:FILE.toml"
    )


def joined_executor(
    address: str,
    security: Security | None = None,
    admission: Admission | None = None,
    worker_timeout: float | None = None,
) -> DaskExecutor:
    """Use the workers of a scheduler that is already running, such as `tls://host:8786`.

    Raises:
        ClusterError: no scheduler answers at the address.
    """
    from distributed import Client

    _quiet()
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False, security=security)
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        how = "without TLS" if security is None else "with these certificates"
        raise ClusterError(
            f"--cluster {address}: no Dask scheduler answers there {how}: {describe(error)}"
        ) from None

    def close() -> None:
        client.close()

    return DaskExecutor(client, close, patient=True, admission=admission, worker_timeout=worker_timeout)


def slurm_executor(
    path: Path,
    security: Security | None = None,
    admission: Admission | None = None,
    worker_timeout: float | None = None,
) -> DaskExecutor:
    """Ask Slurm for workers. They join when their jobs start; there is no limit on the wait.

    Args:
        path: the Slurm file.
        security: certificates that the jobs can read; None: temporary ones.
        admission: see `DaskExecutor`.
        worker_timeout: see `DaskExecutor`.

    Raises:
        ValueError: a bad file; ClusterError: the scheduler does not start, or Slurm takes no job.
    """
    from distributed import Client

    _quiet()
    file = read_slurm_file(path)
    jobs = SlurmJobs(file)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(slurm_cluster(file, security, jobs))
        try:
            client = Client(cluster, timeout=CONNECT_SECONDS, set_as_default=False)
            stack.callback(client.close)
            cluster.scale(jobs=file.workers)
        except (OSError, TimeoutError, RuntimeError, ValueError) as error:
            raise ClusterError(f"--cluster slurm:{path}: {describe(error)}") from error
        news = jobs.wait_for_slurm()
        close = stack.pop_all().close
    return DaskExecutor(
        client,
        close,
        patient=True,
        admission=admission,
        worker_timeout=worker_timeout,
        about=jobs.known,
        news=news,
    )


def slurm_job_script(path: Path, security: Security | None = None) -> str:
    """The script that would be submitted, for `--dry-run`; no job is requested.

    Raises:
        ValueError: a bad file; ClusterError: an option's value is refused.
    """
    _quiet()
    with slurm_cluster(read_slurm_file(path), security) as cluster:
        return cluster.job_script()


@contextlib.contextmanager
def slurm_cluster(file: SlurmFile, security: Security | None, jobs: SlurmJobs | None = None) -> Iterator[Any]:
    """A scheduler without jobs yet; its end cancels the jobs and removes temporary certificates."""
    from dask import config as dask_config

    with contextlib.ExitStack() as stack:
        if security is None:
            try:
                security = stack.enter_context(temporary_security_in(file.shared_folder))
            except OSError as error:
                raise ClusterError(
                    f"--cluster slurm:{file.path}: [job] shared_temp_directory: {file.shared_folder} cannot be "
                    f"written: {error.strerror}; expected a folder that jobs can read, for temporary certificates"
                ) from None
        with dask_config.set({"temporary-directory": private_scratch_folder()}):
            cluster = make_slurm_cluster(file, security, jobs)
        stack.callback(cluster.close)
        yield cluster


def worker_preload(core: int | None) -> str:
    """Text of a Dask preload: leave Ctrl-C to the coordinator; serve no web pages; pin to a core if the system can.

    A worker class of our own would import JAX before the environment is set.
    """
    pin = f"if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {{{core}}})\n"
    return (
        "import os, signal, distributed\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "distributed.Worker.start_http_server = lambda worker, *arguments, **options: None\n"
        + ("" if core is None else pin)
    )


_DASK_VARIABLES = ("PYTHONHASHSEED", "__DASK_PARENT_PID")
"""Variables that a nanny sets in its process, besides those of its configuration."""
_DASK_SETTINGS = {
    "distributed.scheduler.allowed-failures": 0,  # the engine retries and isolates
    "distributed.scheduler.work-stealing": False,  # stealing would move chunks away from their compiled program
    "distributed.deploy.lost-worker-timeout": "30 days",  # a worker that dies often is still restarted
    "distributed.worker.daemon": True,
    "distributed.comm.timeouts.connect": f"{CONNECT_SECONDS:.0f}s",
    "distributed.admin.tick.limit": "1h",  # a coordinator that compiles blocks its event loop, which is normal
    # Dask monitors itself many times a second, on cores that the workers use.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.scheduler.active-memory-manager.start": False,
}


def _quiet() -> None:
    """Silence Dask's log lines, which are for its developers; our own lines report events for users."""
    import distributed  # noqa: F401 - the import sets levels for some of these loggers

    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


_LOGGERS = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")


@contextlib.contextmanager
def log_levels_kept() -> Iterator[None]:
    """Restore, at the end of the block, the levels of the loggers that a sweep silences."""
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
