"""The place of a sweep: this process, workers of this machine, or a cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from moejax.environment import (
    available_cores,
    gpu_memory_bytes,
    memory_bytes,
    pin_random_numbers,
    require_devices,
    use_single_thread,
    visible_gpus,
)
from moejax.sweep.execution.executors import Executor, InProcessExecutor
from moejax.sweep.plan.chunks import WorkerSettings
from moejax.sweep.plan.plan import Plan

ACCELERATOR_VMAP_WIDTH = 64
"""Trials side by side on a GPU or TPU, memory permitting; on a CPU one at a time is fastest."""


class Place:
    """Where a sweep runs: this process, worker processes here, or a cluster."""

    def __init__(
        self,
        workers: int | None,
        cluster: str | None,
        dry_run: bool,
        security: Path | None = None,
        worker_timeout: float | None = None,
    ):
        self._cluster = cluster
        self._security = None if security is None else Path(security)
        self._dry_run = dry_run
        self._worker_timeout = worker_timeout
        self._gpus: tuple[str, ...] = ()
        self.accelerated = False
        self.workers = workers or 0

    def prepare(self) -> None:
        """Decide on workers; set XLA's threads, which must happen before JAX starts its backend."""
        import jax

        from moejax.sweep.execution.security import cluster_security

        pin_random_numbers()
        platforms = jax.config.values["jax_platforms"] or os.environ.get("JAX_PLATFORMS", "")
        on_cpu = platforms == "cpu"
        self._gpus = () if on_cpu or "tpu" in platforms else visible_gpus()
        self.accelerated = bool(self._gpus) or "tpu" in platforms
        if self._cluster is not None:
            if self.workers:
                raise ValueError("--workers: the cluster has its own; leave --workers out with --cluster")
            cluster_security(self._cluster, self._security)  # bad certificates end a dry run too
            self.workers = 1
        elif self._security is not None:
            raise ValueError(
                f"--security {self._security}: goes with --cluster; workers of this machine have certificates of their own"
            )
        elif not self.workers:
            self.workers = 1 if "tpu" in platforms else len(self._gpus) or len(available_cores())
        if not self.accelerated:
            use_single_thread()
        if self.accelerated and (self.workers > 1 or self._cluster is not None):
            jax.config.update("jax_platforms", "cpu")  # the devices are the workers', not the coordinator's
        elif platforms:
            require_devices()  # a platform that was asked for and is not there would fail every trial

    @property
    def memory_bytes(self) -> int | None:
        """Memory for each worker: of this machine, or of its GPU; not known for TPUs and clusters."""
        if self._cluster is not None:
            return None
        if self.accelerated:
            return gpu_memory_bytes() if self._gpus else None
        total = memory_bytes()
        return None if total is None else total // max(self.workers, 1)

    @property
    def description(self) -> str:
        if self._cluster is not None:
            return self._cluster
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}"

    @property
    def warning(self) -> str | None:
        """A line that the user should see, if the cluster is joined without TLS."""
        from moejax.sweep.execution.security import unencrypted_warning

        return None if self._cluster is None else unencrypted_warning(self._cluster)

    def job_script(self) -> str | None:
        """What Slurm would be given; None without Slurm."""
        if self._cluster is None or not self._cluster.startswith("slurm:"):
            return None
        from moejax.sweep.execution.dask_cluster import slurm_job_script
        from moejax.sweep.execution.security import cluster_security

        security = cluster_security(self._cluster, self._security)
        return slurm_job_script(Path(self._cluster.removeprefix("slurm:")), security)

    def executor_factory(
        self, chunks: int, settings: WorkerSettings, held: contextlib.ExitStack | None = None
    ) -> Callable[[], Executor]:
        """How to start workers, no more than chunks.

        A cluster is joined at once, and left when `held` is closed: a wrong address changes nothing on disk.
        """
        from moejax.sweep.execution import dask_cluster as cluster
        from moejax.sweep.execution.dask_executor import Admission

        if self._cluster is not None:
            admission = Admission.of(settings)
            joined = cluster.cluster_executor(self._cluster, self._security, admission, self._worker_timeout)
            if held is not None:
                held.callback(joined.close)
            return lambda: joined
        workers = min(self.workers, chunks)
        if workers == 1:
            return InProcessExecutor
        return lambda: cluster.local_executor(
            workers, self._gpus, Admission.of(settings), self._worker_timeout
        )


def worker_settings(plan: Plan) -> WorkerSettings:
    """What the workers of a plan need: this process's precision and cache, the plan's plugins."""
    import jax

    return WorkerSettings(
        enable_x64=bool(jax.config.values["jax_enable_x64"]),
        compilation_cache_dir=jax.config.values["jax_compilation_cache_dir"],
        plugins=plan.plugins,
    )
