"""Workers as Slurm jobs, by dask-jobqueue: the file says what a job asks for, we add what a worker needs.

workers = 64                     # jobs; each is one worker on one device
[job]                            # options of dask_jobqueue.SLURMCluster
queue = "short"
account = "stat"
memory = "4GB"
walltime = "02:00:00"
job_extra_directives = ["--gpus=1"]                  # for GPU workers
job_script_prologue = ["module load python", "source ~/venv/bin/activate"]
"""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from pathlib import Path
from typing import Any

from moejax.sweep.executors import ClusterError, describe, single_threaded_environment
from moejax.sweep.fields import nearest, show

KEYS = ("workers", "job")
OURS = ("cores", "processes", "nanny")
"""Options that follow from one single-threaded worker per job."""


@dataclasses.dataclass(frozen=True)
class SlurmFile:
    """A checked Slurm file."""

    path: Path
    workers: int
    options: dict[str, Any]


def read_slurm_file(path: Path) -> SlurmFile:
    """Read and check a Slurm file.

    Raises:
        ValueError: one line with the file, the key, the value and what is accepted.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--cluster slurm:{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--cluster slurm:{path}: not valid TOML: {error}") from None
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path}: {key}: unknown key; {nearest(key, KEYS)}")
    workers, options = content.get("workers"), content.get("job", {})
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(
            f"{path}: workers: {show(workers)} is not accepted: expected a whole number of at least 1"
        )
    if not isinstance(options, dict):
        raise ValueError(f"{path}: job: expected a table, [job]")
    known = _known_options(path)
    for key in options:
        if key in OURS:
            raise ValueError(f"{path}: [job] {key}: is set here to one single-threaded worker; leave it out")
        if key not in known:
            raise ValueError(f"{path}: [job] {key}: unknown option of dask_jobqueue; {nearest(key, known)}")
    return SlurmFile(path, workers, options)


def make_slurm_cluster(file: SlurmFile) -> Any:
    """A dask_jobqueue.SLURMCluster that has not asked for jobs; `.job_script()` shows what it submits.

    Raises:
        ClusterError: the scheduler cannot be started, or an option's value is refused.
    """
    from dask_jobqueue import SLURMCluster  # pyright: ignore[reportMissingImports] - an extra

    exports = [f"export {name}='{value}'" for name, value in single_threaded_environment().items()]
    options = {"memory": "4GB", "scheduler_options": {"dashboard_address": ":0"}, **file.options}
    options["job_script_prologue"] = [*options.get("job_script_prologue", []), *exports]
    try:
        return SLURMCluster(cores=1, processes=1, nanny=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ClusterError(f"--cluster slurm:{file.path}: {describe(error)}") from error


def _known_options(path: Path) -> list[str]:
    """Options of a job, from dask_jobqueue's own signatures."""
    try:
        from dask_jobqueue.core import Job, JobQueueCluster  # pyright: ignore[reportMissingImports]
        from dask_jobqueue.slurm import SLURMJob  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"--cluster slurm:{path}: needs dask-jobqueue: install the extra, pip install 'moejax[slurm]'"
        ) from None
    names: dict[str, None] = {}
    for function in (SLURMJob.__init__, Job.__init__, JobQueueCluster.__init__):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and name != "self":
                names[name] = None
    return list(names)
