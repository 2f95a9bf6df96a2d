"""MoERegressor: scikit-learn's own checks, densities and moments against scipy, and the company estimators keep."""

import pickle
import subprocess
import sys

import compiled_model
import jax
import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import sklearn.metrics
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import (
    check_sample_weight_equivalence_on_dense_data,
    parametrize_with_checks,
)

from moejax import MoERegressor

COEFFICIENTS = np.array([[30.0, 0.0, -0.2], [-10.0, 4.0, 0.1]])
INTERCEPTS = np.array([500.0, 470.0])
GATE, GATE_INTERCEPT, NOISE_STD = np.array([0.0, 1.5, 0.0]), -7.0, 3.0


@pytest.fixture(scope="module")
def data():
    """Two linear experts in units far from standard: x of scales 1, 2, 50 around 0, 5, 300."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(480, 3)) * [1.0, 2.0, 50.0] + [0.0, 5.0, 300.0]
    first = rng.uniform(size=480) < scipy.special.expit(x @ GATE + GATE_INTERCEPT)
    y = np.where(first, *(INTERCEPTS[:, None] + COEFFICIENTS @ x.T)) + NOISE_STD * rng.normal(size=480)
    return x, y


@pytest.fixture(scope="module")
def fitted(data):
    return MoERegressor(num_experts=2, objective="likelihood", random_state=0).fit(*data)


@pytest.fixture(scope="module")
def bounded(data):
    """Experts through tanh, of a target brought into its range."""
    x, y = data
    model = MoERegressor(2, "tanh", noise="per_expert", method="joint_em", num_starts=8, random_state=0)
    return model.fit(x, in_range(y))


def in_range(y):
    return (y - 480.0) / 200.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # the checks' data are few
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([MoERegressor(3, method="joint_em")])  # compiles in a third of the default's time
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learns_check_of_weights_for_the_default_method():
    """The rest of them: benchmarks/estimator_checks.py."""
    check_sample_weight_equivalence_on_dense_data("MoERegressor", MoERegressor())


def test_it_is_imported_on_first_use_only():
    code = "import sys, moejax; assert 'moejax.fitting.estimator' not in sys.modules; moejax.MoERegressor; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.slow
def test_parameters_are_in_the_users_units(fitted):
    order = np.argsort(-fitted.coef_[:, 0])
    # standard errors of weighted least squares on some 240 samples: 3 / (sqrt(240) spread), five of them
    np.testing.assert_allclose(
        fitted.coef_[order], COEFFICIENTS, atol=5 * 3 / np.sqrt(200) / np.array([1, 2, 50]).min()
    )
    np.testing.assert_allclose(fitted.coef_[order][:, 2], COEFFICIENTS[:, 2], atol=5 * 3 / np.sqrt(200) / 50)
    np.testing.assert_allclose(fitted.noise_std_, NOISE_STD, atol=5 * NOISE_STD / np.sqrt(2 * 480))
    assert np.all(fitted.gating_coef_[-1] == 0)
    gate = fitted.gating_coef_[order[0]] - fitted.gating_coef_[order[1]]
    assert abs(gate[1] - 1.5) < 1.0
    assert fitted.num_experts_ == 2
    assert fitted.n_parameters_ == 3 * 4 + 1


def by_hand(model, x, g=lambda t: t):
    """log gates, means, in the units of y, by NumPy and scipy from the parameters alone."""
    params = model.params_
    log_gates = scipy.special.log_softmax(x @ params.gating.T + params.gating_bias, axis=1)
    means = g(x @ params.experts.T + params.expert_bias)
    return log_gates, means


@pytest.mark.slow
@pytest.mark.parametrize("which", ["fitted", "bounded"])
def test_densities_and_moments_are_scipys(which, request, data):
    model = request.getfixturevalue(which)
    x, y = (a[:40] for a in data)
    y = in_range(y) if which == "bounded" else y
    log_gates, means = by_hand(model, x, np.tanh if which == "bounded" else lambda t: t)
    log_joint = log_gates + scipy.stats.norm.logpdf(y[:, None], means, model.noise_std_)
    density = scipy.special.logsumexp(log_joint, axis=1)
    np.testing.assert_allclose(model.score_samples(x, y), density, atol=1e-8)
    np.testing.assert_allclose(model.responsibilities(x, y), np.exp(log_joint - density[:, None]), atol=1e-8)
    np.testing.assert_allclose(model.predict_proba(x), np.exp(log_gates), atol=1e-10)
    np.testing.assert_allclose(model.gate_probabilities(x), np.exp(log_gates), atol=1e-10)
    np.testing.assert_allclose(model.predict_experts(x), means, rtol=1e-9)
    # moments and entropy by integrating the density that score_samples gives
    for j in range(4):
        grid = np.linspace(
            means[j].min() - 12 * model.noise_std_.max(), means[j].max() + 12 * model.noise_std_.max(), 20001
        )
        log_density = model.score_samples(np.repeat(x[j : j + 1], grid.size, axis=0), grid)

        def integral(values, grid=grid, log_density=log_density):
            return scipy.integrate.simpson(values * np.exp(log_density), x=grid)

        assert integral(1.0) == pytest.approx(1.0, abs=1e-8)
        mean = integral(grid)
        assert model.predict(x[j : j + 1])[0] == pytest.approx(mean, rel=1e-8)
        assert model.predict_std(x[j : j + 1])[0] == pytest.approx(
            integral((grid - mean) ** 2) ** 0.5, rel=1e-7
        )
        assert model.score_samples(x[j : j + 1])[0] == pytest.approx(integral(log_density), abs=1e-7)
    total, within, between = model.predict_std(x, components=True)
    np.testing.assert_allclose(total**2, within**2 + between**2)
    assert within.min() >= model.noise_std_.min() * (1 - 1e-12)


@pytest.mark.slow
def test_log_likelihood_and_information_criteria(fitted, data):
    value = fitted.score_samples(*data).sum()
    assert fitted.log_likelihood_ == pytest.approx(value, abs=1e-6)
    assert fitted.bic(*data) == pytest.approx(-2 * value + 13 * np.log(480))
    assert fitted.aic(*data) == pytest.approx(-2 * value + 26)
    repeats = np.random.default_rng(0).integers(0, 3, size=480)
    x, y = data[0].copy(), data[1].copy()
    x[repeats == 0], y[repeats == 0] = np.nan, np.inf  # what has no weight is not looked at
    rows = np.arange(480).repeat(repeats)
    for criterion in (fitted.bic, fitted.aic):
        weighted = criterion(x, y, sample_weight=repeats)
        assert weighted == pytest.approx(criterion(data[0][rows], data[1][rows]))
    with pytest.raises(ValueError, match=r"sample_weight: expected non-negative numbers, not all zero"):
        fitted.bic(*data, sample_weight=np.zeros(480))
    # a model is calibrated on its own sample: expected and seen log densities agree, to 5 standard errors
    seen = fitted.score_samples(*data)
    assert abs(np.mean(seen - fitted.score_samples(data[0]))) < 5 * seen.std() / np.sqrt(480)


@pytest.mark.slow
def test_a_target_in_the_range_of_an_activation(bounded, data):
    x, y = data
    y = in_range(y)
    assert bounded.log_likelihood_ == pytest.approx(bounded.score_samples(x, y).sum(), abs=1e-6)
    assert bounded.score(x, y) > LinearRegression().fit(x, y).score(x, y)
    assert bounded.n_parameters_ == 3 * 4 + 2


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "abs"])
def test_data_of_the_model_are_predicted_as_well_as_by_the_truth(activation):
    """Labels are not centred for an activation that does not take up a shift; a homogeneous one takes up any scale."""
    experts, gates = np.eye(4)[:2], np.array([[0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    truth = compiled_model.make_params(experts, gates, 0.1)
    x, y, _ = compiled_model.sample(jax.random.key(0), truth, activation, 1500)
    new, expected, _ = compiled_model.sample(jax.random.key(9), truth, activation, 4000)
    scale = 1.0 if activation == "sigmoid" else 50.0
    model = MoERegressor(2, activation, method="joint_em", num_starts=8, random_state=0)
    score = model.fit(x, scale * y).score(new, scale * expected)
    oracle = sklearn.metrics.r2_score(expected, compiled_model.predict(truth, new, activation))
    assert score > oracle - 0.01
    assert oracle > LinearRegression().fit(x, y).score(new, expected) + 0.1


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_labels_outside_the_range_of_an_activation_are_said():
    x = np.random.default_rng(0).normal(size=(80, 1))
    y = 5.0 + 2.0 * x[:, 0]
    model = MoERegressor(1, "sigmoid", method="joint_em", max_iterations=200)
    with pytest.warns(UserWarning, match=r"% of the labels lie outside the range \[0, 1\] of sigmoid"):
        model.fit(x, y)
    assert any("outside the range" in note for note in model.diagnostics_["notes"])


def test_dependence_is_judged_by_the_precision_of_the_inputs():
    """Two columns of whole numbers that differ by a step determine the target by their difference."""
    rng = np.random.default_rng(0)
    birth = rng.integers(1950, 2020, 1000).astype(float)
    x = np.column_stack([birth, birth + rng.integers(6, 8, 1000)])
    y = 3.0 * (x[:, 1] - x[:, 0] - 6.0) + 0.1 * rng.normal(size=1000)
    model = MoERegressor(1).fit(x, y)
    assert model.score(x, y) == pytest.approx(LinearRegression().fit(x, y).score(x, y), abs=1e-9)
    assert model.diagnostics_["nearly_collinear_inputs"] == [[0, 1]]


def test_weights_are_counts_or_reliabilities(data):
    x, y = data
    counts, shares = (
        MoERegressor(1).fit(x, y, sample_weight=np.full(480, weight)) for weight in (2.0, 1 / 480)
    )
    plain = MoERegressor(1).fit(x, y)
    assert counts.log_likelihood_ == pytest.approx(2.0 * plain.log_likelihood_)
    assert shares.log_likelihood_ == pytest.approx(plain.log_likelihood_)


@pytest.mark.slow
def test_the_precision_of_the_fit_is_not_that_of_the_units(data):
    x, y = data
    far = MoERegressor(2, method="joint_em", num_starts=4, precision="float32", random_state=0)
    far.fit(x + 1e6, y - 1e5)
    assert far.log_likelihood_ == pytest.approx(far.score_samples(x + 1e6, y - 1e5).sum(), abs=0.01)


@pytest.mark.slow
def test_sample_has_the_models_moments_and_a_seed(fitted, data):
    x = np.repeat(data[0][:3], 20000, axis=0)
    y = fitted.sample(x, random_state=1).reshape(3, 20000)
    std = fitted.predict_std(data[0][:3])
    np.testing.assert_allclose(
        y.mean(axis=1), fitted.predict(data[0][:3]), atol=5 * std.max() / np.sqrt(20000)
    )
    kurtosis = ((y - y.mean(axis=1, keepdims=True)) ** 4).mean(axis=1) / std**4
    error = std * np.sqrt(np.maximum(kurtosis - 1, 0) / 20000) / 2
    assert np.all(np.abs(y.std(axis=1) - std) < 5 * error + 1e-9)
    np.testing.assert_array_equal(fitted.sample(x, random_state=1), y.ravel())
    assert np.any(fitted.sample(x, random_state=2) != y.ravel())


def test_one_linear_expert_is_weighted_least_squares():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 4)) * [1, 10, 100, 1] + [0, 0, 1e4, 0]
    x[:, 3] = 7.0  # constant
    x = np.column_stack([x, x[:, 0] - x[:, 1]])  # collinear
    y = x @ [1.0, 2.0, 3.0, 0.0, 0.0] + rng.normal(size=60)
    weights = rng.uniform(0, 2, size=60)
    model = MoERegressor(num_experts=1, weights_are="counts").fit(x, y, sample_weight=weights)
    reference = LinearRegression().fit(x, y, sample_weight=weights)
    np.testing.assert_allclose(model.predict(x), reference.predict(x), rtol=1e-9)
    variance = np.average((y - reference.predict(x)) ** 2, weights=weights)
    np.testing.assert_allclose(model.predict_std(x), variance**0.5, rtol=1e-9)
    assert model.coef_[0, 3] == 0
    assert model.n_parameters_ == 3 + 1 + 1
    expected = weights @ scipy.stats.norm.logpdf(y, reference.predict(x), variance**0.5)
    assert model.log_likelihood_ == pytest.approx(expected)
    assert not hasattr(model, "predict_proba")  # nothing is told apart
    np.testing.assert_array_equal(model.gate_probabilities(x), 1.0)
    # the constant column in an intercept's place
    plain = MoERegressor(num_experts=1, fit_intercept=False).fit(x, y, sample_weight=weights)
    np.testing.assert_allclose(plain.predict(x), reference.predict(x), rtol=1e-9)
    assert plain.intercept_[0] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # sharp gates go on sharpening
def test_more_experts_than_inputs():
    """A broken line: three experts of one input."""
    rng = np.random.default_rng(4)
    x = rng.uniform(-3, 3, size=(400, 1))
    truth = np.select([x[:, 0] < -1, x[:, 0] < 1], [2 - 4 * x[:, 0], 6 + 0 * x[:, 0]], 10 * x[:, 0] - 20)
    y = truth + 0.2 * rng.normal(size=400)
    model = MoERegressor(num_experts=3, objective="likelihood", random_state=0, max_iterations=300)
    model.fit(x, y)
    assert model.num_experts_ == 3
    assert model.method_ == "multistart"
    np.testing.assert_allclose(sorted(model.coef_[:, 0]), [-4, 0, 10], atol=0.5)
    assert model.noise_std_[0] < 0.25


@pytest.mark.slow
def test_integer_weights_are_repeated_rows_and_columns_units_do_not_matter(data):
    x, y = data[0][:150], data[1][:150]
    repeats = np.random.default_rng(0).integers(0, 3, size=150)
    model = MoERegressor(num_experts=2, method="joint_em", num_starts=3, random_state=0)
    weighted = clone(model).fit(x, y, sample_weight=repeats)
    repeated = clone(model).fit(x.repeat(repeats, axis=0), y.repeat(repeats))
    np.testing.assert_allclose(weighted.predict(x), repeated.predict(x), rtol=1e-7)
    assert weighted.log_likelihood_ == pytest.approx(repeated.log_likelihood_, rel=1e-9)
    other = clone(model).fit(x * [1e-3, 1.0, 1e3] + 5.0, 1e4 * y - 3.0, sample_weight=repeats)
    predicted = other.predict(x * [1e-3, 1.0, 1e3] + 5.0)
    np.testing.assert_allclose((predicted + 3.0) / 1e4, weighted.predict(x), rtol=1e-6)


@pytest.mark.slow
def test_pipeline_grid_search_pickle_and_data_frames(data):
    x, y = data
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    model = MoERegressor(method="joint_em", num_starts=3, random_state=0)
    pipeline = make_pipeline(StandardScaler(), model)
    search = GridSearchCV(pipeline, {"moeregressor__num_experts": [1, 2]}, cv=3, error_score="raise")
    search.fit(frame, y)
    assert search.best_params_ == {"moeregressor__num_experts": 2}
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(frame), search.predict(frame))
    model = MoERegressor(num_experts=1).fit(frame, pd.Series(y))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a", "c"]])
    assert clone(search.best_estimator_[-1]).get_params() == search.best_estimator_[-1].get_params()


@pytest.mark.parametrize("num_targets", [2, 3])
def test_several_targets_take_a_constant_column_for_an_intercept(num_targets):
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=100), np.full(100, 2.0)])
    truth = np.array([[1.0, 3.0], [-2.0, 5.0], [0.5, -1.0]])[:num_targets]
    y = x @ truth.T + 0.1 * rng.normal(size=(100, num_targets))
    model = MoERegressor(1, fit_intercept=False, method="joint_em", random_state=0).fit(x, y)
    expected = np.linalg.lstsq(x, y, rcond=None)[0].T
    np.testing.assert_allclose(model.coef_[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(model.intercept_, 0.0)
    assert model.log_likelihood_ == pytest.approx(model.score_samples(x, y).sum())


def test_labels_that_are_no_numbers_and_labels_far_away():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(40, 2)), rng.normal(size=40)
    model = MoERegressor(num_experts=1).fit(x, y)
    for value in (np.nan, np.inf):
        bad = np.where(np.arange(40) == 3, value, y)
        for function in (model.score_samples, model.responsibilities, model.bic, model.aic):
            with pytest.raises(
                ValueError,
                match=rf"^y: expected finite numbers, no NaN and no inf, got {value} at index \(3,\)$",
            ):
                function(x, bad)
    with pytest.raises(ValueError, match=r"^y: expected an array of numbers, got .*'a'"):
        model.responsibilities(x, np.full(40, "a"))
    far = np.full(40, 1e200)
    np.testing.assert_array_equal(model.responsibilities(x, far), 1.0)
    assert np.all(model.score_samples(x, far) == -np.inf)  # below what a float holds
    loud = MoERegressor(num_experts=1, noise_std=1e300).fit(x, y)
    np.testing.assert_allclose(loud.predict_std(x), 1e300, rtol=1e-12)
    assert np.isfinite(loud.score_samples(x)).all()


def test_few_samples_are_fitted_by_what_they_support():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(12, 8)), rng.normal(size=12)
    with pytest.warns(ConvergenceWarning, match="12 distinct samples support 1 of 8 directions"):
        model = MoERegressor(num_experts=3).fit(x, y)
    np.testing.assert_allclose(model.predict(x), LinearRegression().fit(x, y).predict(x), rtol=1e-9)
    with pytest.warns(
        ConvergenceWarning, match="6 distinct samples support 1 of 3 of 5 principal directions"
    ):
        model = MoERegressor(num_experts=1).fit(x[:6], y[:6])
    assert model.predict_std(x).min() > 0
    assert model.n_parameters_ == 5
    with pytest.warns(ConvergenceWarning):
        model = MoERegressor(3).fit(np.ones((30, 2)), np.arange(30.0))
    np.testing.assert_allclose(model.predict(np.zeros((1, 2))), 14.5)
    with pytest.warns(ConvergenceWarning):
        np.testing.assert_allclose(MoERegressor(3).fit(x, np.full(12, 3.0)).predict(x), 3.0)
    # if one expert is among the numbers to choose from, that is no surprise
    np.testing.assert_allclose(MoERegressor().fit(np.ones((30, 2)), np.arange(30.0)).predict(x[:, :2]), 14.5)
    np.testing.assert_allclose(MoERegressor().fit(x, np.full(12, 3.0)).predict(x), 3.0)
    np.testing.assert_allclose(
        MoERegressor().fit(x, y).predict(x), LinearRegression().fit(x, y).predict(x), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 0}, ["num_experts", "0"]),
        ({"num_experts": 1.5}, ["num_experts", "1.5"]),
        ({"activation": "rellu"}, ["activation", "did you mean relu"]),
        ({"method": "spektral"}, ["method", "did you mean spectral"]),
        ({"noise": "each", "num_experts": 2}, ["noise", "'each'"]),
        ({"noise_std": -1.0, "num_experts": 2}, ["noise_std"]),
        ({"noise_std": -1.0, "num_experts": 1}, ["noise_std"]),
        ({"precision": "float16"}, ["precision", "'float16'"]),
        ({"num_experts": 4, "method": "spectral_em"}, ["num_experts", "1 to 3"]),
    ],
)
def test_bad_settings_are_one_line(data, options, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        MoERegressor(**options).fit(*data)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_targets_of_other_shapes(data):
    x, y = data
    with pytest.warns(DataConversionWarning):
        model = MoERegressor(num_experts=1).fit(x, y[:, None])
    assert model.predict(x).shape == (480,)
    with pytest.raises(ValueError, match=r"y: expected shape \(480,\)"):
        model.score_samples(x, y[:-1])
    with pytest.raises(ValueError, match="not all zero"):
        model.fit(x, y, sample_weight=np.zeros(480))
    with pytest.raises(NotFittedError):
        MoERegressor().predict(x)


def test_constant_gates_and_columns_of_gates_and_experts(data):
    x, y = data
    frame = pd.DataFrame(x, columns=[f"c{i}" for i in range(x.shape[1])])
    options = {"num_experts": 2, "method": "joint_em", "random_state": 0}
    model = MoERegressor(gate_inputs=["c1"], expert_inputs=[0], **options).fit(frame, y)
    # two experts and a gate of one input, with biases, and a noise
    assert model.n_parameters_ == 2 * 2 + 2 + 1
    assert not model.gating_coef_[:, [0]].any()
    assert not model.coef_[:, 1:].any()
    assert model.predict(frame).shape == y.shape
    constant = MoERegressor(gate="constant", **options).fit(x, y)
    assert np.ptp(constant.gate_probabilities(x), axis=0).max() == 0.0
    assert constant.n_parameters_ == 2 * (x.shape[1] + 1) + 1 + 1
    with pytest.raises(ValueError, match="gate_inputs: unknown column 'c99'"):
        MoERegressor(gate_inputs=["c99"], **options).fit(frame, y)


def test_few_samples_with_constant_gates_or_few_inputs_of_experts():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=8)
    options = {"num_experts": 4, "method": "joint_em", "random_state": 0}
    with pytest.warns(ConvergenceWarning, match="8 distinct samples support 1 of 3 directions"):
        assert MoERegressor(**options).fit(x, y).num_experts_ == 1
    # k (r + 1) coefficients, k - 1 shares and a noise for fewer samples
    with pytest.warns(ConvergenceWarning, match="8 distinct samples support 2 of 1 directions"):
        assert MoERegressor(gate="constant", expert_inputs=[2], **options).fit(x, y).num_experts_ == 2
    few = MoERegressor(gate_inputs=[2], expert_inputs=[0, 1], activation="tanh", **options)
    with pytest.warns(ConvergenceWarning, match="4 distinct samples support 1 of 1 of 2 principal"):
        few.fit(x[:4], np.tanh(y[:4]))
    assert few.n_parameters_ == 3
    assert not few.coef_[:, 2].any()
