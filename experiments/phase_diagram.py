"""Where does each method succeed: over (k, n/d) at one noise level, and over (noise, n/d) at one k?"""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moejax.reproduce import HEAT_MAP, Experiment, Number, draw_heat_map, estimates

NOISE_STD = 0.1
"""Noise level of the maps over k."""
SPECTRAL_START, RANDOM_START = "spectral_em", "joint_em"
DIFFERENCE_MAP = "PuOr"

_CELL = (
    "num_experts == {} and noise_std == 0.1 and num_samples == {} and activation == '{}' and method == '{}'"
)
NUMBERS = {
    f"{method}_{activation}": Number(_CELL.format(8, 8000, activation, method), statistic="success_rate")
    for method in ("spectral_em", "joint_em", "gradient_nll", "multistart")
    for activation in ("linear", "tanh")
}
NUMBERS |= {
    f"{method}_few": Number(_CELL.format(4, 500, "tanh", method), statistic="success_rate")
    for method in ("spectral_em", "joint_em", "multistart", "gradient_nll")
}


def _map_over_noise(table):
    """The rows of the maps over noise: the rows of the k that has several noise levels."""
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
    figure = Figure(figsize=(2.1 * (len(methods) + 1) + 1.6, 1.75 * len(rows) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(methods) + 1, squeeze=False)
    share, difference = Normalize(0, 1), Normalize(-1, 1)
    for i, (activation, field, part, fixed, label) in enumerate(rows):
        summary = estimates(part[part["activation"] == activation], [field, "num_samples", "dim"])
        summary = summary.assign(ratio=summary["num_samples"] / summary["dim"])
        images = {
            method: here.pivot_table(index=field, columns="ratio", values="success_rate")
            for method, here in summary.groupby("method")
        }
        for axis, method in zip(grid[i], methods, strict=False):
            draw_heat_map(axis, images[method], share, texts=images[method].map(lambda v: f"{100 * v:.0f}"))
            if i == 0:
                axis.set_title(method, fontsize=10)
        gain = images[SPECTRAL_START] - images[RANDOM_START]
        texts = gain.map(lambda v: f"{100 * v:+.0f}")
        draw_heat_map(grid[i, -1], gain, difference, DIFFERENCE_MAP, texts)
        grid[i, 0].set_ylabel(f"g = {activation}, {fixed}\n{label}", fontsize=9)
    grid[0, -1].set_title(f"{SPECTRAL_START} less\n{RANDOM_START}", fontsize=10)
    figure.supxlabel("samples per dimension n/d", fontsize=10)
    keys = ["method", "activation", "num_experts", "noise_std", "num_samples"]
    trials, d = int(table.groupby(keys).size().min()), table["dim"].iloc[0]
    bar = figure.colorbar(ScalarMappable(share, HEAT_MAP), ax=grid, shrink=0.6)
    bar.set_label(f"success rate (error < 0.02); Monte Carlo standard error at most {0.5 / trials**0.5:.2f}")
    bar = figure.colorbar(ScalarMappable(difference, DIFFERENCE_MAP), ax=grid, shrink=0.6)
    bar.set_label("difference of two success rates, paired by data")
    figure.suptitle(f"Share of {trials} trials that succeed, in % (d = {d})", fontsize=11)
    return figure


EXPERIMENT = Experiment(
    part="b. Where do random starts fail, and where do they not?",
    place=2,
    spec="sweeps/phase-diagram.toml",
    quick={
        "methods": ["spectral_em", "joint_em"],
        "trials": 10,
        "activation": ["linear"],
        "num_experts": [2, 3],
        "noise_std": [0.1, 0.4],
        "num_samples": [2400, 4000],
        "pad_samples_to": [],
    },
    numbers=NUMBERS,
    shows=(
        "At k = 8 and n/d = 800 the shares of successful trials (linear, tanh) are {spectral_em_linear}, "
        "{spectral_em_tanh} for spectral_em, {joint_em_linear}, {joint_em_tanh} for joint EM from one random start, "
        "{gradient_nll_linear}, {gradient_nll_tanh} for gradient descent on the likelihood and {multistart_linear}, "
        "{multistart_tanh} for the search from 8 random starts; with few samples, at k = 4, n/d = 50 and tanh, "
        "spectral_em has {spectral_em_few}, the search {multistart_few}, joint EM {joint_em_few} and gradient descent "
        "{gradient_nll_few}."
    ),
    shows_not=(
        "It does not show joint EM or the gradient methods from several random starts, nor the search from more than 8 "
        "random starts, nor other dimensions: all maps have the same d."
    ),
    figure=figure,
)
