"""Rows that are read in batches: the interface of a source, and a source of arrays.

A source is cut into partitions, which may be read in any order, by any process, and again for every pass. A partition is read in
batches of a bounded number of rows, so that a pass needs memory for a few batches only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from moejax.checks import require
from moejax.fitting.array_checks import input_precision

ROWS_AT_ONCE = 65_536
"""Rows of a batch, at most."""
NUMBERS_AT_ONCE = 2**22
"""Numbers of a batch, at most: with many inputs it has fewer rows."""
ROWS_IN_PARTITION = 2**19
"""Rows of a partition, about: few enough that a pass loses little if it is interrupted, and that workers share them evenly."""


class Batch(NamedTuple):
    """Some rows in double precision; all numbers are finite."""

    x: np.ndarray
    """(b, d)"""
    y: np.ndarray
    """(b,)"""
    weights: np.ndarray
    """(b,) positive, in the user's own units."""
    skipped: int = 0
    """Bad rows that were left out of this batch."""


class Source(Protocol):
    """Rows on disk or elsewhere, more than fit in memory. It can be pickled."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """(d,) names of the inputs."""
        ...

    @property
    def target_name(self) -> str:
        """Name of the target."""
        ...

    @property
    def partitions(self) -> Sequence[Any]:
        """The arguments of `batches`; together they hold every row once."""
        ...

    @property
    def identity(self) -> str:
        """A digest that changes if the rows do."""
        ...

    @property
    def precision(self) -> float:
        """Machine epsilon of the numbers as they are stored."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each choice that was made in reading."""
        ...

    def rows_of(self, partition: Any) -> int | None:
        """The number of rows of a partition, if it is known without reading it."""
        ...

    def batches(self, partition: Any, rows_at_once: int) -> Iterator[Batch]:
        """The rows of a partition, at most so many in one batch.

        Raises:
            ValueError: a row is bad and is not to be left out; the message names its place.
        """
        ...


def all_finite(values: np.ndarray) -> bool:
    """True if all numbers are finite; if their sum is, they are, which takes a tenth of the time to find out."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


def batch_size(dim: int, num_devices: int = 1) -> int:
    """Rows of a batch of d inputs for each device: a multiple of 256."""
    rows = min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // (dim + 1))
    return max(rows // 256, 1) * 256 * num_devices


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Arrays that are larger than a device's memory, or that lie on disk (`numpy.memmap`), as a source of `fit`.

    Args:
        x: (n, d) inputs.
        y: (n,) labels.
        weights: (n,) non-negative weights; None for ones. Rows of weight zero are left out.

    Raises:
        ValueError: arrays of other shapes, or not of numbers. A number that is not finite is found when its batch is read.

    Examples:
        >>> truth = moejax.make_params([[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 0]], noise_std=0.1)
        >>> x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 2000)
        >>> source = moejax.ArraySource(x, y)
        >>> result = moejax.fit(jax.random.key(1), source=source, num_experts=2, method="spectral_em")
        >>> result.status, result.diagnostics["num_rows"]
        ('ok', 2000)
    """

    x: Any
    y: Any
    weights: Any = None

    def __post_init__(self):
        """Check shapes and kinds of numbers."""
        for name, array, ndim in (("x", self.x, 2), ("y", self.y, 1), ("weights", self.weights, 1)):
            if name == "weights" and array is None:
                continue
            require(not isinstance(array, np.ma.MaskedArray), name, "no masked array", type(array).__name__)
            kept = array if isinstance(array, np.ndarray) else np.asarray(array)
            object.__setattr__(self, name, kept)
            require(kept.ndim == ndim, name, f"an array of {ndim} dimension{'s' * (ndim > 1)}", kept.shape)
            require(kept.dtype.kind in "biuf", name, "numbers", kept.dtype)
            require(len(kept) == len(self.x), name, f"{len(self.x)} rows as in x", len(kept))
        require(len(self.x) > 0 and self.x.shape[1] > 0, "x", "rows and columns", self.x.shape)

    @property
    def input_names(self) -> tuple[str, ...]:
        """x1, x2, .."""
        return tuple(f"x{j + 1}" for j in range(self.x.shape[1]))

    @property
    def target_name(self) -> str:
        """The name y."""
        return "y"

    @property
    def partitions(self) -> Sequence[tuple[int, int]]:
        """(first row, row after the last one) of equal parts."""
        n = len(self.x)
        parts = max(-(-n // ROWS_IN_PARTITION), 1)
        ends = [n * part // parts for part in range(parts + 1)]
        return tuple(itertools.pairwise(ends))

    @property
    def identity(self) -> str:
        """A digest of shapes, and of the rows at the ends of the partitions."""
        digest = hashlib.sha256(repr((self.x.shape, str(self.x.dtype))).encode())
        for first, last in self.partitions:
            for array in (self.x, self.y, self.weights):
                if array is not None:
                    digest.update(np.ascontiguousarray(array[[first, last - 1]]).tobytes())
        return digest.hexdigest()

    @property
    def precision(self) -> float:
        """Machine epsilon of x."""
        return input_precision(self.x)

    @property
    def notes(self) -> tuple[str, ...]:
        """None."""
        return ()

    def rows_of(self, partition: tuple[int, int]) -> int:
        """The number of rows of a partition."""
        return partition[1] - partition[0]

    def batches(self, partition: tuple[int, int], rows_at_once: int) -> Iterator[Batch]:
        """The rows of a partition.

        Raises:
            ValueError: a number is not finite, or a weight is negative.
        """
        for first in range(*partition, rows_at_once):
            rows = slice(first, min(first + rows_at_once, partition[1]))
            x, y = (self._numbers(name, rows) for name in ("x", "y"))
            weights = np.ones(len(y)) if self.weights is None else self._numbers("weights", rows)
            bad = weights < 0
            if bad.any():
                row = int(np.argmax(bad))
                raise ValueError(f"weights[{first + row}]: expected a number >= 0, got {weights[row]:.6g}")
            used = weights > 0
            yield Batch(x, y, weights) if used.all() else Batch(x[used], y[used], weights[used])

    def _numbers(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of an array in double precision.

        Raises:
            ValueError: a number is not finite; the message names its row.
        """
        numbers = np.asarray(getattr(self, name)[rows], np.float64)
        if not all_finite(numbers):
            bad = ~np.isfinite(numbers).reshape(len(numbers), -1).all(axis=1)
            row = int(np.argmax(bad))
            raise ValueError(
                f"{name}[{rows.start + row}]: expected finite numbers, got {numbers[row].tolist()}"
            )
        return numbers
