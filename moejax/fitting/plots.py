"""Plots of a fit: its experts over the data, who is responsible, calibration, and coefficients.

Each function returns a matplotlib Figure that no window holds: `figure.savefig("fit.png")` writes it, and a notebook shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats

from moejax.checks import require
from moejax.fitting.array_checks import checked_inputs, checked_targets
from moejax.fitting.plot_panels import MARKERS, MOST_POINTS, colour_of, line_panel, map_panel, region_panel
from moejax.fitting.result_predictions import checked_levels
from moejax.pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moejax.fitting.result import FitResult

MOST_INPUTS = 20
"""Inputs in a plot of coefficients."""
_BELOW: dict[str, Any] = {"loc": "outside lower center", "ncols": 5, "frameon": False}
"""Place of a legend."""
BAND = 0.95
"""Probability with which a well calibrated model's bin, or coverage, is in its band."""
ROWS_IN_BIN, FEWEST_BINS, MOST_BINS = 40, 5, 20
"""Sizes of the histogram of calibration."""


def plot_fit(
    result: FitResult,
    x: Any,
    y: Any,
    *,
    feature_names: Sequence[str] | None = None,
    target_name: str | None = None,
    level: float = 0.9,
) -> Figure:
    """Plot the experts over the data, for one or two inputs.

    With one input: the data, the line g(a_i x + b_i) of each expert, as opaque as its gate P_i(x), the mean E[y | x] and the
    central interval of y; if a second input has only two values, there is such a panel for each. With two inputs: the data, each
    point in the colour of its most responsible expert, over the gates, and a map of the mean.

    Args:
        result: a fit of one output.
        x: (n, 1) or (n, 2) data, in the units of the x that was fitted.
        y: (n,) labels.
        feature_names: (d,) names of the inputs; None takes those of the table that was fitted, or x1, x2.
        target_name: the name of y.
        level: probability of the interval.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: more than two inputs, several outputs or a fit with an offset, or arrays that do not fit together.

    Examples:
        >>> x = np.random.default_rng(0).uniform(-1, 1, (200, 1))
        >>> result = moejax.fit(jax.random.key(0), x, np.abs(x[:, 0]), num_experts=2, noise_std=0.1, method="joint_em")
        >>> figure = moejax.plot_fit(result, x, np.abs(x[:, 0]), feature_names=["height"])
        >>> figure.axes[0].get_xlabel()
        'height'
    """
    x, y = _checked(result, x, y)
    require(
        not result.has_offset,
        "result",
        "a fit without an offset, because its lines depend on one",
        "one with",
    )
    (level,) = checked_levels([level], "level")
    d = x.shape[1]
    require(d in (1, 2), "x", "one or two inputs to plot a fit over", d)
    names, target = _names(result, feature_names), _target(result, target_name)
    if d == 1:
        figure, (axes,) = _figure(1, (6.4, 4.4))
        figure.legend(handles=line_panel(axes, result, x, y, level), **_BELOW)
        axes.set_title(
            "Experts, as opaque as their gates" if len(result.params.experts) > 1 else "One expert"
        )
        axes.set_xlabel(names[0])
        axes.set_ylabel(target)
        return figure
    two_valued = [j for j in range(2) if len(np.unique(x[:, j])) == 2]
    if len(two_valued) == 1:
        (other,) = two_valued
        figure, both = _figure(2, (10.4, 4.4), sharey=True)
        handles: list[Any] = []
        for axes, value in zip(both, np.unique(x[:, other]), strict=True):
            here = x[:, other] == value
            handles = line_panel(axes, result, x[here], y[here], level, 1 - other)
            axes.set_title(f"{names[other]}: {value:g}")
            axes.set_xlabel(names[1 - other])
        figure.legend(handles=handles, **_BELOW)
        both[0].set_ylabel(target)
        return figure
    figure, (left, right) = _figure(2, (10.4, 4.4))
    region_panel(left, result, x, y)
    map_panel(right, result, x, target)
    for axes in (left, right):
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
    return figure


