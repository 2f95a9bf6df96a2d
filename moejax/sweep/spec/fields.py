"""The fields that a sweep may vary, read from the settings of `moejax.sweep.trial`.

A field added to `DataSettings` or `AlgorithmSettings` is a field of the spec, a column of the table and a
part of the hashes without a change here.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from moejax.console import shorten
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings

METHOD_FIELD = "method"
SHORT = {
    "num_samples": "n",
    "dim": "d",
    "num_experts": "k",
    "noise_std": "σ",
    "gating_norm": "‖w‖",
    "activation": "g",
}
"""Symbols of fields, for titles and narrow tables."""
DEFAULT_WORD = "default"
"""TOML has no null: this word stands for None in a field that may be None."""
LARGEST_WHOLE = 2**31 - 1
"""Largest whole number of a field: JAX counts in 32 bits."""
LONGEST_SHOWN = 200
"""Most characters of a value in a message."""
DEEPEST_SHOWN = 4
"""Most levels of lists in a message."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: its name, the hash it belongs to, the type it takes and its default."""

    name: str
    group: str
    """"data" or "algorithm"."""
    annotation: Any
    default: Any

    @property
    def accepts(self) -> str:
        """The accepted values, in words."""
        return " or ".join(_words(option) for option in _options(self.annotation))

    def coerce(self, value: Any) -> Any:
        """The value in the field's type: lists become tuples, and 1e4 an int for a field of whole numbers.

        Raises:
            ValueError: the value has another type; the message names the accepted values.
        """
        for option in _options(self.annotation):
            try:
                return _coerce(option, value)
            except ValueError:
                continue
        raise ValueError(f"{show(value)} is not accepted: expected {self.accepts}")


def _fields_of(settings: type, group: str) -> dict[str, Field]:
    hints = typing.get_type_hints(settings)
    return {
        field.name: Field(field.name, group, hints[field.name], field.default)
        for field in dataclasses.fields(settings)
    }


DATA_FIELDS: dict[str, Field] = _fields_of(DataSettings, "data")
ALGORITHM_FIELDS: dict[str, Field] = {
    name: field
    for name, field in _fields_of(AlgorithmSettings, "algorithm").items()
    if name != METHOD_FIELD  # methods have a separate key in a spec
}
FIELDS: dict[str, Field] = DATA_FIELDS | ALGORITHM_FIELDS


def show(value: Any, level: int = 0) -> str:
    """A value as it is written in a spec; `level` is its depth in nested lists."""
    if value is None:
        return DEFAULT_WORD
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        inner = "..." if level > DEEPEST_SHOWN else ", ".join(show(item, level + 1) for item in value)
        return shorten(f"[{inner}]", LONGEST_SHOWN)
    if isinstance(value, str):
        return shorten(f'"{value}"', LONGEST_SHOWN)
    try:
        return shorten(str(value), LONGEST_SHOWN)
    except ValueError:  # Python refuses to write integers of several thousand digits
        return f"a number of {value.bit_length():,} bits"
    except RecursionError:
        return "a value nested too deeply to be shown"


def whole(value: Any) -> int | None:
    """A whole number, written as 1000, 1e3 or 1000.0; None if the value is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if isinstance(value, int) or value.is_integer() else None


def finite(value: Any) -> float | None:
    """A number as a float; None if the value is no number, or too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _options(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]


def _words(option: Any) -> str:
    if option is types.NoneType:
        return f'"{DEFAULT_WORD}"'
    if typing.get_origin(option) is tuple:
        plural = {str: "names", float: "numbers", int: "whole numbers"}
        return f"a list of {plural[typing.get_args(option)[0]]}"
    words = {str: "a name", bool: "true or false", float: "a finite number"}
    return words.get(option, f"a whole number of at most {LARGEST_WHOLE}")


def _coerce(option: Any, value: Any) -> Any:
    if option is types.NoneType:
        if value is None or value == DEFAULT_WORD:
            return None
    elif typing.get_origin(option) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(typing.get_args(option)[0], item) for item in value)
    elif option is bool or isinstance(value, bool):
        if option is bool and isinstance(value, bool):
            return value
    elif option is int:
        number = whole(value)
        if number is not None and abs(number) <= LARGEST_WHOLE:
            return number
    elif option is float:
        number = finite(value)
        if number is not None:
            return number + 0.0  # -0.0 and 0.0 are one cell
    elif option is str and isinstance(value, str) and value != DEFAULT_WORD and value.isprintable():
        return value
    raise ValueError
