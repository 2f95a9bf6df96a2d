"""How many passes over the data does each method make before its likelihood stands still?"""

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.claims import Number
from moejax.sweep import load_arrays
from moejax.sweep.figures import COLOURS

SPEC = "sweeps/convergence.toml"
QUICK = {"trials": 10, "activation": ["linear"], "num_experts": [3], "num_samples": 4000}
SMALLEST_GAP = 1e-4
"""Nats, below which gaps are drawn as this: single precision sums thousands of samples."""

NUMBERS = {
    f"{method}_{activation}": Number(
        f"activation == '{activation}' and num_experts == 3 and method == '{method}'", "passes"
    )
    for method in ("spectral_em", "joint_em")
    for activation in ("linear", "relu", "sigmoid")
}
SHOWS = (
    "With k = 3 the median number of passes is {spectral_em_linear} (linear), {spectral_em_relu} (relu) and "
    "{spectral_em_sigmoid} (sigmoid) for spectral_em, and {joint_em_linear}, {joint_em_relu} and {joint_em_sigmoid} for "
    "joint EM from one random start."
)
SHOWS_NOT = (
    "It does not show the cost of the moments, which are one pass more, nor whether the likelihood that is reached is "
    "the best one: a run that ends at a poor optimum has converged too."
)


def extend(table, folder):
    """The number of passes of every trial, and the gap of the log-likelihood at chosen passes (gap_1, gap_2, gap_4, ..)."""
    histories = load_arrays(folder)
    records = []
    for key in zip(table["result_hash"], table["trial"], strict=True):
        history = histories[key]
        history = history[np.isfinite(history)].astype(float)
        gaps = history.max() - history if history.size else np.array([np.nan])
        at = {f"gap_{p}": gaps[min(p, gaps.size) - 1] if history.size else np.nan for p in _passes(128)}
        records.append({"passes": history.size, **at})
    extra = pd.DataFrame(records, index=table.index)
    place = table.columns.get_loc("status")
    return pd.concat([table.iloc[:, :place], extra, table.iloc[:, place:]], axis=1)


def _passes(most):
    return [p for p in (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128) if p <= most]


def figure(table):
    activations, sizes = (list(dict.fromkeys(table[name])) for name in ("activation", "num_experts"))
    methods = list(dict.fromkeys(table["method"]))
    figure = Figure(
        figsize=(max(6.4, 3.0 * len(activations) + 1), max(4.2, 2.5 * len(sizes) + 1.2)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(sizes), len(activations), squeeze=False, sharex=True, sharey=True)
    passes = _passes(128)
    for i, k in enumerate(sizes):
        for j, activation in enumerate(activations):
            axis = grid[i, j]
            here = table[(table["num_experts"] == k) & (table["activation"] == activation)]
            for number, method in enumerate(methods):
                gaps = here.loc[here["method"] == method, [f"gap_{p}" for p in passes]].to_numpy()
                low, middle, high = np.maximum(np.nanquantile(gaps, [0.25, 0.5, 0.75], axis=0), SMALLEST_GAP)
                axis.plot(passes, middle, color=COLOURS[number], label=method if i + j == 0 else None)
                axis.fill_between(passes, low, high, color=COLOURS[number], alpha=0.25, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(f"g = {activation}, k = {k}", fontsize=10)
            axis.grid(color="#dddddd", linewidth=0.6)
    figure.supxlabel("pass over the data", fontsize=11)
    figure.supylabel("log-likelihood below the run's best (nats)", fontsize=11)
    n = int(table["num_samples"].iloc[0])
    figure.legend(
        loc="outside upper center",
        ncols=len(methods),
        frameon=False,
        title=f"Convergence: median and quartiles over trials (d = 10, n = {n}, σ = 0.1)",
    )
    return figure
