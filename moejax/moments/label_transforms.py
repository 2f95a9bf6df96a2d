r"""Label transforms: scalar functions l with E[l(y) S_m(x)] = sum_i E[P_i] a_i^{(x) m}.

Let Z ~ N(0, 1), Y = g(Z) + sigma * noise and c_r(l) = E[He_r(Z) l(Y)]. An order-m transform has
c_1 = ... = c_{m-1} = 0 and c_m = 1. Four kinds are built, each for the orders 1 to 4, and a fifth with fewer constraints:

* ``polynomial``: in the span of y, .., y^m (Makkuva, Viswanath, Kannan, Oh, ICML 2019);
* ``centred``: the same with a constant added, which costs nothing since E[S_m(x)] = 0;
* ``least_norm``: the transform of least E[l(Y)^2], a combination of rho_r(y) = E[He_r(Z) | Y = y];
* ``weighted``: the transform of least E[l(Y)^2 tau_m(Y)], where tau_m(y) is the contribution of one sample to the
  variance of the estimated experts; a combination of rho_r / tau_m;
* ``relaxed``: for the orders 3 and 4, the least E[l(Y)^2 tau_m(Y)] with c_{m-1} = 0 and c_m = 1 only. Orders 1 and 2 are weighted.

A relaxed transform is right only in a *whitened* moment, and only if the gate differences are orthogonal to the experts' span; it
is biased otherwise. If they are, E[l(y) S_m(x)] = sum_r binomial(m, r) c_r sum_i sym(E[grad^{m-r} P_i] (x) a_i^{(x) r}).
The gradients of P_i are orthogonal to the experts, and the whitening directions lie in the experts' span but for an error of
order n^{-1/2}. A whitened term with m - r gradients is so of order n^{-(m-r)/2}. Only r = m - 1 is of the order of the sampling
error, and its c_r is zero.

The last three are tables over y, interpolated linearly and clamped at the ends. Their coefficients are solved from
the constraints on the *interpolated* functions, so that interpolation costs some efficiency but causes no bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Generic, Literal, NamedTuple, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.model import small_linear_algebra
from moejax.model.activations import (
    Parity,
    ScalarFunction,
    activation_facts,
    apply_activation,
    values_on_host,
)
from moejax.model.gaussian import HALF_WIDTH, AnyArray, Array, gaussian_grid, hermite_polynomials

TransformKind = Literal["polynomial", "centred", "least_norm", "weighted", "relaxed"]
TRANSFORM_KINDS: tuple[TransformKind, ...] = get_args(TransformKind)
ORDERS = (2, 3, 4)

LARGEST_CONDITION = 1e8
"""Condition of the constraints, scaled to a unit diagonal, from which a table counts as impossible. The quadrature shows a linear
dependence of the rho_r as a condition of 1e10 or more, which a solver need not notice."""
NUM_LABELS = 1024
"""Points of a table over y."""
TABLE_HALF_WIDTH = 6.5
"""Tables cover g([-6.5, 6.5]) and 8 noise standard deviations to each side; 8e-11 of the inputs fall outside."""


class LabelTransform(NamedTuple, Generic[Array]):
    """A label transform l(y): a table over y, or (`values` all zero) a polynomial. It is a pytree, so jit and vmap accept it.

    Examples:
        >>> transform = moejax.label_transform("relu", noise_std=0.1, order=3)
        >>> transform(jnp.linspace(-1.0, 3.0, 5)).shape
        (5,)
    """

    start: Float[Array, ""]
    """() smallest y of the table."""
    step: Float[Array, ""]
    """() spacing of the table in y."""
    values: Float[Array, " num_labels"]
    """(num_labels,) l at the points of the table; linear between the points, constant beyond the ends."""
    coefficients: Float[Array, " order+1"]
    """(m + 1,) of 1, y, .., y^m, added to the table."""
    second_moment: Float[Array, ""]
    """() E[l(Y)^2]."""
    weighted_second_moment: Float[Array, ""]
    """() E[l(Y)^2 tau_m(Y)], the contribution of one sample to the experts' variance."""
    knots: Float[Array, " num_labels"] | None = None
    """(num_labels,) the points of the table if they are not uniform; `start`, `step` and `coefficients` then have no meaning."""

    def __call__(self, y: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
        """l(y), elementwise."""
        if self.knots is not None:
            return jnp.interp(y, jnp.asarray(self.knots, y.dtype), jnp.asarray(self.values, y.dtype))
        start, step, values, coefficients = (jnp.asarray(leaf, y.dtype) for leaf in self[:4])
        polynomial = coefficients[-1]
        for power in range(coefficients.shape[0] - 2, -1, -1):
            polynomial = polynomial * y + coefficients[power]
        return interpolate(y, start, step, values, jnp) + polynomial


class PosteriorTable(NamedTuple, Generic[Array]):
    """Posterior means of functions of Z given Y = y, over a uniform grid of y. The tables are combinations of them."""

    start: Float[Array, ""]
    """() smallest y."""
    step: Float[Array, ""]
    """() spacing."""
    hermite: Float[Array, "4 num_labels"]
    """(4, num_labels) rho_r(y) = E[He_r(Z) | y], r = 1..4."""
    square: Float[Array, " num_labels"]
    """(num_labels,) E[Z^2 | y]."""
    hermite_squares: Float[Array, "2 num_labels"]
    """(2, num_labels) E[He_2(Z)^2 | y], E[He_3(Z)^2 | y]."""


def posterior_table(
    noise_std: Float[Array, ""], labels: Float[Array, " num_nodes"], *, xp: ModuleType
) -> PosteriorTable[Array]:
    """Posterior means of the Hermite polynomials, by quadrature over z with the row maximum subtracted in logs.

    Args:
        noise_std: () sigma > 0; its dtype is the dtype of the computation.
        labels: (num_nodes,) g at the `num_quadrature_nodes` nodes of a `gaussian_grid`.
        xp: numpy (double precision, on the host) or jax.numpy (traceable).
    """
    grid = gaussian_grid(labels.shape[0], dtype=noise_std.dtype, xp=xp)
    inside = xp.abs(grid.nodes) <= TABLE_HALF_WIDTH
    start = xp.where(inside, labels, xp.inf).min() - 8.0 * noise_std
    stop = xp.where(inside, labels, -xp.inf).max() + 8.0 * noise_std
    step = (stop - start) / (NUM_LABELS - 1)
    y = start + step * xp.arange(NUM_LABELS, dtype=labels.dtype)
    he = hermite_polynomials(grid.nodes, 4, xp=xp)
    functions = xp.concatenate([he[1:], grid.nodes[None] ** 2, he[2:4] ** 2])
    log_prior = -0.5 * grid.nodes**2
    means = []
    for block in xp.split(y, NUM_LABELS // 64):  # blocks keep the (labels, nodes) array in cache
        log_density = log_prior[None] - 0.5 * ((block[:, None] - labels[None]) / noise_std) ** 2
        # e^-80 is negligible against 1, and exponentials that underflow are slow
        density = xp.exp(xp.maximum(log_density - log_density.max(axis=1, keepdims=True), -80.0))
        # not `functions @ density.T`: BLAS would use all cores, and wait for cores that other programs use
        means.append(xp.einsum("fn,yn->fy", functions, density) / density.sum(axis=1)[None])
    table = xp.concatenate(means, axis=1)
    return PosteriorTable(start, step, table[:4], table[4], table[5:])


@overload
def variance_weight(
    order: int, square: jax.Array, hermite_squares: jax.Array, num_experts: int
) -> jax.Array: ...
@overload
def variance_weight(
    order: int, square: np.ndarray, hermite_squares: np.ndarray, num_experts: int
) -> np.ndarray: ...
def variance_weight(order: int, square: AnyArray, hermite_squares: AnyArray, num_experts: int) -> AnyArray:
    """tau_m from E[Z^2], E[He_2^2] and E[He_3^2] (given Y, or at a given Z), for mixing weights p = 1 / num_experts.

    tau_2 = 1 - p + p Z^2;  tau_m = p He_{m-1}^2 + (m-1)! (p Z^2 + 1 - 2p), m = 3, 4: three cases: the sample's own expert is
    the one estimated, its partner in the span, or neither.
    """
    p = 1.0 / max(num_experts, 2)
    if order <= 2:
        return 1.0 - p + p * square
    return p * hermite_squares[order - 3] + math.factorial(order - 1) * (p * square + 1.0 - 2.0 * p)


def constrained_orders(order: int, kind: TransformKind, parity: Parity) -> tuple[int, ...]:
    """The r whose c_r(l) is prescribed, m last, without those for which rho_r or c_r vanishes by parity."""
    if kind != "relaxed" or order <= 2:
        return tuple(r for r in range(1, order + 1) if parity != "even" or r % 2 == 0)
    # rho_r and tau are even or odd with g: l then has the parity of He_m, and c_{m-1} = 0 by itself
    return (order - 1, order) if parity == "none" else (order,)


def scaled_condition(matrix: Float[np.ndarray, "r r"]) -> float:
    """The condition number of a nearly symmetric matrix after scaling to a unit diagonal; infinite without a positive diagonal."""
    diagonal = np.diagonal(matrix)
    if not (diagonal > 0).all():
        return math.inf
    values = np.linalg.svd(matrix / np.sqrt(diagonal[:, None] * diagonal[None]), compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf


def _no_transform(order: int) -> LabelTransform[Any]:
    nothing, none = np.zeros(()), np.full((), np.inf)
    return LabelTransform(nothing, nothing + 1, np.zeros(NUM_LABELS), np.zeros(order + 1), none, none)


def _solver(xp: ModuleType) -> Callable[[Any, Any], Any]:
    return np.linalg.solve if xp is np else small_linear_algebra.solve


def build_label_transform(
    noise_std: Float[Array, ""],
    posterior: PosteriorTable[Any] | None,
    labels: Float[Array, " num_nodes"],
    *,
    parity: Parity,
    order: int,
    kind: TransformKind,
    num_experts: int,
    num_noise_nodes: int = 81,
    xp: ModuleType = jnp,
) -> LabelTransform[Array]:
    """The pure core of `label_transform`: noise_std may be traced, everything after the star is static.

    Args:
        noise_std: () sigma > 0; its dtype is the dtype of the computation.
        posterior: table of the same activation and sigma; needed by the kinds that are tables.
        labels: (num_nodes,) g at the nodes of the `gaussian_grid` in which the constraints are exact.
        parity: parity of g, from `activation_facts`.
        order: m, 1 to 4.
        kind: one of TRANSFORM_KINDS.
        num_experts: k, for the weight tau_m with p = 1/k.
        num_noise_nodes: nodes of the grid over the noise; many are needed if a table's cells are not small compared with sigma.
        xp: numpy or jax.numpy. With numpy, a table whose constraints are nearly dependent (LARGEST_CONDITION) is refused: its
            second moments are infinite.
    """
    dtype = noise_std.dtype
    grid = gaussian_grid(labels.shape[0], dtype=dtype, xp=xp)
    noise = gaussian_grid(num_noise_nodes, half_width=7.0, dtype=dtype, xp=xp)
    y = labels[:, None] + noise_std * noise.nodes[None]
    rows = np.asarray(constrained_orders(order, kind, parity))
    target = xp.asarray(rows == order, dtype)
    he = hermite_polynomials(grid.nodes, 4, xp=xp)
    zero = xp.zeros((), dtype)
    solve = _solver(xp)

    def hermite_coefficients(values: Any) -> Any:
        """(b, len(rows)): c_r of functions of Y given on the product grid as (b, nodes, noise nodes)."""
        return (values @ noise.weights) @ (he[rows] * grid.weights[None]).T

    if kind in ("polynomial", "centred"):
        scale = xp.sqrt(grid.weights @ (y**2 @ noise.weights))
        powers = range(0 if kind == "centred" else 1, order + 1)
        basis = xp.stack([(y / scale) ** power for power in powers])
        constraints = hermite_coefficients(basis)
        weighted = basis * (grid.weights[:, None] * noise.weights[None])[None]
        gram = weighted.reshape(len(powers), -1) @ basis.reshape(len(powers), -1).T
        # least a'Ga subject to C'a = e; for most g the span is just large enough, and there is one solution
        whitened = solve(gram, constraints)
        solution = whitened @ solve(constraints.T @ whitened, target)
        scaled = [coefficient / scale**power for coefficient, power in zip(solution, powers, strict=True)]
        coefficients = xp.stack([zero] * (order + 1 - len(scaled)) + scaled)
        transform = LabelTransform(zero, zero + 1.0, xp.zeros(NUM_LABELS, dtype), coefficients, zero, zero)
    else:
        assert posterior is not None, "tables are made of posterior means"
        table = posterior.hermite[rows - 1]
        if kind != "least_norm":
            table = (
                table / variance_weight(order, posterior.square, posterior.hermite_squares, num_experts)[None]
            )
        basis = interpolate(y, posterior.start, posterior.step, table, xp)
        constraints = hermite_coefficients(basis).T
        if xp is np and not scaled_condition(constraints) <= LARGEST_CONDITION:
            return _no_transform(order)
        solution = solve(constraints, target)
        coefficients = xp.zeros(order + 1, dtype)
        transform = LabelTransform(
            posterior.start, posterior.step, solution @ table, coefficients, zero, zero
        )

    applied = xp.tensordot(solution, basis, 1)
    squares = (applied**2 @ noise.weights) * grid.weights
    tau = variance_weight(order, grid.nodes**2, he[2:4] ** 2, num_experts)
    return transform._replace(second_moment=squares.sum(), weighted_second_moment=squares @ tau)


def interpolate(
    y: Float[Array, "*shape"],
    start: Array,
    step: Array,
    values: Float[Array, "*tables num_labels"],
    xp: ModuleType,
) -> Float[Array, " ..."]:
    """Linear interpolation in uniform tables (..., num_labels), constant beyond their ends; (..., *y.shape)."""
    last = values.shape[-1] - 1
    position = xp.clip((y - start) / step, 0.0, last)
    left = xp.clip(xp.floor(position), 0, last - 1).astype(np.int32)
    fraction = position - left.astype(position.dtype)
    at_left, at_right = (xp.take(values, index, axis=-1, mode="clip") for index in (left, left + 1))
    return at_left + xp.broadcast_to(fraction, at_left.shape) * (at_right - at_left)


def num_quadrature_nodes(fn: ScalarFunction, smallest_noise_std: float) -> int:
    """Nodes over z whose images are closer than sigma / 1.2: a power of two plus one, 2049 to _MOST_NODES."""
    spacing = smallest_noise_std / (1.2 * max(activation_facts(fn).largest_slope, 1e-3))
    return 2 ** int(np.clip(math.ceil(math.log2(2 * HALF_WIDTH / spacing)), 11, 15)) + 1


_MOST_NODES = 2**15 + 1
_CONSTRAINT_NODES = 2**13 + 1
"""Nodes of the constraints' quadrature on the host: the error at a kink is below 1e-6."""


def _labels_on_host(fn: ScalarFunction, num_nodes: int) -> Float[np.ndarray, " {num_nodes}"]:
    """g at the nodes of a grid of 2^m + 1, in double precision under any default of JAX: every 2^i-th value of the finest grid."""
    return _finest_labels_on_host(fn)[:: (_MOST_NODES - 1) // (num_nodes - 1)]


@functools.lru_cache(maxsize=256)
def _finest_labels_on_host(fn: ScalarFunction) -> Float[np.ndarray, " num_nodes"]:
    return values_on_host(fn, gaussian_grid(_MOST_NODES, xp=np).nodes)


@functools.lru_cache(maxsize=512)
def _posterior_on_host(fn: ScalarFunction, noise_std: float, least_nodes: int) -> PosteriorTable[np.ndarray]:
    num_nodes = max(least_nodes, num_quadrature_nodes(fn, noise_std))
    return posterior_table(np.asarray(noise_std, np.float64), _labels_on_host(fn, num_nodes), xp=np)


@functools.lru_cache(maxsize=8192)
def transform_on_host(
    fn: ScalarFunction,
    noise_std: float,
    order: int,
    kind: TransformKind,
    num_experts: int,
    draft: bool = False,
) -> LabelTransform[np.ndarray]:
    """`build_label_transform` in double precision with NumPy, for a sigma that is a number; usability is not checked.

    A transform whose constraints are singular comes back with `second_moment` infinite. A `draft` is made on a quadrature
    eight times smaller or more: its second moments are good to three digits: enough to choose a transform, not to apply it.
    """
    tabulated = kind not in ("polynomial", "centred")
    posterior = _posterior_on_host(fn, noise_std, 2049 if draft else 4097) if tabulated else None
    fine = posterior is not None and posterior.step > 0.2 * noise_std
    num_nodes = 2049 if draft else max(_CONSTRAINT_NODES, num_quadrature_nodes(fn, noise_std))
    build = functools.partial(
        build_label_transform,
        np.asarray(noise_std, np.float64),
        posterior,
        _labels_on_host(fn, num_nodes),
        num_noise_nodes=21 if draft else 161 if fine else 41,
        parity=activation_facts(fn).parity,
        order=order,
        kind=kind,
        num_experts=num_experts,
        xp=np,
    )
    try:
        return build()
    except np.linalg.LinAlgError:  # of a polynomial kind
        return _no_transform(order)


def traced_label_transforms(
    fn: ScalarFunction,
    noise_std: Float[jax.Array, ""],
    wanted: tuple[tuple[int, TransformKind], ...],
    num_experts: int,
    smallest_noise_std: float,
) -> tuple[LabelTransform, ...]:
    """The transforms (order, kind) in `wanted` at a traced noise_std, from one table of posterior means."""
    nodes = gaussian_grid(num_quadrature_nodes(fn, smallest_noise_std), dtype=noise_std.dtype).nodes
    labels = apply_activation(fn, nodes)
    posterior = posterior_table(noise_std, labels, xp=jnp)
    return tuple(
        build_label_transform(
            noise_std,
            posterior,
            labels,
            parity=activation_facts(fn).parity,
            order=order,
            kind=kind,
            num_experts=num_experts,
        )
        for order, kind in wanted
    )
