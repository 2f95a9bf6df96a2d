"""The checks of arguments of `fit` and `MoERegressor`: arrays and options, each by one function that both use.

All of them run on the host, before anything is compiled. A bad value is a ValueError of one line, `name: expected .., got ..`.
Arrays (`moejax.fitting.array_checks`) come back as NumPy arrays in double precision, options as plain Python values.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import brief_text, require
from moejax.fitting.array_checks import (
    NotNumbersError,
    as_numbers,
    checked_arrays,
    checked_inputs,
    checked_targets,
    checked_weights,
    input_precision,
)
from moejax.fitting.input_roles import checked_columns, require_roles
from moejax.likelihood.em import RIDGE
from moejax.likelihood.information import COVARIANCE_KINDS
from moejax.methods.method import STARTS, lookup_method
from moejax.methods.options import EstimatedNoise, FitOptions, Gate, Objective, WeightsAre
from moejax.model.activations import get_activation
from moejax.model.families import get_family
from moejax.model.inputs import LogDensity, get_log_density
from moejax.moments.label_transforms import TRANSFORM_KINDS

__all__ = [
    "CHECKS",
    "NOISE_MODELS",
    "NotNumbersError",
    "as_numbers",
    "checked_arrays",
    "checked_inputs",
    "checked_options",
    "checked_targets",
    "checked_weights",
    "flag",
    "input_precision",
    "key_data",
    "log_density_of",
    "noise_levels",
    "number_of_experts",
    "one_of",
    "prng_key",
    "real_number",
    "require_density_at",
    "whole_number",
]

NOISE_MODELS: tuple[EstimatedNoise, ...] = get_args(EstimatedNoise)
PRECISIONS = ("float32", "float64", None)
MOST_NUMBERS_TRIED = 1000
"""Most numbers of experts that a range or a list may hold."""
LARGEST_COUNT = 10**6
"""Largest budget of iterations, starts, restarts or passes: a fit keeps one entry of its history for each."""
LARGEST_CHUNK = 2**31 - 1
MOST_AVERAGED = 100
"""Most optima whose predictions may be averaged."""
AVERAGED = ("multistart", "mean_fit")
"""Methods whose optima may be averaged."""


def whole_number(
    value: Any, name: str, least: int = 1, most: int = LARGEST_COUNT, *, optional: bool = False
) -> int | None:
    """A whole number between two bounds; 3.0 is 3, as in a sweep's spec. True and "3" are refused.

    Raises:
        ValueError: it is something else.
    """
    if optional and value is None:
        return None
    number = _as_whole(value)
    words = f"a whole number from {least} to {most}" + (" or None" if optional else "")
    require(number is not None and least <= number <= most, name, words, value)
    return number


def _as_whole(value: Any) -> int | None:
    """The value as a whole number; None if it is none."""
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.bool_:
        return None
    try:
        return operator.index(value)
    except TypeError:
        number = _as_number(value)
        return int(number) if number is not None and number.is_integer() else None


def _as_number(value: Any) -> float | None:
    """A number or an array () as a real number, NaN and infinities included; None if it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    try:
        array = np.asarray(value)
    except Exception:  # an object's own conversion may raise any error, and then it is no number
        return None
    return float(array) if array.shape == () and array.dtype.kind in "iuf" else None


def real_number(value: Any, name: str, expected: str, good: Callable[[float], bool]) -> float:
    """A finite real number for which `good` is true, as a float.

    Raises:
        ValueError: it is something else; the message contains `expected`.
    """
    number = _as_number(value)
    require(number is not None and math.isfinite(number) and good(number), name, expected, value)
    assert number is not None
    return number


def flag(value: Any, name: str) -> bool:
    """True or False; values such as 0 or "no" are refused.

    Raises:
        ValueError: it is something else.
    """
    require(isinstance(value, bool | np.bool_), name, "True or False", value)
    return bool(value)


