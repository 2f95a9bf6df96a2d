"""EM: likelihoods that never fall, M-steps against SciPy, scikit-learn and weighted least squares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import log_likelihood, make_params, responsibilities, results_on_the_host, sample
from scipy import optimize, special, stats
from sklearn.linear_model import LogisticRegression

from moejax.likelihood.em import RIDGE, gating_em, joint_em
from moejax.likelihood.scan import frozen_scan
from moejax.model.activations import get_activation

D, K, N = 3, 3, 600


@functools.cache
def drawn(name):
    rng = np.random.default_rng(0)
    experts = np.linalg.qr(rng.normal(size=(D, D)))[0][:K]
    gating = rng.normal(size=(K, D))
    params = make_params(experts, gating, 0.3, gating_bias=np.asarray([0.4, -0.2, 0.0]))
    x, y, _ = sample(jax.random.key(0), params, name, N)
    return jax.device_get((params, x, y))


def zero_gates(params):
    return params._replace(gating=np.zeros_like(params.gating), gating_bias=np.zeros_like(params.gating_bias))


@results_on_the_host
@functools.partial(jax.jit, static_argnames=("name", "num_steps", "fit_intercept", "noise"))
def run_gating(
    params,
    x,
    y,
    weights,
    tolerance,
    name="tanh",
    num_steps=40,
    fit_intercept=True,
    noise="known",
    ridge=RIDGE,
):
    return gating_em(
        params,
        x,
        y,
        weights,
        fn=get_activation(name),
        num_steps=num_steps,
        fit_intercept=fit_intercept,
        noise=noise,
        ridge=ridge,
        tolerance=tolerance,
    )


@results_on_the_host
@functools.partial(jax.jit, static_argnames=("name", "num_steps", "fit_intercept", "noise"))
def run_joint(
    params, x, y, weights, tolerance, name="tanh", num_steps=40, fit_intercept=True, noise="shared"
):
    return joint_em(
        params,
        x,
        y,
        weights,
        fn=get_activation(name),
        num_steps=num_steps,
        fit_intercept=fit_intercept,
        noise=noise,
        tolerance=tolerance,
    )


NEVER = -1.0  # a tolerance that no gain falls below


def values_of(run):
    """The objective at each pass that was made; NaN fills the rest of the budget."""
    history = np.asarray(run.history)
    made = int(run.num_steps)
    assert np.all(np.isfinite(history[:made]))
    assert np.all(np.isnan(history[made:]))
    return history[:made]


def centred_penalty(gates):
    """sum_i |w_i - mean w|^2 / 2 over all k gates, and its slope in the free ones."""
    centred = np.asarray(gates) - np.asarray(gates).mean(axis=0)
    return 0.5 * np.sum(centred**2), centred[:-1]


def random_weights():
    return np.random.default_rng(1).uniform(0.0, 2.0, N)


@pytest.mark.slow
def test_gating_em_never_lowers_the_likelihood_and_reaches_scipys_maximum():
    params, x, y = drawn("tanh")
    weights = random_weights()
    run = run_gating(zero_gates(params), x, y, weights, 1e-13, num_steps=400)
    history = values_of(run)
    assert np.diff(history).min() > -1e-9 * abs(history[-1])
    assert float(run.log_likelihood) == pytest.approx(
        float(log_likelihood(run.params, x, y, "tanh", weights)), rel=1e-12
    )
    np.testing.assert_array_equal(run.params.experts, params.experts)
    np.testing.assert_array_equal(run.params.noise_std, params.noise_std)
    assert bool(run.converged)
    density = stats.norm.pdf(np.asarray(y)[:, None], np.tanh(x @ params.experts.T), 0.3)
    design = np.concatenate([x, np.ones((N, 1))], axis=1)
    w = np.asarray(weights)

    def loss(free):
        gates = np.concatenate([free.reshape(K - 1, D + 1), np.zeros((1, D + 1))])
        log_gate = special.log_softmax(design @ gates.T, axis=1)
        penalty, its_slope = centred_penalty(gates)
        value = -w @ np.log((np.exp(log_gate) * density).sum(axis=1)) + RIDGE * penalty
        posterior = special.softmax(log_gate + np.log(density + 1e-300), axis=1)
        slope = -((posterior - np.exp(log_gate)) * w[:, None]).T[: K - 1] @ design
        return value, (slope + RIDGE * its_slope).reshape(-1)

    best = optimize.minimize(
        loss, np.zeros((K - 1) * (D + 1)), jac=True, method="BFGS", options={"gtol": 1e-8}
    )
    assert float(history[-1]) == pytest.approx(-best.fun, abs=1e-5)
    fitted = np.concatenate([run.params.gating, run.params.gating_bias[:, None]], axis=1)[: K - 1]
    np.testing.assert_allclose(fitted.reshape(-1), best.x, atol=2e-3)


def test_m_steps_with_fixed_responsibilities_reach_the_logistic_regression():
    """Experts that tell everything (tiny noise, no overlap) fix the responsibilities: EM is then a regression on labels."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(N, D))
    gates = np.array([[1.0, -0.5, 0.2], [-0.3, 0.8, 0.5], [0.0, 0.0, 0.0]])
    labels = np.array([rng.choice(K, p=p) for p in special.softmax(x @ gates.T, axis=1)])
    counts = rng.integers(1, 4, N)
    params = make_params(np.zeros((K, D)), np.zeros((K, D)), 0.05, expert_bias=np.asarray([-3.0, 0.0, 3.0]))
    y = np.array([-3.0, 0.0, 3.0])[labels]
    ridge = 1e-3
    run = run_gating(
        params,
        x,
        y,
        counts.astype(float),
        1e-12,
        name="linear",
        ridge=ridge,
    )
    rows = np.repeat(np.arange(N), counts)
    # the same penalised likelihood of the k - 1 free gates
    design = np.concatenate([x, np.ones((N, 1))], axis=1)

    def loss(free):
        full = np.concatenate([free.reshape(K - 1, D + 1), np.zeros((1, D + 1))])
        log_gate = special.log_softmax(design[rows] @ full.T, axis=1)
        residual = np.eye(K)[labels[rows]] - np.exp(log_gate)
        penalty, its_slope = centred_penalty(full)
        value = -log_gate[np.arange(rows.size), labels[rows]].sum() + ridge * penalty
        return value, (ridge * its_slope - residual.T[: K - 1] @ design[rows]).reshape(-1)

    best = optimize.minimize(
        loss, np.zeros((K - 1) * (D + 1)), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    fitted = np.concatenate([run.params.gating, run.params.gating_bias[:, None]], axis=1)
    np.testing.assert_allclose(fitted[: K - 1].reshape(-1), best.x, atol=1e-5)
    # and, with next to no penalty, scikit-learn's
    free = run_gating(
        params,
        x,
        y,
        counts.astype(float),
        1e-12,
        name="linear",
        ridge=1e-9,
    )
    model = LogisticRegression(C=1e8, tol=1e-10, max_iter=1000).fit(x, labels, sample_weight=counts)
    np.testing.assert_allclose(free.params.gating, model.coef_ - model.coef_[-1:], atol=1e-4)
    np.testing.assert_allclose(free.params.gating_bias, model.intercept_ - model.intercept_[-1], atol=1e-4)


def test_separable_gates_stay_finite():
    x = np.random.default_rng(3).normal(size=(N, D))
    params = make_params(np.zeros((2, D)), np.zeros((2, D)), 0.05, expert_bias=np.asarray([-3.0, 3.0]))
    y = jnp.asarray(np.where(x[:, 0] > 0, 3.0, -3.0))
    run = run_gating(params, x, y, np.ones(N), NEVER, name="linear", num_steps=100)
    history = np.asarray(run.history)
    assert np.all(np.isfinite(run.params.gating))
    assert np.diff(history).min() > -1e-9
    assert history[-1] > history[0] + 0.5 * N * np.log(2)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["known", pytest.param("shared", marks=pytest.mark.slow), "per_expert"])
