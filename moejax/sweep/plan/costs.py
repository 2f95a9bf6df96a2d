"""A model of the seconds of a trial, by method and size, from measured chunks: for chunk sizes and the time left."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

REFERENCE_SIZE = 10 * 3
"""d times k of a trial of one unit of work for each sample."""
OFFSET_PENALTY = 0.05
"""Ridge on a method's deviation from the mean of all methods, and of a channel's from its method's, in log seconds."""
SLOPE_PENALTY = 0.5
"""Ridge on the deviation of an exponent from that of `TrialShape.work`."""
SMALLEST_SECONDS = 1e-7
SIZES = ("num_samples", "dim", "num_experts", "num_starts", "max_iterations")
"""Fields of which a power is taken."""


def channel_label(family: str, activation: str) -> str:
    """The activation, after the family if that is not the Gaussian.

    >>> channel_label("gaussian", "relu"), channel_label("poisson", "linear")
    ('relu', 'poisson linear')
    """
    return activation if family == "gaussian" else f"{family} {activation}"


@dataclasses.dataclass(frozen=True, slots=True)
class TrialShape:
    """All that the time of a trial depends on, as far as it is known before it runs."""

    method: str
    channel: str
    """`channel_label` of the fitted family."""
    num_samples: int
    """Padded."""
    dim: int
    num_experts: int
    num_starts: int = 1
    max_iterations: int = 100

    @property
    def work(self) -> float:
        """Size of a trial, in samples of the size d=10, k=3 from one start."""
        size = self.dim * self.num_experts * self.num_starts
        return self.num_samples * max(size / REFERENCE_SIZE, 1.0)


Name = tuple[str, ...]
"""The key of a term: () is the constant, (method,), (method, channel), (size, "slope"), (method, size, "slope")."""


class CostModel:
    """Seconds of a trial on one worker: measured for shapes that have run, predicted from these for the others.

    log seconds = log work + c + c_method + c_(method, channel)
                  + sum over sizes of (b_size + b_(method, size)) (log size - mean of log size over the method's measurements)

    The coefficients are those of ridge regression. The penalties keep the exponents near those of the work (1 for n, d and k)
    until measurements of several sizes say otherwise. A method without a measurement has the mean of the others.
    """

    def __init__(self) -> None:
        self._measured: dict[TrialShape, tuple[float, float]] = {}
        """Shape -> (seconds, trials)."""
        self._fit: tuple[dict[Name, float], dict[str, np.ndarray]] | None = None
        """Coefficients, and the mean log sizes of every method; "" is all methods."""

    def add(self, shape: TrialShape, seconds: float, trials: int) -> None:
        """Take the time of a chunk into account.

        Args:
            shape: the shape of its trials.
            seconds: its time without compilation.
            trials: their number, padding included.
        """
        if not (math.isfinite(seconds) and seconds > 0 and trials > 0):
            return
        before = self._measured.get(shape, (0.0, 0.0))
        self._measured[shape] = (before[0] + seconds, before[1] + trials)
        if before[1] == 0:  # a further chunk of a known shape changes the prediction of others little
            self._fit = None

    def seconds(self, shape: TrialShape) -> float | None:
        """Seconds of one trial; None without any measurement."""
        if shape in self._measured:
            seconds, trials = self._measured[shape]
            return seconds / trials
        if not self._measured:
            return None
        if self._fit is None:
            self._fit = _fitted(self._measured)
        coefficients, centres = self._fit
        terms = _terms(shape, centres)
        return shape.work * math.exp(sum(coefficients.get(name, 0.0) * value for name, value, _ in terms))


def _log_sizes(shape: TrialShape) -> np.ndarray:
    return np.log([getattr(shape, name) for name in SIZES])


def _terms(shape: TrialShape, centres: dict[str, np.ndarray]) -> list[tuple[Name, float, float]]:
    """Name, value and penalty of every term of a shape's log seconds per work."""
    method = shape.method
    terms: list[tuple[Name, float, float]] = [
        ((), 1.0, 1e-9),
        ((method,), 1.0, OFFSET_PENALTY),
        ((method, shape.channel), 1.0, 10 * OFFSET_PENALTY),
    ]
    sizes = (_log_sizes(shape) - centres.get(method, centres[""])).tolist()
    for name, size in zip(SIZES, sizes, strict=True):
        terms += [((name, "slope"), size, SLOPE_PENALTY), ((method, name, "slope"), size, SLOPE_PENALTY)]
    return terms


def _fitted(
    measured: dict[TrialShape, tuple[float, float]],
) -> tuple[dict[Name, float], dict[str, np.ndarray]]:
    sizes: dict[str, list[np.ndarray]] = {}
    for shape in measured:
        for key in ("", shape.method):
            sizes.setdefault(key, []).append(_log_sizes(shape))
    centres = {key: np.mean(values, axis=0) for key, values in sizes.items()}
    rows = [_terms(shape, centres) for shape in measured]
    columns = {name: penalty for row in rows for name, _, penalty in row}
    places = {name: index for index, name in enumerate(columns)}
    design = np.zeros((len(rows), len(columns)))
    for index, row in enumerate(rows):
        for name, value, _ in row:
            design[index, places[name]] = value
    target = np.array(
        [
            math.log(max(seconds / trials, SMALLEST_SECONDS) / shape.work)
            for shape, (seconds, trials) in measured.items()
        ]
    )
    normal = design.T @ design + np.diag(list(columns.values()))
    coefficients = np.linalg.solve(normal, design.T @ target).tolist()
    return dict(zip(columns, coefficients, strict=True)), centres
