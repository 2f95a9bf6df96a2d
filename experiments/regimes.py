"""Where should one use which method, over the number of experts, the dimension and the samples for each dimension?

Not a sweep: the methods of a cell have the same trials, as many as their paired differences of success need.
"""

import functools
import time

import jax
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

import moejax
from moejax.likelihood.predictors import num_free_parameters
from moejax.model.metrics import SUCCESS_THRESHOLD
from moejax.reproduce import HEAT_MAP, Experiment, Number, draw_heat_map
from moejax.sweep.trial import AlgorithmSettings, DataSettings, draw_trial, prepare, run_trials

OURS = "spectral_em"
RIVALS = ("joint_em", "gradient_nll")
METHODS = (OURS, *RIVALS)
SEARCH = "multistart"
SERIES = (*METHODS, SEARCH)
NAMES = {
    "spectral_em": "moments and EM\n(spectral_em)",
    "joint_em": "joint EM,\nbest of 4",
    "gradient_nll": "gradient descent,\nbest of 4",
    "multistart": "default search,\nwhere it was run",
}
LARGEST_RATIO = 300
"""All samples of a shape are padded to this many for each dimension, and share their programs."""
DIFFERENCE_MAP = "PuOr"


def sizes_of(shape):
    """(d, k) of a shape written "dxk"."""
    dim, num_experts = shape.split("x")
    return int(dim), int(num_experts)


def _paired(ours, theirs):
    """Difference of two shares of success on the same trials, and its standard error."""
    difference = ours.astype(float) - theirs
    n = difference.size
    return difference.mean(), np.sqrt(max((difference**2).mean() - difference.mean() ** 2, 0.0) / n)


@functools.cache
def _prepared(cell):
    """Method -> (spec, hyperparameters) of a cell, a tuple of its items."""
    values = dict(cell)
    dim, num_experts = sizes_of(values["shape"])
    data = DataSettings(
        activation=values["activation"],
        dim=dim,
        num_experts=num_experts,
        num_samples=dim * values["ratio"],
        noise_std=values["noise_std"],
    )
    prepared = {}
    for method in METHODS:
        starts = None if method == OURS else values["random_starts"]
        algorithm = AlgorithmSettings(
            method=method,
            num_starts=starts,
            max_iterations=values["max_iterations"],
            noise_knowledge="estimated",
        )
        prepared[method] = prepare(data, algorithm, dim * max(LARGEST_RATIO, values["ratio"]))
    return prepared


_draw_trial = jax.jit(draw_trial, static_argnames="spec")


def _search(cell, spec, hyperparameters, key):
    """(recovery error, passes) of `moejax.fit` with its defaults on the data of a trial."""
    data = jax.device_get(_draw_trial(key, hyperparameters, spec=spec))
    n = int(hyperparameters.num_samples)
    fitted = moejax.fit(
        data.method_key,
        data.x[:n],
        data.y[:n],
        num_experts=spec.fit_num_experts,
        activation=cell["activation"],
    )
    error = float(moejax.recovery_error(data.truth.experts, fitted.params.experts))
    return error, fitted.diagnostics["num_passes"]


def run_cell(cell):
    """One row per method and trial."""
    dim, num_experts = sizes_of(cell["shape"])
    if dim * cell["ratio"] <= num_free_parameters(num_experts, dim, "shared", fit_intercept=False):
        return pd.DataFrame([{"status": 0, "reason": "left out: no more samples than parameters"}])
    prepared = _prepared(tuple(sorted((k, v) for k, v in cell.items() if not isinstance(v, list))))
    rows, success = [], {method: np.zeros(0, bool) for method in METHODS}
    for begin, end in zip([0, *cell["looks"]], cell["looks"], strict=False):
        searched = (
            range(begin, min(end, cell["search_trials"])) if cell["shape"] in cell["search_shapes"] else ()
        )
        for method in SERIES:
            spec, hyperparameters = prepared.get(method, prepared[OURS])
            stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], hyperparameters)
            for trial in searched if method == SEARCH else range(begin, end):
                key = jax.random.fold_in(jax.random.key(cell["seed"]), trial)
                started = time.process_time()
                if method == SEARCH:
                    error, passes = _search(cell, spec, hyperparameters, key)
                else:
                    result = jax.device_get(run_trials(key[None], stacked, spec))
                    error, passes = float(result.recovery_error[0]), int(result.num_iterations[0])
                    success[method] = np.append(success[method], error < SUCCESS_THRESHOLD)
                rows.append(
                    {
                        "method": method,
                        "trial": trial,
                        "recovery_error": error,
                        "num_iterations": passes,
                        "seconds": time.process_time() - started,
                    }
                )
        errors = [_paired(success[OURS], success[method])[1] for method in RIVALS]
        if max(errors) <= cell["largest_error"]:
            break
    return pd.DataFrame(rows)


def summary(table):
    """One row per cell and method: its share of success, and the paired difference of moments with EM to it."""
    rows = []
    table = table[table["method"].notna()]
    for (shape, ratio), part in table.groupby(["shape", "ratio"], sort=False):
        dim, k = sizes_of(shape)
        success = part.assign(success=part["recovery_error"] < SUCCESS_THRESHOLD)
        success = success.pivot_table(index="trial", columns="method", values="success")
        for method in [method for method in SERIES if method in success]:
            both = success[[OURS, method]].dropna().to_numpy(bool)
            difference, error = _paired(both[:, 0], both[:, -1])
            rows.append(
                {
                    "dim": dim,
                    "num_experts": k,
                    "ratio": int(ratio),
                    "method": method,
                    "trials": len(both),
                    "success": success[method].mean(),
                    "difference": difference,
                    "difference_se": error,
                    "better": difference > 2 * max(error, 1e-9),
                    "worse": difference < -2 * max(error, 1e-9),
                    "passes": part.loc[part["method"] == method, "num_iterations"].mean(),
                    "seconds": part.loc[part["method"] == method, "seconds"].median(),
                }
            )
    return pd.DataFrame(rows)


