"""Trials: a batch equals a loop, neighbours and padding do not matter, nothing is compiled twice, bad settings are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from compiled_model import compilations, make_params

import moejax
from moejax.likelihood.predictors import num_free_parameters
from moejax.model.activations import register_activation
from moejax.sweep.trial.measures import METRICS, NUM_HELD_OUT, recovery_metrics
from moejax.sweep.trial.prepare import prepare, static_spec, trial_memory_bytes
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings, check_settings
from moejax.sweep.trial.trial import draw_trial, run_trials

DATA = DataSettings(activation="tanh", dim=4, num_experts=2, num_samples=900, noise_std=0.1)
ALGORITHM = AlgorithmSettings(max_iterations=15, num_restarts=4, record=("history",))


def stacked(data_list, algorithm=ALGORITHM):
    specs, hyperparameters = zip(*(prepare(data, algorithm) for data in data_list), strict=True)
    assert len(set(specs)) == 1
    return specs[0], jax.tree.map(lambda *leaves: np.stack(leaves), *hyperparameters)


CELLS = [
    dataclasses.replace(DATA, num_samples=n, noise_std=s)
    for n, s in ((900, 0.1), (1000, 0.2), (600, 0.1), (1024, 0.3))
]
KEYS = jax.random.split(jax.random.key(7), 4)


@pytest.fixture(scope="module")
def loop():
    spec, hyperparameters = stacked(CELLS)
    return spec, hyperparameters, run_trials(KEYS, hyperparameters, spec)


@pytest.mark.slow
def test_trials_recover_the_experts(loop):
    _, _, result = loop
    assert np.all(np.asarray(result.status) == 0)
    assert np.all(np.asarray(result.recovery_error) < 0.02)
    assert np.all(np.asarray(result.gating_error) < 0.5)
    assert np.all(np.asarray(result.mixing_error) < 0.1)
    np.testing.assert_array_equal(result.noise_error, 0.0)
    # the best prediction leaves the noise and the choice of expert
    assert np.all(np.asarray(result.predictive_rmse) > [0.1, 0.2, 0.1, 0.3])
    gap = np.asarray(result.log_likelihood_per_sample - result.held_out_log_likelihood)
    assert np.all(np.abs(gap) < 0.1)
    assert result.history.shape[0] == 4
    assert np.all(np.isfinite(result.history[:, 0]))


def close(one, other, rows=slice(None)):
    for name in METRICS:
        a, b = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))[rows]
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(one.status, np.asarray(other.status)[rows])
    np.testing.assert_array_equal(one.num_iterations, np.asarray(other.num_iterations)[rows])


@pytest.mark.slow
def test_side_by_side_equals_one_after_another(loop):
    spec, hyperparameters, result = loop
    close(run_trials(KEYS, hyperparameters, spec, vmap_width=2), result)


@pytest.mark.slow
def test_a_trial_does_not_depend_on_its_neighbours_or_the_chunk(loop):
    spec, hyperparameters, result = loop
    order = np.array([2, 0, 3, 1])
    permuted = run_trials(KEYS[order], jax.tree.map(lambda leaf: leaf[order], hyperparameters), spec)
    close(permuted, result, order)
    # a neighbour that fails: a NaN noise
    broken = hyperparameters._replace(
        scales=hyperparameters.scales._replace(noise_std=np.array([0.1, np.nan, 0.1, 0.3]))
    )
    failed = run_trials(KEYS, broken, spec)
    assert int(failed.status[1]) != 0
    others = np.array([0, 2, 3])
    close(jax.tree.map(lambda leaf: leaf[others], failed), result, others)


@pytest.mark.slow
def test_key_data_and_keys_are_the_same(loop):
    spec, hyperparameters, result = loop
    close(run_trials(jax.random.key_data(KEYS), hyperparameters, spec), result)


@pytest.mark.slow
def test_sample_size_noise_and_scales_cost_no_compilation(loop):
    other = [
        dataclasses.replace(c, num_samples=c.num_samples - 80, gating_norm=2.0, expert_correlation=0.2)
        for c in CELLS
    ]
    spec, hyperparameters = stacked(other)
    assert spec == loop[0]
    with compilations() as events:
        again = run_trials(KEYS, hyperparameters, spec)
        jax.block_until_ready(again)
    assert not events
    assert not np.allclose(again.recovery_error, loop[2].recovery_error, rtol=1e-3)


@pytest.mark.slow
def test_the_kind_of_transform_costs_no_compilation(loop):
    spec, hyperparameters = stacked(CELLS, dataclasses.replace(ALGORITHM, transform="polynomial"))
    assert spec == loop[0]
    assert not np.allclose(
        hyperparameters.transforms[0].high.coefficients, loop[1].transforms[0].high.coefficients
    )
    with compilations() as events:
        again = run_trials(KEYS, hyperparameters, spec)
        jax.block_until_ready(again)
    assert not events
    # where the trial estimates the noise it makes its own
    specs = {
        prepare(DATA, dataclasses.replace(ALGORITHM, noise_knowledge="estimated", transform=kind))[0]
        for kind in ("polynomial", "weighted")
    }
    assert len(specs) == 2


@pytest.mark.parametrize(("num_samples", "padded"), [(100, 256), (900, 1024), (1024, 1024), (1025, 2048)])
def test_samples_are_padded_to_a_power_of_two(num_samples, padded):
    data = dataclasses.replace(DATA, num_samples=num_samples)
    assert static_spec(data, ALGORITHM).padded_num_samples == padded


@pytest.mark.slow
def test_padding_changes_no_number(loop):
    """Not even where the sample is smaller than a block of draws."""
    _, hyperparameters, expected = loop
    result = run_trials(KEYS, hyperparameters, prepare(CELLS[0], ALGORITHM, 3000)[0])
    for name in ("recovery_error", "gating_error", "held_out_log_likelihood", "num_iterations"):
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_padding_does_not_hurt_an_activation_with_a_cusp_at_zero():
    register_activation("cube_root", jnp.cbrt)
    algorithm = dataclasses.replace(ALGORITHM, method="joint_em", max_iterations=200, record=())
    cells = [
        dataclasses.replace(DATA, activation="cube_root", num_samples=n) for n in (1000, 1000, 1024, 1024)
    ]
    spec, hyperparameters = stacked(cells, algorithm)
    assert spec.padded_num_samples == 1024
    result = run_trials(KEYS[np.array([2, 3, 2, 3])], hyperparameters, spec)
    assert np.all(np.asarray(result.status) == 0)
    assert np.all(np.asarray(result.recovery_error) < 1e-3)


@pytest.mark.slow
def test_the_polish_raises_the_likelihood_of_the_moments_on_the_same_data(loop):
    """Methods share an instance's data: the sample comes from the key alone."""
    spec, hyperparameters = stacked(CELLS, dataclasses.replace(ALGORITHM, method="spectral", record=()))
    moments = run_trials(KEYS, hyperparameters, spec)
    assert moments.history is None
    assert np.all(
        np.asarray(moments.log_likelihood_per_sample) < np.asarray(loop[2].log_likelihood_per_sample)
    )
    assert np.all(np.asarray(moments.recovery_error) > np.asarray(loop[2].recovery_error))


