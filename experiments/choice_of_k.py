"""How often do BIC, ICL and the evidence choose the true number of experts?

Not a recovery sweep: every trial plants a number of experts, fits one number after another by `moejax.fit`, and lets each criterion
choose from the tables `FitResult.selection`.
"""

import jax
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

import moejax
from moejax.model import get_activation
from moejax.reproduce import COLOURS, MARKERS, Experiment, Number

RISES = 2
"""No more experts are tried after so many numbers whose BIC is not the least so far, as with num_experts="auto"."""
BIC, ICL = "BIC of the mixture", "ICL of the mixture"
EVIDENCE, MEAN_BIC = "evidence of the mean", "BIC of the mean"
CRITERIA = (BIC, ICL, EVIDENCE, MEAN_BIC)
KEYS = ["density", "activation", "noise_std", "num_samples", "criterion"]
DODGE, BAR = 1.06, 1.25
"""Factors between the places of neighbouring points, and of neighbouring bars, on the logarithmic axis."""
SHARES = ("right_share", "too_few_share", "too_many_share")


def planted(cell, trial):
    """x (n, d), y (n,): orthonormal experts in random directions, gates orthogonal to them; the last gate is zero."""
    density, activation, noise_std = cell["case"]
    k, d, n = (cell[name] for name in ("true_num_experts", "dim", "num_samples"))
    random = np.random.default_rng([cell["seed"], trial, k, n])
    frame = np.linalg.qr(random.normal(size=(d, d)))[0].T
    gating = np.zeros((k, d))
    gating[:-1] = cell["gating_norm"] * frame[k : 2 * k - 1]
    x = random.normal(size=(n, d))
    means = np.asarray(get_activation(activation)(x @ frame[:k].T))
    logits = x @ gating.T
    gates = np.exp(logits - logits.max(axis=1, keepdims=True))
    gates /= gates.sum(axis=1, keepdims=True)
    chosen = np.argmax(logits + random.gumbel(size=logits.shape), axis=1)
    noiseless = (gates * means).sum(axis=1) if density == "mean" else means[np.arange(n), chosen]
    return x, noiseless + noise_std * random.normal(size=n)


def mixtures(key, x, y, most_experts, activation):
    """The rows of `FitResult.selection` of mixtures with 1, 2, .. experts, until BIC has risen RISES times."""
    tables, rises, least = [], 0, np.inf
    for k in range(1, most_experts + 1):
        fit = moejax.fit(key, x, y, num_experts=[k], activation=activation, method="spectral_em")
        tables.append(fit.selection)
        bic = float(fit.selection["bic"].iloc[0])
        rises = 0 if bic < least else rises + 1
        least = min(bic, least)
        if rises == RISES:
            break
    return pd.concat(tables, ignore_index=True)


def least(selection, criterion):
    """The number of experts with the least value of a criterion among the fits whose status is "ok"; 0 if there is none."""
    good = selection[(selection["status"] == "ok") & np.isfinite(selection[criterion])]
    return int(good.loc[good[criterion].idxmin(), "num_experts"]) if len(good) else 0


def run_cell(cell):
    """Rows: the number of experts that each criterion chooses in each trial; 0 if no fit has status "ok"."""
    density, activation, noise_std = cell["case"]
    rows = []
    for trial in range(cell["trials"]):
        x, y = planted(cell, trial)
        key = jax.random.key(trial)
        table = mixtures(key, x, y, cell["most_experts"], activation)
        chosen = {BIC: least(table, "bic"), ICL: least(table, "icl")}
        if density == "mean":
            fit = moejax.fit(
                key,
                x,
                y,
                num_experts=range(1, cell["most_experts"] + 1),
                activation=activation,
                objective="mean",
                num_starts=cell["growths"],
            )
            chosen |= {EVIDENCE: len(fit.params.experts), MEAN_BIC: least(fit.selection, "bic")}
        facts = {"density": density, "activation": activation, "noise_std": noise_std, "trial": trial}
        for criterion, number in chosen.items():
            choice = {"criterion": criterion, "chosen_num_experts": number}
            rows.append(facts | choice | verdict(number, cell["true_num_experts"]))
    return pd.DataFrame(rows)


def verdict(number, truth):
    """1.0 for the one of SHARES that is true of a choice, 0.0 for the others."""
    return dict(
        zip(SHARES, (float(number == truth), float(number < truth), float(number > truth)), strict=True)
    )


