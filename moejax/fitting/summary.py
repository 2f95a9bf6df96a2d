"""The summary of a fit: its criteria, and a table of estimates with errors, tests and intervals for each expert."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.special

from moejax.checks import require
from moejax.fitting.selection import criteria

if TYPE_CHECKING:
    from moejax.fitting.result import FitResult

INTERCEPT = "(intercept)"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FitSummary:
    """The tables of `FitResult.summary`; `print` shows all of them, and a notebook shows them as HTML.

    Attributes:
        header: (label, value) of the fit: method, sizes, criteria and status, as a Series.
        experts: a table for each expert, with a row for each estimate. Its index has the part ("expert", "gate" or "noise") and the
            name of the input; its columns are the coefficient, its standard error, z and P>|z| for the hypothesis that it is zero,
            and the ends of its interval. Gates are relative to the last expert, which has none.
        notes: the notes of the fit.
    """

    header: pd.Series
    experts: tuple[pd.DataFrame, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """The tables as text."""
        header = self.header.map(_shown)
        parts = [header.to_string()]
        for index, table in enumerate(self.experts):
            parts.append(f"Expert {index + 1}\n{table.to_string(float_format=_number, na_rep='')}")
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        """The tables as HTML."""
        parts = [self.header.map(_shown).to_frame("").to_html(header=False)]
        parts += [
            table.rename_axis(columns=f"Expert {index + 1}").to_html(float_format=_number, na_rep="")
            for index, table in enumerate(self.experts)
        ]
        notes = pd.Series(self.notes, dtype=object).to_frame("notes")
        return "\n".join([*parts, notes.to_html(index=False)] if self.notes else parts)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _shown(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def summary_of(result: FitResult, level: float, feature_names: Sequence[str] | None) -> FitSummary:
    """The summary of a result; `FitResult.summary` explains the arguments.

    Raises:
        ValueError: a number of names that is not that of the inputs, or a level that is not between 0 and 1.
    """
    require(0 < level < 1, "level", "a number between 0 and 1", level)
    d = result.params.experts.shape[-1]
    names = feature_names if feature_names is not None else result.diagnostics.get("input_names")
    names = [f"x{j + 1}" for j in range(d)] if names is None else [str(name) for name in names]
    require(len(names) == d, "feature_names", f"{d} names", len(names))
    notes = tuple(result.diagnostics.get("notes", ()))
    return FitSummary(_header(result), _expert_tables(result, level, names), notes)


def _header(result: FitResult) -> pd.Series:
    found, params = result.diagnostics, result.params
    num_samples, num_parameters = found.get("num_samples", math.nan), result.num_parameters
    row = criteria(
        len(params.noise_std),
        result.log_likelihood,
        num_parameters,
        found.get("classification_entropy", math.nan),
        num_samples,
        None,
        result.status,
    )
    values = {
        "method": found.get("method", ""),
        "activation": found.get("activation", ""),
        **({} if found.get("family", "gaussian") == "gaussian" else {"family": found["family"]}),
        "objective": getattr(result, "objective", "likelihood"),
        "samples": num_samples,
        "inputs": params.experts.shape[-1],
        "outputs": params.experts.shape[1] if params.experts.ndim == 3 else 1,
        "experts": len(params.noise_std),
        "noise": found.get("noise", ""),
        "covariance": result.settings.get("covariance", ""),
        "log-likelihood": result.log_likelihood,
        "parameters": num_parameters,
        "AIC": row["aic"],
        "BIC": row["bic"],
        "ICL": row["icl"],
        "status": result.status,
    }
    return pd.Series(values, dtype=object)


def _expert_tables(result: FitResult, level: float, names: Sequence[str]) -> tuple[pd.DataFrame, ...]:
    params, errors = result.params, result.standard_errors
    unknown = params._make(np.full(np.shape(leaf), np.nan) for leaf in params)
    if errors is None:
        errors, (low, high) = unknown, (unknown, unknown)
    else:
        low, high = result.intervals(level)
    intercepts = bool(result.diagnostics.get("fit_intercept", True))
    k = len(params.noise_std)
    several = params.experts.ndim == 3
    gaussian = result.diagnostics.get("family", "gaussian") == "gaussian"
    has_noise = bool(result.diagnostics.get("has_dispersion", True))
    ends = [f"{100 * (1 + sign * level) / 2:g}%" for sign in (-1, 1)]

    def rows_of(leaves: Any, expert: int) -> list[float]:
        """The numbers of one expert in the order of `labels_of`."""
        numbers = []
        outputs = range(params.experts.shape[1]) if several else [None]
        for output in outputs:
            at = expert if output is None else (expert, output)
            numbers += [*leaves.experts[at], *([leaves.expert_bias[at]] if intercepts else [])]
        if expert < k - 1:
            numbers += [*leaves.gating[expert], *([leaves.gating_bias[expert]] if intercepts else [])]
        noises = np.atleast_1d(leaves.noise_std[expert]) if has_noise else ()
        return [float(number) for number in (*numbers, *noises)]

    def labels_of(expert: int) -> list[tuple[str, str]]:
        terms = [*names, *([INTERCEPT] if intercepts else [])]
        outputs = [f" y{j + 1}" for j in range(params.experts.shape[1])] if several else [""]
        labels = [(f"expert{output}", term) for output in outputs for term in terms]
        labels += [("gate", term) for term in terms] if expert < k - 1 else []
        return labels + [
            (f"noise{output}", "sigma" if gaussian else "dispersion") for output in outputs * has_noise
        ]

    tables = []
    for expert in range(k):
        labels = labels_of(expert)
        estimate, error, lowest, highest = (
            np.array(rows_of(leaves, expert)) for leaves in (params, errors, low, high)
        )
        # no test of a number that was not estimated, nor of a noise, which is positive
        tested = (error > 0) & np.array([not part.startswith("noise") for part, _ in labels])
        z = np.where(tested, estimate / np.where(tested, error, 1.0), np.nan)
        table = pd.DataFrame(
            {
                "coefficient": estimate,
                "std error": error,
                "z": z,
                "P>|z|": 2.0 * scipy.special.ndtr(-np.abs(z)),
                ends[0]: lowest,
                ends[1]: highest,
            },
            index=pd.MultiIndex.from_tuples(labels, names=["part", "input"]),
        )
        tables.append(table)
    return tuple(tables)
