r"""Label transforms of output families: l with E[l(y) S_m(x)] = sum_i E[P_i] u_i^{(x) m} for any law p(y | t) of the labels.

Let Z ~ N(0, 1) and Y ~ p(. | rho Z + b; s): every expert has the same norm rho, intercept b and dispersion s, and a direction u_i.
A transform needs c_r(l) = E[He_r(Z) l(Y)] only, and rho_r(y) = E[He_r(Z) | Y = y], which has E[rho_r(Y)^2] <= r! whatever the
tails of Y. So transforms of order m exist if rho_m is no combination of rho_1, .., rho_{m-1}. Labels of N + 1 values have N
independent functions of mean zero: order m needs N >= m (a whitened, "relaxed" one N >= m - 1), and a Bernoulli label has no
order 2. Families with a strictly monotone natural parameter have every order that this permits.

The integrals over z are trapezoidal sums, those over y the sums of `label_rule`. Between its knots a transform is linear and beyond
them constant, and its coefficients are solved from the constraints on that function, as in `label_transforms`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.model.activations import activation_facts
from moejax.model.family import Channel, Family, Nuisances, activation_of, channel_facts
from moejax.model.gaussian import HALF_WIDTH, gaussian_grid, hermite_polynomials
from moejax.model.label_rule import LabelRule, label_rule
from moejax.model.on_host import on_host
from moejax.model.small_linear_algebra import solve
from moejax.moments.label_transforms import LabelTransform, TransformKind, transform_on_host, variance_weight

FEWEST_NODES, MOST_NODES = 1025, 4097
"""Nodes over z: 1025, and more for a location family whose noise is small beside the norm of the experts."""
LARGEST_CONDITION = 1e10
"""An order is refused if the matrix of its constraints, scaled to a unit diagonal, has a condition number above this."""
LARGEST_MISSING = 1e-4
"""The largest share of labels that the rule over them may miss."""


class FamilyTables(NamedTuple):
    """Posterior means at the knots, and the joint law of (z, y) on the rule over y."""

    rule: LabelRule
    hermite: Float[jax.Array, "4 m"]
    """(4, m) rho_r at the knots, r = 1..4."""
    square: Float[jax.Array, " m"]
    """(m,) E[Z^2 | y] at the knots."""
    hermite_squares: Float[jax.Array, "2 m"]
    """(2, m) E[He_2(Z)^2 | y], E[He_3(Z)^2 | y] at the knots."""
    moments: Float[jax.Array, "5 q"]
    """(5, q) E[He_r(Z) 1{Y in node}], r = 0..4."""
    weights: Float[jax.Array, "3 q"]
    """(3, q) E[f(Z) 1{Y in node}], f = Z^2, He_2^2, He_3^2."""

    def at_nodes(self, tables: Float[jax.Array, "r m"]) -> Float[jax.Array, "r q"]:
        """Functions given at the knots, at the nodes of the rule."""
        return jax.vmap(lambda table: jnp.interp(self.rule.nodes, self.rule.knots, table))(tables)


def family_tables(family: Family, at: Nuisances, num_nodes: int = FEWEST_NODES) -> FamilyTables:
    """The tables of a family at its nuisances (leaves ()), by quadrature over z and y; traceable."""
    dtype = jnp.result_type(at.norm)
    grid = gaussian_grid(num_nodes, dtype=dtype)
    t = at.norm * grid.nodes + at.intercept
    rule = label_rule(family, t, grid.weights, at.dispersion)
    he = hermite_polynomials(grid.nodes, 4)
    squares = jnp.concatenate([grid.nodes[None] ** 2, he[2:4] ** 2])
    functions = jnp.concatenate([he, squares])

    def of_labels(labels: jax.Array, posterior: bool) -> jax.Array:
        log_density = family.log_density(labels[:, None], t[None], at.dispersion)
        if posterior:
            log_joint = log_density - 0.5 * grid.nodes[None] ** 2
            log_joint = jnp.maximum(log_joint - log_joint.max(axis=1, keepdims=True), -80.0)
            joint = jnp.exp(log_joint)
            joint = joint / joint.sum(axis=1, keepdims=True)
        else:
            joint = jnp.exp(log_density) * grid.weights[None]
        return functions @ joint.T

    at_knots = of_labels(rule.knots, True)
    in_nodes = of_labels(rule.nodes, False) * rule.weights[None]
    return FamilyTables(rule, at_knots[1:5], at_knots[5], at_knots[6:], in_nodes[:5], in_nodes[5:])


def transform_of(
    family: Family, tables: FamilyTables, order: int, kind: TransformKind, num_experts: int
) -> tuple[LabelTransform, jax.Array]:
    """One transform, and the reciprocal condition () of its constraints; traceable. Arguments as in `label_transform`."""
    first = order - 1 if kind == "relaxed" and order > 2 else 1
    step = 2 if channel_facts(family).parity == "even" else 1
    rows = np.asarray([r for r in range(first, order + 1) if (order - r) % step == 0])
    table = tables.hermite[rows - 1]
    if kind != "least_norm":
        table = table / variance_weight(order, tables.square, tables.hermite_squares, num_experts)[None]
    basis = tables.at_nodes(table)
    constraints = tables.moments[rows] @ basis.T
    scale = jnp.sqrt(jnp.abs(jnp.diag(constraints)))
    scaled = constraints / (scale[:, None] * scale[None])
    target = jnp.asarray(rows == order, table.dtype) / scale
    solution = solve(scaled, target) / scale
    applied = solution @ basis
    tau = tables.weights if order > 2 else tables.weights[:1]
    tau = variance_weight_of_nodes(order, tables.moments[0], tau, num_experts)
    zero = jnp.zeros((), table.dtype)
    return LabelTransform(
        zero,
        zero + 1.0,
        solution @ table,
        jnp.zeros(order + 1, table.dtype),
        tables.moments[0] @ applied**2,
        tau @ applied**2,
        tables.rule.knots,
    ), _reciprocal_condition(scaled)


_NONE = LabelTransform(
    np.zeros(()), np.ones(()), np.zeros(1), np.zeros(1), np.asarray(np.inf), np.asarray(np.inf)
)


def variance_weight_of_nodes(
    order: int, mass: Float[jax.Array, " q"], squares: Float[jax.Array, "s q"], num_experts: int
) -> Float[jax.Array, " q"]:
    """(q,): E[tau_m(Z) 1{Y in node}], from the masses of the nodes and E[(Z^2, He_2^2, He_3^2) 1{Y in node}]."""
    positive = jnp.where(mass > 0, mass, 1.0)
    means = squares / positive[None]
    return mass * variance_weight(order, means[0], means[1:], num_experts)


def _reciprocal_condition(matrix: Float[jax.Array, "r r"]) -> Float[jax.Array, ""]:
    """() 1 / (|A| |A^-1|) in the largest entries; zero if the matrix is singular."""
    size = matrix.shape[0]
    columns = [solve(matrix, jnp.eye(size, dtype=matrix.dtype)[i]) for i in range(size)]
    inverse = jnp.abs(jnp.stack(columns)).max() * size
    value = 1.0 / (jnp.abs(matrix).max() * inverse)
    return jnp.where(jnp.isfinite(value), value, 0.0)


def num_nodes_for(family: Family, at: Nuisances) -> int:
    """Nodes over z whose predictors are closer than s / 1.2 for a location family at nuisances that are numbers."""
    if not family.location_scale or family.activation is None:
        return FEWEST_NODES
    slope = max(activation_facts(family.activation).largest_slope, 1e-3)
    spacing = float(at.dispersion) / (1.2 * slope * max(float(at.norm), 1e-12))
    return int(np.clip(2 ** math.ceil(math.log2(2 * HALF_WIDTH / spacing)) + 1, FEWEST_NODES, MOST_NODES))


def _all_on_host(
    static: tuple[Family, tuple[tuple[int, TransformKind], ...], int, int],
    norm: jax.Array,
    intercept: jax.Array,
    dispersion: jax.Array,
) -> tuple[tuple[tuple[LabelTransform, jax.Array], ...], jax.Array, jax.Array]:
    family, wanted, num_experts, num_nodes = static
    tables = family_tables(family, Nuisances(norm, intercept, dispersion), num_nodes)
    transforms = tuple(transform_of(family, tables, *one, num_experts) for one in wanted)
    signals = tables.moments[0] @ (tables.at_nodes(tables.hermite) ** 2).T
    return transforms, signals, tables.moments[0].sum()


class OnHost(NamedTuple):
    """The transforms of a family at nuisances that are numbers, in double precision."""

    transforms: dict[tuple[int, TransformKind], LabelTransform[np.ndarray]]
    """By order and kind; one whose constraints are singular has an infinite `second_moment`."""
    signals: np.ndarray
    """(4,) E[rho_r(Y)^2] / r!: how much a label tells of He_r(Z); at most 1."""
    mass: float
    """The total mass of the rule over the labels."""


_KINDS: tuple[TransformKind, ...] = ("weighted", "least_norm", "relaxed")


@functools.lru_cache(maxsize=1024)
def family_transforms_on_host(family: Family, at: Nuisances, num_experts: int) -> OnHost:
    """Every transform that exists of the family at nuisances that are numbers."""
    most = family.support if isinstance(family.support, int) else 4
    wanted = tuple(
        (m, kind)
        for m in (1, 2, 3, 4)
        for kind in _KINDS
        if (m <= most if kind != "relaxed" else 2 < m <= most + 1)
    )
    if channel_facts(family).parity == "even":
        wanted = tuple((m, kind) for m, kind in wanted if m % 2 == 0)
    static = (family, wanted, num_experts, num_nodes_for(family, at))
    made, signals, mass = on_host(_all_on_host, static, *(float(value) for value in at))
    transforms = {}
    for one, (transform, reciprocal) in zip(wanted, made, strict=True):
        usable = reciprocal > 1.0 / LARGEST_CONDITION and np.isfinite(transform.second_moment)
        infinite = np.asarray(np.inf)
        transforms[one] = (
            transform
            if usable
            else transform._replace(second_moment=infinite, weighted_second_moment=infinite)
        )
    factorials = np.array([1.0, 2.0, 6.0, 24.0])
    return OnHost(transforms, signals / factorials, float(mass))


Level = float | Nuisances
"""What transforms are made for: the noise of Gaussian labels, or the nuisances of another family."""


def transform_at(
    channel: Channel, level: Level, order: int, kind: TransformKind, num_experts: int, *, draft: bool = False
) -> LabelTransform[np.ndarray]:
    """The transform of a channel at a level that consists of numbers; arguments as in `transform_on_host`.

    Its `second_moment` is infinite if there is none.
    """
    if not isinstance(level, Nuisances):
        return transform_on_host(activation_of(channel), level, order, kind, num_experts, draft)
    assert isinstance(channel, Family), "a family has nuisances"
    kind = "weighted" if kind == "relaxed" and order < 3 else kind
    return family_transforms_on_host(channel, level, num_experts).transforms.get((order, kind), _NONE)


def why_no_transform(family: Family, at: Nuisances, order: int, kind: TransformKind, largest: float) -> str:
    """The reason why a family has no usable transform of an order at its nuisances, with the numbers; empty if it has one."""
    if channel_facts(family).parity == "even" and order % 2 == 1:
        return f"c_{order} = 0 for every label transform of an even activation"
    made = family_transforms_on_host(family, at, 3)
    transform = made.transforms.get((order, kind))
    if transform is None:
        values = int(family.support) + 1 if isinstance(family.support, int) else 0
        return (
            f"labels of {values} values have {values - 1} independent transforms, too few for order {order}"
        )
    if not made.mass > 1.0 - LARGEST_MISSING:
        return f"{1.0 - made.mass:.2g} of the labels lie beyond the range of the quadrature over them"
    value = float(transform.second_moment)
    if not math.isfinite(value):
        return f"c_{order} = 1 contradicts the other constraints to rounding"
    if value > largest:
        return f"E[l_{order}^2] at c_{order} = 1 is {value:,.0f}, above the bound of {largest:,.0f}"
    return ""


def traced_family_transforms(
    family: Family, at: Nuisances, wanted: tuple[tuple[int, TransformKind], ...], num_experts: int
) -> tuple[LabelTransform[Any], ...]:
    """The transforms (order, kind) in `wanted` at traced nuisances."""
    tables = family_tables(family, at)
    return tuple(transform_of(family, tables, order, kind, num_experts)[0] for order, kind in wanted)
