"""Fits of output families: against statsmodels for one expert, R's flexmix for several, SciPy's laws for predictions."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import statsmodels.api as sm
from statsmodels.miscmodels.ordinal_model import OrderedModel
from test_flexmix import has_flexmix

import moejax
from moejax.fitting.family_density import FamilyDensity
from moejax.fitting.family_labels import require_support
from moejax.model.families import get_family
from moejax.model.family import Family

N, D = 600, 3
SLOPES, BIAS = np.array([0.5, -0.3, 0.2]), 0.4
ALONE = {"num_experts": 1, "method": "joint_em", "fit_intercept": True, "max_iterations": 300}


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def rows(seed=0, n=N):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) * [1.0, 2.0, 0.5] + [0.0, 1.0, -1.0]
    return rng, x, x @ SLOPES + BIAS


def coefficients(result):
    return np.append(result.params.experts[0], result.params.expert_bias[0])


@pytest.mark.parametrize("name", ["poisson", "gamma", "negative_binomial", "binomial(6)"])
def test_one_expert_is_a_generalised_linear_model(name):
    """Coefficients, log-likelihood and standard errors of statsmodels."""
    rng, x, t = rows()
    design = sm.add_constant(x, prepend=False)
    if name == "poisson":
        y = rng.poisson(np.exp(t)).astype(float)
        theirs = sm.Poisson(y, design).fit(disp=0)
    elif name == "gamma":
        y = rng.gamma(2.0, np.exp(t) / 2.0)
        theirs = sm.GLM(y, design, sm.families.Gamma(sm.families.links.Log())).fit(tol=1e-12)
    elif name == "negative_binomial":
        y = rng.poisson(np.exp(t) * rng.gamma(2.0, 0.5, size=N)).astype(float)
        theirs = sm.NegativeBinomial(y, design).fit(disp=0, maxiter=200, method="newton")
    else:
        y = rng.binomial(6, scipy.special.expit(t)).astype(float)
        theirs = sm.GLM(np.column_stack([y, 6 - y]), design, sm.families.Binomial()).fit(tol=1e-12)
    ours = moejax.fit(jax.random.key(0), x, y, family=name, **ALONE)
    assert ours.status == "ok"
    np.testing.assert_allclose(coefficients(ours), theirs.params[: D + 1], rtol=2e-4, atol=2e-5)
    errors = np.append(ours.standard_errors.experts[0], ours.standard_errors.expert_bias[0])
    if name == "gamma":  # theirs have a moment estimate of the dispersion
        errors = errors * np.sqrt(theirs.scale / ours.params.noise_std[0])
        expected = -scipy.stats.gamma.logpdf(y, 2.0, scale=np.exp(t) / 2.0).sum()
        assert -ours.log_likelihood < expected  # the truth is not better than the maximum
    else:
        assert ours.log_likelihood == pytest.approx(theirs.llf, abs=1e-3)
    np.testing.assert_allclose(errors, theirs.bse[: D + 1], rtol=0.06 if name == "gamma" else 0.02)
    if name == "negative_binomial":
        assert ours.params.noise_std[0] == pytest.approx(theirs.params[-1], rel=1e-2)


def test_one_expert_of_ordered_classes_is_a_proportional_odds_model():
    rng, x, t = rows(1)
    y = (t[:, None] + rng.logistic(size=(N, 1)) > [-1.0, 0.5, 1.5]).sum(axis=1).astype(float)
    theirs = OrderedModel(y.astype(int), x, distr="logit").fit(method="bfgs", disp=0, gtol=1e-8)
    ours = moejax.fit(jax.random.key(0), x, y, family="ordinal(4)", **ALONE)
    np.testing.assert_allclose(ours.params.experts[0], theirs.params[:D], rtol=2e-2, atol=2e-3)
    assert ours.log_likelihood == pytest.approx(theirs.llf, abs=0.05)
    assert ours.num_parameters == D + 1 + 3
    probabilities = np.exp([ours.log_density(x[:2], np.full(2, float(c))) for c in range(4)])
    np.testing.assert_allclose(probabilities.sum(axis=0), 1.0, rtol=1e-9)


def test_outliers_do_not_move_student_t():
    """5% of the labels of two linear experts are replaced by wide ones; degrees of freedom are estimated."""
    truth = moejax.make_params([[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 2.0], [0, 0, 0]], noise_std=0.1)
    x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 4000)
    rng = np.random.default_rng(0)
    y = np.where(rng.uniform(size=4000) < 0.05, 10.0 * rng.normal(size=4000), y)
    errors = {}
    for family in ("gaussian", "student_t"):
        result = moejax.fit(jax.random.key(1), x, y, num_experts=2, family=family, method="spectral_em")
        errors[family] = float(moejax.recovery_error(truth.experts, jnp.asarray(result.params.experts)))
    assert errors["student_t"] < 1e-3
    assert errors["gaussian"] > 0.01
    assert result.diagnostics["family"].startswith("student_t(")
    assert result.num_parameters == 2 * 3 + 3 + 1 + 1


def test_labels_may_have_any_unit():
    """Of a location family with linear experts: parameters scale, the log-density shifts."""
    rng, x, t = rows(2)
    y = t + 0.2 * rng.standard_t(3, size=N)
    options = ALONE | {"family": "student_t(3)"}
    one = moejax.fit(jax.random.key(0), x, y, **options)
    other = moejax.fit(jax.random.key(0), x, 1000.0 * y - 300.0, **options)
    np.testing.assert_allclose(other.params.experts, 1000.0 * one.params.experts, rtol=1e-4)
    np.testing.assert_allclose(other.params.noise_std, 1000.0 * one.params.noise_std, rtol=1e-4)
    assert other.log_likelihood == pytest.approx(one.log_likelihood - N * np.log(1000.0), abs=1e-3)
    np.testing.assert_allclose(other.predict(x[:5]), 1000.0 * one.predict(x[:5]) - 300.0, rtol=1e-4)


SCRIPT = """
suppressMessages(library(flexmix))
data <- read.csv("data.csv")
set.seed(1)
model <- flexmix({response} ~ x1 + x2 + x3, data = data, k = 2, cluster = data$z, model = FLXMRglm(family = "{family}"),
    concomitant = FLXPmultinom(~ x1 + x2 + x3), control = list(iter.max = 2000, tolerance = 1e-12, minprior = 0))
