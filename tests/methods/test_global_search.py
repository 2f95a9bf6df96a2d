"""The search for the global maximum, against brute force by many random starts, and its parts one by one."""

import dataclasses
import functools

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import log_likelihood_per_sample, make_params, regauge

import moejax
from moejax.likelihood.em import gating_em, joint_em
from moejax.methods import (
    MethodConfig,
    Problem,
    finalists,
    get_method,
    random_starts,
    search_plan,
    search_sample,
)
from moejax.methods import global_search as multistart
from moejax.methods.moves import NOISE_OF_CHILDREN, children_of
from moejax.methods.population import Mixtures, climb, distinct_optima, keep_best, repetitions
from moejax.model.mixture import MoEParams

pytestmark = pytest.mark.usefixtures("whole_search")
K, D, N = 3, 2, 240
CONFIG = MethodConfig(
    fn=moejax.model.activations.get_activation("linear"), num_experts=K, order=0, fit_intercept=True
)


# one program each, instead of one for every operation
compiled_starts = jax.jit(random_starts, static_argnums=(2, 3))
compiled_climb = jax.jit(climb, static_argnums=(2, 3))
compiled_children = jax.jit(children_of, static_argnums=2)
compiled_keep_best = jax.jit(keep_best, static_argnums=1)
compiled_ridges = jax.jit(multistart.ridges_of, static_argnums=(0, 1, 3))
compiled_ridge = jax.jit(search_sample.search_ridge, static_argnums=1)


@pytest.fixture(scope="module")
def problem():
    """Labels that no mixture of three linear experts made: many local maxima."""

    @jax.jit
    def draw(key):
        x_key, y_key = jax.random.split(key)
        x = jax.random.normal(x_key, (N, D))
        return x, jnp.sin(2.0 * x[:, 0]) + jnp.abs(x[:, 1]) + 0.2 * jax.random.normal(y_key, (N,))

    return Problem(*draw(jax.random.key(0)), jnp.asarray(np.ones(N)), jnp.asarray(0.3), None)


@pytest.fixture(scope="module")
def optima(problem):
    """(120,) log-likelihoods, with their ridge, where EM from random starts ends."""
    starts = compiled_starts(jax.random.key(1), problem, CONFIG, 120, np.std(problem.y))

    @jax.jit
    def climb(starts):
        def run(start):
            return joint_em(
                start, problem.x, problem.y, problem.weights, fn=CONFIG.fn, num_steps=400, fit_intercept=True
            ).history

        return jax.lax.map(run, starts)

    return np.nanmax(np.asarray(climb(starts)), axis=1)


@pytest.fixture(scope="module")
def searched(problem):
    """Results of two seeds."""
    run = jax.jit(get_method("multistart"), static_argnums=2)
    return [run(jax.random.key(seed), problem, CONFIG) for seed in range(2)]


@pytest.mark.slow
def test_a_noise_for_each_expert_reaches_the_best_of_many_random_starts(problem):
    """The search climbs with a noise for each expert: the optima with a shared one lie in other basins."""
    spread = np.where(np.asarray(problem.x)[:, 0] > 0, 0.05, 0.6)
    y = np.asarray(problem.y) + spread * np.random.default_rng(0).normal(size=N)
    given = problem._replace(y=jnp.asarray(y))
    config = dataclasses.replace(CONFIG, noise="per_expert")
    starts = compiled_starts(jax.random.key(1), given, config, 120, np.std(y))

    @jax.jit
    def climb_alone(starts):
        def run(start):
            options = {"fn": CONFIG.fn, "num_steps": 400, "fit_intercept": True, "noise": "per_expert"}
            end = joint_em(start, given.x, given.y, given.weights, **options)
            counts = moejax.model.mixture.responsibilities(end.params, given.x, given.y, CONFIG.fn).sum(
                axis=0
            )
            return end.log_likelihood, (counts > D + 2).all() & (end.params.noise_std > 1e-4).all()

        return jax.lax.map(run, starts)

    values, proper = map(np.asarray, climb_alone(starts))
    best = values[proper].max()
    assert np.median(values[proper]) < best - 2.0, "the problem is too easy to show anything"
    result = jax.jit(get_method("multistart"), static_argnums=2)(jax.random.key(0), given, config)
    assert np.nanmax(result.history) > best - 0.05
    assert int(result.status) == 0


@pytest.mark.slow
def test_reaches_the_best_of_many_random_starts(searched, optima):
    assert np.median(optima) < optima.max() - 2.0, "the problem is too easy to show anything"
    for result in searched:
        assert np.nanmax(result.history) > optima.max() - 0.05
        assert int(result.status) == 0