@pytest.mark.slow
def test_estimated_noise():
    data = dataclasses.replace(DATA, activation="relu", num_samples=4000)
    spec, hyperparameters = stacked(
        [data] * 2, dataclasses.replace(ALGORITHM, method="spectral", noise_knowledge="estimated")
    )
    result = run_trials(KEYS[:2], hyperparameters, spec)
    assert np.all(np.asarray(result.recovery_error) < 0.1)
    assert np.all(np.asarray(result.noise_error) < 0.1)
    assert np.all(np.asarray(result.noise_error) > 0)


@pytest.mark.slow
def test_unequal_shares_of_the_experts_are_drawn_and_found():
    data = dataclasses.replace(DATA, activation="linear", num_samples=4000, gating_norm=0.0, gating_bias=1.5)
    spec, hyperparameters = stacked([data] * 2, dataclasses.replace(ALGORITHM, fit_intercept=True))
    result = run_trials(KEYS[:2], hyperparameters, spec)
    assert np.all(np.asarray(result.recovery_error) < 0.02)
    assert np.all(np.asarray(result.mixing_error) < 0.05)
    drawn = jax.jit(functools.partial(draw_trial, spec=spec))(
        KEYS[0], jax.tree.map(lambda leaf: leaf[0], hyperparameters)
    )
    # without gates of their own the shares are those of the intercepts 1.5 and 0
    np.testing.assert_allclose(drawn.truth.gating_bias, [1.5, 0.0])


