"""How fast does each method improve with the sample size, for every activation?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.stats

from moejax.likelihood import fisher_information
from moejax.model import (
    InstanceScales,
    activation_facts,
    bottleneck_assignment,
    expert_distances,
    get_activation,
    random_params,
    standard_normal,
)
from moejax.reproduce import Experiment, Number, estimates, line_figure

SLOPE_FROM = 2000
"""Least sample size of the fits of slopes; below, moments are of little use."""
BOUND_INSTANCES, BOUND_DRAWS, BOUND_INPUTS = 20, 20, 8192
"""For the Cramer-Rao line: random instances, estimates drawn for each, and inputs over which the information is averaged."""


@functools.partial(jax.jit, static_argnames=("activation", "dim", "num_experts"))
def _efficient_errors(key_data, scales, sizes, activation, dim, num_experts):
    """(sizes, instances * draws): recovery errors of estimates drawn from N(truth, (n I)^-1), I the information of one sample."""
    even = activation_facts(get_activation(activation)).parity == "even"

    def instance(key_data):
        truth_key, input_key, draw_key = jax.random.split(jax.random.wrap_key_data(key_data), 3)
        truth = random_params(truth_key, scales, dim)
        x = standard_normal(input_key, (BOUND_INPUTS, dim), scales.noise_std.dtype)
        information = (
            fisher_information(truth, x, activation, noise="known", fit_intercept=False) / BOUND_INPUTS
        )
        root = jnp.linalg.cholesky(jnp.linalg.inv(information))[: num_experts * dim]
        normals = standard_normal(draw_key, (BOUND_DRAWS, information.shape[0]), x.dtype)
        shifts = (normals @ root.T).reshape(BOUND_DRAWS, num_experts, dim)

        def error(pair):
            shift, size = pair
            return bottleneck_assignment(
                expert_distances(truth.experts, truth.experts + shift / jnp.sqrt(size), even)
            )[0]

        def at_size(size):
            return jax.lax.map(error, (shifts, jnp.full(BOUND_DRAWS, size)))

        return jax.lax.map(at_size, sizes)

    errors = jax.lax.map(instance, key_data)
    return jnp.moveaxis(errors, 1, 0).reshape(sizes.shape[0], -1)


def efficient_error(activation, sizes, *, dim, num_experts, noise_std):
    """Median recovery error at each n of an estimator that attains the Cramer-Rao bound, asymptotically normal."""
    with jax.enable_x64(True):
        values = (noise_std, 1.0, 90.0, 0.0)
        scales = InstanceScales(*(np.asarray(v, np.float64) for v in values), np.ones(num_experts))
        keys = np.stack([np.array([7, i], np.uint32) for i in range(BOUND_INSTANCES)])
        errors = _efficient_errors(keys, scales, np.asarray(sizes, np.float64), activation, dim, num_experts)
        return np.median(np.asarray(errors), axis=1)


def extend(table, folder):
    """A column with the median error that the Cramer-Rao bound allows at the row's activation and n."""
    bound = {}
    for activation in dict.fromkeys(table["activation"]):
        sizes = sorted(set(table["num_samples"]))
        dim, num_experts, noise_std = (table[name].iloc[0] for name in ("dim", "num_experts", "noise_std"))
        errors = efficient_error(
            activation, sizes, dim=int(dim), num_experts=int(num_experts), noise_std=noise_std
        )
        bound |= {(activation, size): error for size, error in zip(sizes, errors, strict=True)}
    keys = zip(table["activation"], table["num_samples"], strict=True)
    column = [bound[key] for key in keys]
    table = table.copy()
    table.insert(table.columns.get_loc("status"), "cramer_rao_error", column)
    return table


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
        title="Recovery error against sample size (d = 10, k = 3, σ = 0.1); dotted: Cramér-Rao; slope ± half its 95 % interval",
    )
    slopes = summary(table)
    bound = table.groupby(["activation", "num_samples"], sort=False)["cramer_rao_error"].first()
    for axis in (axis for axis in figure.axes if axis.get_visible()):
        line = bound[axis.get_title().removeprefix("g = ")].sort_index()
        axis.plot(line.index, line, color="black", linestyle=":", linewidth=1.4, zorder=4)
        here = slopes[slopes["activation"] == axis.get_title().removeprefix("g = ")]
        lines = [
            f"{row.method}: {row.slope:.2f} ± {(row.slope_upper - row.slope_lower) / 2:.2f}"
            for row in here.itertuples()
        ]
        axis.text(0.03, 0.03, "\n".join(lines), transform=axis.transAxes, fontsize=7, va="bottom")
    return figure


EXPERIMENT = Experiment(
    part="a. Does it recover the truth, and at which rate?",
    spec="sweeps/sample-size.toml",
    quick={"trials": 10, "activation": ["linear", "tanh"], "num_samples": [2400, 4000], "pad_samples_to": []},
    numbers={
        f"{method}_{activation}": Number(
            f"activation == '{activation}' and method == '{method}'",
            "slope",
            "value",
            "summary.csv",
            "slope_se",
        )
        for method in ("spectral", "spectral_em")
        for activation in ("linear", "relu", "sigmoid", "cos")
    },
    shows=(
        "The slope of log error in log n is {spectral_linear} (linear), {spectral_relu} (relu), {spectral_sigmoid} "
        "(sigmoid) and {spectral_cos} (cos) for moments alone and {spectral_em_linear}, {spectral_em_relu}, "
        "{spectral_em_sigmoid} and {spectral_em_cos} for spectral_em: the rate 1/n is a slope of minus one, and "
        "a steeper slope means that the smallest samples are worse than their rate."
    ),
    shows_not=(
        "It does not show the rate of moments at small n, where their error is not yet small, nor any other d, k or "
        "noise."
    ),
    figure=figure,
    summary=summary,
    extend=extend,
)
