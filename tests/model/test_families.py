"""Output families: against SciPy's laws, finite differences, the sum over labels and Monte Carlo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import moejax
from moejax.model.families import channel_of, get_family, is_registered
from moejax.model.family import Family, as_family, gaussian
from moejax.model.family_checks import require_sound
from moejax.model.label_rule import label_rule
from moejax.model.special import log_gamma
from moejax.registry import registrations_undone

T = np.array([-1.3, 0.2, 1.1])


def zero_inflated(y, t, s):
    share = s / (1 + s)
    return np.log((y == 0) * share + (1 - share) * scipy.stats.poisson.pmf(y, np.exp(t)))


def ordinal(y, t, s):
    ends = np.array([-np.inf, -1.5, 0.0, 1.0, np.inf])
    y = y.astype(int)
    return np.log(scipy.special.expit(ends[y + 1] - t) - scipy.special.expit(ends[y] - t))


LAWS = {
    "gaussian": (0.7, scipy.stats.norm.logpdf),
    "student_t(3)": (0.7, lambda y, t, s: scipy.stats.t.logpdf(y, 3, t, s)),
    "laplace": (0.7, scipy.stats.laplace.logpdf),
    "poisson": (1.0, lambda y, t, s: scipy.stats.poisson.logpmf(y, np.exp(t))),
    "negative_binomial": (
        0.4,
        lambda y, t, s: scipy.stats.nbinom.logpmf(y, 1 / s, 1 / (1 + s * np.exp(t))),
    ),
    "zero_inflated_poisson": (0.4, zero_inflated),
    "binomial(7)": (1.0, lambda y, t, s: scipy.stats.binom.logpmf(y, 7, scipy.special.expit(t))),
    "bernoulli": (1.0, lambda y, t, s: scipy.stats.bernoulli.logpmf(y, scipy.special.expit(t))),
    "ordinal(4,-1.5,0,1)": (1.0, ordinal),
    "gamma": (0.4, lambda y, t, s: scipy.stats.gamma.logpdf(y, 1 / s, scale=s * np.exp(t))),
    "exponential": (1.0, lambda y, t, s: scipy.stats.expon.logpdf(y, scale=np.exp(t))),
    "lognormal": (0.7, lambda y, t, s: scipy.stats.lognorm.logpdf(y, s, scale=np.exp(t))),
}


def labels_of(family):
    if isinstance(family.support, int):
        return np.arange(family.support + 1.0)
    if family.support == "counts":
        return np.array([0.0, 1.0, 3.0, 8.0, 40.0])
    return np.array([0.05, 0.6, 2.5, 9.0]) if family.support == "positive" else np.array([-2.0, 0.1, 3.0])


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", LAWS)
def test_law_and_derivatives(name):
    """The law is SciPy's; first and second derivatives are those of finite differences of it."""
    s, law = LAWS[name]
    family = get_family(name)
    y, t = np.meshgrid(labels_of(family), T)
    level = np.full((len(T), 1), s)
    at = family.second_order(jnp.asarray(y), jnp.asarray(t), jnp.asarray(level))
    np.testing.assert_allclose(at.log_density, law(y, t, s), rtol=1e-10, atol=1e-12)
    first = family.first_order(jnp.asarray(y), jnp.asarray(t), jnp.asarray(level))
    np.testing.assert_allclose(first.log_density, at.log_density, rtol=1e-12)
    h = 1e-4
    up, down = law(y, t + h, s), law(y, t - h, s)
    np.testing.assert_allclose(at.score, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first.score * family.unit(level), at.score, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(at.curvature, (up - 2 * law(y, t, s) + down) / h**2, rtol=1e-4, atol=1e-5)
    if family.has_dispersion:
        up, down = law(y, t, s * np.exp(h)), law(y, t, s * np.exp(-h))
        np.testing.assert_allclose(at.dispersion_score, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)
        curvature = (up - 2 * law(y, t, s) + down) / h**2
        np.testing.assert_allclose(at.dispersion_curvature, curvature, rtol=1e-4, atol=1e-5)
        crossed = [law(y, t + a * h, s * np.exp(b * h)) for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        cross = (crossed[0] - crossed[1] - crossed[2] + crossed[3]) / (4 * h**2)
        np.testing.assert_allclose(at.cross, cross, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAWS if get_family(name).information is not None])
def test_information_mean_and_variance_are_sums_over_labels(name):
    s, _ = LAWS[name]
    family = get_family(name)
    t = jnp.linspace(-1.5, 1.5, 33)
    rule = label_rule(family, t, jnp.full_like(t, 1 / 33), jnp.asarray(s))
    level = jnp.full((33, 1), s)
    grid = t[:, None] + 0.0 * rule.nodes[None]
    at = family.first_order(rule.nodes[None], grid, level)
    mass = jnp.exp(at.log_density) * rule.weights[None]
    np.testing.assert_allclose(mass.sum(axis=1), 1.0, atol=3e-6)
    expected = (mass * (at.score * family.unit(level)) ** 2).sum(axis=1)
    np.testing.assert_allclose(expected, family.information(t, jnp.asarray(s)) + 0 * t, rtol=2e-4)
    if name == "student_t(3)":  # its second moment lies in tails that the sum does not reach
        return
    mean = mass @ rule.nodes
    np.testing.assert_allclose(mean, family.mean(t, jnp.asarray(s)), rtol=1e-4, atol=1e-5)
    variance = (mass * (rule.nodes[None] - mean[:, None]) ** 2).sum(axis=1)
    np.testing.assert_allclose(variance, family.variance(t, jnp.asarray(s)) + 0 * t, rtol=1e-4)


@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_mean_and_the_law(name):
    """Of 20,000 draws, the mean is within 5 standard errors, and the mean log-density is the negative entropy."""
    s, law = LAWS[name]
    family = get_family(name)
    n, t = 20_000, 0.3
    y = np.asarray(family.sample(jax.random.key(3), jnp.full(n, t), jnp.full(n, s)))
    if name != "student_t(3)":
        assert abs(y.mean() - float(family.mean(jnp.asarray(t), jnp.asarray(s)))) < 5 * y.std() / n**0.5
    values = law(y, np.full(n, t), s)
    rule = label_rule(family, jnp.linspace(t - 0.1, t + 0.1, 33), jnp.full(33, 1 / 33), jnp.asarray(s))
    log_density = np.asarray(family.log_density(rule.nodes, jnp.full_like(rule.nodes, t), s))
    finite = log_density > -700
    entropy = np.sum((np.exp(log_density) * log_density * np.asarray(rule.weights))[finite])
    assert abs(values.mean() - entropy) < 5 * values.std() / n**0.5 + 1e-3


def test_gaussian_is_a_family_with_closed_forms():
    """Those of the generic family with the same log-density, for a g with a second derivative."""
    closed = gaussian(jnp.tanh)
    generic = Family(
        "normal",
        closed.log_density,
        support="real",
        mean=closed.mean,
        has_dispersion=True,
        information=lambda t, s: (1 - jnp.tanh(t) ** 2) ** 2 / s**2,
    )
    y, t, s = jnp.asarray([[0.3, -1.2]]), jnp.asarray([[0.1, 0.5], [-0.4, 2.0]]), jnp.asarray([[0.2], [0.7]])
    ours, theirs = closed.second_order(y, t, s), generic.second_order(y, t, s)
    for name in set(ours._fields) - {"dispersion_information"}:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)
    first = closed.first_order(y, t, s)
    np.testing.assert_allclose(first.score * closed.unit(s), theirs.score, rtol=1e-9)
    assert as_family(jnp.tanh) is closed