@pytest.mark.slow
def test_a_trial_of_a_mean_fit_predicts_as_the_fit_of_its_data():
    data = dataclasses.replace(DATA, activation="linear", dim=3, num_samples=256, gating_norm=3.0)
    algorithm = AlgorithmSettings(method="mean_fit", noise_knowledge="estimated", num_starts=2)
    spec, hyperparameters = stacked([data] * 2, algorithm)
    result = run_trials(KEYS[:2], hyperparameters, spec)
    np.testing.assert_array_equal(result.status, 0)
    draw = jax.jit(functools.partial(draw_trial, spec=spec))
    for i in range(2):
        drawn = jax.device_get(draw(KEYS[i], jax.tree.map(lambda leaf, i=i: leaf[i], hyperparameters)))
        fitted = moejax.fit(
            jax.random.key(0), drawn.x, drawn.y, num_experts=2, method="mean_fit", num_starts=2
        )
        assert fitted.status == "ok"
        gates = scipy.special.softmax(drawn.held_out_x @ fitted.params.gating.T, axis=1)
        predicted = np.sum(gates * (drawn.held_out_x @ fitted.params.experts.T), axis=1)
        rmse = np.sqrt(np.mean((drawn.held_out_y - predicted) ** 2))
        assert float(result.predictive_rmse[i]) == pytest.approx(rmse, rel=0.01)
        # the noise of the labels around their mean includes the choice of the expert
        assert rmse > data.noise_std


@pytest.mark.slow
@pytest.mark.parametrize("fitted", [1, 2, 3])
def test_metrics_with_more_or_fewer_experts_than_true_ones(fitted):
    rng = np.random.default_rng(0)
    truth = make_params(jnp.eye(2, 4), jnp.asarray(rng.normal(size=(2, 4))), 0.1)
    estimate = make_params(jnp.eye(3, 4)[::-1][:fitted], jnp.asarray(rng.normal(size=(fitted, 4))), 0.1)
    true_mixing, mixing = jnp.asarray([0.25, 0.75]), jnp.full(fitted, 1 / fitted)
    recovery, gating, mixing = recovery_metrics(truth, estimate, true_mixing, mixing, jnp.tanh)
    # the rows of the estimate are e_3, e_2, e_1: three hold both true ones, two hold one and one orthogonal to it
    assert float(recovery) == {2: 1.0, 3: 0.0}.get(fitted, pytest.approx(np.nan, nan_ok=True))
    assert np.isnan(gating) == np.isnan(mixing) == (fitted != 2)
    if fitted == 2:
        assert float(mixing) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("num_experts", 0),
        ("num_experts", 5),
        ("num_samples", 0),
        ("num_samples", 13),
        ("noise_std", 0.0),
        ("noise_std", -1.0),
        ("noise_std", float("nan")),
        ("gating_norm", -0.5),
        ("gating_norm", float("inf")),
        ("gating_angle", 91.0),
        ("expert_correlation", 1.0),
        ("expert_correlation", -1.0),
        ("expert_norms", (1.0, 1.0, 1.0)),
        ("expert_norms", (1.0, -1.0)),
        ("gating_bias", 1.0),
        ("gating_bias", float("nan")),
        ("activation", "tahn"),
        ("input_distribution", "normal_standard"),
        ("method", "spectral_me"),
        ("fit_activation", "reluu"),
        ("fit_num_experts", 5),
        ("fit_num_experts", -1),
        ("fit_num_experts", 0),
        ("noise_knowledge", "guessed"),
        ("transform", "heavy"),
        ("order", 2),
        ("num_restarts", 0),
        ("num_starts", 0),
        ("max_iterations", 0),
        ("record", ("everything",)),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(field, value):
    is_data = field in {f.name for f in dataclasses.fields(DataSettings)}
    data = dataclasses.replace(DATA, **({field: value} if is_data else {}))
    algorithm = dataclasses.replace(ALGORITHM, **({} if is_data else {field: value}))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        check_settings(data, algorithm)
    message = str(refusal.value)
    assert field.removeprefix("fit_") in message
    shown = list(value) if field == "record" else value
    assert repr(shown) in message
    assert "\n" not in message


