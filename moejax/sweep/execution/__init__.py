"""The coordinator, its queue, and the processes that run the chunks."""

__all__ = [
    "admission",
    "certificates",
    "cores",
    "dask_cluster",
    "dask_executor",
    "engine",
    "executors",
    "joint",
    "location",
    "pilot",
    "provenance",
    "security",
    "signals",
    "slurm",
    "work_queue",
    "worker",
]
