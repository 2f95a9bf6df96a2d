"""The registry of methods, and what the built-in ones end with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import log_likelihood, random_params, sample

import moejax
from moejax.likelihood.polish import polish
from moejax.methods import (
    MethodConfig,
    Problem,
    get_method,
    method_names,
    moments_of,
    register_method,
)
from moejax.model.activations import get_activation
from moejax.model.instances import InstanceScales
from moejax.model.status import Status
from moejax.moments.spectral import host_transforms
from moejax.sweep.trial.prepare import static_spec
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings

D, K, N, NOISE = 4, 2, 2000, 0.1


@pytest.fixture(scope="module")
def problem():
    scales = InstanceScales(*(jnp.asarray(v) for v in (NOISE, 1.0, 90.0, 0.0)), jnp.asarray(np.ones(K)))
    params = random_params(jax.random.key(0), scales, D)
    x, y, _ = sample(jax.random.key(1), params, "tanh", N)
    transforms = jax.tree.map(jnp.asarray, host_transforms("tanh", NOISE, 3, "weighted", K))
    return params, Problem(x, y, jnp.asarray(np.ones(N)), jnp.asarray(NOISE), transforms)


def run(name, problem, **changes):
    config = MethodConfig(fn=get_activation("tanh"), num_experts=K, order=3, max_iterations=30, **changes)
    return jax.jit(lambda key, problem: get_method(name)(key, problem, config))(jax.random.key(2), problem)


@pytest.fixture(scope="module")
def at_truth(problem):
    truth, data = problem
    compiled = jax.jit(functools.partial(polish, fn=get_activation("tanh"), num_steps=30))
    return compiled(truth, data.x, data.y, data.weights)


@pytest.mark.slow
def test_spectral_em_reaches_the_maximum_next_to_the_truth(problem, at_truth):
    result = run("spectral_em", problem[1])
    assert int(result.status) == Status.OK
    data = problem[1]
    value = float(log_likelihood(result.params, data.x, data.y, "tanh"))
    # the ridge on the gates costs next to nothing
    assert value == pytest.approx(float(at_truth.log_likelihood), abs=0.05)
    assert float(np.sum(result.mixing_weights)) == pytest.approx(1.0)
    assert not np.any(np.asarray(result.params.gating)[-1])
    assert np.ptp(np.asarray(result.params.noise_std)) == 0.0


@pytest.mark.slow
def test_without_the_polish_it_is_the_algorithm_as_published(problem):
    result = run("spectral_em", problem[1], noise="known", polish=False)
    np.testing.assert_allclose(result.params.noise_std, NOISE, rtol=1e-12)
    np.testing.assert_allclose(result.params.expert_bias, 0.0)
    np.testing.assert_array_equal(result.params.experts, result.spectral.experts)
    assert np.abs(result.params.gating).max() > 0.1


@pytest.mark.slow
def test_joint_em_keeps_the_best_of_its_starts_and_needs_no_moments(problem, at_truth):
    data = problem[1]._replace(transforms=None)
    result = run("joint_em", data, num_starts=4)
    assert result.spectral is None
    value = float(log_likelihood(result.params, data.x, data.y, "tanh"))
    assert float(at_truth.log_likelihood) - 20.0 < value <= float(at_truth.log_likelihood) + 0.5


def test_registry():
    assert {"spectral", "spectral_em", "joint_em"} <= set(method_names())
    assert [moments_of(name) for name in ("spectral", "multistart", "joint_em")] == [
        "required",
        "optional",
        "none",
    ]

    def mine(key, problem, config):
        raise NotImplementedError

    register_method("mine", mine, moments="none")
    assert get_method("mine") is mine
    with pytest.raises(ValueError, match=r"method: unknown name 'spectrl'; did you mean spectral"):
        get_method("spectrl")
    with pytest.raises(ValueError, match="identifier"):
        register_method("not a name", mine, moments="none")


@pytest.mark.parametrize(
    ("name", "num_samples", "method", "expected"),
    [
        ("tanh", 10_000, "multistart", (3, 4)),
        ("gelu", 10_000, "multistart", (4, 3)),
        ("relu", 300, "multistart", ()),
        ("relu", 300, "spectral_em", (3,)),
        ("relu", 300, "joint_em", ()),
        ("tanh", 10_000, "gated_losses", (4,)),
    ],
)
def test_fit_and_a_trial_decompose_the_same_tensors(name, num_samples, method, expected, monkeypatch):
    """A sweep's method of a name is the one that `fit` runs."""
    data = DataSettings(activation=name, dim=4, num_experts=2, num_samples=num_samples, noise_std=0.1)
    algorithm = AlgorithmSettings(method=method)
    assert static_spec(data, algorithm).orders == expected

    class AskedError(Exception):
        """Before anything is compiled."""

    def run(key, problem, method, config):
        raise AskedError(config, problem)

    monkeypatch.setattr("moejax.fitting.estimation.run_method", run)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_samples, 4))
    y = np.asarray(moejax.model.activations.get_activation(name)(x[:, 0])) + 0.1 * rng.normal(
        size=num_samples
    )
    with pytest.raises(AskedError) as caught:
        moejax.fit(
            jax.random.key(0),
            x,
            y,
            num_experts=2,
            activation=name,
            method=method,
            noise_std=0.1,
            standardise=False,
        )
    config, problem = caught.value.args
    assert ((config.order, *config.more_orders) if config.order else ()) == expected
    assert len(problem.more_transforms) == max(len(expected) - 1, 0)


def test_statuses_are_the_numbers_that_stores_hold():
    """Rows of earlier versions are read with the same words."""
    assert {status.name: int(status) for status in Status} == {
        "OK": 0,
        "RANK_DEFICIENT": 1,
        "TENSOR_NOT_CONVERGED": 2,
        "TENSOR_NOT_POSITIVE": 3,
        "NOT_FINITE": 4,
        "NOT_CONVERGED": 5,
    }
    assert len({status.words for status in Status}) == len(Status)
