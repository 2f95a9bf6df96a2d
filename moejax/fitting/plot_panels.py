"""The panels of `plot_fit`: experts over one input, gates and the mean over two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moejax.fitting.result import FitResult

EXPERT_COLOURS, MARKERS = COLOURS[:-1], "osD^vP"
"""The colours and the markers of experts, which repeat if there are more experts; black is the colour of the mean."""
MOST_POINTS = 3000
"""Rows that a plot shows: more hide one another."""
GRID = 400
"""Points of a line."""
MESH = 160
"""Points of each side of a map."""


def colour_of(expert: int) -> str:
    """The colour of an expert."""
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def shown_rows(n: int) -> np.ndarray:
    """The rows that are shown."""
    return (
        np.arange(n) if n <= MOST_POINTS else np.random.default_rng(0).choice(n, MOST_POINTS, replace=False)
    )


def line_panel(
    axes: Axes, result: FitResult, x: np.ndarray, y: np.ndarray, level: float, place: int = 0
) -> list[Any]:
    """Draw the data, the experts, the mean and the interval over one input, and return the legend's entries.

    Args:
        axes: where to draw.
        result: the fit.
        x: (n, d) data; all inputs but one are constant.
        y: (n,) labels.
        level: probability of the interval.
        place: the input that varies.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    shown = shown_rows(len(y))
    grid = np.linspace(x[:, place].min(), x[:, place].max(), GRID)
    column = np.tile(x[0], (GRID, 1))
    column[:, place] = grid
    low, high = result.predict_interval(column, level).T
    band = axes.fill_between(
        grid, low, high, color="0.88", linewidth=0, zorder=0, label=f"{100 * level:g}% interval"
    )
    axes.plot(x[shown, place], y[shown], ".", color="0.45", markersize=3.5, alpha=0.7, zorder=1)
    gates, means = result.gate_probabilities(column), result.predict_experts(column)
    handles: list[Any] = []
    for i in range(gates.shape[1]):
        points = np.column_stack([grid, means[:, i]])
        colours = np.tile(to_rgba(colour_of(i)), (GRID - 1, 1))
        colours[:, 3] = 0.5 * (gates[1:, i] + gates[:-1, i])
        lines = np.stack([points[:-1], points[1:]], axis=1)
        axes.add_collection(LineCollection(list(lines), colors=colours.tolist(), linewidths=3.0, zorder=2))
        handles.append(Line2D([], [], color=colour_of(i), linewidth=3.0, label=f"expert {i + 1}"))
    handles += axes.plot(grid, result.predict(column), color="black", linewidth=1.2, zorder=3, label="mean")
    handles.append(band)
    room = 0.05 * (max(y.max(), high.max()) - min(y.min(), low.min()))
    bottom, top = min(y.min(), low.min()) - room, max(y.max(), high.max()) + room
    if axes.get_shared_y_axes().get_siblings(axes) != [axes] and axes.get_autoscaley_on() is False:
        bottom, top = min(bottom, axes.get_ylim()[0]), max(top, axes.get_ylim()[1])
    axes.set_ylim(bottom, top)
    if grid[0] < grid[-1]:
        axes.set_xlim(grid[0], grid[-1])
    return handles


def _mesh(x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The ends of a map and its points, (MESH^2, 2)."""
    low, high = x.min(axis=0), x.max(axis=0)
    room = 0.03 * (high - low) + np.where(high > low, 0.0, 0.5)
    sides = [np.linspace(a, b, MESH) for a, b in zip(low - room, high + room, strict=True)]
    return sides, np.stack([side.reshape(-1) for side in np.meshgrid(*sides)], axis=1)


def region_panel(axes: Axes, result: FitResult, x: np.ndarray, y: np.ndarray) -> None:
    """The gates over two inputs as mixed colours, and the data in the colours of their most responsible experts."""
    from matplotlib.colors import to_rgb

    sides, points = _mesh(x)
    gates = result.gate_probabilities(points)
    k = gates.shape[1]
    palette = np.array([to_rgb(colour_of(i)) for i in range(k)])
    colours = (1.0 - 0.35 * (1.0 - gates @ palette)).reshape(MESH, MESH, 3)
    extent = (sides[0][0], sides[0][-1], sides[1][0], sides[1][-1])
    axes.imshow(colours, origin="lower", extent=extent, aspect="auto", interpolation="bilinear")
    shares = result.responsibilities(x, y)
    owner, shown = shares.argmax(axis=1), shown_rows(len(y))
    for i in range(k):
        mine = shown[owner[shown] == i]
        axes.plot(
            x[mine, 0],
            x[mine, 1],
            MARKERS[i % len(MARKERS)],
            color=colour_of(i),
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.4,
            label=f"expert {i + 1}",
        )
    what = "most responsible expert" if result.objective == "likelihood" else "expert of largest gate"
    axes.set_title(f"Gates, and data by their {what}", fontsize="medium")
    axes.legend(fontsize=9, framealpha=0.9)


def map_panel(axes: Axes, result: FitResult, x: np.ndarray, target: str) -> None:
    """The mean over two inputs."""
    sides, points = _mesh(x)
    mean = result.predict(points).reshape(MESH, MESH)
    filled = axes.contourf(*sides, mean, levels=14, cmap="viridis")
    axes.figure.colorbar(filled, ax=axes, label=f"mean of {target}")
    shown = shown_rows(len(x))
    axes.plot(x[shown, 0], x[shown, 1], ".", color="white", markersize=1.5, alpha=0.6)
    axes.set_title("Predicted mean", fontsize="medium")
