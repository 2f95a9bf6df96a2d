"""How does the time of a fit grow with the number of samples n, the dimension d and the number of experts k?

Not a recovery sweep: every cell is one fit, timed after its programs are compiled. Fits "in memory" and "in batches" are calls of
`moejax.fit`, in double precision. Fits "on the device" are calls of the method, in single precision: in high dimension the inputs
fill the memory, and no copy of them is made.
"""

import mmap
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import moejax
from moejax.environment import available_cores
from moejax.methods import MethodConfig, Problem, get_method
from moejax.model import get_activation
from moejax.model.status import Status
from moejax.moments import host_transforms
from moejax.reproduce import COLOURS, MARKERS, Experiment, Number

NUMBERS_AT_ONCE = 2**22
"""Inputs that are drawn at once."""
ROWS_TO_COMPILE = 2**18
"""A fit of so many rows compiles all programs of a fit of more rows in batches."""
GOOD = 0.02
"""A recovery error below this counts as success."""
LABELS = {
    ("spectral_em", "in memory"): "spectral_em",
    ("spectral_em", "in batches"): "spectral_em, rows in batches",
    ("joint_em", "in memory"): "joint_em",
    ("spectral_em", "on the device"): "spectral_em, float32",
    ("spectral_wide", "on the device"): "spectral_wide, float32",
}
_BATCHES, _EXPERTS = "rows == 'in batches'", "axis == 'num_experts' and method == '{}'"
_WIDE, _EM_DIM = "method == 'spectral_wide'", "axis == 'dim' and method == 'spectral_em'"
AXES = {
    "num_samples": "number of samples n",
    "dim": "dimension d",
    "num_experts": "number of experts k",
}


def truth(cell, d, k):
    """(k, d) orthonormal experts, and (k, d) gates in random directions orthogonal to them; the last gate is zero."""
    random = np.random.default_rng([cell["seed"], d, k])
    experts = np.linalg.qr(random.normal(size=(d, k)))[0].T
    gating = random.normal(size=(k, d))
    gating -= (gating @ experts.T) @ experts
    gating *= cell["gating_norm"] / np.linalg.norm(gating, axis=1, keepdims=True)
    gating[-1] = 0.0
    return experts, gating


def fill(x, y, cell, experts, gating):
    """Draw the rows of x (n, d) and y (n,), block by block."""
    random = np.random.default_rng([cell["seed"], 1])
    weights = np.concatenate([experts, gating]).T.astype(np.float32)
    rows = max(NUMBERS_AT_ONCE // x.shape[1], 1)
    for first in range(0, len(y), rows):
        block = random.standard_normal((min(rows, len(y) - first), x.shape[1]), np.float32)
        means, logits = np.split(block @ weights, 2, axis=1)
        # exponential variables over their rates: the least is that of expert i with probability P_i(x)
        chosen = np.argmin(random.standard_exponential(logits.shape, np.float32) / np.exp(logits), axis=1)
        noise = random.standard_normal(len(block), np.float32)
        x[first : first + rows] = block
        y[first : first + rows] = means[np.arange(len(block)), chosen] + cell["noise_std"] * noise


def fit_in_memory(method, x, y, k):
    """(seconds, estimated experts, passes, status) of a second fit, whose programs are compiled."""
    moejax.fit(jax.random.key(0), x, y, num_experts=k, method=method)
    begun = time.perf_counter()
    result = moejax.fit(jax.random.key(1), x, y, num_experts=k, method=method)
    return time.perf_counter() - begun, result.params.experts, result.diagnostics["num_passes"], result.status


def fit_in_batches(method, x, y, k):
    """The same for rows in a file; a fit of a part of the rows compiles."""
    part = moejax.ArraySource(x[:ROWS_TO_COMPILE], y[:ROWS_TO_COMPILE])
    moejax.fit(jax.random.key(0), source=part, num_experts=k, method=method)
    begun = time.perf_counter()
    result = moejax.fit(jax.random.key(1), source=moejax.ArraySource(x, y), num_experts=k, method=method)
    return time.perf_counter() - begun, result.params.experts, result.diagnostics["num_passes"], result.status


def fit_on_device(method, x, y, k, noise_std):
    """The same for the method alone, compiled before."""
    config = MethodConfig(fn=get_activation("linear"), num_experts=k, order=3)
    transforms = host_transforms("linear", noise_std, 3, "weighted", k)
    transforms = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), transforms)
    y = jnp.asarray(y)
    problem = Problem(
        jnp.from_dlpack(x), y, jnp.ones_like(y), jnp.asarray(noise_std, jnp.float32), transforms
    )
    run = get_method(method)
    with jax.default_matmul_precision("highest"):
        program = jax.jit(lambda key, problem: run(key, problem, config))
        program = program.lower(jax.random.key(1), problem).compile()
    begun = time.perf_counter()
    result = jax.block_until_ready(program(jax.random.key(1), problem))
    seconds = time.perf_counter() - begun
    return (
        seconds,
        np.asarray(result.params.experts),
        int(result.num_iterations),
        Status(int(result.status)).words,
    )


