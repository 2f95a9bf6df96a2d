"""With the experts known, does gating EM reach one optimum from every start, and how fast? Beside it, joint EM from random starts.

Not a recovery sweep: every cell (an activation at a noise level) draws a few instances and runs EM from many starts on each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.likelihood import gating_em, joint_em
from moejax.model import InstanceScales, get_activation, random_params, sample, standard_normal, unit_rows
from moejax.reproduce import COLOURS, MARKERS, Experiment, Number, mean_and_mcse

SAME_OPTIMUM = 0.5
"""Nats below the best log-likelihood seen, over the whole sample, within which a run has reached the same optimum."""
GAPS_FOR_RATE = (1e-8, 1e-1)
"""Nats below the optimum between which the rate is measured: past the start, above rounding."""

_EASY, _HARD = "noise_std == 0.1", "activation == 'sigmoid' and noise_std == 1.0"


class Shape(NamedTuple):
    """What is static in a cell."""

    activation: str
    dim: int
    num_experts: int
    num_samples: int
    num_instances: int
    num_starts: int
    gating_steps: int
    joint_steps: int


@functools.partial(jax.jit, static_argnames="shape")
def _run(key_data, noise_std, gating_norm, start_norms, shape):
    """For each instance: x, y, experts, the gates from the zero start, and of every run its history and end."""
    fn = get_activation(shape.activation)
    k, d, dtype = shape.num_experts, shape.dim, noise_std.dtype
    angle, correlation = jnp.asarray(90.0, dtype), jnp.zeros((), dtype)
    scales = InstanceScales(noise_std, gating_norm, angle, correlation, jnp.ones(k, dtype))
    weights = jnp.ones(shape.num_samples, dtype)

    def instance(key_data):
        truth_key, sample_key, gate_key, expert_key = jax.random.split(jax.random.wrap_key_data(key_data), 4)
        truth = random_params(truth_key, scales, d)
        x, y, _ = sample(sample_key, truth, fn, shape.num_samples)
        directions = unit_rows(standard_normal(gate_key, (shape.num_starts * k, d), dtype)).reshape(-1, k, d)
        gates = (start_norms[:, None, None] * directions).at[:, -1].set(0.0)
        gates = jnp.concatenate([jnp.zeros_like(gates[:1]), gates])

        def from_gates(gating):
            start = truth._replace(gating=gating)
            run = gating_em(start, x, y, weights, fn=fn, num_steps=shape.gating_steps, tolerance=1e-13)
            return run.params.gating, run.history, run.log_likelihood, run.num_steps

        spread = jnp.full(k, y.std(), dtype)
        random_experts = unit_rows(standard_normal(expert_key, (shape.num_starts, k, d), dtype))
        experts = jnp.concatenate([truth.experts[None], random_experts])
        first_gates = jnp.zeros_like(experts).at[0].set(truth.gating)

        def from_experts(start):
            def stage(
                params, noise_known
            ):  # as the method joint_em: noise free at first, then as it is known
                known = jnp.where(noise_known, truth.noise_std, params.noise_std)
                run = joint_em(
                    params._replace(noise_std=known),
                    *(x, y, weights),
                    fn=fn,
                    num_steps=shape.joint_steps // 2,
                    noise="shared",
                    hold_noise=noise_known,
                )
                return run.params, (run.log_likelihood, run.num_steps)

            start = truth._replace(experts=start[0], gating=start[1], noise_std=spread)
            _, (values, steps) = jax.lax.scan(stage, start, jnp.asarray([False, True]))
            return values[-1], steps.sum()

        ends = (truth.experts, x, y)
        return ends, jax.lax.map(from_gates, gates), jax.lax.map(from_experts, (experts, first_gates))

    return jax.lax.map(instance, key_data)


def run_cell(cell):
    """Rows: every start of both methods; `gap` in nats below the best run of its method, the start at the truth included."""
    sizes = (
        "dim",
        "num_experts",
        "num_samples",
        "num_instances",
        "num_starts",
        "gating_steps",
        "joint_steps",
    )
    shape = Shape(cell["activation"], *(cell[name] for name in sizes))
    norms = np.resize(np.asarray(cell["start_norms"], float), shape.num_starts)
    keys = np.stack([np.array([cell["seed"], i], np.uint32) for i in range(shape.num_instances)])
    noise_std, gating_norm = np.float64(cell["noise_std"]), np.float64(cell["gating_norm"])
    result = jax.device_get(_run(keys, noise_std, gating_norm, norms, shape))
    rows = []
    for i in range(shape.num_instances):
        (experts, x, y), (gates, histories, values, steps), (joint_values, joint_steps) = (
            tuple(np.asarray(leaf)[i] for leaf in part) for part in result
        )
        predicted = predicted_rate(gates[0], experts, x, y, cell["activation"], cell["noise_std"])
        rates = (measured_rate(histories[0]), predicted)
        for method, ends, passes, start_norm in (
            ("gating_em", values, steps, [0.0, *norms]),
            ("joint_em", joint_values[1:], joint_steps[1:], [0.0] * shape.num_starts),
        ):
            best = np.nanmax(joint_values if method == "joint_em" else values)
            for start, value in enumerate(ends):
                end_norm = np.linalg.norm(gates[start], axis=1).max() if method == "gating_em" else np.nan
                first = rates if method == "gating_em" and start == 0 else (np.nan, np.nan)
                gap = best - value
                reached = float(gap < SAME_OPTIMUM)
                rows.append(
                    (i, method, start, start_norm[start], gap, reached, int(passes[start]), end_norm, *first)
                )
    names = [
        "instance",
        "method",
        "start",
        "start_norm",
        "gap",
        "reached_share",
        "passes",
        "gating_norm_at_end",
    ]
    return pd.DataFrame(rows, columns=[*names, "rate_measured", "rate_predicted"])


def measured_rate(history):
    """Factor by which the distance to the optimum shrinks a step: the square root of that of the gap in log-likelihood."""
    history = history[np.isfinite(history)]
    gaps = history[-1] - history
    inside = np.flatnonzero((gaps > GAPS_FOR_RATE[0]) & (gaps < GAPS_FOR_RATE[1]))
    if len(inside) < 3:
        return np.nan
    slope = np.polyfit(inside, np.log(gaps[inside]), 1)[0]
    return float(np.exp(slope / 2))


def predicted_rate(gating, experts, x, y, activation, noise_std):
    """The largest eigenvalue of I - I_complete^-1 I_observed of the gates (Dempster, Laird and Rubin 1977)."""
    k, n = len(gating), len(y)
    logits = x @ gating.T
    prior = np.exp(logits - logits.max(axis=1, keepdims=True))
    prior /= prior.sum(axis=1, keepdims=True)
    means = np.asarray(get_activation(activation)(x @ experts.T))
    joint = np.log(np.maximum(prior, 1e-300)) - 0.5 * ((y[:, None] - means) / noise_std) ** 2
    posterior = np.exp(joint - joint.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)

    def information(p):
        p = p[:, : k - 1]
        blocks = p[:, :, None] * np.eye(k - 1) - p[:, :, None] * p[:, None, :]
        size = (k - 1) * x.shape[1]
        return np.einsum("nij,nd,ne->idje", blocks, x, x, optimize=True).reshape(size, size) / n

    complete, missing = information(prior), information(posterior)
    return float(np.linalg.eigvals(np.linalg.solve(complete, missing)).real.max())


def summary(table):
    """Shares of starts that reach the best optimum, by activation, noise, method and norm of the start; rates of contraction."""
    rows = []
    for key, part in table.groupby(["activation", "noise_std", "method", "start_norm"], sort=False):
        by_instance = part.groupby("instance")["reached_share"].mean().to_numpy()
        share, se = (float(v[0]) for v in mean_and_mcse(by_instance[None]))
        rates = part[["rate_measured", "rate_predicted"]].mean()
        rows.append((*key, share, se, len(part), *rates))
    names = ["activation", "noise_std", "method", "start_norm", "reached_share", "reached_se", "starts"]
    return pd.DataFrame(rows, columns=[*names, "rate_measured", "rate_predicted"])


def figure(table):
    shares = summary(table)
    activations = list(dict.fromkeys(table["activation"]))
    figure = Figure(figsize=(max(6.4, 2.7 * len(activations) + 1), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(activations), squeeze=False, sharex=True, sharey="row")
    kinds = [
        (norm, "gating_em", f"gating EM, start of norm {norm:g}")
        for norm in sorted(set(table["start_norm"]) - {0.0})
    ]
    kinds.append((0.0, "joint_em", "joint EM, random experts"))
    for j, activation in enumerate(activations):
        here = shares[shares["activation"] == activation]
        for number, (norm, method, label) in enumerate(kinds):
            part = here[(here["method"] == method) & (here["start_norm"] == norm)].sort_values("noise_std")
            x = part["noise_std"] * 1.03 ** (number - 1.5)
            style = {"color": COLOURS[number], "marker": MARKERS[number], "capsize": 2.5}
            error = part["reached_se"].fillna(0)
            grid[0, j].errorbar(
                x, part["reached_share"], yerr=error, label=label if j == 0 else None, **style
            )
        rates = here[(here["method"] == "gating_em") & (here["start_norm"] == 0)].sort_values("noise_std")
        for number, (name, label) in enumerate(
            (("rate_measured", "measured"), ("rate_predicted", "predicted"))
        ):
            style = {
                "color": ("black", "#777777")[number],
                "marker": "ox"[number],
                "linestyle": ("-", "--")[number],
            }
            grid[1, j].plot(
                rates["noise_std"], rates[name], label=f"rate, {label}" if j == 0 else None, **style
            )
        grid[0, j].set_title(f"g = {activation}", fontsize=10)
        for axis in grid[:, j]:
            axis.set_xscale("log")
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_ylim(-0.04, 1.04)
        levels = sorted(set(table["noise_std"]))
        grid[1, j].set_xticks(levels, [f"{level:g}" for level in levels])
        grid[1, j].minorticks_off()
    grid[0, 0].set_ylabel("share of starts that reach\nthe best optimum ± s.e.")
    grid[1, 0].set_ylabel("contraction of gating EM\na step, from zero gates")
    figure.supxlabel("noise standard deviation σ", fontsize=11)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


EXPERIMENT = Experiment(
    part="b. Where do random starts fail, and where do they not?",
    place=4,
    spec="sweeps/gating-em.toml",
    quick={
        "num_samples": 1000,
        "num_instances": 1,
        "num_starts": 12,
        "gating_steps": 200,
        "joint_steps": 60,
        "activation": ["linear"],
        "noise_std": [0.1, 0.5],
    },
    numbers={
        "gating": Number(f"{_EASY} and method == 'gating_em'", "reached_share", "mean"),
        "joint": Number(f"{_EASY} and method == 'joint_em'", "reached_share", "mean"),
        "gating_hard": Number(f"{_HARD} and method == 'gating_em'", "reached_share", "mean"),
        "joint_hard": Number(f"{_HARD} and method == 'joint_em'", "reached_share", "mean"),
        "far": Number(f"{_HARD} and method == 'gating_em' and start_norm == 20", "reached_share", "mean"),
        "rate": Number(
            "activation == 'linear' and noise_std == 0.1 and start_norm == 0", "rate_measured", "mean"
        ),
        "predicted": Number(
            "activation == 'linear' and noise_std == 0.1 and start_norm == 0", "rate_predicted", "mean"
        ),
    },
    shows=(
        "At σ = 0.1 {gating} of the starts of gating EM reach the best optimum seen, all activations together, and "
        "{joint} of the random starts of joint EM; for sigmoid at σ = 1 it is {gating_hard} (starts of norm 20: {far}) "
        "and {joint_hard}; for linear at σ = 0.1 the error of gating EM shrinks by the factor {rate} a step, where the "
        "share of missing information predicts {predicted}."
    ),
    shows_not=(
        "It does not show that an optimum is the global one, only whether starts agree; and a few instances of one size "
        "say nothing of others; the prediction is the limit of late steps, the measured factor a mean over earlier ones too."
    ),
    program=("activation",),
    figure=figure,
    summary=summary,
    run_cell=run_cell,
)
