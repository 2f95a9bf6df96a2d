"""Where moejax keeps what it can make or fetch again: compiled programs and downloaded data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """MOEJAX_CACHE_DIR, or `moejax` in the user's cache folder.

    None, and nothing is kept, if MOEJAX_CACHE_DIR is set to nothing, if the user has no home folder, or if the folder is not
    there and cannot be made.
    """
    folder = _chosen_folder()
    return None if folder is None or (_obstacle(folder) and not folder.is_dir()) else folder


def why_no_cache() -> str:
    """Why nothing new can be kept although nobody asked for that; empty if all is well."""
    if os.environ.get("MOEJAX_CACHE_DIR") == "":
        return ""
    folder = _chosen_folder()
    return "there is no home folder" if folder is None else _obstacle(folder)


def _chosen_folder() -> Path | None:
    chosen = os.environ.get("MOEJAX_CACHE_DIR")
    if chosen == "":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moejax"
    except RuntimeError:  # pathlib's word for a user without a home
        return None


def _obstacle(folder: Path) -> str:
    """Why the folder cannot be made or written, by the first of its parents that exists; empty if it can."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, StopIteration) as error:
        return f"{folder} cannot be used ({getattr(error, 'strerror', None) or 'no such folder'})"
    if not there.is_dir():
        return f"{folder} cannot be used ({there} is not a folder)"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"
