"""Blocks of samples, sums over them, what has no weight, and the linear predictors of a mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import log_likelihood, make_params, sample

from moejax.likelihood.blocks import sample_blocks, sum_over_blocks
from moejax.likelihood.derivatives import likelihood_curvature
from moejax.likelihood.em import expectation
from moejax.likelihood.m_step import Point
from moejax.likelihood.predictors import block_matrix, params_of, predictors_of, weighted_gram
from moejax.model.activations import activation_facts
from moejax.model.mixture import expert_means, gate_logits, with_stand_ins

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("block_size", [7, 20, 50, None])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_sums_over_blocks(block_size, fit_intercept):
    n, num_used = 50, 33
    x, y = RNG.normal(size=(n, 4)), RNG.normal(size=n)
    weights = np.where(np.arange(n) < num_used, RNG.uniform(size=n), 0.0)
    visited = []

    def sums_of(design, y, weights):
        jax.debug.callback(lambda w: visited.append(float(w.sum())), weights)
        return {"gram": weighted_gram(design, weights[None])[0], "cross": design @ (weights * y)}

    @jax.jit
    def sums_of_sample(x, y, weights):
        blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept, block_size=block_size)
        return sum_over_blocks(sums_of, blocks)

    sums = sums_of_sample(x, y, weights)
    jax.effects_barrier()
    assert len(visited) == -(-num_used // (block_size or n))
    assert sum(visited) == pytest.approx(weights.sum())
    design = np.c_[x, np.ones(n)] if fit_intercept else x
    np.testing.assert_allclose(sums["gram"], design.T @ (weights[:, None] * design), atol=1e-12)
    np.testing.assert_allclose(sums["cross"], design.T @ (weights * y), atol=1e-12)


def test_blocks_without_weight_are_no_samples():
    @jax.jit
    def count_and_sum(x, y, weights):
        blocks = sample_blocks(x, y, weights, fit_intercept=False, block_size=4)
        return blocks.num_used, sum_over_blocks(lambda design, y, weights: y.sum(), blocks)

    num_used, total = count_and_sum(np.ones((9, 2)), np.ones(9), np.zeros(9))
    assert int(num_used) == 0
    assert float(total) == 0.0


def test_rows_without_weight_become_a_row_that_has_some():
    x, weights = RNG.normal(size=(5, 2)), np.array([0.0, 0.0, 2.0, 0.0, 1.0])
    x[[0, 1, 3]] = np.nan
    compiled = jax.jit(with_stand_ins)
    for fill in (functools.partial(with_stand_ins, xp=np), compiled):
        filled, y = fill(weights, x, np.arange(5.0))
        np.testing.assert_array_equal(filled, x[[2, 2, 2, 2, 4]])
        np.testing.assert_array_equal(y, [2.0, 2.0, 2.0, 2.0, 4.0])
    nothing, _ = compiled(np.zeros(5), x, np.arange(5.0))
    np.testing.assert_array_equal(nothing, 0.0)


CUSPED = {
    "cube root": jnp.cbrt,
    "root": lambda t: jnp.sign(t) * jnp.sqrt(jnp.abs(t)),
    "t log|t|": lambda t: jax.scipy.special.xlogy(t, jnp.abs(t)),
    "|t|^1.5": lambda t: jnp.abs(t) ** 1.5,
}


@pytest.mark.parametrize("name", CUSPED)
def test_sums_of_a_g_with_infinite_derivatives_at_zero_see_no_row_without_weight(name):
    fn, n, unused = CUSPED[name], 50, 14
    params = make_params(np.eye(2, 3), np.asarray([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]), 0.1)
    x, y, _ = sample(jax.random.key(0), params, fn, n)
    width = jnp.asarray(1e-3) if activation_facts(fn).kinked else None

    @jax.jit
    def sums(x, y, weights):
        blocks = sample_blocks(x, y, weights, fit_intercept=False, block_size=24)
        point = Point(predictors_of(params, fit_intercept=False), params.noise_std)
        slope = jax.grad(log_likelihood)(params, x, y, fn, weights)
        return (
            expectation(point, blocks, fn=fn, experts_free=True),
            likelihood_curvature(params, blocks, fn=fn, noise="shared", fit_intercept=False, width=width),
            slope,
        )

    expected = sums(x, y, np.ones(n))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    weights = np.pad(np.ones(n), (unused // 2, unused - unused // 2))
    for value in (0.0, 1e30, np.nan):
        padded = (
            np.pad(a, [(unused // 2, unused - unused // 2)] + [(0, 0)] * (a.ndim - 1), constant_values=value)
            for a in (x, y)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9),
            sums(*padded, weights),
            expected,
        )


def test_a_sample_at_a_cusp_has_no_slope_and_spoils_no_sum():
    """Without intercepts an input of zeros is at g's cusp whatever the experts are."""
    params = make_params(np.eye(2, 3), np.zeros((2, 3)), 0.1)
    x, y, _ = sample(jax.random.key(1), params, jnp.cbrt, 30)
    x = jnp.asarray(np.where(np.arange(30)[:, None] == 7, 0.0, x))

    @jax.jit
    def at(weights):
        blocks = sample_blocks(x, y, weights, fit_intercept=False)
        point = Point(predictors_of(params, fit_intercept=False), params.noise_std)
        return expectation(point, blocks, fn=jnp.cbrt, experts_free=True)

    whole, rest = at(np.ones(30)), at((np.arange(30) != 7).astype(float))
    np.testing.assert_allclose(whole.expert_information, rest.expert_information, rtol=1e-12)
    np.testing.assert_allclose(whole.expert_gradient, rest.expert_gradient, rtol=1e-12)
    assert float(whole.log_likelihood) != pytest.approx(float(rest.log_likelihood))
    slope = jax.jit(lambda params: jax.grad(log_likelihood)(params, x, y, jnp.cbrt))(params)
    assert np.isfinite(slope.experts).all()


def test_weighted_gram_and_block_matrix():
    design, coefficients = RNG.normal(size=(4, 50)), RNG.normal(size=(3, 50))
    expected = np.einsum("pj,aj,bj->pab", coefficients, design, design)
    np.testing.assert_allclose(jax.jit(weighted_gram)(design, coefficients), expected, atol=1e-12)
    np.testing.assert_allclose(
        jax.jit(block_matrix)(expected),
        np.block([[expected[0], expected[1]], [expected[1], expected[2]]]),
        atol=1e-12,
    )


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_predictors_are_those_of_the_model_and_go_back(fit_intercept):
    params = make_params(
        *(RNG.normal(size=(3, 4)) for _ in range(2)),
        np.asarray([0.1, 0.2, 0.3]),
        *(RNG.normal(size=3) for _ in range(2)),
    )
    x = RNG.normal(size=(6, 4))
    design = (np.c_[x, np.ones(6)] if fit_intercept else x).T

    @jax.jit
    def there_and_back(params, design):
        predictors = predictors_of(params, fit_intercept=fit_intercept)
        return predictors(design), params_of(predictors, params.noise_std, fit_intercept=fit_intercept)

    @jax.jit
    def of_the_model(params, x):
        return jnp.concatenate([expert_means(params, x, "linear").T, gate_logits(params, x)[:, :-1].T])

    found, back = there_and_back(params, design)
    np.testing.assert_allclose(found, of_the_model(params, x), atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, back, params)
