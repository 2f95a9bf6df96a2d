"""The columns of the design whose coefficients are free, if experts and gates do not have the same inputs.

The design of a mixture has a column for every input and, last, one of ones for biases. Usually all coefficients are free. If
the experts have other inputs than the gates, or the gates none, the coefficients of the other columns stay zero: no step moves
them, and the free parameters do not contain them. The choice is static, so that all sums are those of the free columns only.

An offset, a known addend to the linear predictor of every expert, is a column too. Its coefficient is one in the experts and zero
in the gates, and is not free either.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.model.gaussian import Array
from moejax.model.mixture import MoEParams


class FreeColumns(NamedTuple):
    """The columns of the design whose coefficients are free; all are ascending, and the column `dim` is that of ones."""

    dim: int
    """d, the number of inputs in the design."""
    experts: tuple[int, ...]
    """Columns of the experts."""
    gates: tuple[int, ...]
    """Columns of the gates."""
    offset: int | None = None
    """The column of the offset, which is in neither; None if there is none."""

    @property
    def expert_inputs(self) -> tuple[int, ...]:
        """The inputs of the experts, without the column of ones."""
        return tuple(column for column in self.experts if column < self.dim)

    @property
    def gate_inputs(self) -> tuple[int, ...]:
        """The inputs of the gates, without the column of ones; none for constant gates."""
        return tuple(column for column in self.gates if column < self.dim)

    @property
    def has_expert_biases(self) -> bool:
        """True if the experts' biases are free."""
        return self.dim in self.experts

    @property
    def has_ones(self) -> bool:
        """True if the design has a column of ones."""
        return self.dim in self.experts or self.dim in self.gates


def free_columns(
    num_expert_inputs: int, num_gate_inputs: int, *, expert_biases: bool, gate_biases: bool
) -> FreeColumns:
    """The columns of a design of the experts' inputs, the gates' inputs and ones, in this order.

    >>> free_columns(2, 1, expert_biases=True, gate_biases=True)
    FreeColumns(dim=3, experts=(0, 1, 3), gates=(2, 3), offset=None)
    >>> free_columns(2, 0, expert_biases=False, gate_biases=True)
    FreeColumns(dim=2, experts=(0, 1), gates=(2,), offset=None)

    Args:
        num_expert_inputs: r.
        num_gate_inputs: s, zero for constant gates.
        expert_biases: if true, the experts' biases are free.
        gate_biases: if true, those of the gates are.
    """
    dim = num_expert_inputs + num_gate_inputs
    experts, gates = tuple(range(num_expert_inputs)), tuple(range(num_expert_inputs, dim))
    return FreeColumns(dim, experts + (dim,) * expert_biases, gates + (dim,) * gate_biases)


def with_offset(columns: FreeColumns) -> FreeColumns:
    """The columns of the same design with an offset after its inputs.

    >>> with_offset(free_columns(2, 0, expert_biases=True, gate_biases=True))
    FreeColumns(dim=3, experts=(0, 1, 3), gates=(3,), offset=2)
    """
    dim = columns.dim

    def moved(places: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(place + (place == dim) for place in places)

    return FreeColumns(dim + 1, moved(columns.experts), moved(columns.gates), dim)


def expert_columns(array: Array, columns: FreeColumns | None) -> Array:
    """The free columns of the experts, from an array (.., D); None is for all."""
    return array if columns is None else array[..., np.asarray(columns.experts, np.int32)]


def gate_columns(array: Array, columns: FreeColumns | None) -> Array:
    """The free columns of the gates, from an array (.., D); None is for all."""
    return array if columns is None else array[..., np.asarray(columns.gates, np.int32)]


def parts_of_design(
    design: Float[jax.Array, "D B"], columns: FreeColumns | None
) -> tuple[Float[jax.Array, "E B"], Float[jax.Array, "G B"]]:
    """The rows of a block (D, B) whose coefficients are free, in the experts and in the gates."""
    if columns is None:
        return design, design
    return design[np.asarray(columns.experts, np.int32)], design[np.asarray(columns.gates, np.int32)]


def expert_inputs(array: Array, columns: FreeColumns | None) -> Array:
    """The inputs of the experts, from an array (.., d) without ones; None is for all."""
    return array if columns is None else array[..., np.asarray(columns.expert_inputs, np.int32)]


def num_coefficients(dim: int, fit_intercept: bool, columns: FreeColumns | None) -> tuple[int, int]:
    """The numbers of free coefficients of one expert and of one gate, biases included.

    Args:
        dim: d; not read if there are `columns`.
        fit_intercept: if true, all biases are free; not read if there are `columns`.
        columns: the free columns, or None for all.
    """
    if columns is None:
        return dim + int(fit_intercept), dim + int(fit_intercept)
    return len(columns.experts), len(columns.gates)


def free_positions(num_rows: int, num_experts: int, num_other: int, columns: FreeColumns) -> np.ndarray:
    """(P,) positions of the free parameters among all: rows of experts, rows of gates (all D wide), others such as noise.

    Args:
        num_rows: rows of experts, k or k m.
        num_experts: k.
        num_other: parameters after the rows.
        columns: the free columns.
    """
    size = columns.dim + int(columns.has_ones)
    places = np.arange((num_rows + num_experts - 1) * size).reshape(-1, size)
    return np.concatenate(
        [
            expert_columns(places[:num_rows], columns).reshape(-1),
            gate_columns(places[num_rows:], columns).reshape(-1),
            places.size + np.arange(num_other),
        ]
    ).astype(np.int32)


def compact(params: MoEParams[Array], columns: FreeColumns | None) -> MoEParams[Array]:
    """Parameters whose experts (.., r) and gates (.., s) have their own inputs only."""
    if columns is None:
        return params
    gates = np.asarray(columns.gate_inputs, np.int32)
    return params._replace(experts=expert_inputs(params.experts, columns), gating=params.gating[..., gates])


def widened_experts(
    experts: Float[jax.Array, "... r"], columns: FreeColumns | None
) -> Float[jax.Array, "... d"]:
    """The inverse of `expert_inputs`, for coefficients (.., r): those of other inputs are zero, and that of an offset is one."""
    if columns is None:
        return experts
    wide = _spread(experts, columns.expert_inputs, columns.dim)
    return wide if columns.offset is None else wide.at[..., columns.offset].set(1.0)


def _spread(array: jax.Array, places: tuple[int, ...], size: int) -> jax.Array:
    """(.., size) zeros with the entries of an array (.., p) in the places (p,)."""
    wide = jnp.zeros((*array.shape[:-1], size), array.dtype)
    return wide.at[..., np.asarray(places, np.int32)].set(array)


def expanded(params: MoEParams, columns: FreeColumns | None) -> MoEParams:
    """The inverse of `compact`: the coefficients of other columns are zero, and the experts' of an offset is one."""
    if columns is None:
        return params
    gating = _spread(params.gating, columns.gate_inputs, columns.dim)
    return params._replace(experts=widened_experts(params.experts, columns), gating=gating)
