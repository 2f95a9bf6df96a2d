"""EM with a noise that falls slowly, on labels that are nearly -1 or 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sample
from moejax.likelihood.polish import polish
from moejax.methods import MethodConfig, Problem, get_method
from moejax.methods.annealed import FIRST_LEVEL, NUM_LEVELS, noise_levels
from moejax.methods.starts import label_spread
from moejax.model.instances import InstanceScales, random_params
from moejax.model.metrics import recovery_error

N, D, K, NOISE = 1_500, 5, 3, 0.1


def steep(t):
    return jnp.tanh(4 * t)


@pytest.fixture(scope="module")
def problem():
    """A mixture, and its sample."""
    scales = InstanceScales(*(jnp.asarray(v) for v in (NOISE, 1.0, 90.0, 0.0)), jnp.ones(K))
    params = random_params(jax.random.key(0), scales, D)
    x, y, _ = sample(jax.random.key(1), params, steep, N)
    return params, Problem(x, y, jnp.ones(N), jnp.asarray(NOISE), None)


def test_levels_fall_from_the_spread_of_the_labels_to_the_noise(problem):
    _, data = problem
    levels = np.asarray(noise_levels(data))
    assert levels.shape == (NUM_LEVELS,)
    assert levels[0] == pytest.approx(FIRST_LEVEL * float(np.std(np.asarray(data.y))), rel=1e-6)
    assert (np.diff(levels) < 0).all()
    noisy = noise_levels(data._replace(noise_std=jnp.asarray(0.5)))
    assert float(noisy.min()) == 0.5
    assert float(label_spread(data)) > 0.5


@pytest.mark.slow
def test_it_reaches_the_optimum_of_the_truth(problem):
    params, data = problem
    config = MethodConfig(fn=steep, num_experts=K, order=0, num_starts=3)
    run = jax.jit(get_method("annealed_em"), static_argnames="config")
    result = run(jax.random.key(2), data, config=config)
    truth = polish(params, data.x, data.y, data.weights, fn=steep, num_steps=50, noise="shared")
    reached = result.history[jnp.isfinite(result.history)][-1]
    assert float(reached) > float(truth.log_likelihood) - 0.5
    assert float(recovery_error(params.experts, result.params.experts)) < 0.02
    assert np.isfinite(np.asarray(result.params.noise_std)).all()
