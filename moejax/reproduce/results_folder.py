"""A folder of results: table.csv, and files made from it: figure.png, figure.pdf, claims.json, manifest.json, the gallery."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Sequence
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
PLACEHOLDER = re.compile(r"\{([a-z-]+/\w+)\}")
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


def write_gallery(folder: Path, experiments: Sequence[ExperimentFile], opening: Path | None = None) -> None:
    """Write README.md of a results folder: under its heading, every figure with its question, a finding and its limits.

    Args:
        folder: the results.
        experiments: all experiments; those without results are left out.
        opening: a Markdown file for the beginning; {NAME/NUMBER} in it is a number of the claims of an experiment, and a paragraph
            with a number that is missing is left out.
    """
    lines = [
        "# Results",
        "",
        "`moejax reproduce` makes this page and its figures. A number of the text is followed by its Monte Carlo standard error,",
        "if it has one. It comes from the table under it, and `claims.json` names the rows.",
        "",
    ]
    if opening is not None and opening.is_file():
        lines += [*_with_numbers(opening.read_text(encoding="utf-8"), folder), ""]
    heading = ""
    for experiment in sorted(experiments, key=lambda e: (e.declared.part, e.declared.place, e.name)):
        results = folder / experiment.name
        manifest = read_manifest(results)
        if manifest is None or not (results / "claims.json").is_file():
            continue
        if experiment.declared.part != heading:
            heading = experiment.declared.part
            lines += [f"## {heading}", ""]
        lines += _section(experiment, results, manifest)
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _section(experiment: ExperimentFile, results: Path, manifest: dict[str, Any]) -> list[str]:
    """The lines of a figure."""
    from moejax.reproduce.claims import MISSING, TABLE_NAME, read_results

    shows = json.loads((results / "claims.json").read_text(encoding="utf-8"))["text"]
    shows = "" if MISSING in shows else shows  # a quick run may lack the rows
    name, quick = experiment.name, " (quick run)" if manifest["quick"] else ""
    limits, budget = experiment.declared.shows_not, budgets(read_results(results)[TABLE_NAME])
    return [
        f"### {name}{quick}",
        "",
        *([f"*{experiment.question}*", ""] if experiment.question else []),
        f"![{name}]({name}/figure.png)",
        "",
        *([f"{shows} [{name}/claims.json]({name}/claims.json)", ""] if shows else []),
        *([limits, ""] if limits else []),
        *([f"{budget} [{name}/table.csv]({name}/table.csv)", ""] if budget else []),
        f"`{manifest['command']}` · [table]({name}/table.csv) · [PDF]({name}/figure.pdf) · [manifest]({name}/{MANIFEST_NAME})",
        "",
    ]


def budgets(table: pd.DataFrame) -> str:
    """A sentence with the mean passes over the data of every method, and with each of its numbers of starts; "" without methods."""
    if not {"method", "num_iterations"} <= set(table):
        return ""
    fields = {
        "num_starts": "{} start",
        "expert_steps": "{} expert step",
        "max_iterations": "at most {} iteration",
    }
    parts = []
    for method, rows in table.groupby("method", sort=False):
        varied = [name for name in fields if name in rows and rows[name].nunique() > 1]
        groups = rows.groupby(varied, sort=False) if varied else [((), rows)]
        told = []
        for values, group in groups:
            pairs = [(name, int(str(value))) for name, value in zip(varied, values, strict=True)]
            words = [fields[name].format(value) + "s" * (value != 1) for name, value in pairs]
            told.append(f"{group['num_iterations'].mean():.0f}" + (f" ({', '.join(words)})" if words else ""))
        parts.append(f"{method} {', '.join(told)}")
    return f"Budget, mean passes over the data of a trial with all its starts and pilots: {'; '.join(parts)}."


def _with_numbers(text: str, folder: Path) -> list[str]:
    """The paragraphs of a text with their numbers filled in, without those that lack one."""
    known: dict[str, str] = {}
    for claims in sorted(folder.glob("*/claims.json")):
        numbers = json.loads(claims.read_text(encoding="utf-8"))["numbers"]
        known |= {f"{claims.parent.name}/{name}": number["text"] for name, number in numbers.items()}
    paragraphs: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if all(name in known for name in PLACEHOLDER.findall(paragraph)):
            paragraphs.append(PLACEHOLDER.sub(lambda found: known[found[1]], paragraph))
    return [line for paragraph in paragraphs for line in [*paragraph.split("\n"), ""]][:-1]


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
