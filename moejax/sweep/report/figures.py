"""Figures of a sweep, chosen by its axes: lines along one axis, heatmaps over two, panels for further ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from moejax.pictures import COLOURS, save_picture
from moejax.sweep.report.axes import (
    HEAT_MAP,
    LABELS,
    MARKERS,
    QUANTITIES,
    distinct_values,
    draw_heat_map,
    draw_legend,
    draw_x_axis,
    is_logarithmic,
    is_numeric,
    method_offsets,
    new_figure,
    panel_title,
    rows_where,
)
from moejax.sweep.report.summary import SUCCESS_METRIC, swept_fields
from moejax.sweep.spec.fields import METHOD_FIELD, show

MAX_FIGURES = 4
MAX_PANELS = 6
"""Most values of an axis that get separate panels in one direction."""
DODGE = 1.03
"""Factor between the positions of the methods on a logarithmic axis."""
PREFERRED_AXES = (
    "num_samples",
    "noise_std",
    "dim",
    "num_experts",
    "gating_norm",
    "gating_angle",
    "expert_correlation",
)


@dataclasses.dataclass(frozen=True)
class NamedFigure:
    """A figure, its file name (no ending) and one sentence that describes it."""

    name: str
    figure: Figure
    caption: str


def make_figures(summary: pd.DataFrame) -> list[NamedFigure]:
    """Figures of recovery error and success rate; the first is the main one. The list is empty if there is nothing to draw."""
    table = summary[summary["metric"] == SUCCESS_METRIC]
    if table.empty or not np.isfinite(table["median"]).any():
        return []
    axes = swept_fields(table)
    numeric = _numeric_axes(table, axes)
    figures: list[NamedFigure] = []
    if len(numeric) == 2 and all(table[name].nunique() >= 3 for name in numeric):
        for quantity in ("success_rate", SUCCESS_METRIC):
            figures += _split(table, [n for n in axes if n not in numeric], 1, quantity, "heatmap", numeric)
    x_name = x_axis_of(table, axes)
    rest = [name for name in axes if name != x_name]
    for quantity in (SUCCESS_METRIC, "success_rate"):
        figures += _split(table, rest, 2, quantity, "lines", [x_name])
    return figures


def _numeric_axes(table: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """The swept fields of numbers, the preferred one first."""
    numeric = [name for name in axes if is_numeric(table[name])]
    return sorted(
        numeric,
        key=lambda name: PREFERRED_AXES.index(name) if name in PREFERRED_AXES else len(PREFERRED_AXES),
    )


def x_axis_of(table: pd.DataFrame, axes: Sequence[str]) -> str:
    """The horizontal axis of lines: a field of numbers if one was swept, else the first axis, else the method."""
    numeric = _numeric_axes(table, axes)
    return numeric[0] if numeric else (axes[0] if axes else METHOD_FIELD)


def line_figure(
    summary: pd.DataFrame,
    x: str,
    *,
    columns: str | None = None,
    rows: str | None = None,
    quantity: str = SUCCESS_METRIC,
    title: str = "",
    wrap: int | None = None,
) -> Figure:
    """Medians of a metric, or the success rate, against one field: a line per method, bars of one standard error.

    Args:
        summary: from `summary.estimates` (or one metric's rows of `summary.summarise`).
        x: the field along the axis.
        columns: field of the panels side by side.
        rows: field of the panels below each other.
        quantity: the metric, or "success_rate".
        title: title over all panels.
        wrap: with `columns` only, the number of panels in a row.
    """
    figure, _ = _lines(summary, [x], [columns, rows], quantity, wrap)
    if title:
        figure.legends[0].set_title(title, FontProperties(size=11))
    return figure


def write_figures(figures: list[NamedFigure], folder: Path) -> list[Path]:
    """Write figures as PNG, the first also as figure.png and figure.pdf; returns the paths."""
    written = []
    for index, named in enumerate(figures):
        name = picture_name(figures, index)
        save_picture(named.figure, folder / name)
        written.append(folder / name)
        if index == 0:
            save_picture(named.figure, folder / "figure.pdf")
            written.append(folder / "figure.pdf")
    return written


def picture_name(figures: list[NamedFigure], index: int) -> str:
    """File name of a figure's PNG."""
    return "figure.png" if index == 0 else f"figure_{figures[index].name}.png"


def _split(
    table: pd.DataFrame, rest: list[str], directions: int, quantity: str, kind: str, axes: list[str]
) -> list[NamedFigure]:
    """One figure per combination of values of the axes that do not fit as panels."""
    rest = sorted(rest, key=lambda name: (is_numeric(table[name]), table[name].astype(str).nunique()))
    fitting = [name for name in rest if table[name].astype(str).nunique() <= MAX_PANELS][:directions]
    outer = [name for name in rest if name not in fitting]
    combinations = list(itertools.product(*(distinct_values(table[name]) for name in outer)))
    figures = []
    for number, combination in enumerate(combinations[:MAX_FIGURES]):
        chosen = table
        for name, value in zip(outer, combination, strict=True):
            chosen = chosen[chosen[name].map(lambda cell, value=value: cell == value or cell is value)]
        title = ", ".join(f"{name} = {show(value)}" for name, value in zip(outer, combination, strict=True))
        if len(combinations) > MAX_FIGURES:
            title += f" ({MAX_FIGURES} of {len(combinations)} combinations are drawn)"
        if chosen.empty:
            continue
        name = f"{quantity}_{kind}" + (f"_{number + 1}" if outer else "")
        draw = _lines if kind == "lines" else _heatmaps
        figure, caption = draw(chosen, axes, fitting, quantity)
        if title and figure.legends:  # a title of the figure would cover the legend
            figure.legends[0].set_title(title, FontProperties(size=11))
        elif title:
            figure.suptitle(title, fontsize=11)
        figures.append(NamedFigure(name, figure, f"{caption} {title}".strip()))
    return figures


def _lines(
    table: pd.DataFrame,
    axes: list[str],
    panels: Sequence[str | None],
    quantity: str,
    wrap: int | None = None,
) -> tuple[Figure, str]:
    x_name = axes[0]
    column_name, row_name = [*panels, None, None][:2]
    columns = distinct_values(table[column_name]) if column_name else [None]
    rows = distinct_values(table[row_name]) if row_name else [None]
    width = min(wrap or len(columns), len(columns))
    figure, grid = new_figure(len(rows) * -(-len(columns) // width), width)
    for place in range(len(columns) if wrap else grid.size, grid.size):
        grid.flat[place].set_visible(False)
        grid.flat[place - width].tick_params(labelbottom=True)
    estimate = quantity if quantity == "success_rate" else "median"
    methods = list(dict.fromkeys(table[METHOD_FIELD]))
    logarithmic = estimate == "median" and bool((table[estimate].dropna() > 0).all())
    categories = None if is_numeric(table[x_name]) else distinct_values(table[x_name])
    slope = hollow = False
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        axis: Axes = grid[i + j // width, j % width]
        here = rows_where(rows_where(table, row_name, row), column_name, column)
        for number, method in enumerate(methods):
            part = here[(here[METHOD_FIELD] == method) & np.isfinite(here[estimate])]
            if categories is None:
                part = part.sort_values(x_name)
            if part.empty:
                continue
            x = (
                part[x_name].to_numpy()
                if categories is None
                else method_offsets(part[x_name], categories, number, methods)
            )
            if categories is None and is_logarithmic(table[x_name], x_name):
                x = x * DODGE ** (number - (len(methods) - 1) / 2)  # so that equal lines stay visible
            y, error = part[estimate].to_numpy(), part[f"{estimate}_mcse"].fillna(0).to_numpy()
            lower = (
                np.minimum(error, 0.9 * y) if logarithmic else error
            )  # a bar cannot reach zero on a log axis
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axis.errorbar(
                x, y, yerr=[lower, error], color=colour, marker=marker, markersize=5, capsize=2.5,
                linewidth=1.4,
                linestyle="-" if categories is None else "none", label=method, zorder=3,
            )  # fmt: skip
            failed = part["failed"].to_numpy() > 0
            if failed.any():
                hollow = True
                axis.plot(
                    x[failed],
                    y[failed],
                    marker,
                    color=colour,
                    markerfacecolor="white",
                    markersize=5,
                    zorder=4,
                )
        if logarithmic:
            axis.set_yscale("log")
        if quantity == SUCCESS_METRIC and x_name == "num_samples" and logarithmic:
            slope |= _reference_slope(axis, here, x_name, estimate)
        if estimate == "success_rate":
            axis.set_ylim(-0.04, 1.04)
        draw_x_axis(axis, table[x_name], x_name, categories)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        if column_name and (i == 0 or wrap):
            axis.set_title(panel_title(column_name, column), fontsize=10)
        if row_name and j == len(columns) - 1:
            axis.annotate(
                panel_title(row_name, row),
                (1.02, 0.5),
                xycoords="axes fraction",
                rotation=-90,
                va="center",
                fontsize=10,
            )
    figure.supxlabel(LABELS.get(x_name, x_name), fontsize=11)
    what = f"median {QUANTITIES[quantity]}" if estimate == "median" else QUANTITIES[quantity]
    figure.supylabel(f"{what} ± MCSE", fontsize=11)
    draw_legend(figure, methods, slope, hollow)
    what = what[0].upper() + what[1:]
    caption = f"{what} against {LABELS.get(x_name, x_name)}; bars are Monte Carlo standard errors."
    return figure, caption


def _heatmaps(table: pd.DataFrame, axes: list[str], panels: list[str], quantity: str) -> tuple[Figure, str]:
    y_name, x_name = axes  # the preferred axis, such as n, is vertical
    methods = list(dict.fromkeys(table[METHOD_FIELD]))
    row_name = panels[0] if panels else None
    rows = distinct_values(table[row_name]) if row_name else [None]
    xs, ys = distinct_values(table[x_name]), distinct_values(table[y_name])
    figure, grid = new_figure(len(rows), len(methods))
    estimate = "median" if quantity == SUCCESS_METRIC else quantity
    finite = table[estimate].dropna()
    norm: Normalize = Normalize(0, 1)
    if quantity == SUCCESS_METRIC:
        positive = finite[finite > 0]
        norm = (
            LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
            if len(positive)
            else Normalize()
        )
    for (i, row), (j, method) in itertools.product(enumerate(rows), enumerate(methods)):
        axis: Axes = grid[i, j]
        here = rows_where(table[table[METHOD_FIELD] == method], row_name, row)
        image = here.pivot_table(index=y_name, columns=x_name, values=estimate, aggfunc="first")
        image = image.reindex(index=ys, columns=xs)
        draw_heat_map(axis, image, norm)
        axis.tick_params(axis="x", labelrotation=45 if len(xs) > 5 else 0)
        title = method if not row_name else f"{method}, {panel_title(row_name, row)}"
        axis.set_title(title, fontsize=10)
    figure.supxlabel(LABELS.get(x_name, x_name), fontsize=11)
    figure.supylabel(LABELS.get(y_name, y_name), fontsize=11)
    what = f"median {QUANTITIES[quantity]}" if estimate == "median" else QUANTITIES[quantity]
    figure.colorbar(ScalarMappable(norm, HEAT_MAP), ax=grid, label=what, shrink=0.9)
    what = what[0].upper() + what[1:]
    caption = f"{what} over {LABELS.get(y_name, y_name)} and {LABELS.get(x_name, x_name)}; grey: missing."
    return figure, caption


def _reference_slope(axis: Axes, here: pd.DataFrame, x_name: str, estimate: str) -> bool:
    """A dashed line proportional to 1/n, just below the best method's last point."""
    last = here[(here[x_name] == here[x_name].max()) & np.isfinite(here[estimate])]
    if last.empty:
        return False
    ends = np.array([here[x_name].min(), here[x_name].max()], dtype=float)
    axis.plot(
        ends,
        0.6 * last[estimate].min() * ends[1] / ends,
        linestyle="--",
        color="#777777",
        linewidth=1,
        zorder=2,
    )
    return True
