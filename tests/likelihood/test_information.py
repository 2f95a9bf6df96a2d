"""Information and standard errors: quadrature, automatic differentiation, closed forms, units, what is not identified."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_model import log_likelihood_per_sample, make_params, permute_experts, sample, sample_labels
from scipy import integrate, special, stats

from moejax.fitting.whitening import params_in_input_units
from moejax.likelihood.fisher import fisher_information
from moejax.likelihood.information import (
    confidence_intervals,
    covariance,
    cramer_rao_bound,
    observed_information,
    parameter_blocks,
    score_outer_products,
    standard_errors,
    transform_covariance,
)
from moejax.likelihood.polish import polish
from moejax.likelihood.predictors import free_parameters, params_from_free
from moejax.model.activations import get_activation

pytestmark = pytest.mark.slow

D, K = 3, 2
STATIC = ("name", "noise", "fit_intercept")


@functools.cache
def truth(k=K, d=D):
    rng = np.random.default_rng(0)
    params = make_params(
        np.linalg.qr(rng.normal(size=(d, d)))[0][:k],
        rng.normal(size=(k, d)),
        np.full(k, 0.3),
        0.2 * rng.normal(size=k),
        0.2 * rng.normal(size=k),
    )
    return jax.device_get(params)


@functools.cache
def drawn(name="tanh", n=400):
    x, y, _ = jax.device_get(sample(jax.random.key(0), truth(), name, n))
    return x, y


@functools.partial(jax.jit, static_argnames=STATIC)
def fisher(params, x, weights, name="tanh", noise="shared", fit_intercept=True):
    return fisher_information(params, x, name, noise=noise, fit_intercept=fit_intercept, weights=weights)


@functools.partial(jax.jit, static_argnames=(*STATIC, "kind"))
def covariance_of(params, x, y, weights, name="tanh", noise="shared", fit_intercept=True, kind="observed"):
    return covariance(
        params, x, y, name, noise=noise, fit_intercept=fit_intercept, weights=weights, kind=kind
    )


@functools.partial(jax.jit, static_argnames=(*STATIC, "hessian"))
def differentiated(params, x, y, name, noise, fit_intercept, hessian):
    """Scores (n, P) or minus Hessians (n, P, P) of every sample, by automatic differentiation."""
    free = free_parameters(params, noise=noise, fit_intercept=fit_intercept)

    def value(free, x, y):
        at = params_from_free(free, params, noise=noise, fit_intercept=fit_intercept)
        return log_likelihood_per_sample(at, x[None], y[None], name)[0]

    derivative = (lambda *a: -jax.hessian(value)(*a)) if hessian else jax.grad(value)
    return jax.vmap(derivative, (None, 0, 0))(free, x, y)


bound_of = jax.jit(cramer_rao_bound)
free_of = jax.jit(free_parameters, static_argnames=("noise", "fit_intercept"))
in_input_units = jax.jit(params_in_input_units)
transformed = jax.jit(transform_covariance)
errors_of = jax.jit(standard_errors, static_argnames=("noise", "fit_intercept", "transform"))


@pytest.mark.parametrize(
    ("name", "noise", "fit_intercept"),
    [("tanh", "per_expert", True), ("relu", "shared", False), ("square", "known", False)],
)
def test_fisher_information_is_the_integral_over_y(name, noise, fit_intercept):
    params = truth()
    if noise == "per_expert":
        params = params._replace(noise_std=np.asarray([0.3, 0.5]))
    x = drawn()[0][:3]
    weights = np.asarray([2.0, 0.5, 0.0])
    y = np.linspace(-9.0, 9.0, 6001) + 2.0
    expected = 0.0
    for row, weight in zip(x, weights, strict=True):
        inputs = np.broadcast_to(row, (y.size, D))
        scores = np.asarray(differentiated(params, inputs, y, name, noise, fit_intercept, False))
        density = np.exp(np.asarray(log_likelihood_per_sample(params, inputs, y, name)))
        assert integrate.simpson(density, x=y) == pytest.approx(1.0, abs=1e-10)
        products = density[:, None, None] * scores[:, :, None] * scores[:, None, :]
        expected = expected + float(weight) * integrate.simpson(products, x=y, axis=0)
    got = fisher(params, x, weights, name, noise, fit_intercept)
    np.testing.assert_allclose(got, expected, atol=1e-9 * np.abs(expected).max())


def test_fisher_information_is_the_mean_hessian():
    """Bartlett's second identity, by Monte Carlo: E[-Hessian] over many y at each of a few x."""
    params, copies = truth(), 4000
    inputs = np.tile(drawn()[0][:4], (copies, 1))
    y, _ = sample_labels(jax.random.key(1), params, "tanh", inputs)
    hessians = np.asarray(differentiated(params, inputs, y, "tanh", "shared", True, True))
    per_copy = hessians.reshape(copies, 4, *hessians.shape[1:]).sum(axis=1)
    error = per_copy.std(axis=0, ddof=1) / np.sqrt(copies)
    got = np.asarray(fisher(params, inputs[:4], np.ones(4)))
    z = (got - per_copy.mean(axis=0)) / np.maximum(error, 1e-12)
    assert np.abs(z).max() < 4.5
    assert np.sqrt(np.mean(z**2)) < 2  # the entries are dependent


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_linear_regression_has_its_closed_form(fit_intercept):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(200, D)) @ rng.normal(size=(D, D)), rng.normal(size=200)
    w = rng.uniform(0.0, 2.0, 200)
    design = np.column_stack([x, np.ones(200)]) if fit_intercept else x
    gram = (design * w[:, None]).T @ design
    coefficients = np.linalg.solve(gram, design.T @ (w * y))
    residual = y - design @ coefficients
    sigma = np.sqrt(w @ residual**2 / w.sum())
    params = make_params(
        coefficients[None, :D],
        np.zeros((1, D)),
        np.asarray(sigma),
        np.asarray(coefficients[D] if fit_intercept else 0.0),
    )
    arrays = x, y, w
    information = fisher(params, arrays[0], arrays[2], "linear", "shared", fit_intercept)
    expected = np.zeros((len(gram) + 1,) * 2)
    expected[:-1, :-1], expected[-1, -1] = gram / sigma**2, 2 * w.sum()
    np.testing.assert_allclose(information, expected, atol=1e-10 * expected.max())

    regression = functools.partial(errors_of, params=params, noise="shared", fit_intercept=fit_intercept)
    observed = regression(covariance_of(params, *arrays, "linear", "shared", fit_intercept))
    inverse = np.linalg.inv(gram)
    classical = sigma * np.sqrt(np.diag(inverse))
    np.testing.assert_allclose(observed.experts[0], classical[:D], rtol=1e-10)
    np.testing.assert_allclose(observed.noise_std[0], sigma / np.sqrt(2 * w.sum()), rtol=1e-10)
    np.testing.assert_allclose(observed.expert_bias[0], classical[D] if fit_intercept else 0.0, rtol=1e-10)
    assert not np.any(observed.gating)
    assert not np.any(observed.gating_bias)

    sandwich = regression(covariance_of(params, *arrays, "linear", "shared", fit_intercept, "sandwich"))
    white = inverse @ ((design * (w * residual)[:, None] ** 2).T @ design) @ inverse  # White's HC0
    np.testing.assert_allclose(sandwich.experts[0], np.sqrt(np.diag(white))[:D], rtol=1e-9)