def run_cell(cell):
    """One row: the seconds of a fit and of drawing its rows, its passes over the rows, and its error."""
    axis, method, rows, n, d, k = cell["fit"]
    experts, gating = truth(cell, d, k)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if rows == "in batches":
            x, y = (
                np.memmap(os.path.join(folder, name), np.float32, "w+", shape=shape)
                for name, shape in (("x", (n, d)), ("y", (n,)))
            )
        else:  # aligned, so that the device takes it as it is, and given back at the end
            x = np.frombuffer(mmap.mmap(-1, 4 * n * d), np.float32).reshape(n, d)
            y = np.empty(n, np.float32)
        fill(x, y, cell, experts, gating)
        drawn = time.perf_counter() - begun
        if rows == "on the device":
            with jax.enable_x64(False):
                found = fit_on_device(method, x, y, k, cell["noise_std"])
        else:
            found = (fit_in_batches if rows == "in batches" else fit_in_memory)(method, x, y, k)
    seconds, estimated, passes, status = found
    row = {
        "axis": axis,
        "method": method,
        "rows": rows,
        "num_samples": n,
        "dim": d,
        "num_experts": k,
        "threads": len(available_cores()) if rows == "in batches" else 1,
        "drawing_seconds": drawn,
        "seconds": seconds,
        "passes": passes,
        "recovery_error": float(moejax.recovery_error(experts, estimated)),
        "end": status,
    }
    return pd.DataFrame([row])


def summary(table):
    """For each axis and method, the exponent with which the seconds grow along the axis: the slope of a line in logarithms."""
    rows = []
    for key, part in table.groupby(["axis", "method", "rows"], sort=False):
        x = np.log(part[key[0]].to_numpy(float))
        slopes = [
            np.polyfit(x, np.log(y.to_numpy(float)), 1)[0] if len(part) > 1 else np.nan
            for y in (part["seconds"], part["seconds"] / part["passes"])
        ]
        rows.append((*key, len(part), *slopes))
    names = ["axis", "method", "rows", "fits", "exponent_of_seconds", "exponent_of_pass_seconds"]
    return pd.DataFrame(rows, columns=names)


