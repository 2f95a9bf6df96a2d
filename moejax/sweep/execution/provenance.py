"""Provenance of a run: a record of the code that made the numbers."""

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
"""Names of the entries of `made_by` in messages."""
PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "distributed")


def collect_provenance(
    plan: Plan, overrides: Sequence[str], workers: str, xla_flags: str = ""
) -> dict[str, Any]:
    """All facts about a run that are known at its start (devices and times come with its chunks); `workers` is a description."""
    return {
        "spec_file": plan.spec.places.path,
        "spec_text": plan.spec.places.text,  # the text that was read: the file may be a pipe, or may have changed
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
    """Refuse to mix rows of two precisions or, unless requested, of two versions or sources of moejax or two versions of JAX.

    Entries that an older moejax did not record are not compared.

    Raises:
        StoreError: one line with both values and the remedy.
    """
    for run in previous:
        if run["precision"] != float_precision():
            raise StoreError(
                f"{folder}: holds {run['precision']} results and this run is {float_precision()}; "
                f"use --precision {run['precision']}, or another folder with --out"
            )
        check_same_code({**run, **run["versions"]}, across_versions, folder)


def made_by() -> dict[str, str]:
    """All that the numbers depend on besides spec and precision: moejax and its source, JAX, and its random numbers."""
    return {
        "moejax": moejax.__version__,  # from the source: the metadata of an editable install may be older
        "jax": _version("jax"),
        "jaxlib": _version("jaxlib"),
        "source": _source(),
        "prng": numeric_settings()["prng"],
    }


@functools.cache  # the running code is that of the start
def _source() -> str:
    return source_digest(Path(__file__).parents[2])


def check_same_code(then: Mapping[str, Any], across_versions: bool, place: Path) -> None:
    """Refuse to mix results of different code, unless requested. Entries that an older moejax did not record are not compared.

    Args:
        then: the result of `made_by` when the results were made.
        across_versions: if true, they may be mixed.
        place: the folder or file that holds them.

    Raises:
        StoreError: one line with both values and the remedy.
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


def check_mergeable(runs: Sequence[tuple[Path, Mapping[str, Any]]], across_versions: bool) -> None:
    """Refuse to merge results of two precisions or, unless requested, of different code. What was not recorded is not compared.

    Args:
        runs: folder and provenance of every run that committed a trial.
        across_versions: if true, results of different code may be merged.

    Raises:
        StoreError: one line with both values, both folders and the remedy.
    """
    first: dict[str, tuple[Path, str]] = {}
    for folder, run in runs:
        facts = {**run, **run["versions"]}
        for name, what in {"precision": "the precision", **COMPARED}.items():
            value = facts.get(name)
            if value is None or (across_versions and name != "precision"):
                continue
            other, known = first.setdefault(name, (folder, value))
            if value != known:
                short = 12 if name == "source" else None
                remedy = "" if name == "precision" else "; --across-versions merges them all the same"
                raise StoreError(
                    f"{folder}: holds results of {what} {value[:short]}, and {other} of {known[:short]}{remedy}"
                )
