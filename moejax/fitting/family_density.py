r"""The density of a label of any output family given its inputs, under one fitted model or the average of several, on the host.

It is p(y | x) = sum_c w_c(x) p(y | t_c(x); s_c), the components being the experts of all models. Probabilities and quantiles come
from one quadrature over the labels for all rows (`label_rule`): exactly for labels 0, .., N and for small counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from moejax.fitting.padding import padded_size
from moejax.model.family import Family
from moejax.model.label_rule import LabelRule, label_rule
from moejax.model.on_host import on_host

NUMBERS_AT_ONCE = 2**22
"""Numbers in an array over rows, components and labels, 32 MiB."""
_RANGE_POINTS = 257


class FamilyDensity(NamedTuple):
    """The density of y at n rows, as mixtures of C components of one family."""

    family: Family
    log_weights: np.ndarray
    """(n, C)"""
    predictors: np.ndarray
    """(n, C) t, in units of the data."""
    dispersion: np.ndarray
    """(n, C) s."""

    @property
    def means(self) -> np.ndarray:
        """(n, C): E[y] of every component."""
        return self._evaluated(self.family.mean)

    @property
    def mean(self) -> np.ndarray:
        """(n,): E[y | x]."""
        return np.sum(np.exp(self.log_weights) * self.means, axis=1)

    def standard_deviations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) each: of y given x, and of its parts within the components and between their means; infinite where a variance is."""
        weights, means = np.exp(self.log_weights), self.means
        variances = self._variances()
        with np.errstate(invalid="ignore"):
            within = np.sqrt(np.sum(np.where(weights > 0, weights * variances, 0.0), axis=1))
        between = np.sqrt(np.sum(weights * (means - np.sum(weights * means, axis=1)[:, None]) ** 2, axis=1))
        return np.hypot(within, between), within, between

    def _variances(self) -> np.ndarray:
        if self.family.variance is not None:
            return self._evaluated(self.family.variance)
        rule = self._rule()

        def of_rows(rows: slice) -> np.ndarray:
            mass = np.exp(self._log_densities(rows, rule.nodes)) * rule.weights
            mean = mass @ rule.nodes
            return np.maximum(mass @ rule.nodes**2 - mean**2, 0.0)

        return self._in_parts(of_rows, rule.nodes.size)

    def log_joint(self, y: np.ndarray) -> np.ndarray:
        """(n, C): log w_c(x) p_c(y | x) for y (n,)."""
        labels = np.broadcast_to(y[:, None], self.predictors.shape)
        return self.log_weights + self._evaluated(_with_labels, labels)

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """(n,): log p(y | x) in nats for y (n,)."""
        return np.asarray(scipy.special.logsumexp(self.log_joint(y), axis=1))

    def probability_below(self, y: np.ndarray) -> np.ndarray:
        """(n,): P(Y < y | x) + P(Y = y | x) / 2 for y (n,): the mid-distribution function, P(Y <= y | x) for a density."""
        rule = self._rule()
        y = np.asarray(y, float)

        def of_rows(rows: slice) -> np.ndarray:
            below = self._cumulative(rows, rule)
            if self.is_discrete:
                before = np.concatenate([np.zeros((len(below), 1)), below[:, :-1]], axis=1)
                below = 0.5 * (below + before)
            return np.array([np.interp(v, rule.nodes, row) for v, row in zip(y[rows], below, strict=True)])

        return self._in_parts(of_rows, rule.nodes.size)

    @property
    def is_discrete(self) -> bool:
        """True if labels are counts or classes."""
        return self.family.support == "counts" or isinstance(self.family.support, int)

    def quantiles(self, levels: Sequence[float]) -> np.ndarray:
        """(n, q): the quantiles of y given x at q levels between 0 and 1: of counts, the least y with P(Y <= y | x) >= level."""
        rule = self._rule()

        def of_rows(rows: slice) -> np.ndarray:
            below = self._cumulative(rows, rule)
            if self.is_discrete:
                index = np.stack([np.sum(below < level, axis=1) for level in levels], axis=1)
                return np.round(rule.nodes[np.minimum(index, rule.nodes.size - 1)])
            return np.stack([np.interp(levels, *_increasing(row, rule.nodes)) for row in below])

        return self._in_parts(of_rows, rule.nodes.size)

    def sample(self, generator: np.random.RandomState) -> np.ndarray:
        """(n,): one draw of y at each row.

        Raises:
            ValueError: the family has no sampler.
        """
        if self.family.sample is None:
            raise ValueError(f"family {self.family.name}: expected one with a sampler, to draw labels")
        cumulative = np.cumsum(np.exp(self.log_weights), axis=1)
        chosen = np.sum(generator.uniform(size=(len(cumulative), 1)) >= cumulative[:, :-1], axis=1)
        rows = np.arange(len(chosen))
        key = jax.random.key(generator.randint(np.iinfo(np.int32).max))
        drawn = self.family.sample(
            key, jnp.asarray(self.predictors[rows, chosen]), jnp.asarray(self.dispersion[rows, chosen])
        )
        return np.asarray(drawn, np.float64)

    def expected_log_density(self) -> np.ndarray:
        """(n,): int p(y | x) log p(y | x) dy in nats, minus the entropy of y given x."""
        rule = self._rule()

        def of_rows(rows: slice) -> np.ndarray:
            log_density = self._mixed(rows, rule.nodes)
            return np.sum(
                np.where(log_density > -700, np.exp(log_density) * log_density, 0.0) * rule.weights, axis=1
            )

        return self._in_parts(of_rows, rule.nodes.size)

    def _cumulative(self, rows: slice, rule: LabelRule[np.ndarray]) -> np.ndarray:
        """(rows, q): P(Y <= y_q | x), made to end at one."""
        mass = np.exp(self._mixed(rows, rule.nodes)) * rule.weights
        below = np.cumsum(mass, axis=1)
        if not self.is_discrete:
            below = below - 0.5 * mass
        return below / np.maximum(mass.sum(axis=1, keepdims=True), 1e-300)

    def _mixed(self, rows: slice, labels: np.ndarray) -> np.ndarray:
        """(rows, q): log p(y_q | x)."""
        joint = self.log_weights[rows][..., None] + self._log_densities(rows, labels)
        return np.asarray(scipy.special.logsumexp(joint, axis=1))

    def _log_densities(self, rows: slice, labels: np.ndarray) -> np.ndarray:
        """(rows, C, q): log p of every component."""
        t, s = self.predictors[rows], self.dispersion[rows]
        size = padded_size(len(t))
        fill = ((0, size - len(t)), (0, 0))
        arrays = (np.pad(a, fill, mode="edge") for a in (t, s))
        return on_host(_of_labels, self.family, labels, *arrays)[: len(t)]

    def _rule(self) -> LabelRule[np.ndarray]:
        low, high = self.predictors.min(), self.predictors.max()
        return on_host(_rule_between, self.family, low, high, self.dispersion.max())

    def _evaluated(self, function: Callable[..., Any], *more: np.ndarray) -> np.ndarray:
        """(n, C): an elementwise function of (.., t, s)."""
        flat = [a.reshape(-1) for a in (*more, self.predictors, self.dispersion)]
        size = padded_size(flat[0].size)
        padded = [np.pad(a, (0, size - a.size), mode="edge") for a in flat]
        static = (self.family, function)
        return on_host(_elementwise, static, *padded)[: flat[0].size].reshape(self.predictors.shape)

    def _in_parts(self, of_rows: Callable[[slice], np.ndarray], num_labels: int) -> np.ndarray:
        n, components = self.predictors.shape
        rows = max(NUMBERS_AT_ONCE // (components * num_labels), 1)
        return np.concatenate([of_rows(slice(start, start + rows)) for start in range(0, n, rows)])


def _increasing(below: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels where the probability increases, for an interpolation in it."""
    kept = np.concatenate([[True], np.diff(below) > 0])
    return below[kept], labels[kept]


def _with_labels(family: Family, y: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    return family.log_density(y, t, s)


def _elementwise(static: tuple[Family, Callable[..., Any]], *arrays: jax.Array) -> jax.Array:
    family, function = static
    values = function(family, *arrays) if function is _with_labels else function(*arrays)
    return values + jnp.zeros_like(arrays[0])


def _of_labels(family: Family, labels: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    return family.log_density(labels[None, None], t[..., None], s[..., None])


def _rule_between(family: Family, low: jax.Array, high: jax.Array, s: jax.Array) -> LabelRule:
    t = jnp.linspace(low, high, _RANGE_POINTS)
    return label_rule(family, t, jnp.full_like(t, 1.0 / _RANGE_POINTS), s)
