"""Samples of a few sizes only, so that fits of nearly equal size share their compiled programs."""

from __future__ import annotations

import numpy as np

FEWEST_ROWS = 64
"""Rows of the smallest program. Trials have a size of their own (`moejax.sweep.trial`): there one program serves many cells."""


def padded_size(num_rows: int) -> int:
    """The next of FEWEST_ROWS and m 2^e, m = 8 .. 15: at most an eighth more than num_rows, if that is larger."""
    if num_rows <= FEWEST_ROWS:
        return FEWEST_ROWS
    step = 2 ** ((num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


def padded(weights: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights (n,) and arrays (n, ..) with rows of weight zero up to `padded_size`: copies of a row of positive weight."""
    more = padded_size(len(weights)) - len(weights)
    row = int(np.argmax(weights > 0))
    copies = (np.concatenate([a, np.broadcast_to(a[row], (more, *a.shape[1:]))]) for a in arrays)
    return np.pad(weights, (0, more)), *copies