def one_of(choices: Sequence[Any]) -> Callable[[Any, str], Any]:
    """A function that checks that a value is one of a few words or numbers."""

    def check(value: Any, name: str) -> Any:
        alike = [choice for choice in choices if isinstance(value, type(choice)) and choice == value]
        require(bool(alike), name, " or ".join(map(repr, choices)), value)
        return alike[0]

    return check


def number_of_experts(
    value: Any, name: str = "num_experts", *, several: bool = True
) -> int | str | tuple[int, ...]:
    """k: a positive whole number or, if `several` may be tried, "auto" or the whole numbers of a range or a list.

    Raises:
        ValueError: it is something else.
    """
    if several and isinstance(value, str) and value == "auto":
        return value
    number = _as_whole(value)
    if number is not None:
        require(number >= 1, name, "a positive number", value)
        return number
    words = 'a whole number, several (a range or a list), or "auto"' if several else "a whole number"
    entries = _entries(value, MOST_NUMBERS_TRIED)
    require(several and entries is not None, name, words, value)
    numbers = [_as_whole(entry) for entry in entries or ()]
    require(0 < len(numbers) <= MOST_NUMBERS_TRIED, name, f"1 to {MOST_NUMBERS_TRIED} numbers", value)
    require(all(k is not None and k >= 1 for k in numbers), name, "positive whole numbers", value)
    return tuple(sorted({k for k in numbers if k is not None}))


def _entries(value: Any, most: int) -> list[Any] | None:
    """The entries of a list, a tuple, a range or an array (n,), one more than `most` at most; None if it is none of them."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if listed or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 1):
        return list(islice(value, most + 1))
    return None


def noise_levels(value: Any, outputs: tuple[int, ...], name: str = "noise_std") -> np.ndarray | None:
    """Known sigma, () or one for each output (m,), positive and finite; None if it is estimated.

    Args:
        value: a number, an array-like, or None.
        outputs: () for one output, (m,) for several.
        name: the argument's name in the message.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return None
    number = _as_number(value)
    levels = None if number is None else np.asarray(number)
    if number is None and outputs:
        numbers = [_as_number(entry) for entry in _entries(value, outputs[0]) or ()]
        if len(numbers) == outputs[0] and None not in numbers:
            levels = np.asarray(numbers, np.float64)
    good = levels is not None and bool(np.all(np.isfinite(levels) & (levels > 0)))
    words = "a positive finite number" + (f", one for each of {outputs[0]} outputs" if outputs else "")
    require(good, name, words + ", or None to estimate it", value)
    return levels


def prng_key(value: Any, name: str = "key") -> Any:
    """One PRNG key of JAX: `jax.random.key(0)`, or the uint32 array of `jax.random.PRNGKey(0)`.

    Raises:
        ValueError: it is something else, a whole number for example, or several keys.
    """
    good = False
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            good = value.shape == ()
        else:
            legacy = jax.eval_shape(jax.random.PRNGKey, 0)
            good = value.dtype == legacy.dtype and value.shape == legacy.shape
    require(good, name, "a PRNG key such as jax.random.key(0)", value)
    return value


