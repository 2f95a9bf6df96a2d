"""The first pass over a source: are all rows good, how do inputs and labels vary, and a random subsample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moejax.fitting.streaming.source import Source, batch_size
from moejax.fitting.whitening import InputMoments, require_range

ROWS_CHOSEN = 100_000
"""Rows of the subsample on which the whole method is run: its estimate is then so near to that of all rows that a few Newton
steps suffice."""
NUMBERS_CHOSEN = 2**25
"""Numbers of the subsample, at most."""


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
    """What one pass finds out about the rows; weights are in the user's own units."""

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
    y_low: float
    y_high: float
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
        seed: of the keys.
    """

    origin: np.ndarray
    num_chosen: int
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
        skipped = 0
        for batch in source.batches(partition, batch_size(len(self.origin))):
            skipped += batch.skipped
            on_rows(len(batch.y) + batch.skipped)
            if len(batch.y):
                keys = random.random(len(batch.y))
                bound = None if survey is None else survey.chosen.keys
                kept = (
                    slice(None)
                    if bound is None or len(bound) < self.num_chosen
                    else np.flatnonzero(keys < bound[-1])
                )
                chosen = Chosen(keys[kept], batch.x[kept], batch.y[kept], batch.weights[kept])
                survey = self.merge(survey, self._of_batch(batch.x, batch.y, batch.weights, chosen))
        if survey is not None:
            return survey._replace(num_skipped=skipped)
        return _nothing(len(self.origin), skipped) if skipped else None

    def _of_batch(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray, chosen: Chosen) -> Survey:
        design = np.column_stack([np.ones(len(y)), x - self.origin]) * np.sqrt(weights)[:, None]
        return Survey(
            len(y),
            0,
            float(weights.sum()),
            float(weights @ weights),
            bool((weights == np.round(weights)).all()),
            x.min(axis=0),
            x.max(axis=0),
            float(y.min()),
            float(y.max()),
            triangle_of(design),
            self._smallest(chosen),
        )

    def _smallest(self, chosen: Chosen) -> Chosen:
        order = np.argsort(chosen.keys, kind="stable")[: self.num_chosen]
        return Chosen(*(leaf[order] for leaf in chosen))

    def merge(self, first: Survey | None, second: Survey | None) -> Survey | None:
        """The survey of the rows of both."""
        if first is None or second is None:
            return second if first is None else first
        together = Chosen(
            *(np.concatenate(leaves) for leaves in zip(first.chosen, second.chosen, strict=True))
        )
        return Survey(
            first.num_rows + second.num_rows,
            first.num_skipped + second.num_skipped,
            first.weight_sum + second.weight_sum,
            first.weight_squares + second.weight_squares,
            first.whole_weights and second.whole_weights,
            np.minimum(first.low, second.low),
            np.maximum(first.high, second.high),
            min(first.y_low, second.y_low),
            max(first.y_high, second.y_high),
            triangle_of(np.concatenate([first.triangle, second.triangle])),
            self._smallest(together),
        )


def _nothing(dim: int, skipped: int) -> Survey:
    """The survey of no row but skipped ones."""
    chosen = Chosen(np.zeros(0), np.zeros((0, dim)), np.zeros(0), np.zeros(0))
    none, all_ = np.full(dim, np.inf), np.full(dim, -np.inf)
    return Survey(
        0, skipped, 0.0, 0.0, True, none, all_, np.inf, -np.inf, np.zeros((dim + 1, dim + 1)), chosen
    )


def triangle_of(rows: np.ndarray) -> np.ndarray:
    """(p, p) upper triangular R with R'R = rows' rows, from (n, p): zero rows below if n < p."""
    triangle = np.asarray(np.linalg.qr(rows, mode="r"))
    return np.pad(triangle, [(0, rows.shape[1] - len(triangle)), (0, 0)])


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
