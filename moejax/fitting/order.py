"""The order of the experts of a result: by their share of the sample."""

from __future__ import annotations

import numpy as np

from moejax.model.mixture import HostParams, regauge

SAME_SHARE = 1e-9
"""Shares of the sample that differ by less count as equal."""


def canonical_order(params: HostParams, masses: np.ndarray) -> np.ndarray:
    """(k,) positions of the experts, the largest share of the sample first; equal shares by the first coefficient.

    Args:
        params: k experts, on the host.
        masses: (k,) sums of responsibilities.
    """
    shares = np.round(masses / masses.sum() / SAME_SHARE)
    first = np.asarray(params.experts, np.float64).reshape(len(shares), -1)[:, 0]
    return np.lexsort((first, -shares))


def canonical(params: HostParams, masses: np.ndarray) -> tuple[HostParams, np.ndarray]:
    """The mixture with its experts in `canonical_order`, its last gate zero again; and that order."""
    order = canonical_order(params, masses)
    return regauge(HostParams(*(np.asarray(leaf)[order] for leaf in params))), order