def test_joint_em_never_lowers_the_likelihood(noise):
    params, x, y = drawn("relu")
    rng = np.random.default_rng(4)
    start = zero_gates(params)._replace(experts=params.experts + 0.4 * rng.normal(size=(K, D)))
    weights = random_weights()
    run = run_joint(start, x, y, weights, NEVER, name="relu", noise=noise)
    history = np.asarray(run.history)
    assert np.diff(history).min() > -1e-9 * np.abs(history).max()
    assert float(run.log_likelihood) >= history[-1] - 1e-6
    assert float(run.log_likelihood) == pytest.approx(
        float(log_likelihood(run.params, x, y, "relu", weights)), rel=1e-12
    )
    std = np.asarray(run.params.noise_std)
    assert (np.ptp(std) == 0) == (noise != "per_expert")
    if noise == "known":
        np.testing.assert_array_equal(std, start.noise_std)
    assert int(run.num_steps) == 40
    assert not bool(run.converged)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "softplus"])
def test_joint_em_ends_where_the_gradient_of_the_likelihood_vanishes(name):
    """The history alone proves little: it is that of the best point so far."""
    params, x, y = drawn(name)
    start = zero_gates(params)._replace(experts=params.experts + 0.2)
    run = run_joint(start, x, y, np.ones(N), 1e-12, name=name, num_steps=4000)
    assert bool(run.converged)

    def objective(free):
        gates = jnp.concatenate([free.gating, free.gating_bias[:, None]], axis=1)
        penalty = 0.5 * jnp.sum((gates - gates.mean(axis=0, keepdims=True)) ** 2)
        return log_likelihood(free, x, y, name) - RIDGE * penalty

    compiled_slope = jax.jit(jax.grad(objective))
    before, after = (jax.device_get(compiled_slope(at)) for at in (start, run.params))
    before, after = (at._replace(noise_std=at.noise_std.sum(keepdims=True)) for at in (before, after))
    largest = max(np.abs(leaf).max() for leaf in before)
    assert largest > 100
    for leaf in after:
        assert np.abs(leaf).max() < 1e-4 * largest


