"""The method for many inputs: against spectral_em, the maximum by SciPy's conjugate gradients, and its costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import moejax
from moejax import log_likelihood, recovery_error
from moejax.fitting.whitening import column_map, params_in_input_units
from moejax.methods import MethodConfig, Problem, get_method
from moejax.methods.spectral_wide import span_of, wide_ridge
from moejax.model.activations import get_activation
from moejax.model.instances import InstanceScales, random_params
from moejax.model.mixture import MoEParams, sample
from moejax.model.status import Status
from moejax.moments.spectral import host_transforms

NOISE = 0.1


@functools.cache
def planted(name="linear", dim=50, num_experts=3, num_samples=12_000, dtype="float64"):
    scales = InstanceScales(*(jnp.asarray(v) for v in (NOISE, 2.0, 90.0, 0.0)), jnp.ones(num_experts))
    params = random_params(jax.random.key(0), scales, dim)
    x, y, _ = jax.jit(sample, static_argnums=(2, 3))(jax.random.key(1), params, name, num_samples)
    order = 4 if name == "abs" else 3
    transforms = host_transforms(name, NOISE, order, "weighted", num_experts)
    problem = Problem(x, y, jnp.ones(num_samples), jnp.asarray(NOISE), transforms)
    return params, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem)


@functools.partial(jax.jit, static_argnames=("name", "config"))
def compiled(key, problem, name, config):
    with jax.default_matmul_precision("highest"):
        return get_method(name)(key, problem, config)


def run(problem, activation="linear", name="spectral_wide", num_experts=3, key=2, **changes):
    order = 4 if activation == "abs" else 3
    config = MethodConfig(fn=get_activation(activation), num_experts=num_experts, order=order, **changes)
    return compiled(jax.random.key(key), problem, name, config)


def error_of(params, result, **how):
    return float(recovery_error(np.asarray(params.experts), np.asarray(result.params.experts, float), **how))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["linear", "relu", "abs"])
def test_it_ends_where_spectral_em_ends(activation):
    """With few inputs for the rows the ridge on the gates matters little; abs is order 4, where signs are free."""
    params, problem = planted(activation)
    wide, dense = (run(problem, activation, name) for name in ("spectral_wide", "spectral_em"))
    assert int(wide.status) == Status.OK
    even = activation == "abs"
    errors = [error_of(params, result, even=even) for result in (wide, dense)]
    assert errors[0] < 1.1 * errors[1] < 1e-3
    values = [float(log_likelihood(r.params, problem.x, problem.y, activation)) for r in (wide, dense)]
    # of 250 coefficients: the last round gains less than 1.25 nats, the ridge of 50 / 9 costs about as much
    assert values[1] - values[0] < 4.0
    np.testing.assert_allclose(wide.mixing_weights.sum(), 1.0, rtol=1e-6)
    history = np.asarray(wide.history)
    assert np.all(np.diff(history[np.isfinite(history)]) > -1e-6)


@pytest.mark.slow
def test_its_maximum_is_that_of_the_penalised_likelihood():
    """SciPy's L-BFGS, in all coordinates, climbs no higher from there than the last round may miss."""
    _, problem = planted(dim=60, num_experts=2, num_samples=3000)
    result = run(problem, num_experts=2)
    ridge = wide_ridge(0.0, 60)

    @jax.jit
    def loss(flat):
        rows = flat[:-1].reshape(3, 60)
        gating = jnp.concatenate([rows[2:], jnp.zeros_like(rows[:1])])
        at = MoEParams(rows[:2], gating, jnp.full(2, jnp.exp(flat[-1])), jnp.zeros(2), jnp.zeros(2))
        penalty = 0.5 * ridge * jnp.sum((gating - gating.mean(axis=0, keepdims=True)) ** 2)
        return penalty - log_likelihood(at, problem.x, problem.y, "linear")

    found = result.params
    start = np.concatenate([found.experts.ravel(), found.gating[0], np.log(found.noise_std[:1])])
    slope = jax.jit(jax.grad(loss))
    best = scipy.optimize.minimize(
        lambda flat: float(loss(jnp.asarray(flat))),
        start,
        jac=lambda flat: np.asarray(slope(jnp.asarray(flat))),
        method="L-BFGS-B",
        options={"maxiter": 500},
    )
    assert 0.0 <= float(loss(jnp.asarray(start))) - best.fun < 0.01 * 180 / 2
    history = np.asarray(result.history)
    assert history[np.isfinite(history)][-1] == pytest.approx(-float(loss(jnp.asarray(start))), abs=1e-6)


