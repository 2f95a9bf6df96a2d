"""Label transforms against reference tables, adaptive quadrature, and exact piecewise-linear integrals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import hermite_e
from scipy import integrate, special, stats

from moejax import label_transform
from moejax.model.activations import activation_facts, get_activation
from moejax.moments.label_transforms import TRANSFORM_KINDS, LabelTransform, transform_on_host
from moejax.moments.orders import (
    RELATIVE_NOISE_RANGE,
    choose_order,
    predicted_mse,
    transform_noise_range,
    transform_noise_std,
    why_unusable,
)

ALL = (
    "linear",
    "relu",
    "leaky_relu",
    "elu",
    "gelu",
    "silu",
    "softplus",
    "sigmoid",
    "tanh",
    "erf",
    "sin",
    "abs",
    "square",
    "cos",
)


def gelu_tanh(t):
    return jax.nn.gelu(t, approximate=True)


def leaky_relu_tenth(t):
    return jax.nn.leaky_relu(t, 0.1)


# alpha, beta, gamma, c_3, c_2 of l3 = y^3 + alpha y^2 + beta y and l2 = y^2 + gamma y, sigma = 0.1
COEFFICIENTS = {
    "linear": (0, -3.03, 0, 6, 2),
    "relu": (-3.2936, 2.2258, -1.5958, 0.37209, 0.36338),
    "sigmoid": (-1.5, 0.6210, -1, 0.02277, 0.06240),
    "tanh": (0, -0.7299, 0, 0.23346, 0.36360),
    "softplus": (-3.5693, 3.2156, -2.0254, 0.69994, 0.48812),
    "elu": (-1.8003, -0.7401, -0.8022, 1.64943, 0.93942),
    "gelu": (-3.0704, 1.6062, -1.4105, 0.29306, 0.37613),
    gelu_tanh: (-3.0706, 1.6061, -1.4105, 0.29295, 0.37622),
    "leaky_relu": (-3.2448, 2.1259, -1.5798, 0.41130, 0.37615),
    "silu": (-2.5044, 0.6918, -1.1149, 0.52039, 0.44319),
    "sin": (0, -0.7663, 0, 0.06665, 0.27067),
}
# E[l3^2], E[l2^2] of the polynomial, centred and least-norm transforms, sigma = 0.1, to three digits
SECOND_MOMENTS = {
    "linear": ((0.172, 0.172, 0.172), (0.765, 0.510, 0.510)),
    "sigmoid": ((7.84, 0.775, 0.759), (11.0, 1.05, 1.04)),
    "tanh": ((0.689, 0.689, 0.643), (2.10, 0.859, 0.814)),
    "relu": ((1.73, 1.73, 1.51), (1.85, 1.73, 1.56)),
    leaky_relu_tenth: ((0.659, 0.600, 0.353), (1.12, 1.12, 0.867)),
    "gelu": ((3.91, 3.45, 1.37), (1.90, 1.89, 1.59)),
    "softplus": ((1.24, 0.421, 0.288), (2.85, 0.781, 0.646)),
    "elu": ((0.477, 0.348, 0.263), (1.02, 0.707, 0.607)),
    "leaky_relu": ((1.46, 1.46, 1.33), (1.73, 1.64, 1.49)),
    "silu": ((1.45, 1.18, 0.965), (1.40, 1.31, 1.11)),
}


def last_digit(value: float, digits: int) -> float:
    """One unit in the last of so many significant digits."""
    return 10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits)


# ---- an independent quadrature: Gauss-Legendre panels over z, split at 0; noise in closed form


@functools.cache
def panels() -> tuple[np.ndarray, np.ndarray]:
    """2400 Gauss-Legendre nodes on +-9 and weights times the normal density."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(-9.0, 9.0, 201)
    half = 0.5 * np.diff(edges)[:, None]
    z = (0.5 * (edges[1:] + edges[:-1])[:, None] + half * nodes[None]).reshape(-1)
    return z, (half * weights[None]).reshape(-1) * stats.norm.pdf(z)


@functools.cache
def labels_at_panels(fn) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.vmap(fn)(jnp.asarray(panels()[0], jnp.float64)))


