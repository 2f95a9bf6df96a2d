"""The model: likelihood, responsibilities, prediction and sampling, against SciPy and by simulation."""

import decimal
import functools
import inspect
import math

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from moejax import log_likelihood, make_params, predict, responsibilities, sample
from moejax.model.instances import InstanceScales, random_params
from moejax.model.mixture import (
    log_likelihood_per_sample,
    posterior,
    sample_labels,
    weighted_sum,
)
from moejax.model.small_linear_algebra import unit_rows

D, K, N = 3, 3, 40

compiled_posterior = jax.jit(functools.partial(posterior, xp=jnp))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(K, D)),
        rng.normal(size=(K, D)),
        [0.2, 0.5, 1.1],
        rng.normal(size=K),
        rng.normal(size=K),
    )
    return make_params(*(jnp.asarray(a) for a in arrays))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(N, D))), jnp.asarray(rng.normal(size=N))


def joint_density(params, x, y):
    """(n, k): P_i(x) N(y; tanh(a_i x + b_i), sigma_i^2) with NumPy and SciPy alone."""
    gates = special.softmax(
        np.asarray(x) @ np.asarray(params.gating).T + np.asarray(params.gating_bias), axis=1
    )
    means = np.tanh(np.asarray(x) @ np.asarray(params.experts).T + np.asarray(params.expert_bias))
    return gates * stats.norm.pdf(np.asarray(y)[:, None], means, np.asarray(params.noise_std)), gates, means


@pytest.mark.slow
def test_likelihood_responsibilities_and_prediction(params, data):
    joint, gates, means = joint_density(params, *data)
    np.testing.assert_allclose(
        compiled_model.log_likelihood_per_sample(params, *data, "tanh"), np.log(joint.sum(axis=1)), rtol=1e-11
    )
    weights = np.random.default_rng(2).uniform(size=N)
    expected = weights @ np.log(joint.sum(axis=1))
    got = compiled_model.log_likelihood(params, *data, "tanh", jnp.asarray(weights))
    assert float(got) == pytest.approx(expected, rel=1e-12)
    expected = joint / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(compiled_model.responsibilities(params, *data, "tanh"), expected, rtol=1e-10)
    np.testing.assert_allclose(
        compiled_model.predict(params, data[0], "tanh"), (gates * means).sum(axis=1), rtol=1e-11
    )


def exact_posterior(log_gates, means, y, noise_std):
    """(k,) of one label (m,), from log gates (k,) and means and noise (k, m), with 900 digits."""
    with decimal.localcontext(decimal.Context(prec=900)):
        exponents = []
        for log_gate, mean, noise in zip(log_gates, means, noise_std, strict=True):
            squares = [
                ((decimal.Decimal(v) - decimal.Decimal(u)) / decimal.Decimal(s)) ** 2
                for v, u, s in zip(y, mean, noise, strict=True)
            ]
            exponents.append(decimal.Decimal(log_gate - sum(math.log(s) for s in noise)) - sum(squares) / 2)
        shares = np.exp([float(exponent - max(exponents)) for exponent in exponents])
    return shares / shares.sum()


@pytest.mark.parametrize("size", [1.0, 1e4, 1e8, 1e150, 1e200, 1e300])
@pytest.mark.parametrize("noise", ["shared", "each", "tiny beside large"])
def test_posteriors_however_far_the_label_is(size, noise):
    rng = np.random.default_rng(3)
    n, m = 12, 2
    log_gates = special.log_softmax(rng.normal(size=(n, K)), axis=1)
    means = rng.normal(size=(n, K, m))
    noise_std = {
        "shared": np.full((K, m), 0.7),
        "each": rng.uniform(0.5, 2.0, size=(K, m)),
        "tiny beside large": np.array([[1e-7, 1e-7], [1.0, 2.0], [1.5, 1.0]]),
    }[noise]
    y = size * rng.normal(size=(n, m))
    expected = np.stack([exact_posterior(*row, noise_std) for row in zip(log_gates, means, y, strict=True)])
    with np.errstate(over="ignore"):
        found = posterior(log_gates, means, y, noise_std, xp=np)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)
    arrays = (jnp.asarray(a) for a in (log_gates, means, y, noise_std))
    np.testing.assert_allclose(compiled_posterior(*arrays), found, rtol=1e-7, atol=1e-12)


def test_responsibilities_in_single_precision_far_out(single_precision):
    params = make_params(np.eye(2), np.zeros((2, 2)), 0.1)
    x = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    for y in (1e4, 1e25):
        found = compiled_model.responsibilities(params, x, jnp.asarray(np.full(3, y, np.float32)), "linear")
        np.testing.assert_allclose(found, [[1, 0], [0, 1], [0.5, 0.5]], atol=1e-6)


