"""The experts of a fit in the order of their shares, whatever the seed and wherever the start had them."""

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.fitting.expert_order import curvature_in_order, order_of_experts, reordered
from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.derivatives import likelihood_curvature
from moejax.model.activations import get_activation


def test_shares_decide_and_then_the_first_coefficient():
    assert order_of_experts(np.array([1.0, 5.0, 3.0]), np.zeros(3)).tolist() == [1, 2, 0]
    # equal to rounding
    counts, first = np.array([2.0, 4.0, 4.0 + 1e-12, 4.0 - 1e-12]), np.array([0.0, 2.0, 1.0, 3.0])
    assert order_of_experts(counts, first).tolist() == [2, 1, 3, 0]
    assert order_of_experts(np.array([1.0, 1.0 + 1e-6]), np.array([0.0, 1.0]), 1e-5).tolist() == [0, 1]


def truth(order=(0, 1, 2)):
    rows = list(order)
    return compiled_model.make_params(
        jnp.asarray([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5], [-1.0, -1.0, 0.0]])[jnp.asarray(rows)],
        jnp.asarray([[0.0, 0.0, 1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])[jnp.asarray(rows)],
        0.2,
        jnp.asarray([0.0, 1.0, -1.0])[jnp.asarray(rows)],
        jnp.asarray([0.0, 0.7, 1.5])[jnp.asarray(rows)],
    )


def sample():
    x, y, _ = compiled_model.sample(jax.random.key(0), truth(), "linear", 900)
    return np.asarray(x), np.asarray(y)


def assert_same_table(one, other, rtol=1e-4):
    for name in one.params._fields:
        expected = getattr(one.params, name)
        scale = np.abs(expected).max() or 1.0
        np.testing.assert_allclose(getattr(other.params, name), expected, atol=rtol * scale, err_msg=name)
        errors = getattr(one.standard_errors, name)
        np.testing.assert_allclose(getattr(other.standard_errors, name), errors, rtol=0.01, atol=1e-12)
    for name in ("effective_samples", "mixing_weights"):
        np.testing.assert_allclose(other.diagnostics[name], one.diagnostics[name], rtol=1e-3)


@pytest.mark.slow
def test_seeds_permuted_starts_and_sources_print_the_same_table(monkeypatch):
    x, y = sample()
    options = {"num_experts": 3, "noise": "per_expert", "fit_intercept": True, "method": "multistart"}
    with jax.enable_x64(True):
        fits = [moejax.fit(jax.random.key(seed), x, y, num_starts=8, **options) for seed in (0, 1)]
        source = moejax.ArraySource(x, y)
        fits.append(moejax.fit(jax.random.key(2), source=source, num_starts=8, **options))
    shares = np.asarray(fits[0].diagnostics["effective_samples"])
    assert (np.diff(shares) < 0).all()
    assert (fits[0].params.gating[-1] == 0).all()
    assert fits[0].params.gating_bias[-1] == 0
    for other in fits[1:]:
        assert_same_table(fits[0], other)
    # the responsibilities of the table's experts have the table's shares
    with jax.enable_x64(True):
        posterior = compiled_model.responsibilities(fits[0].params, x, y, "linear")
    np.testing.assert_allclose(np.asarray(posterior).sum(axis=0), shares, rtol=1e-6)
    # the same method, its experts in another order
    from moejax.fitting import estimation

    run = estimation.run_method

    def turned(*arguments):
        result = run(*arguments)
        order = np.array([2, 0, 1])
        return result._replace(
            params=reordered(result.params, order), mixing_weights=result.mixing_weights[order]
        )

    monkeypatch.setattr(estimation, "run_method", turned)
    with jax.enable_x64(True):
        again = moejax.fit(jax.random.key(0), x, y, num_starts=8, **options)
    assert_same_table(fits[0], again, rtol=1e-8)


def test_the_curvature_of_reordered_experts_is_that_of_the_likelihood_there():
    x, y = sample()
    order = np.array([2, 0, 1])
    options = {"noise": "per_expert", "fit_intercept": True}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), truth())
        params = params._replace(noise_std=jnp.asarray([0.2, 0.3, 0.4]))
        data = (jnp.asarray(a, jnp.float64) for a in (x, y, np.ones(len(y))))
        blocks = sample_blocks(*data, fit_intercept=True)
        at = jax.jit(
            lambda params: likelihood_curvature(params, blocks, fn=get_activation("linear"), **options)
        )
        ours = curvature_in_order(at(params), params, order, **options)
        expected = at(reordered(params, order))
    for name in ("gradient", "observed", "complete"):
        wanted = np.asarray(getattr(expected, name))
        np.testing.assert_allclose(getattr(ours, name), wanted, atol=1e-10 * np.abs(wanted).max())
