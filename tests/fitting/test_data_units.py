"""Units of labels, and parameters and errors carried into the user's units, against closed forms and a direct fit."""

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.fitting.data_units import DataUnits
from moejax.fitting.label_units import LabelMap, activation_range, fitted_labels, is_linear, labels_note
from moejax.fitting.result import FitResult, FittedInOwnUnits
from moejax.fitting.whitening import input_map, params_in_input_units
from moejax.likelihood.information import covariance, standard_errors
from moejax.model.activations import get_activation
from moejax.moments.orders import why_unusable

N = 4000


def labels_of(name, noise_std, scale=1.0, seed=0):
    """x (n, 3) and y = scale (g(x_1) + noise): one expert of norm `scale`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 3))
    g = np.asarray(get_activation(name)(jnp.asarray(x[:, 0])))
    return x, scale * (g + noise_std * rng.normal(size=N))


@pytest.mark.parametrize("name", ["linear", "relu", "abs", "leaky_relu"])
@pytest.mark.parametrize("known", [False, True])
def test_norm_and_noise_of_homogeneous_experts_are_found_in_any_unit(name, known):
    for scale in (1.0, 1e-20, 300.0):
        x, y = labels_of(name, 0.5, scale)
        noise_std = np.asarray(0.5 * scale) if known else None
        options = {"fit_intercept": False, "noise_std": noise_std, "standardise": True}
        found = fitted_labels(x, y, np.ones(N), get_activation(name), **options)
        # a norm is known to some 1 / sqrt(n) = 1.6%; a linear g's, from the trace of T2, to twice that, and then the noise, as the
        # root of 1 - norm^2, to 10%
        unsure = name == "linear" and not known
        assert float(found.map.scale) == pytest.approx(scale, rel=0.1)
        assert float(found.noise_std) == pytest.approx(0.5, rel=0.3 if unsure else 0.1)


def test_labels_that_are_noise_still_have_transforms():
    options = {"fit_intercept": False, "noise_std": None, "standardise": True}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(300, 5)), rng.normal(size=300)
        found = fitted_labels(x, y, np.ones(300), get_activation("linear"), **options)
        assert why_unusable(get_activation("linear"), float(found.noise_std), 3) == ""


def test_labels_of_other_activations_stay_as_they_are():
    x, y = labels_of("sigmoid", 0.1)
    options = {"fit_intercept": True, "noise_std": None, "standardise": True}
    found = fitted_labels(x, y, np.ones(N), get_activation("sigmoid"), **options)
    assert (found.map.shift, found.map.scale) == (0.0, 1.0)
    assert float(found.noise_std) == pytest.approx(0.1, rel=0.1)


def test_a_linear_activation_takes_up_a_shift():
    x, y = labels_of("linear", 0.5, 7.0)
    options = {"fit_intercept": True, "noise_std": None, "standardise": True}
    found = fitted_labels(x, y + 1e6, np.ones(N), get_activation("linear"), **options)
    assert found.map.shift == pytest.approx(1e6 + y.mean())
    assert is_linear(lambda t: 1.0 * t)
    assert not is_linear(jnp.tanh)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tanh", (-1, 1)),
        ("relu", (0, np.inf)),
        ("linear", (-np.inf, np.inf)),
        ("cos", (-1, 1)),
        ("elu", (-1, np.inf)),
    ],
)
def test_ranges(name, expected):
    np.testing.assert_allclose(activation_range(get_activation(name)), expected, atol=1e-5)


def test_labels_outside_a_range_are_said_and_noise_is_not():
    fn = get_activation("sigmoid")
    y = np.linspace(-0.5, 1.0, 300)
    assert "33% of the labels lie outside the range [0, 1]" in labels_note(y, np.ones(300), fn, "sigmoid")
    _, inside = labels_of("sigmoid", 0.05)
    assert labels_note(inside, np.ones(N), fn, "sigmoid") is None
    assert labels_note(y, np.ones(300), get_activation("linear"), "linear") is None
    assert labels_note(y, (y > 0).astype(float), fn, "sigmoid") is None  # rows without weight


def drawn(fit_intercept):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 2))
    params = compiled_model.make_params(
        np.array([[1.0, -0.5], [0.2, 0.8]]),
        np.array([[0.7, 0.3], [0.0, 0.0]]),
        0.4,
        np.array([0.5, -1.0]) * fit_intercept,
        np.array([0.3, 0.0]) * fit_intercept,
    )
    y, _ = compiled_model.sample_labels(jax.random.key(0), params, "linear", z)
    return z, jax.device_get(params), np.asarray(y, np.float64)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("noise", ["shared", "per_expert", "known"])
def test_errors_are_those_of_the_delta_method(noise, fit_intercept):
    """Against derivatives of the whole transformation, by automatic differentiation."""
    z, params, y = drawn(fit_intercept)
    mixing = np.array([[2.0, 0.5], [0.0, 0.1]])
    x = z @ np.linalg.inv(mixing) + (np.array([3.0, -20.0]) if fit_intercept else 0.0)
    inputs = input_map(x, np.ones(len(x)), centre=fit_intercept)._replace(
        mean=np.array([3.0, -20.0]) * fit_intercept, matrix=mixing
    )
    units = DataUnits(inputs, LabelMap(11.0 * fit_intercept, 2.5))
    free = {"noise": noise, "fit_intercept": fit_intercept}
    of = jax.device_get(jax.jit(lambda *a: covariance(*a, "linear", **free))(params, z, y))

    def in_units(p):
        scaled = p._replace(
            experts=2.5 * p.experts,
            noise_std=2.5 * p.noise_std,
            expert_bias=2.5 * p.expert_bias + units.labels.shift,
        )
        return params_in_input_units(scaled, inputs.mean, mixing)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), units.params(params), in_units(params)
    )
    expected = jax.jit(lambda *a: standard_errors(*a, **free, transform=in_units))(of, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12),
        units.errors(of, params, **free),
        expected,
    )


def made(fit_intercept):
    """A result of `fit` in the units of z, without a fit."""
    z, params, _ = drawn(fit_intercept)
    inputs = input_map(z, np.ones(len(z)), centre=fit_intercept)._replace(mean=np.zeros(2), matrix=np.eye(2))
    fitted = FittedInOwnUnits(params, None, DataUnits(inputs, LabelMap(0.0, 1.0)), "shared", fit_intercept)
    host = params._replace(**{name: np.asarray(leaf) for name, leaf in params._asdict().items()})
    return FitResult(host, 0.0, np.zeros(0), {}, "ok", _fitted=fitted)


def test_units_that_the_fit_does_not_admit_are_refused():
    mean, std = np.array([3.0, -20.0]), np.array([2.0, 0.5])
    params, errors = made(True).in_units(mean, std, 1.0, 4.0)
    assert errors is None
    np.testing.assert_allclose(params.experts, made(True).params.experts * std / 4.0)
    for name, given in (
        ("input_mean", (mean[:1], std)),
        ("input_std", (mean, np.array([1.0, 0.0]))),
        ("input_std", (mean, std[:, None])),
        ("target_std", (mean, std, 0.0, -1.0)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            made(True).in_units(*given)
    made(False).in_units(0.0 * mean, std)
    with pytest.raises(ValueError, match=r"^input_mean: expected zero for a fit without intercepts"):
        made(False).in_units(mean, std)
    with pytest.raises(ValueError, match=r"^target_mean: expected zero for a fit without intercepts"):
        made(False).in_units(0.0 * mean, std, 1.0)


@pytest.mark.slow
def test_a_fit_is_the_same_in_any_units(single_precision):
    """Also in single precision: the units are carried through in double."""
    z, _, y = drawn(True)
    options = {
        "num_experts": 2,
        "fit_intercept": True,
        "method": "joint_em",
        "num_starts": 5,
        "max_iterations": 300,
    }
    plain = moejax.fit(jax.random.key(1), z, y, **options)
    assert plain.status == "ok"
    for x_scale, x_shift, y_scale, y_shift in (
        (1.0, 1e8, 1.0, 0.0),
        (1e20, 0.0, 1e-20, 1e-14),
        (1e-160, 0.0, 1e100, 0.0),
    ):
        other = moejax.fit(jax.random.key(1), x_scale * z + x_shift, y_scale * y + y_shift, **options)
        assert other.status == "ok"
        value = other.log_likelihood + len(y) * np.log(y_scale)
        assert value == pytest.approx(plain.log_likelihood, abs=0.05)
        np.testing.assert_allclose(
            other.params.experts * x_scale / y_scale,
            plain.params.experts,
            atol=0.01 * np.abs(plain.params.experts).max(),
        )
        np.testing.assert_allclose(
            other.standard_errors.experts * x_scale / y_scale, plain.standard_errors.experts, rtol=0.05
        )
        # the parameters give the likelihood that was reported
        with jax.enable_x64(True):
            x = jnp.asarray(x_scale * z + x_shift)
            labels = jnp.asarray(y_scale * y + y_shift)
            again = float(compiled_model.log_likelihood(other.params, x, labels, "linear"))
        assert again == pytest.approx(other.log_likelihood, abs=0.05)


@pytest.mark.slow
def test_weights_without_a_scale_have_none():
    z, _, y = drawn(True)
    options = {"fit_intercept": True, "method": "joint_em", "num_starts": 5, "max_iterations": 300}
    plain, shares = (
        moejax.fit(jax.random.key(1), z, y, num_experts=[1, 2, 3], weights=weights, **options)
        for weights in (None, np.full(300, 1 / 300))
    )
    assert (plain.settings["weights_are"], shares.settings["weights_are"]) == ("counts", "reliability")
    np.testing.assert_allclose(shares.selection["bic"], plain.selection["bic"], rtol=1e-6)
    np.testing.assert_allclose(shares.standard_errors.experts, plain.standard_errors.experts, rtol=1e-4)
    tenfold = moejax.fit(jax.random.key(1), z, y, num_experts=2, weights=np.full(300, 10.0), **options)
    two = moejax.fit(jax.random.key(1), z, y, num_experts=2, **options)
    np.testing.assert_allclose(
        tenfold.standard_errors.experts, two.standard_errors.experts / np.sqrt(10.0), rtol=1e-3
    )


def test_unequal_reliabilities_count_as_their_effective_number():
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    resolved, kind = moejax.fitting.preparation.rescaled_weights(weights, None)
    assert kind == "reliability"
    assert resolved.sum() == pytest.approx(1.0 / (0.5**2 + 2 * 0.25**2))
    np.testing.assert_allclose(resolved / resolved.sum(), weights)


@pytest.mark.parametrize("noise_std", [1e308, 1e200])
@pytest.mark.parametrize("num_experts", [1, 2])
def test_a_known_noise_beyond_all_squares_is_one_line(noise_std, num_experts):
    """Its ratio to the labels' spread has no finite square: the noise is refused, not the arithmetic."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)), 1e-3 * rng.normal(size=60)
    options = {"num_experts": num_experts, "noise_std": noise_std, "method": "joint_em"}
    with pytest.raises(ValueError, match=r"^noise_std: expected .* got 1e\+\d+$"):
        moejax.fit(jax.random.key(0), x, y, **options)


def test_one_expert_and_a_known_noise_without_a_finite_square(recwarn):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)), rng.normal(size=60)
    for noise_std in (1e-200, 1e200):
        model = moejax.MoERegressor(num_experts=1, noise_std=noise_std).fit(x, y)
        line = np.linalg.lstsq(np.column_stack([x, np.ones(60)]), y, rcond=None)[0]
        np.testing.assert_allclose(model.predict(x), x @ line[:2] + line[2], rtol=1e-6, atol=1e-9)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
