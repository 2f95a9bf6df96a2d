"""Where moejax keeps what it can make or fetch again: compiled programs and downloaded data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """MOEJAX_CACHE_DIR, or `moejax` in the user's cache folder; None, and nothing is kept, where it is set to nothing."""
    chosen = os.environ.get("MOEJAX_CACHE_DIR")
    if chosen == "":
        return None
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moejax"
