"""Labels of output families other than the Gaussian: their check, their unit, and their nuisances."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.environment import compiled_fast
from moejax.fitting.label_units import FittedLabels, LabelMap
from moejax.fitting.padding import padded
from moejax.model.activations import get_activation
from moejax.model.family import Family, Nuisances, channel_facts
from moejax.moments.family_transforms import transform_at
from moejax.moments.marginal import estimate_nuisances

NORMAL_QUARTILES = 1.349
"""The interquartile range of a normal variable, in standard deviations."""


def support_in_words(family: Family) -> str:
    """The labels that a family may have, in words."""
    if isinstance(family.support, int):
        return "0 or 1" if family.support == 1 else f"whole numbers from 0 to {family.support}"
    words = {"real": "finite numbers", "positive": "positive numbers", "counts": "counts 0, 1, 2, .."}
    return words[family.support]


def require_support(y: np.ndarray, weights: np.ndarray, family: Family, *, varied: bool = True) -> None:
    """Refuse labels (n,) with weight that the family cannot have or, if they are to be `varied`, that all have one value.

    Raises:
        ValueError: with the first such label and its row, counted from 0.
    """
    used = np.flatnonzero(weights > 0)
    labels = y[used]
    if family.support == "real":
        good = np.isfinite(labels)
    elif family.support == "positive":
        good = labels > 0
    else:
        most = family.support if isinstance(family.support, int) else np.inf
        good = (labels >= 0) & (labels <= most) & (labels == np.round(labels))
    if not good.all():
        at = int(np.argmin(good))
        raise ValueError(
            f"y: expected {support_in_words(family)} for family {family.name}, got {labels[at]:.6g} in row {used[at]}"
        )
    if varied and labels.min() == labels.max():
        raise ValueError(
            f"y: expected labels of more than one value for family {family.name}, got {labels[0]:.6g} in every row"
        )


def family_labels(
    y: np.ndarray,
    weights: np.ndarray,
    z: np.ndarray,
    family: Family,
    *,
    fit_intercept: bool,
    noise_std: np.ndarray | None,
    standardise: bool,
) -> tuple[FittedLabels, Nuisances]:
    """The unit in which labels are fitted, and norm, intercept and dispersion of the experts in it.

    Labels of a location family with a homogeneous g are scaled by their interquartile range, and centred at their median if g is
    linear and there are intercepts: both are safe from outliers. Other labels are fitted as they are.

    Args:
        y: (n,) labels that `require_support` accepts.
        weights: (n,)
        z: (n, r) white inputs of the experts.
        family: the output family.
        fit_intercept: if true, the experts have intercepts.
        noise_std: () the dispersion, if it is known.
        standardise: if false, labels are not scaled.

    Raises:
        ValueError: a known dispersion of a family without.
    """
    require(
        noise_std is None or family.has_dispersion,
        "noise_std",
        f"None for family {family.name}, which has no dispersion",
        noise_std,
    )
    used = weights > 0
    low, middle, high = np.quantile(y[used], (0.25, 0.5, 0.75))
    labels = LabelMap(0.0, 1.0)
    if standardise and channel_facts(family).homogeneous:
        centred = fit_intercept and family.activation is get_activation("linear")
        spread = (high - low) / NORMAL_QUARTILES if high > low else float(np.std(y[used]))
        labels = LabelMap(float(middle) if centred else 0.0, float(spread))
    known = None if noise_std is None else float(noise_std) / float(labels.scale)
    found = _nuisances(labels(y), weights, family, fit_intercept, known)
    if not family.marginal_tells_norm:
        found = _norm_by_trace(labels(y), weights, z, family, fit_intercept, known)
    return FittedLabels(labels, np.asarray(found.dispersion)), found


@functools.partial(jax.jit, static_argnames=("family", "intercept", "free"), compiler_options=compiled_fast())
def _estimated(
    y: jax.Array,
    weights: jax.Array,
    norm: jax.Array,
    dispersion: jax.Array,
    *,
    family: Family,
    intercept: bool,
    free: tuple[bool, bool],
) -> Nuisances:
    return estimate_nuisances(
        y,
        weights,
        family=family,
        norm=None if free[0] else norm,
        intercept=None if intercept else 0.0,
        dispersion=None if free[1] else dispersion,
    ).nuisances


def _nuisances(
    y: np.ndarray,
    weights: np.ndarray,
    family: Family,
    intercept: bool,
    dispersion: float | None,
    norm: float | None = None,
) -> Nuisances:
    """The nuisances as numbers, by marginal likelihood; a family whose labels do not tell the norm has norm 1, or the one given."""
    norm = 1.0 if norm is None and not family.marginal_tells_norm else norm
    dtype = jnp.result_type(float)
    kept, labels = (np.asarray(a, dtype) for a in padded(weights, y))
    given = [np.asarray(1.0 if value is None else value, dtype) for value in (norm, dispersion)]
    found = _estimated(
        labels, kept, *given, family=family, intercept=intercept, free=(norm is None, dispersion is None)
    )
    values = [float(value) for value in found]
    usable = all(np.isfinite(value) for value in values) and values[0] > 0 and values[2] > 0
    return Nuisances(*values) if usable else Nuisances(1.0, 0.0, 1.0)


LEAST_OWN_NORM = 0.25
"""The norm without the offset is at least this share of the one that explains the offset too."""


def without_offset(
    nuisances: Nuisances, offset: np.ndarray, weights: np.ndarray, *, fit_intercept: bool
) -> Nuisances:
    """The nuisances without an offset, from those of labels with it.

    A normal offset that is independent of the inputs adds its mean to the intercept and its variance to the squared norm. Without
    an intercept its second moment is in the norm.

    >>> without_offset(Nuisances(1.25, 2.0, 1.0), np.array([0.0, 2.0]), np.ones(2), fit_intercept=True)
    Nuisances(norm=0.75, intercept=1.0, dispersion=1.0)

    Args:
        nuisances: those of the labels as they are.
        offset: (n,) in the unit of the fit.
        weights: (n,)
        fit_intercept: if true, the experts have intercepts.
    """
    share = weights / weights.sum()
    mean = float(share @ offset) if fit_intercept else 0.0
    square = max(nuisances.norm**2 - float(share @ (offset - mean) ** 2), 0.0)
    norm = max(float(np.sqrt(square)), LEAST_OWN_NORM * nuisances.norm)
    return nuisances._replace(norm=norm, intercept=nuisances.intercept - mean)


FIRST_NORMS = (0.9, 0.6)
"""The first norms that are tried, in standard deviations of the labels (robustly), or of the logarithms of positive ones."""
SECANT_STEPS = 3


def _norm_by_trace(
    y: np.ndarray,
    weights: np.ndarray,
    z: np.ndarray,
    family: Family,
    intercept: bool,
    dispersion: float | None,
) -> Nuisances:
    """The norm at which tr T2 = E[l_2(y) (|z|^2 - r)] is one, as sum_i E[P_i] is; by secants in the logarithms of both."""
    share = weights / weights.sum()
    excess = np.sum(z**2, axis=1) - z.shape[1]
    if family.support == "positive":
        logs = np.log(np.maximum(y, np.finfo(float).tiny))
        spread = float(np.sqrt(share @ (logs - share @ logs) ** 2)) or 1.0
    else:
        low, high = np.quantile(y, (0.25, 0.75))
        spread = float(high - low) / NORMAL_QUARTILES or 1.0

    def tried(norm: float) -> tuple[float, float, Nuisances]:
        at = _nuisances(y, weights, family, intercept, dispersion, norm)
        transform = transform_at(family, at, 2, "weighted", 3)
        trace = -1.0
        if np.isfinite(transform.second_moment):
            assert transform.knots is not None, "transforms of families have knots"
            trace = float(share @ (np.interp(y, transform.knots, transform.values) * excess))
        return float(np.log(norm)), float(np.log(max(trace, LEAST_TRACE))), at

    points = [tried(factor * spread) for factor in FIRST_NORMS]
    for _ in range(SECANT_STEPS):
        (x0, f0, _), (x1, f1, _) = points[-2:]
        if f0 == f1:
            break
        step = float(np.clip(-f1 * (x1 - x0) / (f1 - f0), -1.0, 1.0))
        points.append(tried(float(np.exp(np.clip(x1 + step, np.log(0.05 * spread), np.log(spread))))))
    return min(points, key=lambda point: abs(point[1]))[2]


LEAST_TRACE = 1e-3
"""Traces below this one count as this one."""
