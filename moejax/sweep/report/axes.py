"""Axes, labels and colours of figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moejax.model.metrics import SUCCESS_THRESHOLD
from moejax.pictures import COLOURS
from moejax.sweep.spec.fields import SHORT, show

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT_MAP = "cividis"
BRIGHT = 0.5
"""Text is black on colours whose luma, from 0 to 1, is above this."""
LEGEND_ENTRY_INCHES = 1.5
LOG_RANGE = 15.0
"""An axis whose values span more than this factor is logarithmic."""

LABELS = {
    "num_samples": "number of samples n",
    "dim": "dimension d",
    "num_experts": "number of experts k",
    "noise_std": "noise standard deviation σ",
    "gating_norm": "norm of the gates ‖w‖",
    "gating_angle": "angle of gates to experts' span (degrees)",
    "expert_correlation": "cosine between experts",
    "expert_norms": "norms of the experts",
    "activation": "activation g",
    "input_distribution": "distribution of x",
}
QUANTITIES = {
    "recovery_error": "recovery error 1 − min cos",
    "gating_error": "relative error of the gates",
    "success_rate": f"success rate (error < {SUCCESS_THRESHOLD})",
}


def new_figure(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels (rows, columns) that share their axes."""
    width = min(max(3.0 * columns + 1.0, 6.4), 16.0)
    figure = Figure(figsize=(width, max(2.7 * rows + 1.1, 4.0)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)


def draw_heat_map(
    axis: Axes,
    image: pd.DataFrame,
    norm: Normalize,
    colours: str = HEAT_MAP,
    texts: pd.DataFrame | None = None,
) -> None:
    """Draw a map of values by the index (vertical) and the columns (horizontal) of a table; missing cells are grey.

    Args:
        axis: where to draw.
        image: the values; its labels are those of the ticks.
        norm: of the colours.
        colours: name of a colour map.
        texts: what is written into each cell, a table of the same labels; None writes nothing.
    """
    values = image.to_numpy(dtype=float)
    axis.set_facecolor("#eeeeee")
    axis.pcolormesh(values, cmap=colours, norm=norm, edgecolors="white", linewidth=0.5)
    axis.set_xticks(np.arange(values.shape[1]) + 0.5, [tick_label(label) for label in image.columns])
    axis.set_yticks(np.arange(values.shape[0]) + 0.5, [tick_label(label) for label in image.index])
    if texts is None:
        return
    axis.tick_params(labelsize=8)
    red, green, blue, _ = np.moveaxis(colormaps[colours](norm(values)), -1, 0)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > BRIGHT
    for y, x in np.argwhere(np.isfinite(values)):
        colour = "black" if bright[y, x] else "white"
        axis.text(x + 0.5, y + 0.5, str(texts.iat[y, x]), ha="center", va="center", fontsize=7, color=colour)


def draw_legend(figure: Figure, methods: list[str], slope: bool, hollow: bool) -> None:
    """Draw the legend above all panels: a line per method, and the marks that the panels use."""
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[n % len(COLOURS)],
            marker=MARKERS[n % len(MARKERS)],
            markersize=5,
            label=method,
        )
        for n, method in enumerate(methods)
    ]
    if slope:
        handles.append(Line2D([], [], color="#777777", linestyle="--", linewidth=1, label="slope 1/n"))
    if hollow:
        handles.append(
            Line2D(
                [],
                [],
                color="#444444",
                marker="o",
                markerfacecolor="white",
                linestyle="none",
                label="some trials not ok",
            )
        )
    most = max(1, int(figure.get_figwidth() / LEGEND_ENTRY_INCHES))
    columns = -(-len(handles) // -(-len(handles) // most))  # rows of about equal length
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=10)


def draw_x_axis(axis: Axes, values: pd.Series, name: str, categories: list[Any] | None) -> None:
    """Set the scale and the ticks of the horizontal axis, for numbers or, if there are `categories`, for these."""
    if categories is not None:
        axis.set_xticks(
            range(len(categories)), [tick_label(value) for value in categories], rotation=30, ha="right"
        )
        return
    numbers = sorted(set(values))
    if is_logarithmic(values, name):
        axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(_thinned(numbers)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))


def is_logarithmic(values: pd.Series, name: str) -> bool:
    """True if the axis of these positive numbers is to be logarithmic."""
    least, most = min(values), max(values)
    return least > 0 and (name == "num_samples" or most / least > LOG_RANGE)


def _thinned(numbers: list[float], most: int = 6) -> list[float]:
    step = -(-len(numbers) // most)
    return numbers[::step]


def method_offsets(values: pd.Series, categories: list[Any], number: int, methods: list[str]) -> np.ndarray:
    """Offsets of a method's points from those of the other methods."""
    shift = (number - (len(methods) - 1) / 2) * 0.6 / max(len(methods), 1)
    return np.array([categories.index(value) + shift for value in values])


def rows_where(table: pd.DataFrame, name: str | None, value: Any) -> pd.DataFrame:
    """The rows with one value of a field; all rows if there is no field."""
    if name is None:
        return table
    return table[table[name].map(lambda cell: cell == value or cell is value)]


def distinct_values(column: pd.Series) -> list[Any]:
    """Distinct values: numbers sorted, others in the spec's order; None instead of pandas' NaN."""
    distinct = list(dict.fromkeys(column))
    return sorted(distinct) if is_numeric(column) else distinct


def is_numeric(column: pd.Series) -> bool:
    """True if all values are numbers; truth values are none."""
    return bool(
        column.map(lambda value: isinstance(value, int | float) and not isinstance(value, bool)).all()
    )


def tick_label(value: Any) -> str:
    """A tick label: 10000 as 10k, 0.1 as 0.1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return value if isinstance(value, str) else show(value)
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def panel_title(name: str, value: Any) -> str:
    """The field and its value, for the title of a panel."""
    return f"{SHORT.get(name, name)} = {tick_label(value)}"