@pytest.mark.parametrize("noise", ["known", "per_expert"])
def test_sandwich_is_its_formula(noise):
    params, (x, y) = truth(), drawn()
    w = np.random.default_rng(1).uniform(0.0, 2.0, len(y))
    scores, hessians = (
        np.asarray(differentiated(params, x, y, "tanh", noise, True, hessian)) for hessian in (False, True)
    )
    bread = np.linalg.inv(np.einsum("n,npq->pq", w, hessians))
    filling = np.einsum("n,np,nq->pq", w**2, scores, scores)
    got = covariance_of(params, x, y, w, "tanh", noise, kind="sandwich")
    expected = bread @ filling @ bread
    np.testing.assert_allclose(got.matrix, expected, atol=1e-9 * np.abs(expected).max())
    scaled = covariance_of(params, x, y, 7.0 * w, "tanh", noise, kind="sandwich")
    np.testing.assert_allclose(scaled.matrix, got.matrix, rtol=1e-8, atol=1e-12)
    information = np.linalg.inv(bread)
    unit = np.sqrt(np.diag(information))
    assert float(got.condition) == pytest.approx(np.linalg.cond(information / np.outer(unit, unit)), rel=1e-6)


def test_weights_count_rows_where_there_are_kinks():
    params, (x, y) = truth(), drawn("relu")
    counts = np.random.default_rng(4).integers(0, 9, len(y))
    rows = np.repeat(np.arange(len(y)), counts)
    weighted, repeated = (
        covariance_of(params, x[of], y[of], np.asarray(weights, float), "relu").matrix
        for of, weights in ((slice(None), counts), (rows, np.ones(len(rows))))
    )
    np.testing.assert_allclose(weighted, repeated, rtol=1e-9)


