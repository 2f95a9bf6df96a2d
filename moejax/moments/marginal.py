r"""Norm, intercept and dispersion of the experts of an output family, from the labels alone.

A direction u_i . x is independent of the gates if these are orthogonal to the experts. So a label has the law of one expert's, with
density f(y) = int p(y | rho z + b; s) phi(z) dz whatever the gates and mixing weights, and (rho, b, s) maximise
sum_j w_j log f(y_j). The labels are put into bins, and damped scoring with the outer products of the scores climbs from a few
starts: a Hessian would fail for densities with kinks.

The labels of a log-normal family do not tell rho from s, and those of linear experts with heavy-tailed noise do not if there are
outliers. The trace of T2 does: it is sum_i E[P_i] = 1 for the transform of the right norm (`moejax.fitting.family_labels`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.model.family import Family, Nuisances
from moejax.model.gaussian import gaussian_grid
from moejax.model.label_rule import count_rule
from moejax.model.small_linear_algebra import solve

NUM_BINS = 1024
COARSE_NODES, FINE_NODES = 257, 2049
"""Nodes over z for the climbs from every start, and for the last one. Where a label is much more precise than the spacing of the
nodes in rho z, as counts of several thousands are, the density is wrong."""
BINS_AT_ONCE = 64
"""Bins whose densities are computed together: with their nodes they stay in the cache, and blocks without labels are left out."""
MOST_STEPS = 60
LEAST_NOISE = 0.05
"""The least noise of a location family, relative to the guess of 0.4 interquartile ranges of the labels."""
_START_DAMPING = 1e-2
_SETTLED = 1e-3
"""The climb ends if a step promises less than this many nats in all, or less than the rounding error of the likelihood."""
_LARGEST_STEP = 1.0
_NORMS = (0.7, 1.6, 0.3)
"""Norms of the starts; the first is the likeliest."""
_DISPERSIONS = (1.0, 0.3, 2.0)
"""Dispersions of the starts, relative to a first guess."""


class LabelBins(NamedTuple):
    """Labels in bins, those with labels first: the mean label of each, and its weight, zero for empty bins."""

    labels: Float[jax.Array, " b"]
    weights: Float[jax.Array, " b"]


def label_bins(family: Family, y: Float[jax.Array, " n"], weights: Float[jax.Array, " n"]) -> LabelBins:
    """The labels in at most NUM_BINS bins; counts up to EXACT_COUNTS are their own. Labels of weight zero are ignored."""
    used = weights > 0
    stand_in = y[jnp.argmax(used)]
    y = jnp.where(used, y, stand_in)
    if isinstance(family.support, int):
        count = family.support + 1
        index = jnp.clip(y, 0, family.support).astype(jnp.int32)
    elif family.support == "counts":
        starts = count_rule()[2]
        count = starts.size
        index = jnp.searchsorted(jnp.asarray(starts, y.dtype), y, side="right") - 1
    else:
        if family.support == "positive":
            u = jnp.log(y)
        else:
            low, middle, high = jnp.nanquantile(
                jnp.where(used, y, jnp.nan), jnp.asarray([0.25, 0.5, 0.75], y.dtype)
            )
            spread = jnp.where(high > low, high - low, 1.0)
            u = jnp.arcsinh((y - middle) / spread)
        count = NUM_BINS
        width = jnp.maximum(u.max() - u.min(), jnp.finfo(y.dtype).tiny)
        index = jnp.clip((u - u.min()) / width * count, 0, count - 1).astype(jnp.int32)
    empty = jnp.zeros(count, y.dtype)
    total = empty.at[index].add(weights)
    # differences first: their mean is exact to rounding for labels far from zero
    reference = empty.at[index].max(y, mode="drop") if family.support == "counts" else empty.at[index].set(y)
    shift = empty.at[index].add(weights * (y - reference[index]))
    positive = total > 0
    mean = reference + jnp.where(positive, shift / jnp.where(positive, total, 1.0), 0.0)
    order = jnp.argsort(~positive, stable=True)
    return LabelBins(jnp.where(positive, mean, stand_in)[order], total[order])


def _guess(family: Family, bins: LabelBins) -> tuple[jax.Array, jax.Array]:
    """First guesses () of intercept and dispersion."""
    share = bins.weights / bins.weights.sum()
    mean = share @ bins.labels
    one = jnp.ones((), mean.dtype)
    order = jnp.argsort(bins.labels)
    below = jnp.cumsum(share[order])
    low, middle, high = (bins.labels[order][jnp.argmax(below >= q)] for q in (0.25, 0.5, 0.75))
    if isinstance(family.support, int):
        p = jnp.clip(mean / family.support, 1e-3, 1.0 - 1e-3)
        return jnp.log(p / (1.0 - p)), one
    if family.support in ("counts", "positive"):
        tiny = jnp.finfo(mean.dtype).tiny
        return jnp.log(jnp.maximum(jnp.maximum(mean, middle), tiny)) - 0.3, 0.4 * one
    return 0.0 * one if not family.location_scale else middle, jnp.maximum(0.4 * (high - low), 1e-6)


class MarginalFit(NamedTuple):
    """The end of `estimate_nuisances`."""

    nuisances: Nuisances
    log_likelihood: Float[jax.Array, ""]
    """() of the labels, per unit of weight."""


def estimate_nuisances(
    y: Float[jax.Array, " n"],
    weights: Float[jax.Array, " n"],
    *,
    family: Family,
    norm: Float[jax.Array, ""] | float | None = None,
    intercept: Float[jax.Array, ""] | float | None = None,
    dispersion: Float[jax.Array, ""] | float | None = None,
) -> MarginalFit:
    """Norm, intercept and dispersion by the marginal likelihood of the labels; traceable.

    Args:
        y: (n,) labels.
        weights: (n,) sample weights.
        family: the output family.
        norm: () if it is known; None estimates it.
        intercept: () if it is known.
        dispersion: () if it is known; it is 1 for a family without.
    """
    bins = label_bins(family, y, weights)
    guessed_intercept, guessed_dispersion = _guess(family, bins)
    known = (norm, intercept, dispersion if family.has_dispersion else 1.0)
    free = np.array([value is None for value in known])
    starts = []
    for first, factor in zip(_NORMS, _DISPERSIONS, strict=True):
        scale = guessed_dispersion / 0.4 if family.support == "real" and family.location_scale else 1.0
        values = (first * scale, guessed_intercept, factor * guessed_dispersion)
        point = [guess if value is None else value for guess, value in zip(values, known, strict=True)]
        point = [jnp.asarray(value, y.dtype) for value in point]
        starts.append(jnp.stack([jnp.log(point[0]), point[1], jnp.log(point[2])]))
    if not free.any():
        starts = starts[:1]
    # noise that is much smaller than the spacing of the nodes would be found at any of them
    least = jnp.log(LEAST_NOISE * guessed_dispersion) if family.location_scale else -jnp.inf
    begun = jnp.stack(starts)
    ends, _ = jax.lax.map(lambda start: _climb(family, bins, start, free, COARSE_NODES, least), begun)
    candidates = jnp.concatenate([ends, begun])
    nothing = np.zeros_like(free)
    _, values = jax.lax.map(lambda one: _climb(family, bins, one, nothing, FINE_NODES, least), candidates)
    best = candidates[jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))]
    best, value = _climb(family, bins, best, free, FINE_NODES, least)
    return MarginalFit(Nuisances(jnp.exp(best[0]), best[1], jnp.exp(best[2])), value)


class _At(NamedTuple):
    """The marginal likelihood at a point, per unit of weight."""

    value: Float[jax.Array, ""]
    gradient: Float[jax.Array, " free"]
    information: Float[jax.Array, "free free"]
    """Mean outer product of the scores."""


class _State(NamedTuple):
    free: Float[jax.Array, " free"]
    at: _At
    damping: Float[jax.Array, ""]
    done: Bool[jax.Array, ""]
    steps: Int[jax.Array, ""]


def _climb(
    family: Family,
    bins: LabelBins,
    start: Float[jax.Array, " 3"],
    free: np.ndarray,
    num_nodes: int,
    least: Float[jax.Array, ""] | float,
) -> tuple[Float[jax.Array, " 3"], Float[jax.Array, ""]]:
    """The nearest maximum in the `free` of (log norm, intercept, log dispersion), and its value per unit of weight."""
    grid = gaussian_grid(num_nodes, dtype=start.dtype)
    log_mass = jnp.log(jnp.maximum(grid.weights, jnp.finfo(start.dtype).tiny))
    total, places = bins.weights.sum(), np.flatnonzero(free)
    at_once = min(BINS_AT_ONCE, bins.labels.size)
    short = -bins.labels.size % at_once
    all_labels = jnp.pad(bins.labels, (0, short), mode="edge")
    shares = jnp.pad(bins.weights / total, (0, short))
    rounding = 4.0 * jnp.finfo(start.dtype).eps
    num_blocks = -(-jnp.sum(bins.weights > 0, dtype=jnp.int32) // at_once)

    def log_density(values: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = start.at[places].set(values).at[2].max(least)
        t = jnp.exp(at[0]) * grid.nodes + at[1]
        joint = family.log_density(labels[:, None], t[None], jnp.exp(at[2])) + log_mass[None]
        one = jax.nn.logsumexp(jnp.maximum(joint, _LEAST_LOG_DENSITY), axis=1)
        return one, one

    def evaluated(values: jax.Array) -> _At:
        def add(block: jax.Array, sums: _At) -> _At:
            labels, share = (
                jax.lax.dynamic_slice_in_dim(a, block * at_once, at_once) for a in (all_labels, shares)
            )
            if not places.size:
                return sums._replace(value=sums.value + share @ log_density(values, labels)[0])
            scores, logs = jax.jacfwd(log_density, has_aux=True)(values, labels)
            scores = jnp.where(jnp.isfinite(scores) & (share > 0)[:, None], scores, 0.0)
            return _At(
                sums.value + share @ logs,
                sums.gradient + scores.T @ share,
                sums.information + (scores * share[:, None]).T @ scores,
            )

        zeros = jnp.zeros((places.size, places.size), start.dtype)
        nothing = _At(jnp.zeros((), start.dtype), jnp.zeros(places.size, start.dtype), zeros)
        return jax.lax.fori_loop(0, num_blocks, add, nothing)

    def step(state: _State) -> _State:
        now = state.at
        ridge = state.damping * jnp.diag(now.information) + 1e-10
        move = solve(now.information + jnp.diag(ridge), now.gradient)
        move = jnp.where(jnp.isfinite(move), move, 0.0)
        move = move * jnp.minimum(1.0, _LARGEST_STEP / jnp.maximum(jnp.abs(move).max(), 1e-30))
        new = evaluated(state.free + move)
        accept = new.value >= now.value
        done = move @ now.gradient < jnp.maximum(_SETTLED / total, rounding * jnp.abs(now.value))
        damping = jnp.where(accept, 0.2 * state.damping, jnp.maximum(5.0 * state.damping, _START_DAMPING))
        free, at = jax.tree.map(
            lambda one, other: jnp.where(accept, one, other), (state.free + move, new), (state.free, now)
        )
        return _State(free, at, damping, done | (damping > 1e8), state.steps + 1)

    begin = start[places]
    if not places.size:
        return start, evaluated(begin).value
    damping = jnp.asarray(_START_DAMPING, start.dtype)
    state = _State(begin, evaluated(begin), damping, jnp.asarray(False), jnp.asarray(0, jnp.int32))
    end = jax.lax.while_loop(lambda s: ~s.done & (s.steps < MOST_STEPS), step, state)
    return start.at[places].set(end.free).at[2].max(least), end.at.value


_LEAST_LOG_DENSITY = -1e6
"""Densities of nothing: labels that the nodes do not reach."""
