"""fit(): against scikit-learn and scipy, invariances, and one clear line for every bad input."""

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from compiled_model import random_params
from sklearn.linear_model import LinearRegression

import moejax
from moejax.model.instances import InstanceScales

DIM, NUM_EXPERTS, NOISE_STD = 5, 2, 0.1
WITH_INTERCEPTS = {
    "num_experts": NUM_EXPERTS,
    "activation": "tanh",
    "fit_intercept": True,
    "method": "spectral_em",
}


@pytest.fixture(scope="module")
def truth():
    scales = InstanceScales(
        *(jnp.asarray(v, float) for v in (NOISE_STD, 1.0, 90.0, 0.0)), jnp.ones(NUM_EXPERTS)
    )
    return random_params(jax.random.key(0), scales, DIM)


@pytest.fixture(scope="module")
def data(truth):
    x, y, _ = compiled_model.sample(jax.random.key(1), truth, "tanh", 3000)
    return np.asarray(x), np.asarray(y)


@pytest.fixture(scope="module")
def fitted(data):
    return moejax.fit(
        jax.random.key(2), *data, num_experts=NUM_EXPERTS, activation="tanh", method="spectral_em"
    )


def scipy_log_likelihood(params, x, y, g):
    """The log-likelihood per sample with scipy alone."""
    experts, gating, noise, expert_bias, gating_bias = (np.asarray(leaf) for leaf in params)
    log_gate = scipy.special.log_softmax(x @ gating.T + gating_bias, axis=1)
    density = scipy.stats.norm.logpdf(y[:, None], g(x @ experts.T + expert_bias), noise)
    return scipy.special.logsumexp(log_gate + density, axis=1)


@pytest.mark.slow
def test_recovers_the_truth_and_its_noise(fitted, truth):
    assert fitted.status == "ok"
    assert compiled_model.recovery_error(truth.experts, fitted.params.experts) < 1e-3
    # the standard error of sigma is sigma / sqrt(2 n) = 0.0013
    np.testing.assert_allclose(fitted.params.noise_std, NOISE_STD, atol=5 * 0.0013)
    assert np.all(np.asarray(fitted.params.gating)[-1] == 0)


@pytest.mark.slow
def test_log_likelihood_is_scipys_and_a_maximum(fitted, data):
    x, y = data
    per_sample = scipy_log_likelihood(fitted.params, x, y, np.tanh)
    np.testing.assert_allclose(per_sample.sum(), fitted.log_likelihood, atol=1e-10 * len(y))

    def negative(free):
        experts, gates = free[:10].reshape(2, 5), np.stack([free[10:15], np.zeros(5)])
        params = (experts, gates, np.full(2, np.exp(free[15])), np.zeros(2), np.zeros(2))
        return -scipy_log_likelihood(params, x, y, np.tanh).sum()

    params = jax.tree.map(np.asarray, fitted.params)
    start = np.concatenate([params.experts.ravel(), params.gating[0], np.log(params.noise_std[:1])])
    better = scipy.optimize.minimize(negative, start, method="BFGS")
    assert -better.fun - fitted.log_likelihood < 0.01


@pytest.mark.slow
def test_history_ends_at_the_log_likelihood(fitted):
    assert np.isfinite(fitted.history).all()
    # the history is of the objective, which carries the ridge
    penalty = fitted.diagnostics["ridge_penalty"]
    assert 0 < penalty < 0.01
    assert fitted.history[-1] == pytest.approx(fitted.log_likelihood - penalty, abs=1e-7)


@pytest.mark.slow
def test_one_linear_expert_is_linear_regression(data):
    x, y = data
    result = moejax.fit(jax.random.key(0), x, y, num_experts=1, fit_intercept=True, method="joint_em")
    reference = LinearRegression().fit(x, y)
    np.testing.assert_allclose(result.params.experts[0], reference.coef_, atol=1e-6)
    np.testing.assert_allclose(result.params.expert_bias[0], reference.intercept_, atol=1e-6)
    residual = y - reference.predict(x)
    np.testing.assert_allclose(result.params.noise_std[0], residual.std(), rtol=1e-4)


@pytest.mark.slow
def test_units_and_correlations_of_the_inputs_do_not_matter(data, fitted):
    x, y = data
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(DIM, DIM)) * np.array([1e3, 1.0, 1e-3, 1.0, 1.0])
    shifted = x @ mixing + np.array([5e3, 0.0, 0.0, -3.0, 1.0])
    result, plain = (moejax.fit(jax.random.key(2), inputs, y, **WITH_INTERCEPTS) for inputs in (shifted, x))
    assert abs(result.log_likelihood - plain.log_likelihood) < 0.01
    back = np.asarray(result.params.experts) @ mixing.T
    assert float(compiled_model.recovery_error(jnp.asarray(back), plain.params.experts)) < 1e-6


