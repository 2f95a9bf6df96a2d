"""Workers as Slurm jobs, by dask-jobqueue: the user's file has the options of a job; we add those that a worker needs.

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
import os
import shlex
import signal
import subprocess
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.checks import describe
from moejax.console import print_error
from moejax.environment import single_threaded_environment
from moejax.registry import nearest
from moejax.sweep.execution.executors import ClusterError
from moejax.sweep.spec.fields import show

if TYPE_CHECKING:
    from distributed import Security

KEYS = ("workers", "job")
SUBMIT_SECONDS = 120.0
"""Time limit for sbatch; a busy Slurm may take long."""
SQUEUE_SECONDS = 20.0
GONE_SECONDS = 60.0
"""If squeue does not answer, jobs count as ended after this time without a worker; a nanny restarts one much sooner."""
OURS = {
    "cores": "is set here to one single-threaded worker",
    "processes": "is set here to one single-threaded worker",
    "nanny": "is set here to one single-threaded worker",
    "security": "is set by --security FILE, or to temporary certificates",
    "protocol": "is set here to tls://",
}
"""Options that the user may not set, with the reasons."""
WORKER_EXPORTS = (
    # A worker that Dask pauses near the memory limit keeps its chunks for ever; Slurm ends jobs that use too much.
    "export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False",
    "export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False",
    "export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=False",
    "export DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE=False",
    "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'",  # a worker's web pages have no authentication
    # By default, all users of a node share Dask's scratch folder, which comes first in a worker's import path.
    'scratch="${TMPDIR:-/tmp}/moejax-$(id -u)"; mkdir -m 700 "$scratch" 2>/dev/null; '
    '{ [ -O "$scratch" ] && [ ! -L "$scratch" ]; } || scratch="$(mktemp -d)"; '
    'export DASK_TEMPORARY_DIRECTORY="$scratch"',
)


@dataclasses.dataclass(frozen=True)
class SlurmFile:
    """A checked Slurm file."""

    path: Path
    workers: int
    options: dict[str, Any]

    @property
    def shared_folder(self) -> Path:
        """The folder in which jobs can read temporary certificates: the one of Dask's configuration, or the current one."""
        from dask import config as dask_config

        name = self.options.get("config_name") or "slurm"
        given = self.options.get("shared_temp_directory")
        given = given or dask_config.get(f"jobqueue.{name}.shared-temp-directory", None)
        return Path(os.path.expanduser(os.path.expandvars(str(given)))) if given else Path.cwd()