@pytest.mark.slow
@pytest.mark.parametrize("noise", [pytest.param("shared", marks=pytest.mark.slow), "per_expert"])
def test_one_joint_step_of_linear_experts_is_weighted_least_squares(noise):
    params, x, y = drawn("linear")
    start = params._replace(experts=params.experts + 0.3, expert_bias=params.expert_bias - 0.2)
    weights = random_weights()
    run = run_joint(start, x, y, weights, NEVER, name="linear", num_steps=2, noise=noise)
    posterior = np.asarray(responsibilities(start, x, y, "linear")) * np.asarray(weights)[:, None]
    design, y = np.concatenate([x, np.ones((N, 1))], axis=1), np.asarray(y)
    squares = []
    for i in range(K):
        root = np.sqrt(posterior[:, i])
        expected = np.linalg.lstsq(root[:, None] * design, root * y, rcond=None)[0]
        np.testing.assert_allclose(
            np.append(run.params.experts[i], run.params.expert_bias[i]), expected, rtol=1e-9, atol=1e-10
        )
        squares.append(posterior[:, i] @ (y - design @ expected) ** 2)
    counts = posterior.sum(axis=0)
    expected = (
        np.array(squares) / counts if noise == "per_expert" else np.full(K, sum(squares) / counts.sum())
    )
    np.testing.assert_allclose(np.asarray(run.params.noise_std) ** 2, expected, rtol=1e-9)
    assert float(run.history[0]) == pytest.approx(
        float(log_likelihood(start, x, y, "linear", weights))
        - RIDGE * centred_penalty(np.c_[start.gating, start.gating_bias])[0]
    )


def test_an_expert_without_support_stays_finite():
    """relu experts turned away from all of the data have no slope at all."""
    params, x, y = drawn("relu")
    start = zero_gates(params)._replace(expert_bias=np.asarray([0.0, 0.0, -100.0]))
    run = run_joint(start, x, y, np.ones(N), NEVER, name="relu")
    assert all(np.all(np.isfinite(leaf)) for leaf in run.params)
    assert np.diff(np.asarray(run.history)).min() > -1e-9 * N


