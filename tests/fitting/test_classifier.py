"""MoEClassifier: scikit-learn's own checks and its LogisticRegression, data that no single expert fits, and invariances."""

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.special
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import (
    check_sample_weight_equivalence_on_dense_data,
    parametrize_with_checks,
)

import moejax
from moejax import MoEClassifier

PLANE = 1.5 * np.array([[2.0, 0.0, 0.0], [-1.0, 1.5, 0.0], [-1.0, -1.5, 0.0]])
EXPERTS = np.stack([PLANE, -PLANE])
GATE = np.array([0.0, 0.0, 3.0])
SCALE, CENTRE = np.array([10.0, 0.1, 1.0]), np.array([300.0, -2.0, 0.0])


@pytest.fixture(scope="module")
def classes():
    """Two experts of three classes, in units far from standard."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(700, 3))
    first = rng.uniform(size=700) < scipy.special.expit(z @ GATE)
    logits = np.where(first[:, None], z @ EXPERTS[0].T, z @ EXPERTS[1].T)
    y = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
    return SCALE * z + CENTRE, y


@pytest.fixture(scope="module")
def fitted(classes):
    return MoEClassifier(2, random_state=0).fit(*classes)


@pytest.fixture(scope="module")
def crossed():
    """Two classes by the sign of a product, with softened edges."""
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (500, 2))
    first = rng.uniform(size=500) < scipy.special.expit(10.0 * x[:, 1])
    log_odds = np.where(first, 6.0, -6.0) * x[:, 0]
    return x, np.where(rng.uniform(size=500) < scipy.special.expit(log_odds), "same", "other")


@pytest.fixture(scope="module")
def binary(crossed):
    return MoEClassifier(2, random_state=0).fit(*crossed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [MoEClassifier(2, num_starts=3, ridge=1e-2)]
)  # the default: benchmarks/estimator_checks.py
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_one_expert_is_logistic_regression(classes, num_classes):
    x, y = classes
    used = y < num_classes
    weights = np.random.default_rng(1).integers(0, 3, used.sum())
    model = MoEClassifier(1, ridge=1e-6).fit(x[used], y[used], sample_weight=weights)
    reference = LogisticRegression(C=1e6, tol=1e-9, max_iter=10_000)
    reference.fit((x[used] - CENTRE) / SCALE, y[used], sample_weight=weights)
    expected = reference.predict_proba((x - CENTRE) / SCALE)
    np.testing.assert_allclose(model.predict_proba(x), expected, atol=1e-4)
    coefficients = model.coef_[0] if num_classes == 3 else model.coef_[0, 1:] - model.coef_[0, :1]
    np.testing.assert_allclose(coefficients * SCALE, reference.coef_, atol=1e-4)
    assert model.status_ == "ok"
    through_zero = MoEClassifier(1, ridge=1e-6, fit_intercept=False).fit(x[used] - CENTRE, y[used])
    reference.set_params(fit_intercept=False).fit((x[used] - CENTRE) / SCALE, y[used])
    expected = reference.predict_proba((x - CENTRE) / SCALE)
    np.testing.assert_allclose(through_zero.predict_proba(x - CENTRE), expected, atol=1e-4)
    assert not through_zero.intercept_.any()


def test_two_experts_of_three_classes_are_recovered(classes, fitted):
    x, y = classes
    z = (x - CENTRE) / SCALE
    assert fitted.score(x, y) > LogisticRegression().fit(z, y).score(z, y) + 0.1
    experts = SCALE * fitted.coef_
    order = [0, 1] if experts[0, 0, 0] > 0 else [1, 0]
    # five standard errors of a coefficient at some 350 rows of an expert, each of information p (1 - p) ~ 0.1
    np.testing.assert_allclose(experts[order], EXPERTS, atol=5 / np.sqrt(350 * 0.1))
    gates = SCALE * fitted.gating_coef_
    np.testing.assert_allclose(gates[order[0]] - gates[order[1]], GATE, atol=1.5)
    assert fitted.n_parameters_ == 2 * 2 * 4 + 4


def test_probabilities_and_responsibilities_are_those_of_the_parameters(classes, fitted):
    x, y = classes
    log_gates = scipy.special.log_softmax(x @ fitted.gating_coef_.T + fitted.gating_intercept_, axis=1)
    predictors = np.einsum("nd,kcd->nkc", x, fitted.coef_) + fitted.intercept_
    joint = np.exp(log_gates)[:, :, None] * scipy.special.softmax(predictors, axis=2)
    np.testing.assert_allclose(fitted.predict_proba(x), joint.sum(axis=1), atol=1e-9)
    np.testing.assert_allclose(fitted.gate_probabilities(x), np.exp(log_gates), atol=1e-9)
    np.testing.assert_allclose(
        fitted.predict_experts(x), scipy.special.softmax(predictors, axis=2), atol=1e-9
    )
    own = joint[np.arange(len(y)), :, y]
    np.testing.assert_allclose(fitted.responsibilities(x, y), own / own.sum(axis=1, keepdims=True), atol=1e-9)
    value = np.log(own.sum(axis=1)).sum()
    assert fitted.log_likelihood_ == pytest.approx(value, abs=1e-6)
    assert fitted.bic(x, y) == pytest.approx(-2 * value + 20 * np.log(700))
    assert np.all(np.diff(fitted.history_) >= 0)
    shares = fitted.responsibilities(x, y).sum(axis=0)
    assert shares[0] >= shares[1]


def test_names_of_classes_order_of_rows_and_units_do_not_matter(classes, fitted):
    x, y = classes
    names = np.array(["pear", "apple", "fig"])  # sorted otherwise than 0, 1, 2
    named = clone(fitted).fit(x, names[y])
    assert named.classes_.tolist() == ["apple", "fig", "pear"]
    places = np.searchsorted(named.classes_, names)
    np.testing.assert_allclose(named.predict_proba(x)[:, places], fitted.predict_proba(x), atol=1e-4)
    assert named.log_likelihood_ == pytest.approx(fitted.log_likelihood_, abs=1e-5)
    shuffled = np.random.default_rng(3).permutation(len(y))
    again = clone(fitted).fit(x[shuffled], y[shuffled])
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))
    scaled = clone(fitted).fit(1e3 * x - 7.0, y)
    np.testing.assert_allclose(scaled.predict_proba(1e3 * x - 7.0), fitted.predict_proba(x), atol=1e-4)


def test_rows_of_weight_zero_are_rows_removed(classes):
    x, y = (a[:120] for a in classes)
    counts = np.random.default_rng(4).integers(0, 3, 120)
    model = MoEClassifier(2, num_starts=2, ridge=0.01, random_state=0)
    weighted = clone(model).fit(x, y, sample_weight=counts)
    repeated = clone(model).fit(x.repeat(counts, axis=0), y.repeat(counts))
    np.testing.assert_array_equal(weighted.predict_proba(x), repeated.predict_proba(x))
    assert weighted.log_likelihood_ == repeated.log_likelihood_
    without = clone(model).fit(x, y, sample_weight=y != 2)
    assert without.classes_.tolist() == [0, 1]
    removed = clone(model).fit(x[y != 2], y[y != 2])
    np.testing.assert_array_equal(without.predict_proba(x), removed.predict_proba(x))


@pytest.mark.slow
def test_two_classes_where_logistic_regression_is_at_chance(crossed, binary, tmp_path):
    x, y = crossed
    assert LogisticRegression().fit(x, y).score(x, y) < 0.6
    assert binary.score(x, y) > 0.8
    assert binary.classes_.tolist() == ["other", "same"]
    # the fit behind it, with its errors
    result = binary.fit_result_
    assert result.standard_errors is not None
    assert result.diagnostics["family"] == "bernoulli"
    np.testing.assert_allclose(result.predict(x), binary.predict_proba(x)[:, 1], atol=1e-9)
    np.testing.assert_allclose(
        result.responsibilities(x, y == "same"), binary.responsibilities(x, y), atol=1e-9
    )
    result.save(tmp_path / "fit.moejax")
    again = moejax.load_fit(tmp_path / "fit.moejax")
    np.testing.assert_array_equal(again.predict(x), result.predict(x))
    assert again.settings["family"] == "bernoulli"
    value = np.log(binary.predict_proba(x)[np.arange(500), (y == "same").astype(int)]).sum()
    assert binary.log_likelihood_ == pytest.approx(value, abs=1e-6)
    assert binary.n_parameters_ == result.num_parameters == 3 * 3


@pytest.mark.slow
def test_one_expert_of_two_classes_has_the_errors_of_a_logit_model(crossed):
    statsmodels = pytest.importorskip("statsmodels.api")
    x, y = crossed[0], crossed[0][:, 0] + np.random.default_rng(5).logistic(size=500) > 0.5
    model = MoEClassifier(1, random_state=0).fit(x, y)
    reference = statsmodels.Logit(y.astype(float), np.column_stack([x, np.ones(500)])).fit(
        disp=False, tol=1e-12
    )
    result = model.fit_result_
    np.testing.assert_allclose(
        [*result.params.experts[0], *result.params.expert_bias], reference.params, atol=1e-5
    )
    errors = [*result.standard_errors.experts[0], *result.standard_errors.expert_bias]
    np.testing.assert_allclose(errors, reference.bse, rtol=1e-4)
    assert model.log_likelihood_ == pytest.approx(reference.llf, abs=1e-6)
    assert model.predict(x).dtype == bool


def test_single_precision_is_as_good_as_the_data(classes, fitted):
    single = clone(fitted).set_params(precision="float32").fit(*classes)
    assert single.log_likelihood_ == pytest.approx(fitted.log_likelihood_, abs=0.01)
    np.testing.assert_allclose(single.predict_proba(classes[0]), fitted.predict_proba(classes[0]), atol=0.01)


@pytest.mark.slow
def test_two_classes_by_either_way_have_one_likelihood(crossed, binary):
    penalised = MoEClassifier(2, ridge=1e-5, random_state=0).fit(*crossed)
    assert penalised.fit_result_ is None
    assert penalised.n_parameters_ == binary.n_parameters_
    assert penalised.log_likelihood_ == pytest.approx(binary.log_likelihood_, abs=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learns_check_of_weights_for_the_default():
    check_sample_weight_equivalence_on_dense_data("MoEClassifier", MoEClassifier())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_bic_chooses_the_number_of_experts(classes):
    model = MoEClassifier("auto", random_state=0).fit(*classes)
    assert model.num_experts_ == 2
    table = model.selection_
    assert table["num_experts"].tolist() == [1, 2, 3, 4]  # until BIC has risen twice
    np.testing.assert_allclose(
        table["bic"], -2 * table["log_likelihood"] + table["num_parameters"] * np.log(700)
    )
    assert table["num_parameters"].tolist() == [8, 20, 32, 44]


def test_separable_classes_have_a_finite_fit():
    x = np.arange(12.0)[:, None]
    model = MoEClassifier(1, random_state=0).fit(x, np.arange(12) // 4)
    assert model.score(x, np.arange(12) // 4) == 1.0
    assert model.status_ == "ok"
    assert np.abs(model.coef_).max() < 100


def test_data_frames_pickles_and_what_is_refused(classes):
    x, y = (a[:120] for a in classes)
    model = MoEClassifier(1)
    with pytest.raises(NotFittedError):
        model.predict(x)
    model.fit(pd.DataFrame(x, columns=["a", "b", "c"]), pd.Series(y, dtype="category"))
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    again = pickle.loads(pickle.dumps(model))
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    np.testing.assert_array_equal(again.predict(frame), model.predict(frame))
    for labels, words in (
        (np.zeros(120), r"y: expected at least two classes, got one: "),
        (np.linspace(0, 1, 120), r"y: expected classes, got Unknown label type: continuous"),
        (np.where(y == 0, np.nan, 1.0), r"y: expected classes, got "),
        (np.zeros((120, 2)), r"y: expected classes \(n,\), got "),
        (y[:5], r"y: expected shape \(120,\) to go with X, got "),
    ):
        with pytest.raises(ValueError, match=words) as error:
            MoEClassifier().fit(x, labels)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"y: expected at least two classes, got one: 1"):
        MoEClassifier().fit(x, y, sample_weight=y == 1)
    with pytest.raises(ValueError, match=r"X: expected values that vary"):
        MoEClassifier().fit(np.ones((120, 3)), y)
    with pytest.raises(ValueError, match=r"y: expected classes of the fit, \[0, 1, 2\], got 7"):
        model.responsibilities(frame, np.full(120, 7))
    for name, value in (("num_experts", 0), ("ridge", -1.0), ("ridge", "evidence"), ("num_starts", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected "):
            MoEClassifier(**{name: value}).fit(x, y)
