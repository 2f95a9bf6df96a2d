"""Gradient descent in the search, where EM from independent starts does not settle it."""

import compiled_model
import jax
import jax.numpy as jnp
import pytest
from compiled_model import make_params

import moejax
from moejax.likelihood.em import joint_em

pytestmark = pytest.mark.usefixtures("whole_search")
compiled_joint_em = jax.jit(
    lambda start, x, y: (
        joint_em(
            start, x, y, jnp.ones_like(y), fn=moejax.model.activations.get_activation("tanh"), num_steps=500
        ).log_likelihood
    )
)


def planted_tanh(seed, num_experts=4, dim=25, num_samples=1250):
    experts = jnp.eye(dim)[:num_experts]
    gating = jnp.eye(dim)[num_experts : 2 * num_experts].at[-1].set(0.0)
    truth = make_params(experts, gating, 0.1)
    return truth, *compiled_model.sample(jax.random.key(seed), truth, "tanh", num_samples)[:2]


@pytest.mark.slow
def test_gradient_descent_settles_what_em_does_not():
    """Four tanh experts, 50 samples for each dimension: EM from most random starts ends below the optimum of the truth."""
    truth, x, y = planted_tanh(0)
    result = moejax.fit(jax.random.key(1), x, y, num_experts=4, activation="tanh")
    assert "runs of gradient descent" in result.diagnostics["search_end"]
    start = truth._replace(noise_std=jnp.full(4, 0.1))
    from_truth = compiled_joint_em(start, x, y)
    assert result.log_likelihood >= float(from_truth) - 0.05
    assert result.diagnostics["num_starts"] < 60