@pytest.mark.slow
def test_collinear_inputs_are_dropped_and_said(data):
    x, y = data
    collinear = np.concatenate([x, x[:, :1] + x[:, 1:2]], axis=1)
    result = moejax.fit(jax.random.key(2), collinear, y, **WITH_INTERCEPTS)
    assert result.diagnostics["collinear_inputs"] == [[0, 1, DIM]]
    assert f"inputs 1, 2, {DIM + 1} " in result.diagnostics["notes"][0]
    assert result.status == "ok"
    assert np.abs(result.params.experts).max() < 10


@pytest.mark.slow
def test_row_order_rotation_chunks_and_zero_weights_change_rounding_only(data):
    x, y = data
    options = {"num_experts": NUM_EXPERTS, "activation": "tanh", "noise_std": NOISE_STD, "method": "spectral"}
    key = jax.random.key(3)
    base = np.asarray(moejax.fit(key, x, y, **options).params.experts)
    rng = np.random.default_rng(0)
    permutation = rng.permutation(len(y))
    rotation = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    padded_x, padded_y = (
        np.concatenate([x, 100 * np.ones((7, DIM)), x[:5]]),
        np.concatenate([y, np.full(12, -50.0)]),
    )
    weights = np.concatenate([np.ones(len(y)), np.zeros(12)])
    variants = {
        "permuted": moejax.fit(key, x[permutation], y[permutation], **options).params.experts,
        "rotated": np.asarray(moejax.fit(key, x @ rotation, y, **options).params.experts) @ rotation.T,
        "chunked": moejax.fit(key, x, y, chunk_size=700, **options).params.experts,
        "padded": moejax.fit(key, padded_x, padded_y, weights=weights, **options).params.experts,
    }
    for name, experts in variants.items():
        distance = float(compiled_model.recovery_error(jnp.asarray(base), jnp.asarray(experts)))
        assert distance < 1e-16, (name, distance)  # half a squared distance: vectors agree to 1e-8


