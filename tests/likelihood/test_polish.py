"""The polish: curvature against automatic differentiation, maxima against SciPy, kinks, lanes and ridges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import align, log_likelihood, make_params, responsibilities, results_on_the_host, sample
from scipy import optimize

from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.derivatives import likelihood_curvature
from moejax.likelihood.polish import polish
from moejax.likelihood.predictors import free_parameters, params_from_free
from moejax.model.activations import get_activation

D, K, N = 3, 2, 400
MODELS = list(itertools.product(["known", "shared", "per_expert"], [False, True]))
FAST = [("known", False), ("shared", True), ("per_expert", True)]


@functools.cache
def drawn(name, n=N, k=K):
    rng = np.random.default_rng(0)
    params = make_params(
        np.linalg.qr(rng.normal(size=(D, D)))[0][:k],
        rng.normal(size=(k, D)),
        np.full(k, 0.3),
        0.2 * rng.normal(size=k),
        0.2 * rng.normal(size=k),
    )
    x, y, _ = sample(jax.random.key(0), params, name, n)
    return jax.device_get((params, x, y))


def random_weights():
    return np.random.default_rng(1).uniform(0.0, 2.0, N)


free_of = jax.jit(free_parameters, static_argnames=("noise", "fit_intercept"))
params_of = jax.jit(params_from_free, static_argnames=("noise", "fit_intercept"))


@functools.partial(jax.jit, static_argnames=("name", "noise", "fit_intercept"))
def curvature(params, x, y, weights, ridge, name, noise, fit_intercept):
    fn = get_activation(name)
    blocks = sample_blocks(x, y, weights, fit_intercept=fit_intercept, block_size=150)
    return likelihood_curvature(params, blocks, fn=fn, noise=noise, fit_intercept=fit_intercept, ridge=ridge)


@functools.partial(jax.jit, static_argnames=("name", "noise", "fit_intercept"))
def differentiated(params, x, y, weights, ridge, name, noise, fit_intercept):
    """(value, gradient, minus Hessian, complete-data information) by automatic differentiation."""
    num_gates = (K - 1) * (D + int(fit_intercept))
    first_gate = K * (D + int(fit_intercept))
    posterior = jax.lax.stop_gradient(responsibilities(params, x, y, name))

    def value(free):
        at = params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)
        return log_likelihood(at, x, y, name, weights) - ridge * penalty(free)

    def penalty(free):
        gates = free[first_gate : first_gate + num_gates].reshape(K - 1, -1)
        gates = jnp.concatenate([gates, jnp.zeros_like(gates[:1])])
        return 0.5 * jnp.sum((gates - gates.mean(axis=0, keepdims=True)) ** 2)

    def parts(free):
        """Means, gate logits and log noise: what the complete-data likelihood is a function of."""
        at = params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)
        means = jax.vmap(jax.vmap(get_activation(name)))(x @ at.experts.T + at.expert_bias[None])
        return means, x @ at.gating.T + at.gating_bias[None], jnp.log(at.noise_std)

    free = free_parameters(params, noise=noise, fit_intercept=fit_intercept)
    means, logits, log_noise = jax.jacfwd(parts)(free)
    gate = jax.nn.softmax(parts(free)[1], axis=1)
    scaled = posterior * weights[:, None] / params.noise_std[None] ** 2
    complete = jnp.einsum("ni,nip,niq->pq", scaled, means, means)
    within = jnp.einsum("ni,nip,niq->npq", gate, logits, logits)
    mean = jnp.einsum("ni,nip->np", gate, logits)
    complete += jnp.einsum("n,npq->pq", weights, within - mean[:, :, None] * mean[:, None, :])
    complete += jnp.einsum("ni,ip,iq->pq", 2 * posterior * weights[:, None], log_noise, log_noise)
    return (
        value(free),
        jax.grad(value)(free),
        -jax.hessian(value)(free),
        complete + ridge * jax.hessian(penalty)(free),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "fit_intercept"),
    [pytest.param(*m, marks=() if m in FAST else pytest.mark.slow) for m in MODELS],
)
def test_curvature_is_that_of_automatic_differentiation(noise, fit_intercept):
    params, x, y = drawn("tanh")
    params = params._replace(experts=params.experts + 0.2, noise_std=np.asarray([0.3, 0.5]))
    if noise == "shared":
        params = params._replace(noise_std=np.full(K, 0.4))
    arguments = (params, x, y, random_weights(), 0.7, "tanh", noise, fit_intercept)
    got = curvature(*arguments)
    for mine, expected in zip(got, differentiated(*arguments), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(mine, expected, atol=1e-9 * scale)
    assert np.linalg.eigvalsh(np.asarray(got.complete)).min() > -1e-9


@pytest.mark.parametrize("name", ["linear", "tanh"])
def test_an_economical_polish_ends_at_a_stationary_point(name):
    """The last step is not evaluated; the likelihood, its gradient and its Hessian by JAX say that it was a good one."""
    params, x, y = drawn(name)
    start, ones = perturbed(params, 0.05, 1), jnp.ones(N)
    ended = run(start, x, y, ones, name=name, economical=True)
    assert bool(ended.converged)
    value = float(log_likelihood(ended.params, x, y, name))
    assert float(ended.log_likelihood) == pytest.approx(value, abs=1e-4)
    assert value >= np.nanmax(ended.history) - 1e-6
    _, gradient, hessian, _ = differentiated(ended.params, x, y, ones, jnp.asarray(0.0), name, "shared", True)
    assert 0.5 * gradient @ np.linalg.solve(np.asarray(hessian), gradient) < 1e-4  # nats to the maximum


@pytest.mark.parametrize(("noise", "fit_intercept"), MODELS)
def test_free_parameters_round_trip(noise, fit_intercept):
    params, _, _ = drawn("tanh")
    free = np.asarray(free_of(params, noise=noise, fit_intercept=fit_intercept))
    size = (2 * K - 1) * (D + int(fit_intercept)) + {"known": 0, "shared": 1, "per_expert": K}[noise]
    assert free.shape == (size,)
    back = params_of(free, params, noise=noise, fit_intercept=fit_intercept)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-15), back, params)
    moved = params_of(free + 0.1, params, noise=noise, fit_intercept=fit_intercept)
    again = free_of(moved, noise=noise, fit_intercept=fit_intercept)
    np.testing.assert_allclose(again, free + 0.1, rtol=1e-13)


@results_on_the_host
@functools.partial(jax.jit, static_argnames=("name", "noise", "fit_intercept", "num_steps", "economical"))
def run(
    params,
    x,
    y,
    weights,
    name="tanh",
    noise="shared",
    fit_intercept=True,
    ridge=0.0,
    num_steps=60,
    economical=False,
):
    fn = get_activation(name)
    return polish(
        params,
        x,
        y,
        weights,
        fn=fn,
        noise=noise,
        fit_intercept=fit_intercept,
        ridge=ridge,
        num_steps=num_steps,
        economical=economical,
    )


def values_of(ended):
    """The likelihood after each pass that was made; NaN fills the rest of the budget."""
    history, made = np.asarray(ended.history), int(ended.num_steps)
    assert np.all(np.isnan(history[made:]))
    assert np.diff(history[:made]).min() >= 0
    return history[:made]


def perturbed(params, size, seed=0):
    rng = np.random.default_rng(seed)
    experts, gating = (leaf + size * rng.normal(size=leaf.shape) for leaf in (params.experts, params.gating))
    return params._replace(experts=experts, gating=gating - gating[-1:])


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["known", "per_expert"])
def test_polish_reaches_scipys_maximum(noise):
    params, x, y = drawn("tanh")
    weights = random_weights()
    start = jax.tree.map(jnp.asarray, perturbed(params, 0.3))
    ended = run(start, x, y, weights, noise=noise)
    assert bool(ended.converged)
    free = functools.partial(free_of, noise=noise, fit_intercept=True)

    @jax.jit
    def loss(free):
        at = params_from_free(free, start, noise=noise, fit_intercept=True)
        return jax.value_and_grad(
            lambda f: (
                -log_likelihood(
                    params_from_free(f, start, noise=noise, fit_intercept=True), x, y, "tanh", weights
                )
            )
        )(free), at

    def numpy_loss(free):
        (value, slope), _ = loss(jnp.asarray(free))
        return float(value), np.asarray(slope)

    best = optimize.minimize(
        numpy_loss, np.asarray(free(start)), jac=True, method="BFGS", options={"gtol": 1e-6}
    )
    assert float(ended.log_likelihood) >= -best.fun - 1e-3
    if abs(float(ended.log_likelihood) + best.fun) < 1e-2:  # the same one of several maxima
        np.testing.assert_allclose(free(ended.params), best.x, atol=5e-3)
    assert values_of(ended)[0] == pytest.approx(float(log_likelihood(start, x, y, "tanh", weights)))
    assert float(ended.log_likelihood) == pytest.approx(
        float(log_likelihood(ended.params, x, y, "tanh", weights))
    )
    gradient = np.asarray(ended.curvature.gradient)
    assert gradient @ np.linalg.solve(np.asarray(ended.curvature.observed), gradient) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_weights_that_are_shares_give_the_maximum_of_weights_that_are_one(name):
    params, x, y = drawn(name)
    start = perturbed(params, 0.2)
    counts, shares = (run(start, x, y, np.full(N, weight), name=name) for weight in (1.0, 1 / N))
    assert int(shares.num_steps) == int(counts.num_steps)
    assert bool(shares.converged)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), shares.params, counts.params
    )


def test_a_start_without_a_likelihood_does_not_converge():
    params, x, y = drawn("tanh")
    ended = run(params._replace(noise_std=np.full(K, 1e-170)), x, y, np.ones(N))
    assert not np.isfinite(float(ended.log_likelihood))
    assert not bool(ended.converged)


@pytest.mark.slow
def test_polish_never_decreases_from_far_away_in_any_lane():
    params, x, y = drawn("tanh")
    starts = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(perturbed(params, 3.0, seed) for seed in range(4))
    )
    lanes = jax.jit(
        jax.vmap(
            functools.partial(polish, fn=jnp.tanh, num_steps=60, fit_intercept=True), (0, None, None, None)
        )
    )
    ended = jax.device_get(lanes(starts, x, y, np.ones(N)))
    # a lane that is done is frozen, whatever its neighbours do: each equals its own run
    for lane in range(4):
        alone = run(jax.tree.map(lambda leaf, lane=lane: leaf[lane], starts), x, y, np.ones(N))
        assert int(alone.num_steps) == int(ended.num_steps[lane])
        np.testing.assert_allclose(ended.history[lane, : int(alone.num_steps)], values_of(alone), rtol=1e-7)
    assert len(set(np.asarray(ended.num_steps).tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", pytest.param("abs", marks=pytest.mark.slow)])
def test_a_kinked_activation_reaches_the_same_maximum_from_two_starts(name):
    params, x, y = drawn(name, n=4000)
    ends = [run(perturbed(params, 0.15, seed), x, y, np.ones(4000), name=name) for seed in (1, 2)]
    values = [float(e.log_likelihood) for e in ends]
    assert abs(values[0] - values[1]) < 0.5  # nats in all, of 4000 samples
    at_truth = float(log_likelihood(params, x, y, name))
    assert min(values) > at_truth
    for ended in ends:
        values_of(ended)
        aligned = align(params, ended.params, even=name == "abs")
        np.testing.assert_allclose(aligned.experts, params.experts, atol=0.12)


@pytest.mark.slow
def test_ridge_is_on_the_gates():
    params, x, y = drawn("tanh")
    weights = random_weights()
    total = 0.05 * float(weights.sum())
    ended = run(params, x, y, weights, ridge=total)
    gates = np.append(ended.params.gating[0], ended.params.gating_bias[0])
    # of two gates w and 0, sum_i |w_i - mean w|^2 = |w|^2 / 2
    penalised = float(log_likelihood(ended.params, x, y, "tanh", weights)) - 0.25 * total * gates @ gates
    assert float(ended.log_likelihood) == pytest.approx(penalised, rel=1e-10)
    slope = jax.device_get(jax.grad(log_likelihood)(ended.params, x, y, "tanh", weights))
    np.testing.assert_allclose(
        np.append(slope.gating[0], slope.gating_bias[0]), 0.5 * total * gates, atol=0.05
    )
    np.testing.assert_allclose(slope.experts, 0.0, atol=0.5)


def test_zero_weight_changes_nothing():
    params, x, y = drawn("tanh")
    unused = np.arange(N) >= N - 50
    weights = np.where(unused, 0.0, 1.0)
    one = run(perturbed(params, 0.2), x, y, weights)
    junk = np.where(unused[:, None], 11.0, x), np.where(unused, -7.0, y)
    other = run(perturbed(params, 0.2), *junk, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8), one.params, other.params
    )
    assert int(one.num_steps) == int(other.num_steps)
