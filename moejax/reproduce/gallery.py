"""The gallery, README.md of a results folder: all figures under their headings, in the order of the headings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.reproduce.experiment import ExperimentFile
from moejax.reproduce.results_folder import MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    import pandas as pd

PLACEHOLDER = re.compile(r"\{([a-z-]+/\w+)\}")
"""A number of the claims of an experiment, {NAME/NUMBER}."""


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
        "if it has one; a share of none or of all trials has none, though the true share may be three over their number away.",
        "It comes from the table that is linked below it, and `claims.json` names the rows.",
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
        means = []
        for values, group in groups:
            pairs = [(name, int(str(value))) for name, value in zip(varied, values, strict=True)]
            words = [fields[name].format(value) + "s" * (value != 1) for name, value in pairs]
            means.append(
                f"{group['num_iterations'].mean():.0f}" + (f" ({', '.join(words)})" if words else "")
            )
        parts.append(f"{method} {', '.join(means)}")
    trials = f" (up to {table['trial'].nunique()} in a cell)" if "trial" in table else ""
    return f"Budget, mean passes over the data of a trial{trials} with all its starts and pilots: {'; '.join(parts)}."


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
