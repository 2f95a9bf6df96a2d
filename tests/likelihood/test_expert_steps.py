"""Several Gauss-Newton steps of the experts in an M-step, against SciPy's least squares."""

import functools

import jax
import numpy as np
import pytest
from compiled_model import make_params, responsibilities, sample
from scipy import optimize

from moejax.likelihood.em import joint_em
from moejax.model.activations import get_activation

D, K, N = 3, 3, 600
NEVER = -1.0  # a tolerance that no gain falls below


@functools.cache
def drawn(name):
    rng = np.random.default_rng(0)
    experts = np.linalg.qr(rng.normal(size=(D, D)))[0][:K]
    params = make_params(experts, rng.normal(size=(K, D)), 0.3)
    x, y, _ = sample(jax.random.key(0), params, name, N)
    return jax.device_get((params, x, y))


@functools.partial(jax.jit, static_argnames=("name", "num_steps", "expert_steps"))
def run_with_expert_steps(params, x, y, weights, name, num_steps, expert_steps):
    return joint_em(
        params,
        x,
        y,
        weights,
        fn=get_activation(name),
        num_steps=num_steps,
        noise="known",
        tolerance=NEVER,
        expert_steps=expert_steps,
    )


@pytest.mark.parametrize("name", ["tanh", "square"])
def test_many_expert_steps_maximise_the_experts_part_of_the_m_step(name):
    truth, x, y = drawn(name)
    rng = np.random.default_rng(1)
    start = truth._replace(experts=truth.experts + 0.1 * rng.normal(size=truth.experts.shape))
    g, weights = get_activation(name), np.ones(N)
    one = run_with_expert_steps(start, x, y, weights, name, 1, 12)
    r = responsibilities(start, x, y, name)
    two = run_with_expert_steps(start, x, y, weights, name, 2, 12)
    assert (int(one.num_steps), int(two.num_steps)) == (12, 24)
    for i in range(K):
        root = np.sqrt(np.asarray(r[:, i]))
        best = optimize.least_squares(
            lambda a, root=root: root * (y - np.asarray(g(x @ a))), start.experts[i]
        )
        np.testing.assert_allclose(two.params.experts[i], best.x, atol=2e-4)
    np.testing.assert_allclose(one.params.experts, start.experts)


def test_expert_steps_never_lower_the_likelihood():
    truth, x, y = drawn("square")
    start = truth._replace(experts=np.random.default_rng(2).normal(size=truth.experts.shape))
    run = run_with_expert_steps(start, x, y, np.ones(N), "square", 30, 3)
    history = np.asarray(run.history)
    assert np.all(np.diff(history) >= -1e-5 * np.abs(history[1:]))
    assert history[-1] > history[0] + 100
