"""Figures of single fits. Colours are Okabe and Ito's, which colour-blind readers can distinguish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moejax.pictures import COLOURS, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_POINTS = 3000
"""Rows that a picture shows: more hide one another."""


def _two_panels(height: float) -> tuple[Figure, Axes, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    return figure, left, right


def convergence_figure(
    history: np.ndarray,
    y: np.ndarray,
    predicted: np.ndarray,
    share: np.ndarray,
    units: str,
    owner: str,
    path: Path,
) -> None:
    """Two panels: the log-likelihood still to gain at every pass, and observed against predicted labels.

    Args:
        history: (passes,) log-likelihood in nats, minus the ridge's penalty.
        y: (n,) labels.
        predicted: (n,) E[y | x].
        share: (n,) index of an expert for each sample.
        units: units of the labels.
        owner: the meaning of that expert.
        path: PNG file to write.
    """
    from matplotlib.ticker import MaxNLocator

    figure, left, right = _two_panels(4.0)
    if history.size > 1:
        gap = np.maximum(history.max() - history, 1e-6)
        left.semilogy(np.arange(1, history.size + 1), gap, marker="o", markersize=3.5, color=COLOURS[0])
    else:
        why = "the method records its end only" if history.size else "moments only: no iterations"
        left.text(0.5, 0.5, why, ha="center", va="center", transform=left.transAxes)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("pass over the data")
    left.set_ylabel("log-likelihood below the final one (nats)")
    left.set_title("Convergence")
    left.grid(alpha=0.3)
    rows, experts = None, int(share.max()) + 1
    if len(y) > MOST_POINTS:
        rows = f"{MOST_POINTS:,} of {len(y):,} rows"
        shown = np.random.default_rng(0).choice(len(y), MOST_POINTS, replace=False)
        y, predicted, share = y[shown], predicted[shown], share[shown]
    for expert in range(experts):
        chosen = share == expert
        right.plot(
            predicted[chosen],
            y[chosen],
            ".",
            markersize=4,
            color=COLOURS[expert % len(COLOURS)],
            label=f"expert {expert + 1}",
        )
    ends = [min(y.min(), predicted.min()), max(y.max(), predicted.max())]
    right.plot(ends, ends, color="0.4", linewidth=1, linestyle="--", label="observed = predicted")
    right.set_xlabel(f"predicted E[y | x] ({units})")
    right.set_ylabel(f"observed y ({units})")
    right.set_title(f"Labels, by their {owner}")
    right.legend(title=rows, title_fontsize=8, fontsize=8, framealpha=0.9)
    right.grid(alpha=0.3)
    save_picture(figure, path)


def selection_figure(table: pd.DataFrame, path: Path) -> None:
    """Two panels over the number of experts: the criteria above their least value, and the eigenvalues of T2.

    If means were fitted, the panels are the BIC of each objective and the evidence of the means.

    Args:
        table: `FitResult.selection`.
        path: PNG file to write.
    """
    figure, left, right = _two_panels(3.8)
    if "log_evidence" in table:
        _evidence_panels(table, left, right)
        save_picture(figure, path)
        return
    number = table["num_experts"]
    for name, colour, marker in zip(("aic", "bic", "icl"), COLOURS, "osD", strict=False):
        left.plot(number, table[name] - table[name].min(), marker=marker, color=colour, label=name.upper())
    left.set_yscale("symlog", linthresh=10.0)
    left.set_ylabel("criterion above its least value (nats × 2)")
    left.set_title("Information criteria (less is better)")
    left.legend()
    values = table["t2_eigenvalue"]
    if values.notna().any():
        right.bar(number, values, color=COLOURS[0])
        right.axhline(0.0, color="0.4", linewidth=1)
    else:
        right.text(0.5, 0.5, "no moments were used", ha="center", va="center", transform=right.transAxes)
    right.set_ylabel("k-th eigenvalue of T2")
    right.set_title("Second moment: k positive ones in theory")
    for axes in (left, right):
        axes.set_xticks(number)
        axes.set_xlabel("number of experts k")
        axes.grid(alpha=0.3)
    save_picture(figure, path)


def _evidence_panels(table: pd.DataFrame, left: Axes, right: Axes) -> None:
    """BIC above its least value for each objective, and the evidence of means below its largest, over the number of experts."""
    tried = table[table["bic"].notna()]
    names = {"mean": "mean of the experts", "likelihood": "mixture of experts"}
    for (objective, name), colour, marker in zip(names.items(), COLOURS, "os", strict=False):
        rows = tried[tried["objective"] == objective]
        if len(rows):
            above = rows["bic"] - tried["bic"].min()
            left.plot(
                rows["num_experts"], above, marker=marker, color=colour, label=name, clip_on=False, zorder=3
            )
    left.set_yscale("symlog", linthresh=10.0)
    left.set_ylim(
        0.0, 20.0 * max(1.0, float((tried["bic"] - tried["bic"].min()).max()))
    )  # room for the legend
    left.set_ylabel("BIC above its least value (nats × 2)")
    left.set_title("Information criterion (less is better)")
    left.legend()
    means = tried[tried["log_evidence"].notna()]
    right.plot(
        means["num_experts"],
        means["log_evidence"].max() - means["log_evidence"],
        marker="o",
        color=COLOURS[0],
        clip_on=False,
        zorder=3,
    )
    right.set_yscale("symlog", linthresh=1.0)
    right.set_ylim(bottom=0.0)
    right.set_ylabel("log evidence below its largest value (nats)")
    right.set_title("Evidence of the mean (0 is best)")
    for axes in (left, right):
        axes.set_xticks(sorted(set(tried["num_experts"])))
        axes.set_xlabel("number of experts k")
        axes.grid(alpha=0.3)
