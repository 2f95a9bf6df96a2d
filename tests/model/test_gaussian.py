"""Gaussian quadrature and Hermite polynomials against NumPy, SciPy and closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import hermite_e
from scipy import integrate, stats

from moejax.model.gaussian import gaussian_grid, hermite_polynomials


def test_hermite_polynomials_are_those_of_numpy():
    z = np.linspace(-4.0, 4.0, 17)
    expected = np.stack([hermite_e.hermeval(z, np.eye(5)[m]) for m in range(5)])
    np.testing.assert_allclose(hermite_polynomials(jnp.asarray(z), 4), expected, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(hermite_polynomials(z, 4, xp=np), expected, rtol=1e-13, atol=1e-12)
    assert hermite_polynomials(z, 0, xp=np).shape == (1, 17)


def test_hermite_polynomials_are_orthogonal_with_squared_norm_m_factorial():
    grid = gaussian_grid(2049, xp=np)
    he = hermite_polynomials(grid.nodes, 4, xp=np)
    np.testing.assert_allclose((he * grid.weights) @ he.T, np.diag([1.0, 1.0, 2.0, 6.0, 24.0]), atol=1e-11)


@pytest.mark.parametrize(
    "function",
    [
        np.tanh,
        np.cos,
        lambda z: np.maximum(z, 0.0),
        lambda z: np.abs(z - 1.0),
        lambda z: np.where(z > 0, z, np.expm1(z)),
    ],
    ids=["tanh", "cos", "relu", "kink off the grid", "elu"],
)
def test_expectations_agree_with_adaptive_quadrature(function):
    grid = gaussian_grid(2049, xp=np)
    for power in (1, 2):
        expected, _ = integrate.quad(
            lambda z, power=power: function(z) ** power * stats.norm.pdf(z),
            -9,
            9,
            points=[0, 1],
            epsabs=1e-12,
        )
        assert grid.weights @ function(grid.nodes) ** power == pytest.approx(expected, abs=1e-5)


def test_grid_contains_zero_and_refuses_an_even_number_of_nodes():
    grid = gaussian_grid(101)
    assert abs(float(grid.nodes[50])) < 1e-15
    assert float(grid.weights.sum()) == pytest.approx(1.0, abs=1e-14)
    with pytest.raises(ValueError, match=r"num_nodes.*odd.*100"):
        gaussian_grid(100)