def test_weights_count_rows():
    params, (x, y) = truth(), drawn()
    counts = np.random.default_rng(4).integers(0, 4, len(y))
    weighted = covariance_of(params, x, y, np.asarray(counts, float)).matrix
    rows = np.repeat(np.arange(len(y)), counts)
    repeated = covariance_of(params, x[rows], y[rows], np.ones(len(rows))).matrix
    np.testing.assert_allclose(weighted, repeated, rtol=1e-9)
    weighted = fisher(params, x, np.asarray(counts, float))
    np.testing.assert_allclose(weighted, fisher(params, x[rows], np.ones(len(rows))), rtol=1e-9, atol=1e-9)
    # a row of no weight may hold anything
    keep = np.asarray(counts > 0, float)
    junk = covariance_of(
        params,
        np.where(keep[:, None] > 0, x, np.nan),
        np.where(keep > 0, y, np.inf),
        keep,
        kind="sandwich",
    )
    clean = covariance_of(params, x, y, keep, kind="sandwich")
    np.testing.assert_array_equal(junk.matrix, clean.matrix)


def test_a_kink_counts_where_the_model_is_wrong():
    """relu(a x + b) fitted to a line: residuals at the kink are not of mean zero, and the kink is part of the Hessian."""
    x = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    y = 0.5 + 0.5 * x
    w = np.ones(len(x))

    def gradient(a, b):
        u = a * x + b
        residual = (y - np.maximum(u, 0)) * (u > 0) / 0.3**2
        return np.array([residual @ x, residual.sum()])

    a, b, h = 1.0, 0.2, 0.02
    by_differences = -np.stack(
        [
            (gradient(a + h, b) - gradient(a - h, b)) / (2 * h),
            (gradient(a, b + h) - gradient(a, b - h)) / (2 * h),
        ],
        axis=1,
    )
    params = make_params(np.asarray([[a]]), np.zeros((1, 1)), 0.3, b)
    observed = jax.jit(lambda *a: observed_information(*a, "relu", noise="known", fit_intercept=True))
    got = observed(params, x[:, None], y, w)
    np.testing.assert_allclose(got, by_differences, atol=0.01 * np.abs(by_differences).max())
    design = np.stack([x, w])[:, a * x + b > 0] / 0.3
    pointwise = design @ design.T
    assert np.abs(pointwise - by_differences).max() > 0.1 * np.abs(by_differences).max()


def test_kinked_informations_agree_where_the_model_is_true():
    params, n = truth(), 40_000
    x, y = drawn("relu", n)
    ones = np.ones(n)
    free = {"noise": "shared", "fit_intercept": True}
    expected = np.asarray(fisher(params, x, ones, "relu"))
    unit = np.sqrt(np.diag(expected))
    observed = jax.jit(lambda *a: observed_information(*a, "relu", **free))(params, x, y, ones)
    outer = jax.jit(lambda *a: score_outer_products(*a, "relu", **free))(params, x, y, ones)
    scores = np.asarray(differentiated(params, x, y, "relu", "shared", True, False)) / unit
    # the products' own scatter is the tolerance of J; the Hessian's is no larger
    scatter = np.sqrt(n) * (scores[:, :, None] * scores[:, None, :]).std(axis=0)
    for got in (observed, outer):
        z = (np.asarray(got) - expected) / np.outer(unit, unit) / scatter
        assert np.abs(z).max() < 5