@pytest.mark.slow
def test_weights_of_zero_are_no_samples(problem):
    few = dataclasses.replace(CONFIG, num_starts=2, num_experts=2)
    run = jax.jit(get_method("multistart"), static_argnums=2)

    def padded(x, y):
        return Problem(
            np.concatenate([problem.x, np.full((N, D), x)]),
            np.concatenate([problem.y, np.full(N, y)]),
            np.concatenate([problem.weights, np.zeros(N)]),
            problem.noise_std,
            None,
        )

    plain, other = (run(jax.random.key(0), padded(*values), few) for values in ((0.0, 0.0), (np.nan, -50.0)))
    np.testing.assert_allclose(other.mixing_weights, plain.mixing_weights, atol=1e-3)
    np.testing.assert_allclose(np.nanmax(other.history), np.nanmax(plain.history), atol=1e-3)
    expected = compiled_model.log_likelihood(plain.params, problem.x, problem.y, CONFIG.fn)
    np.testing.assert_allclose(np.nanmax(plain.history), expected, atol=0.1)  # but for the ridge


def mixtures_with(values, profiles):
    """Those whose parameters are their number."""
    number = np.arange(len(values), dtype=float)
    return Mixtures(MoEParams(*(number for _ in MoEParams._fields)), np.asarray(values), np.asarray(profiles))


def test_keep_best_ranks_and_puts_repetitions_last():
    profiles = 100.0 + np.array([[0.0, 3.0], [0.0, 0.0], [0.0, 0.1], [2.0, 0.0], [9.0, 9.0]])
    mixtures = mixtures_with([1.0, 5.0, 4.0, 3.0, -np.inf], profiles)
    kept = compiled_keep_best(mixtures, 3, 0.0)
    np.testing.assert_array_equal(kept.params.experts, [1.0, 2.0, 3.0])
    kept = compiled_keep_best(mixtures, 5, 0.02)
    np.testing.assert_array_equal(kept.params.experts, [1.0, 3.0, 0.0, 4.0, 2.0])
    np.testing.assert_array_equal(kept.values, [5.0, 3.0, 1.0, -np.inf, -np.inf])
    np.testing.assert_array_equal(kept.profiles, profiles[[1, 3, 0, 4, 2]])
    beside = np.asarray([[100.0, 103.05], [100.0, 99.99]])
    kept = compiled_keep_best(mixtures, 2, 0.02, beside=beside)
    np.testing.assert_array_equal(kept.params.experts, [3.0, 4.0])


def test_a_row_near_a_repetition_alone_is_no_repetition():
    profiles = np.random.default_rng(0).normal(size=(60, 4))
    repeated = np.zeros(60, bool)
    for row in range(1, 60):
        others = profiles[:row][~repeated[:row]]
        repeated[row] = (((others - profiles[row]) ** 2).sum(axis=1) < 2.0).any()
    assert 5 < repeated.sum() < 55
    np.testing.assert_array_equal(jax.jit(repetitions)(profiles, 2.0), repeated)


def test_two_orders_of_the_same_experts_are_one_mixture(problem):
    starts = compiled_starts(jax.random.key(3), problem, CONFIG, 2, np.std(problem.y))
    both = jax.tree.map(lambda leaf: np.concatenate([leaf, np.asarray(leaf)[:, ::-1]]), starts)
    climbed = compiled_climb(both, problem, CONFIG, 3, compiled_ridge(problem, CONFIG))
    np.testing.assert_array_equal(jax.jit(repetitions)(climbed.profiles, 1e-6), [False, False, True, True])
    expected = compiled_model.log_likelihood(
        jax.tree.map(lambda leaf: np.asarray(leaf)[1], climbed.params), problem.x, problem.y, CONFIG.fn
    )
    np.testing.assert_allclose(
        np.asarray(climbed.profiles)[1].sum(), expected, rtol=1e-12
    )  # the weights are 1


def test_the_ridge_goes_down_to_that_of_the_fit(problem):
    n = float(problem.weights.sum())
    ridges = np.asarray(compiled_ridges(10, 4, problem, dataclasses.replace(CONFIG, ridge=1e-7 * n)))
    np.testing.assert_allclose(ridges[:6], search_sample.SEARCH_RIDGE * n)
    np.testing.assert_allclose(ridges[6:] / ridges[5:9], 10.0**-0.25)
    np.testing.assert_allclose(ridges[-1], 1e-7 * n)
    strong = compiled_ridges(5, 4, problem, dataclasses.replace(CONFIG, ridge=2.0 * n))
    np.testing.assert_allclose(strong, 2.0 * n)
    none = np.asarray(compiled_ridges(5, 4, problem, dataclasses.replace(CONFIG, ridge=0.0)))
    np.testing.assert_allclose(none[-1], multistart.SMALLEST_RIDGE * n)