def key_data(key: jax.Array) -> list[int]:
    """The numbers of a PRNG key of either kind."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.asarray(data).tolist()


def log_density_of(value: LogDensity | str | None, name: str = "log_density") -> LogDensity | None:
    """A function x (d,) -> () log p(x), given itself or by the name of a registered input distribution; or None.

    Raises:
        ValueError: it is something else, or the name of a distribution without a density.
    """
    if not isinstance(value, str):
        good = value is None or callable(value)
        require(good, name, "a function of x (d,), the name of an input distribution, or None", value)
        return value
    try:
        named = get_log_density(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if named is None:
        raise ValueError(f"{name}: input distribution {value!r} has no density")
    return named


def require_density_at(density: LogDensity, point: np.ndarray) -> None:
    """Refuse a log density that is not a finite number at a point (d,).

    Raises:
        ValueError: it raises there, or its value is not a finite number.
    """
    try:
        value = np.asarray(density(jnp.asarray(point)))
    except Exception as error:  # a user's function may raise any error
        raise ValueError(f"log_density: failed at x[0]: {brief_text(error)}") from error
    good = value.shape == () and value.dtype.kind == "f" and bool(np.isfinite(value))
    require(good, "log_density", "a finite number () at x[0]", value)


def _count(
    least: int, most: int = LARGEST_COUNT, *, optional: bool = False
) -> Callable[[Any, str], int | None]:
    return lambda value, name: whole_number(value, name, least, most, optional=optional)


def _ridge(value: Any, name: str) -> Any:
    if value is None or (isinstance(value, str) and value == "evidence"):
        return value
    return real_number(value, name, "a finite number >= 0, 'evidence' or None", lambda number: number >= 0)


def _activation(value: Any, name: str) -> Any:
    get_activation(value)
    return value


def _family(value: Any, name: str) -> Any:
    get_family(value)
    return value


def _method(value: Any, name: str) -> Any:
    lookup_method(value)
    return value


def _order(value: Any, name: str) -> int | None:
    number = None if value is None else _as_whole(value)
    require(value is None or number in (3, 4), name, "3, 4 or None", value)
    return number


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "activation": _activation,
    "family": _family,
    "noise": one_of(NOISE_MODELS),
    "weights_are": one_of((*get_args(WeightsAre), None)),
    "fit_intercept": flag,
    "gate": one_of(get_args(Gate)),
    "gate_inputs": checked_columns,
    "expert_inputs": checked_columns,
    "method": _method,
    "objective": one_of(get_args(Objective)),
    "average": _count(1, MOST_AVERAGED),
    "standardise": flag,
    "order": _order,
    "transform": one_of((*TRANSFORM_KINDS, None)),
    "transform_kind": one_of((*TRANSFORM_KINDS, None)),
    "num_restarts": _count(1),
    "num_starts": _count(1, optional=True),
    "start": one_of(STARTS),
    "polish": flag,
    "max_iterations": _count(1),
    "ridge": _ridge,
    "chunk_size": _count(1, LARGEST_CHUNK, optional=True),
    "num_residual_passes": _count(0, optional=True),
    "covariance": one_of(COVARIANCE_KINDS),
    "log_density": log_density_of,
    "precision": one_of(PRECISIONS),
}
"""The check of each option: (value, name) -> the plain value. `num_experts`, `noise_std` and `key` have separate functions."""


def checked_options(options: FitOptions) -> FitOptions:
    """The same options, each one checked and converted to a plain value, and in agreement with each other.

    >>> from moejax.methods.options import FitOptions
    >>> checked_options(FitOptions(num_starts=3.0)).num_starts
    3

    Raises:
        ValueError: an option has a value that is not accepted.
    """
    names = [field.name for field in dataclasses.fields(FitOptions)]
    checked = FitOptions(**{name: CHECKS[name](getattr(options, name), name) for name in names})
    default = FitOptions.method
    if checked.method != "mean_fit":  # what a mean fit refuses is refused with its data
        require_roles(checked)
    if checked.method == "mean_fit":
        checked = dataclasses.replace(checked, objective="mean")
    elif checked.objective == "mean":
        require(
            checked.method == default,
            "method",
            f"{default!r} or 'mean_fit' with objective 'mean'",
            checked.method,
        )
        checked = dataclasses.replace(checked, method="mean_fit")
    require(
        checked.average == 1 or checked.method in AVERAGED,
        "average",
        f"1 for method {checked.method!r}, which keeps one optimum",
        checked.average,
    )
    if checked.objective == "likelihood":
        require(
            checked.ridge != "evidence",
            "ridge",
            "a number or None with objective 'likelihood'",
            checked.ridge,
        )
    if checked.ridge is None and checked.objective != "auto":
        ridge = RIDGE if checked.objective == "likelihood" else "evidence"
        checked = dataclasses.replace(checked, ridge=ridge)
    return checked