def test_derivatives_over_a_width_are_differences():
    family, w = get_family("laplace"), 0.05
    y, t, s = jnp.zeros((1, 1)), jnp.asarray([[0.02]]), jnp.asarray([[0.5]])
    at = family.second_order(y, t, s, jnp.asarray(w))
    values = [-abs(0.02 + sign * w) / 0.5 for sign in (1, -1)]
    assert float(at.score[0, 0]) == pytest.approx((values[0] - values[1]) / (2 * w))
    assert float(at.curvature[0, 0]) == pytest.approx(
        (-2.0 - 2.0) / (2 * w)
    )  # the jump of the score at the kink


def test_log_gamma_is_that_of_scipy():
    x = np.concatenate([np.geomspace(1e-8, 1e8, 401), [7.999999, 8.0]])
    np.testing.assert_allclose(log_gamma(jnp.asarray(x)), scipy.special.gammaln(x), rtol=1e-13, atol=2e-14)
    second = jax.vmap(jax.grad(jax.grad(log_gamma)))(jnp.asarray(x))
    np.testing.assert_allclose(second, scipy.special.polygamma(1, x), rtol=1e-11)


def test_activation_acts_on_the_predictor():
    family = get_family("poisson", "tanh")
    assert family is get_family("poisson", jnp.tanh)
    assert is_registered(family)
    y, t = jnp.asarray([0.0, 4.0]), jnp.asarray([0.3, -2.0])
    np.testing.assert_allclose(
        family.log_density(y, t, 1.0), scipy.stats.poisson.logpmf(y, np.exp(np.tanh(t))), rtol=1e-12
    )
    expected = np.exp(np.tanh(t)) * (1 - np.tanh(t) ** 2) ** 2
    np.testing.assert_allclose(family.information(t, 1.0), expected, rtol=1e-12)
    assert channel_of("gaussian", "tanh") is jnp.tanh


