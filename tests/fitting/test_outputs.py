"""Several outputs that share gates: against least squares, scipy's normal densities, and the mixture of one output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from compiled_model import predict, responsibilities, sample_labels
from sklearn.linear_model import LinearRegression

import moejax
from moejax.likelihood.em import joint_em
from moejax.methods import MethodConfig, Problem, random_starts
from moejax.model.mixture import MoEParams

pytestmark = pytest.mark.slow

N, D, K, M = 500, 3, 2, 2
TRUTH = MoEParams(
    experts=jnp.asarray([[[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]], [[-1.0, 0.5, 0.0], [0.0, 1.0, -1.0]]]),
    gating=jnp.asarray([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
    noise_std=jnp.asarray([[0.3, 0.6], [0.3, 0.6]]),
    expert_bias=jnp.asarray([[0.0, 1.0], [0.5, -1.0]]),
    gating_bias=jnp.asarray([0.4, 0.0]),
)


@pytest.fixture(scope="module")
def data():
    x = jax.random.normal(jax.random.key(0), (N, D))
    y, z = sample_labels(jax.random.key(1), TRUTH, "linear", x)
    return np.asarray(x), np.asarray(y), np.asarray(z)


@pytest.fixture(scope="module")
def fitted(data):
    x, y, _ = data
    return moejax.fit(jax.random.key(2), x, y, num_experts=K, fit_intercept=True, num_starts=10)


def log_likelihood_by_hand(x, y, experts, gating, noise_std, expert_bias, gating_bias):
    """(n,) by scipy alone."""
    log_gates = scipy.special.log_softmax(x @ gating.T + gating_bias, axis=1)
    densities = [
        scipy.stats.multivariate_normal(cov=np.diag(noise_std[i] ** 2)).logpdf(
            y - x @ experts[i].T - expert_bias[i]
        )
        for i in range(len(experts))
    ]
    return scipy.special.logsumexp(log_gates + np.stack(densities, axis=1), axis=1)


def test_labels_have_the_models_means_and_noise(data):
    x, y, z = data
    for i in range(K):
        residual = (y - x @ np.asarray(TRUTH.experts[i]).T - np.asarray(TRUTH.expert_bias[i]))[z == i]
        error = np.asarray(TRUTH.noise_std[i]) / np.sqrt(len(residual))
        assert np.all(np.abs(residual.mean(axis=0)) < 5 * error)
        assert np.all(np.abs(residual.std(axis=0) - np.asarray(TRUTH.noise_std[i])) < 5 * error)
        assert abs(np.corrcoef(residual.T)[0, 1]) < 5 / np.sqrt(len(residual))


def test_the_fit_is_scipys_likelihood_and_a_maximum(data, fitted):
    x, y, _ = data
    params = MoEParams(*(np.asarray(leaf) for leaf in fitted.params))
    value = log_likelihood_by_hand(x, y, *params).sum()
    assert fitted.log_likelihood == pytest.approx(value, abs=1e-10 * N)
    assert fitted.log_likelihood > log_likelihood_by_hand(x, y, *map(np.asarray, TRUTH)).sum()
    np.testing.assert_array_equal(
        params.noise_std[0], params.noise_std[1]
    )  # shared by experts, not by outputs

    def negative(free):
        experts, rest = free[:12].reshape(K, M, D), free[12:]
        gating = np.stack([rest[:3], np.zeros(3)])
        noise_std = np.exp(np.stack([rest[3:5], rest[3:5]]))
        return -log_likelihood_by_hand(
            x, y, experts, gating, noise_std, rest[5:9].reshape(K, M), np.array([rest[9], 0.0])
        ).sum()

    start = np.concatenate(
        [
            params.experts.ravel(), params.gating[0], np.log(params.noise_std[0]), params.expert_bias.ravel(),
            params.gating_bias[:1],
        ]
    )  # fmt: skip
    assert negative(start) == pytest.approx(-value)
    better = scipy.optimize.minimize(negative, start, method="BFGS", options={"maxiter": 5})
    assert -better.fun - value < 0.01
    assert fitted.status == "ok"
    assert fitted.standard_errors is None


def test_responsibilities_and_predictions_are_those_of_bayes(data, fitted):
    x, y, z = data
    params = jax.tree.map(np.asarray, fitted.params)
    log_gates = scipy.special.log_softmax(x @ params.gating.T + params.gating_bias, axis=1)
    means = np.einsum("imd,nd->nim", params.experts, x) + params.expert_bias
    joint = log_gates + scipy.stats.norm.logpdf(y[:, None], means, params.noise_std).sum(axis=2)
    posterior = np.asarray(responsibilities(fitted.params, jnp.asarray(x), jnp.asarray(y), "linear"))
    np.testing.assert_allclose(posterior, scipy.special.softmax(joint, axis=1), atol=1e-12)
    agree = (posterior.argmax(axis=1) == z).mean()
    assert max(agree, 1 - agree) > 0.9
    expected = np.einsum("ni,nim->nm", np.exp(log_gates), means)
    np.testing.assert_allclose(predict(fitted.params, jnp.asarray(x), "linear"), expected, atol=1e-12)


def test_one_column_is_the_mixture_of_one_output(data):
    x, y, _ = data
    config = MethodConfig(fn=moejax.model.activations.get_activation("linear"), num_experts=K, order=0)
    single = Problem(x, y[:, 0], np.ones(N), np.asarray(0.3), None)
    draw = jax.jit(random_starts, static_argnums=(2, 3))
    starts = jax.device_get(draw(jax.random.key(3), single, config, 1, 0.5))
    start = jax.tree.map(lambda leaf: leaf[0], starts)
    column = MoEParams(
        start.experts[:, None], start.gating, start.noise_std[:, None], start.expert_bias[:, None], start.gating_bias
    )  # fmt: skip
    options = {"fn": config.fn, "num_steps": 30, "fit_intercept": True, "noise": "per_expert"}
    run = jax.jit(functools.partial(joint_em, **options))
    one = run(start, x, y[:, 0], single.weights)
    other = jax.device_get(run(column, x, y[:, :1], single.weights))
    np.testing.assert_allclose(other.history, one.history, rtol=1e-9)
    np.testing.assert_allclose(other.params.experts[:, 0], one.params.experts, atol=1e-7)


def test_one_expert_is_least_squares_of_each_output(data):
    x, y, _ = data
    result = moejax.fit(jax.random.key(0), x, y, num_experts=1, fit_intercept=True, method="joint_em")
    reference = LinearRegression().fit(x, y)
    np.testing.assert_allclose(result.params.experts[0], reference.coef_, atol=1e-8)
    np.testing.assert_allclose(result.params.expert_bias[0], reference.intercept_, atol=1e-8)
    spread = (y - reference.predict(x)).std(axis=0)
    np.testing.assert_allclose(result.params.noise_std[0], spread, rtol=1e-8)


def test_the_estimator_gives_targets_back_in_their_units(data, fitted):
    x, y, _ = data
    units, shift = np.array([0.1, 50.0]), np.array([7.0, -300.0])
    model = moejax.MoERegressor(num_experts=K, method="joint_em", num_starts=10, random_state=0)
    model.fit(x, shift + units * y)
    assert model.coef_.shape == (K, M, D)
    assert model.log_likelihood_ == pytest.approx(fitted.log_likelihood - N * np.log(units).sum(), abs=0.01)
    expected = predict(fitted.params, jnp.asarray(x), "linear")
    np.testing.assert_allclose((model.predict(x) - shift) / units, expected, atol=1e-2)
    params = model.params_
    values = log_likelihood_by_hand(x, shift + units * y, *params)
    np.testing.assert_allclose(model.score_samples(x, shift + units * y), values, atol=1e-8)
    assert model.n_parameters_ == (M * K + K - 1) * (D + 1) + M
    assert model.predict_experts(x).shape == (N, K, M)
    draws = np.stack([model.sample(x[:4], random_state=seed) for seed in range(4000)])
    error = model.predict_std(x[:4]) / np.sqrt(4000)
    assert np.all(np.abs(draws.mean(axis=0) - model.predict(x[:4])) < 5 * error)
    np.testing.assert_allclose(draws.std(axis=0), model.predict_std(x[:4]), rtol=0.1)
    with pytest.raises(ValueError, match="y: needed to score several targets"):
        model.score_samples(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "spectral_em"}, "method: expected 'joint_em' or 'multistart' for several outputs"),
        ({"method": "joint_em", "start": "kmeans"}, "start: expected 'random' for several outputs"),
        ({"noise_std": np.ones(3)}, "noise_std: expected a positive finite number"),
    ],
)
def test_what_several_outputs_cannot_have_is_said(data, options, words):
    x, y, _ = data
    with pytest.raises(ValueError, match=words):
        moejax.fit(jax.random.key(0), x, y, num_experts=K, **options)