def read_slurm_file(path: Path) -> SlurmFile:
    """Read and check a Slurm file.

    Raises:
        ValueError: one line with the file, the key, the value and the accepted values.
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
    if not isinstance(options.get("scheduler_options", {}), dict):
        raise ValueError(f"{path}: [job] scheduler_options: expected a table")
    known = _known_options(path)
    for key in options:
        if key in OURS:
            raise ValueError(f"{path}: [job] {key}: {OURS[key]}; leave it out")
        if key not in known:
            raise ValueError(f"{path}: [job] {key}: unknown option of dask_jobqueue; {nearest(key, known)}")
    return SlurmFile(path, workers, options)


def make_slurm_cluster(file: SlurmFile, security: Security, jobs: SlurmJobs | None = None) -> Any:
    """A dask_jobqueue.SLURMCluster that has not requested jobs; `.job_script()` returns the script that it submits.

    Args:
        file: the checked Slurm file.
        security: certificates in files that the jobs can read.
        jobs: records whether Slurm accepts each job.

    Raises:
        ClusterError: the scheduler cannot be started, or an option's value is refused.
    """
    _import_dask_jobqueue()
    from dask_jobqueue.slurm import SLURMCluster

    where = f"--cluster slurm:{file.path}"
    for name, value in security.get_tls_config_for_role("worker").items():
        if name != "ciphers" and shlex.quote(value) != value:
            raise ClusterError(
                f"{where}: {value}: a job script cannot name this file: expected a path without spaces and quotes "
                "(of temporary certificates: [job] shared_temp_directory)"
            )
    exports = [f"export {name}='{value}'" for name, value in single_threaded_environment().items()]
    given = file.options.get("scheduler_options", {})
    options: dict[str, Any] = {"memory": "4GB", **file.options}
    if given.get("dashboard_address") is None:
        options["scheduler_options"] = {**given, "dashboard": False, "dashboard_address": None}
        options.setdefault("scheduler_cls", scheduler_without_pages())
    options["job_script_prologue"] = [*options.get("job_script_prologue", []), *exports, *WORKER_EXPORTS]
    try:
        options["job_cls"] = _recorded_job(jobs or SlurmJobs(file))
        return SLURMCluster(cores=1, processes=1, nanny=True, security=security, **options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ClusterError(f"{where}: {describe(error)}") from error


class SlurmJobs:
    """The requested jobs, and their states in Slurm."""

    def __init__(self, file: SlurmFile):
        self._where = f"--cluster slurm:{file.path}"
        self._wanted = file.workers
        self.accepted: list[str] = []
        """Numbers of the accepted jobs."""
        self.refusals: list[str] = []

    def wait_for_slurm(self) -> list[str]:
        """Wait until each job is accepted or refused; returns lines to report.

        Raises:
            ClusterError: none is accepted.
        """
        deadline = time.monotonic() + SUBMIT_SECONDS
        while len(self.accepted) + len(self.refusals) < self._wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self.refusals:
            return []
        if not self.accepted:
            raise ClusterError(f"{self._where}: Slurm takes no job: {self.refusals[0]}")
        return [
            f"{self._where}: Slurm takes {len(self.accepted)} of {self._wanted} jobs: {self.refusals[0]}; "
            "the sweep runs on those"
        ]

    def known(self, came: int, waited: float) -> str:
        """The current state of the jobs, for a line.

        Args:
            came: workers that have joined so far.
            waited: seconds without a worker.

        Raises:
            ClusterError: no job is left that could bring a worker.
        """
        states = self._states()
        if states is None:
            if came >= len(self.accepted) > 0 and waited > GONE_SECONDS:
                raise self._all_ended()
            return f"{len(self.accepted)} jobs were asked for, and squeue cannot be asked about them"
        if not states and self.accepted:
            raise self._all_ended()
        counts = Counter(states)
        return "Slurm's jobs: " + ", ".join(f"{count} {state}" for state, count in counts.most_common(4))

    def _all_ended(self) -> ClusterError:
        return ClusterError(
            f"{self._where}: all {len(self.accepted)} jobs have ended; what is done is kept, and the same command "
            "asks for new ones"
        )

    def _states(self) -> list[str] | None:
        """State and reason of each of our jobs that has not ended; None if squeue does not answer."""
        command = ["squeue", "--noheader", "--format=%A %T (%r)", f"--user={os.getuid()}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        rows = [line.strip().partition(" ") for line in done.stdout.splitlines()]
        return [state for number, _, state in rows if number in self.accepted]


def _recorded_job(jobs: SlurmJobs) -> type:
    """A job of dask_jobqueue that records in `jobs` whether Slurm accepts it, and can be closed if it does not."""
    from dask_jobqueue.slurm import SLURMJob
    from distributed.core import Status

    class RecordedJob(SLURMJob):
        async def start(self) -> None:
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:
                self.status = Status.failed
                jobs.refusals.append(_words_of(error, self.submit_command))
                raise
            if self.job_id is not None:
                jobs.accepted.append(self.job_id)

        async def close(self) -> None:
            try:
                await super().close()
            except OSError as error:
                print_error(f"job {self.job_id} cannot be cancelled: {_words_of(error, self.cancel_command)}")
            self.status = Status.closed

    return RecordedJob


def _words_of(error: Exception, command: str) -> str:
    """The reason why a program of Slurm failed, on one line."""
    if isinstance(error, FileNotFoundError):
        return f"there is no {command.split(maxsplit=1)[0]} in PATH"
    message = str(error).partition("stderr:\n")[2] or describe(
        error
    )  # dask_jobqueue's message has this heading
    return " ".join(message.split())[:300]


def scheduler_without_pages() -> type:
    """Dask's scheduler without its web server, which has no authentication."""
    from distributed import Scheduler

    class SchedulerWithoutPages(Scheduler):
        def start_http_server(self, *arguments: Any, **options: Any) -> None:
            """Serve no pages: the only open port of this scheduler is the one with TLS."""

    return SchedulerWithoutPages


def _import_dask_jobqueue() -> None:
    """Import the package, and keep the present handler of Ctrl-C.

    dask-jobqueue 0.9.0 replaces the handler of SIGINT by one that ends the program silently, with status 0.
    """
    before = signal.getsignal(signal.SIGINT)
    import dask_jobqueue  # noqa: F401

    if before is not None and signal.getsignal(signal.SIGINT) is not before:
        signal.signal(signal.SIGINT, before)


def _known_options(path: Path) -> list[str]:
    """Options of a job, from dask_jobqueue's own signatures."""
    try:
        _import_dask_jobqueue()
        from dask_jobqueue.core import Job, JobQueueCluster
        from dask_jobqueue.slurm import SLURMJob
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
