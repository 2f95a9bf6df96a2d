"""Blocks of samples, sums over them, and the linear predictors of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import make_params
from moejax.design import (
    block_matrix,
    params_of,
    predictors_of,
    sample_blocks,
    sum_over_blocks,
    weighted_gram,
)
from moejax.model import expert_means, gate_logits

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("block_size", [7, 20, 50, None])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_sums_over_blocks(block_size, fit_intercept):
    n, num_used = 50, 33
    x, y = RNG.normal(size=(n, 4)), RNG.normal(size=n)
    weights = np.where(np.arange(n) < num_used, RNG.uniform(size=n), 0.0)
    arrays = (jnp.asarray(a) for a in (x, y, weights))
    blocks = sample_blocks(*arrays, fit_intercept=fit_intercept, block_size=block_size)
    visited = []

    def sums_of(design, y, weights):
        jax.debug.callback(lambda w: visited.append(float(w.sum())), weights)
        return {"gram": weighted_gram(design, weights[None])[0], "cross": design @ (weights * y)}

    sums = jax.jit(lambda blocks: sum_over_blocks(sums_of, blocks))(blocks)
    jax.effects_barrier()
    assert len(visited) == -(-num_used // (block_size or n))
    assert sum(visited) == pytest.approx(weights.sum())
    design = np.c_[x, np.ones(n)] if fit_intercept else x
    np.testing.assert_allclose(sums["gram"], design.T @ (weights[:, None] * design), atol=1e-12)
    np.testing.assert_allclose(sums["cross"], design.T @ (weights * y), atol=1e-12)


def test_blocks_without_weight_are_no_samples():
    blocks = sample_blocks(jnp.ones((9, 2)), jnp.ones(9), jnp.zeros(9), fit_intercept=False, block_size=4)
    assert int(blocks.num_used) == 0
    assert float(sum_over_blocks(lambda design, y, weights: y.sum(), blocks)) == 0.0


def test_weighted_gram_and_block_matrix():
    design, coefficients = RNG.normal(size=(4, 50)), RNG.normal(size=(3, 50))
    expected = np.einsum("pj,aj,bj->pab", coefficients, design, design)
    np.testing.assert_allclose(
        weighted_gram(jnp.asarray(design), jnp.asarray(coefficients)), expected, atol=1e-12
    )
    np.testing.assert_allclose(
        block_matrix(jnp.asarray(expected)),
        np.block([[expected[0], expected[1]], [expected[1], expected[2]]]),
        atol=1e-12,
    )


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_predictors_are_those_of_the_model_and_go_back(fit_intercept):
    params = make_params(
        *(jnp.asarray(RNG.normal(size=(3, 4))) for _ in range(2)),
        jnp.asarray([0.1, 0.2, 0.3]),
        *(jnp.asarray(RNG.normal(size=3)) for _ in range(2)),
    )
    x = jnp.asarray(RNG.normal(size=(6, 4)))
    predictors = predictors_of(params, fit_intercept=fit_intercept)
    design = (jnp.c_[x, jnp.ones(6)] if fit_intercept else x).T
    expected = np.concatenate([expert_means(params, x, "linear").T, gate_logits(params, x)[:, :-1].T])
    np.testing.assert_allclose(predictors(design), expected, atol=1e-12)
    back = params_of(predictors, params.noise_std, fit_intercept=fit_intercept)
    jax.tree.map(np.testing.assert_array_equal, back, params)
