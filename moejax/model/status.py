"""How a computation ended: one number and one sentence for every outcome, from a tensor's decomposition to a whole fit."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """Outcome of a decomposition, a spectral estimate, a method or a trial. Stores keep the numbers: they never change.

    >>> Status(5).words
    'the iterations ended with their budget before they converged'
    """

    OK = 0
    RANK_DEFICIENT = 1
    TENSOR_NOT_CONVERGED = 2
    TENSOR_NOT_POSITIVE = 3
    NOT_FINITE = 4
    NOT_CONVERGED = 5

    @property
    def words(self) -> str:
        """The outcome in a sentence; "ok" if nothing is wrong."""
        return _WORDS[self]


_WORDS = {
    Status.OK: "ok",
    Status.RANK_DEFICIENT: "T2 has fewer positive eigenvalues than experts: the sample is too small or the model wrong",
    Status.TENSOR_NOT_CONVERGED: "the tensor power iteration did not converge within its budget",
    Status.TENSOR_NOT_POSITIVE: "the whitened moment tensor has a non-positive eigenvalue: the sample is too small or the model "
    "wrong",
    Status.NOT_FINITE: "the moments are not finite",
    Status.NOT_CONVERGED: "the iterations ended with their budget before they converged",
}
