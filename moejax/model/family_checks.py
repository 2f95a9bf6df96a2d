"""The check of a user's output family: its log-density is normalised, finite and differentiable, and its mean is the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.environment import is_machines_fault
from moejax.model.family import Family
from moejax.model.gaussian import Array
from moejax.model.label_rule import label_rule
from moejax.model.on_host import on_host

_PREDICTORS = np.linspace(-2.0, 2.0, 33)
_DISPERSIONS = (0.5, 1.3)
LARGEST_MASS_ERROR = 1e-3
"""The total mass of a density may differ from one by this much at the points of the check."""
LARGEST_MEAN_ERROR = 1e-2
"""The mean may differ from the density's by this share of the labels' spread."""
_NOTICED = 1e-8
"""Derivatives must be finite at labels whose density, times the spacing of the nodes, is more."""


class _Values(NamedTuple, Generic[Array]):
    """A family on a rule over q labels, at p predictors."""

    labels: Array
    """(q,)"""
    mass: Array
    """(p, q) weight times density."""
    log_density: Array
    """(p, q)"""
    derivatives: Array
    """(4, p, q): first and second in t, then in log s."""
    mean: Array
    """(p,)"""


def _values(family: Family, t: jax.Array, s: jax.Array) -> _Values:
    rule = label_rule(family, t, jnp.full_like(t, 1.0 / t.size), s)
    y, column = rule.nodes[None], t[:, None] + jnp.zeros_like(rule.nodes)[None]
    log_density = family.log_density(y, column, s)
    at = family.second_order(y, column, s * jnp.ones_like(t)[:, None])
    derivatives = jnp.stack([at.score, at.curvature, at.dispersion_score, at.dispersion_curvature])
    mass = rule.weights[None] * jnp.exp(log_density)
    return _Values(rule.nodes, mass, log_density, derivatives, family.mean(t, s) + jnp.zeros_like(t))


def require_sound(family: Family) -> None:
    """Refuse a family whose log-density is not normalised, finite and differentiable, or whose mean is not its mean.

    Raises:
        ValueError: with the number that is wrong, and the predictor and dispersion where it is.
    """
    words = f"family {family.name}"
    for s in _DISPERSIONS if family.has_dispersion else (1.0,):
        try:
            at = on_host(_values, family, _PREDICTORS, s)
        except Exception as error:  # a user's function may raise anything
            if is_machines_fault(error):
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"{words}: expected functions of JAX arrays, but they failed: {type(error).__name__}: {reason}"
            ) from error
        _require_sound_at(words, at, s if family.has_dispersion else None)


def _require_sound_at(words: str, at: _Values[np.ndarray], s: float | None) -> None:
    def where(row: int) -> str:
        return f"at t = {_PREDICTORS[row]:g}" + ("" if s is None else f", dispersion {s:g}")

    if np.isnan(at.log_density).any():
        row, label = np.argwhere(np.isnan(at.log_density))[0]
        raise ValueError(
            f"{words}: expected a log-density, got nan for the label {at.labels[label]:.6g} {where(row)}"
        )
    mass = at.mass.sum(axis=1)
    worst = int(np.argmax(np.abs(mass - 1.0)))
    if not abs(mass[worst] - 1.0) <= LARGEST_MASS_ERROR:
        raise ValueError(
            f"{words}: expected a density that is normalised over the labels, got total mass {mass[worst]:.6g} {where(worst)}"
        )
    noticed = at.mass > _NOTICED
    wrong = noticed[None] & ~np.isfinite(at.derivatives)
    if wrong.any():
        which, row, label = np.argwhere(wrong)[0]
        what = (
            "first derivative in t",
            "second derivative in t",
            "first derivative in log s",
            "second derivative in log s",
        )
        raise ValueError(
            f"{words}: expected a finite {what[which]}, got {at.derivatives[which, row, label]} for the label "
            f"{at.labels[label]:.6g} {where(row)}"
        )
    _require_mean(words, at, where)


def _require_mean(words: str, at: _Values[np.ndarray], where: Callable[[int], str]) -> None:
    """The mean, unless the tails are so heavy that the rule does not tell it."""
    first = at.mass * np.abs(at.labels)
    outer = max(at.labels.size // 16, 1)
    tails = first[:, -outer:].sum(axis=1) * (at.labels.size > 2 * outer + 16)
    mean = at.mass @ at.labels
    spread = np.sqrt(np.maximum(at.mass @ at.labels**2 - mean**2, 0.0)) + 1e-12
    tolerance = LARGEST_MEAN_ERROR * spread + 10.0 * tails
    row = int(np.argmax(np.abs(mean - at.mean) - tolerance))
    if not abs(mean[row] - at.mean[row]) <= tolerance[row]:
        raise ValueError(
            f"{words}: expected the mean of its density, {mean[row]:.6g}, got {at.mean[row]:.6g} {where(row)}"
        )
