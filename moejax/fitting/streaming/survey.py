"""The first pass over a source: are all rows good, how do inputs and labels vary, and a random subsample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moejax.fitting.streaming.source import Batch, Source, batch_size
from moejax.fitting.whitening import InputMoments, require_range

ROWS_CHOSEN = 100_000
"""Rows of the subsample on which the whole method is run: its estimate is then so near to that of all rows that a few Newton
steps suffice."""
NUMBERS_CHOSEN = 2**25
"""Numbers of the subsample, at most."""
ROWS_IN_CACHE = 4096
"""Rows of a block of `triangle_of`."""


class Chosen(NamedTuple):
    """The rows with the smallest of independent uniform keys: a random subsample, whoever reads which rows."""

    keys: np.ndarray
    """(m,) ascending."""
    x: np.ndarray
    """(m, d)"""
    y: np.ndarray
    """(m,)"""
    weights: np.ndarray
    """(m,)"""


class Survey(NamedTuple):
    """The findings of one pass over the rows; weights are in the user's own units."""

    num_rows: int
    """Rows with weight."""
    num_skipped: int
    """Bad rows that were left out."""
    weight_sum: float
    weight_squares: float
    whole_weights: bool
    """True if all weights are whole numbers."""
    low: np.ndarray
    """(d,) smallest value of each input."""
    high: np.ndarray
    """(d,) largest."""
    triangle: np.ndarray
    """(d + 1, d + 1) upper triangular R: R'R is the sum of w [1, x - origin] [1, x - origin]'."""
    chosen: Chosen

    @property
    def effective(self) -> float:
        """(sum w)^2 / sum w^2."""
        return self.weight_sum**2 / self.weight_squares


def num_chosen(dim: int) -> int:
    """Rows of the subsample for d inputs."""
    return max(min(ROWS_CHOSEN, NUMBERS_CHOSEN // (dim + 1)), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class SurveyTask:
    """The survey of one partition, and the sum of two.

    Args:
        origin: (d,) a point near the inputs, from which they are measured.
        num_chosen: rows of the subsample.
        largest_key: rows with larger keys are not kept: enough others have smaller ones (`largest_key`).
        seed: of the keys.
    """

    origin: np.ndarray
    num_chosen: int
    largest_key: float
    seed: tuple[int, ...]

    def __call__(
        self, source: Source, index: int, partition: Any, on_rows: Callable[[int], None]
    ) -> Survey | None:
        """The survey of a partition; None if it has no row.

        Raises:
            ValueError: a row is bad and is not to be left out.
        """
        random = np.random.default_rng([*self.seed, index])
        survey = None
        for batch in source.batches(partition, batch_size(len(self.origin))):
            keys = random.random(len(batch.y))
            survey = self.merge(survey, self._of_batch(batch, keys))
            on_rows(len(batch.y) + batch.skipped)
        return survey

    def _of_batch(self, batch: Batch, keys: np.ndarray) -> Survey:
        x, y, weights = batch.x, batch.y, batch.weights
        if not len(y):
            return empty_survey(len(self.origin), batch.skipped)
        kept = np.flatnonzero(keys < self.largest_key)
        design = np.empty((len(y), x.shape[1] + 1))
        design[:, 0] = 1.0
        np.subtract(x, self.origin, out=design[:, 1:])
        design *= np.sqrt(weights)[:, None]
        return Survey(
            len(y),
            batch.skipped,
            float(weights.sum()),
            float(weights @ weights),
            bool((weights == np.round(weights)).all()),
            x.min(axis=0),
            x.max(axis=0),
            triangle_of(design),
            Chosen(keys[kept], x[kept], y[kept], weights[kept]),
        )

    def merge(self, first: Survey | None, second: Survey | None) -> Survey | None:
        """The survey of the rows of both."""
        if first is None or second is None:
            return second if first is None else first
        chosen = Chosen(*(np.concatenate(leaves) for leaves in zip(first.chosen, second.chosen, strict=True)))
        return Survey(
            first.num_rows + second.num_rows,
            first.num_skipped + second.num_skipped,
            first.weight_sum + second.weight_sum,
            first.weight_squares + second.weight_squares,
            first.whole_weights and second.whole_weights,
            np.minimum(first.low, second.low),
            np.maximum(first.high, second.high),
            triangle_of(np.concatenate([first.triangle, second.triangle])),
            smallest(chosen, self.num_chosen) if len(chosen.keys) > 2 * self.num_chosen else chosen,
        )


def largest_key(num_chosen: int, num_rows: int | None) -> float:
    """A bound on uniform keys which `num_chosen` of `num_rows` fall below, but for a chance of 1e-9; 1 for an unknown number."""
    if num_rows is None or not num_rows:
        return 1.0
    return min((num_chosen + 6.0 * math.sqrt(num_chosen)) / num_rows, 1.0)


def smallest(chosen: Chosen, count: int) -> Chosen:
    """The rows with the smallest keys, in the order of their keys."""
    order = np.argsort(chosen.keys, kind="stable")[:count]
    return Chosen(*(leaf[order] for leaf in chosen))


def empty_survey(dim: int, skipped: int = 0) -> Survey:
    """The survey of no row but skipped ones."""
    chosen = Chosen(np.zeros(0), np.zeros((0, dim)), np.zeros(0), np.zeros(0))
    above, below = np.full(dim, np.inf), np.full(dim, -np.inf)
    return Survey(0, skipped, 0.0, 0.0, True, above, below, np.zeros((dim + 1, dim + 1)), chosen)


def triangle_of(rows: np.ndarray) -> np.ndarray:
    """(p, p) upper triangular R with R'R = rows' rows, from (n, p); rows of zeros fill it up if n < p.

    Blocks of rows that fit in a cache are reduced to a triangle each, and the triangles together to one.
    """
    n, p = rows.shape
    block = max(ROWS_IN_CACHE, 2 * p)
    if n > 2 * block:
        whole = n // block * block
        triangles = np.asarray(np.linalg.qr(rows[:whole].reshape(-1, block, p), mode="r"))
        rows = np.concatenate([triangles.reshape(-1, p), rows[whole:]])
    triangle = np.asarray(np.linalg.qr(rows, mode="r"))
    return np.pad(triangle, [(0, p - len(triangle)), (0, 0)])


def moments_of_survey(survey: Survey, origin: np.ndarray, *, centre: bool) -> InputMoments:
    """The inputs' moments, as `input_moments` has them from arrays.

    Args:
        survey: of all rows.
        origin: (d,) that of the survey.
        centre: measure from the mean.

    Raises:
        ValueError: a column's values are so large or small that its coefficients are not representable.
    """
    largest = np.maximum(np.abs(survey.low), np.abs(survey.high))
    origin_here = origin if centre else np.zeros_like(origin)
    with np.errstate(over="ignore"):
        size = np.maximum(np.abs(survey.low - origin_here), np.abs(survey.high - origin_here))
    require_range(size, largest)
    steps = np.where(size > 0, size, 1.0)
    triangle = survey.triangle / np.sqrt(survey.weight_sum)  # its corner is then 1 or -1
    shift = triangle[0, 1:] / triangle[0, 0]
    if centre:
        return InputMoments(origin, size, largest, shift / steps, triangle[1:, 1:] / steps, survey.effective)
    around_zero = triangle[:, 1:] + np.outer(triangle[:, 0], origin)
    return InputMoments(
        origin_here,
        size,
        largest,
        (origin + shift) / steps,
        triangle_of(around_zero) / steps,
        survey.effective,
    )
