"""A folder of results: table.csv, and files made from it: figure.png, figure.pdf, claims.json, manifest.json."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.pictures import own_style, save_picture
from moejax.reproduce.experiment import ExperimentFile
from moejax.sweep.execution.admission import version
from moejax.sweep.spec.overrides import override_texts

if TYPE_CHECKING:
    import pandas as pd

MANIFEST_NAME = "manifest.json"
PACKAGES = ("moejax", "jax", "jaxlib", "numpy", "scipy", "pandas", "matplotlib", "scikit-learn", "optax")
SIGNIFICANT_DIGITS = 7
"""Digits of numbers in table.csv: the precision of float32."""


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """The record of how the rows of an experiment were made."""

    spec_json: str
    runs: list[dict[str, Any]]
    """Commit, dirty flag, trials and XLA's flags of every run that contributed rows."""
    started: float
    wall_seconds: float
    worker_seconds: float
    compile_seconds: float
    compilations: int
    precision: str
    workers: str


def write_results(
    experiment: ExperimentFile,
    table: pd.DataFrame,
    facts: RunFacts,
    folder: Path,
    *,
    command: str,
    quick: bool,
    root: Path,
) -> None:
    """Write a folder of results: table.csv first; all other files are made from the table as read from it.

    `command` reproduces the results; the manifest's paths are relative to `root`.
    """
    from moejax.reproduce.claims import SUMMARY_NAME, TABLE_NAME, claims_json, read_results, render

    folder.mkdir(parents=True, exist_ok=True)
    write_table(table, folder / TABLE_NAME)
    table = read_results(folder)[TABLE_NAME]
    summary = experiment.declared.summary
    if summary is not None:
        write_table(summary(table), folder / SUMMARY_NAME)
    with own_style():
        save_figure(experiment.declared.figure(table), folder)
    sentence, claims = render(experiment.declared.shows, experiment.declared.numbers, read_results(folder))
    _write_json(folder / "claims.json", claims_json(sentence, claims))
    made = {
        "name": experiment.name,
        "command": command,
        "quick": quick,
        "spec_file": _relative(experiment.spec_path, root),
    }
    _write_json(folder / MANIFEST_NAME, made | _manifest(experiment, table, facts))


def rows_that_raised(table: pd.DataFrame) -> tuple[str, bool]:
    """How many rows of a table hold an error instead of a result, with the commonest ("" if none does); and whether all do."""
    from moejax.sweep.plan.chunks import RAISED, WORKER_DIED

    if "status" not in table:
        return "", False
    raised = table.loc[table["status"].isin([RAISED, WORKER_DIED]), "reason"]
    if raised.empty:
        return "", False
    words = f"{len(raised):,} of {len(table):,} rows failed, most often: {raised.value_counts().index[0]}"
    return words, len(raised) == len(table)


def _manifest(experiment: ExperimentFile, table: pd.DataFrame, facts: RunFacts) -> dict[str, Any]:
    from moejax.environment import git_state, processor_name

    text = experiment.spec_path.read_text(encoding="utf-8")
    reasons = table.loc[table["status"] != 0, "reason"] if "status" in table else None
    failed = 0 if reasons is None else len(reasons)
    counted = {} if reasons is None else {str(k): int(v) for k, v in reasons.value_counts().items()}
    started = datetime.datetime.fromtimestamp(facts.started, datetime.UTC)
    return {
        "spec_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "spec_text": text,
        "overrides": list(override_texts(experiment.overrides)),
        "spec": json.loads(facts.spec_json),
        "git": git_state(Path(__file__).parent),
        "runs": facts.runs,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "precision": facts.precision,
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "workers": facts.workers,
        "rows": len(table),
        "not_ok": failed,
        "not_ok_reasons": counted,
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": round(facts.wall_seconds, 1),
        "worker_seconds": round(facts.worker_seconds, 1),
        "compile_seconds": round(facts.compile_seconds, 1),
        "compilations": facts.compilations,
    }


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A CSV with seven significant digits; lists as text."""
    for name in table:
        if table[name].map(lambda value: isinstance(value, tuple | list)).any():
            table = table.assign(
                **{
                    str(name): table[name].map(
                        lambda v: json.dumps(list(v)) if isinstance(v, tuple | list) else v
                    )
                }
            )
    table.to_csv(path, index=False, float_format=f"%.{SIGNIFICANT_DIGITS}g")


def save_figure(figure: Any, folder: Path) -> None:
    """Write figure.png and figure.pdf; equal figures give equal bytes.

    Raises:
        ValueError: `figure` is no matplotlib Figure.
    """
    from matplotlib.figure import Figure

    if not isinstance(figure, Figure):
        raise ValueError(f"figure: expected a matplotlib Figure, got {type(figure).__name__}")
    for name in ("figure.png", "figure.pdf"):
        save_picture(figure, folder / name)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a results folder; None if there is none."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(
        json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def _relative(path: Path, root: Path) -> str:
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