def test_cuts_and_degrees_of_freedom_are_estimated():
    """From predictors and shares that are known: those that made the labels."""
    rng = np.random.default_rng(0)
    n = 40_000
    t = rng.normal(size=(n, 1))
    shares = np.ones((n, 1))
    cuts = np.array([-1.0, 0.4, 1.3])
    y = (t + rng.logistic(size=(n, 1)) > cuts).sum(axis=1).astype(float)
    found = get_family("ordinal(4)").adapt(y, t, np.ones(1), shares)
    got = np.array([float(part) for part in found.name[len("ordinal(4,") : -1].split(",")])
    np.testing.assert_allclose(got, cuts, atol=0.06)
    assert get_family(found.name) is found
    first = get_family("ordinal(4)").adapt(y, None, None, shares[:, 0])
    assert first.num_parameters == 0
    heavy = t[:, 0] + 0.3 * rng.standard_t(3, size=n)
    assert get_family("student_t").adapt(heavy, t, np.full(1, 0.5), shares).name == "student_t(3)"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log_density": lambda y, t, s: -jnp.abs(y - t)}, "normalised over the labels, got total mass 2"),
        (
            {"log_density": lambda y, t, s: jnp.where(y > 1, jnp.nan, -jnp.abs(y - t) - jnp.log(2.0))},
            "got nan",
        ),
        (
            {
                "log_density": lambda y, t, s: (
                    -(jnp.sqrt(jnp.abs(y - t)) ** 2) - jnp.log(2.0) + 0 * jnp.sqrt(t - t)
                )
            },
            "expected a finite",
        ),
        ({"mean": lambda t, s: t + 1.0}, "expected the mean of its density"),
        ({"log_density": lambda y, t: y}, "expected functions of JAX arrays"),
    ],
)
def test_unsound_families_are_refused_with_the_number(changes, words):
    given = {"log_density": lambda y, t, s: -jnp.abs(y - t) - jnp.log(2.0), "mean": lambda t, s: t} | changes
    family = Family("mine", given["log_density"], support="real", mean=given["mean"], smooth=False)
    with pytest.raises(ValueError, match=words), registrations_undone():
        moejax.register_family("mine", family)


def test_registered_families_go_by_their_name():
    def log_density(y, t, s):
        return -jax.nn.softplus(t) + y * jax.nn.log_sigmoid(t)

    geometric = Family("geometric", log_density, support="counts", mean=lambda t, s: jnp.exp(t))
    with registrations_undone():
        moejax.register_family("geometric", geometric)
        assert get_family("geometric") is geometric
        with pytest.raises(ValueError, match="built in"):
            moejax.register_family("poisson", dataclasses.replace(geometric, name="poisson"))
        with pytest.raises(ValueError, match="expected the name of the registration, 'other'"):
            moejax.register_family("other", geometric)
    assert channel_of(get_family("gaussian", "tanh"), "linear") is jnp.tanh  # one form of Gaussian labels
    for name in ("poison", "binomial", "binomial(x)", "binomial(2.5)", "poisson(3)", "ordinal(3,1,0)", 3):
        with pytest.raises(ValueError, match="family"):
            get_family(name)


def test_built_in_families_are_sound():
    for name in LAWS:
        require_sound(get_family(name))