@functools.lru_cache(maxsize=1)
def mean_excess(fn, noise_std: float, start: float, step: float, num_labels: int) -> np.ndarray:
    """(2400, num_labels): E[(g(z) + sigma N - t_j)_+] in closed form, t_j the knots of a table."""
    knots = start + step * np.arange(num_labels)
    distance = (labels_at_panels(fn)[:, None] - knots[None]) / noise_std
    return noise_std * (
        distance * special.ndtr(distance) + np.exp(-0.5 * distance**2) / math.sqrt(2 * math.pi)
    )


def exact_hermite_coefficients(fn, noise_std: float, transform: LabelTransform) -> np.ndarray:
    """c_0 .. c_4 of what a transform's fields describe: a clamped piecewise-linear table plus a polynomial."""
    z, weights = panels()
    g = labels_at_panels(fn)
    moments = [np.ones_like(g), g, g**2 + noise_std**2, g**3 + 3 * g * noise_std**2]
    moments.append(g**4 + 6 * g**2 * noise_std**2 + 3 * noise_std**4)
    coefficients = np.asarray(transform.coefficients, np.float64)
    h = sum(c * m for c, m in zip(coefficients, moments, strict=False))
    values = np.asarray(transform.values, np.float64)
    if np.any(values):
        start, step = float(transform.start), float(transform.step)
        slopes = np.concatenate([[0.0], np.diff(values) / step, [0.0]])
        h = h + values[0] + mean_excess(fn, noise_std, start, step, values.size) @ np.diff(slopes)
    return np.stack([hermite_e.hermeval(z, np.eye(5)[r]) for r in range(5)]) @ (weights * h)


@functools.cache
def noise_nodes() -> tuple[np.ndarray, np.ndarray]:
    nodes = np.linspace(-7.5, 7.5, 151)
    return nodes, stats.norm.pdf(nodes) * (nodes[1] - nodes[0])


@jax.jit
def _apply(transform, y):
    return transform(y)