@pytest.mark.slow
def test_what_stands_in_rows_without_weight_is_not_looked_at():
    """This holds for a g whose slope is infinite at zero too."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 2)), rng.normal(size=64)
    weights = np.where(np.arange(64) % 9 == 4, 0.0, rng.uniform(0.5, 1.5, size=64))
    used = weights > 0
    y[used] = np.cbrt(x[used] @ [1.0, -1.0]) + 0.3 * y[used]
    options = {"num_experts": 2, "activation": jnp.cbrt, "method": "joint_em", "max_iterations": 30}
    key = jax.random.key(0)
    removed = moejax.fit(key, x[used], y[used], weights=weights[used], **options)
    assert np.isfinite(removed.diagnostics["classification_entropy"])
    for value in (0.0, -9999.0, 1e200, np.nan):
        x[~used], y[~used] = value, value
        kept = moejax.fit(key, x, y, weights=weights, **options)
        assert kept.status == removed.status
        assert kept.log_likelihood == pytest.approx(removed.log_likelihood, rel=1e-9)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), kept.params, removed.params)
        for name in ("effective_samples", "classification_entropy", "input_kurtosis", "gate_angle_degrees"):
            expected = removed.diagnostics[name]
            # the angle may be zero to rounding
            atol = 1e-5 if name == "gate_angle_degrees" else 0.0
            np.testing.assert_allclose(kept.diagnostics[name], expected, rtol=1e-6, atol=atol, err_msg=name)


@pytest.mark.slow
def test_even_activation_by_order_four(truth):
    x, y, _ = compiled_model.sample(jax.random.key(5), truth, "abs", 4000)
    result = moejax.fit(
        jax.random.key(6),
        x,
        y,
        num_experts=NUM_EXPERTS,
        activation="abs",
        noise_std=NOISE_STD,
        method="spectral_em",
    )
    assert result.diagnostics["order"] == 4
    assert compiled_model.recovery_error(truth.experts, result.params.experts, even=True) < 1e-3


@pytest.mark.slow
def test_a_users_function_works_like_a_name(data):
    def steep_tanh(t):
        return jnp.tanh(1.5 * t)

    x, y = data
    named = moejax.fit(
        jax.random.key(0), x, y, num_experts=NUM_EXPERTS, activation=steep_tanh, method="spectral_em"
    )
    assert named.diagnostics["activation"] == "steep_tanh"
    assert named.status == "ok"


@pytest.mark.slow
def test_float32_agrees_with_float64(data, fitted, single_precision):
    result = moejax.fit(
        jax.random.key(2), *data, num_experts=NUM_EXPERTS, activation="tanh", method="spectral_em"
    )
    assert result.params.experts.dtype == np.float64  # on the host, whatever the precision of the computation
    assert result.settings["precision"] == "float32"
    assert abs(result.log_likelihood - fitted.log_likelihood) < 0.5


X, Y = np.random.default_rng(0).normal(size=(60, 3)), np.random.default_rng(1).normal(size=60)


def with_value(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        (X[:, 0], Y, {}, ["x:", "(n, d)", "(60,)"]),
        (X, Y[:50], {}, ["y:", "(60,)", "(50,)"]),
        (X, Y[:, None], {}, ["y:", "(60, 1)"]),
        (with_value(X, (4, 1), np.nan), Y, {}, ["x:", "finite", "nan", "(4, 1)"]),
        (X, with_value(Y, 7, np.inf), {}, ["y:", "finite", "inf", "(7,)"]),
        (np.full((60, 3), "a"), Y, {}, ["x:", "numbers"]),
        (np.full((60, 3), 1.5), Y, {"fit_intercept": True}, ["x:", "a column that varies"]),
        (X, np.full(60, 2.5), {}, ["y:", "labels that vary", "2.5"]),
        (X, 1e-160 * Y, {"activation": "tanh", "method": "joint_em"}, ["y:", "float64", "other units"]),
        (X, Y, {"num_experts": 4}, ["num_experts", "1 to 3", "got 4"]),
        (X, Y, {"num_experts": 0}, ["num_experts", "positive", "got 0"]),
        (X[:9], Y[:9], {}, ["at least", "k = 2", "11 rows", "got 9"]),
        (X, Y, {"noise_std": 0.0}, ["noise_std", "positive", "0.0"]),
        (X, Y, {"noise_std": -1.0}, ["noise_std", "-1.0"]),
        (X, Y, {"noise_std": np.nan}, ["noise_std", "nan"]),
        (X, Y, {"noise": "each"}, ["noise", "shared", "each"]),
        (X, Y, {"activation": "rellu"}, ["activation", "'rellu'", "did you mean relu"]),
        (X, Y, {"activation": "sigmoid", "noise_std": 1.0}, ["sigmoid", "no usable order", "13,0"]),
        (X, Y, {"activation": lambda t: 0.0 * t + 1.0}, ["no usable order", "constant"]),
        (X, Y, {"activation": "abs", "order": 3, "noise_std": 0.1}, ["order", "c_3 = 0", "even"]),
        (X, Y, {"method": "spektral"}, ["method", "'spektral'", "did you mean spectral"]),
        (X, Y, {"transform": "best"}, ["transform", "weighted", "best"]),
        (X, Y, {"order": 5}, ["order", "got 5"]),
        (X, Y, {"weights": -np.ones(60)}, ["weights", "non-negative"]),
        (X, Y, {"weights": np.ones(3)}, ["weights", "(3,)"]),
        (np.repeat(X[:, :1], 3, axis=1) * np.array([1.0, 2.0, 3.0]), Y, {}, ["num_experts", "rank", "got 2"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(x, y, options, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        moejax.fit(jax.random.key(0), x, y, **({"num_experts": 2, "method": "spectral_em"} | options))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.slow
def test_sandwich_errors_do_not_depend_on_the_scale_of_the_weights():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    means = np.where(rng.random(400) < 0.5, np.maximum(x @ [1.0, 0.5], 0), np.maximum(x @ [-1.0, 0.7], 0))
    y = means + 0.1 * rng.normal(size=400)
    plain, large, shares = (
        moejax.fit(
            jax.random.key(0),
            x,
            y,
            num_experts=2,
            activation="relu",
            method="joint_em",
            max_iterations=300,
            weights=np.full(400, weight),
            covariance="sandwich",
        ).standard_errors
        for weight in (1.0, 1e4, 1 / 400)
    )
    assert plain is not None
    for other in (large, shares):
        np.testing.assert_allclose(other.experts, plain.experts, rtol=1e-4)


def test_weights_that_leave_hardly_a_row_are_refused():
    """Else an expert would go through the few rows that count, with a noise of rounding, and the status ok."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)), rng.normal(size=60)
    weights = np.where(np.arange(60) < 2, 1.0, 1e-9)
    with pytest.raises(
        ValueError, match=r"at least 5 rows with weight .* got 60 that say as much as 2 equal ones"
    ):
        moejax.fit(jax.random.key(0), x, y, num_experts=1, weights=weights, fit_intercept=True)


def test_weights_that_count_no_rows_are_reliabilities():
    """Whole numbers, but more than can be counted: as counts their log-likelihood is minus infinity, with the status ok."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)), rng.normal(size=60)
    huge = np.full(60, 1.25e306)
    options = {"num_experts": 1, "fit_intercept": True}
    fitted, plain = (
        moejax.fit(jax.random.key(0), x, y, weights=w, **options) for w in (huge, 0.5 * np.ones(60))
    )
    np.testing.assert_allclose(fitted.log_likelihood, plain.log_likelihood, rtol=1e-12)
    with pytest.raises(ValueError, match=r"weights: expected counts of at most 9e\+15 rows, got 7\.5e\+307"):
        moejax.fit(jax.random.key(0), x, y, weights=huge, weights_are="counts", **options)


@pytest.mark.parametrize("value", [ValueError, print])
def test_what_is_callable_but_no_jax_function_is_refused(value):
    with pytest.raises(ValueError, match=r"activation .*: expected a scalar JAX function"):
        moejax.MoERegressor(1, activation=value).fit(np.eye(8)[:, :2], np.arange(8.0))
