"""The sums that a fit of a source has made so far, in a file from which the same fit continues after a kill."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checks import require
from moejax.files import write_whole

SAVE_SECONDS = 10.0
"""Time between two writes within a pass."""
_IDENTITY = "moejax fit"


class Checkpoint:
    """Named trees of arrays in one file; without a file, nothing is kept."""

    def __init__(self, file: Path | None, identity: dict[str, Any]):
        """Read the file if it is that of the same fit.

        Args:
            file: where; None for nowhere.
            identity: the source and the options of the fit; the checkpoint of another fit is replaced.

        Raises:
            ValueError: the file is no checkpoint.
        """
        self._file = file
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        self._kept: dict[str, np.ndarray] = {}
        self._written = time.monotonic()
        if file is not None and file.exists():
            self._kept = self._read(file)

    def _read(self, file: Path) -> dict[str, np.ndarray]:
        try:
            with np.load(file, allow_pickle=False) as stored:
                kept = {name: stored[name] for name in stored.files}
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            kept = {}
        require(_IDENTITY in kept, "checkpoint", "the file of an earlier fit, or a new one", str(file))
        return kept if str(kept.pop(_IDENTITY)) == self._identity else {}

    @property
    def resumed(self) -> bool:
        """True if it holds anything."""
        return bool(self._kept)

    def get(self, name: str, like: Any) -> Any:
        """The tree under a name, with the structure of `like`; None if there is none."""
        structure = jax.tree.structure(like)
        names = [f"{name}/{leaf}" for leaf in range(structure.num_leaves)]
        if not all(leaf in self._kept for leaf in names):
            return None
        return jax.tree.unflatten(structure, [self._kept[leaf] for leaf in names])

    def put(self, name: str, tree: Any, *, at_once: bool) -> None:
        """Keep a tree under a name; it is written at once, or within SAVE_SECONDS of the last write."""
        self.drop(name)
        for leaf, value in enumerate(jax.tree.leaves(tree)):
            self._kept[f"{name}/{leaf}"] = np.asarray(value)
        if at_once or time.monotonic() - self._written > SAVE_SECONDS:
            self.write()

    def drop(self, name: str) -> None:
        """Forget the tree under a name."""
        for leaf in [key for key in self._kept if key.startswith(f"{name}/")]:
            del self._kept[leaf]

    def write(self) -> None:
        """Write everything to the file, whole or not at all."""
        if self._file is None:
            return

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **{_IDENTITY: np.asarray(self._identity)} | self._kept)

        write_whole(self._file, save)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the fit has ended."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