def test_whole_weights_are_repetitions():
    params, x, y = drawn("relu")
    counts = np.zeros(N)
    counts[: N // 3], counts[N // 3 : N // 2] = 2.0, 1.0
    rows = np.repeat(np.arange(N), counts.astype(int))
    rows, ones = np.append(rows, np.zeros(N - rows.size, int)), np.arange(N) < rows.size
    weighted = run_joint(zero_gates(params), x, y, counts, NEVER, name="relu")
    repeated = run_joint(zero_gates(params), x[rows], y[rows], ones.astype(float), NEVER, name="relu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), weighted, repeated)


def test_a_converged_lane_freezes_and_its_neighbours_go_on():
    def advance(state):
        return state * 0.5, -state, state < 0.2

    def run(start):
        return frozen_scan(advance, start, 10)

    state, history, count, done = jax.device_get(jax.jit(jax.vmap(run))(np.asarray([1.0, 1e6])))
    # the step from 0.125 is done, and the state that it made stays
    assert int(count[0]) == 4
    assert float(state[0]) == pytest.approx(1 / 16)
    np.testing.assert_allclose(history[0], [-1, -0.5, -0.25, -0.125, *[np.nan] * 6])
    assert done.tolist() == [True, False]
    assert int(count[1]) == 10
    assert float(state[1]) == pytest.approx(1e6 / 1024)


@pytest.mark.parametrize("norm", [5.0, 20.0])
def test_saturated_gates_reach_the_same_optimum(norm):
    """There the plain Newton step is useless: it leads, now and then uphill, to more saturated gates still."""
    params, x, y = drawn("tanh")
    rng = np.random.default_rng(8)
    far = rng.normal(size=(K, D))
    far = norm * (far - far[-1:]) / np.linalg.norm(far, axis=1, keepdims=True)
    run = run_gating(zero_gates(params)._replace(gating=far), x, y, np.ones(N), 1e-13, num_steps=400)
    history = values_of(run)
    assert np.diff(history).min() >= 0
    from_zero = run_gating(zero_gates(params), x, y, np.ones(N), 1e-13, num_steps=400)
    assert float(run.log_likelihood) == pytest.approx(float(from_zero.log_likelihood), abs=1e-4)


def test_what_weighs_nothing_may_be_anything():
    params, x, y = drawn("tanh")
    weights = (np.arange(N) != 5).astype(float)
    clean = run_joint(zero_gates(params), x, y, weights, NEVER)
    unused = weights == 0
    junk = np.where(unused[:, None], np.nan, x), np.where(unused, np.inf, y)
    dirty = run_joint(zero_gates(params), *junk, weights, NEVER)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_one_expert_needs_no_gates():
    x = np.random.default_rng(7).normal(size=(N, D))
    y = x @ np.asarray([1.0, 2.0, 3.0]) + 0.5
    start = make_params(np.zeros((1, D)), np.zeros((1, D)), 1.0)
    run = run_joint(start, x, y, np.ones(N), NEVER, name="linear", num_steps=3)
    np.testing.assert_allclose(run.params.experts[0], [1.0, 2.0, 3.0], atol=1e-9)
    assert float(run.params.expert_bias[0]) == pytest.approx(0.5)


def run_before_polish(params, x, y, tolerance, num_steps):
    return joint_em(
        params,
        x,
        y,
        jnp.ones(N),
        fn=get_activation("tanh"),
        num_steps=num_steps,
        fit_intercept=True,
        noise="shared",
        tolerance=tolerance,
        before_polish=True,
    )


def test_before_the_polish_the_gates_climb_first_and_the_last_step_is_a_good_one():
    params, x, y = drawn("tanh")
    rng = np.random.default_rng(3)
    start = zero_gates(params)._replace(experts=params.experts + 0.02 * rng.normal(size=(K, D)))
    run = jax.jit(run_before_polish, static_argnums=4)
    first = run(start, x, y, 2e-2, 1)
    assert not bool(first.converged)
    np.testing.assert_array_equal(first.params.experts, start.experts)
    ended = run(start, x, y, 2e-2, 30)
    assert bool(ended.converged)
    history = values_of(ended)
    assert np.diff(history).min() > 0
    assert float(jnp.abs(ended.params.experts - start.experts).max()) > 1e-3
    # the step that no pass evaluated raises the likelihood, by less than the tolerance for each sample
    gain = float(log_likelihood(ended.params, x, y, "tanh")) - history[-1]
    assert 0 < gain < 2e-2 * N
    # with a tolerance that no step of the gates meets, the experts never move
    held = run(start, x, y, -1.0, 10)
    np.testing.assert_array_equal(held.params.experts, start.experts)