def expectation(fn, noise_std: float, transform: LabelTransform, integrand, stride: int = 4) -> np.ndarray:
    """E[integrand(Z, l(Y))] over a product grid, l applied as to a sample, in the transform's dtype."""
    edges, (nodes, weights) = np.linspace(-8.0, 8.0, 800 // stride + 1), np.polynomial.legendre.leggauss(8)
    half = 0.5 * np.diff(edges)[:, None]
    z = (0.5 * (edges[1:] + edges[:-1])[:, None] + half * nodes[None]).reshape(-1)
    weights = (half * weights[None]).reshape(-1) * stats.norm.pdf(z)
    with jax.enable_x64(True):
        g = np.asarray(jax.vmap(fn)(jnp.asarray(z, jnp.float64)))
    noise, noise_weights = noise_nodes()
    y = (g[:, None] + noise_std * noise[None]).reshape(-1)
    applied = np.asarray(_apply(transform, jnp.asarray(y, transform.values.dtype)), np.float64).reshape(
        z.size, -1
    )
    return integrand(z, applied) @ noise_weights @ weights


def hermite_and_square(z, values):
    """(6, nodes, noise): He_0 l .. He_4 l, l^2."""
    he = np.stack([hermite_e.hermeval(z, np.eye(5)[r]) for r in range(5)])
    return np.concatenate([he[:, :, None] * values[None], values[None] ** 2])


# ---- reference tables


@pytest.mark.parametrize("activation", COEFFICIENTS, ids=lambda a: a if isinstance(a, str) else a.__name__)
def test_polynomial_transforms_have_the_reference_coefficients(activation):
    third = np.asarray(label_transform(activation, 0.1, 3, "polynomial").coefficients)
    second = np.asarray(label_transform(activation, 0.1, 2, "polynomial").coefficients)
    assert third[0] == second[0] == 0.0
    got = (third[2] / third[3], third[1] / third[3], second[1] / second[2], 1 / third[3], 1 / second[2])
    for value, expected, decimals in zip(got, COEFFICIENTS[activation], (4, 4, 4, 5, 5), strict=True):
        assert value == pytest.approx(expected, abs=0.6 * 10.0**-decimals)


@pytest.mark.parametrize("noise_std", [0.05, 0.3, 1.0])
def test_noise_enters_the_cubic_through_beta_alone(noise_std):
    fn = get_activation("softplus")
    at_tenth, here = (transform_on_host(fn, s, 3, "polynomial", 3).coefficients for s in (0.1, noise_std))
    assert here[3] == pytest.approx(at_tenth[3], rel=1e-9)
    assert here[2] == pytest.approx(at_tenth[2], rel=1e-9)
    assert here[1] / here[3] == pytest.approx(at_tenth[1] / at_tenth[3] - 3 * (noise_std**2 - 0.01), rel=1e-9)


@pytest.mark.parametrize("activation", SECOND_MOMENTS, ids=lambda a: a if isinstance(a, str) else a.__name__)
def test_second_moments_are_those_of_the_reference(activation):
    fn = get_activation(activation)
    for order, row in zip((3, 2), SECOND_MOMENTS[activation], strict=True):
        for kind, expected in zip(("polynomial", "centred", "least_norm"), row, strict=True):
            transform = label_transform(activation, 0.1, order, kind)
            # the reference was rounded to four digits, then to three
            allowed = 0.51 * last_digit(expected, 3) + 0.5 * last_digit(expected, 4)
            assert float(transform.second_moment) == pytest.approx(expected, abs=allowed), (order, kind)
            *c, square = expectation(fn, 0.1, transform, hermite_and_square)
            assert float(transform.second_moment) == pytest.approx(square, rel=1e-3)
            assert c[order] == pytest.approx(1.0, abs=1e-4)


def adaptive_least_norm(g, noise_std, order, low, high, kinks=()):
    """(G^-1)_mm by nested adaptive quadrature of rho_r(y) = E[He_r(Z) | Y = y]."""

    def joint(y):
        def integrand(z):
            he = np.array([1.0, z, z * z - 1.0, z**3 - 3.0 * z])[: order + 1]
            return (
                he * math.exp(-0.5 * z * z - 0.5 * ((y - g(z)) / noise_std) ** 2) / (2 * math.pi * noise_std)
            )

        centres = [c for c in (*kinks, y) if -8 < c < 8]
        return integrate.quad_vec(integrand, -8, 8, points=centres, epsrel=1e-5, epsabs=1e-10)[0]

    def gram(y):
        moments = joint(y)
        return np.outer(moments[1:], moments[1:]) / moments[0]

    total, _ = integrate.quad_vec(gram, low, high, points=[0.0], epsrel=1e-3, epsabs=1e-6)
    return np.linalg.inv(total)[-1, -1]


@pytest.mark.parametrize(
    ("activation", "g", "order", "low", "high", "kinks"),
    [("relu", lambda z: max(z, 0.0), 3, -0.7, 6.0, (0.0,)), ("tanh", math.tanh, 2, -1.7, 1.7, ())],
)
def test_least_norm_second_moment_by_adaptive_quadrature(activation, g, order, low, high, kinks):
    expected = adaptive_least_norm(g, 0.1, order, low, high, kinks)
    transform = label_transform(activation, 0.1, order, "least_norm")
    assert float(transform.second_moment) == pytest.approx(expected, rel=2e-3)


def test_polynomial_coefficients_by_adaptive_quadrature():
    """alpha and beta of gelu from E[He_r g^p] by scipy, a 2 x 2 system."""

    def moment(r, p):
        def integrand(z):
            return hermite_e.hermeval(z, np.eye(5)[r]) * (z * special.ndtr(z)) ** p * stats.norm.pdf(z)

        return integrate.quad(integrand, -9, 9, epsabs=1e-12)[0]

    noise_std = 0.3
    system = np.array([[moment(r, 2), moment(r, 1)] for r in (1, 2)])
    right = np.array([moment(r, 3) + 3 * noise_std**2 * moment(r, 1) for r in (1, 2)])
    alpha, beta = np.linalg.solve(system, -right)
    c_3 = moment(3, 3) + 3 * noise_std**2 * moment(3, 1) + alpha * moment(3, 2) + beta * moment(3, 1)
    coefficients = label_transform("gelu", noise_std, 3, "polynomial").coefficients
    np.testing.assert_allclose(coefficients, np.array([0, beta, alpha, 1]) / c_3, rtol=1e-6, atol=1e-9)


# ---- the constraints, on what is applied


def usable_orders(fn, noise_std):
    return [m for m in (2, 3, 4) if not why_unusable(fn, noise_std, m)]


def check_constraints(name, noise_std, kinds, orders=(2, 3, 4)):
    fn = get_activation(name)
    table_knots = False
    for order in orders:
        if order not in usable_orders(fn, noise_std):
            continue
        for kind in kinds:
            case = f"{name} sigma {noise_std} order {order} {kind}"
            transform = label_transform(fn, noise_std, order, kind)
            assert transform.values.dtype == jnp.float64
            lowest = order - 1 if kind == "relaxed" and order > 2 else 1
            c = exact_hermite_coefficients(fn, noise_std, transform)
            assert np.abs(c[lowest:order]).max() < 2e-4, (case, c)
            assert abs(c[order] - 1) < 1e-3, (case, c)
            if kind in ("least_norm", "weighted") and not table_knots:
                table_knots = True
                check_call_is_the_table(transform)
            with jax.enable_x64(False):
                single = label_transform(fn, noise_std, order, kind)
                assert single.values.dtype == jnp.float32
                c = expectation(fn, noise_std, single, hermite_and_square)
            assert np.abs(c[lowest:order]).max() < 1e-3, (case, "float32", c)
            assert abs(c[order] - 1) < 1e-3, (case, "float32", c)


def check_call_is_the_table(transform):
    """__call__ is the clamped piecewise-linear function that the exact integrals are of."""
    values = np.asarray(transform.values)
    knots = float(transform.start) + float(transform.step) * np.arange(values.size)
    scale = np.abs(values).max()
    np.testing.assert_allclose(_apply(transform, jnp.asarray(knots)), values, atol=1e-9 * scale)
    between = knots[:-1] + 0.3 * float(transform.step)
    np.testing.assert_allclose(
        _apply(transform, jnp.asarray(between))[: values.size - 1],
        0.7 * values[:-1] + 0.3 * values[1:],
        atol=1e-9 * scale,
    )
    outside = jnp.asarray([knots[0] - 3.0, knots[-1] + 3.0])
    np.testing.assert_allclose(_apply(transform, outside), values[[0, -1]], atol=1e-9 * scale)


def cases(names, levels):
    return [(name, s) for name in names for s in levels]


@pytest.mark.parametrize(("name", "noise_std"), cases(("linear", "relu", "tanh", "abs"), (0.01, 1.0)))
def test_lower_coefficients_vanish_in_what_is_applied(name, noise_std):
    check_constraints(name, noise_std, ("polynomial", "weighted"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "noise_std"), cases(ALL, (0.01, 0.1, 0.5, 1.0)))
def test_lower_coefficients_vanish_for_all(name, noise_std):
    check_constraints(name, noise_std, TRANSFORM_KINDS if noise_std == 0.1 else ("weighted",))


def test_least_norm_and_weighted_have_mean_zero():
    fn = get_activation("relu")
    transform = label_transform(fn, 0.1, 3, "least_norm")
    assert exact_hermite_coefficients(fn, 0.1, transform)[0] == pytest.approx(0.0, abs=1e-3)


# ---- optimality


def tau(order, z, num_experts=3):
    """What one sample contributes to the variance, from the cases of its expert: own, partner, neither."""
    p = 1 / num_experts
    if order == 2:
        return p * z**2 + (1 - p)
    he = hermite_e.hermeval(z, np.eye(5)[order - 1])
    return p * he**2 + p * math.factorial(order - 1) * z**2 + (1 - 2 * p) * math.factorial(order - 1)


@pytest.mark.parametrize(("name", "order"), [("relu", 3), ("sigmoid", 2), ("cos", 4)])
def test_tables_are_optimal(name, order):
    """Along random directions that keep the constraints, E[l^2], or E[l^2 tau], is stationary and convex."""
    fn, noise_std, num_experts = get_activation(name), 0.2, 3
    rng = np.random.default_rng(0)
    by_variance = functools.partial(tau, order, num_experts=num_experts)
    weight = {"least_norm": np.ones_like, "weighted": by_variance, "relaxed": by_variance}
    cost = {}
    for kind in TRANSFORM_KINDS:
        transform = label_transform(fn, noise_std, order, kind, num_experts=num_experts)
        for objective, tau_of in weight.items():
            cost[kind, objective] = expectation(
                fn, noise_std, transform, lambda z, v, t=tau_of: v**2 * t(z)[:, None]
            )
        assert float(transform.weighted_second_moment) == pytest.approx(cost[kind, "weighted"], rel=1e-3)
    for objective in weight:
        competitors = [kind for kind in TRANSFORM_KINDS if objective == "relaxed" or kind != "relaxed"]
        assert cost[objective, objective] == min(cost[kind, objective] for kind in competitors)

    for kind, tau_of in weight.items():
        transform = label_transform(fn, noise_std, order, kind, num_experts=num_experts)
        y = float(transform.start) + float(transform.step) * np.arange(transform.values.size)
        # smooth directions, made to keep the prescribed c_r by subtracting combinations of fixed ones
        middle, width = 0.5 * (y[0] + y[-1]), y[-1] - y[0]
        waves = np.stack(
            [
                np.cos(f * np.pi * (y - middle) / width + s)
                for f, s in zip(rng.uniform(1, 6, 8), rng.uniform(0, 6, 8), strict=True)
            ]
        )
        lowest = order - 1 if kind == "relaxed" and order > 2 else 1
        rows = [r for r in range(lowest, order + 1) if activation_facts(fn).parity != "even" or r % 2 == 0]
        bare = transform._replace(coefficients=jnp.zeros_like(transform.coefficients))
        c = np.stack(
            [exact_hermite_coefficients(fn, noise_std, bare._replace(values=wave)) for wave in waves]
        )[:, rows]
        null = np.linalg.svd(c.T)[2][len(rows) :]
        directions = null @ waves
        for direction in directions:
            size = np.abs(direction).max()

            def objective(step, direction=direction, size=size, transform=transform, tau_of=tau_of):
                changed = transform._replace(values=transform.values + step * direction / size)
                return expectation(fn, noise_std, changed, lambda z, v: v**2 * tau_of(z)[:, None])

            up, here, down = (objective(step) for step in (0.3, 0.0, -0.3))
            curvature = up + down - 2 * here
            assert curvature > 0
            # the minimum along this line is where the transform is, within 1% of the perturbation's size
            assert abs(0.5 * (up - down) / curvature) < 0.01, kind


def test_predicted_mse_is_the_formula_with_its_own_quadrature():
    """p^-2 {(d-k) E[l2^2 x_i^2] + (k-1) E[l3^2 (x_i^2-1)^2 x_j^2]}, averaged over whose label it is."""
    fn, d, k = get_activation("relu"), 10, 3
    second, third = (label_transform(fn, 0.1, m, "weighted", num_experts=k) for m in (2, 3))
    two = expectation(fn, 0.1, second, lambda z, v: v**2 * tau(2, z, k)[:, None])
    three = expectation(fn, 0.1, third, lambda z, v: v**2 * tau(3, z, k)[:, None])
    expected = k**2 * ((d - k) * two + (k - 1) * three)
    assert predicted_mse(fn, 0.1, 3, "weighted", dim=d, num_experts=k) == pytest.approx(expected, rel=1e-3)


def relaxed_cost(fn, noise_std, rows, num_experts):
    """[(G_tau restricted to rows)^-1]_mm, G_tau = E[rho rho' / tau_m], by sums over y of Gauss-Legendre integrals over z."""
    order = rows[-1]
    z, weights = panels()
    g = labels_at_panels(fn)
    y = np.linspace(g.min() - 8 * noise_std, g.max() + 8 * noise_std, 3001)
    joint = weights * stats.norm.pdf((y[:, None] - g[None]) / noise_std) / noise_std
    density = joint.sum(axis=1)
    he = np.stack([hermite_e.hermeval(z, np.eye(5)[r]) for r in rows])
    rho, tau_of_y = (joint @ he.T) / density[:, None], (joint @ tau(order, z, num_experts)) / density
    gram = np.einsum("yr,ys,y->rs", rho, rho, density / tau_of_y) * (y[1] - y[0])
    return np.linalg.inv(gram)[-1, -1]


# of an independent computation with another program, d = 10, k = 3; by parity, the c_2 of an odd g needs no row
@pytest.mark.parametrize(
    ("name", "noise_std", "rows", "expected"),
    [
        ("relu", 0.1, (2, 3), 168.3),
        ("gelu", 0.1, (2, 3), 168.8),
        ("silu", 0.1, (2, 3), 121.0),
        ("tanh", 0.1, (3,), 77.7),
        ("sigmoid", 0.1, (3,), 111.9),
        ("linear", 0.1, (3,), 63.6),
        ("sin", 0.1, (3,), 158.3),
        ("relu", 0.5, (2, 3), 552.7),
    ],
)
def test_relaxed_transforms_have_the_predicted_error(name, noise_std, rows, expected):
    fn, d, k = get_activation(name), 10, 3
    second, third = relaxed_cost(fn, noise_std, (1, 2), k), relaxed_cost(fn, noise_std, rows, k)
    assert k**2 * ((d - k) * second + (k - 1) * third) == pytest.approx(expected, rel=5e-4)
    assert predicted_mse(fn, noise_std, 3, "relaxed") == pytest.approx(expected, rel=2e-3)
    made = label_transform(fn, noise_std, 3, "relaxed")
    assert float(made.weighted_second_moment) == pytest.approx(third, rel=1e-3)


@pytest.mark.parametrize(("name", "order"), [("relu", 3), ("tanh", 3), ("abs", 4), ("sigmoid", 4)])
def test_relaxed_transforms_are_unbiased_in_samples(name, order):
    fn, noise_std, n = get_activation(name), 0.3, 400_000
    z, noise = np.random.default_rng(3).standard_normal((2, n))
    y = jax.vmap(fn)(jnp.asarray(z)) + noise_std * jnp.asarray(noise)
    labels = np.asarray(_apply(label_transform(fn, noise_std, order, "relaxed"), y))
    for r, expected in ((order - 1, 0.0), (order, 1.0)):
        terms = hermite_e.hermeval(z, np.eye(5)[r]) * labels
        assert abs(terms.mean() - expected) < 4 * terms.std() / n**0.5


def test_orders_one_and_two_are_weighted_in_a_relaxed_estimate():
    fn = get_activation("relu")
    for order in (1, 2):
        relaxed, weighted = (transform_on_host(fn, 0.1, order, kind, 3) for kind in ("relaxed", "weighted"))
        np.testing.assert_array_equal(relaxed.values, weighted.values)


def test_dependent_constraints_are_refused_by_their_condition():
    """The conditional means of He_r are multiples of one function for a step, and rho_3 = -4 rho_1 for sin(2 t)."""

    def step(t):
        return jnp.where(t > 0.5, 1.0, 0.0)

    def sin_of_twice(t):
        return jnp.sin(2 * t)

    for fn, kind in ((step, "relaxed"), (step, "weighted"), (sin_of_twice, "weighted")):
        assert transform_on_host(fn, 0.1, 3, kind, 3).second_moment == np.inf
        with pytest.raises(ValueError, match="no order-3 transform"):
            label_transform(fn, 0.1, 3, kind)
    assert why_unusable(sin_of_twice, 0.1, 3, "relaxed") == ""
    assert choose_order(sin_of_twice, 0.1, kind="relaxed").order is None  # no order 2 to whiten with


# n MSE measured with a prototype at d=10, k=3, n=1e5 over 40 trials: predictions to first order are near them
@pytest.mark.parametrize(
    ("name", "noise_std", "measured"),
    [
        ("relu", 0.1, (1250, 858, 290)),
        ("gelu", 0.1, (2057, 715, 236)),
        ("sigmoid", 0.1, (977, 172, 129)),
        ("linear", 0.1, (175, 136, 70)),
    ],
)
def test_predicted_mse_is_near_the_measured(name, noise_std, measured):
    for kind, value in zip(("polynomial", "least_norm", "weighted"), measured, strict=True):
        assert predicted_mse(get_activation(name), noise_std, 3, kind) == pytest.approx(value, rel=0.35), kind


# ---- tracing


@pytest.mark.slow
def test_traced_noise_agrees_with_concrete_under_jit_and_vmap():
    fn = get_activation("relu")
    levels = jnp.asarray([0.05, 0.2, 1.0])
    y = jnp.linspace(-0.1, 3.0, 97)

    @jax.jit
    @jax.vmap
    def traced(noise_std):
        transforms = [
            label_transform(fn, noise_std, m, k, smallest_noise_std=0.05)
            for m, k in ((3, "weighted"), (2, "centred"))
        ]
        return transforms, [t(y) for t in transforms]

    transforms, values = traced(levels)
    for i, noise_std in enumerate(np.asarray(levels)):
        for j, (order, kind) in enumerate(((3, "weighted"), (2, "centred"))):
            concrete = label_transform(fn, float(noise_std), order, kind)
            expected = np.asarray(_apply(concrete, y))
            np.testing.assert_allclose(values[j][i], expected, atol=2e-3 * np.abs(expected).max())
            assert float(transforms[j].second_moment[i]) == pytest.approx(
                float(concrete.second_moment), rel=1e-3
            )
            c = exact_hermite_coefficients(
                fn, float(noise_std), jax.tree.map(lambda leaf, i=i: leaf[i], transforms[j])
            )
            assert np.abs(c[1:order]).max() < 2e-4
            assert abs(c[order] - 1) < 2e-4


# ---- what is refused, and users' own functions


def test_reasons_why_an_order_is_unusable():
    even = get_activation("abs")
    assert "even" in why_unusable(even, 0.1, 3)
    assert "even" in why_unusable(even, 0.1, 1)
    assert not why_unusable(even, 0.1, 4)
    assert "constant" in why_unusable(lambda t: 0.0 * t + 1.0, 0.1, 3)
    reason = why_unusable(get_activation("sigmoid"), 1.0, 3)
    assert "1,000" in reason
    number = float(reason.split("at least ")[1].split(", above")[0].replace(",", ""))
    assert number == pytest.approx(13_000, rel=0.1)
    assert "outside" in why_unusable(get_activation("tanh"), 1e-4, 3)
    assert "outside" in why_unusable(get_activation("tanh"), 100.0, 3)
    assert choose_order(even, 0.1).order == 4
    assert choose_order(get_activation("relu"), 0.1).order == 3
    nothing = choose_order(get_activation("sigmoid"), 1.0)
    assert nothing.order is None
    assert "E[l_" in nothing.reason


@pytest.mark.parametrize("noise_std", [0.0, -0.1, math.nan, math.inf])
def test_a_noise_that_is_no_positive_number_is_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std: expected a positive finite number"):
        label_transform("relu", noise_std)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rely", 0.1), r"unknown name 'rely'; did you mean relu"),
        (("relu", 0.1, 5), r"order: expected 1, 2, 3 or 4, got 5"),
        (
            ("relu", 0.1, 3, "heavy"),
            r"kind: expected one of polynomial, centred, least_norm, weighted, relaxed, got 'heavy'",
        ),
        (("abs", 0.1, 3), r"activation abs: no order-3 transform: c_3 = 0"),
        (("sigmoid", 1.0, 3), r"activation sigmoid: no order-3 transform: E\[l_3\^2\]"),
    ],
)
def test_refusals_name_the_field_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        label_transform(*arguments)


