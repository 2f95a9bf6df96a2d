"""How fast does each method improve with the sample, for every activation?"""

import numpy as np
import pandas as pd
import scipy.stats

from moejax.claims import Number
from moejax.sweep.figures import line_figure
from moejax.sweep.summary import estimates

SPEC = "sweeps/sample-size.toml"
QUICK = {"trials": 10, "activation": ["linear", "tanh"], "num_samples": [2400, 4000]}
SLOPE_FROM = 2000
"""Slopes are fitted over samples of at least this size: below, moments are of little use."""

NUMBERS = {
    f"{method}_{activation}": Number(
        f"activation == '{activation}' and method == '{method}'", "slope", "value", "summary.csv", "slope_se"
    )
    for method in ("spectral", "spectral_em")
    for activation in ("linear", "relu", "sigmoid", "cos")
}
SHOWS = (
    "The slope of log error in log n is {spectral_linear} (linear), {spectral_relu} (relu), {spectral_sigmoid} "
    "(sigmoid) and {spectral_cos} (cos) for moments alone and {spectral_em_linear}, {spectral_em_relu}, "
    "{spectral_em_sigmoid} and {spectral_em_cos} for spectral_em: the rate 1/n is a slope of minus one."
)
SHOWS_NOT = "It does not show the rate of moments at small n, where their error is not yet small, nor any other d, k or noise."


def summary(table):
    """Least squares of log error on log n over trials: slope, its standard error and 95 % interval."""
    rows = []
    usable = table[(table["num_samples"] >= SLOPE_FROM) & (table["recovery_error"] > 0)]
    for (activation, method), part in usable.groupby(["activation", "method"], sort=False):
        fit = scipy.stats.linregress(np.log(part["num_samples"]), np.log(part["recovery_error"]))
        half = scipy.stats.t.ppf(0.975, len(part) - 2) * fit.stderr
        rows.append(
            (activation, method, fit.slope, fit.stderr, fit.slope - half, fit.slope + half, len(part))
        )
    names = ["activation", "method", "slope", "slope_se", "slope_lower", "slope_upper", "trials"]
    return pd.DataFrame(rows, columns=names)


def figure(table):
    figure = line_figure(
        estimates(table, ["activation", "num_samples"]),
        "num_samples",
        columns="activation",
        wrap=5,
        title="Recovery error against sample size (d = 10, k = 3, σ = 0.1); fitted slope ± half its 95 % interval",
    )
    slopes = summary(table)
    for axis in figure.axes:
        here = slopes[slopes["activation"] == axis.get_title().removeprefix("g = ")]
        lines = [
            f"{row.method}: {row.slope:.2f} ± {(row.slope_upper - row.slope_lower) / 2:.2f}"
            for row in here.itertuples()
        ]
        axis.text(0.03, 0.03, "\n".join(lines), transform=axis.transAxes, fontsize=7, va="bottom")
    return figure
