"""Label transforms of output families: against sums over dense grids of labels and Gauss-Hermite rules, without any table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from moejax.methods.preparation import choose_orders
from moejax.model.families import get_family
from moejax.model.family import Nuisances
from moejax.moments.family_transforms import family_transforms_on_host, traced_family_transforms
from moejax.moments.marginal import estimate_nuisances
from moejax.moments.orders import choose_order, predicted_mse

NODES, MASS = np.polynomial.hermite_e.hermegauss(160)
MASS = MASS / MASS.sum()
HE = np.stack([NODES, NODES**2 - 1, NODES**3 - 3 * NODES])
CUTS = np.array([-np.inf, -1.5, 0.0, 1.0, np.inf])


def grid(low, high, number=20_001):
    """Labels e^u on a uniform grid of u, and their weights."""
    u = np.linspace(low, high, number)
    return np.exp(u), np.exp(u) * (u[1] - u[0])


def line(scale, reach=12.0, number=20_001):
    """Labels scale sinh(u) on a uniform grid of u, and their weights."""
    u = np.linspace(-reach, reach, number)
    return scale * np.sinh(u), scale * np.cosh(u) * (u[1] - u[0])


def ordinal(y, t):
    y = y.astype(int)
    return scipy.special.expit(CUTS[y + 1] - t) - scipy.special.expit(CUTS[y] - t)


def counts(number):
    return np.arange(float(number)), np.ones(number)


def inflated(y, t):
    return 0.2 * (y == 0) + 0.8 * scipy.stats.poisson.pmf(y, np.exp(t))


# family, nuisances, (labels, weights), p(y | t), then METHOD's numbers: signals, E[l2^2], E[l3^2], n MSE (d = 10, k = 3)
TABLE = {
    "poisson": (
        ("poisson", (1, 0, 1)),
        counts(4000),
        lambda y, t: scipy.stats.poisson.pmf(y, np.exp(t)),
        (0.5224, 0.3430, 0.3277, 1.9946, 1.4838, 363.3),
    ),
    "poisson of intercept 1": (
        ("poisson", (1, 1, 1)),
        counts(9000),
        lambda y, t: scipy.stats.poisson.pmf(y, np.exp(t)),
        (0.7137, 0.4959, 0.4337, 1.1360, 0.6718, 170.3),
    ),
    "negative binomial": (
        ("negative_binomial", (1, 1, 0.5)),
        counts(20_000),
        lambda y, t: scipy.stats.nbinom.pmf(y, 2, 1 / (1 + 0.5 * np.exp(t))),
        (0.4806, 0.2454, 0.1685, 2.3846, 1.9011, 393.4),
    ),
    "binomial(10)": (
        ("binomial(10)", (1, 0, 1)),
        counts(11),
        lambda y, t: scipy.stats.binom.pmf(y, 10, scipy.special.expit(t)),
        (0.6677, 0.3337, 0.1322, 1.4982, 1.3364, 203.0),
    ),
    "binomial(3)": (
        ("binomial(3)", (1, 0, 1)),
        counts(4),
        lambda y, t: scipy.stats.binom.pmf(y, 3, scipy.special.expit(t)),
        (0.3803, 0.0744, 0.0116, 6.7247, 28.121, 1301.7),
    ),
    "gamma": (
        ("gamma", (1, 0, 0.5)),
        grid(-18, 14),
        lambda y, t: scipy.stats.gamma.pdf(y, 2, scale=0.5 * np.exp(t)),
        (0.6186, 0.3848, 0.2503, 1.3169, 0.7170, 197.4),
    ),
    "exponential": (
        ("exponential", (1, 0, 1)),
        grid(-30, 14),
        lambda y, t: scipy.stats.expon.pdf(y, scale=np.exp(t)),
        (0.4244, 0.2059, 0.1205, 2.5928, 1.8040, 394.1),
    ),
    "student_t(3)": (
        ("student_t(3)", (1, 0, 0.3)),
        line(0.3),
        lambda y, t: scipy.stats.t.pdf(y, 3, t, 0.3),
        (0.8179, 0.6307, 0.4609, 0.7928, 0.3634, 107.4),
    ),
    "zero-inflated": (
        ("zero_inflated_poisson", (1, 0.5, 0.25)),
        counts(6000),
        inflated,
        (0.4188, 0.3276, 0.3029, 2.1144, 1.3139, 326.8),
    ),
    "ordinal": (
        ("ordinal(4,-1.5,0,1)", (1, 0, 1)),
        counts(4),
        ordinal,
        (0.2201, 0.0282, 0.0030, 17.76, 119.8, 4607.3),
    ),
}


def independent(labels, weights, density, at):
    """(signals, E[l2^2], E[l3^2], n MSE) by sums over labels and a Gauss-Hermite rule."""
    norm, intercept, _ = at
    t = norm * NODES + intercept
    keep = MASS > 1e-30
    joint = density(labels[None], t[keep, None]) * weights[None] * MASS[keep, None]
    law = joint.sum(axis=0)
    kept = law > 1e-280
    joint, law = joint[:, kept], law[kept]
    rho = HE[:, keep] @ joint / law
    square = NODES[keep] ** 2 @ joint / law
    second = HE[1, keep] ** 2 @ joint / law
    p = 1 / 3
    tau = {2: 1 - p + p * square, 3: p * second + 2 * (p * square + 1 - 2 * p)}

    def least(order, weight):
        rows = rho[:order]
        gram = (rows * law / weight) @ rows.T
        return np.linalg.inv(gram)[-1, -1]

    signals = (rho**2 * law).sum(axis=1) / [1, 2, 6]
    plain = [least(m, 1.0) for m in (2, 3)]
    return (*signals, *plain, 9 * (7 * least(2, tau[2]) + 2 * least(3, tau[3])))


@pytest.mark.parametrize("case", TABLE)
def test_signals_second_moments_and_errors(case):
    (name, at), (labels, weights), density, published = TABLE[case]
    expected = independent(labels, weights, density, at)
    np.testing.assert_allclose(
        expected, published, rtol=1e-2
    )  # the numbers have four digits, the smallest of them two
    family, nuisances = get_family(name), Nuisances(*at)
    made = family_transforms_on_host(family, nuisances, 3)
    got = (
        *made.signals[:3],
        *(float(made.transforms[m, "least_norm"].second_moment) for m in (2, 3)),
        predicted_mse(family, nuisances, 3, "weighted"),
    )
    np.testing.assert_allclose(got, expected, rtol=5e-4)
    assert made.mass == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["poisson", "student_t(3)"])
def test_transforms_meet_their_constraints(name):
    """c_1, .., c_m on a million draws, in standard errors."""
    family, at = get_family(name), Nuisances(1.0, 0.2, 0.4)
    with jax.enable_x64(True):
        n = 1_000_000
        z = jax.random.normal(jax.random.key(0), (n,))
        y = family.sample(jax.random.key(1), at.norm * z + at.intercept, jnp.full(n, at.dispersion))
        he = np.stack([z, z**2 - 1, z**3 - 3 * z, z**4 - 6 * z**2 + 3])
        for order in (1, 2, 3, 4):
            transform = family_transforms_on_host(family, at, 3).transforms[order, "weighted"]
            values = np.asarray(transform(y))
            for r in range(1, order + 1):
                products = he[r - 1] * values
                error = products.std() / n**0.5
                assert abs(products.mean() - (r == order)) < 4.5 * error
            assert np.mean(values**2) == pytest.approx(float(transform.second_moment), rel=0.03)


def test_traced_transforms_are_those_of_the_host():
    family, at = get_family("gamma"), Nuisances(0.8, 0.1, 0.6)
    host = family_transforms_on_host(family, at, 3).transforms
    with jax.enable_x64(True):
        made = jax.jit(
            lambda at: traced_family_transforms(family, at, ((2, "weighted"), (3, "weighted")), 3)
        )(Nuisances(*(jnp.asarray(v, float) for v in at)))
    for transform, order in zip(made, (2, 3), strict=True):
        np.testing.assert_allclose(transform.values, host[order, "weighted"].values, rtol=1e-6, atol=1e-9)


def test_few_values_have_few_orders():
    """Labels of N + 1 values have order m only for m <= N; the refusal says why."""
    at = Nuisances(1.0, 0.0, 1.0)
    assert choose_order(get_family("bernoulli"), at).order is None
    assert "labels of 2 values" in choose_order(get_family("bernoulli"), at).reason
    assert (2, "weighted") in family_transforms_on_host(get_family("binomial(2)"), at, 3).transforms
    assert (3, "weighted") not in family_transforms_on_host(get_family("binomial(2)"), at, 3).transforms
    about = {"num_rows": 10_000, "dim": 5, "num_experts": 2}
    assert choose_orders("multistart", get_family("bernoulli"), at, **about).orders == ()
    with pytest.raises(ValueError, match=r"bernoulli has no usable order at norm 1.*labels of 2 values"):
        choose_orders("spectral_em", get_family("bernoulli"), at, **about)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("poisson", (1.0, 0.5, 1.0)),
        ("negative_binomial", (1.0, 0.5, 0.5)),
        ("binomial(10)", (1.0, 0.0, 1.0)),
        ("gamma", (1.0, 0.0, 0.5)),
        ("student_t(3)", (2.0, -1.0, 0.6)),
    ],
)
def test_labels_tell_norm_intercept_and_dispersion(name, at):
    """At n = 20,000, within five of the standard errors that were measured for such labels."""
    family, n = get_family(name), 20_000
    errors = {
        "poisson": (0.01, 0.012, 1),
        "negative_binomial": (0.065, 0.07, 0.22),
        "student_t(3)": (0.03, 0.02, 0.05),
    }
    error = errors.get(name, (0.02, 0.02, 0.025))
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(5), (n,))
        y = family.sample(jax.random.key(6), at[0] * z + at[1], jnp.full(n, at[2]))
        program = jax.jit(lambda y, w: estimate_nuisances(y, w, family=family))
        found = np.asarray(program(y, jnp.ones(n)).nuisances)
        assert np.all(np.abs(found - at) < 5 * np.asarray(error))
        # rows of weight zero do not count, whatever they hold
        more = jnp.concatenate([y, jnp.full(1000, y[0] * 7)])
        again = program(more, jnp.concatenate([jnp.ones(n), jnp.zeros(1000)])).nuisances
        np.testing.assert_allclose(again, found, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_marginal_likelihood_of_counts_is_the_integral(scale):
    """Few and many distinct counts: one block of bins, and several of which the last is not full."""
    at, n = Nuisances(0.6, scale, 0.5), 3000
    rng = np.random.default_rng(3)
    size = 1.0 / at.dispersion
    mean = np.exp(at.norm * rng.normal(size=n) + at.intercept)
    y = rng.negative_binomial(size, size / (size + mean)).astype(float)
    weights = rng.integers(0, 3, n).astype(float)
    distinct = len(np.unique(y[weights > 0]))
    assert distinct < 64 if scale < 1 else distinct > 128
    means = np.exp(at.norm * NODES + at.intercept)
    density = scipy.stats.nbinom.pmf(y[:, None], size, size / (size + means[None])) @ MASS
    expected = weights @ np.log(density) / weights.sum()
    with jax.enable_x64(True):
        found = jax.jit(
            lambda y, weights: estimate_nuisances(
                y,
                weights,
                family=get_family("negative_binomial"),
                norm=at.norm,
                intercept=at.intercept,
                dispersion=at.dispersion,
            )
        )(y, weights)
    assert float(found.log_likelihood) == pytest.approx(expected, rel=1e-6)