def test_noise_is_moved_into_the_range_of_the_tables():
    fn = get_activation("tanh")
    low, high = transform_noise_range(fn)
    assert (low, high) == tuple(
        bound * activation_facts(fn).standard_deviation for bound in RELATIVE_NOISE_RANGE
    )
    assert transform_noise_std(fn, 0.0) == low
    assert transform_noise_std(fn, math.inf) == high
    assert transform_noise_std(fn, 0.3) == 0.3
    # the transform of the lower end, applied to labels with hardly any noise: a bias, but a small one
    for name, tolerance in (("tanh", 5e-3), ("relu", 3e-2)):
        fn = get_activation(name)
        transform = label_transform(fn, transform_noise_std(fn, 0.0), 3, "weighted")
        c = exact_hermite_coefficients(fn, 1e-6, transform)
        np.testing.assert_allclose(c[1:4], [0.0, 0.0, 1.0], atol=tolerance)


@pytest.mark.parametrize(
    "fn",
    [
        lambda t: jnp.maximum(t - 0.7123, 0.0) + 0.2 * t,
        lambda t: jax.nn.leaky_relu(t, 0.2),
        lambda t: jnp.clip(t, -0.31, 1.27),
    ],
    ids=["kink off the grid", "leaky_relu(0.2)", "clip"],
)
def test_a_users_own_function(fn):
    for order in (2, 3):
        for kind in ("polynomial", "weighted"):
            transform = label_transform(fn, 0.1, order, kind)
            c = expectation(fn, 0.1, transform, hermite_and_square, stride=1)
            assert np.abs(c[1:order]).max() < 2e-4, (order, kind)
            assert abs(c[order] - 1) < 2e-4, (order, kind)