MEAN = np.array([0.5, -1.0, 2.0])
MATRIX = np.array([[2.0, 0.3, 0.0], [0.1, 0.05, 0.4], [-1.0, 0.2, 0.7]])


def test_errors_in_other_units_are_those_of_the_model_in_those_units():
    """z = (x - mean) matrix: errors carried from z to x equal those of a model written in x."""
    params, (z, y) = truth(), drawn()
    ones = np.ones(len(y))
    x = z @ np.linalg.inv(MATRIX) + MEAN
    units = (MEAN, MATRIX)
    free = {"noise": "per_expert", "fit_intercept": True}
    in_x = in_input_units(params, *units)
    for kind in ("observed", "sandwich"):
        of_z = covariance_of(params, z, y, ones, noise="per_expert", kind=kind)
        carried = errors_of(of_z, params, **free, transform=lambda p: params_in_input_units(p, *units))
        direct = errors_of(covariance_of(in_x, x, y, ones, noise="per_expert", kind=kind), in_x, **free)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), carried, direct)


def test_collinear_inputs_through_the_map():
    """Two columns made into three: every coefficient has its error; directly in x the information is singular, and says so."""
    params, matrix = truth(k=2, d=2), MATRIX[:, :2]
    z, y, _ = jax.device_get(sample(jax.random.key(5), params, "tanh", 300))
    ones, free = np.ones(300), {"noise": "shared", "fit_intercept": False}
    of_z = covariance_of(params, z, y, ones, fit_intercept=False)
    units = (np.zeros(3), matrix)
    carried = errors_of(of_z, params, **free, transform=lambda p: params_in_input_units(p, *units))
    block = np.asarray(of_z.matrix)[2:4, 2:4]  # of the second expert
    np.testing.assert_allclose(carried.experts[1], np.sqrt(np.diag(matrix @ block @ matrix.T)), rtol=1e-9)
    jacobian = np.zeros((3, len(of_z.matrix)))
    jacobian[:, 2:4] = matrix
    moved = transformed(of_z, jacobian)
    np.testing.assert_allclose(moved.matrix, matrix @ block @ matrix.T, rtol=1e-9)

    x = z @ np.linalg.pinv(matrix)
    in_x = in_input_units(params, *units)
    of_x = covariance_of(in_x, x, y, ones, fit_intercept=False)
    assert np.isinf(of_x.condition)
    assert np.isfinite(of_z.condition)
    direct = errors_of(of_x, in_x, **free)
    assert np.isnan(direct.experts).all()
    np.testing.assert_allclose(direct.noise_std, carried.noise_std, rtol=1e-7)
    # what is identified keeps its error: the predictors along the inputs' own plane
    back = np.zeros((2, len(of_x.matrix)))
    back[:, 3:6] = np.linalg.pinv(matrix)
    recovered = transformed(of_x, back)
    np.testing.assert_allclose(recovered.matrix, block, rtol=1e-6)
    assert np.abs(recovered.null).max() < 1e-10 * np.abs(recovered.scale).max()


def test_a_repeated_column_loses_its_own_errors_only():
    params, (x, y) = truth(), drawn()
    ones = np.ones(len(y))
    whole = errors_of(covariance_of(params, x, y, ones), params, noise="shared", fit_intercept=True)
    half = params._replace(
        experts=np.concatenate([params.experts[:, :2], params.experts[:, 2:].repeat(2, 1) / 2], axis=1),
        gating=np.concatenate([params.gating[:, :2], params.gating[:, 2:].repeat(2, 1) / 2], axis=1),
    )
    repeated = np.concatenate([x, x[:, 2:]], axis=1)
    of_repeated = covariance_of(half, repeated, y, ones)
    got = errors_of(of_repeated, half, noise="shared", fit_intercept=True)
    assert np.isinf(of_repeated.condition)
    assert np.isnan(got.experts[:, 2:]).all()
    assert np.isnan(got.gating[0, 2:]).all()
    np.testing.assert_allclose(got.experts[:, :2], whole.experts[:, :2], rtol=1e-7)
    np.testing.assert_allclose(got.gating[0, :2], whole.gating[0, :2], rtol=1e-7)
    np.testing.assert_allclose(got.noise_std, whole.noise_std, rtol=1e-7)
    np.testing.assert_allclose(got.gating_bias, whole.gating_bias, rtol=1e-7)
    bound = bound_of(fisher(half, repeated, ones))
    assert np.isinf(bound.condition)
    assert np.isnan(errors_of(bound, half, noise="shared", fit_intercept=True).experts[:, 2:]).all()


