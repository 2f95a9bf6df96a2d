"""The coordinator, its queue, and the processes that run the chunks."""

__all__ = [
    "admission",
    "certificates",
    "coordinator",
    "cores",
    "dask_cluster",
    "dask_executor",
    "engine",
    "executors",
    "location",
    "pilot",
    "provenance",
    "security",
    "signals",
    "slurm",
    "work_queue",
    "worker",
]
