"""The registry of activations: names, facts, derivatives, and what it refuses."""

import functools

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

import moejax
from moejax.methods import register_method, require_slopes
from moejax.model.activations import (
    activation_derivatives,
    activation_facts,
    activation_name,
    activation_names,
    apply_activation,
    get_activation,
    register_activation,
)
from moejax.moments.spectral import host_transforms, spectral_estimate
from moejax.sweep import trial

REFERENCE = {
    "linear": lambda t: t,
    "relu": lambda t: np.maximum(t, 0),
    "leaky_relu": lambda t: np.where(t > 0, t, 0.01 * t),
    "elu": lambda t: np.where(t > 0, t, np.expm1(t)),
    "gelu": lambda t: t * special.ndtr(t),
    "silu": lambda t: t * special.expit(t),
    "softplus": lambda t: np.logaddexp(t, 0),
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "erf": special.erf,
    "sin": np.sin,
    "abs": np.abs,
    "square": np.square,
    "cos": np.cos,
}
EVEN = {"abs", "square", "cos"}
ODD = {"linear", "sigmoid", "tanh", "erf", "sin"}
KINKED = {"relu", "leaky_relu", "abs"}


def test_all_fourteen_are_registered():
    assert set(activation_names()) >= set(REFERENCE)


@pytest.mark.parametrize("name", REFERENCE)
def test_values_and_facts(name):
    t = np.linspace(-4.0, 4.0, 33)
    fn = get_activation(name)
    np.testing.assert_allclose(
        apply_activation(fn, jnp.asarray(t)), REFERENCE[name](t), rtol=1e-12, atol=1e-12
    )
    facts = activation_facts(fn)
    assert facts.parity == ("even" if name in EVEN else "odd" if name in ODD else "none")
    assert facts.kinked == (name in KINKED)
    assert not facts.constant
    moment = [
        integrate.quad(lambda z: REFERENCE[name](z) ** power * stats.norm.pdf(z), -9, 9, points=[0])[0]  # noqa: B023
        for power in (1, 2)
    ]
    assert facts.standard_deviation == pytest.approx(np.sqrt(moment[1] - moment[0] ** 2), rel=1e-5)
    fine = np.linspace(-8.5, 8.5, 200_001)
    slope = np.abs(np.diff(REFERENCE[name](fine)) / np.diff(fine)).max()
    assert facts.largest_slope == pytest.approx(slope, rel=2e-3)


def test_derivatives_of_smooth_and_kinked_activations():
    t = jnp.asarray([-1.3, 0.4, 2.0])
    g, slope, second = activation_derivatives(jnp.tanh, t)
    np.testing.assert_allclose(g, np.tanh(t), rtol=1e-14)
    np.testing.assert_allclose(slope, 1 - np.tanh(t) ** 2, rtol=1e-13)
    np.testing.assert_allclose(second, -2 * np.tanh(t) * (1 - np.tanh(t) ** 2), rtol=1e-12)
    # averaged over [t - w, t + w]: at the kink of |t| the slope is t / w, the second derivative the jump, 2 / 2w
    width = jnp.asarray(0.5)
    t = jnp.asarray([-2.0, 0.1, 3.0])
    g, slope, second = activation_derivatives(jnp.abs, t, width)
    np.testing.assert_allclose(g, np.abs(t))
    np.testing.assert_allclose(slope, [-1.0, 0.2, 1.0], rtol=1e-12)
    np.testing.assert_allclose(second, [0.0, 2.0, 0.0], atol=1e-12)


def test_derivatives_are_zero_at_a_cusp_and_on_a_flat_side():
    t = jnp.asarray([-1.0, 0.0, 8.0])
    _, slope, second = activation_derivatives(jnp.cbrt, t)
    np.testing.assert_allclose(slope, [1 / 3, 0.0, 1 / 12], rtol=1e-12)
    np.testing.assert_allclose(second, [2 / 9, 0.0, -1 / 144], rtol=1e-12)
    np.testing.assert_allclose(jax.grad(lambda s: apply_activation(jnp.cbrt, s).sum())(t), slope)
    # JAX itself says infinity times zero below 0
    _, slope, second = activation_derivatives(lambda t: jnp.maximum(t, 0.0) ** 1.5, t)
    np.testing.assert_allclose(slope, [0.0, 0.0, 1.5 * np.sqrt(8)], rtol=1e-12)
    np.testing.assert_allclose(second, [0.0, 0.0, 0.75 / np.sqrt(8)], rtol=1e-12)
    assert activation_facts(lambda t: jnp.sqrt(jnp.maximum(t, 0.0))).kinked


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown name 'sigmoyd'; did you mean sigmoid"):
        get_activation("sigmoyd")


def test_functions_are_accepted_where_names_are():
    def cube(t):
        return t**3

    assert get_activation(cube) is cube
    assert activation_name(cube) == "cube"
    register_activation("third_power", cube)
    assert get_activation("third_power") is cube
    assert activation_name(cube) == "third_power"
    assert activation_name("third_power") == "third_power"


def _opaque(t):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct((), t.dtype), t, vmap_method="broadcast_all")


@pytest.mark.parametrize(
    ("name", "fn", "message"),
    [
        ("not a name", jnp.tanh, "identifier"),
        ("", jnp.tanh, "identifier"),
        ("vector", lambda t: jnp.stack([t, t]), "scalar JAX function"),
        ("whole", lambda t: jnp.asarray(1), "one real number"),
        ("logarithm", jnp.log, "finite values"),
        ("failing", lambda t: t if t > 0 else 0.0, "calling it failed"),
        ("without_result", lambda t: None, "calling it failed: AttributeError"),
        ("without_key", lambda t: {}["a"], "calling it failed: KeyError: 'a'"),
        (
            "infinity_times_zero",
            lambda t: t + jnp.sqrt(jnp.maximum(t, 0.0)),
            r"slope that JAX finds, got nan at -8\.5",
        ),
        (
            "no_second_slope",
            lambda t: t**2 + jnp.maximum(t, 0.0) ** 1.5,
            r"second derivative that JAX finds, got nan at -8\.5",
        ),
        ("opaque", _opaque, "JAX differentiates, but that failed: Pure callbacks do not support JVP"),
    ],
)
def test_refused_registrations(name, fn, message):
    with pytest.raises(ValueError, match=message):
        register_activation(name, fn)
    assert name not in activation_names()