def test_what_cannot_be_inverted_is_not_identified():
    params = truth()
    size = len(free_of(params, noise="shared", fit_intercept=True))
    for information in (np.zeros((size, size)), np.full((size, size), np.nan), -np.eye(size)):
        bound = bound_of(information)
        assert np.isinf(bound.condition)
        errors = errors_of(bound, params, noise="shared", fit_intercept=True)
        assert np.isnan(errors.experts).all()
        assert np.isnan(errors.noise_std).all()
        assert not np.any(errors.gating[-1])


def test_order_of_the_experts_does_not_matter():
    params, (x, y) = truth(), drawn()
    params = params._replace(noise_std=np.asarray([0.3, 0.5]))
    order, ones = np.asarray([1, 0]), np.ones(len(y))
    free = {"noise": "per_expert", "fit_intercept": True}
    carried = errors_of(
        covariance_of(params, x, y, ones, noise="per_expert"),
        params,
        **free,
        transform=lambda p: permute_experts(p, order),
    )
    permuted = permute_experts(params, order)
    direct = errors_of(covariance_of(permuted, x, y, ones, noise="per_expert"), permuted, **free)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), carried, direct)
    bounds = [bound_of(fisher(p, x, ones, noise="per_expert")).matrix for p in (params, permuted)]
    assert np.linalg.slogdet(bounds[0])[1] == pytest.approx(np.linalg.slogdet(bounds[1])[1], abs=1e-6)


def test_blocks_cover_the_free_parameters():
    params = make_params(
        np.full((K, D), 1.0), np.outer([2.0, 0.0], np.ones(D)), 0.5, 3.0, np.asarray([4.0, 0.0])
    )
    free = np.asarray(free_of(params, noise="per_expert", fit_intercept=True))
    blocks = parameter_blocks(K, D, noise="per_expert", fit_intercept=True)
    assert sorted(np.concatenate(list(blocks.values()))) == list(range(len(free)))
    np.testing.assert_allclose(free[blocks["experts"]], 1.0)
    np.testing.assert_allclose(free[blocks["gates"]], 2.0)
    np.testing.assert_allclose(free[blocks["noise"]], np.log(0.5))
    np.testing.assert_allclose(free[blocks["biases"]], [3.0, 3.0, 4.0])


def test_intervals():
    params = truth()
    errors = jax.tree.map(lambda leaf: np.full_like(leaf, 0.1), params)
    free = {"noise": "shared", "fit_intercept": False}
    low, high = confidence_intervals(params, errors, 0.9, **free)
    quantile = stats.norm.ppf(0.95)
    np.testing.assert_allclose(low.experts, params.experts - 0.1 * quantile, rtol=1e-12)
    np.testing.assert_allclose(high.gating_bias, params.gating_bias + 0.1 * quantile, rtol=1e-12)
    np.testing.assert_allclose(np.log(high.noise_std / low.noise_std), 2 * quantile / 3, rtol=1e-12)
    known = confidence_intervals(
        params, errors._replace(noise_std=np.zeros(K)), noise="known", fit_intercept=False
    )
    for end in known:
        np.testing.assert_array_equal(end.noise_std, params.noise_std)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1, got 95"):
        confidence_intervals(params, errors, 95, **free)
    with pytest.raises(ValueError, match="kind: expected 'observed' or 'sandwich', got 'hessian'"):
        covariance(
            params, *map(jnp.asarray, drawn()), "tanh", noise="shared", fit_intercept=True, kind="hessian"
        )


