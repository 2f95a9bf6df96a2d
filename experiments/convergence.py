"""How do the errors of experts and gates fall, pass by pass?"""

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.reproduce import COLOURS, Experiment, Number
from moejax.sweep import load_arrays

SMALLEST_GAP = 1e-4
"""Smaller gaps, in nats, are drawn at this value, because a sum over thousands of samples in float32 has rounding errors."""
PASSES = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128)
"""Passes at which errors are kept; after its last pass a run does not change."""
LABELS = {
    "gap": "log-likelihood below\nthe run's best (nats)",
    "recovery_error": "recovery error of experts",
    "gating_error": "relative error of gates",
}


def extend(table, folder):
    """Passes of every trial; at the chosen passes the remaining gain in log-likelihood and, if paths are recorded, the errors."""
    histories, paths = load_arrays(folder), load_arrays(folder, "path")
    records = []
    for key in zip(table["result_hash"], table["trial"], strict=True):
        history = histories[key].astype(float)
        kept = np.isfinite(history)
        values = {"gap": history[kept].max(initial=-np.inf) - history[kept]}
        if key in paths:
            values |= dict(
                zip(("recovery_error", "gating_error"), paths[key][kept].astype(float).T, strict=True)
            )
        at = {
            f"{name}_at_{p}": series[min(p, series.size) - 1] if series.size else np.nan
            for name, series in values.items()
            for p in PASSES
        }
        records.append({"passes": int(kept.sum()), **at})
    extra = pd.DataFrame(records, index=table.index)
    place = table.columns.get_loc("status")
    return pd.concat([table.iloc[:, :place], extra, table.iloc[:, place:]], axis=1)


def figure(table):
    activations, sizes = (list(dict.fromkeys(table[name])) for name in ("activation", "num_experts"))
    methods = list(dict.fromkeys(table["method"]))
    recorded = [name for name in ("recovery_error", "gating_error") if f"{name}_at_1" in table]
    quantities = recorded or ["gap"]
    rows = [(name, k) for name in quantities for k in sizes]
    size = (max(6.4, 3.0 * len(activations) + 1), max(4.2, 2.2 * len(rows) + 1.2))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(activations), squeeze=False, sharex=True)
    for i, (name, k) in enumerate(rows):
        for j, activation in enumerate(activations):
            axis = grid[i, j]
            here = table[(table["num_experts"] == k) & (table["activation"] == activation)]
            for number, method in enumerate(methods):
                values = here.loc[here["method"] == method, [f"{name}_at_{p}" for p in PASSES]].to_numpy()
                low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
                floor = SMALLEST_GAP if name == "gap" else 0.0
                low, middle, high = (np.maximum(v, floor) for v in (low, middle, high))
                colour = COLOURS[number % len(COLOURS)]
                axis.plot(PASSES, middle, color=colour, label=method if i + j == 0 else None)
                axis.fill_between(PASSES, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(f"g = {activation}, k = {k}", fontsize=10)
            axis.grid(color="#dddddd", linewidth=0.6)
        grid[i, 0].set_ylabel(LABELS[name], fontsize=9)
    figure.supxlabel("pass over the data", fontsize=11)
    n = int(table["num_samples"].iloc[0])
    figure.legend(
        loc="outside upper center",
        ncols=len(methods),
        frameon=False,
        title=f"Convergence: median and quartiles over trials (d = 10, n = {n}, σ = 0.1)",
    )
    return figure


EXPERIMENT = Experiment(
    part="c. What does it cost?",
    place=1,
    spec="sweeps/convergence.toml",
    quick={
        "trials": 10,
        "activation": ["linear"],
        "num_experts": [3],
        "num_samples": 4000,
        "methods": ["spectral_em", "joint_em", "gradient_nll"],
    },
    numbers={
        f"{method}_{activation}": Number(
            f"activation == '{activation}' and num_experts == 3 and method == '{method}'", "passes", "mean"
        )
        for method in ("spectral_em", "joint_em")
        for activation in ("linear", "relu", "sigmoid")
    },
    shows=(
        "With k = 3 the mean number of passes is {spectral_em_linear} (linear), {spectral_em_relu} (relu) and "
        "{spectral_em_sigmoid} (sigmoid) for spectral_em, and {joint_em_linear}, {joint_em_relu} and {joint_em_sigmoid} "
        "for joint EM from one random start."
    ),
    shows_not=(
        "It does not show the cost of the moments, which are two passes more, nor whether the likelihood that is reached "
        "is the best one: a run that ends at a poor optimum has converged too."
    ),
    figure=figure,
    extend=extend,
)
