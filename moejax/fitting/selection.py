r"""Choice of the number of experts by information criteria of fits with different k.

With L the maximised log-likelihood in nats, P free parameters, n the total sample weight and r the responsibilities,

    AIC = -2 L + 2 P,   BIC = -2 L + P log n,   ICL = BIC - 2 sum_j w_j sum_i r_ij log r_ij

(Akaike 1974; Schwarz 1978; Biernacki, Celeux and Govaert 2000). Lower is better; ICL also rewards samples that belong clearly to
one expert. The eigenvalues of T2 suggest k without a fit: in theory the first k are positive and the others zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from moejax.likelihood.free_columns import FreeColumns
from moejax.likelihood.predictors import num_free_parameters

LARGEST_TRIED = 12
CRITERIA = ("aic", "bic", "icl")


def num_rows_needed(
    num_experts: int, dim: int, fit_intercept: bool, columns: FreeColumns | None = None
) -> int:
    """The fewest rows for a fit: one more than its parameters with one noise level."""
    return num_free_parameters(num_experts, dim, "shared", fit_intercept, columns=columns) + 1


def numbers_to_try(num_experts: str | Sequence[int]) -> tuple[int, ...]:
    """The numbers of experts that "auto" (1 to LARGEST_TRIED), a range or a list stands for: each once, in order."""
    numbers = range(1, LARGEST_TRIED + 1) if isinstance(num_experts, str) else num_experts
    return tuple(sorted({int(k) for k in numbers}))


def criteria(
    num_experts: int,
    log_likelihood: float,
    num_parameters: int,
    entropy: float,
    num_samples: float,
    second_moment_eigenvalues: Sequence[float] | None,
    status: str,
) -> dict[str, Any]:
    """One row of the table of criteria.

    Args:
        num_experts: k.
        log_likelihood: maximised log-likelihood in nats.
        num_parameters: P.
        entropy: sum over samples of the entropy of their responsibilities, in nats.
        num_samples: sum of the weights.
        second_moment_eigenvalues: (d,) of T2, decreasing; None if there are no moments.
        status: status of the fit.
    """
    bic = -2.0 * log_likelihood + num_parameters * np.log(num_samples)
    values = second_moment_eigenvalues or ()
    here = values[num_experts - 1] if num_experts <= len(values) else np.nan
    below = values[num_experts] if num_experts < len(values) else np.nan
    return {
        "num_experts": num_experts,
        "log_likelihood": log_likelihood,
        "num_parameters": num_parameters,
        "aic": -2.0 * log_likelihood + 2.0 * num_parameters,
        "bic": bic,
        "icl": bic + 2.0 * entropy,
        "t2_eigenvalue": here,
        "t2_eigengap": here - below,
        "status": status,
    }


def left_out(num_experts: int, reason: str) -> dict[str, Any]:
    """The row of a number of experts that the data do not admit: it has no numbers, and the reason as its status."""
    row = criteria(num_experts, np.nan, 0, np.nan, 1.0, None, f"left out: {reason}")
    return {name: value if name in ("num_experts", "status") else np.nan for name, value in row.items()}


def selection_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows, with `chosen` true for the least BIC among the fits whose status is "ok".

    A fit with another status is not at a maximum, or has an expert whose noise ran off to zero on a few rows. If no status is "ok",
    the fit with the fewest experts is chosen.
    """
    table = pd.DataFrame(rows)
    bic = table["bic"].to_numpy(float)
    usable = np.isfinite(bic) & (table["status"] == "ok").to_numpy()
    if usable.any():
        chosen = int(np.argmin(np.where(usable, bic, np.inf)))
    else:
        fitted = ~table["status"].str.startswith("left out").to_numpy()
        chosen = int(np.argmin(np.where(fitted, table["num_experts"].to_numpy(float), np.inf)))
    return table.assign(chosen=np.arange(len(table)) == chosen)
