"""Diagnostics of a fit: its data and the theory's assumptions, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moejax.fitting.data_units import DataUnits
from moejax.fitting.uncertainty import Uncertainty
from moejax.fitting.whitening import InputMap
from moejax.likelihood.collapse import (
    EXACT,
    ROUNDING,
    at_floor,
    is_collapsed,
    label_rounding_on_host,
    noise_floor,
)
from moejax.likelihood.free_columns import FreeColumns, compact, expert_inputs, num_coefficients
from moejax.methods.method import MethodConfig, MethodResult, Problem, SearchEnd
from moejax.methods.search_plan import NUM_DESCENTS
from moejax.methods.spectral_wide import wide_ridge
from moejax.model.family import as_family, channel_facts, is_gaussian
from moejax.model.status import Status

FEW_SAMPLES_PER_PARAMETER = 5.0
ROWS_OF_CORRELATION = 1000
"""Rows, at equal distances, from whose pairs the correlation of the inputs is estimated."""
LARGEST_CORRELATION = 0.05
"""Sum of an input's squared correlations with the others from which a note reports it."""
NO_MOMENTS = "no moments were used, and they would be biased"
HELD_BY_RIDGE = 1e-2
"""A gate counts as held by the ridge if the ridge provides at least this share of the information on its size."""
_STANDARD_ERRORS = 5.0
_SET_TO_ONE = 1e-5
"""Norms this near to one are those of a method that sets them; norms that are fitted differ from one by more."""


def collapse_status(experts: Sequence[int]) -> str:
    """The status of a fit in which the noise of these experts, counted from 1, went to zero."""
    listed = ", ".join(map(str, experts))
    return f"the noise of expert {listed} ran off to zero: the likelihood has no maximum there"


def _exact_note(expert: int, count: float, noise_std: Any) -> str:
    level = ", ".join(f"{value:.3g}" for value in np.atleast_1d(noise_std))
    return (
        f"expert {expert} fits its {count:.0f} effective samples exactly (labels that repeat, or that have no noise): its noise is "
        f"held at {level}, below which the likelihood would only grow"
    )


