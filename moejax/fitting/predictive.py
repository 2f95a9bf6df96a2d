r"""The density of a Gaussian label given its inputs, under one fitted model or the average of several, on the host.

`family_density` has that of other families. It is a finite mixture of normal densities at each row, p(y | x) = sum_c w_c(x)
N(y; m_c(x), s_c^2). For a mixture of experts the components are the experts, for a mean fit there is one, with mean f(x); for
an average of M models they are those of all models, with weights divided by M. Everything is computed in units in which no
square overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from moejax.fitting.family_density import FamilyDensity
from moejax.fitting.label_units import is_linear
from moejax.fitting.padding import padded_size
from moejax.fitting.result import FittedInOwnUnits
from moejax.likelihood.padded import Objective
from moejax.model.activations import ScalarFunction, values_and_slopes_on_host, values_on_host
from moejax.model.family import LOG_TWO_PI, Channel, Family
from moejax.model.mixture import HostParams

PANEL_EDGES = np.arange(-8.0, 9.0)
"""Edges of the panels around each expert's mean, in its standard deviations; the mass outside is 1e-15."""
NODES_IN_PANEL = 6
"""Gauss-Legendre nodes in a panel. If two experts' densities cross, the log-density bends within sigma / c, c <= 8 the distance
from the nearer mean in sigmas; there the density is below exp(-c^2 / 8), and the errors are below 1e-8 nats."""
NUMBERS_AT_ONCE = 2**20
"""Numbers in an array of the quadrature, 8 MiB."""
FARTHEST = 40.0
"""Quantiles are looked for within so many standard deviations of a component's mean: no double is a smaller probability."""
BISECTIONS = 200
"""Most bisections of a quantile; each halves an interval, and it ends when all intervals are as short as rounding allows."""


