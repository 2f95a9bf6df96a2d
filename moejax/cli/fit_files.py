"""The files of `moejax fit --out`: the document, the fit itself, tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moejax.cli.fit_figures import convergence_figure, selection_figure
from moejax.cli.fit_units import UNIT_NAMES
from moejax.fitting.plots import plot_calibration, plot_coefficients, plot_fit, plot_responsibilities
from moejax.fitting.result import FitResult
from moejax.fitting.tables import Dataset
from moejax.pictures import own_style, save_picture

TABLES = ("fit.json", "fit.moejax", "parameters.parquet", "samples.parquet")
PICTURES = (
    "convergence.png",
    "selection.png",
    "fit.png",
    "responsibilities.png",
    "calibration.png",
    "coefficients.png",
)
LARGEST_PLOTTED = 2
"""Inputs over which a fit can be plotted."""
FILES = (*TABLES, *PICTURES)
"""Every file that a fit may write."""


def _parameter_rows(experts: list[dict[str, Any]], names: Sequence[str]) -> pd.DataFrame:
    """A row for every expert and input, the intercept last, of one block of experts."""
    rows = [
        {
            "expert": e["expert"],
            "input": name,
            "coefficient": e["coefficients"][name],
            "coefficient_error": e.get("coefficient_errors", {}).get(name),
            "gating": e["gating"][name],
            "gating_error": e.get("gating_errors", {}).get(name),
        }
        for e in experts
        for name in names
    ]
    rows += [
        {
            "expert": e["expert"],
            "input": "(intercept)",
            "coefficient": e["bias"],
            "coefficient_error": e.get("bias_error"),
            "gating": e["gating_bias"],
            "gating_error": e.get("gating_bias_error"),
        }
        for e in experts
    ]
    return pd.DataFrame(rows)


def _plots(out: Path, table: Dataset, result: FitResult) -> None:
    """The plots of `moejax.fitting.plots`, in the units of the data; that of the experts needs one or two inputs and no offset."""
    figures = {
        "calibration.png": plot_calibration(result, table.x, table.y, offset=table.offset),
        "coefficients.png": plot_coefficients(result, input_std=table.x.std(axis=0)),
    }
    if len(result.params.experts) > 1:
        figures["responsibilities.png"] = plot_responsibilities(result, table.x, table.y, offset=table.offset)
    if table.x.shape[1] <= LARGEST_PLOTTED and table.offset is None:
        figures["fit.png"] = plot_fit(result, table.x, table.y)
    for name, figure in figures.items():
        save_picture(figure, out / name)


def write_fit(
    out: Path,
    summary: dict[str, Any],
    table: Dataset,
    result: FitResult,
    posterior: np.ndarray,
    predicted: np.ndarray,
) -> list[str]:
    """Write the files of a fit into an empty folder; returns their names.

    Args:
        out: the folder.
        summary: the content of fit.json, without the history.
        table: the data; in a fit of many rows, a random part of them.
        result: the fit.
        posterior: (n, k) responsibilities, or the gates of a mean fit.
        predicted: (n,) E[y | x].
    """
    in_data, standardised = (
        _parameter_rows(summary["in_units"][name]["experts"], table.input_names) for name in UNIT_NAMES
    )
    numbers = standardised.drop(columns=["expert", "input"]).add_prefix("standardised_")
    in_data.join(numbers).to_parquet(out / "parameters.parquet", index=False)
    samples = pd.DataFrame({"target": table.y, "predicted": predicted})
    name = "responsibility" if result.objective == "likelihood" else "gate"
    for i in range(posterior.shape[1]):
        samples[f"{name}_{i + 1}"] = posterior[:, i]
    samples.to_parquet(out / "samples.parquet", index=False)
    scaling = summary["in_units"][summary["units"]]["scaling"]
    y, mean = ((a - scaling["target_mean"]) / scaling["target_std"] for a in (table.y, predicted))
    units = "standard deviations" if scaling["target_std"] != 1.0 else "the data's units"
    owner = "most responsible expert" if result.objective == "likelihood" else "expert of largest gate"
    with own_style():
        convergence_figure(
            result.history, y, mean, posterior.argmax(axis=1), units, owner, out / "convergence.png"
        )
        if result.selection is not None:
            selection_figure(result.selection, out / "selection.png")
        if all(np.isfinite(leaf).all() for leaf in result.params):
            _plots(out, table, result)
    result.save(out / "fit.moejax")
    shift = summary["in_units"][summary["units"]]["log_likelihood"] - result.log_likelihood
    document = summary | {"history": (result.history + shift).tolist()}
    (out / "fit.json").write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return [name for name in FILES if (out / name).exists()]