def diagnose(
    result: MethodResult,
    problem: Problem,
    posterior: np.ndarray,
    units: DataUnits,
    config: MethodConfig,
    uncertainty: Uncertainty | None,
) -> dict[str, Any]:
    """Return numbers by name, and `notes`: assumptions that fail or that were not checked, with the consequences.

    `FitResult` lists the keys. The caller adds the first of them, and `posterior` is (n, k) responsibilities.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), result.params)
    x, y, weights = (np.asarray(a, np.float64) for a in (problem.x, problem.y, problem.weights))
    used = weights > 0
    x, y, weights, posterior = x[used], y[used], weights[used], posterior[used]
    counts = weights @ posterior
    of_experts, columns = expert_inputs(x, config.columns), config.columns
    total, dim, k = weights.sum(), of_experts.shape[1], config.num_experts
    scale = units.labels.scale
    per_expert = config.noise == "per_expert"
    rounding = label_rounding_on_host(y * scale + units.labels.shift, y, scale, problem.y.dtype)
    least = (EXACT if per_expert else ROUNDING) * rounding
    if problem.least_noise is not None:
        least = np.maximum(least, np.asarray(problem.least_noise, np.float64))
    collapsed = is_collapsed(
        params.noise_std,
        counts,
        num_coefficients=num_coefficients(dim, config.fit_intercept, columns)[0],
        least_noise=least,
        per_expert=per_expert,
    )
    if not as_family(config.fn).location_scale:  # a dispersion that falls to zero is that of a simpler family
        collapsed = np.zeros(k, bool)
        per_expert = False
    exact = at_floor(params.noise_std, least, total) & ~collapsed if per_expert else np.zeros(k, bool)
    given_noise = params.noise_std * np.asarray(scale)
    entropy = -float(weights @ np.sum(posterior * np.log(np.maximum(posterior, 1e-300)), axis=1))
    squares = np.sum(of_experts**2, axis=1)
    kurtosis = float(weights @ squares**2 / total / (dim * (dim + 2)))
    between, own = _between(x, weights / total, columns), compact(params, columns)
    norms = np.linalg.norm(own.experts, axis=-1)
    gates = np.column_stack([params.gating, params.gating_bias]) if config.fit_intercept else params.gating
    ridge = wide_ridge(config.ridge, dim) if units.inputs.column_wise else config.ridge
    penalty = 0.5 * np.sum((gates - gates.mean(axis=0)) ** 2)
    found: dict[str, Any] = {
        **input_findings(units.inputs),
        **(_wide_findings(x, ridge) if units.inputs.column_wise else {}),
        "input_mean": float(np.linalg.norm(weights @ of_experts / total)),
        "input_kurtosis": kurtosis,
        "effective_samples": counts.tolist(),
        "classification_entropy": entropy,
        "ridge_penalty": ridge * float(penalty),
        "expert_norms": norms.tolist(),
        "gate_angle_degrees": _gate_angle(own.experts.reshape(-1, dim), own.gating, between),
        "collapsed_experts": [i + 1 for i in range(k) if config.noise != "known" and collapsed[i]],
        "exact_experts": [i + 1 for i in range(k) if exact[i]],
        "noise_floor": (noise_floor(params.noise_std, least, total) * np.asarray(scale)).tolist()
        if per_expert
        else None,
        "nats_below_maximum": math.nan if uncertainty is None else float(uncertainty.shortfall),
        "information_condition": math.nan if uncertainty is None else float(uncertainty.covariance.condition),
        "ridge_cost": math.nan if uncertainty is None else float(uncertainty.ridge.cost),
        "gates_held_by_ridge": []
        if uncertainty is None
        else [i + 1 for i, share in enumerate(np.asarray(uncertainty.ridge.shares)) if share > HELD_BY_RIDGE],
    }
    if result.spectral is not None and problem.transforms is not None:
        signals = {2: problem.transforms.second, config.order: problem.transforms.high}
        found |= {
            "transform_signal": {
                m: 1.0 / math.sqrt(math.factorial(m) * float(transform.second_moment))
                for m, transform in signals.items()
            },
            "second_moment_eigenvalues": np.asarray(result.spectral.second_moment_eigenvalues).tolist(),
            "tensor_eigenvalues": np.asarray(result.spectral.decomposition.eigenvalues).tolist(),
            "spectral_status": Status(int(result.spectral.status)).words,
        }
    if result.optima is not None:
        optima = np.asarray(result.optima, np.float64)
        optima = optima[np.isfinite(optima)]
        found |= {"optima": optima.tolist(), "optima_spread": float(np.ptp(optima)) if optima.size else 0.0}
    if result.search is not None:
        found |= {"num_starts": int(result.search.num_starts), "search_end": _search_end(result.search)}
    uses_moments = problem.transforms is not None
    notes = [_exact_note(i, float(counts[i - 1]), given_noise[i - 1]) for i in found["exact_experts"]]
    return found | {"notes": notes + _notes(found, params.gating.any(), uses_moments, total, dim, k, config)}


def _wide_findings(x: np.ndarray, ridge: float) -> dict[str, Any]:
    """The keys of `diagnose` for a fit whose inputs z (n, d) were standardised column by column.

    For independent rows with E[z z'] = C of unit diagonal, E[(z_i . z_j)^2] = tr C^2, which is d plus the sum of the squared
    correlations. The mean over the pairs of m rows of uncorrelated normal inputs has a relative error of about 2 / m, whatever d.
    """
    repeats = max(len(x) // ROWS_OF_CORRELATION, 1)
    rows = x[::repeats][:ROWS_OF_CORRELATION]
    rows = rows / np.maximum(np.sqrt(np.mean(x**2, axis=0)), np.finfo(float).tiny)
    products = np.triu(rows @ rows.T, 1)
    pairs = max(len(rows) * (len(rows) - 1) // 2, 1)
    varying = max(int(np.count_nonzero(np.abs(x).max(axis=0))), 1)
    return {
        "input_correlation": float(np.sum(products**2)) / (pairs * varying) - 1.0,
        "gate_ridge": ridge,
    }


def _correlation_notes(found: dict[str, Any]) -> list[str]:
    correlation = found.get("input_correlation", 0.0)
    if correlation <= LARGEST_CORRELATION:
        return []
    return [
        "the inputs are correlated (an input's squared correlations with the others sum to "
        f"{correlation:.2g}), and this method does not whiten them"
    ]


def _search_end(search: SearchEnd) -> str:
    if not search.settled:
        return "all its generations were made"
    distinct = int(search.num_distinct)
    optima = "one optimum" if distinct == 1 else f"{distinct} optima"
    if search.by_descent:
        return (
            f"{search.num_best} of its {NUM_DESCENTS} runs of gradient descent reached the best optimum, and of its "
            f"{search.num_starts} starts none a better one"
        )
    return (
        f"its {search.num_starts} independent starts reached {optima}, {search.num_best} of them the best; "
        f"optima not seen draw {100 * float(search.unseen):.1f}% of all starts, in expectation"
    )


def input_findings(inputs: InputMap) -> dict[str, Any]:
    """Results of the whitening, as keys of `diagnose`."""
    return {
        "inputs_standard_normal": inputs.identity,
        "collinear_directions_dropped": inputs.dropped,
        "collinear_inputs": [list(columns) for columns in inputs.dependent],
        "constant_inputs": list(inputs.constant),
        "nearly_collinear_inputs": [list(columns) for columns in inputs.nearly_dependent],
    }


def input_notes(found: dict[str, Any]) -> list[str]:
    """Results of the whitening in words."""
    notes = []
    if found["constant_inputs"]:
        named = ", ".join(str(column + 1) for column in found["constant_inputs"])
        notes.append(
            f"left out, because they do not vary: inputs {named}; their coefficients are zero by choice"
        )
    for columns in found["collinear_inputs"]:
        named = ", ".join(str(column + 1) for column in columns)
        notes.append(
            f"a combination of the inputs {named} does not vary by more than rounding and was dropped: "
            "coefficients along it are zero by choice"
        )
    for columns in found["nearly_collinear_inputs"]:
        named = ", ".join(str(column + 1) for column in columns)
        notes.append(
            f"the inputs {named} are nearly collinear: each by itself is poorly determined, their combination is not"
        )
    return notes


def _between(x: np.ndarray, share: np.ndarray, columns: FreeColumns | None) -> np.ndarray | None:
    """(r, s) covariances of the inputs of experts and of gates, of inputs x (n, d) with shares (n,); None if they are the same."""
    if columns is None or not columns.gate_inputs:
        return None
    experts, gates = x[:, list(columns.expert_inputs)], x[:, list(columns.gate_inputs)]
    return (experts * share[:, None]).T @ gates - np.outer(share @ experts, share @ gates)


def _gate_angle(experts: np.ndarray, gating: np.ndarray, between: np.ndarray | None = None) -> float:
    """The least angle in degrees between a gate (minus the mean of gates) and the span of the experts; NaN without gates.

    It is that of linear functions of the inputs, whose products are covariances: `between` (r, s) has those of white inputs of
    experts (.., r) and gates (k, s); None if these inputs are the same.
    """
    centred = gating - gating.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    centred = centred if between is None else centred @ between.T
    if not np.isfinite(experts).all() or not norms.max() > 0:
        return math.nan
    basis = np.linalg.svd(experts, full_matrices=False)[2]
    inside = np.linalg.norm(centred @ basis.T, axis=1)
    share = np.clip(inside[norms > 0] / norms[norms > 0], 0.0, 1.0)
    return float(np.degrees(np.arccos(share.max())))


def _notes(
    found: dict[str, Any],
    has_gates: bool,
    uses_moments: bool,
    total: float,
    dim: int,
    k: int,
    config: MethodConfig,
) -> list[str]:
    notes = []
    for expert in found["collapsed_experts"]:
        advice = (
            'use fewer experts or noise="shared"' if config.noise == "per_expert" else "use fewer experts"
        )
        notes.append(
            f"the noise of expert {expert} ran off to zero, where the likelihood is unbounded: it fits samples exactly; {advice}"
        )
    notes += input_notes(found)
    for expert in found["gates_held_by_ridge"]:
        notes.append(
            f"the gate of expert {expert} is held by the ridge alone: it separates its samples from others, "
            "and its size means nothing"
        )
    rows, _ = num_coefficients(dim, config.fit_intercept, config.columns)
    for expert, count in enumerate(found["effective_samples"]):
        if count < FEW_SAMPLES_PER_PARAMETER * rows:
            notes.append(
                f"expert {expert + 1} rests on {count:.1f} effective samples for {rows} coefficients: fewer experts may do"
            )
    theory = []
    centred = config.has_expert_biases or config.log_density is not None
    if not centred and found["input_mean"] > max(_STANDARD_ERRORS * math.sqrt(dim / total), 0.1):
        theory.append(
            f"the mean of the inputs is {found['input_mean']:.2f} of their root mean square "
            "(fit_intercept=True subtracts it)"
        )
    error = math.sqrt(8.0 / (total * dim * (dim + 2)))
    if abs(found["input_kurtosis"] - 1.0) > max(_STANDARD_ERRORS * error, 0.05):
        theory.append(f"the inputs are not normal (kurtosis {found['input_kurtosis']:.2f} of a normal one's)")
    theory += _correlation_notes(found)
    norms = np.asarray(found["expert_norms"])
    if norms.max() > 1.2 * norms.min() or (
        is_gaussian(config.fn) and not channel_facts(config.fn).homogeneous and abs(norms.mean() - 1.0) > 0.2
    ):
        theory.append(
            f"the experts' norms, for white inputs, run from {norms.min():.2f} to {norms.max():.2f} and are not all 1"
        )
    angle = found["gate_angle_degrees"]
    if has_gates and angle < 80.0:
        theory.append(f"a gate is at {angle:.0f} degrees from the experts' span, not at 90")
    eigenvalues = found.get("second_moment_eigenvalues", [])
    if k < len(eigenvalues) and eigenvalues[k] > 0.5 * eigenvalues[k - 1]:
        theory.append(
            f"T2 has no gap after its eigenvalue {k} ({eigenvalues[k - 1]:.3g}, then {eigenvalues[k]:.3g}): "
            "too few samples, or another k"
        )
    if theory:
        used = "taken alone, the moments are a start, not an estimate"
        if not uses_moments:
            used = NO_MOMENTS
        notes.append(f"{used}: " + "; ".join(theory))
    if uses_moments and np.all(np.abs(norms - 1.0) < _SET_TO_ONE):
        assumed = ["experts of norm 1 in the units of the fit"]
        constant = config.columns is not None and not config.columns.gate_inputs
        assumed += ["gates orthogonal to the experts"] if k > 1 and not has_gates and not constant else []
        notes.append(
            f"not checked, because this method does not fit them: {' and '.join(assumed)}, which the moments assume; "
            'method="spectral_em" fits and checks them'
        )
    return notes