def test_noise_interval_is_about_the_unbiased_estimate():
    """In regression, E log sigma_hat = log sigma + (digamma((n - p) / 2) - log(n / 2)) / 2; the interval's centre corrects it."""
    n, p = 500, D + 1
    params = make_params(np.ones((1, D)), np.zeros((1, D)), 0.3, 1.0)
    x = jax.random.normal(jax.random.key(8), (n, D))
    information = fisher(params, x, np.ones(n), "linear", "shared", True)
    errors = errors_of(bound_of(information), params, noise="shared", fit_intercept=True)
    low, high = confidence_intervals(params, errors, noise="shared", fit_intercept=True)
    ends = np.asarray(low.noise_std), np.asarray(high.noise_std)
    shift = float(0.5 * np.log(ends[0] * ends[1] / 0.3**2)[0])
    bias = 0.5 * (special.digamma((n - p) / 2) - np.log(n / 2))
    assert bias == pytest.approx(-5 / 1000, rel=0.02)  # the fifth is the variance of the logarithm itself
    assert shift == pytest.approx(p / (2 * n), rel=1e-9)


def test_single_precision(single_precision):
    del single_precision
    arrays = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float32), (truth(), *drawn()))
    params, x, y = arrays
    with jax.default_matmul_precision("highest"):
        single = covariance_of(params, x, y, jnp.ones(len(y), jnp.float32), kind="sandwich")
        bound = bound_of(fisher(params, x, jnp.ones(len(y), jnp.float32)))
        errors = errors_of(single, params, noise="shared", fit_intercept=True)
    assert single.matrix.dtype == bound.matrix.dtype == jnp.float32
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(a), jnp.float64) for a in (x, y)]
        params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params)
        expected = covariance_of(params, *double, np.ones(len(y)), kind="sandwich")
        expected_bound = bound_of(fisher(params, double[0], np.ones(len(y))))
        expected_errors = errors_of(expected, params, noise="shared", fit_intercept=True)
    np.testing.assert_allclose(bound.condition, expected_bound.condition, rtol=1e-3)
    np.testing.assert_allclose(*(np.diag(np.asarray(b.matrix)) for b in (bound, expected_bound)), rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), errors, expected_errors)


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_the_maximum_is_efficient_and_covered(name):
    """error' I error / P has mean 1, and 90% intervals hold nine truths of ten, over 150 samples of a small model."""
    params, n, trials = truth(), 2000, 150
    fn, free = get_activation(name), {"noise": "shared", "fit_intercept": True}

    @jax.jit
    def run(keys, params):
        def trial(key):
            x, y, _ = sample(key, params, name, n)
            fitted = polish(params, x, y, jnp.ones(n), fn=fn, **free).params
            error = free_parameters(fitted, **free) - free_parameters(params, **free)
            information = fisher_information(params, x, name, num_nodes=41, **free)
            held = []
            for kind in ("observed", "sandwich"):
                errors = errors_of(covariance(fitted, x, y, name, kind=kind, **free), fitted, **free)
                low, high = confidence_intervals(fitted, errors, 0.9, **free)
                inside = jax.tree.map(
                    lambda a, b, t: ((a <= t) & (t <= b)).astype(x.dtype), low, high, params
                )
                # free_parameters takes the logarithm of the noise
                inside = inside._replace(noise_std=jnp.exp(inside.noise_std))
                held.append(free_parameters(inside, **free))
            return error @ information @ error / error.size, jnp.stack(held)

        return jax.lax.map(trial, keys)

    ratios, held = map(np.asarray, run(jax.random.split(jax.random.key(6), trials), params))
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(trials) + 0.02
    blocks = parameter_blocks(K, D, **free)
    for at in blocks.values():
        share = held[:, :, at].mean(axis=2)  # (trials, 2)
        error = share.std(axis=0) / np.sqrt(trials)
        assert np.all(np.abs(share.mean(axis=0) - 0.9) < 4 * error + 0.005)