@pytest.mark.slow
@pytest.mark.parametrize("num_starts", [search_plan.FEWEST_FOR_CHILDREN, 48])
def test_the_best_child_is_kept_however_few_the_starts(problem, monkeypatch, num_starts):
    mark, make = 7.0, children_of

    def marked(*arguments):
        children = make(*arguments)
        return children._replace(noise_std=jnp.full_like(children.noise_std, mark))

    def scored(starts, *_, **__):
        dtype = starts.noise_std.dtype
        born = (starts.noise_std.reshape(starts.noise_std.shape[0], -1) == mark).all(axis=1)
        number = jnp.arange(born.size).astype(dtype)
        profiles = jnp.broadcast_to(10.0 * number[:, None], (born.size, N))
        return Mixtures(starts, jnp.where(born, 1.0, -1.0 - number), profiles)

    monkeypatch.setattr(multistart, "children_of", marked)
    monkeypatch.setattr(multistart, "climb", scored)
    config = dataclasses.replace(CONFIG, num_starts=num_starts, max_iterations=1)
    result = get_method("multistart")(jax.random.key(0), problem, config)
    assert float(result.optima[0]) == 1.0


def population_of(*mixtures):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *mixtures)


@pytest.mark.slow
def test_children_differ_from_their_parent_in_at_most_two_experts():
    draws = np.asarray(jax.random.normal(jax.random.key(0), (4, 5, 3)))
    parents = [regauge(make_params(draws[i], draws[i + 2], 0.1, draws[i, :, 0])) for i in (0, 1)]
    children = compiled_children(jax.random.key(1), population_of(*parents), 200)
    np.testing.assert_array_equal(np.asarray(children.gating)[:, -1], 0.0)
    np.testing.assert_allclose(children.noise_std, 0.1 * NOISE_OF_CHILDREN)
    experts, taken = np.asarray(children.experts), 0
    for mine, other in ((0, 1), (1, 0)):  # parents take turns
        theirs = experts[mine::2]
        changed = np.any(theirs != np.asarray(parents[mine].experts), axis=2).sum(axis=1)
        assert set(changed.tolist()) == {1, 2}
        taken += (theirs[:, :, None] == np.asarray(parents[other].experts)).all(axis=3).any(axis=(1, 2)).sum()
    assert 0.2 < taken / 200 < 0.5


@pytest.mark.slow
def test_split_halves_keep_the_mean_of_their_parent():
    parent = make_params(np.eye(3), np.eye(3), 0.1)
    experts = np.asarray(compiled_children(jax.random.key(2), population_of(parent), 60).experts)
    two = np.any(experts != np.eye(3), axis=2).sum(axis=1) == 2
    assert two.sum() > 5
    for child in experts[two]:
        moved = np.any(child != np.eye(3), axis=1)
        mean = child[moved].mean(axis=0)
        assert np.abs(np.eye(3) - mean).max(axis=1).min() < 1e-12  # one of the parent's experts


def test_large_samples_are_searched_by_a_random_part():
    n = search_plan.SEARCH_SAMPLES + 1000
    x = np.arange(n, dtype=float)[:, None]
    weights = (np.arange(n) % 2).astype(float)
    sample = jax.jit(search_sample.search_sample, static_argnums=2)
    small = sample(
        jax.random.key(0), Problem(x, x[:, 0], weights, np.asarray(1.0), None), search_plan.SEARCH_SAMPLES
    )
    assert small.x.shape == (search_plan.SEARCH_SAMPLES, 1)
    assert len(np.unique(small.x)) == search_plan.SEARCH_SAMPLES
    np.testing.assert_array_equal(np.asarray(small.x)[:, 0], small.y)
    assert float(small.weights.sum()) == float(weights.sum())  # all that count fit in


