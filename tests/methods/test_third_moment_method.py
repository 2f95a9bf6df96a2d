"""The method that starts from the third moment, and its part in the search for the best optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import fit, sample
from moejax.likelihood.polish import polish
from moejax.methods import MethodConfig, Problem, get_method, lookup_method
from moejax.methods.global_search import spectral_starts
from moejax.methods.preparation import NoUsableOrderError, choose_orders, third_transform_at
from moejax.methods.search_plan import plan_of
from moejax.methods.third_moment import third_moment_experts
from moejax.model.family import Nuisances
from moejax.model.instances import InstanceScales, random_params
from moejax.model.metrics import recovery_error
from moejax.moments.label_transforms import transform_on_host

N, D, K, NOISE = 8_000, 8, 3, 0.1


def sin_of_twice(t):
    return jnp.sin(2 * t)


@pytest.fixture(scope="module")
def problem():
    """A mixture, and its sample with the transform of the third moment."""
    scales = InstanceScales(*(jnp.asarray(v) for v in (NOISE, 1.0, 90.0, 0.0)), jnp.ones(K))
    params = random_params(jax.random.key(0), scales, D)
    x, y, _ = sample(jax.random.key(1), params, sin_of_twice, N)
    third = jax.tree.map(jnp.asarray, third_transform_at(sin_of_twice, NOISE, K))
    return params, Problem(x, y, jnp.ones(N), jnp.asarray(NOISE), None, third=third)


def config_of(**options):
    return MethodConfig(fn=sin_of_twice, num_experts=K, order=0, **options)


def test_the_method_ends_at_the_optimum_of_the_truth(problem):
    params, data = problem
    run = jax.jit(get_method("third_moment"), static_argnames="config")
    result = run(jax.random.key(2), data, config=config_of())
    at_truth = polish(params, data.x, data.y, data.weights, fn=sin_of_twice, num_steps=50, noise="shared")
    assert int(result.status) == 0
    assert float(recovery_error(params.experts, result.params.experts)) < 1e-3
    reached = result.history[jnp.isfinite(result.history)][-1]
    assert float(reached) == pytest.approx(float(at_truth.log_likelihood), abs=0.5)
    assert int(result.num_iterations) < 60


def test_experts_have_norm_and_intercept_of_the_nuisances(problem):
    _, data = problem
    nuisances = Nuisances(*(jnp.asarray(v) for v in (2.0, 0.5, NOISE)))
    plain, scaled = (
        third_moment_experts(jax.random.key(3), of, config_of())
        for of in (data, data._replace(nuisances=nuisances))
    )
    np.testing.assert_allclose(scaled.experts, 2.0 * plain.experts, rtol=1e-12)
    np.testing.assert_allclose(scaled.expert_bias, 0.5)


def test_it_is_one_of_the_starts_of_the_search(problem):
    params, data = problem
    starts, estimate, passes = spectral_starts(jax.random.key(3), data, config_of())
    assert starts.experts.shape == (1, K, D)
    assert estimate is None
    assert int(passes) == D + 1
    assert float(recovery_error(params.experts, starts.experts[0])) < 0.1
    assert plan_of(data, config_of()).num_spectral == 1
    assert plan_of(data._replace(third=None), config_of()).num_spectral == 0


@pytest.mark.parametrize("method", ["third_moment", "multistart", "annealed_em"])
def test_it_is_used_if_nothing_can_be_whitened(method):
    choice = choose_orders(method, sin_of_twice, NOISE, num_rows=N, dim=D, num_experts=K)
    assert (choice.orders, choice.third) == ((), True)
    assert "without whitening" in choice.reason


def test_other_activations_keep_their_moments():
    assert not choose_orders("multistart", "tanh", NOISE, num_rows=N, dim=D, num_experts=K).third
    assert choose_orders("third_moment", "tanh", NOISE, num_rows=N, dim=D, num_experts=K).third
    with pytest.raises(NoUsableOrderError, match="no usable order 3"):
        choose_orders("third_moment", "abs", NOISE, num_rows=N, dim=D, num_experts=K)
    with pytest.raises(NoUsableOrderError, match="order 2, which whitening needs"):
        choose_orders("spectral_em", sin_of_twice, NOISE, num_rows=N, dim=D, num_experts=K)


def test_its_transform_is_the_relaxed_one_on_the_host_and_traced():
    host = third_transform_at(sin_of_twice, NOISE, K)
    expected = transform_on_host(sin_of_twice, NOISE, 3, "relaxed", K)
    np.testing.assert_allclose(host.values, expected.values, rtol=1e-6)
    traced = jax.jit(lambda level: third_transform_at(sin_of_twice, level, K))(jnp.asarray(NOISE))
    y = jnp.linspace(-1.2, 1.2, 41)
    np.testing.assert_allclose(traced(y), jax.tree.map(jnp.asarray, host)(y), atol=2e-3)


@pytest.mark.slow
def test_a_fit_takes_it_and_refuses_a_density_of_the_inputs(problem):
    _, data = problem
    x, y = np.asarray(data.x), np.asarray(data.y)
    result = fit(jax.random.key(4), x, y, num_experts=K, activation=sin_of_twice, method="third_moment")
    assert result.status == "ok"
    assert "without whitening" in result.diagnostics["order_choice"]
    with pytest.raises(ValueError, match="log_density: expected None for method 'third_moment'"):
        fit(
            jax.random.key(4),
            x,
            y,
            num_experts=K,
            activation=sin_of_twice,
            method="third_moment",
            log_density=lambda v: -0.5 * v @ v,
        )


def test_the_registry_knows_its_needs():
    assert lookup_method("third_moment").moments == "third"
