"""Fits of nearly equal size share their programs, and the added rows change nothing."""

import compiled_model
import jax
import numpy as np
import pytest

import moejax
from moejax.fitting import preparation
from moejax.fitting.padding import padded, padded_size


def test_sizes_are_few_and_at_most_an_eighth_larger():
    sizes = np.array([padded_size(n) for n in range(1, 5000)])
    numbers = np.arange(1, 5000)
    assert (sizes >= numbers).all()
    assert (sizes[64:] <= 1.125 * numbers[64:]).all()
    assert set(sizes[sizes <= 256]) == {64, *range(72, 129, 8), *range(144, 257, 16)}


def test_added_rows_copy_a_row_of_positive_weight():
    weights, x, y = padded(np.array([0.0, 2.0]), np.array([[np.nan], [3.0]]), np.array([7.0, 5.0]))
    np.testing.assert_array_equal(weights, [0.0, 2.0] + 62 * [0.0])
    np.testing.assert_array_equal(x[1:, 0], np.full(63, 3.0))
    np.testing.assert_array_equal(y[1:], np.full(63, 5.0))


@pytest.fixture(scope="module")
def data():
    truth = compiled_model.make_params(np.eye(2, 3), np.diag([0.0, 0.0, 1.0])[[2, 0]], noise_std=0.3)
    x, y, _ = compiled_model.sample(jax.random.key(0), truth, "relu", 610)
    return np.asarray(x), np.asarray(y)


@pytest.mark.parametrize("method", ["spectral_em", "joint_em"])
def test_added_rows_change_nothing(data, method, monkeypatch):
    x, y = data
    fits = []
    for own_size in (False, True):
        if own_size:
            monkeypatch.setattr(preparation, "padded", lambda weights, *arrays: (weights, *arrays))
        fits.append(
            moejax.fit(
                jax.random.key(1), x, y, num_experts=2, activation="relu", method=method, start="kmeans"
            )
        )
    one, other = fits
    np.testing.assert_allclose(one.params.experts, other.params.experts, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, rtol=1e-10)
    np.testing.assert_allclose(one.standard_errors.experts, other.standard_errors.experts, rtol=1e-6)
    np.testing.assert_allclose(one.diagnostics["effective_samples"], other.diagnostics["effective_samples"])


def test_folds_of_different_size_compile_once(data):
    x, y = data
    programs = []

    def count(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            programs.append(name)

    options = {"num_experts": 2, "activation": "relu", "method": "spectral_em"}
    moejax.fit(jax.random.key(0), x[:601], y[:601], **options)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for n in (590, 605, 610):
            moejax.fit(jax.random.key(0), x[:n], y[:n], **options)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert programs == []