def plot_responsibilities(result: FitResult, x: Any, y: Any, *, offset: Any = None) -> Figure:
    """Plot the responsibilities P(z = i | x, y) of the experts: how clearly each row belongs to one of them.

    On the left, each row of the data is a thin column, in which every expert has its share; the rows are sorted by the experts of
    their two largest shares. On the right is the histogram of the largest share. In a mean fit the shares are the gates P_i(x).

    Args:
        result: a fit.
        x: (n, d) data, in the units of the x that was fitted.
        y: (n,) or (n, m) labels.
        offset: (n,) that of the data, if the fit had one.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: arrays that do not go with the fit.

    Examples:
        >>> x = np.random.default_rng(0).normal(size=(200, 1))
        >>> result = moejax.fit(jax.random.key(0), x, np.abs(x[:, 0]), num_experts=2, noise_std=0.1, method="joint_em")
        >>> len(moejax.plot_responsibilities(result, x, np.abs(x[:, 0])).axes)
        2
    """
    shares = result.responsibilities(x, y, offset=offset)
    n, k = shares.shape
    owner, largest = shares.argmax(axis=1), shares.max(axis=1)
    figure, (left, right) = _figure(2, (10.4, 3.9))
    of = "responsibility P(z = i | x, y)" if result.objective == "likelihood" else "gate P(i | x)"
    second = np.argsort(-shares, axis=1, kind="stable")[:, min(1, k - 1)]
    order = np.lexsort((-largest, second, owner))
    if n > MOST_POINTS:
        order = order[np.linspace(0, n - 1, MOST_POINTS).round().astype(int)]
    edges = np.linspace(0.0, n, len(order) + 1)
    below = np.zeros(len(order))
    for i in range(k):
        above = below + shares[order, i]
        left.stairs(above, edges, baseline=below, fill=True, color=colour_of(i), label=f"expert {i + 1}")
        below = above
    left.set_xlim(0, n)
    left.set_ylim(0, 1)
    left.set_xlabel("row of the data, sorted")
    left.set_ylabel(of)
    left.set_title("All rows, by their expert of largest share")
    _legend_below(figure, left)
    bins = np.linspace(1.0 / k if k > 1 else 0.0, 1.0, 21)
    right.hist(
        [largest[owner == i] for i in range(k)],
        bins=bins.tolist(),
        stacked=True,
        color=[colour_of(i) for i in range(k)],
    )
    right.set_xlim(bins[0], 1.0)
    right.set_xlabel(f"largest {of}")
    right.set_ylabel("rows")
    right.set_title(f"Above 0.9 in {np.mean(largest > 0.9):.0%} of the rows")
    right.grid(alpha=0.3)
    return figure