def test_a_host_function_that_is_no_jax_function_is_refused():
    def with_numpy(t):
        return np.tanh(np.asarray(t))

    with pytest.raises(ValueError, match="calling it failed"):
        register_activation("host", with_numpy)


def test_constant_and_shifted_parity():
    assert activation_facts(lambda t: 0.0 * t + 3.0).constant
    assert activation_facts(lambda t: 5.0 + jnp.sin(t)).parity == "odd"
    assert activation_facts(lambda t: 5.0 + jnp.cos(t)).parity == "even"
    assert activation_facts(lambda t: jnp.cos(t) + 0.01 * t).parity == "none"
    assert activation_facts(lambda t: jnp.maximum(t - 0.7123, 0.0)).kinked


STEPS = {
    "step": lambda t: jnp.where(t > 0.3, 1.0, 0.0),
    "sign": jnp.sign,
    "staircase": lambda t: jnp.floor(2.0 * t),
    "rounded": lambda t: jnp.round(jnp.sin(t), 1),
    "without a gradient": lambda t: jax.lax.stop_gradient(jnp.tanh(t)),
    "too steep to see": lambda t: jax.nn.sigmoid(1e9 * (t - 0.001)),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_functions_are_known(name):
    assert activation_facts(STEPS[name]).stepped


@pytest.mark.parametrize(
    "fn",
    [
        *REFERENCE,
        lambda t: 0.0 * t,
        lambda t: jnp.where(t > 0.3, 1.0 + t, t),
        lambda t: jax.nn.sigmoid(50.0 * t),
        lambda t: jnp.maximum(t - 6.0, 0.0),
        jnp.cbrt,
        lambda t: jnp.sqrt(jnp.maximum(t, 0.0)),
        lambda t: 1e-200 * t,
    ],
)
def test_functions_with_a_slope_are_no_step_functions(fn):
    assert not activation_facts(get_activation(fn)).stepped


def test_methods_that_climb_refuse_a_step_function():
    stairs = register_activation("stairs", STEPS["staircase"])
    x = np.random.default_rng(0).normal(size=(60, 2))
    y = np.floor(2.0 * x[:, 0]) + 0.1 * x[:, 1]
    words = r"^activation: expected a function with a slope for method '.*', got stairs, which changes in jumps only"
    for method in ("multistart", "joint_em", "gradient_nll", "spectral_em"):
        with pytest.raises(ValueError, match=words):
            moejax.fit(jax.random.key(0), x, y, num_experts=2, activation=stairs, method=method)
    with pytest.raises(ValueError, match=words):
        moejax.MoERegressor(2, "stairs").fit(x, y)
    data = trial.DataSettings(activation="stairs", num_samples=1000, dim=4, num_experts=2)
    with pytest.raises(ValueError, match=words):
        trial.check_settings(data, trial.AlgorithmSettings(method="joint_em"))
    with pytest.raises(ValueError, match="fit_" + words[1:]):
        trial.check_settings(data, trial.AlgorithmSettings(method="joint_em", fit_activation="stairs"))
    trial.check_settings(data, trial.AlgorithmSettings(method="joint_em", fit_activation="linear"))
    for method, polish in (("spectral", True), ("spectral_residual", True), ("spectral_em", False)):
        require_slopes(method, stairs, polish=polish)
        trial.check_settings(data, trial.AlgorithmSettings(method=method, polish=polish))
    with pytest.raises(ValueError, match="slopes: expected one of used, polish, unused, got 'never'"):
        register_method("mine", lambda key, problem, config: None, moments="none", slopes="never")


def test_moments_recover_the_experts_of_a_staircase():
    truth = compiled_model.make_params(np.eye(2, 4), np.diag([0.0, 0.0, 2.0, 0.0])[[2, 0]], 0.5)
    x, y, _ = compiled_model.sample(jax.random.key(0), truth, STEPS["staircase"], 20_000)
    transforms = host_transforms(STEPS["staircase"], 0.5, 3, "weighted", 2)
    estimate = jax.jit(functools.partial(spectral_estimate, num_experts=2, order=3))
    found = estimate(jax.random.key(1), x, y, transforms)
    assert compiled_model.recovery_error(truth.experts, found.experts) < 0.1


def test_the_advice_of_a_refused_slope_works():
    facts = activation_facts(lambda t: t + jnp.where(t > 0, jnp.sqrt(jnp.where(t > 0, t, 1.0)), 0.0))
    assert not facts.stepped


def test_apply_activation_keeps_shape_and_dtype():
    t = jnp.zeros((2, 0, 3), jnp.float32)
    out = apply_activation(jax.nn.relu, t)
    assert out.shape == (2, 0, 3)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("fn", [jax.nn.relu, jax.nn.silu, jnp.tanh])
def test_facts_are_found_inside_a_program_that_is_being_traced(fn):
    def fresh(t):  # not in any cache yet
        return fn(t)

    inside = jax.jit(jax.vmap(lambda s: s * activation_facts(fresh).largest_slope))(jnp.ones(2))
    np.testing.assert_allclose(inside, activation_facts(fn).largest_slope, rtol=1e-6)