def test_gates_cannot_be_orthogonal_to_all_directions():
    with pytest.raises(ValueError, match=r"gating_angle: expected 0 where dim = num_experts"):
        check_settings(dataclasses.replace(DATA, dim=2), ALGORITHM)
    check_settings(dataclasses.replace(DATA, dim=2, gating_angle=0.0), ALGORITHM)
    check_settings(DATA, ALGORITHM)


def test_smallest_sample_and_number_of_parameters():
    assert (
        num_free_parameters(2, 4, "shared", fit_intercept=False) == 13
    )  # 8 of experts, 4 of one gate, 1 of noise
    check_settings(dataclasses.replace(DATA, num_samples=14), ALGORITHM)


def test_activation_without_a_usable_order_is_refused_where_moments_are_used():
    data = dataclasses.replace(DATA, activation="sigmoid", noise_std=1.0)
    with pytest.raises(ValueError, match=r"activation: sigmoid has no usable order at noise_std 1: .*E\[l_"):
        prepare(data, ALGORITHM)
    with pytest.raises(ValueError, match=r"order: abs has no usable order 3 at noise_std 0.1: c_3 = 0"):
        prepare(dataclasses.replace(DATA, activation="abs"), dataclasses.replace(ALGORITHM, order=3))
    spec, hyperparameters = prepare(data, dataclasses.replace(ALGORITHM, method="joint_em"))
    assert spec.method == "joint_em"
    assert hyperparameters.transforms == ()
    assert prepare(dataclasses.replace(DATA, activation="abs"), ALGORITHM)[0].orders == (4,)


def test_a_name_that_is_registered_again_is_the_new_function():
    data = dataclasses.replace(DATA, activation="changing")
    register_activation("changing", jnp.tanh)
    assert static_spec(data, ALGORITHM).orders == (3,)
    register_activation("changing", jnp.abs)
    assert static_spec(data, ALGORITHM).orders == (4,)


def test_memory_estimate_covers_the_sample():
    spec = static_spec(DATA, ALGORITHM)
    assert trial_memory_bytes(spec) > 8 * (spec.padded_num_samples + NUM_HELD_OUT) * DATA.dim
    larger = dataclasses.replace(spec, padded_num_samples=2**20)
    assert trial_memory_bytes(larger) > 8 * 2**20 * DATA.dim


@pytest.mark.slow
def test_error_of_the_moments_falls_like_one_over_n():
    medians = []
    for n in (2**12, 2**15):
        data = DataSettings(activation="linear", dim=6, num_experts=2, num_samples=n)
        spec, hyperparameters = stacked([data] * 40, AlgorithmSettings(method="spectral", num_restarts=4))
        result = run_trials(jax.random.split(jax.random.key(0), 40), hyperparameters, spec)
        assert np.all(np.asarray(result.status) == 0)
        medians.append(np.median(result.recovery_error))
    # the logarithm of a median of 40 has a standard error of about 0.15
    assert np.diff(np.log(medians))[0] / np.log(8.0) == pytest.approx(-1.0, abs=0.25)