def plot_calibration(result: FitResult, x: Any, y: Any, *, offset: Any = None) -> Figure:
    """Plot whether the predicted distributions hold the labels as often as they promise.

    On the left is the histogram of u = P(Y <= y | x) (the probability integral transform), which is uniform on (0, 1) if the
    model is true: a hump means that the predicted distributions are too wide, a bowl too narrow, a slope that they are shifted.
    On the right is the share of labels inside the central interval of each level. The grey bands hold each number with
    probability 95% for a true model and labels that were not fitted.

    Args:
        result: a fit of one output.
        x: (n, d) data, best data that were not fitted.
        y: (n,) labels.
        offset: (n,) that of the data, if the fit had one.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: several outputs, or arrays that do not go with the fit.

    Examples:
        >>> x = np.random.default_rng(0).normal(size=(200, 1))
        >>> y = x[:, 0] + np.random.default_rng(1).normal(size=200)
        >>> result = moejax.fit(jax.random.key(0), x, y, num_experts=1, method="joint_em")
        >>> [axes.get_ylabel() for axes in moejax.plot_calibration(result, x, y).axes]
        ['rows, relative to the expected number', 'share of the labels in the interval']
    """
    u = result.probability_below(x, y, offset=offset)
    n = len(u)
    figure, (left, right) = _figure(2, (9.6, 4.2), width_ratios=(1.25, 1.0))
    bins = int(np.clip(n // ROWS_IN_BIN, FEWEST_BINS, MOST_BINS))
    counts, edges = np.histogram(u, np.linspace(0.0, 1.0, bins + 1))
    low, high = scipy.stats.binom.interval(BAND, n, 1.0 / bins)
    expected = n / bins
    left.axhspan(low / expected, high / expected, color="0.85", label=f"{BAND:.0%} band of a true model")
    left.stairs(counts / expected, edges, color=COLOURS[0], fill=True, alpha=0.45)
    left.stairs(counts / expected, edges, color=COLOURS[0], linewidth=1.5, label=f"{n:,} labels")
    left.axhline(1.0, color="0.3", linewidth=1, linestyle="--")
    left.set_xlim(0, 1)
    left.set_ylim(0, 1.25 * max(float(counts.max()), float(high)) / expected)
    left.set_xlabel("P(Y ≤ y | x) under the fit")
    left.set_ylabel("rows, relative to the expected number")
    left.set_title("Probability integral transform")
    left.legend(loc="upper right", fontsize=9, ncols=2, framealpha=0.9)
    levels = np.linspace(0.0, 1.0, 201)
    covered = np.searchsorted(np.sort(np.abs(2.0 * u - 1.0)), levels, side="right") / n
    low, high = scipy.stats.binom.interval(BAND, n, levels)
    right.fill_between(
        levels, low / n, high / n, color="0.85", linewidth=0, label=f"{BAND:.0%} band of a true model"
    )
    right.plot([0, 1], [0, 1], color="0.3", linewidth=1, linestyle="--")
    right.plot(levels, covered, color=COLOURS[0], linewidth=1.8, label="observed")
    right.set_xlim(0, 1)
    right.set_ylim(0, 1)
    right.set_xlabel("level of the central interval")
    right.set_ylabel("share of the labels in the interval")
    right.set_title("Coverage")
    right.legend(loc="upper left", fontsize=9, framealpha=0.9)
    right.grid(alpha=0.3)
    return figure


def plot_coefficients(
    result: FitResult,
    *,
    feature_names: Sequence[str] | None = None,
    input_std: Any = None,
    level: float = 0.95,
) -> Figure:
    """Plot the coefficients of every expert and gate with their Wald intervals, without the intercepts.

    Args:
        result: a fit of one output. Without standard errors there are no intervals.
        feature_names: (d,) names of the inputs; None takes those of the table that was fitted, or x1, x2, ..
        input_std: (d,) a step of each input, such as its standard deviation: the coefficients are multiplied by it, so that inputs
            in different units can be compared. None is a step of one unit.
        level: probability that one interval holds its coefficient.

    Returns:
        matplotlib Figure.

    Raises:
        ValueError: several outputs, or another number of names or steps than that of the inputs.

    Examples:
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> y = x[:, 0] + np.random.default_rng(1).normal(size=200)
        >>> result = moejax.fit(jax.random.key(0), x, y, num_experts=1, method="joint_em")
        >>> axes = moejax.plot_coefficients(result, feature_names=["age", "dose"]).axes[0]
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['age', 'dose']
    """
    _require_one_output(result)
    names = _names(result, feature_names)
    k, d = result.params.experts.shape
    steps = np.ones(d) if input_std is None else np.asarray(input_std, float)
    good = steps.shape == (d,) and bool(np.isfinite(steps).all()) and bool((steps >= 0).all())
    require(good, "input_std", f"{d} numbers >= 0", input_std)
    parts = ("experts", "gating") if k > 1 and np.any(result.params.gating) else ("experts",)
    ends = result.intervals(level) if result.standard_errors is not None else None
    sizes = [np.abs(getattr(result.params, part) * steps).max(axis=0) for part in parts]
    size = np.max([one / (one.max() or 1.0) for one in sizes], axis=0)
    shown = np.sort(np.argsort(-size, kind="stable")[:MOST_INPUTS])
    height = 1.3 + max(1.2, len(shown) * (0.16 * k + 0.16))
    figure, all_axes = _figure(len(parts), (5.2 * len(parts) + 0.4, height), sharey=True)
    titles = {"experts": "Experts", "gating": f"Gates, relative to expert {k}"}
    unit = "unit" if input_std is None else "standard deviation"
    target = str(result.diagnostics.get("target_name", "y"))
    labels = {
        "experts": f"change of {target} per {unit} of the input",
        "gating": f"change of log odds per {unit} of the input",
    }
    for axes, part in zip(all_axes, parts, strict=True):
        for i in range(k if part == "experts" else k - 1):
            places = np.arange(len(shown)) + 0.7 * ((i + 0.5) / k - 0.5)
            values = getattr(result.params, part)[i] * steps
            style: dict[str, Any] = {
                "color": colour_of(i),
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": 5,
            }
            label = f"expert {i + 1}"
            errors = None
            if ends is not None:
                below, above = (getattr(end, part)[i] * steps for end in ends)
                errors = np.nan_to_num(np.stack([values - below, above - values])[:, shown])
            axes.errorbar(values[shown], places, xerr=errors, linestyle="", capsize=2, label=label, **style)
        axes.axvline(0.0, color="0.4", linewidth=1)
        for place in np.arange(len(shown) - 1) + 0.5:
            axes.axhline(place, color="0.9", linewidth=0.8)
        axes.set_title(titles[part])
        axes.set_xlabel(labels[part])
        axes.grid(axis="x", alpha=0.3)
    first = all_axes[0]
    first.set_yticks(range(len(shown)), [names[j] for j in shown])
    first.set_ylim(len(shown) - 0.5, -0.5)
    _legend_below(figure, first)
    what = f"with {100 * level:g}% intervals" if ends is not None else "without standard errors"
    if len(shown) < d:
        what += f"; the {len(shown)} largest of {d} inputs"
    figure.suptitle(f"Coefficients {what}", fontsize="medium")
    return figure


def _figure(panels: int, size: tuple[float, float], **how: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, **how)[0]
    return figure, list(axes)


def _legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, outside of them."""
    figure.legend(handles=axes.get_legend_handles_labels()[0], **_BELOW)


def _require_one_output(result: FitResult) -> None:
    experts = result.params.experts
    require(experts.ndim == 2, "result", "a fit of one output", f"{experts.shape[-2]} outputs")


def _checked(result: FitResult, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    _require_one_output(result)
    rows = checked_inputs(x, "x")
    return rows, checked_targets(y, len(rows))


def _names(result: FitResult, given: Sequence[str] | None) -> list[str]:
    d = result.params.experts.shape[-1]
    names = given if given is not None else result.diagnostics.get("input_names")
    names = [f"x{j + 1}" for j in range(d)] if names is None else [str(name) for name in names]
    require(len(names) == d, "feature_names", f"{d} names", len(names))
    return names


def _target(result: FitResult, given: str | None) -> str:
    return str(given if given is not None else result.diagnostics.get("target_name", "y"))