cat(format(as.numeric(logLik(model)), digits = 15))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["poisson", "binomial(10)"])
def test_maximum_is_that_of_flexmix(name, tmp_path):
    if not has_flexmix():
        pytest.skip("R with the package flexmix is not installed")
    rng = np.random.default_rng(3)
    n = 4000
    x = rng.normal(size=(n, D))
    z = (rng.uniform(size=n) > scipy.special.expit(x @ [1.0, -1.0, 0.5] + 0.3)).astype(int)
    t = np.sum(x * np.array([[0.8, 0.5, 0.0], [-0.5, 0.8, 0.3]])[z], axis=1) + np.array([0.5, -0.3])[z]
    counts = name == "poisson"
    y = (rng.poisson(np.exp(t)) if counts else rng.binomial(10, scipy.special.expit(t))).astype(float)
    columns = np.column_stack([x, y, 10 - y, z + 1])
    header = "x1,x2,x3,y,rest,z"
    np.savetxt(tmp_path / "data.csv", columns, delimiter=",", header=header, comments="", fmt="%.17g")
    words = (
        {"response": "y", "family": "poisson"}
        if counts
        else {"response": "cbind(y, rest)", "family": "binomial"}
    )
    (tmp_path / "fit.R").write_text(SCRIPT.format(**words))
    done = subprocess.run(["Rscript", "fit.R"], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = float(done.stdout)
    if not counts:  # flexmix leaves out the number of ways
        theirs += float(
            np.sum(scipy.special.gammaln(11) - scipy.special.gammaln(y + 1) - scipy.special.gammaln(11 - y))
        )
    ours = moejax.fit(
        jax.random.key(0), x, y, num_experts=2, family=name, method="spectral_em", fit_intercept=True
    )
    assert ours.log_likelihood == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize(
    ("family", "label", "words"),
    [
        ("poisson", -2.0, r"y: expected counts 0, 1, 2, .. for family poisson, got -2 in row 3"),
        ("poisson", 1.5, r"y: expected counts 0, 1, 2, .. for family poisson, got 1.5 in row 3"),
        (
            "binomial(10)",
            11.0,
            r"y: expected whole numbers from 0 to 10 for family binomial\(10\), got 11 in row 3",
        ),
        ("bernoulli", 1.2, r"y: expected 0 or 1 for family bernoulli, got 1.2 in row 3"),
        ("gamma", 0.0, r"y: expected positive numbers for family gamma, got 0 in row 3"),
        ("ordinal(3)", 3.0, r"y: expected whole numbers from 0 to 2 for family ordinal\(3\), got 3 in row 3"),
    ],
)
def test_labels_that_a_family_cannot_have_are_refused(family, label, words):
    x = np.random.default_rng(0).normal(size=(50, 2))
    y = np.tile(
        [1.0, 2.0] if family in ("poisson", "gamma", "binomial(10)", "ordinal(3)") else [0.0, 1.0], 25
    )
    y[3] = label
    with pytest.raises(ValueError, match=words):
        moejax.fit(jax.random.key(0), x, y, num_experts=1, family=family)


def test_other_contradictions_are_refused():
    x = np.random.default_rng(0).normal(size=(50, 2))
    y = np.arange(50.0) % 3
    fit = {"num_experts": 1, "family": "poisson"}
    with pytest.raises(ValueError, match="more than one value for family bernoulli, got 1 in every row"):
        moejax.fit(jax.random.key(0), x, np.ones(50), num_experts=1, family="bernoulli")
    for options, words in (
        ({"noise_std": 0.1}, "noise_std: expected None for family poisson"),
        ({"objective": "mean"}, "family: expected 'gaussian' with objective 'mean'"),
        ({"method": "gradient_mse"}, "method: expected one for any family"),
        ({"method": "joint_em", "start": "kmeans"}, "start: expected 'random' with family poisson"),
        ({"family": "poison"}, "family: unknown name 'poison'; did you mean poisson"),
    ):
        with pytest.raises(ValueError, match=words):
            moejax.fit(jax.random.key(0), x, y, **(fit | options))
    with pytest.raises(ValueError, match="one output with family poisson"):
        moejax.fit(jax.random.key(0), x, np.column_stack([y, y]), **fit)
    require_support(
        np.array([1.0, -5.0, 2.0]), np.array([1.0, 0.0, 1.0]), get_family("poisson")
    )  # of weight zero


LAWS = {
    "poisson": lambda t, s: scipy.stats.poisson(np.exp(t)),
    "binomial(6)": lambda t, s: scipy.stats.binom(6, scipy.special.expit(t)),
    "gamma": lambda t, s: scipy.stats.gamma(1 / s, scale=s * np.exp(t)),
    "student_t(3)": lambda t, s: scipy.stats.t(3, t, s),
}


@pytest.mark.parametrize("name", LAWS)
def test_predictive_densities_are_mixtures_of_the_laws(name):
    rng = np.random.default_rng(0)
    t, weights = rng.uniform(-1, 1.5, size=(7, 2)), rng.dirichlet([1, 1], size=7)
    s = np.full((7, 2), 0.4)
    density = FamilyDensity(get_family(name), np.log(weights), t, s)
    law = LAWS[name](t, s)
    np.testing.assert_allclose(density.mean, np.sum(weights * law.mean(), axis=1), rtol=1e-8)
    between = law.mean() - density.mean[:, None]
    variance = np.sum(weights * (law.var() + between**2), axis=1)
    np.testing.assert_allclose(density.standard_deviations()[0], np.sqrt(variance), rtol=1e-7)
    y = np.array([0.0, 1, 2, 3, 4, 5, 6]) + (0 if density.is_discrete else 0.1)
    pmf = (law.pmf if density.is_discrete else law.pdf)(y[:, None])
    np.testing.assert_allclose(density.log_density(y), np.log(np.sum(weights * pmf, axis=1)), rtol=1e-8)
    below = np.sum(weights * law.cdf(y[:, None]), axis=1)
    if density.is_discrete:
        below = below - 0.5 * np.sum(weights * pmf, axis=1)
    np.testing.assert_allclose(density.probability_below(y), below, atol=2e-4)
    quantiles = density.quantiles([0.05, 0.5, 0.95])
    for level, found in zip((0.05, 0.5, 0.95), quantiles.T, strict=True):
        reached = np.sum(weights * law.cdf(found[:, None]), axis=1)
        if density.is_discrete:
            before = np.sum(weights * law.cdf(found[:, None] - 1), axis=1)
            assert np.all((reached >= level - 1e-9) & (before < level))
        else:
            np.testing.assert_allclose(reached, level, atol=3e-4)
    drawn = np.stack([density.sample(np.random.RandomState(i)) for i in range(200)])
    if name != "student_t(3)":
        assert np.all(np.abs(drawn.mean(axis=0) - density.mean) < 5 * np.sqrt(variance / 200))


def test_result_of_counts_is_kept_and_predicts(tmp_path):
    """A saved fit has the same predictions; those of a family that is not registered cannot be saved."""
    rng, x, t = rows(4)
    y = rng.poisson(np.exp(0.5 * t)).astype(float)
    result = moejax.fit(jax.random.key(0), x, y, family="poisson", **ALONE)
    result.save(tmp_path / "counts.fit")
    again = moejax.load_fit(tmp_path / "counts.fit")
    np.testing.assert_array_equal(again.predict_interval(x[:9]), result.predict_interval(x[:9]))
    inside = result.predict_interval(x, level=0.9)
    assert 0.88 < np.mean((inside[:, 0] <= y) & (y <= inside[:, 1])) <= 1.0
    assert "poisson" in str(result.settings["family"])

    def log_density(y, t, s):
        return -jax.nn.softplus(t) + y * jax.nn.log_sigmoid(t)

    own = Family("geometric", log_density, support="counts", mean=lambda t, s: jnp.exp(t))
    mine = moejax.fit(jax.random.key(0), x, y, family=own, **ALONE)
    assert np.all(np.isfinite(mine.predict(x[:5])))
    with pytest.raises(ValueError, match="family: expected a registered family"):
        mine.save(tmp_path / "mine.fit")


def test_estimator_of_counts():
    rng, x, t = rows(5, 300)
    y = rng.poisson(np.exp(0.5 * t)).astype(float)
    model = moejax.MoERegressor(1, family="poisson", random_state=0).fit(x, y)
    theirs = sm.Poisson(y, sm.add_constant(x, prepend=False)).fit(disp=0)
    np.testing.assert_allclose(model.predict(x), theirs.predict(), rtol=1e-3)
    assert model.n_parameters_ == D + 1
    assert model.objective_ == "likelihood"
    np.testing.assert_allclose(model.score_samples(x, y).sum(), theirs.llf, atol=1e-2)
    entropy = [-scipy.stats.poisson(mean).entropy() for mean in model.predict(x[:3])]
    np.testing.assert_allclose(model.score_samples(x[:3]), entropy, rtol=1e-5)
