"""What a fit says in words, on data that break one assumption each."""

import compiled_model
import jax
import numpy as np
import pytest

import moejax
from moejax.fitting.diagnostics import _gate_angle

QUICK = {"num_experts": 2, "fit_intercept": True, "method": "spectral_em", "noise_std": None}


def sample(n=3000, *, gate=(0.0, 0.0, 1.5), second=(0.0, 1.0, 0.0)):
    truth = compiled_model.make_params(
        np.array([[1.0, 0.0, 0.0], second]), np.array([gate, (0.0, 0.0, 0.0)]), 0.1
    )
    x, y, _ = compiled_model.sample(jax.random.key(0), truth, "linear", n)
    return np.asarray(x), np.asarray(y)


def test_angle_of_a_gate_to_the_experts():
    experts = np.eye(3)[:2]
    assert _gate_angle(experts, np.array([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])) == pytest.approx(90.0)
    assert _gate_angle(experts, np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])) == pytest.approx(45.0)
    assert np.isnan(_gate_angle(experts, np.zeros((2, 3))))
    # an input of the gates of its own, with correlation 0.8 to the experts' first one: cos of the angle is 0.8
    angle = _gate_angle(np.eye(2), np.array([[2.0], [0.0]]), np.array([[0.8], [0.0]]))
    assert angle == pytest.approx(np.degrees(np.arccos(0.8)))


@pytest.mark.slow
def test_notes_name_the_assumption_that_fails():
    good = moejax.fit(jax.random.key(1), *sample(), **QUICK)
    assert good.diagnostics["notes"] == []
    assert good.diagnostics["gate_angle_degrees"] > 80
    assert sum(good.diagnostics["effective_samples"]) == pytest.approx(3000)
    # linear: the most that any l(Y) can have is that of He_m(Y / s), s^2 = 1 + sigma^2, which is s^-m
    signal = good.diagnostics["transform_signal"]
    for order in (2, 3):
        assert 0.3 < signal[order] <= 1.01 ** (-order / 2) + 1e-6

    oblique = moejax.fit(jax.random.key(1), *sample(gate=(1.2, 0.0, 1.2)), **QUICK)
    assert any("a gate is at" in note for note in oblique.diagnostics["notes"])
    uneven = moejax.fit(jax.random.key(1), *sample(second=(0.0, 2.0, 0.0)), **QUICK)
    assert any("norms" in note for note in uneven.diagnostics["notes"])
    x, y = sample()
    heavy = np.sign(x) * np.abs(x) ** 1.5
    labels = np.where(np.arange(len(y)) % 2, heavy[:, 0], heavy[:, 1]) + 0.1 * np.random.default_rng(
        0
    ).normal(size=len(y))
    tails = moejax.fit(jax.random.key(1), heavy, labels, **QUICK)
    assert any("not normal" in note for note in tails.diagnostics["notes"])


@pytest.mark.slow
def test_moments_alone_name_what_they_do_not_check():
    x, y = sample()
    alone = moejax.fit(jax.random.key(1), x, y, num_experts=2, method="spectral")
    (unchecked,) = [note for note in alone.diagnostics["notes"] if note.startswith("not checked")]
    assert "norm 1" in unchecked
    assert "gates orthogonal" in unchecked
    assert alone.diagnostics["input_mean"] < 0.1
    assert not any("mean of the inputs" in note for note in alone.diagnostics["notes"])
    with pytest.raises(ValueError, match=r"no standard errors, because method 'spectral' .*spectral_em"):
        alone.intervals()
    # a mean that is large compared with the spread makes nearly all of the root mean square of one direction
    shifted = moejax.fit(jax.random.key(1), x + 5.0, y, num_experts=2, method="spectral")
    assert shifted.diagnostics["input_mean"] == pytest.approx(np.sqrt(75 / 76), abs=0.01)
    assert any("fit_intercept=True subtracts it" in note for note in shifted.diagnostics["notes"])


@pytest.mark.slow
def test_noise_that_runs_off_to_zero_is_reported():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 1))
    y = np.where(x[:, 0] > 1.9, 3.0 * x[:, 0], rng.normal(size=300))  # exact on a few rows
    assert 2 < np.sum(x[:, 0] > 1.9) < 10
    result = moejax.fit(
        jax.random.key(0),
        x,
        y,
        num_experts=2,
        fit_intercept=True,
        noise="per_expert",
        method="joint_em",
        num_starts=5,
    )
    assert len(result.diagnostics["collapsed_experts"]) == 1
    assert "ran off to zero" in result.status
    assert result.standard_errors is None
    with pytest.raises(ValueError, match="no standard errors"):
        result.intervals()


@pytest.mark.slow
def test_standard_errors_of_one_linear_expert_are_those_of_least_squares():
    x, y = sample(500)
    result = moejax.fit(
        jax.random.key(0), 3.0 * x + 1.0, y, num_experts=1, fit_intercept=True, method="joint_em"
    )
    design = np.concatenate([3.0 * x + 1.0, np.ones((500, 1))], axis=1)
    coefficients, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = residual[0] / 500
    expected = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    np.testing.assert_allclose(result.standard_errors.experts[0], expected[:3], rtol=1e-3)
    np.testing.assert_allclose(result.standard_errors.expert_bias[0], expected[3], rtol=1e-3)
    np.testing.assert_allclose(result.standard_errors.noise_std[0], np.sqrt(variance / 1000), rtol=1e-3)
    lower, upper = result.intervals(0.9)
    np.testing.assert_allclose(lower.experts[0], coefficients[:3] - 1.6448536 * expected[:3], rtol=1e-3)
    np.testing.assert_allclose(
        np.log(upper.noise_std / lower.noise_std), 2 * 1.6448536 / np.sqrt(1000), rtol=1e-3
    )