@pytest.mark.slow
def test_zero_weight_removes_a_sample_whatever_its_value(params, data):
    x, y = data
    plain = compiled_model.log_likelihood(params, x, y, "tanh", jnp.asarray(np.ones(N)))
    padded_x, padded_y, weights = (
        jnp.asarray(np.concatenate(parts))
        for parts in (
            (x, np.full((2, D), np.nan)),
            (y, np.full(2, np.inf)),
            (np.ones(N), np.zeros(2)),
        )
    )
    padded = compiled_model.log_likelihood(params, padded_x, padded_y, "tanh", weights)
    assert float(padded) == pytest.approx(float(plain), rel=1e-13)
    assert float(weighted_sum(jnp.asarray([1.0, jnp.nan]), jnp.asarray([2.0, 0.0]))) == 2.0


def test_gauge_and_order_do_not_change_the_mixture(params, data):
    shifted = params._replace(gating=params.gating + 0.7, gating_bias=params.gating_bias - 0.3)
    per_sample = compiled_model.log_likelihood_per_sample(params, *data, "tanh")
    np.testing.assert_allclose(
        compiled_model.log_likelihood_per_sample(shifted, *data, "tanh"), per_sample, rtol=1e-11
    )
    gauged = compiled_model.regauge(shifted)
    np.testing.assert_allclose(gauged.gating, params.gating, atol=1e-14)
    np.testing.assert_allclose(gauged.gating_bias, params.gating_bias, atol=1e-14)
    permuted = compiled_model.permute_experts(params, jnp.asarray([2, 0, 1]))
    assert not np.any(np.asarray(permuted.gating)[-1])
    assert not np.any(np.asarray(permuted.gating_bias)[-1])
    np.testing.assert_array_equal(np.asarray(permuted.experts)[0], np.asarray(params.experts)[2])
    np.testing.assert_allclose(
        compiled_model.log_likelihood_per_sample(permuted, *data, "tanh"), per_sample, rtol=1e-11
    )


def test_make_params_broadcasts_and_refuses():
    params = make_params(np.eye(2, 3), np.ones((2, 3)), 0.1)
    assert params.noise_std.shape == params.expert_bias.shape == params.gating_bias.shape == (2,)
    np.testing.assert_array_equal(params.gating, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"expected two arrays \(k, d\), got \(2, 3\) and \(3, 3\)"):
        make_params(np.eye(2, 3), np.eye(3), 0.1)


def test_sampled_labels_follow_the_model(params):
    n = 40_000
    x = jnp.asarray(np.tile([0.3, -1.0, 0.5], (n, 1)))
    y, z = compiled_model.sample_labels(jax.random.key(0), params, "tanh", x)
    _, gates, means = joint_density(params, np.asarray(x)[:1], np.asarray(y)[:1])
    y, z = np.asarray(y), np.asarray(z)
    assert z.dtype == np.int32
    for i in range(K):
        p = gates[0, i]
        assert abs((z == i).mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
        standardised = (y[z == i] - float(means[0, i])) / float(params.noise_std[i])
        assert stats.kstest(standardised, "norm").pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_compiled_labels_are_those_of_single_operations(dtype):
    """XLA once compiled the products of x with experts and gates into wrong rows beyond 16384."""
    n, dim = 20_000, 5
    experts, gating = np.zeros((2, dim)), np.zeros((2, dim))
    experts[0, 0], experts[1, :2], gating[0, :3] = 1.0, (0.3, 0.91**0.5), (1.2, -0.8, 1.0)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), make_params(experts, gating, 0.1))
    x = jax.random.normal(jax.random.key(0), (n, dim), dtype)
    eager = sample_labels(jax.random.key(1), params, "relu", x)
    compiled = compiled_model.sample_labels(jax.random.key(1), params, "relu", x)
    # rounding may move a label whose draw lies at the border of two experts
    assert np.mean(np.asarray(compiled[1]) != np.asarray(eager[1])) < 1e-3
    for function in (log_likelihood_per_sample, responsibilities):
        values = [f(params, x, eager[0], "relu") for f in (function, jax.jit(function, static_argnums=3))]
        np.testing.assert_allclose(values[1], values[0], atol=1e-3 if dtype == jnp.float32 else 1e-10)


@pytest.mark.slow
def test_sample_draws_standard_normal_inputs(params):
    x, y, z = compiled_model.sample(jax.random.key(1), params, "tanh", 5000)
    assert x.shape == (5000, D)
    assert y.shape == z.shape == (5000,)
    assert stats.kstest(np.asarray(x).reshape(-1), "norm").pvalue > 1e-3
    again = compiled_model.sample(jax.random.key(1), params, "tanh", 5000)
    np.testing.assert_array_equal(again[1], y)


def scales(angle, correlation, norms):
    values = (jnp.asarray(v) for v in (0.3, 2.0, angle, correlation))
    return InstanceScales(*values, jnp.asarray(norms))


