"""Free columns: sums and derivatives are the parts of those with all columns, and steps leave the other coefficients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.derivatives import likelihood_curvature
from moejax.likelihood.em import joint_em
from moejax.likelihood.free_columns import (
    FreeColumns,
    compact,
    expanded,
    free_columns,
    free_positions,
    num_coefficients,
    with_offset,
)
from moejax.likelihood.information import observed_information, score_outer_products
from moejax.likelihood.polish import polish
from moejax.likelihood.predictors import free_parameters, num_free_parameters, params_from_free
from moejax.methods import moves
from moejax.methods.global_search import scaled_starts
from moejax.methods.method import MethodConfig, Problem
from moejax.model.families import channel_of
from moejax.model.family import Nuisances, as_family
from moejax.model.mixture import MoEParams

K, N = 3, 40
COLUMNS = free_columns(2, 1, expert_biases=False, gate_biases=True)
ALL = {"noise": "per_expert", "fit_intercept": True}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    experts, gating = rng.normal(size=(2, K, 3))
    gating[-1] = 0.0
    biases = np.append(rng.normal(size=K - 1), 0.0)
    params = MoEParams(experts, gating, np.array([0.5, 0.8, 1.0]), np.zeros(K), biases)
    params = jax.tree.map(jnp.asarray, params)
    x, y = jnp.asarray(rng.normal(size=(N, 3))), jnp.asarray(rng.normal(size=N))
    return expanded(compact(params, COLUMNS), COLUMNS), x, y, jnp.asarray(rng.uniform(0.5, 2.0, N))


def test_the_columns_of_experts_and_gates(problem):
    params = problem[0]
    assert FreeColumns(3, (0, 1), (2, 3)) == COLUMNS
    assert (COLUMNS.expert_inputs, COLUMNS.gate_inputs) == ((0, 1), (2,))
    assert (COLUMNS.has_expert_biases, COLUMNS.has_ones) == (False, True)
    assert num_coefficients(3, True, COLUMNS) == (2, 2)
    assert not np.asarray(params.experts)[:, 2].any()
    assert not np.asarray(params.gating)[:, :2].any()
    # two experts' and two gates' coefficients, a noise for each expert
    assert num_free_parameters(K, 3, "per_expert", True, columns=COLUMNS) == 2 * K + 2 * (K - 1) + K


def test_free_parameters_round_trip(problem):
    params = problem[0]
    free = free_parameters(params, columns=COLUMNS, **ALL)
    everything = free_parameters(params, **ALL)
    np.testing.assert_array_equal(free, everything[free_positions(K, K, K, COLUMNS)])
    again = params_from_free(free + 1.0, params, columns=COLUMNS, **ALL)
    np.testing.assert_allclose(free_parameters(again, columns=COLUMNS, **ALL), free + 1.0, rtol=1e-12)
    assert not np.asarray(again.experts)[:, 2].any()
    assert not np.asarray(again.expert_bias).any()


def test_derivatives_are_parts_of_those_of_all_columns(problem):
    params, x, y, weights = problem
    kept = free_positions(K, K, K, COLUMNS)

    @functools.partial(jax.jit, static_argnames="columns")
    def derivatives(columns):
        blocks = sample_blocks(x, y, weights, fit_intercept=True)
        options = ALL | {"columns": columns}
        return (
            likelihood_curvature(params, blocks, fn=jnp.tanh, ridge=0.3, **options),
            observed_information(params, x, y, weights, jnp.tanh, **options),
            score_outer_products(params, x, y, weights**2, jnp.tanh, **options),
        )

    some, everything = derivatives(COLUMNS), derivatives(None)
    for part, whole in zip(jax.tree.leaves(some), jax.tree.leaves(everything), strict=True):
        chosen = np.asarray(whole)
        for axis in range(chosen.ndim):
            chosen = chosen.take(kept, axis)
        np.testing.assert_allclose(part, chosen, rtol=1e-12, atol=1e-12)


def test_em_leaves_other_coefficients_and_climbs(problem):
    params, x, y, weights = problem
    start = params._replace(expert_bias=jnp.asarray([0.1, 0.2, 0.3]))

    @jax.jit
    def run(start):
        return joint_em(start, x, y, weights, fn=jnp.tanh, num_steps=20, columns=COLUMNS, **ALL)

    end = jax.device_get(run(start))
    history = end.history[np.isfinite(end.history)]
    assert np.all(np.diff(history) >= 0)
    assert history[-1] > history[0] + 1.0
    np.testing.assert_array_equal(end.params.expert_bias, start.expert_bias)
    assert not end.params.experts[:, 2].any()
    assert not end.params.gating[:, :2].any()
    assert np.all(end.params.experts[:, :2] != np.asarray(start.experts)[:, :2])


@pytest.mark.parametrize("num_gate_inputs", [0, 2])
def test_children_of_mixtures_with_other_numbers_of_inputs(problem, num_gate_inputs):
    del problem
    rng = np.random.default_rng(1)
    shapes = MoEParams((4, K, 3), (4, K, num_gate_inputs), (4, K), (4, K), (4, K))
    population = MoEParams(*(jnp.asarray(rng.uniform(0.5, 1.5, shape)) for shape in shapes))
    children = jax.jit(moves.children_of, static_argnums=2)(jax.random.key(0), population, 8)
    assert [leaf.shape for leaf in children] == [(8, *shape[1:]) for shape in shapes]
    assert all(np.isfinite(leaf).all() for leaf in children)
    assert not np.asarray(children.gating[:, -1]).any()


@pytest.mark.parametrize("columns", [COLUMNS, free_columns(3, 0, expert_biases=True, gate_biases=True)])
@pytest.mark.parametrize("family", ["poisson", "gaussian", "laplace"])
def test_every_start_has_the_coefficients_of_an_offset_and_steps_leave_them(columns, family, problem):
    _, x, y, weights = problem
    columns = with_offset(columns)
    x = jnp.concatenate([x, jnp.linspace(-2.0, 3.0, N)[:, None]], axis=1)
    y = jnp.abs(jnp.round(3 * y)) if family == "poisson" else y
    nuisances = None if family == "gaussian" else Nuisances(*map(jnp.asarray, (0.7, 0.2, 0.9)))
    fn = channel_of(family, "linear")
    how = {"fn": fn, "noise": "shared" if as_family(fn).has_dispersion else "known", "columns": columns}
    config = MethodConfig(num_experts=K, order=0, fit_intercept=True, **how)
    sample = Problem(x, y, weights, jnp.asarray(0.9), None, nuisances=nuisances)
    starts = scaled_starts(jax.random.key(0), sample, config, 4)
    children = expanded(moves.children_of(jax.random.key(1), compact(starts, columns), 8), columns)
    first = jax.tree.map(lambda leaf: leaf[0], starts)
    climbed = joint_em(first, x, y, weights, num_steps=5, fit_intercept=True, **how).params
    polished = polish(climbed, x, y, weights, num_steps=5, fit_intercept=True, **how).params

    for params in (starts, children, climbed, polished):
        assert np.all(np.asarray(params.experts[..., columns.offset]) == 1.0)
        assert not np.asarray(params.gating[..., columns.offset]).any()
    assert np.abs(polished.experts - first.experts).max() > 1e-3
