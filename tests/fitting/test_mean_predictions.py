"""Predictions of mean fits and averages: densities and quantiles by hand, var f by JAX, coverage, the estimator's company."""

import pickle

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV

import moejax
from moejax import MoERegressor
from moejax.fitting.predictive import PredictiveDensity, mean_variance
from moejax.model.activations import get_activation

N, D, NOISE = 250, 2, 0.1
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
NEW = np.random.default_rng(1).normal(size=(400, D))


def truth(x):
    return np.sin(2 * x[:, 0]) + 0.5 * x[:, 1]


Y = truth(X) + NOISE * RNG.normal(size=N)


def f_of(params, x):
    gates = scipy.special.softmax(x @ params.gating.T + params.gating_bias, axis=1)
    return np.sum(gates * (x @ params.experts.T + params.expert_bias), axis=1)


@pytest.fixture(scope="module")
def averaged():
    """Four experts are too few for a curved surface, and there are many ways to place them."""
    y = np.sin(3 * X[:, 0]) + np.cos(3 * X[:, 1]) + NOISE * np.random.default_rng(4).normal(size=N)
    return MoERegressor(4, objective="mean", average=3, num_starts=8, random_state=0).fit(X, y)


def test_an_average_is_that_of_the_members_predictions(averaged):
    members = averaged.members_
    assert len(members) == 3
    functions = [f_of(member, NEW) for member in members]
    np.testing.assert_allclose(averaged.predict(NEW), np.mean(functions, axis=0), rtol=1e-10)
    for i, one in enumerate(functions):  # distinct, by more than rounding
        assert all(np.abs(one - other).max() > 0.01 * NOISE for other in functions[:i])
    np.testing.assert_array_equal(members[0].experts, averaged.params_.experts)


