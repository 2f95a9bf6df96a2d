"""The place of a sweep: this process, workers of this machine, or a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moejax.environment import (
    available_cores,
    gpu_memory_bytes,
    memory_bytes,
    require_devices,
    single_threaded_environment,
    visible_gpus,
)
from moejax.sweep.execution.executors import Executor, InProcessExecutor, Workers
from moejax.sweep.plan.chunks import WorkerSettings
from moejax.sweep.plan.plugins import Plugin

ACCELERATOR_VMAP_WIDTH = 64
"""Trials side by side on a GPU or TPU if memory suffices; on a CPU one at a time is fastest."""


class Place:
    """The place where a sweep runs: this process, worker processes of this machine, or a cluster."""

    def __init__(
        self,
        workers: int | None,
        cluster: str | None = None,
        security: Path | None = None,
        worker_timeout: float | None = None,
    ):
        if workers is not None and workers < 1:
            raise ValueError(f"--workers {workers}: expected a number of at least 1")
        if worker_timeout is not None and not worker_timeout > 0:
            raise ValueError(f"--worker-timeout {worker_timeout}: expected a number of seconds above 0")
        self._cluster = cluster
        self._security = None if security is None else Path(security)
        self._worker_timeout = worker_timeout
        self._gpus: tuple[str, ...] = ()
        self.accelerated = False
        self.workers = workers or 0

    def prepare(self, own_process: OwnProcess | None = None) -> None:
        """Choose the workers.

        Args:
            own_process: called to change settings of this process before JAX starts its backend here.
        """
        import jax

        from moejax.sweep.execution.security import cluster_security

        platforms = jax.config.values["jax_platforms"] or os.environ.get("JAX_PLATFORMS", "")
        on_cpu = platforms == "cpu"
        self._gpus = () if on_cpu or "tpu" in platforms else visible_gpus()
        self.accelerated = bool(self._gpus) or "tpu" in platforms
        if self._cluster is not None:
            if self.workers:
                raise ValueError("--workers: the cluster has its own; leave --workers out with --cluster")
            cluster_security(self._cluster, self._security)  # bad certificates are an error in a dry run too
            self.workers = 1
        elif self._security is not None:
            raise ValueError(
                f"--security {self._security}: goes with --cluster; workers of this machine have certificates of their own"
            )
        elif not self.workers:
            self.workers = 1 if "tpu" in platforms else len(self._gpus) or len(available_cores())
        if own_process is not None:
            own_process(self)
        if platforms and not (self.accelerated and self.has_processes):
            require_devices()  # on a platform that does not exist every trial would fail

    @property
    def has_processes(self) -> bool:
        """True if trials run in other processes than this one."""
        return self.workers > 1 or self._cluster is not None

    def limits(self, vmap_width: int | None = None) -> dict[str, Any]:
        """Options of `make_plan` and `join_plans`: the widths and sizes of programs that a worker can run."""
        width = vmap_width or (ACCELERATOR_VMAP_WIDTH if self.accelerated else 1)
        return {"vmap_width": width, "worker_memory_bytes": self.memory_bytes}

    @property
    def memory_bytes(self) -> int | None:
        """Memory for each worker: its share of this machine's, or its GPU's; None if not known, as for TPUs and clusters."""
        if self._cluster is not None:
            return None
        if self.accelerated:
            return gpu_memory_bytes() if self._gpus else None
        total = memory_bytes()
        return None if total is None else total // max(self.workers, 1)

    @property
    def description(self) -> str:
        """The place in words: the cluster, or the number of workers."""
        if self._cluster is not None:
            return self._cluster
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}"

    def job_script(self) -> str | None:
        """The script that Slurm would get; None without Slurm."""
        if self._cluster is None or not self._cluster.startswith("slurm:"):
            return None
        from moejax.sweep.execution.dask_cluster import slurm_job_script
        from moejax.sweep.execution.security import cluster_security

        path = Path(self._cluster.removeprefix("slurm:"))
        return slurm_job_script(path, cluster_security(self._cluster, self._security))

    def start_workers(self, chunks: int, settings: WorkerSettings) -> Workers:
        """The workers, at most as many as chunks; those of this machine start when they are needed."""
        from moejax.sweep.execution import dask_cluster
        from moejax.sweep.execution.dask_executor import Admission
        from moejax.sweep.execution.security import unencrypted_warning

        flags = os.environ.get("XLA_FLAGS", "")
        cluster, workers, timeout = self._cluster, min(self.workers, chunks), self._worker_timeout
        if cluster is not None:

            def start() -> Executor:
                admission = Admission.of(settings)
                return dask_cluster.cluster_executor(cluster, self._security, admission, timeout)

            return Workers(start, self.description, flags, True, unencrypted_warning(cluster))
        if workers == 1:
            return Workers(InProcessExecutor, self.description, flags)
        if not self._gpus:
            flags = single_threaded_environment()["XLA_FLAGS"]
        return Workers(
            lambda: dask_cluster.local_executor(workers, self._gpus, Admission.of(settings), timeout),
            self.description,
            flags,
        )


OwnProcess = Callable[[Place], None]


def worker_settings(plugins: Sequence[Plugin] = ()) -> WorkerSettings:
    """Settings for all workers: this process's precision and cache, and plugins."""
    import jax

    return WorkerSettings(
        enable_x64=bool(jax.config.values["jax_enable_x64"]),
        compilation_cache_dir=jax.config.values["jax_compilation_cache_dir"],
        plugins=tuple(plugins),
    )
