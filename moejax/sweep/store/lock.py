"""The lock of a run folder: one coordinator at a time."""

from __future__ import annotations

import fcntl
import io
import os
import time
from pathlib import Path

from moejax.sweep.store.schema import StoreError

LOCK_NAME = "lock"
LOCK_TRIES, LOCK_PAUSE_SECONDS = 5, 0.05


def lock_folder(folder: Path) -> io.TextIOWrapper:
    """Lock a run folder for one coordinator; the kernel releases it when the process ends in any way.

    Raises:
        StoreError: another coordinator holds it, or the folder cannot be written.
    """
    try:
        handle = open(folder / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 - held until the store is closed
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with --out"
        ) from None
    try:
        _try_lock(handle)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        raise StoreError(
            f"{folder}: a sweep is already running here ({holder}); wait for it, or end it"
        ) from None
    except OSError as error:
        handle.close()
        raise StoreError(
            f"{folder}: this file system has no file locks ({error.strerror}); use --out"
        ) from None
    return handle


def sign_lock(handle: io.TextIOWrapper) -> None:
    """Write the holder of a folder into its lock file."""
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    handle.flush()


def _try_lock(handle: io.TextIOWrapper) -> None:
    """Take the lock; if a `moejax status` reads at this moment, wait for it."""
    for _ in range(LOCK_TRIES):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_SECONDS)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_running(folder: Path) -> bool:
    """True if a coordinator holds the folder now; it changes nothing."""
    try:
        with open(folder / LOCK_NAME, encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # never locked, or locks are not supported: no run is known
    return False
