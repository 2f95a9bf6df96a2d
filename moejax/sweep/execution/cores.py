"""Which core a worker is pinned to: none that another sweep of this user has taken."""

from __future__ import annotations

import fcntl
import io
from pathlib import Path

from moejax.environment import available_cores


class CoreClaim:
    """Cores held for the workers of one sweep; the kernel lets go of them when the process ends, however it ends.

    Args:
        folder: of the locks, one file a core: a folder that all sweeps of this user share.
    """

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self._held: list[io.TextIOWrapper] = []

    def take(self, workers: int) -> list[int | None]:
        """A core for each worker, different ones while there are free ones; None: the system may move it about."""
        free: list[int | None] = []
        for core in available_cores():
            if len(free) < workers and self._lock(core):
                free.append(core)
        return free + [None] * (workers - len(free))

    def release(self) -> None:
        """Leave all of them to others."""
        while self._held:
            self._held.pop().close()

    def _lock(self, core: int) -> bool:
        try:
            handle = open(self._folder / f"core-{core}", "a", encoding="utf-8")  # noqa: SIM115 - held until `release`
        except OSError:
            return False  # without a lock, nobody is pinned
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            return False
        self._held.append(handle)
        return True