def test_only_what_may_still_win_contends(problem):
    """Against the difference's standard error in NumPy."""
    best = jax.device_get(make_params(np.eye(2), np.zeros((2, D)), 0.5))
    rivals = [best._replace(experts=best.experts + shift) for shift in (0.0, 0.01, 0.1, 0.3, 1.0)]
    behind = np.stack(
        [
            np.asarray(
                log_likelihood_per_sample(best, problem.x, problem.y, CONFIG.fn)
                - log_likelihood_per_sample(rival, problem.x, problem.y, CONFIG.fn)
            )
            for rival in rivals
        ]
    )
    lost = behind.sum(axis=1) > finalists.RULED_OUT * behind.std(axis=1) * N**0.5
    assert lost.any()
    assert not lost.all()
    got = jax.jit(finalists.contenders, static_argnums=2)(population_of(*rivals), problem, CONFIG.fn)
    np.testing.assert_array_equal(got, ~lost)


@pytest.mark.slow
def test_what_is_ruled_out_is_not_polished(problem, monkeypatch):
    """The search sees half of the data."""
    monkeypatch.setattr(search_plan, "SEARCH_SAMPLES", N // 2)
    monkeypatch.setattr(search_plan, "GENERATIONS_OF_CHILDREN", 10)
    results = {}
    for limit in (0.0, np.inf):
        monkeypatch.setattr(finalists, "RULED_OUT", limit)
        # of its own: traced anew
        results[limit] = jax.jit(lambda key: get_method("multistart")(key, problem, CONFIG))(
            jax.random.key(0)
        )
    one, three = results[0.0], results[np.inf]
    assert int(one.num_iterations) < int(three.num_iterations)
    np.testing.assert_array_equal(one.optima, three.optima)
    assert np.nanmax(one.history) <= np.nanmax(three.history) + 1e-6


# ---- gradient descent


@pytest.mark.slow
def test_runs_of_gradient_descent_that_disagree_do_not_settle_a_search(searched):
    """Labels that no mixture made."""
    for result in searched:
        assert not result.search.settled
        assert not result.search.by_descent
        ends = np.asarray(result.finalists.log_likelihoods)[: search_plan.NUM_DESCENTS]
        assert np.isfinite(ends).sum() > 1  # they were made, and ended at several optima


# ---- independent starts


def test_distinct_optima_are_counted_and_the_unseen_expected():
    """Twelve ends: five at the best, six at another, one alone. w = 3, N = 12: 3 x 4 / (12 x 11)."""
    where = np.repeat([0.0, 10.0, 50.0], [5, 6, 1])
    profiles = where[:, None] + 0.1 * np.random.default_rng(0).normal(size=(12, 2))
    values = np.repeat([7.0, 3.0, -np.inf], [5, 6, 1]) + 1e-3 * np.arange(12)
    order = np.random.default_rng(1).permutation(12)
    optima = jax.jit(distinct_optima)(mixtures_with(values[order], profiles[order]), 1.0)
    assert (int(optima.num_distinct), int(optima.num_best)) == (3, 5)
    np.testing.assert_allclose(optima.unseen, 12 / 132)


def test_the_expected_share_of_unseen_optima_is_that_of_boender_and_rinnooy_kan():
    """Monte Carlo of their model: any number of basins up to 400 and any division of the starts equally likely beforehand."""
    generator = np.random.default_rng(0)
    num_starts, shares = 6, {}
    for _ in range(60_000):
        number = generator.integers(1, 400)
        division = generator.dirichlet(np.ones(number))
        seen = np.unique(generator.choice(number, num_starts, p=division))
        shares.setdefault(len(seen), []).append(1.0 - division[seen].sum())
    for count in (1, 2, 3):
        found = np.array(shares[count])
        expected = count * (count + 1) / (num_starts * (num_starts - 1))
        assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5, count


def planted(seed, num_samples=1500, fn="linear"):
    truth = make_params(np.eye(6)[:3], 2.0 * np.eye(6)[3:], 0.2)
    x, y, _ = compiled_model.sample(jax.random.key(seed), truth, fn, num_samples)
    return np.asarray(x), np.asarray(y)


@pytest.mark.slow
def test_labels_that_the_model_made_settle_the_search(monkeypatch):
    """The result is that of the whole search, and the programs of the generations are never compiled."""
    made = []

    def counted(search, **options):
        made.append(search)
        return generations(search, **options)

    generations = multistart.generations
    monkeypatch.setattr(multistart, "generations", counted)
    monkeypatch.setattr(search_plan, "GENERATIONS_OF_CHILDREN", 3)
    x, y = planted(0)
    early = moejax.fit(jax.random.key(0), x, y, num_experts=3)
    assert made == []
    count = search_plan.INDEPENDENT_ROWS // len(y)
    assert early.diagnostics["num_starts"] == count == 21
    assert early.diagnostics["search_end"].startswith("its 21 independent starts reached one optimum")
    assert early.diagnostics["num_passes"] < 100 * count
    monkeypatch.setattr(multistart, "LARGEST_UNSEEN", -1.0)
    jax.clear_caches()
    whole = moejax.fit(jax.random.key(0), x, y, num_experts=3)
    jax.clear_caches()
    assert len(made) == 1
    assert whole.diagnostics["search_end"] == "all its generations were made"
    assert whole.diagnostics["num_starts"] == 48 + 48 * (5 + 3)  # 256 random starts need five generations
    np.testing.assert_allclose(early.log_likelihood, whole.log_likelihood, atol=1e-3)


@pytest.mark.slow
def test_more_starts_climb_where_the_first_do_not_suffice(monkeypatch):
    """One optimum leaves 2 / (21 x 20) of all starts unseen with the first 21 starts; two leave 6 / (47 x 46) with 47."""
    monkeypatch.setattr(multistart, "LARGEST_UNSEEN", 0.003)
    x, y = planted(0)
    given = Problem(jnp.asarray(x), jnp.asarray(y), jnp.asarray(np.ones(len(y))), jnp.asarray(0.2), None)
    config = dataclasses.replace(CONFIG, fit_intercept=False)
    plan = search_plan.plan_of(given, config)
    jax.clear_caches()
    search = multistart.independent_starts(jax.random.key(0), given, config=config, plan=plan)
    assert not search.settled
    assert search.more_may_suffice
    search = multistart.more_independent_starts(search, config=config, plan=plan)
    jax.clear_caches()
    assert search.settled
    assert int(search.num_starts) == 47
    distinct = int(search.optima.num_distinct)
    assert distinct in (1, 2)
    np.testing.assert_allclose(search.optima.unseen, distinct * (distinct + 1) / (47 * 46), rtol=1e-6)


@pytest.mark.slow
def test_many_optima_do_not_settle_the_search(searched):
    result = searched[0]
    assert not result.search.settled
    assert int(result.search.num_distinct) > 2


@pytest.mark.slow
def test_a_traced_search_is_the_staged_one(monkeypatch):
    """The same optimum, for labels that the model made."""
    monkeypatch.setattr(search_plan, "GENERATIONS_OF_CHILDREN", 0)
    x, y = planted(1, 400)
    given = Problem(jnp.asarray(x), jnp.asarray(y), jnp.asarray(np.ones(len(y))), jnp.asarray(0.2), None)
    config = dataclasses.replace(CONFIG, fit_intercept=False, num_starts=48)
    staged = get_method("multistart")(jax.random.key(0), given, config)
    traced = jax.jit(get_method("multistart"), static_argnums=2)(jax.random.key(0), given, config)
    np.testing.assert_allclose(np.nanmax(staged.history), np.nanmax(traced.history), atol=1e-6)
    assert [int(leaf) for leaf in staged.search[:4]] == [int(leaf) for leaf in traced.search[:4]]
    assert int(staged.num_iterations) == int(traced.num_iterations)


def test_held_experts_climb_as_gating_em_does(problem):
    starts = compiled_starts(jax.random.key(4), problem, CONFIG, 2, np.std(problem.y))
    starts = jax.device_get(starts)
    held = compiled_climb(starts, problem, CONFIG, 10, 1e-3, np.asarray([True, False]))
    held = jax.device_get(held)
    with_experts_fixed = functools.partial(
        gating_em, fn=CONFIG.fn, num_steps=10, fit_intercept=True, noise="shared", ridge=1e-3
    )
    alone = jax.jit(with_experts_fixed)(
        jax.tree.map(lambda leaf: leaf[0], starts), problem.x, problem.y, problem.weights
    )
    np.testing.assert_array_equal(held.params.experts[0], starts.experts[0])
    assert not np.allclose(held.params.experts[1], starts.experts[1])
    np.testing.assert_allclose(held.params.gating[0], alone.params.gating, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(held.values[0], alone.log_likelihood, rtol=1e-9)


def test_the_search_keeps_the_precision_of_a_function_that_has_only_one(problem):
    double = np.asarray([0.5])
    assert search_sample.in_single_precision(problem, CONFIG.fn).x.dtype == jnp.float32
    kept = search_sample.in_single_precision(problem, lambda t: t.astype(jnp.float64) * double[0])
    assert kept.x.dtype == jnp.float64


def test_labels_beyond_single_precision_are_cut(problem):
    huge = problem._replace(y=jnp.asarray(np.append(1e200, np.asarray(problem.y)[1:])))
    single = search_sample.in_single_precision(huge, CONFIG.fn)
    assert np.isfinite(np.sum(np.asarray(single.y) ** 2))
