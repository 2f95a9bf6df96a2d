"""Where does each method succeed: over (k, n/d) at one noise level, and over (noise, n/d) at one k?"""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moejax.claims import Number
from moejax.sweep.figures import HEAT_MAP
from moejax.sweep.summary import estimates

SPEC = "sweeps/phase-diagram.toml"
QUICK = {
    "trials": 10,
    "dim": 10,
    "activation": ["linear"],
    "num_experts": [2, 3],
    "noise_std": [0.1, 0.4],
    "num_samples": [2400, 4000],
}
NOISE_STD = 0.1
"""Of the maps over k."""

_HARD = "num_experts == 8 and noise_std == 0.1"
NUMBERS = {
    f"{method}_{activation}": Number(
        f"{_HARD} and num_samples == 16000 and activation == '{activation}' and method == '{method}'",
        statistic="success_rate",
    )
    for method in ("spectral_em", "joint_em")
    for activation in ("linear", "tanh")
}
NUMBERS |= {
    f"{method}_few": Number(
        f"num_experts == 4 and noise_std == 0.1 and num_samples == 1000 and activation == 'tanh' and method == '{method}'",
        statistic="success_rate",
    )
    for method in ("spectral_em", "joint_em")
}
SHOWS = (
    "At k = 8 and n/d = 800 the shares of successful trials are {spectral_em_linear} (linear) and {spectral_em_tanh} "
    "(tanh) for spectral_em and {joint_em_linear} and {joint_em_tanh} for joint EM from one random start; with few "
    "samples, at k = 4, n/d = 50 and tanh, they are {spectral_em_few} and {joint_em_few}."
)
SHOWS_NOT = "It does not show several random starts, nor another dimension: every map is at one d."


def _map_over_noise(table):
    """The rows of the maps over noise: those of the k that has several noise levels."""
    counts = table.groupby("num_experts")["noise_std"].nunique()
    return table[table["num_experts"] == counts.idxmax()]


def figure(table):
    methods, activations = (list(dict.fromkeys(table[name])) for name in ("method", "activation"))
    k = int(_map_over_noise(table)["num_experts"].iloc[0])
    kinds = [
        ("num_experts", table[table["noise_std"] == NOISE_STD], f"σ = {NOISE_STD:g}", "number of experts k"),
        ("noise_std", _map_over_noise(table), f"k = {k}", "noise σ"),
    ]
    rows = [(activation, *kind) for kind in kinds for activation in activations]
    figure = Figure(figsize=(2.6 * len(methods) + 2.2, 2.3 * len(rows) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(methods), squeeze=False)
    for i, (activation, field, part, fixed, label) in enumerate(rows):
        summary = estimates(part[part["activation"] == activation], [field, "num_samples", "dim"])
        summary = summary.assign(ratio=summary["num_samples"] / summary["dim"])
        for j, method in enumerate(methods):
            axis = grid[i, j]
            here = summary[summary["method"] == method]
            image = here.pivot_table(index=field, columns="ratio", values="success_rate")
            values = image.to_numpy(dtype=float)
            axis.pcolormesh(values, cmap=HEAT_MAP, norm=Normalize(0, 1), edgecolors="white", linewidth=0.5)
            for (y, x), value in np.ndenumerate(values):
                colour = "black" if value > 0.55 else "white"
                axis.text(
                    x + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour
                )
            axis.set_xticks(
                np.arange(len(image.columns)) + 0.5, [f"{ratio:g}" for ratio in image.columns], fontsize=8
            )
            axis.set_yticks(
                np.arange(len(image.index)) + 0.5, [f"{value:g}" for value in image.index], fontsize=8
            )
            axis.set_title(f"{method}: g = {activation}, {fixed}", fontsize=9)
            if j == 0:
                axis.set_ylabel(label)
            if i == len(rows) - 1:
                axis.set_xlabel("samples per dimension n/d")
    trials, d = (
        int(table.groupby(["method", "activation", "num_experts", "noise_std", "num_samples"]).size().min()),
        table["dim"].iloc[0],
    )
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), HEAT_MAP), ax=grid, shrink=0.6)
    bar.set_label(f"success rate (error < 0.02); MCSE at most {0.5 / trials**0.5:.2f}")
    figure.suptitle(f"Share of {trials} trials that succeed, in % (d = {d})", fontsize=11)
    return figure
