"""Growths: a planted blend is found, threads and the number of experts change no program, fixed ridges stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from compiled_model import compilations

from moejax.likelihood.padded import Ridge, mean_of, params_of_padded
from moejax.methods import MethodConfig, Problem, get_method, mean_search, splits
from moejax.methods.growth import GrowthRules
from moejax.model.activations import get_activation

LINEAR = get_activation("linear")
N, D, NOISE = 250, 2, 0.1
RNG = np.random.default_rng(3)
X = RNG.normal(size=(N, D))
SLOPES = np.array([[1.5, 0.0, 0.5], [-1.0, 1.0, 0.0], [0.0, -1.5, 1.0]])
GATES = np.array([[3.0, 0.0, 0.0], [-1.5, 2.5, 0.0], [-1.5, -2.5, 0.0]])


def blend(x):
    design = np.column_stack([x, np.ones(len(x))])
    return np.sum(scipy.special.softmax(design @ GATES.T, axis=1) * (design @ SLOPES.T), axis=1)


Y = blend(X) + NOISE * RNG.normal(size=N)
PROBLEM = Problem(jnp.asarray(X), jnp.asarray(Y), jnp.ones(N), jnp.asarray(NOISE), None)
CONFIG = MethodConfig(fn=LINEAR, num_experts=1, order=0, fit_intercept=True)
KEYS = jax.random.split(jax.random.key(0), 3)


def grown(rules, keys=KEYS[:2], objective="mean", places=4):
    request = mean_search.Request(objective, keys, rules)
    return mean_search.growths_of(jax.random.key(9), [request], PROBLEM, config=CONFIG, places=places)[0]


@pytest.fixture(scope="module")
def growths():
    return grown(GrowthRules(4, np.inf, None))


def test_a_planted_blend_of_three_experts_is_found(growths):
    best = int(np.argmax(growths.score[:, 2]))
    rows, variance = (jnp.asarray(a[best, 2], jnp.float64) for a in (growths.rows, growths.variance))
    ridge = Ridge(*(jnp.asarray(a[best, 2], jnp.float64) for a in growths.ridge))
    end = mean_search.refined(rows, 3, variance, ridge, PROBLEM, config=CONFIG, fixed_ridge=False)
    new = np.random.default_rng(5).normal(size=(2000, D))
    params = jax.device_get(params_of_padded(end.rows, end.variance, 3, fit_intercept=True))
    gates = scipy.special.softmax(new @ params.gating.T + params.gating_bias, axis=1)
    f = np.sum(gates * (new @ params.experts.T + params.expert_bias), axis=1)
    # 15 coefficients for 250 rows: a root mean square error of a quarter of the noise at the rows
    assert np.sqrt(np.mean((f - blend(new)) ** 2)) < 0.5 * NOISE
    assert np.sqrt(np.mean(np.asarray(end.squares) / N)) == pytest.approx(NOISE, rel=0.1)
    assert float(end.variance) ** 0.5 == pytest.approx(NOISE, rel=0.1)
    assert 9 < float(end.effective) < 15.5
    assert bool(end.converged)
    # three are better than two, and a fourth is not needed
    two, three, four = (growths.score[:, k - 1].max() for k in (2, 3, 4))
    assert two < three - 10
    assert four < three + 5
    # all rows were used, in the single precision of the growth: it ends near the optimum
    assert float(end.log_likelihood) == pytest.approx(float(growths.log_likelihood[best, 2]), abs=3.0)


def test_neither_threads_nor_the_requests_beside_it_change_a_growth(growths, monkeypatch):
    monkeypatch.setattr(mean_search, "THREADS", 1)
    rules = GrowthRules(4, np.inf, None)
    alone = grown(rules)
    requests = [mean_search.Request("mean", KEYS[:1], rules), mean_search.Request("mean", KEYS[1:3], rules)]
    apart = mean_search.growths_of(jax.random.key(9), requests, PROBLEM, config=CONFIG, places=4)
    for name in ("rows", "score", "log_likelihood", "variance", "effective"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(growths, name))
        np.testing.assert_array_equal(getattr(apart[0], name)[0], getattr(growths, name)[0])
        np.testing.assert_array_equal(getattr(apart[1], name)[0], getattr(growths, name)[1])


def test_one_program_serves_every_number_of_experts(growths):
    end = (
        jnp.asarray(growths.rows[0, 1], jnp.float64),
        jnp.asarray(0.1),
        Ridge(*map(jnp.asarray, (1.0, 0.1))),
    )

    def refine(k):
        return mean_search.refined(end[0], k, *end[1:], PROBLEM, config=CONFIG, fixed_ridge=False)

    refine(2)
    with compilations() as events:
        fewer = [grown(GrowthRules(k, np.inf, None)) for k in (2, 3)]
        for k in (1, 3, 4):
            refine(k)
    assert events == []
    for k, few in zip((2, 3), fewer, strict=True):
        np.testing.assert_array_equal(few.score[:, :k], growths.score[:, :k])
        assert np.all(few.score[:, k:] == -np.inf)


def test_large_numbers_have_no_score_if_the_data_would_determine_too_much(growths):
    share = 8.0 / N
    limited = grown(GrowthRules(4, share, None))
    allowed = growths.effective <= share * N
    assert np.all(limited.score[:, 0] == growths.score[:, 0])  # one expert always has one
    assert np.all(np.isfinite(limited.score[:, 1:]) == allowed[:, 1:])
    assert not allowed[:, 2].any()


@pytest.mark.slow
def test_fixed_ridges_stay():
    found = grown(GrowthRules(2, np.inf, Ridge(*(jnp.full((), 0.5),) * 2)), KEYS[:1], places=2)
    np.testing.assert_array_equal(found.ridge.experts, 0.5)
    np.testing.assert_array_equal(found.ridge.gates, 0.5)
    assert np.isfinite(found.score).all()


@pytest.mark.slow
def test_the_traced_method_is_as_good_as_the_growths_of_a_fit(growths):
    config = MethodConfig(fn=LINEAR, num_experts=3, order=0, fit_intercept=True, num_starts=2)
    result = jax.jit(get_method("mean_fit"), static_argnums=2)(jax.random.key(0), PROBLEM, config)
    assert int(result.status) == 0
    assert float(result.history[-1]) == pytest.approx(growths.log_likelihood[:, 2].max(), abs=3.0)
    assert np.ptp(np.asarray(result.params.noise_std)) == 0.0
    np.testing.assert_allclose(np.sum(np.asarray(result.mixing_weights)), 1.0)


ROWS = np.zeros((8, D + 1))
ROWS[0] = [0.3, -0.2, 0.1]


@pytest.fixture(scope="module")
def divisions():
    design, active = jnp.asarray(np.column_stack([X, np.ones(N)]).T), jnp.arange(4) < 1

    @jax.jit
    def run(rows, key):
        made = splits.divided(
            rows,
            key,
            active,
            jnp.asarray(0.3),
            Ridge(jnp.asarray(0.1), jnp.asarray(0.1)),
            (design, PROBLEM.y, PROBLEM.weights),
            fn=LINEAR,
            objective="mean",
            fit_intercept=True,
            count=3,
        )
        values = jax.vmap(lambda rows: mean_of(rows, jnp.arange(4) < 2, design, LINEAR))(made)
        centred = splits.centred_gates(made, jnp.arange(4) < 2)
        same = jax.vmap(lambda rows: mean_of(rows, jnp.arange(4) < 2, design, LINEAR))(centred)
        return made, values, centred, same

    return run(jnp.asarray(ROWS), jax.random.key(1))


def test_the_halves_of_a_split_are_the_best_lines_for_their_shares(divisions):
    made, values, centred, same = map(np.asarray, divisions)
    design = np.column_stack([X, np.ones(N)])
    for rows, f in zip(made, values, strict=True):
        share = scipy.special.expit(design @ (rows[4] - rows[5]))
        basis = np.concatenate([share[:, None] * design, (1 - share)[:, None] * design], axis=1)
        gram = basis.T @ basis / 0.3 + (0.1 + splits.LEAST_PRECISION) * np.eye(2 * (D + 1))
        np.testing.assert_allclose(rows[:2].ravel(), np.linalg.solve(gram, basis.T @ Y / 0.3), rtol=1e-6)
        np.testing.assert_allclose(f, basis @ rows[:2].ravel(), atol=1e-9)
        assert np.sum((Y - f) ** 2) < np.sum((Y - design @ np.linalg.lstsq(design, Y, rcond=None)[0]) ** 2)
        assert not rows[[2, 3, 6, 7]].any()
    # gates less their mean make the same function
    np.testing.assert_allclose(same, values, atol=1e-10)
    np.testing.assert_allclose(centred[:, 4:].sum(axis=1), 0.0, atol=1e-12)


def test_lines_that_are_turned_apart_have_one_gate():
    rows = np.zeros((8, D + 1))
    rows[:2], rows[4:6] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[2.0, 0.0, 1.0], [-2.0, 0.0, -1.0]]
    turned = np.asarray(
        jax.jit(splits.turned_apart, static_argnums=4)(
            jnp.asarray(rows), jax.random.key(0), jnp.asarray(2, jnp.int32), jnp.asarray(0.01), 5
        )
    )
    for made in turned:
        parent = int(np.argmin([np.abs(made[6] - rows[4 + i]).max() for i in range(2)]))
        np.testing.assert_array_equal(made[6], rows[4 + parent])
        np.testing.assert_array_equal(made[4:6], rows[4:6])
        np.testing.assert_allclose(made[parent] + made[2], 2 * rows[parent], atol=1e-12)
        assert 0 < np.abs(made[2] - rows[parent]).max() < 0.6