def _text_of_difference(row):
    return f"{100 * row.difference:+.0f}\n±{100 * row.difference_se:.0f}" if row.difference_se else "0"


def figure(table):
    values = summary(table)
    values = values.assign(
        share_text=[f"{100 * share:.0f}" for share in values["success"]],
        difference_text=[_text_of_difference(row) for row in values.itertuples()],
    )
    dims, ratios = (sorted(set(values[name])) for name in ("dim", "ratio"))
    share, difference = Normalize(0, 1), Normalize(-1, 1)
    figure = Figure(figsize=(11.5, 1.9 * len(dims) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(dims), len(SERIES) + len(RIVALS), squeeze=False)
    for i, dim in enumerate(dims):
        here = values[values["dim"] == dim]
        sizes = sorted(set(here["num_experts"]))

        def image_of(method, column, here=here, sizes=sizes):
            rows = here[here["method"] == method]
            return rows.pivot(index="num_experts", columns="ratio", values=column).reindex(
                sizes, columns=ratios
            )

        for j, method in enumerate(SERIES):
            draw_heat_map(
                grid[i, j], image_of(method, "success"), share, texts=image_of(method, "share_text")
            )
            if i == 0:
                grid[i, j].set_title(NAMES[method], fontsize=8)
        for j, method in enumerate(RIVALS, start=len(SERIES)):
            image, texts = (image_of(method, column) for column in ("difference", "difference_text"))
            draw_heat_map(grid[i, j], image, difference, DIFFERENCE_MAP, texts)
            if i == 0:
                grid[i, j].set_title("moments and EM less\n" + NAMES[method].split(",")[0], fontsize=8)
        grid[i, 0].set_ylabel(f"d = {dim}\nnumber of experts k", fontsize=9)
    figure.supxlabel("samples per dimension n/d", fontsize=10)
    bar = figure.colorbar(ScalarMappable(share, HEAT_MAP), ax=grid, shrink=0.6)
    bar.set_label("success rate (error < 0.02)")
    bar = figure.colorbar(ScalarMappable(difference, DIFFERENCE_MAP), ax=grid, shrink=0.6)
    bar.set_label("paired difference of success ± standard error")
    least, most = values["trials"].min(), values["trials"].max()
    figure.suptitle(
        f"Share of {least} to {most} trials that succeed, in % (g = tanh, σ = 0.1, unknown)", fontsize=11
    )
    return figure


SEARCHED = "shape in ['10x2', '10x4', '20x4'] and trial < 6"
"""The trials that the search has too."""
_FEW = "shape in ['10x4', '20x4', '50x4'] and ratio == 30"


def _count(method, column):
    return Number(f"method == '{method}' and {column} == True", "trials", "count", "summary.csv")


EXPERIMENT = Experiment(
    part="b. Where do random starts fail, and where do they not?",
    place=1,
    spec="sweeps/regimes.toml",
    quick={"looks": [4], "shape": ["10x2"], "ratio": [100], "max_iterations": 50, "search_shapes": []},
    program=("activation", "shape"),
    precision="float32",
    numbers={
        f"{short}_{column}": _count(method, column)
        for short, method in (("em", "joint_em"), ("adam", "gradient_nll"))
        for column in ("better", "worse")
    }
    | {
        short: Number(f"{SEARCHED} and method == '{method}'", statistic="success_rate")
        for short, method in (("search", SEARCH), ("ours_there", OURS), ("adam_there", "gradient_nll"))
    }
    | {
        f"few_{short}": Number(f"{_FEW} and method == '{method}'", statistic="success_rate")
        for short, method in (("ours", OURS), ("em", "joint_em"), ("adam", "gradient_nll"))
    }
    | {
        "cells": Number("method == 'joint_em'", "trials", "count", "summary.csv"),
        "searched": Number(f"method == '{SEARCH}'", "trials", "count", "summary.csv"),
        "search_seconds": Number(f"method == '{SEARCH}'", "seconds", "maximum", "summary.csv"),
    },
    shows=(
        "Of {cells} cells, moments with EM succeed more often than the best of four random starts of joint EM in {em_better} "
        "and less often in {em_worse}, beyond two standard errors; than gradient descent from four starts in {adam_better} and "
        "in {adam_worse}; with up to four experts and a hundred samples or more for each input all succeed, so take moments "
        "with EM, which need no luck with starts; elsewhere take gradient descent from several starts, or the default search, "
        "which tries it too: with four experts and n/d = 30 moments with EM succeed in {few_ours} of the trials, joint EM in "
        "{few_em} and gradient descent in {few_adam}; in the {searched} cells where the search was run, of up to four experts "
        "and twenty inputs, it succeeds in {search}, gradient descent in {adam_there} and moments with EM in {ours_there}; the "
        "median time of a trial of it is at most {search_seconds} s in a cell."
    ),
    shows_not=(
        "It does not show other activations, noises or gates, nor the default search with more experts or inputs, where "
        "it takes up to minutes for a trial; the seconds and passes of the methods are in the summary."
    ),
    figure=figure,
    summary=summary,
    run_cell=run_cell,
)
