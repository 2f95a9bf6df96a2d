"""Whitening of inputs in any units, or standardisation column by column, on the host in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moejax.model.mixture import HostParams, MoEParams, regauge


class InputMap(NamedTuple):
    """z = (x - mean) @ matrix, with E[z z'] = I over the sample; or z = (x - mean) * matrix, with E[z_i^2] = 1."""

    mean: np.ndarray
    """(d,)"""
    matrix: np.ndarray
    """(d, r), r <= d the rank of the inputs; rows of zeros for constant columns. Column by column, (d,), zero for these."""
    dropped: int
    """d - r: the number of directions in which the inputs do not vary, constant columns included."""
    identity: bool
    """True if the inputs were standard normal to sampling error, so that they were not changed."""
    dependent: tuple[tuple[int, ...], ...] = ()
    """For each dropped direction of columns that vary, the columns of the combination that does not vary."""
    constant: tuple[int, ...] = ()
    """The columns that do not vary."""
    nearly_dependent: tuple[tuple[int, ...], ...] = ()
    """For each kept direction that hardly varies, the columns that take part in it."""

    @property
    def column_wise(self) -> bool:
        """True if each column is standardised by itself."""
        return self.matrix.ndim == 1

    @property
    def rank(self) -> int:
        """The number of directions in which z varies."""
        return int(np.count_nonzero(self.matrix)) if self.column_wise else self.matrix.shape[1]

    @property
    def _keeps_columns(self) -> bool:
        """True if `matrix`, of zeros and ones, neither leaves columns out nor reorders them."""
        return self.matrix.shape[0] == self.matrix.shape[1] and bool(np.diag(self.matrix).all())

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The mapped inputs, (n, r) or (n, d), of x (n, d)."""
        if self.identity:
            return x if self._keeps_columns else x @ self.matrix
        return (x - self.mean) * self.matrix if self.column_wise else (x - self.mean) @ self.matrix


FLOAT_TOLERANCE = 64.0
"""Variation below this many units in the last place of double precision counts as the rounding of sums and products."""
STORED_TOLERANCE = 4.0
"""The tolerance for numbers given in a lower precision, to which they were rounded once."""
NEARLY_COLLINEAR = 30.0
"""Condition index from which a direction counts as nearly collinear (Belsley, Kuh and Welsch 1980)."""
LARGEST_SYMMETRIC = 1e5
"""Largest ratio of the spreads of two directions for which whitened inputs resemble the given ones."""
_TAKES_PART = 0.05
"""A column belongs to a direction if its coefficient, for scaled inputs, is this share of the largest."""
_STANDARD_ERRORS = 5.0
"""Sample means and covariances within this many standard errors of N(0, I) count as standard."""
_SPREAD_RANGE = (1e-280, 1e280)
"""Range of a column's spread; outside, its coefficients are not representable in double precision."""
_ENTRIES_AT_ONCE = 2**24
"""Entries of the inputs that are standardised at a time."""


class InputMoments(NamedTuple):
    """Moments of a sample of inputs, from which the whitening is made."""

    origin: np.ndarray
    """(d,) a point near the inputs, from which they are measured; zero if they are not centred."""
    size: np.ndarray
    """(d,) largest distance from the origin."""
    largest: np.ndarray
    """(d,) largest absolute value."""
    mean: np.ndarray
    """(d,) the mean's distance from the origin, in units of `steps`."""
    triangle: np.ndarray
    """(d, d) upper triangular R: R'R is the second moment about the mean (about zero if not centred), in units of `steps`."""
    effective: float
    """(sum w)^2 / sum w^2, the effective number of rows."""

    @property
    def steps(self) -> np.ndarray:
        """(d,) `size`, or one for a column that does not vary."""
        return np.where(self.size > 0, self.size, 1.0)


def input_moments(x: np.ndarray, weights: np.ndarray, *, centre: bool) -> InputMoments:
    """The moments of inputs x (n, d), finite, with weights (n,).

    Args:
        x: (n, d).
        weights: (n,); rows of weight zero are ignored.
        centre: measure from the mean.

    Raises:
        ValueError: a column's values are so large or small that its coefficients are not representable.
    """
    used = weights > 0
    x, share = x[used], weights[used] / weights[used].sum()
    d = x.shape[1]
    largest = np.abs(x).max(axis=0)
    origin = x[0] if centre else np.zeros(d)
    with np.errstate(over="ignore"):
        size = np.abs(x - origin).max(axis=0)
    require_range(size, largest)
    scaled = (x - origin) / np.where(size > 0, size, 1.0)
    mean = share @ scaled
    middle = mean if centre else np.zeros(d)
    triangle = np.asarray(np.linalg.qr((scaled - middle) * np.sqrt(share)[:, None], mode="r"))
    triangle = np.pad(triangle, [(0, d - len(triangle)), (0, 0)])
    return InputMoments(origin, size, largest, mean, triangle, 1.0 / float(share @ share))


def require_range(size: np.ndarray, largest: np.ndarray, first: int = 0) -> None:
    """Refuse columns whose coefficients double precision cannot represent.

    Args:
        size: (d,) largest distances from the origin.
        largest: (d,) largest absolute values.
        first: number of the first of these columns.

    Raises:
        ValueError: there is such a column.
    """
    bad = ~np.isfinite(size) | ((size > 0) & ((size < _SPREAD_RANGE[0]) | (largest > _SPREAD_RANGE[1])))
    if bad.any():
        column = int(np.argmax(bad))
        raise ValueError(
            f"x: expected columns that vary by {_SPREAD_RANGE[0]:.0e} to {_SPREAD_RANGE[1]:.0e}, column {first + column} "
            f"has values to {largest[column]:.3g} that vary by {size[column]:.3g}"
        )


def input_map(
    x: np.ndarray, weights: np.ndarray, *, centre: bool, precision: float = float(np.finfo(float).eps)
) -> InputMap:
    """The whitening of the inputs x (n, d) with weights (n,): `map_of_moments` of their `input_moments`."""
    return map_of_moments(input_moments(x, weights, centre=centre), centre=centre, precision=precision)


def column_map(
    x: np.ndarray, weights: np.ndarray, *, centre: bool, precision: float = float(np.finfo(float).eps)
) -> InputMap:
    """The standardisation of each column of x (n, d) by itself, without a (d, d) array.

    A column is constant if it varies by no more than the rounding of its numbers, as in `map_of_moments`.

    Args:
        x: (n, d), finite.
        weights: (n,); rows of weight zero are ignored.
        centre: subtract the mean.
        precision: relative precision of the numbers in x.

    Raises:
        ValueError: a column's values are so large or small that its coefficients are not representable.
    """
    used, (n, d) = weights > 0, x.shape
    share = weights[used] / weights[used].sum()
    columns = max(_ENTRIES_AT_ONCE // n, 1)
    parts = []
    for first in range(0, d, columns):
        part = x[:, first : first + columns][used]
        largest = np.abs(part).max(axis=0)
        origin = part[0] if centre else np.zeros(part.shape[1])
        with np.errstate(over="ignore"):
            size = np.abs(part - origin).max(axis=0)
        require_range(size, largest, first)
        steps = np.where(size > 0, size, 1.0)
        scaled = (part - origin) / steps
        mean = share @ scaled
        spread = np.sqrt(share @ (scaled - (mean if centre else 0.0)) ** 2)
        parts.append((largest, steps, origin + steps * mean, spread))
    largest, steps, mean, spread = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    varies = spread > (_relative_rounding(precision) * largest / steps if centre else 0.0)
    matrix = np.where(varies, 1.0 / (steps * np.where(varies, spread, 1.0)), 0.0)
    constant = tuple(np.flatnonzero(~varies).tolist())
    return InputMap(mean if centre else np.zeros(d), matrix, len(constant), False, constant=constant)


def _relative_rounding(precision: float) -> float:
    """The variation, relative to a column's size, that counts as rounding."""
    return max(FLOAT_TOLERANCE * float(np.finfo(float).eps), STORED_TOLERANCE * precision)


def moments_of_columns(moments: InputMoments, columns: Sequence[int]) -> InputMoments:
    """The moments of some of the columns."""
    places = np.asarray(columns, int)
    triangle = np.asarray(np.linalg.qr(moments.triangle[:, places], mode="r"))
    triangle = np.pad(triangle, [(0, len(places) - len(triangle)), (0, 0)])
    origin, size, largest, mean = (a[places] for a in moments[:4])
    return InputMoments(origin, size, largest, mean, triangle, moments.effective)


def map_of_moments(
    moments: InputMoments, *, centre: bool, precision: float, may_keep: bool = True
) -> InputMap:
    """The whitening, by the principal directions of the (centred) sample in units of its columns' spreads.

    A direction is dropped only if its variation is at most the rounding of the numbers themselves: a few units in the last
    place of the columns that take part (FLOAT_TOLERANCE, STORED_TOLERANCE). Integers and amounts of money that differ by one step
    are not rounded, and are kept.

    Args:
        moments: of the inputs.
        centre: subtract the mean, which the intercepts of a fit can absorb. A constant column is then dropped; if false, it
            is treated like other columns.
        precision: relative precision of the numbers in x: the machine epsilon of the type in which they were given.
        may_keep: if true, inputs that are standard normal to sampling error are not changed.
    """
    steps, d = moments.steps, len(moments.size)
    spread = np.linalg.norm(moments.triangle, axis=0)
    mean = moments.origin + steps * moments.mean
    rounding = _relative_rounding(precision) * moments.largest / steps
    varies = spread > (rounding if centre else 0.0)
    columns = np.flatnonzero(varies)
    triangle = np.asarray(np.linalg.qr(moments.triangle[:, varies] / spread[varies], mode="r"))
    _, values, directions = np.linalg.svd(triangle, full_matrices=True)
    values, vectors = np.append(values, np.zeros(len(columns) - len(values))), directions.T
    # rounding errors r_i of the columns give a direction v the variance sum v_i^2 r_i^2
    of_rounding = np.sqrt((rounding[varies] / spread[varies]) ** 2 @ vectors**2)
    most = values.max(initial=0.0)
    kept = values > np.maximum(of_rounding, FLOAT_TOLERANCE * np.finfo(float).eps * most)
    deviations = steps[varies] * spread[varies]
    may_keep = may_keep and kept.all() and varies.all()
    if may_keep and _is_standard(triangle, mean, deviations, moments.effective, centre):
        return InputMap(np.zeros(d), np.eye(d), 0, True)
    matrix = np.zeros((d, int(kept.sum())))
    inside = vectors[:, kept] / values[kept]
    if kept.all() and values.min(initial=most) * LARGEST_SYMMETRIC > most:
        # with the symmetric root each input stays recognisable, but rounding of small directions enters large ones
        inside = inside @ vectors.T
    matrix[columns] = inside / deviations[:, None]
    nearly = kept & (values * NEARLY_COLLINEAR < most)
    return InputMap(
        mean if centre else np.zeros(d),
        matrix,
        d - matrix.shape[1],
        False,
        _columns_of(vectors[:, ~kept], columns),
        tuple(np.flatnonzero(~varies).tolist()),
        _columns_of(vectors[:, nearly], columns),
    )


def _is_standard(
    triangle: np.ndarray, mean: np.ndarray, deviations: np.ndarray, effective: float, centred: bool
) -> bool:
    """True if mean and second moment of the inputs are those of N(0, I), to sampling error.

    Args:
        triangle: (d, d) R with R'R the correlations (second moments in units of the deviations).
        mean: (d,).
        deviations: (d,), root mean squares if the inputs were not centred.
        effective: number of rows.
        centred: true if the deviations are from the mean.
    """
    if not 0.1 < deviations.min() <= deviations.max() < 10.0:
        return False
    second = triangle.T @ triangle * np.outer(deviations, deviations)
    if centred:
        second = second + np.outer(mean, mean)
    eye = np.eye(len(mean))
    deviation = np.abs(second - eye) / np.sqrt(1.0 + eye)
    return max(np.abs(mean).max(), deviation.max()) < _STANDARD_ERRORS / math.sqrt(effective)


def _columns_of(directions: np.ndarray, columns: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """For each of the directions (c, s), the columns of `columns` (c,) that take part in it."""
    sizes = np.abs(directions.T)
    return tuple(tuple(columns[row > _TAKES_PART * row.max()].tolist()) for row in sizes)


def params_in_input_units(params: HostParams, mean: np.ndarray, matrix: np.ndarray) -> HostParams:
    """Parameters for z = (x - mean) @ matrix turned into parameters for x: a_x = matrix a_z, b_x = b_z - a_x . mean.

    A matrix (d,) is the diagonal of one.

    Args:
        params: a mixture of k experts of r inputs z.
        mean: (d,).
        matrix: (d, r), or (d,).
    """
    turned = (a * matrix if matrix.ndim == 1 else a @ matrix.T for a in (params.experts, params.gating))
    experts, gating = turned
    biases = (params.expert_bias - experts @ mean, params.gating_bias - gating @ mean)
    return regauge(MoEParams(experts, gating, params.noise_std, *biases))