def figure(table):
    axes = [axis for axis in AXES if axis in set(table["axis"])]
    figure = Figure(figsize=(3.4 * len(axes) + 0.8, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col", sharey="row", height_ratios=[2, 1])
    series = list(dict.fromkeys(zip(table["method"], table["rows"], strict=True)))
    for j, name in enumerate(axes):
        here = table[table["axis"] == name]
        for number, (method, rows) in enumerate(series):
            part = here[(here["method"] == method) & (here["rows"] == rows)].sort_values(name)
            if part.empty:
                continue
            style = {"color": COLOURS[number], "marker": MARKERS[number], "linewidth": 1.4}
            bad = part[~(part["recovery_error"] < GOOD)]
            for axis, y in zip(grid[:, j], ("seconds", "passes"), strict=True):
                axis.plot(part[name], part[y], label=LABELS[method, rows], **style)
                axis.plot(bad[name], bad[y], MARKERS[number], color=COLOURS[number], markerfacecolor="white")
        top, bottom = grid[:, j]
        _draw_slope(top, here, name)
        for axis in (top, bottom):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(color="#dddddd", linewidth=0.6)
        bottom.set_xlabel(AXES[name])
        top.set_title(_fixed(here, name), fontsize=10)
        if name == "num_experts":
            values = sorted(set(here[name]))
            bottom.set_xticks(values, [f"{value}" for value in values])
            bottom.minorticks_off()
    grid[0, 0].set_ylabel("seconds of a fit,\nprograms compiled")
    grid[1, 0].set_ylabel("passes over the rows")
    handles = [
        Line2D([], [], color=COLOURS[n], marker=MARKERS[n], label=LABELS[key]) for n, key in enumerate(series)
    ]
    handles.append(Line2D([], [], color="#777777", linestyle="--", linewidth=1, label="slope 1"))
    if (~(table["recovery_error"] < GOOD)).any():
        hollow = {"color": "#444444", "marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        handles.append(Line2D([], [], label=f"recovery error ≥ {GOOD}", **hollow))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_slope(axis, table, name):
    """Draw a line of slope 1 through the largest fit of a panel, over its range."""
    last = table.loc[table[name].idxmax()]
    x = np.array([table[name].min(), table[name].max()], float)
    axis.plot(x, last["seconds"] * x / last[name], color="#777777", linestyle="--", linewidth=1, zorder=1)


def _fixed(table, name):
    """The sizes that a panel holds fixed."""
    short = {"num_samples": "n", "dim": "d", "num_experts": "k"}
    return ", ".join(f"{short[other]} = {table[other].iloc[0]:,}" for other in short if other != name)


EXPERIMENT = Experiment(
    part="g. Does it scale?",
    spec="sweeps/scale.toml",
    quick={
        "fit": [
            ["num_samples", "spectral_em", "in memory", 1000, 6, 2],
        ]
    },
    numbers={
        "million": Number(f"{_BATCHES} and num_samples == 1_000_000", "seconds", "value"),
        "hundred": Number(f"{_BATCHES} and num_samples == 100_000_000", "seconds", "value"),
        "error": Number(f"{_BATCHES} and num_samples == 100_000_000", statistic="value"),
        "memory": Number(
            "rows == 'in memory' and axis == 'num_samples'", "exponent_of_seconds", "value", "summary.csv"
        ),
        "wide_200": Number(f"{_WIDE} and dim == 200", "seconds", "value"),
        "wide_20000": Number(f"{_WIDE} and dim == 20_000", "seconds", "value"),
        "wide_error": Number(f"{_WIDE} and dim == 20_000", statistic="value"),
        "wide_pass": Number(_WIDE, "exponent_of_pass_seconds", "value", "summary.csv"),
        "em_dim": Number(f"{_EM_DIM}", "exponent_of_pass_seconds", "value", "summary.csv"),
        "experts_2": Number(f"{_EXPERTS.format('spectral_em')} and num_experts == 2", "seconds", "value"),
        "experts_16": Number(f"{_EXPERTS.format('spectral_em')} and num_experts == 16", "seconds", "value"),
        "joint_2": Number(f"{_EXPERTS.format('joint_em')} and num_experts == 2", "seconds", "value"),
        "joint_16": Number(f"{_EXPERTS.format('joint_em')} and num_experts == 16", "seconds", "value"),
    },
    shows=(
        "With d = 10 and k = 3 spectral_em takes {million} s for 10^6 samples in batches from a file and {hundred} s for "
        "10^8 (error {error}); in memory the seconds grow with n to the power {memory}; with 80,000 samples spectral_wide "
        "takes {wide_200} s for 200 inputs and {wide_20000} s for 20,000, where four samples for each input do not "
        "suffice (error {wide_error}); the seconds of a pass grow with d to the power {wide_pass}, those of spectral_em to the "
        "power {em_dim}; from 2 to 16 experts the time goes from {experts_2} to {experts_16} s for spectral_em, and from "
        "{joint_2} to {joint_16} s for joint EM from one random start."
    ),
    shows_not=(
        "It does not show the spread of the seconds, each of which is one run on one core of the manifest's processor while "
        "another fit runs beside it; nor the time of compilation; and a few sizes on an axis are no law."
    ),
    figure=figure,
    summary=summary,
    program=("fit",),
    run_cell=run_cell,
)