@pytest.mark.parametrize(("angle", "correlation"), [(90.0, 0.0), (30.0, 0.6), (0.0, -0.3)])
def test_random_instances_are_as_asked(angle, correlation):
    norms = np.array([1.0, 2.0, 0.5])
    params = compiled_model.random_params(jax.random.key(0), scales(angle, correlation, norms), 6)
    experts = np.asarray(params.experts)
    gram = experts @ experts.T
    expected = np.outer(norms, norms) * (correlation + (1 - correlation) * np.eye(3))
    np.testing.assert_allclose(gram, expected, atol=1e-12)
    gates = np.asarray(params.gating)
    np.testing.assert_allclose(np.linalg.norm(gates, axis=1), [2.0, 2.0, 0.0], atol=1e-12)
    basis = np.linalg.qr(experts.T)[0]
    in_span = np.linalg.norm(gates[:2] @ basis, axis=1)
    np.testing.assert_allclose(in_span, 2.0 * np.cos(np.deg2rad(angle)), atol=1e-9)
    np.testing.assert_array_equal(params.noise_std, np.full(3, 0.3))
    unequal = scales(angle, correlation, norms)._replace(gating_bias=2.0)
    unequal = compiled_model.random_params(jax.random.key(0), unequal, 6)
    np.testing.assert_allclose(unequal.gating_bias, [2.0, 1.0, 0.0])
    np.testing.assert_array_equal(unequal.experts, params.experts)


@pytest.fixture(scope="module")
def many_instances():
    keys = jax.random.split(jax.random.key(3), 4000)
    draw = jax.jit(jax.vmap(random_params, (0, None, None)), static_argnums=2)
    return jax.device_get(draw(keys, scales(60.0, 0.0, [1.0, 1.0]), 3))


def test_random_instances_have_uniform_lines(many_instances):
    """E[a a'] = I / d for each expert and, E[w w'] = |w|^2 I / d for the gate."""
    for vectors, size in (
        (many_instances.experts, 1.0),
        (many_instances.experts[:, ::-1], 1.0),
        (many_instances.gating, 4.0),
    ):
        v = vectors[:, 0]
        products = v[:, :, None] * v[:, None, :]
        error = products.mean(axis=0) - size * np.eye(3) / 3
        assert np.all(np.abs(error) < 4.5 * products.std(axis=0) / len(v) ** 0.5)


def test_random_experts_have_mean_zero(many_instances):
    v = many_instances.experts[:, 0]
    assert np.all(np.abs(v.mean(axis=0)) < 4.5 * v.std(axis=0) / len(v) ** 0.5)


def test_unit_rows():
    rows = unit_rows(jnp.asarray([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]])


@pytest.mark.parametrize("noise_std", [-0.1, 0.0, float("nan"), [0.1, -0.1]])
def test_noise_is_positive(noise_std):
    with pytest.raises(ValueError, match="noise_std: expected positive numbers"):
        make_params(np.eye(2), np.eye(2), jnp.asarray(noise_std))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": (N, D + 1)}, rf"x: expected the shape \({N}, {D}\), got \({N}, {D + 1}\)"),
        ({"x": (D,)}, rf"x: expected two axes, \(n, {D}\), got \({D},\)"),
        ({"y": (N + 1,)}, rf"y: expected the shape \({N},\), got \({N + 1},\)"),
        ({"y": (N, 1)}, rf"y: expected the shape \({N},\), got \({N}, 1\)"),
        ({"weights": (1,)}, rf"weights: expected the shape \({N},\), got \(1,\)"),
        ({"gating": (K + 1, D)}, rf"params\.gating: expected the shape \({K}, {D}\), got \({K + 1}, {D}\)"),
        ({"noise_std": (1,)}, rf"params\.noise_std: expected the shape \({K},\), got \(1,\)"),
        ({"experts": (D,)}, rf"params\.experts: expected \(k, d\), or \(k, m, d\), got \({D},\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_one_line(params, changes, words):
    """Also while JAX traces the function."""
    shapes = {"x": (N, D), "y": (N,), "weights": (N,)} | changes
    arrays = {name: np.ones(shape) for name, shape in shapes.items()}
    given = params._replace(**{name: arrays[name] for name in arrays if name in params._fields})
    x, y, weights = (arrays[name] for name in ("x", "y", "weights"))
    # without the tests' own checks of shapes, which come first
    plain = {f.__name__: inspect.unwrap(f) for f in (log_likelihood, responsibilities, predict, sample)}
    calls = {
        "log_likelihood": lambda: plain["log_likelihood"](given, x, y, "tanh", weights),
        "responsibilities": lambda: plain["responsibilities"](given, x, y, "tanh"),
        "predict": lambda: plain["predict"](given, x, "tanh"),
        "sample": lambda: plain["sample"](jax.random.key(0), given, "tanh", N),
    }
    (changed,) = changes
    readers = {"weights": ["log_likelihood"], "y": ["log_likelihood", "responsibilities"]}
    readers["x"] = [*readers["y"], "predict"]
    for name in readers.get(changed, list(calls)):
        for call in (calls[name], jax.jit(calls[name])):
            with pytest.raises(ValueError, match=words):
                call()


def test_a_number_of_samples_is_a_whole_number(params):
    for wrong in (2.5, -1, "many"):
        with pytest.raises(ValueError, match="num_samples: expected a whole number of at least 0, got"):
            sample(jax.random.key(0), params, "tanh", wrong)
