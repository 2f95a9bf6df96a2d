"""The inputs of the experts and those of the gates: which columns they are, and the map to white inputs of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moejax.checks import brief, require
from moejax.fitting.whitening import InputMap, InputMoments, input_moments, map_of_moments, moments_of_columns
from moejax.likelihood.free_columns import FreeColumns, free_columns, with_offset
from moejax.methods.method import lookup_method, method_names, moments_of
from moejax.methods.options import FitOptions
from moejax.registry import nearest

MOST_COLUMNS = 10**6
"""Columns that an option may name."""


class InputRoles(NamedTuple):
    """The columns of x that experts and gates read; each is ascending."""

    experts: tuple[int, ...]
    gates: tuple[int, ...]
    """No columns for constant gates."""

    @property
    def same(self) -> bool:
        """True if experts and gates have the same inputs."""
        return self.experts == self.gates


def input_roles(options: FitOptions, dim: int) -> InputRoles:
    """The columns of experts and gates by the options, whose columns are numbers (`numbered_columns`).

    >>> input_roles(FitOptions(gate_inputs=(2,)), 3)
    InputRoles(experts=(0, 1, 2), gates=(2,))

    Args:
        options: the checked options.
        dim: d.
    """
    everything = tuple(range(dim))
    experts, gates = (
        everything if columns is None else tuple(int(column) for column in columns)
        for columns in (options.expert_inputs, options.gate_inputs)
    )
    return InputRoles(experts, () if options.gate == "constant" else gates)


def names_of(x: Any) -> tuple[str, ...] | None:
    """The names of the columns of a frame, if all are text; None for anything else."""
    names = list(x.columns) if isinstance(x, pd.DataFrame) else []
    return tuple(names) if names and all(isinstance(name, str) for name in names) else None


def numbered_columns(
    columns: Sequence[int | str] | None, dim: int, names: Sequence[str] | None, name: str
) -> tuple[int, ...] | None:
    """Columns by number or by name as ascending numbers; None stays None.

    >>> numbered_columns(["size", 0], 3, ["age", "mass", "size"], "gate_inputs")
    (0, 2)

    Args:
        columns: numbers from 0, or names.
        dim: d.
        names: (d,) names of the columns; None if they have none.
        name: the option's name in messages.

    Raises:
        ValueError: no such column, or one that is there twice.
    """
    if columns is None:
        return None
    numbers = []
    for column in columns:
        if isinstance(column, str):
            if names is None:
                raise ValueError(
                    f"{name}: expected column numbers, because x has no names, got {brief(column)}"
                )
            if column not in names:
                raise ValueError(f"{name}: unknown column {brief(column)}; {nearest(column, names)}")
            require(list(names).count(column) == 1, name, "names that occur once among the columns", column)
            numbers.append(list(names).index(column))
        else:
            require(column < dim, name, f"column numbers from 0 to {dim - 1}", column)
            numbers.append(column)
    require(len(set(numbers)) == len(numbers), name, "each column once", list(columns))
    return tuple(sorted(numbers))


def with_numbered_columns(options: FitOptions, dim: int, names: Sequence[str] | None) -> FitOptions:
    """The checked options, with columns as ascending numbers.

    Raises:
        ValueError: no such column, or one that is there twice.
    """
    if options.gate_inputs is None and options.expert_inputs is None:
        return options
    return dataclasses.replace(
        options,
        gate_inputs=numbered_columns(options.gate_inputs, dim, names, "gate_inputs"),
        expert_inputs=numbered_columns(options.expert_inputs, dim, names, "expert_inputs"),
    )


def checked_columns(value: Any, name: str) -> tuple[int | str, ...] | None:
    """Columns as a tuple of numbers (from 0) and names; None for all.

    Raises:
        ValueError: something else, or no column.
    """
    if value is None:
        return None
    words = "column numbers (from 0) or names in a list, at least one, or None for all"
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    listed |= isinstance(value, np.ndarray | pd.Index) and value.ndim == 1
    require(listed and 0 < len(value) <= MOST_COLUMNS, name, words, value)
    columns = []
    for entry in list(value):
        whole = isinstance(entry, int | np.integer) and not isinstance(entry, bool | np.bool_)
        require(isinstance(entry, str) or (whole and entry >= 0), name, words, entry)
        columns.append(str(entry) if isinstance(entry, str) else int(entry))
    return tuple(columns)


def require_roles(options: FitOptions) -> None:
    """Refuse options about inputs that contradict each other or the method.

    Raises:
        ValueError: they do.
    """
    if options.gate == "constant" and options.gate_inputs is not None:
        raise ValueError(
            f'gate_inputs: expected None with gate="constant", which has none, got {brief(options.gate_inputs)}'
        )
    changed = [
        name
        for name in ("gate", "gate_inputs", "expert_inputs")
        if getattr(options, name) != getattr(FitOptions, name)
    ]
    if changed and not lookup_method(options.method).separate_inputs:
        able = " or ".join(repr(name) for name in method_names() if lookup_method(name).separate_inputs)
        raise ValueError(f"method: expected {able} with {changed[0]}, got {options.method!r}")


def require_offset_known(options: FitOptions) -> None:
    """Refuse a method that does not know of an offset: its moments assume that there is none, or it makes all coefficients free.

    Raises:
        ValueError: with the methods that do.
    """
    able = [
        name
        for name in method_names()
        if lookup_method(name).separate_inputs and moments_of(name) in ("none", "optional")
    ]
    words = f"{' or '.join(map(repr, able))} with an offset"
    require(options.method in able, "method", words, options.method)
    require(options.start == "random", "start", "'random' with an offset", options.start)


def roles_undone(options: FitOptions) -> FitOptions:
    """The options of a fit in which experts and gates have all inputs."""
    names = ("gate", "gate_inputs", "expert_inputs")
    return dataclasses.replace(options, **{name: getattr(FitOptions, name) for name in names})


class MappedInputs(NamedTuple):
    """The map to the white inputs of experts and gates."""

    inputs: InputMap
    """To a design whose first columns are the inputs of the experts; those of the gates follow, if they are not the same."""
    num_expert_inputs: int
    """r, the rank of the experts' inputs."""
    columns: FreeColumns | None
    """The free columns of the design; None if all are."""

    @property
    def of_experts(self) -> InputMap:
        """The map to the white inputs of the experts alone."""
        return self.inputs._replace(matrix=self.inputs.matrix[..., : self.num_expert_inputs])


