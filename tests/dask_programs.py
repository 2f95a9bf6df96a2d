"""Programs of a Dask cluster on this machine, started as a user starts them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PAGES = ("--dashboard-address", "127.0.0.1:0")


@contextlib.contextmanager
def scheduler_and_workers(
    folder: Path,
    workers: int,
    *,
    scheduler: Sequence[str] = ("--host", "127.0.0.1", "--port", "0"),
    options: Mapping[str, Sequence[str]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A scheduler and single-threaded workers with nannies, which restart one that dies; yields the scheduler's address.

    Args:
        folder: of the logs.
        workers: how many.
        scheduler: options of the scheduler.
        options: more options of the "scheduler" and of each "worker".
        environment: of all of them.
    """
    file = folder / "scheduler.json"
    options = options or {}
    programs = [("scheduler", *scheduler), *[("worker", "--nthreads", "1")] * workers]
    started = []
    try:
        for number, (role, *own) in enumerate(programs):
            words = [sys.executable, "-m", "dask", role, "--scheduler-file", str(file), *own]
            with open(folder / f"{role}-{number}.log", "w") as log:
                started.append(
                    subprocess.Popen(
                        [*words, *options.get(role, ()), *PAGES],
                        env=environment,
                        cwd=folder,
                        stderr=log,
                        stdout=log,
                    )
                )
            deadline = time.monotonic() + 60.0
            while not file.exists():
                assert time.monotonic() < deadline, "the scheduler did not start"
                time.sleep(0.1)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
