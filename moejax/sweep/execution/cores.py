"""Choice of the core that a worker is pinned to; cores of other sweeps of this user are skipped."""

from __future__ import annotations

import fcntl
import io
from pathlib import Path

from moejax.environment import available_cores


class CoreClaim:
    """Cores reserved for the workers of one sweep; the kernel releases them when the process ends in any way.

    Args:
        folder: folder of the locks, one file a core; all sweeps of this user share it.
    """

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self._held: list[io.TextIOWrapper] = []

    def take(self, workers: int) -> list[int | None]:
        """A different free core for each worker; None once there is no free one: the system then schedules the worker."""
        free: list[int | None] = []
        for core in available_cores():
            if len(free) < workers and self._lock(core):
                free.append(core)
        return free + [None] * (workers - len(free))

    def release(self) -> None:
        """Release all cores."""
        while self._held:
            self._held.pop().close()

    def _lock(self, core: int) -> bool:
        try:
            handle = open(self._folder / f"core-{core}", "a", encoding="utf-8")  # noqa: SIM115 - held until `release`
        except OSError:
            return False  # without locks, no worker is pinned
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            return False
        self._held.append(handle)
        return True
