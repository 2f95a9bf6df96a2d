"""Convergence of the gradient baselines: curvature against automatic differentiation, statuses against Newton, units of y."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import make_params, predict, sample

from moejax.likelihood.polish import polish
from moejax.likelihood.predictors import free_parameters, params_from_free
from moejax.methods import MethodConfig, Problem, get_method
from moejax.methods.gradient_descent import standard_labels
from moejax.methods.stationarity import squared_error_curvature
from moejax.model.activations import get_activation
from moejax.model.status import Status

D, K, N = 3, 2, 600


@functools.cache
def drawn(name):
    rng = np.random.default_rng(0)
    params = make_params(
        rng.normal(size=(K, D)),
        rng.normal(size=(K, D)),
        0.3,
        expert_bias=np.asarray([0.2, -0.1]),
    )
    x, y, _ = sample(jax.random.key(0), params, name, N)
    weights = jnp.asarray(np.where(np.arange(N) < N - 60, rng.uniform(0.5, 1.5, N), 0.0))
    return params, Problem(x, y, weights, jnp.asarray(0.3), None)


def config(name, **changes):
    settings = {"noise": "shared", "fit_intercept": True, "max_iterations": 100} | changes
    return MethodConfig(fn=get_activation(name), num_experts=K, order=0, **settings)


free_of = jax.jit(free_parameters, static_argnames=("noise", "fit_intercept"))


@functools.cache
def compiled(method, name, **changes):
    return jax.jit(lambda key, problem: get_method(method)(key, problem, config(name, **changes)))


def test_curvature_of_the_squared_error_is_that_of_automatic_differentiation():
    params, problem = drawn("tanh")
    ridge, total = 5.0, float(np.sum(problem.weights))
    free = free_of(params, noise="known", fit_intercept=True)

    def errors(free):
        at = params_from_free(free, params, noise="known", fit_intercept=True)
        gates = jnp.concatenate([at.gating, at.gating_bias[:, None]], axis=1)
        penalty = 0.5 * jnp.sum((gates - gates.mean(axis=0, keepdims=True)) ** 2)
        return jnp.sqrt(problem.weights) * (problem.y - predict(at, problem.x, jnp.tanh)), penalty

    def everything(free):
        (residuals, penalty), (jacobian, slope) = errors(free), jax.jacfwd(errors)(free)
        return residuals, penalty, jacobian, slope, jax.hessian(lambda f: errors(f)[1])(free)

    residuals, penalty, jacobian, slope, bend = jax.device_get(jax.jit(everything)(free))
    variance = float(residuals @ residuals) / total
    found = jax.jit(lambda: squared_error_curvature(params, problem, config("tanh", ridge=ridge)))()
    half = 0.5 * ridge
    assert float(found.log_likelihood) == pytest.approx(
        -(0.5 * total + half * float(penalty) / variance), rel=1e-10
    )
    np.testing.assert_allclose(
        found.gradient, -(jacobian.T @ residuals + half * slope) / variance, rtol=1e-8, atol=1e-8
    )
    np.testing.assert_allclose(
        found.observed, (jacobian.T @ jacobian + half * bend) / variance, rtol=1e-8, atol=1e-8
    )


@pytest.mark.slow
@pytest.mark.parametrize(("passes", "status"), [(100, Status.OK), (8, Status.NOT_CONVERGED)])
def test_gradient_descent_is_ok_where_newton_gains_next_to_nothing(passes, status):
    _, problem = drawn("tanh")
    result = compiled("gradient_nll", "tanh", max_iterations=passes)(jax.random.key(1), problem)
    best = jax.jit(
        lambda params: polish(
            params, *problem[:3], fn=jnp.tanh, num_steps=30, noise="shared", fit_intercept=True
        )
    )(result.params)
    gain = float(best.log_likelihood) - float(np.asarray(result.history)[-1])
    assert int(result.status) == status
    assert gain < 0.5 if status == Status.OK else gain > 0.5


@pytest.mark.slow
def test_the_squared_error_is_stationary_where_it_is_ok_and_no_maximum_of_the_likelihood():
    _, problem = drawn("tanh")
    done = compiled("gradient_mse", "tanh", max_iterations=1000)(jax.random.key(1), problem)
    short = compiled("gradient_mse", "tanh", max_iterations=4)(jax.random.key(1), problem)
    assert [int(run.status) for run in (done, short)] == [Status.OK, Status.NOT_CONVERGED]

    def squares(free):
        at = params_from_free(free, done.params, noise="known", fit_intercept=True)
        return problem.weights @ (problem.y - predict(at, problem.x, jnp.tanh)) ** 2

    free = free_of(done.params, noise="known", fit_intercept=True)
    value, gradient, hessian = jax.device_get(
        jax.jit(lambda free: (squares(free), jax.grad(squares)(free), jax.hessian(squares)(free)))(free)
    )
    # by the quadratic model, in nats of normal labels with that residual variance
    gain = 0.5 * float(gradient @ np.linalg.solve(hessian, gradient))
    assert 0 <= gain / (2.0 * float(value / np.sum(problem.weights))) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient_nll", "gradient_mse"])
def test_units_of_the_labels_do_not_matter_to_a_homogeneous_activation(method):
    _, problem = drawn("linear")
    run = compiled(method, "linear", max_iterations=20)
    one = jax.device_get(run(jax.random.key(2), problem))
    for unit in (2.0**10, 2.0**-30):  # powers of two are exact
        other = run(jax.random.key(2), problem._replace(y=jnp.asarray(unit * np.asarray(problem.y))))
        assert int(other.status) == int(one.status)
        np.testing.assert_allclose(other.params.experts, unit * one.params.experts, rtol=1e-9)
        np.testing.assert_allclose(other.params.noise_std, unit * one.params.noise_std, rtol=1e-9)
        np.testing.assert_allclose(other.params.gating, one.params.gating, rtol=1e-9)


def test_standard_labels_have_the_spread_of_a_homogeneous_activation():
    _, problem = drawn("linear")
    standard, unit = standard_labels(problem, config("relu"))
    weights = np.asarray(problem.weights)
    mean = np.average(standard.y, weights=weights)
    spread = np.sqrt(np.average((np.asarray(standard.y) - mean) ** 2, weights=weights))
    assert spread == pytest.approx(np.sqrt(0.5 - 0.5 / np.pi), rel=1e-4)  # of max(Z, 0)
    np.testing.assert_allclose(unit * standard.y, problem.y, rtol=1e-12)
    assert float(unit * standard.noise_std) == pytest.approx(0.3)
    same, unit = standard_labels(problem, config("tanh"))
    assert same is problem
    assert float(unit) == 1.0
    constant, unit = standard_labels(problem._replace(y=jnp.ones(N)), config("linear"))
    assert float(unit) == 1.0
    np.testing.assert_array_equal(constant.y, 1.0)
