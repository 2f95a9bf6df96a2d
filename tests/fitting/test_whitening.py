"""Which directions of the inputs vary, and the map that makes the inputs white."""

import numpy as np
import pytest

from moejax.fitting.whitening import input_map

N = 400


def whitened(x):
    inputs = input_map(x, np.ones(len(x)), centre=True)
    z = (x - inputs.mean) @ inputs.matrix
    np.testing.assert_allclose(z.T @ z / len(x), np.eye(z.shape[1]), atol=1e-6)
    return inputs


def shares(digits=None):
    of_five = np.random.default_rng(0).dirichlet(np.ones(5), size=N)
    other = np.random.default_rng(1).normal(size=(N, 1))
    return np.hstack([other, of_five if digits is None else of_five.round(digits)])


def test_shares_of_a_whole_lose_a_direction():
    inputs = whitened(shares())
    assert inputs.dropped == 1
    assert inputs.dependent == ((1, 2, 3, 4, 5),)


@pytest.mark.parametrize("digits", [4, 2])
def test_shares_that_were_rounded_keep_it_and_are_named(digits):
    inputs = whitened(shares(digits))
    assert inputs.dropped == 0
    assert inputs.nearly_dependent == ((1, 2, 3, 4, 5),)


def test_whole_numbers_and_cents_that_differ_by_a_step_are_kept():
    rng = np.random.default_rng(0)
    birth = rng.integers(1950, 2020, N).astype(float)
    bid = rng.integers(10_000, 20_000, N) / 100.0
    for other, column in ((birth + rng.integers(6, 8, N), birth), (bid + rng.integers(1, 3, N) / 100.0, bid)):
        inputs = whitened(np.column_stack([column, other]))
        assert inputs.dropped == 0
        assert inputs.nearly_dependent == ((0, 1),)


def test_sums_and_products_of_columns_are_dependent_in_the_precision_they_were_made_in():
    x = np.random.default_rng(0).normal(size=(N, 2)) + np.array([1e6, -3.0])
    total = 3.0 * x[:, 0] - 7.0 * x[:, 1]
    assert whitened(np.column_stack([x, total])).dependent == ((0, 1, 2),)
    single = np.column_stack([x, total]).astype(np.float32).astype(float)
    weights = np.ones(N)
    assert input_map(single, weights, centre=True).dropped == 0
    assert input_map(single, weights, centre=True, precision=float(np.finfo(np.float32).eps)).dropped == 1


def test_columns_that_hardly_vary_are_constant_or_kept():
    rng = np.random.default_rng(0)
    for size, constant in ((0.0, (1,)), (1e-15, (1,)), (1e-12, ())):
        x = np.column_stack([rng.normal(size=N), 1.0 + size * rng.normal(size=N)])
        inputs = whitened(x)
        assert inputs.constant == constant
        assert np.all(np.isfinite(inputs.matrix))
        assert np.all((inputs.matrix[1] == 0.0) == bool(constant))
    # without an intercept a constant column is one like others
    assert input_map(np.column_stack([x[:, 0], np.full(N, 2.0)]), np.ones(N), centre=False).dropped == 0


@pytest.mark.parametrize("factor", [1e-160, 1e160])
def test_columns_of_any_size_are_whitened(factor):
    x = np.random.default_rng(0).normal(size=(N, 3)) @ np.array(
        [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]
    )
    plain, scaled = (input_map(a, np.ones(N), centre=True) for a in (x, factor * x + 3.0 * factor))
    np.testing.assert_allclose(factor * scaled.matrix, plain.matrix, rtol=1e-10)


def test_columns_without_coefficients_in_double_precision_are_refused():
    x = np.random.default_rng(0).normal(size=(N, 2)) * [1.0, 1e-300]
    with pytest.raises(ValueError, match="x: expected columns that vary by 1e-280 to 1e\\+280, column 1"):
        input_map(x, np.ones(N), centre=True)


def test_inputs_that_nearly_depend_but_for_no_rounding_are_kept():
    x = np.random.default_rng(0).normal(size=(N, 2))
    nearly = np.hstack([x, x[:, :1] + 1e-4 * np.random.default_rng(1).normal(size=(N, 1))])
    assert whitened(nearly).dependent == ()
    assert whitened(nearly).nearly_dependent == ((0, 2),)


def test_counts_and_indicators_are_kept():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.integers(0, 2, N), rng.integers(0, 3, N), rng.poisson(40.0, N)]).astype(float)
    assert whitened(x).dropped == 0


def test_a_full_set_of_indicators_loses_a_direction():
    x = np.eye(4)[np.random.default_rng(0).integers(0, 4, N)]
    assert whitened(x).dependent == ((0, 1, 2, 3),)


def test_rows_of_no_weight_say_nothing():
    x = np.vstack([shares(), shares()[:1] + 1e-3])
    assert input_map(x, np.append(np.ones(N), 0.0), centre=True).dropped == 1


def test_a_direction_that_hardly_varies_does_not_spoil_the_others():
    """Inputs that differ by 1e-12 of themselves only: what is fitted to z is fitted to x, to rounding."""
    x = 1.0 + 5e-12 * np.random.default_rng(0).normal(size=(N, 2))
    inputs = input_map(x, np.ones(N), centre=False)
    assert inputs.matrix.shape == (2, 2)
    z = x @ inputs.matrix
    coefficients = np.linalg.lstsq(z, np.ones(N), rcond=None)[0]
    np.testing.assert_allclose(x @ (inputs.matrix @ coefficients), z @ coefficients, rtol=1e-10)
    np.testing.assert_allclose(z @ coefficients, 1.0, rtol=1e-10)
