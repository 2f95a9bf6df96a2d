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


_COLLINEAR = 1e-10
"""Directions with less than this share of the largest variance are dropped."""
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
    kept = values > _COLLINEAR * values.max()
    matrix = vectors[:, kept] / np.sqrt(values[kept])
    if kept.all():  # the symmetric root keeps every input recognisable
        matrix = (vectors / np.sqrt(values)) @ vectors.T
    return InputMap(mean, matrix / scale[:, None], int(d - kept.sum()), False)


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