def summary(table):
    """Shares of right, too low and too high choices of each criterion, all true numbers together, with binomial standard errors."""
    rows = []
    for key, part in table.groupby(KEYS, sort=False):
        shares = part[list(SHARES)].mean().to_numpy()
        errors = np.sqrt(shares * (1 - shares) / len(part))
        rows.append((*key, *shares, *errors, len(part)))
    errors = [f"{name.removesuffix('_share')}_se" for name in SHARES]
    return pd.DataFrame(rows, columns=[*KEYS, *SHARES, *errors, "trials"])


def figure(table):
    shares = summary(table)
    cases = list(dict.fromkeys(zip(table["density"], table["activation"], table["noise_std"], strict=True)))
    cases.sort(key=lambda case: case[0] == "mean")
    figure = Figure(figsize=(max(6.4, 2.7 * len(cases) + 0.8), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(cases), squeeze=False, sharex=True, sharey="row")
    names = [name for name in CRITERIA if name in set(table["criterion"])]
    sizes = sorted(set(table["num_samples"]))
    for j, (density, activation, noise_std) in enumerate(cases):
        here = shares[
            (shares["density"] == density)
            & (shares["activation"] == activation)
            & (shares["noise_std"] == noise_std)
        ]
        top, bottom = grid[:, j]
        present = [name for name in names if name in set(here["criterion"])]
        for number, name in enumerate(present):
            part = here[here["criterion"] == name].sort_values("num_samples")
            style = {"color": COLOURS[CRITERIA.index(name)], "marker": MARKERS[CRITERIA.index(name)]}
            shift = number - (len(present) - 1) / 2
            x = part["num_samples"] * DODGE**shift
            top.errorbar(x, part["right_share"], yerr=part["right_se"], capsize=2.5, linewidth=1.4, **style)
            x = part["num_samples"] * BAR ** (1.15 * shift)
            width = x * (BAR**0.5 - BAR**-0.5)
            for side, share in ((1, "too_many"), (-1, "too_few")):
                bottom.bar(
                    x,
                    side * part[f"{share}_share"],
                    width,
                    yerr=part[f"{share}_se"],
                    color=style["color"],
                    error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": "#444444"},
                )
        top.set_title(f"{density}, g = {activation}, σ = {noise_std:g}", fontsize=10)
        top.set_ylim(-0.04, 1.04)
        bottom.axhline(0, color="black", linewidth=0.8)
        bottom.set_xscale("log")
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.set_xticks(sizes, [f"{size:,}" for size in sizes])
        bottom.set_ylim(-1.04, 1.04)
        bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
        for axis in (top, bottom):
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
    grid[0, 0].set_ylabel("share of trials with\nthe true number ± s.e.")
    grid[1, 0].set_ylabel("share ± s.e.\ntoo few ↓    ↑ too many")
    figure.supxlabel("number of samples n", fontsize=11)
    handles = [
        Line2D([], [], color=COLOURS[number], marker=MARKERS[number], label=name)
        for number, name in enumerate(CRITERIA)
        if name in names
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _right(density, noise_std, n, criterion):
    where = f"density == '{density}' and noise_std == {noise_std} and num_samples == {n} and criterion == '{criterion}'"
    return Number(where, "right_share", "value", "summary.csv", "right_se")


EXPERIMENT = Experiment(
    part="h. Is the number of experts found?",
    spec="sweeps/choice-of-k.toml",
    quick={
        "trials": 4,
        "most_experts": 3,
        "case": [["mixture", "linear", 0.1]],
        "num_samples": [1000],
        "true_num_experts": [2],
    },
    numbers={
        **{f"bic_{n}": _right("mixture", 0.5, n, BIC) for n in (500, 1500, 4500)},
        **{f"icl_{n}": _right("mixture", 0.5, n, ICL) for n in (500, 1500, 4500)},
        **{f"evidence_{n}": _right("mean", 0.3, n, EVIDENCE) for n in (500, 4500)},
        **{f"mean_{n}": _right("mean", 0.3, n, MEAN_BIC) for n in (500, 4500)},
    },
    shows=(
        "Of two, three or five linear experts at σ = 0.5, BIC finds the number in {bic_500} of the trials at n = 500, "
        "{bic_1500} at n = 1500 and {bic_4500} at n = 4500, ICL in {icl_500}, {icl_1500} and {icl_4500}; where the labels "
        "are the mean of such a mixture plus noise, its evidence finds the number in {evidence_500} at n = 500 and "
        "{evidence_4500} at n = 4500, its BIC in {mean_500} and {mean_4500}."
    ),
    shows_not=(
        "It does not show criteria of the best fits: each number of experts has one fit from the moments (a mean: one growth), "
        "and more starts would raise the likelihoods; nor data that are no mixture at all."
    ),
    program=("case", "num_samples"),
    figure=figure,
    summary=summary,
    run_cell=run_cell,
)
