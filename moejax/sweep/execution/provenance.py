"""What a run was: enough to know, later, which code made the numbers."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moejax
from moejax.environment import float_precision, git_state, processor_name
from moejax.sweep.execution.admission import numeric_settings, source_digest
from moejax.sweep.execution.admission import version as _version
from moejax.sweep.plan.plan import Plan
from moejax.sweep.store.schema import StoreError

COMPARED = {
    "moejax": "moejax",
    "source": "a moejax whose source has the digest",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "prng": "the random number generator",
}
"""Entries of `made_by`, in words."""
PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "distributed")


def collect_provenance(
    plan: Plan, overrides: Sequence[str], workers: str, xla_flags: str = ""
) -> dict[str, Any]:
    """Everything about a run that is known when it starts (devices and times come with its chunks); `workers` in words."""
    return {
        "spec_file": plan.spec.places.path,
        "spec_text": plan.spec.places.text,  # as it was read: the file may be a pipe, or another one by now
        "overrides": list(overrides),
        "spec": plan.spec.to_json(),
        "plugins": [
            {
                "path": plugin.path,
                "source": plugin.source,
                "helpers": {helper.name: helper.source for helper in plugin.helpers},
                "data_files": dict(plugin.data_files),
            }
            for plugin in plan.plugins
        ],
        "command": sys.argv,
        "git": git_state(Path(__file__).parent),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"moejax": moejax.__version__, "python": platform.python_version()},
        "source": made_by()["source"],
        "prng": made_by()["prng"],
        "precision": float_precision(),
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "workers": workers,
        "xla_flags": xla_flags,
    }


def check_resumable(previous: Sequence[dict[str, Any]], across_versions: bool, folder: Path) -> None:
    """Refuse to mix rows of two precisions, or (unless asked for) of two versions or sources of the package, or two of JAX.

    What an older moejax did not record is not compared.

    Raises:
        StoreError: one line with both values and what to do.
    """
    for run in previous:
        if run["precision"] != float_precision():
            raise StoreError(
                f"{folder}: holds {run['precision']} results and this run is {float_precision()}; "
                f"use --precision {run['precision']}, or another folder with --out"
            )
        check_same_code({**run, **run["versions"]}, across_versions, folder)


def made_by() -> dict[str, str]:
    """What makes the numbers besides the spec and the precision: moejax and its source, JAX, and its random numbers."""
    return {
        "moejax": moejax.__version__,  # as its source has it: an editable install may be of an older one
        "jax": _version("jax"),
        "jaxlib": _version("jaxlib"),
        "source": _source(),
        "prng": numeric_settings()["prng"],
    }


@functools.cache  # the code that runs is that of the start
def _source() -> str:
    return source_digest(Path(__file__).parents[2])


def check_same_code(then: Mapping[str, Any], across_versions: bool, place: Path) -> None:
    """Refuse to mix, unless asked for, what other code has made; what an older moejax did not record is not compared.

    Args:
        then: of `made_by`, when the results were made.
        across_versions: whether they may be mixed.
        place: where they are.

    Raises:
        StoreError: one line with both values and what to do.
    """
    if across_versions:
        return
    now = made_by()
    for name, what in COMPARED.items():
        old = then.get(name)
        if old is not None and old != now[name]:
            short = 12 if name == "source" else None
            raise StoreError(
                f"{place}: holds results of {what} {old[:short]} and this is {now[name][:short]}; "
                "use another folder with --out, or --across-versions to mix them"
            )