class PredictiveDensity(NamedTuple):
    """The density of y at n rows, as mixtures of C normal components."""

    log_weights: np.ndarray
    """(n, C)"""
    means: np.ndarray
    """(n, C), or (n, C, m) for m outputs, which are independent given the component."""
    noise_std: np.ndarray
    """The standard deviations of the components, in the shape of `means`."""

    @property
    def mean(self) -> np.ndarray:
        """(n,) or (n, m): E[y | x]."""
        return averaged(np.exp(self.log_weights), self.means)

    def standard_deviations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) or (n, m) each: of y given x, and of its parts within the components and between their means."""
        weights = np.exp(self.log_weights)
        within = root_mean_square(weights, self.noise_std)
        between = root_mean_square(weights, self.means - averaged(weights, self.means)[:, None])
        return np.hypot(within, between), within, between

    def log_joint(self, y: np.ndarray) -> np.ndarray:
        """(n, C): log w_c(x) p_c(y | x) for y (n,) or (n, m)."""
        with np.errstate(over="ignore"):  # a density may be zero
            scaled = (y[:, None] - self.means) / self.noise_std
            log_densities = -0.5 * scaled**2 - np.log(self.noise_std) - 0.5 * LOG_TWO_PI
        return self.log_weights + (log_densities.sum(axis=2) if self.means.ndim == 3 else log_densities)

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """(n,): log p(y | x) in nats for y (n,) or (n, m)."""
        return np.asarray(scipy.special.logsumexp(self.log_joint(y), axis=1))

    def probability_below(self, y: np.ndarray) -> np.ndarray:
        """(n,): P(Y <= y | x) for y (n,), one output."""
        scaled = (np.asarray(y, float)[:, None] - self.means) / self.noise_std
        return np.sum(np.exp(self.log_weights) * scipy.special.ndtr(scaled), axis=1)

    def quantiles(self, levels: Sequence[float]) -> np.ndarray:
        """(n, q): the quantiles of y given x at q levels between 0 and 1, for one output, to rounding."""
        reach = FARTHEST * self.noise_std
        low, high = (self.means - reach).min(axis=1), (self.means + reach).max(axis=1)
        return np.stack([self._quantile(float(level), low, high) for level in levels], axis=1)

    def _quantile(self, level: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        for _ in range(BISECTIONS):
            middle = low + 0.5 * (high - low)
            below = self.probability_below(middle) < level
            low, high = np.where(below, middle, low), np.where(below, high, middle)
            if np.all(high - low <= 2.0 * np.spacing(np.maximum(np.abs(low), np.abs(high)))):
                break
        return low + 0.5 * (high - low)

    def expected_log_density(self) -> np.ndarray:
        """(n,): int p(y | x) log p(y | x) dy in nats, minus the entropy of y given x, for one output."""
        return expected_log_density(*self)

    def sample(self, generator: np.random.RandomState) -> np.ndarray:
        """(n,) or (n, m): one draw of y at each row."""
        cumulative = np.cumsum(np.exp(self.log_weights), axis=1)
        uniform = generator.uniform(size=(len(self.means), 1))
        chosen = np.sum(uniform >= cumulative[:, :-1], axis=1)
        noise = generator.standard_normal((len(self.means), *self.means.shape[2:]))
        rows = np.arange(len(self.means))
        return self.means[rows, chosen] + self.noise_std[rows, chosen] * noise


def _family_density(
    params: HostParams, x: np.ndarray, family: Family, offset: np.ndarray | None
) -> FamilyDensity:
    log_gates, predictors = log_gates_and_predictors(params, x, offset)
    return FamilyDensity(family, log_gates, predictors, np.broadcast_to(params.noise_std, predictors.shape))


def density_of(
    params: HostParams, x: np.ndarray, channel: Channel, offset: np.ndarray | None = None
) -> PredictiveDensity | FamilyDensity:
    """The density of y at rows x (n, d) with offsets (n,), None for none, under one mixture."""
    if isinstance(channel, Family):
        return _family_density(params, x, channel, offset)
    log_gates, means = log_gates_and_means(params, x, channel, offset)
    return PredictiveDensity(log_gates, means, np.broadcast_to(params.noise_std, means.shape))


def predictive_density(
    members: Sequence[FittedInOwnUnits],
    x: np.ndarray,
    fn: Channel,
    objective: Objective,
    offset: np.ndarray | None = None,
) -> PredictiveDensity | FamilyDensity:
    """The density under the average of models with equal weights.

    That of a mean fit contains the uncertainty of f: it is N(f(x), s^2 + var f(x)), with the variance of `mean_variance`.

    Args:
        members: the models.
        x: (n, d), in the units of the data.
        fn: g, or an output family.
        objective: "likelihood" or "mean".
        offset: (n,) addend to the linear predictors of the experts, by likelihood; None for none.
    """
    if isinstance(fn, Family):
        densities = [_family_density(member.units.params(member.params), x, fn, offset) for member in members]
        share = np.log(float(len(densities)))
        return FamilyDensity(
            fn,
            np.concatenate([density.log_weights - share for density in densities], axis=1),
            np.concatenate([density.predictors for density in densities], axis=1),
            np.concatenate([density.dispersion for density in densities], axis=1),
        )
    parts = [_of_one(member, x, fn, objective, offset) for member in members]
    share = np.log(float(len(parts)))
    return PredictiveDensity(
        np.concatenate([part.log_weights - share for part in parts], axis=1),
        np.concatenate([part.means for part in parts], axis=1),
        np.concatenate([part.noise_std for part in parts], axis=1),
    )


def _of_one(
    member: FittedInOwnUnits,
    x: np.ndarray,
    fn: ScalarFunction,
    objective: Objective,
    offset: np.ndarray | None,
) -> PredictiveDensity:
    params = member.units.params(member.params)
    log_gates, means = log_gates_and_means(params, x, fn, offset)
    if objective == "likelihood":
        return PredictiveDensity(log_gates, means, np.broadcast_to(params.noise_std, means.shape))
    f = averaged(np.exp(log_gates), means)
    variance = mean_variance(member, x, fn)
    std = (
        np.full(len(x), params.noise_std[0])
        if variance is None
        else np.hypot(params.noise_std[0], np.sqrt(variance))
    )
    return PredictiveDensity(np.zeros((len(x), 1)), f[:, None], std[:, None])


def mean_variance(member: FittedInOwnUnits, x: np.ndarray, fn: ScalarFunction) -> np.ndarray | None:
    """(n,): the variance of the estimated E[y | x] = sum_i P_i m_i, by the delta method; None if the fit has no covariance.

    With df/du_i = P_i g'(u_i) and df/dv_i = P_i (m_i - f), it is j' C j, j the derivatives in the coefficients, C their covariance.
    """
    if member.covariance is None:
        return None
    z = member.units.inputs(x)
    params = HostParams(*(np.asarray(leaf, np.float64) for leaf in member.params))
    k = params.noise_std.shape[0]
    log_gates, means = log_gates_and_means(params, z, fn)
    gates = np.exp(log_gates)
    predictors = z @ params.experts.T + params.expert_bias
    slopes = _slopes(fn, predictors.reshape(-1)).reshape(means.shape)
    f = averaged(gates, means)
    factors = np.concatenate([gates * slopes, (gates * (means - f[:, None]))[:, : k - 1]], axis=1)
    design = np.column_stack([z, np.ones(len(z))]) if member.fit_intercept else z
    size = factors.shape[1] * design.shape[1]
    covariance = np.asarray(member.covariance.matrix, np.float64)[:size, :size]
    variance = np.empty(len(z))
    rows = max(NUMBERS_AT_ONCE // size, 1)
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        jacobian = (factors[part, :, None] * design[part, None]).reshape(-1, size)
        variance[part] = np.sum((jacobian @ covariance) * jacobian, axis=1)
    return np.maximum(variance, 0.0) * float(member.units.labels.scale) ** 2


def log_gates_and_predictors(
    params: HostParams, x: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) log P_i(x), and (n, k) or (n, k, m) a_i . x + b_i, plus the offset (n,) if there is one."""
    logits = x @ params.gating.T + params.gating_bias
    predictors = x @ params.experts.reshape(params.expert_bias.size, -1).T + params.expert_bias.reshape(-1)
    predictors = predictors if offset is None else predictors + offset[:, None]
    log_gates = np.asarray(scipy.special.log_softmax(logits, axis=1))
    return log_gates, predictors.reshape(len(x), *params.expert_bias.shape)


