"""The baselines: losses against dense tensors, closed forms and NumPy; each recovers an easy instance and counts its passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import log_likelihood, random_params, recovery_error, sample

from moejax.likelihood.blocks import sample_blocks
from moejax.methods import (
    MOMENT_PASSES,
    MethodConfig,
    Problem,
    get_method,
    lookup_method,
    method_names,
    moments_of,
)
from moejax.methods.gated_loss import GatedLossMoments, gated_loss
from moejax.methods.gradient_descent import (
    LEARNING_RATES,
    PILOT_PASSES,
    descend,
    negative_log_likelihood,
    squared_error,
)
from moejax.methods.joint_em import clusterwise_regression
from moejax.model.activations import get_activation
from moejax.model.instances import InstanceScales
from moejax.model.status import Status
from moejax.moments.cross_moments import second_moment, whitened_moment
from moejax.moments.spectral import host_transforms
from moejax.sweep.trial.prepare import prepare
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings, check_settings
from moejax.sweep.trial.trial import run_trials

D, K, N, NOISE = 4, 2, 1500, 0.1
NAMES = ("joint_em", "gradient_nll", "gradient_mse", "gated_losses")
PASSES = 100


@pytest.fixture(scope="module")
def problem():
    scales = InstanceScales(*(jnp.asarray(v) for v in (NOISE, 1.0, 90.0, 0.0)), jnp.asarray(np.ones(K)))
    truth = random_params(jax.random.key(0), scales, D)
    x, y, _ = sample(jax.random.key(1), truth, "tanh", N)
    weights = jnp.asarray((np.arange(N) < N - 100).astype(float))
    transforms = jax.tree.map(jnp.asarray, host_transforms("tanh", NOISE, 4, "weighted", K))
    return truth, Problem(x, y, weights, jnp.asarray(NOISE), transforms)


def config(**changes):
    settings = {"noise": "known", "max_iterations": PASSES, "num_starts": 2, "record_path": True} | changes
    return MethodConfig(fn=get_activation("tanh"), num_experts=K, order=4, **settings)


@functools.cache
def compiled(name, **changes):
    return jax.jit(lambda key, problem: get_method(name)(key, problem, config(**changes)))


def run(name, problem, **changes):
    return jax.device_get(compiled(name, **changes)(jax.random.key(2), problem))


EXPECTED_PASSES = {
    "gradient_nll": len(LEARNING_RATES) * PILOT_PASSES + 2 * PASSES,
    "gradient_mse": len(LEARNING_RATES) * PILOT_PASSES + 2 * PASSES,
    "gated_losses": len(LEARNING_RATES) * PILOT_PASSES + PASSES + MOMENT_PASSES,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_easy_instance_is_recovered_and_the_passes_are_counted(problem, name):
    truth, data = problem
    result = run(name, data)
    assert int(result.status) == Status.OK
    # the moments of order 4 are noisy at this n
    assert float(recovery_error(truth.experts, result.params.experts)) < (
        0.2 if name == "gated_losses" else 0.01
    )
    assert not np.any(result.params.gating[-1])
    np.testing.assert_allclose(result.params.noise_std, NOISE, rtol=1e-12)
    assert result.num_iterations.dtype == jnp.int32
    if name in EXPECTED_PASSES:
        assert int(result.num_iterations) == EXPECTED_PASSES[name]
        last = jax.tree.map(lambda leaf: leaf[-1], result.path)
        jax.tree.map(np.testing.assert_array_equal, last, result.params)
        value = log_likelihood(result.params, data.x, data.y, "tanh", data.weights)
        assert float(result.history[-1]) == pytest.approx(float(value), rel=1e-10)
    else:  # both starts, not the kept one alone
        assert int(result.num_iterations) > np.isfinite(result.history).sum()
    assert result.path.experts.shape == (*result.history.shape, K, D)


@pytest.mark.slow
def test_what_has_no_weight_has_no_influence_and_a_bad_sample_is_a_status(problem):
    _, data = problem
    result = run("gradient_nll", data)
    without = np.asarray(data.weights) == 0
    junk = data._replace(x=np.where(without[:, None], np.nan, data.x), y=np.where(without, np.inf, data.y))
    again = run("gradient_nll", junk)
    np.testing.assert_allclose(again.params.experts, result.params.experts, rtol=1e-9)
    broken = run("gradient_nll", data._replace(y=np.append(np.nan, np.asarray(data.y)[1:])))
    assert int(broken.status) == Status.NOT_FINITE


@pytest.mark.slow
def test_the_gated_losses_say_when_the_second_moment_has_no_k_positive_directions(problem):
    _, data = problem
    # -l2 turns every eigenvalue of T2 around
    second = data.transforms.second
    turned = second._replace(values=-np.asarray(second.values))
    result = run("gated_losses", data._replace(transforms=data.transforms._replace(second=turned)))
    assert int(result.status) == Status.RANK_DEFICIENT


@pytest.mark.slow
def test_likelihood_of_gradient_descent_comes_near_that_of_em(problem):
    _, data = problem
    value = float(run("gradient_nll", data).history[-1])
    best = float(np.nanmax(np.asarray(run("joint_em", data).history)[-PASSES // 2 :]))
    assert best - 5.0 < value < best + 0.5


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", [*NAMES, "spectral_em"])
def test_every_leaf_has_the_precision_of_the_sample(problem, name, precision):
    cast = lambda leaf: leaf.astype(precision) if leaf.dtype == jnp.float64 else leaf  # noqa: E731
    data = jax.tree.map(cast, problem[1])
    for noise in ("known", "per_expert"):
        settings = config(noise=noise, fit_intercept=noise == "per_expert", start="kmeans")
        shapes = jax.eval_shape(
            lambda key, data, settings=settings: get_method(name)(key, data, settings),
            jax.random.key(0),
            data,
        )
        floating = [leaf for leaf in jax.tree.leaves(shapes) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert {str(leaf.dtype) for leaf in floating} == {precision}
        assert shapes.params.experts.shape == (K, D)
        assert shapes.history.shape == shapes.path.noise_std.shape[:1]


def test_losses_are_those_of_the_model(problem):
    truth, data = problem
    fn = get_activation("tanh")
    values = np.asarray(jax.jit(negative_log_likelihood(fn))(truth, data.x, data.y))
    total = log_likelihood(truth, data.x, data.y, fn, data.weights)
    assert float(values @ np.asarray(data.weights)) == pytest.approx(-float(total), rel=1e-12)
    x, y = np.asarray(data.x), np.asarray(data.y)
    logits = x @ np.asarray(truth.gating).T
    gates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = (y - (gates * np.tanh(x @ np.asarray(truth.experts).T)).sum(axis=1)) ** 2
    np.testing.assert_allclose(
        jax.jit(squared_error(fn))(truth, data.x, data.y), expected, rtol=1e-9, atol=1e-14
    )


def test_descent_is_adam_with_a_cosine_decay():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=6)
    starts, rates, passes = rng.normal(size=(2, 3)), np.array([0.1, 0.02]), 5
    free_from = 2  # the last parameter stays where it is until then

    def objective(free, design, y, weights):
        return jnp.sum(weights * (free @ design - y) ** 2)

    def constrain(free, share):
        return free, jnp.ones(3).at[2].set((share >= free_from / passes).astype(free.dtype))

    @jax.jit
    def descended(key, starts, rates, x, y):
        batches = sample_blocks(x, y, jnp.ones(6), fit_intercept=False, block_size=6)
        options = {"objective": objective, "constrain": constrain, "num_passes": passes}
        return descend(key, starts, rates, batches, **options)

    run = descended(jax.random.key(0), starts, rates, x, y)
    first, second, free = np.zeros((2, 3)), np.zeros((2, 3)), starts.copy()
    path = []
    for t in range(passes):
        movable = np.array([1.0, 1.0, float(t >= free_from)])
        gradient = 2 * (free @ x.T - y) @ x * movable
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9 ** (t + 1)) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
        loss = ((free @ x.T - y) ** 2).sum(axis=1)
        free = free - rates[:, None] * 0.5 * (1 + np.cos(np.pi * t / passes)) * update * movable
        path.append(free)
    np.testing.assert_allclose(run.path, np.stack(path), rtol=1e-9)
    np.testing.assert_allclose(run.free, free, rtol=1e-9)
    np.testing.assert_allclose(run.loss, loss, rtol=1e-9)


def score_tensors(x):
    """S_2 (n, d, d) and S_4 (n, d, d, d, d) of standard normal inputs, dense."""
    eye = np.eye(x.shape[1])
    pair = np.einsum("na,nb->nab", x, x)
    fourth = np.einsum("nab,ncd->nabcd", pair, pair)
    for left, right in (("ab", "cd"), ("ac", "bd"), ("ad", "bc"), ("cd", "ab"), ("bd", "ac"), ("bc", "ad")):
        fourth = fourth - np.einsum(f"n{left},{right}->nabcd", pair, eye)
    for left, right in (("ab", "cd"), ("ac", "bd"), ("ad", "bc")):
        fourth = fourth + np.einsum(f"{left},{right}->abcd", eye, eye)[None]
    return pair - eye, fourth


def test_the_gated_loss_is_that_of_dense_tensors():
    rng = np.random.default_rng(1)
    n, d, k, mu, penalty, delta = 30, 3, 2, 0.3, 2.5, 0.1
    x, l2, l4 = rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=n)
    basis, coordinates = rng.normal(size=(d, k)), rng.normal(size=(k, k))
    s2, s4 = score_tensors(x)
    t2, t4 = np.einsum("n,nab->ab", l2, s2) / n, np.einsum("n,nabcd->abcd", l4, s4) / n
    u = coordinates @ basis.T
    products = np.einsum("abcd,ia,ib,jc,jd->ij", t4, u, u, u, u)
    expected = products.sum() - np.trace(products) - mu * np.trace(products)
    expected += penalty * ((np.einsum("ab,ia,ib->i", t2, u, u) - 1) ** 2).sum()
    expected += delta / 2 * (u**2).sum()

    @jax.jit
    def loss(x, l2, l4, w, coordinates):
        moments = GatedLossMoments(
            w.T @ second_moment(x, l2) @ w, whitened_moment(x, l4, w, order=4), w.T @ w
        )
        return gated_loss(coordinates, moments, mu=mu, penalty=penalty, delta=delta)

    assert float(loss(x, l2, l4, basis, coordinates)) == pytest.approx(expected, rel=1e-10)


def test_the_gated_loss_of_the_population_has_its_minima_at_the_scaled_dual_basis():
    rng = np.random.default_rng(2)
    k, mu, p = 3, 0.5, np.array([0.5, 0.3, 0.2])
    penalty = 2 * mu / p.min()
    a = rng.normal(size=(k, k))  # in the span's own coordinates
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    moments = GatedLossMoments(
        np.einsum("m,ma,mb->ab", p, a, a), np.einsum("m,ma,mb,mc,md->abcd", p, a, a, a, a), np.eye(k)
    )
    moments = jax.tree.map(jnp.asarray, moments)

    @jax.jit
    def derivatives(u, delta):
        loss = functools.partial(gated_loss, moments=moments, mu=mu, penalty=penalty, delta=delta)
        return loss(u), jax.grad(loss)(u), jax.hessian(loss)(u)

    u = rng.normal(size=(k, k))
    s = np.sqrt(p) * (u @ a.T)
    expected = (((s**2).sum(axis=0) ** 2 - (1 + mu) * (s**4).sum(axis=0)) / p).sum()
    expected += penalty * (((s**2).sum(axis=1) - 1) ** 2).sum() + 0.05 * (u**2).sum()
    assert float(derivatives(jnp.asarray(u), 0.1)[0]) == pytest.approx(expected, rel=1e-10)

    # with delta = 0 each minimiser is s_i = c_i e_i, c_i^2 = lambda / (lambda - mu / p_i)
    scale = np.sqrt(penalty / (penalty - mu / p))
    dual = (scale / np.sqrt(p))[:, None] * np.linalg.inv(a).T
    _, gradient, hessian = derivatives(jnp.asarray(dual), 0.0)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
    assert np.linalg.eigvalsh(np.asarray(hessian).reshape(k * k, k * k)).min() > 0.1


def test_clusterwise_regression_is_least_squares_on_the_samples_nearest_to_each_expert(monkeypatch):
    monkeypatch.setattr("moejax.methods.joint_em.CLUSTERWISE_DAMPING", 0.0)
    rng = np.random.default_rng(3)
    n, d, k = 400, 3, 2
    x, truth, start = rng.normal(size=(n, d)), rng.normal(size=(k, d)), rng.normal(size=(k, d))
    y = (x @ truth.T)[np.arange(n), rng.integers(k, size=n)] + 0.1 * rng.normal(size=n)
    weights = rng.uniform(0.5, 1.5, n)

    def loss_and_next(experts):
        error = y[:, None] - x @ experts.T
        mine, root = np.argmin(error**2, axis=1), np.sqrt(weights)[:, None]
        fitted = [
            np.linalg.lstsq((root * x)[mine == i], (root[:, 0] * y)[mine == i], rcond=None)[0]
            for i in range(k)
        ]
        return (weights * (error**2).min(axis=1)).sum(), np.stack(fitted)

    experts, losses = start, []
    for _ in range(4):
        loss, after = loss_and_next(experts)
        losses.append(loss)
        experts, last = after, experts
    assert np.all(np.diff(losses) <= 0)
    found, residual = jax.jit(
        functools.partial(clusterwise_regression, fn=get_activation("linear"), num_steps=4)
    )(start, x, y, weights)
    np.testing.assert_allclose(found, last, rtol=1e-8)
    assert float(residual) == pytest.approx(np.sqrt(losses[-1] / weights.sum()), rel=1e-9)


def test_the_registry_knows_which_methods_take_one_order_only():
    assert set(NAMES) < set(method_names())
    assert [moments_of(name) for name in NAMES] == ["none", "none", "none", "required"]
    assert [lookup_method(name).order for name in (*NAMES, "spectral_em")] == [None, None, None, 4, None]
    data = DataSettings(activation="tanh", dim=4, num_experts=2, num_samples=900, noise_std=0.1)
    algorithm = AlgorithmSettings(method="gated_losses", order=3)
    spec, hyperparameters = prepare(data, algorithm)
    assert spec.orders == (4,)
    assert hyperparameters.transforms[0].first is not None  # tells the signs
    with pytest.raises(ValueError, match=r"start: expected random or kmeans, got 'kmean'"):
        check_settings(data, AlgorithmSettings(method="joint_em", start="kmean"))


def test_an_activation_without_order_4_is_refused():
    data = DataSettings(activation="sigmoid", dim=4, num_experts=2, num_samples=900, noise_std=1.0)
    with pytest.raises(ValueError, match=r"order: sigmoid has no usable order 4 at noise_std 1: "):
        prepare(data, AlgorithmSettings(method="gated_losses"))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["random", "kmeans"])
def test_a_trial_records_its_errors_along_the_path(start):
    data = DataSettings(activation="linear", dim=4, num_experts=2, num_samples=1000, noise_std=0.1)
    algorithm = AlgorithmSettings(
        method="joint_em", start=start, num_starts=2, max_iterations=30, record=("history", "path")
    )
    spec, hyperparameters = prepare(data, algorithm)
    hyperparameters = jax.tree.map(lambda leaf: np.stack([leaf] * 3), hyperparameters)
    result = run_trials(jax.random.split(jax.random.key(4), 3), hyperparameters, spec)
    assert np.all(np.asarray(result.recovery_error) < 0.01)
    assert result.path.shape == (*result.history.shape, 2)
    for history, path, recovery, gating in zip(
        *map(np.asarray, (result.history, result.path, result.recovery_error, result.gating_error)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.isfinite(path).all(axis=1), np.isfinite(history))
        last = path[np.isfinite(history)][-1]
        np.testing.assert_allclose(last, [recovery, gating], rtol=1e-6)
        # on so easy an instance, the clusterwise start is next to the answer already
        assert path[0, 0] > 10 * recovery if start == "random" else path[0, 0] < 0.02
    without = dataclasses.replace(spec, record_path=False)
    shapes = jax.eval_shape(
        lambda keys: run_trials(keys, hyperparameters, without), jax.random.split(jax.random.key(4), 3)
    )
    assert shapes.path is None