def test_the_density_of_an_average_is_the_mean_of_the_members_densities(averaged):
    y = truth(NEW) + 0.1
    log_densities, variances = [], []
    for member, params in zip(averaged._models, averaged.members_, strict=True):
        variance = params.noise_std[0] ** 2 + mean_variance(member, NEW, get_activation("linear"))
        variances.append(variance)
        log_densities.append(scipy.stats.norm.logpdf(y, f_of(params, NEW), np.sqrt(variance)))
    expected = scipy.special.logsumexp(log_densities, axis=0) - np.log(3)
    np.testing.assert_allclose(averaged.score_samples(NEW, y), expected, rtol=1e-9, atol=1e-9)
    functions = np.array([f_of(params, NEW) for params in averaged.members_])
    total, within, between = averaged.predict_std(NEW, components=True)
    np.testing.assert_allclose(within**2, np.mean(variances, axis=0), rtol=1e-9)
    np.testing.assert_allclose(between**2, functions.var(axis=0), rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(total**2, within**2 + between**2, rtol=1e-9)


def test_alone_predicts_by_the_model_of_the_parameters(averaged):
    alone = averaged.alone()
    np.testing.assert_allclose(alone.predict(NEW), f_of(averaged.params_, NEW), rtol=1e-10)
    assert len(alone.members_) == 1
    assert len(averaged.members_) == 3
    # in a mean fit all experts make a label: responsibilities are the gates
    np.testing.assert_array_equal(alone.responsibilities(X, Y), alone.gate_probabilities(X))


def test_fewer_optima_than_asked_for_are_a_note():
    result = moejax.fit(
        jax.random.key(0),
        X,
        X @ [1.0, 2.0] + Y - truth(X),
        num_experts=1,
        objective="mean",
        fit_intercept=True,
        average=4,
        num_starts=6,
    )
    assert len(result.members) == 1
    assert "average: 1 distinct optima were found, not 4" in result.diagnostics["notes"]


def test_quantiles_invert_the_distribution_function(averaged):
    levels = (0.01, 0.05, 0.5, 0.9, 0.999)
    quantiles = averaged.predict_quantiles(NEW, levels)
    assert np.all(np.diff(quantiles, axis=1) > 0)
    density = averaged._density(NEW)
    for j, level in enumerate(levels):
        np.testing.assert_allclose(density.probability_below(quantiles[:, j]), level, rtol=1e-9)
    interval = averaged.predict_interval(NEW, 0.8)
    np.testing.assert_allclose(interval, averaged.predict_quantiles(NEW, (0.1, 0.9)), rtol=1e-12)
    for level in (0.0, 1.0, -0.1, np.nan, "a"):
        with pytest.raises(ValueError, match=r"^(level|quantiles): expected"):
            averaged.predict_interval(NEW, level)
    with pytest.raises(ValueError, match=r"^quantiles: expected numbers between 0 and 1"):
        averaged.predict_quantiles(NEW, [])


@pytest.mark.parametrize("unit", [1.0, 1e-300, 1e290])
def test_quantiles_of_normal_densities_are_scipys(unit):
    means = unit * np.linspace(-5, 5, 11)[:, None]
    std = unit * np.full((11, 1), 1.7)
    density = PredictiveDensity(np.zeros((11, 1)), means, std)
    levels = [1e-12, 0.025, 0.5, 0.975]
    expected = means + std * scipy.stats.norm.ppf(levels)
    np.testing.assert_allclose(density.quantiles(levels), expected, rtol=1e-9, atol=1e-9 * unit)


def test_quantiles_between_components_that_do_not_overlap():
    """Half of the labels near 0, half near 1e6: quantiles lie within the components, to rounding."""
    log_weights, means = np.log(np.full((1, 2), 0.5)), np.array([[0.0, 1e6]])
    density = PredictiveDensity(log_weights, means, np.array([[1.0, 1e-3]]))
    found = density.quantiles([0.25, 0.75, 0.4])[0]
    expected = [0.0, 1e6, scipy.stats.norm.ppf(0.8)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)


def test_a_single_normal_has_the_textbook_interval():
    y = X @ [1.0, 2.0] + 0.3 * np.random.default_rng(2).normal(size=N)
    model = MoERegressor(1).fit(X, y)
    centre, half = model.predict(NEW), scipy.stats.norm.ppf(0.95) * model.noise_std_[0]
    np.testing.assert_allclose(
        model.predict_interval(NEW, 0.9), np.stack([centre - half, centre + half], axis=1), rtol=1e-9
    )


def test_the_variance_of_the_mean_is_the_delta_method_by_jax(averaged):
    """In the fit's units, from the covariance of its coefficients, whose entries `test_mean.py` tests."""
    member = averaged._models[0]
    k = len(member.params.noise_std)
    size = (2 * k - 1) * (D + 1)
    covariance = np.asarray(member.covariance.matrix)[:size, :size]

    def f(flat, z):
        rows = flat.reshape(2 * k - 1, D + 1)
        design = jnp.append(z, 1.0)
        gates = jax.nn.softmax(jnp.append(rows[k:] @ design, 0.0))
        return gates @ (rows[:k] @ design)

    p = member.params
    flat = np.concatenate(
        [
            np.column_stack([p.experts, p.expert_bias]).ravel(),
            np.column_stack([p.gating, p.gating_bias])[: k - 1].ravel(),
        ]
    )
    z = member.units.inputs(NEW[:50])
    slopes = np.asarray(jax.jit(jax.vmap(jax.grad(f), (None, 0)))(flat, z))
    scale = float(member.units.labels.scale)
    expected = scale**2 * np.einsum("ni,ij,nj->n", slopes, covariance, slopes)
    found = mean_variance(member, NEW[:50], get_activation("linear"))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    s = averaged.params_.noise_std[0]
    alone = averaged.alone().predict_std(NEW[:50])
    np.testing.assert_allclose(alone, np.sqrt(s**2 + found), rtol=1e-9)


@pytest.mark.slow
def test_intervals_hold_new_labels_as_often_as_they_say():
    """For two lines that a softmax gate blends, over twenty samples."""

    def blend(x):
        return np.tanh(x[:, 0]) * (x[:, 0] + 0.5) + x[:, 1]

    model = MoERegressor(2, objective="mean", num_starts=2, random_state=0)
    held, of_function = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, new = rng.normal(size=(N, D)), rng.normal(size=(200, D))
        fitted = clone(model).fit(x, blend(x) + 0.3 * rng.normal(size=N))
        low, high = fitted.predict_interval(new, 0.9).T
        y = blend(new) + 0.3 * rng.normal(size=200)
        held.append(np.mean((low <= y) & (y <= high)))
        error = np.sqrt(mean_variance(fitted._models[0], new, get_activation("linear")))
        of_function.append(np.mean(np.abs(fitted.predict(new) - blend(new)) < 1.645 * error))
    for shares, level in ((held, 0.9), (of_function, 0.9)):
        spread = np.std(shares, ddof=1) / np.sqrt(20)
        assert abs(np.mean(shares) - level) < 4 * spread + 0.005


@pytest.fixture(scope="module")
def default():
    """The estimator as it comes, with fewer growths."""
    return MoERegressor(num_starts=2, random_state=0).fit(X, Y)


@pytest.mark.slow
def test_the_default_estimator_chooses_and_pickles_to_the_last_digit(default, tmp_path):
    assert default.objective_ == "mean"
    assert 2 <= default.num_experts_ < 12
    assert set(default.selection_["objective"]) == {"mean", "likelihood"}
    assert default.diagnostics_["objective_choice"].startswith("mean, k = ")
    assert np.sqrt(np.mean((default.predict(NEW) - truth(NEW)) ** 2)) < NOISE
    joblib.dump(default, tmp_path / "model.joblib")
    for again in (pickle.loads(pickle.dumps(default)), joblib.load(tmp_path / "model.joblib")):
        np.testing.assert_array_equal(again.predict(NEW), default.predict(NEW))
        np.testing.assert_array_equal(again.predict_quantiles(NEW), default.predict_quantiles(NEW))
        np.testing.assert_array_equal(again.score_samples(X, Y), default.score_samples(X, Y))
    assert clone(default).get_params() == default.get_params()
    once_more = clone(default).fit(X, Y)
    np.testing.assert_array_equal(once_more.predict(NEW), default.predict(NEW))


@pytest.mark.slow
def test_the_precision_is_that_of_the_estimator_and_not_of_the_process(default, single_precision):
    """The growths run in threads, to which JAX's settings by context do not pass."""
    again = clone(default).fit(X, Y)
    np.testing.assert_array_equal(again.predict(NEW), default.predict(NEW))


@pytest.mark.slow
def test_of_a_line_the_default_is_nearly_linear_regression():
    y = X @ [1.0, -2.0] + 3.0 + np.random.default_rng(3).normal(size=N)
    model, line = MoERegressor(num_starts=2, random_state=0).fit(X, y), LinearRegression().fit(X, y)
    expected = NEW @ [1.0, -2.0] + 3.0
    ours, theirs = (np.sqrt(np.mean((m.predict(NEW) - expected) ** 2)) for m in (model, line))
    assert ours < theirs + 0.02
    assert model.num_experts_ == 1


@pytest.mark.slow
def test_a_grid_over_objectives_and_ridges():
    model = MoERegressor(2, num_starts=2, max_iterations=50, random_state=0)
    # the ridge of a mean fit is no reason for another program, nor is a mixture of one linear expert
    grid = [
        {"objective": ["mean"], "ridge": [None, "evidence", 1.0, 10.0]},
        {"objective": ["likelihood"], "ridge": [None, 1.0], "num_experts": [1]},
    ]
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(X, np.abs(X[:, 0]) + Y - truth(X))
    assert len(search.cv_results_["params"]) == 6
    assert search.best_params_["objective"] == "mean"
    assert search.best_score_ > 0.9
    assert search.predict(X).shape == (N,)


@pytest.mark.parametrize("num_rows", [2, 3, 5, 7])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_samples_for_two_experts_at_most_are_fitted_by_a_line(num_rows):
    x, y = X[:num_rows], Y[:num_rows]
    model = MoERegressor().fit(x, y)
    assert (model.num_experts_, model.objective_) == (1, "likelihood")
    if num_rows > 3:
        np.testing.assert_allclose(
            model.predict(NEW), LinearRegression().fit(x, y).predict(NEW), rtol=1e-8, atol=1e-8
        )
    assert np.isfinite(model.predict_interval(NEW)).all()


def test_a_mean_of_fewer_directions_than_inputs_maps_new_rows_to_them():
    x = np.random.default_rng(0).normal(size=(6, 5))
    with pytest.warns(ConvergenceWarning, match="6 distinct samples support 1 of 3 of 5 principal"):
        model = MoERegressor(objective="mean", num_starts=1).fit(x, x[:, 0])
    assert model.objective_ == "mean"
    np.testing.assert_allclose(model.predict(x), f_of(model.params_, x), rtol=1e-9)
    assert np.isfinite(model.predict_std(NEW[:3, [0, 1, 0, 1, 0]])).all()