@pytest.mark.slow
def test_near_the_threshold_the_rounds_find_what_the_moments_do_not():
    """n / d = 10: the moments' span is noisy, and the likelihood's maximum is near the truth."""
    params, problem = planted(dim=400, num_experts=2, num_samples=4000, dtype="float32")
    result = run(problem, num_experts=2)
    assert int(result.status) == Status.OK
    alone = result._replace(params=result.params._replace(experts=result.spectral.experts))
    assert error_of(params, alone) > 0.1
    assert error_of(params, result) < 0.003
    assert result.params.experts.dtype == jnp.float32
    # the eigenvalues of T2 that were found, and the largest that noise makes
    assert result.spectral.second_moment_eigenvalues.shape == (3,)


@pytest.mark.slow
def test_rows_of_weight_zero_may_hold_any_values_and_weights_are_repetitions():
    _, problem = planted(dim=20, num_experts=2, num_samples=3000)
    counts = np.random.default_rng(0).integers(0, 3, 3000)
    repeated = np.repeat(np.arange(3000), counts)
    junk = counts == 0
    dirty = problem._replace(
        x=jnp.where(junk[:, None], jnp.nan, problem.x),
        y=jnp.where(junk, jnp.inf, problem.y),
        weights=jnp.asarray(counts, float),
    )
    plain = problem._replace(x=problem.x[repeated], y=problem.y[repeated], weights=jnp.ones(len(repeated)))
    results = [run(p, num_experts=2) for p in (dirty, plain)]
    # a hundredth of a standard error; the rounds need not end at the same point
    np.testing.assert_allclose(*(r.params.experts for r in results), atol=1e-4)
    np.testing.assert_allclose(*(r.params.gating for r in results), atol=1e-3)


@pytest.mark.slow
def test_a_known_noise_is_kept_and_without_the_polish_the_experts_are_those_of_the_moments():
    params, problem = planted(dim=20, num_experts=2, num_samples=3000)
    known = run(problem, num_experts=2, noise="known", record_path=True)
    np.testing.assert_allclose(known.params.noise_std, NOISE)
    assert int(known.status) == Status.OK
    last = np.flatnonzero(np.isfinite(np.asarray(known.history)))[-1]
    np.testing.assert_allclose(known.path.experts[last], known.params.experts, atol=1e-6)
    published = run(problem, num_experts=2, noise="known", polish=False)
    np.testing.assert_array_equal(published.params.experts, published.spectral.experts)
    # the gates, of norm 2, are found up to the error of the experts and of one gradient
    assert float(jnp.linalg.norm(published.params.gating[0])) == pytest.approx(2.0, abs=0.4)
    assert error_of(params, published) < 0.05


@pytest.mark.slow
def test_per_expert_noise_and_intercepts():
    random = np.random.default_rng(0)
    x = random.normal(size=(6000, 30)) + 3.0
    first = random.random(6000) < 1 / (1 + np.exp(-2.0 * (x[:, 2] - 3.0)))
    y = np.where(
        first, x[:, 0] + 0.1 * random.normal(size=6000), 1 + x[:, 1] + 0.3 * random.normal(size=6000)
    )
    options = {"num_experts": 2, "fit_intercept": True, "noise": "per_expert"}
    fits = [
        moejax.fit(jax.random.key(0), x, y, method=m, **options) for m in ("spectral_wide", "spectral_em")
    ]
    assert fits[0].status == "ok"
    order = [np.argsort(fit.params.noise_std) for fit in fits]
    for field in ("experts", "noise_std", "expert_bias"):
        found, expected = (getattr(fit.params, field)[o] for fit, o in zip(fits, order, strict=True))
        np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.slow
