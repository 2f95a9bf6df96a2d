"""Which directions of the inputs vary, and the map that makes the inputs white."""

import numpy as np
import pytest

from moejax.whitening import input_map

N = 400


def whitened(x):
    inputs = input_map(x, np.ones(len(x)), centre=True)
    z = (x - inputs.mean) @ inputs.matrix
    np.testing.assert_allclose(z.T @ z / len(x), np.eye(z.shape[1]), atol=1e-6)
    return inputs


@pytest.mark.parametrize("digits", [None, 4, 3, 2])
def test_shares_of_a_whole_lose_a_direction_however_they_were_rounded(digits):
    shares = np.random.default_rng(0).dirichlet(np.ones(5), size=N)
    other = np.random.default_rng(1).normal(size=(N, 1))
    inputs = whitened(np.hstack([other, shares if digits is None else shares.round(digits)]))
    assert inputs.dropped == 1
    assert inputs.dependent == ((1, 2, 3, 4, 5),)


def test_inputs_that_nearly_depend_but_for_no_rounding_are_kept():
    x = np.random.default_rng(0).normal(size=(N, 2))
    nearly = np.hstack([x, x[:, :1] + 1e-4 * np.random.default_rng(1).normal(size=(N, 1))])
    assert whitened(nearly).dependent == ()


def test_counts_and_indicators_are_kept():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.integers(0, 2, N), rng.integers(0, 3, N), rng.poisson(40.0, N)]).astype(float)
    assert whitened(x).dropped == 0


def test_a_full_set_of_indicators_loses_a_direction():
    x = np.eye(4)[np.random.default_rng(0).integers(0, 4, N)]
    assert whitened(x).dependent == ((0, 1, 2, 3),)


def test_rows_of_no_weight_say_nothing_of_rounding():
    shares = np.random.default_rng(0).dirichlet(np.ones(5), size=N).round(3)
    x = np.vstack([shares, shares[:1] + 1e-4])
    assert input_map(x, np.append(np.ones(N), 0.0), centre=True).dropped == 1
