"""Samples of a few sizes only, so that fits of nearly equal size share their compiled programs."""

from __future__ import annotations

import numpy as np

SMALLEST_PADDED = 64


def padded_size(num_rows: int) -> int:
    """The next of SMALLEST_PADDED and m 2^e, m = 8 .. 15: at most an eighth more than num_rows, if that is larger."""
    if num_rows <= SMALLEST_PADDED:
        return SMALLEST_PADDED
    step = 2 ** ((num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


def padded(weights: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights (n,) and arrays (n, ..) with rows of weight zero up to `padded_size`: copies of a row of positive weight."""
    more = padded_size(len(weights)) - len(weights)
    row = int(np.argmax(weights > 0))
    copies = (np.concatenate([a, np.broadcast_to(a[row], (more, *a.shape[1:]))]) for a in arrays)
    return np.pad(weights, (0, more)), *copies
