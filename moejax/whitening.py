"""Inputs in any units made white, and the parameters of the white ones given back in those units."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moejax.gaussian import Array
from moejax.model import MoEParams, regauge


class InputMap(NamedTuple):
    """z = (x - mean) @ matrix, with E[z z'] = I over the sample; `inverse` has matrix' columns as a pseudo-inverse."""

    mean: Array
    """(d,)"""
    matrix: Array
    """(d, r), r <= d the rank of the inputs."""
    dropped: int
    """d - r directions in which the inputs do not vary."""
    identity: bool
    """Whether the inputs were standard normal to sampling error, so that nothing was changed."""
    dependent: tuple[tuple[int, ...], ...] = ()
    """For each dropped direction, the columns whose combination does not vary."""


_COLLINEAR = 1e-10
"""Directions with less than this share of the largest variance do not vary."""
_ROUNDED = 1e-3
"""Nor do those with less than this share whose variance is what rounding the inputs makes."""
_ROUNDING_FACTOR = 4.0
"""Up to this multiple of the rounding's expected variance."""
_TAKES_PART = 0.05
"""A column belongs to a direction if its coefficient, for scaled inputs, is this share of the largest."""
_STANDARD_ERRORS = 5.0
"""Sample means and covariances within this many standard errors of N(0, I) count as standard."""


def input_map(x: np.ndarray, weights: np.ndarray, *, centre: bool) -> InputMap:
    """The whitening of the inputs, by the eigenvectors of their (centred) second moment.

    Args:
        x: (n, d) finite.
        weights: (n,).
        centre: subtract the mean, which a fit with intercepts can give back.
    """
    d = x.shape[1]
    share = weights / weights.sum()
    mean = share @ x
    second = (x * share[:, None]).T @ x
    effective = 1.0 / (share @ share)
    deviation = np.abs(second - np.eye(d)) / np.sqrt(1.0 + np.eye(d))
    standard = max(np.abs(mean).max(), deviation.max()) < _STANDARD_ERRORS / math.sqrt(effective)
    variances = np.linalg.eigvalsh(second - np.outer(mean, mean) if centre else second)
    if (
        standard and variances[0] > _COLLINEAR * variances[-1]
    ):  # few samples show collinear inputs as standard
        return InputMap(np.zeros(d), np.eye(d), 0, True)
    mean = mean if centre else np.zeros(d)
    scale = np.sqrt(share @ (x - mean) ** 2)
    scaled = (x - mean) / scale
    values, vectors = np.linalg.eigh((scaled * share[:, None]).T @ scaled)
    kept = varying(values, vectors, scaled[weights > 0])
    matrix = vectors[:, kept] / np.sqrt(values[kept])
    if kept.all():  # the symmetric root keeps every input recognisable
        matrix = (vectors / np.sqrt(values)) @ vectors.T
    dropped = vectors[:, ~kept]
    return InputMap(mean, matrix / scale[:, None], dropped.shape[1], False, columns_of(dropped))


def varying(values: np.ndarray, vectors: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """(d,) bool: which principal directions of the inputs vary, by more than rounding.

    Shares of a whole that are given to three digits sum to one but for rounding: what varies there says nothing. A column rounded
    to steps of h has errors of variance h^2 / 12, so that a direction v then varies by sum v_i^2 h_i^2 / 12.

    Args:
        values: (d,) variances.
        vectors: (d, d) directions in columns.
        scaled: (n, d) inputs of unit variance, or zero.
    """
    steps = np.diff(np.sort(scaled, axis=0), axis=0)
    steps = np.where(steps > 1e-9, steps, np.inf).min(axis=0, initial=np.inf)
    rounding = (np.where(np.isfinite(steps), steps, 0.0) ** 2 / 12) @ vectors**2
    largest = max(values.max(), np.finfo(float).tiny)
    is_rounding = (values <= _ROUNDED * largest) & (values <= _ROUNDING_FACTOR * rounding)
    return (values > _COLLINEAR * largest) & ~is_rounding


def columns_of(directions: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """For each of the directions (d, s), the columns that take part in it."""
    sizes = np.abs(directions.T)
    return tuple(tuple(np.flatnonzero(row > _TAKES_PART * row.max()).tolist()) for row in sizes)


def params_in_input_units(params: MoEParams, mean: Array, matrix: Array) -> MoEParams:
    """Parameters for z = (x - mean) @ matrix turned into parameters for x: a_x = matrix a_z, b_x = b_z - a_x . mean.

    Args:
        params: of k experts of r inputs z.
        mean: (d,).
        matrix: (d, r).
    """
    experts, gating = params.experts @ matrix.T, params.gating @ matrix.T
    biases = (params.expert_bias - experts @ mean, params.gating_bias - gating @ mean)
    return regauge(MoEParams(experts, gating, params.noise_std, *biases))