def log_gates_and_means(
    params: HostParams, x: np.ndarray, fn: Channel, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) log P_i(x), and (n, k) or (n, k, m) m_i(x), of rows with offsets (n,), None for none."""
    if isinstance(fn, Family):
        density = density_of(params, x, fn, offset)
        return density.log_weights, density.means
    log_gates, predictors = log_gates_and_predictors(params, x, offset)
    return log_gates, _values(fn, predictors.reshape(-1)).reshape(predictors.shape)


def _values(fn: ScalarFunction, points: np.ndarray) -> np.ndarray:
    """g at points (p,), by programs for few sizes."""
    return points if is_linear(fn) else values_on_host(fn, _padded(points))[: len(points)]


def _slopes(fn: ScalarFunction, points: np.ndarray) -> np.ndarray:
    """g' at points (p,), by programs for few sizes."""
    if is_linear(fn):
        return np.ones_like(points)
    return values_and_slopes_on_host(fn, _padded(points))[1][: len(points)]


def _padded(points: np.ndarray) -> np.ndarray:
    """Points (p,) with zeros up to a size that many p share."""
    return np.pad(points, (0, padded_size(len(points)) - len(points)))


def averaged(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n, ..): the mean over components of (n, C, ..) by weights (n, C)."""
    return np.einsum("ni,ni...->n...", weights, values)


def root_mean_square(gates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n, ..): the root of the mean square over experts of values (n, k, ..), or (1, k, ..), by gates (n, k)."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    largest = np.where(largest > 0, largest, 1.0)
    squares = np.broadcast_to((values / largest) ** 2, (len(gates), *values.shape[1:]))
    return largest[:, 0] * np.sqrt(np.einsum("ni,ni...->n...", gates, squares))


def expected_log_density(log_gates: np.ndarray, means: np.ndarray, noise_std: np.ndarray) -> np.ndarray:
    r"""(n,): int p(y | x) log p(y | x) dy in nats, minus the entropy of y given x, p the mixture of normal densities at each x.

    It is a composite Gauss-Legendre quadrature over panels as wide as the standard deviation of the nearby expert: an expert with
    little noise inside a wide one has panels of its own width. Errors are below 1e-7 nats for noise ratios of 1 to 1e-6.

    Args:
        log_gates: (n, k) log P(z = i | x).
        means: (n, k) m_i(x).
        noise_std: (n, k), or (k,).
    """
    unit = noise_std.max()
    means, noise_std = means / unit, np.broadcast_to(noise_std, means.shape) / unit
    n, k = means.shape
    rows = max(NUMBERS_AT_ONCE // (k * k * PANEL_EDGES.size * NODES_IN_PANEL), 1)
    parts = [
        _expected_log_density(*(array[start : start + rows] for array in (log_gates, means, noise_std)))
        for start in range(0, n, rows)
    ]
    return np.concatenate(parts) - np.log(unit)


def _expected_log_density(log_gates: np.ndarray, means: np.ndarray, noise_std: np.ndarray) -> np.ndarray:
    n, k = means.shape
    edges = np.sort((means[:, :, None] + noise_std[:, :, None] * PANEL_EDGES).reshape(n, -1), axis=1)
    centres, halves = 0.5 * (edges[:, 1:] + edges[:, :-1]), 0.5 * np.diff(edges, axis=1)
    nodes, weights = np.polynomial.legendre.leggauss(NODES_IN_PANEL)
    y = centres[:, :, None] + halves[:, :, None] * nodes
    with np.errstate(over="ignore"):  # a density may be zero
        joint = np.stack(
            [
                log_gates[:, i, None, None]
                - 0.5 * ((y - means[:, i, None, None]) / noise_std[:, i, None, None]) ** 2
                - np.log(noise_std[:, i, None, None])
                - 0.5 * LOG_TWO_PI
                for i in range(k)
            ]
        )
    largest = joint.max(axis=0)
    log_density = largest + np.log(np.exp(joint - largest).sum(axis=0))
    return np.sum((np.exp(log_density) * log_density) @ weights * halves, axis=1)
