"""The predictions of a fit: means, intervals, densities, gates and responsibilities at a user's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.special

from moejax.checks import brief, require
from moejax.fitting.array_checks import as_numbers, checked_inputs, checked_offset, checked_targets
from moejax.model.activations import ScalarFunction
from moejax.model.families import channel_of
from moejax.model.family import Channel, Family
from moejax.model.mixture import HostParams, posterior

if TYPE_CHECKING:
    from moejax.fitting.family_density import FamilyDensity
    from moejax.fitting.predictive import PredictiveDensity
    from moejax.fitting.result import FittedInOwnUnits
    from moejax.likelihood.padded import Objective


class ResultPredictions:
    """The methods of `FitResult` that predict.

    Rows x are (n, d) array-likes in the units of the x that was fitted. Means and densities are averaged over `members`; gates and
    responsibilities are those of `params`.

    If the fit had an offset, `offset` is that of the rows: (n,), or one number for all of them, such as 0 for an exposure of one.
    Without it these methods raise a ValueError, as they do if one is given to a fit that had none. Gates do not depend on it.
    """

    params: HostParams
    diagnostics: dict[str, Any]
    settings: dict[str, Any]
    objective: Objective
    _function: ScalarFunction | None
    """g, if it is not the registered function of its name."""
    _family: Family | None
    """The output family, if its name is not enough to find it."""

    if TYPE_CHECKING:  # `FitResult` has it

        @property
        def models(self) -> tuple[FittedInOwnUnits, ...]:
            """The members with their units and covariances."""
            ...

    def predict(self, x: Any, *, offset: Any = None) -> np.ndarray:
        """Return the mean E[y | x] = sum_i P_i(x) g(a_i . x + b_i), (n,) or (n, m), for x (n, d); averaged over `members`.

        With an offset o it is sum_i P_i(x) g(a_i . x + b_i + o).

        Raises:
            ValueError: x is no array of finite numbers with d columns.
        """
        return self._density(x, offset).mean

    def predict_std(self, x: Any, *, offset: Any = None) -> np.ndarray:
        """Return the standard deviation of y given x, (n,) or (n, m), in units of y.

        For a mixture its square is sum_i P_i sigma_i^2 + sum_i P_i (m_i - E[y | x])^2; for a mean fit it is s^2 + var f(x). An
        average has the spread between its members besides.
        """
        return self._density(x, offset).standard_deviations()[0]

    def predict_quantiles(
        self, x: Any, quantiles: Sequence[float] = (0.05, 0.5, 0.95), *, offset: Any = None
    ) -> np.ndarray:
        """Return quantiles of y given x, (n, q), for q levels between 0 and 1.

        Raises:
            ValueError: a level is not between 0 and 1, or there are several outputs.
        """
        return self._quantiles(x, checked_levels(quantiles), "quantiles", offset)

    def predict_interval(self, x: Any, level: float = 0.9, *, offset: Any = None) -> np.ndarray:
        """Return the ends of the central interval that holds y given x with probability `level`, (n, 2).

        Raises:
            ValueError: the level is not between 0 and 1, or there are several outputs.
        """
        (level,) = checked_levels([level], "level")
        return self._quantiles(x, [0.5 - 0.5 * level, 0.5 + 0.5 * level], "level", offset)

    def gate_probabilities(self, x: Any) -> np.ndarray:
        """Return the gates P_i(x), (n, k): the probability of each expert before y is seen, or its share in the mean."""
        from moejax.fitting.predictive import log_gates_and_predictors

        return np.exp(log_gates_and_predictors(self.params, self._rows(x))[0])

    def predict_experts(self, x: Any, *, offset: Any = None) -> np.ndarray:
        """Return the mean g(a_i . x + b_i) of each expert, (n, k) or (n, k, m)."""
        return self._gates_and_means(x, offset)[1]

    def responsibilities(self, x: Any, y: Any, *, offset: Any = None) -> np.ndarray:
        """Return the probability that expert i made the label, P(z = i | x, y), (n, k), for y (n,) or (n, m).

        In a mean fit all experts make a label together, and these are the gates.
        """
        log_gates, means = self._gates_and_means(x, offset)
        y = checked_labels(y, means, "x")
        if self.objective == "mean":
            return np.exp(log_gates)
        rows = self._rows(x)
        return posterior_of(self.params, rows, y, self.channel, self._offset(offset, len(rows)))

    def log_density(self, x: Any, y: Any, *, offset: Any = None) -> np.ndarray:
        """Return log p(y | x), (n,) in nats, in units of y, for y (n,) or (n, m)."""
        density = self._density(x, offset)
        return density.log_density(checked_labels(y, density.means, "x"))

    def probability_below(self, x: Any, y: Any, *, offset: Any = None) -> np.ndarray:
        """Return P(Y <= y | x), (n,), for y (n,): uniform on (0, 1) over the rows if the model is true.

        Raises:
            ValueError: there are several outputs.
        """
        density = self._density(x, offset)
        self._require_one_output("probability_below")
        return density.probability_below(checked_labels(y, density.means, "x"))

    def _quantiles(self, x: Any, levels: Sequence[float], name: str, offset: Any) -> np.ndarray:
        self._require_one_output(name)
        return self._density(x, offset).quantiles(levels)

    def _require_one_output(self, name: str) -> None:
        experts = self.params.experts
        require(experts.ndim == 2, name, "a fit of one output", f"{experts.shape[-2]} outputs")

    def _density(self, x: Any, offset: Any) -> PredictiveDensity | FamilyDensity:
        from moejax.fitting.predictive import predictive_density

        rows = self._rows(x)
        offset = self._offset(offset, len(rows))
        return predictive_density(self.models, rows, self.channel, self.objective, offset)

    def _gates_and_means(self, x: Any, offset: Any) -> tuple[np.ndarray, np.ndarray]:
        """log P_i(x) (n, k) and m_i(x) (n, k), or (n, k, m), of `params`."""
        from moejax.fitting.predictive import log_gates_and_means

        rows = self._rows(x)
        return log_gates_and_means(self.params, rows, self.channel, self._offset(offset, len(rows)))

    @property
    def has_offset(self) -> bool:
        """True if the fit had an offset, so that predictions need that of their rows."""
        return bool(self.diagnostics.get("has_offset", False))

    def _offset(self, offset: Any, num_rows: int) -> np.ndarray | None:
        """(n,) offsets of n rows; None if the fit had none.

        Raises:
            ValueError: there is none although the fit had one, or the reverse, or it is no n finite numbers.
        """
        if not self.has_offset:
            require(offset is None, "offset", "None, because the fit had none", offset)
            return None
        words = "that of the rows of x, because the fit had one (0 for none)"
        require(offset is not None, "offset", words, None)
        return checked_offset(offset, np.ones(num_rows))

    @property
    def channel(self) -> Channel:
        """The channel that makes the labels: g, or an output family.

        Raises:
            ValueError: the result was made without its function or family, whose name is not registered.
        """
        name = self.settings.get("activation", self.diagnostics.get("activation"))
        require(name is not None, "activation", "a result of fit, which has one", None)
        if self._family is not None:
            return self._family
        activation = str(name) if self._function is None else self._function
        return channel_of(str(self.diagnostics.get("family", "gaussian")), activation)

    def _rows(self, x: Any) -> np.ndarray:
        """(n, d) rows in the columns of the fit.

        Raises:
            ValueError: they are something else, or a table whose columns have other names.
        """
        rows, d = checked_inputs(x, "x"), self.params.experts.shape[-1]
        require(rows.shape[1] == d, "x", f"{d} columns, those of the fit", f"{rows.shape[1]} columns")
        names, given = self.diagnostics.get("input_names"), getattr(x, "columns", None)
        if names is not None and given is not None and all(isinstance(name, str) for name in given):
            for name, other in zip(names, given, strict=True):
                require(name == other, "x", f"columns {', '.join(map(brief, names))} in this order", other)
        return rows


def posterior_of(
    params: HostParams, x: np.ndarray, y: np.ndarray, channel: Channel, offset: np.ndarray | None = None
) -> np.ndarray:
    """(n, k): P(z = i | x, y) of rows x (n, d) with offsets (n,), None for none, and labels y (n,) or (n, m)."""
    from moejax.fitting.predictive import density_of, log_gates_and_means

    if isinstance(channel, Family):
        return np.asarray(scipy.special.softmax(density_of(params, x, channel, offset).log_joint(y), axis=1))
    log_gates, means = log_gates_and_means(params, x, channel, offset)
    with np.errstate(over="ignore"):  # the difference in nats may overflow
        return posterior(log_gates, means, y, params.noise_std, xp=np)


def checked_labels(y: Any, means: np.ndarray, rows_of: str) -> np.ndarray:
    """y (n,), or (n, m), in double precision, of a shape that matches means (n, k), or (n, k, m).

    Raises:
        ValueError: another shape, or values that are not finite numbers.
    """
    y = as_numbers(y, "y")
    if y.shape == (len(means), 1) and means.ndim == 2:
        y = y[:, 0]
    expected = means[:, 0].shape
    require(y.shape == expected, "y", f"shape {expected} to go with {rows_of}", y.shape)
    return checked_targets(y, len(means), rows_of=rows_of)


def checked_levels(values: Any, name: str = "quantiles") -> list[float]:
    """Probabilities between 0 and 1.

    Raises:
        ValueError: they are something else.
    """
    levels = as_numbers(values, name)
    good = levels.ndim == 1 and levels.size > 0 and bool(np.all((levels > 0) & (levels < 1)))
    require(good, name, "numbers between 0 and 1", values)
    return levels.tolist()