def inputs_as_they_are(inputs: InputMap) -> MappedInputs:
    """The map if experts and gates have the same inputs, all of them."""
    return MappedInputs(inputs, inputs.rank, None)


def mapped_inputs(
    x: np.ndarray,
    weights: np.ndarray,
    roles: InputRoles,
    *,
    fit_intercept: bool,
    precision: float,
) -> MappedInputs:
    """White inputs of the experts, and white inputs of the gates.

    They are whitened apart: each set by its own second moments. So a fit does not depend on the units of either.

    Args:
        x: (n, d), finite.
        weights: (n,); rows of weight zero are ignored.
        roles: the columns of experts and gates.
        fit_intercept: if true, the experts have biases, and so have gates that are not constant.
        precision: as in `input_map`.

    Raises:
        ValueError: a column's values are so large or small that its coefficients are not representable.
    """
    moments = input_moments(x, weights, centre=fit_intercept)
    whole = map_of_moments(moments, centre=fit_intercept, precision=precision)
    everything = tuple(range(x.shape[1]))

    def map_of(columns: tuple[int, ...]) -> InputMap:
        if columns == everything:
            return whole
        if whole.identity:
            return whole._replace(matrix=whole.matrix[:, columns])
        return _of_columns(moments, columns, centre=fit_intercept, precision=precision)

    experts = map_of(roles.experts)
    if roles.same:
        return MappedInputs(experts, experts.rank, None)
    biases = {"expert_biases": fit_intercept, "gate_biases": fit_intercept or not roles.gates}
    if not roles.gates:
        return MappedInputs(experts, experts.rank, free_columns(experts.rank, 0, **biases))
    gates = map_of(roles.gates)
    require(gates.rank > 0, "gate_inputs", "a column that varies", "constant columns only")
    both = experts._replace(
        matrix=np.concatenate([experts.matrix, gates.matrix], axis=1),
        dropped=experts.dropped + gates.dropped,
        dependent=_union(experts.dependent, gates.dependent),
        constant=_union(experts.constant, gates.constant),
        nearly_dependent=_union(experts.nearly_dependent, gates.nearly_dependent),
    )
    columns = free_columns(experts.rank, gates.rank, **biases)
    return MappedInputs(both, experts.rank, columns)


def with_offset_column(mapped: MappedInputs, *, fit_intercept: bool) -> MappedInputs:
    """The map with a column of zeros for the offset, which is no input, after those of experts and gates."""
    inputs, columns = mapped.inputs, mapped.columns
    if columns is None:
        own = tuple(range(inputs.rank)) + (inputs.rank,) * fit_intercept
        columns = FreeColumns(inputs.rank, own, own)
    matrix = np.pad(inputs.matrix, [(0, 0), (0, 1)])
    return mapped._replace(inputs=inputs._replace(matrix=matrix), columns=with_offset(columns))


def _of_columns(
    moments: InputMoments, columns: tuple[int, ...], *, centre: bool, precision: float
) -> InputMap:
    """The whitening of some columns, as a map of all: the others have rows of zeros."""
    part = map_of_moments(
        moments_of_columns(moments, columns), centre=centre, precision=precision, may_keep=False
    )
    dim, places = len(moments.size), np.asarray(columns)
    matrix = np.zeros((dim, part.matrix.shape[1]))
    matrix[places] = part.matrix

    def named(groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(places[list(group)].tolist()) for group in groups)

    # of other columns only the mean is kept, which the map of both sets shares
    mean = moments.origin + moments.steps * moments.mean if centre else np.zeros(dim)
    return part._replace(
        mean=mean,
        matrix=matrix,
        dependent=named(part.dependent),
        constant=tuple(places[list(part.constant)].tolist()),
        nearly_dependent=named(part.nearly_dependent),
    )


def _union(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
    """The entries of both, each once, in order."""
    return tuple(sorted(set(one) | set(other)))