def test_fit_standardises_columns_gives_no_errors_and_reports_correlation():
    params, problem = planted(dim=20, num_experts=2, num_samples=3000)
    units = np.geomspace(0.1, 10.0, 20)
    x, y = np.asarray(problem.x) * units, np.asarray(problem.y)
    fit = functools.partial(moejax.fit, jax.random.key(0), num_experts=2, method="spectral_wide")
    result = fit(np.column_stack([x, np.zeros(3000)]), y)
    assert result.status == "ok"
    assert recovery_error(params.experts, result.params.experts[:, :-1] * units) < 1e-3
    np.testing.assert_array_equal(result.params.experts[:, -1], 0.0)
    assert result.diagnostics["constant_inputs"] == [20]
    assert result.diagnostics["gate_ridge"] == pytest.approx(21 / 9)
    assert result.standard_errors is None
    assert any(note.startswith("no standard errors") for note in result.diagnostics["notes"])
    with pytest.raises(ValueError, match="information matrix of all coefficients"):
        result.intervals()
    # sampling error only
    assert abs(result.diagnostics["input_correlation"]) < 0.03
    assert not any("correlated" in note for note in result.diagnostics["notes"])
    np.testing.assert_allclose(
        result.in_units(np.zeros(21), np.full(21, 2.0))[0].experts, 2 * result.params.experts
    )
    mixed = x.copy()
    mixed[:, 1::2] = 0.6 * mixed[:, ::2] / units[::2] + 0.8 * mixed[:, 1::2] / units[1::2]
    correlated = fit(mixed, y)
    # each column has one correlation of 0.6
    assert correlated.diagnostics["input_correlation"] == pytest.approx(0.36, abs=0.05)
    assert any("correlated" in note for note in correlated.diagnostics["notes"])
    with pytest.raises(ValueError, match=r"log_density: expected None for method 'spectral_wide'"):
        fit(x, y, log_density="shifted_normal")


def test_columns_are_standardised_by_themselves():
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 4)) * [1.0, 1e-3, 1e6, 0.0] + [0.0, 5.0, 1e6, 7.0]
    weights = random.integers(0, 3, 200).astype(float)
    for centre in (True, False):
        found = column_map(x, weights, centre=centre)
        z = found(x)
        squares = np.average(z**2, axis=0, weights=weights)
        np.testing.assert_allclose(squares, [1, 1, 1, 0 if centre else 1], rtol=1e-9)
        means = np.average(z[:, :3], axis=0, weights=weights)
        assert not centre or np.abs(means).max() < 1e-9
        assert (found.rank, found.constant) == ((3, (3,)) if centre else (4, ()))
        # the map of parameters is its transpose
        experts = random.normal(size=(2, 4))
        params = MoEParams(experts, 0 * experts, np.ones(2), np.zeros(2), np.zeros(2))
        given = params_in_input_units(params, found.mean, found.matrix)
        np.testing.assert_allclose(
            x @ given.experts.T + given.expert_bias, z @ experts.T, rtol=1e-7, atol=1e-7
        )
    with pytest.raises(ValueError, match="column 2"):
        column_map(x * [1.0, 1.0, 1e300, 1.0], weights, centre=False)


def test_a_span_is_orthonormal_and_has_its_directions():
    random = np.random.default_rng(0)
    x, directions = jnp.asarray(random.normal(size=(30, 12))), jnp.asarray(random.normal(size=(12, 4)))
    basis, inputs = span_of(directions, x)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(basis @ (basis.T @ directions), directions, atol=1e-12)
    np.testing.assert_allclose(inputs, x @ basis, atol=1e-12)


def test_no_array_of_d_squared_entries_is_formed_and_the_inputs_are_not_copied():
    dim, rows = 3000, 4096
    transforms = host_transforms("linear", NOISE, 3, "weighted", 2)
    problem = Problem(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), jnp.zeros(()), transforms)
    problem = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32), problem)
    shapes = {name: jax.ShapeDtypeStruct((rows,), jnp.float32) for name in ("y", "weights")}
    problem = problem._replace(x=jax.ShapeDtypeStruct((rows, dim), jnp.float32), **shapes)
    config = MethodConfig(fn=get_activation("linear"), num_experts=2, order=3)
    program = compiled.lower(jax.random.key(0), problem, "spectral_wide", config).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.8 * 4 * dim * min(dim, rows)
    assert "eigh" not in program.as_text() or f"[{dim},{dim}]" not in program.as_text()
