"""What a run was: enough to know, later, which code made the numbers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.sweep.plan import Plan
from moejax.sweep.schema import StoreError

GIT_PLACES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
)
"""Variables by which git is told where a repository is."""
PACKAGES = ("moejax", "jax", "jaxlib", "numpy", "scipy", "distributed")


def package_version() -> str:
    """Version of moejax; "unknown" if it runs from a folder that was never installed."""
    return _version("moejax")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def float_precision() -> str:
    """ "float32" or "float64": JAX's setting in this process."""
    import jax

    return "float64" if jax.config.values["jax_enable_x64"] else "float32"


def collect_provenance(plan: Plan, spec_path: Path, overrides: Sequence[str], workers: str) -> dict[str, Any]:
    """Everything about a run that is known when it starts (devices and times come with its chunks)."""
    return {
        "spec_file": str(spec_path),
        "spec_text": plan.spec.places.text,  # as it was read: the file may be a pipe, or another one by now
        "overrides": list(overrides),
        "spec": plan.spec.to_json(),
        "plugins": [{"path": plugin.path, "source": plugin.source} for plugin in plan.plugins],
        "command": sys.argv,
        "git": git_state(Path(__file__).parent),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "precision": float_precision(),
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "workers": workers,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def check_resumable(previous: Sequence[dict[str, Any]], across_versions: bool, folder: Path) -> None:
    """Refuse to mix rows of two precisions, or (unless asked for) of two versions of the package.

    Raises:
        StoreError: one line with both values and what to do.
    """
    for run in previous:
        if run["precision"] != float_precision():
            raise StoreError(
                f"{folder}: holds {run['precision']} results and this run is {float_precision()}; "
                f"use --precision {run['precision']}, or another folder with --out"
            )
        version = run["versions"]["moejax"]
        if version != package_version() and not across_versions:
            raise StoreError(
                f"{folder}: holds results of moejax {version} and this is {package_version()}; "
                "use another folder with --out, or --across-versions to mix them"
            )


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds the package, and whether it was changed since; None without one.

    A repository counts only if it tracks the files of the folder: one that a virtual environment lies in, ignored, does not.

    Changes in results/ do not count: they are what `moejax reproduce` writes, and no number comes from them.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not _git(folder, "ls-files", "--", "."):
        return None
    sources = (":(top)", ":(top,exclude)results")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    # a hook of another repository is run with that repository named in the environment
    environment = {name: value for name, value in os.environ.items() if name not in GIT_PLACES}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None  # no git, or no checkout: the versions must do
    return done.stdout.strip()


def processor_name() -> str:
    """The CPU's own name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
