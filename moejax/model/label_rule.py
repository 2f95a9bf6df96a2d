r"""Quadrature over the labels of an output family: nodes y_q and weights w_q with sum_q w_q f(y_q) p(y_q | t) = E[f(Y) | t].

Labels 0, .., N are their own nodes. Counts are nodes up to EXACT_COUNTS; beyond, one node stands for a run of counts that is
shorter than their standard deviation, with the log-density continued between the integers. Other labels are transformed, y = e^u or
y = c + h sinh(u), and every cell between two knots has Gauss-Legendre nodes, so that functions which are linear between the
knots lose no accuracy there. The knots reach as far as some label has a noticeable density in u, in which heavy tails are
exponential ones.
"""

from __future__ import annotations

import functools
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.model.family import Family
from moejax.model.gaussian import Array

EXACT_COUNTS = 255
"""Counts up to this one are nodes."""
LARGEST_COUNT = 200_000
"""The last node of the counts."""
_RUN = 0.5
"""The length of a run of counts, in standard deviations of a Poisson count there; the error is exp(-2 pi^2 / _RUN^2)."""
NUM_KNOTS = 1024
NODES_IN_CELL = 4
_COARSE = 4096
_THINNED = 8
"""Of the given predictors, every so many are tried to find the range of the labels."""
_NEGLIGIBLE = 1e-9
"""Where the density in u is below this share of its largest value, there are no nodes."""
_LOWEST_LOG, _HIGHEST_LOG = -100.0, 80.0
"""The range of log y, about that of the middle mean, in which positive labels are sought."""
_LARGEST_WARP = 36.0
"""The range of u = asinh((y - c) / h) in which real labels are sought."""


class LabelRule(NamedTuple, Generic[Array]):
    """Nodes and weights over the labels, and the knots of functions that are linear between them."""

    nodes: Float[Array, " q"]
    """(q,)"""
    weights: Float[Array, " q"]
    """(q,)"""
    knots: Float[Array, " m"]
    """(m,) increasing."""


@functools.cache
def count_rule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights and first counts of the runs of counts, each (q,)."""
    starts = [float(y) for y in range(EXACT_COUNTS + 1)]
    while starts[-1] < LARGEST_COUNT:
        starts.append(starts[-1] + max(1.0, np.floor(_RUN * np.sqrt(starts[-1]))))
    edges = np.asarray(starts)
    return 0.5 * (edges[:-1] + edges[1:] - 1.0), np.diff(edges), edges[:-1]


def label_rule(
    family: Family,
    t: Float[jax.Array, " p"],
    weights: Float[jax.Array, " p"],
    s: Float[jax.Array, ""],
    *,
    nodes_in_cell: int = NODES_IN_CELL,
) -> LabelRule:
    """The rule for labels whose predictors lie in the range of `t`.

    Args:
        family: the output family.
        t: (p,) predictors, increasing.
        weights: (p,) their weights, summing to one; labels of the likely ones get the finest knots.
        s: () dispersion.
        nodes_in_cell: nodes between two knots; 1 is enough for functions that are smooth there.
    """
    dtype = t.dtype
    if isinstance(family.support, int):
        labels = jnp.arange(family.support + 1, dtype=dtype)
        return LabelRule(labels, jnp.ones_like(labels), labels)
    if family.support == "counts":
        labels, lengths, _ = (jnp.asarray(values, dtype) for values in count_rule())
        return LabelRule(labels, lengths, labels)
    means = family.mean(t, s) + jnp.zeros_like(t)
    if family.support == "positive":
        middle = jnp.log(means[t.shape[0] // 2])
        low, high = middle + _LOWEST_LOG, middle + _HIGHEST_LOG

        def to_label(u: jax.Array) -> jax.Array:
            return jnp.exp(u)

        slope = to_label
    else:
        centre = weights @ means
        spread = jnp.sqrt(weights @ (means - centre) ** 2)
        spread = jnp.where(spread > 1e-6 * s, spread, s)
        low, high = jnp.asarray(-_LARGEST_WARP, dtype), jnp.asarray(_LARGEST_WARP, dtype)

        def to_label(u: jax.Array) -> jax.Array:
            return centre + spread * jnp.sinh(u)

        def slope(u: jax.Array) -> jax.Array:
            return spread * jnp.cosh(u)

    coarse = jnp.linspace(low, high, _COARSE, dtype=dtype)
    log_density = family.log_density(to_label(coarse)[:, None], t[None, ::_THINNED], s)
    envelope = jnp.max(log_density, axis=1) + jnp.log(slope(coarse))
    envelope = jnp.where(jnp.isfinite(envelope), envelope, -jnp.inf)
    kept = envelope > envelope.max() + jnp.log(_NEGLIGIBLE)
    first, last = jnp.argmax(kept), _COARSE - 1 - jnp.argmax(kept[::-1])
    ends = coarse[jnp.clip(jnp.stack([first - 1, last + 1]), 0, _COARSE - 1)]
    u = jnp.linspace(ends[0], ends[1], NUM_KNOTS, dtype=dtype)
    points, shares = np.polynomial.legendre.leggauss(nodes_in_cell)
    step = u[1] - u[0]
    inner = (u[:-1, None] + step * jnp.asarray(0.5 * (points + 1.0), dtype)[None]).reshape(-1)
    share = jnp.tile(jnp.asarray(0.5 * shares, dtype), NUM_KNOTS - 1)
    return LabelRule(to_label(inner), share * step * slope(inner), to_label(u))
