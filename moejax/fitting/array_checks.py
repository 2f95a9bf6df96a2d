"""The checks of the arrays that a user passes; an accepted array is returned as a NumPy array in double precision.

They run on the host, before anything is compiled. A bad array is a ValueError of one line, `name: expected .., got ..`.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.sparse

from moejax.checks import brief_text, require
from moejax.model.mixture import with_stand_ins


class NotNumbersError(ValueError, TypeError):
    """The entries of an array are not real numbers.

    The error is a ValueError, like every error about a bad value, and also a TypeError, which scikit-learn's checks require.
    """


def checked_arrays(
    x: Any,
    y: Any,
    weights: Any = None,
    *,
    names: tuple[str, str, str] = ("x", "y", "weights"),
    least_rows: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sample of a fit: x (n, d), y (n,) or (n, m), weights (n,), finite and in double precision.

    Rows of weight zero may hold any values: they are returned as copies of a row that has weight.

    Args:
        x: array-like (n, d) of real numbers.
        y: array-like (n,), or (n, m) with m > 1.
        weights: array-like (n,), one number for all rows, or None for ones.
        names: the names of the three in messages.
        least_rows: the fewest rows that are accepted.

    Raises:
        ValueError: about the first array that is not as described, in one line.
    """
    inputs = _shaped_inputs(x, names[0], least_rows)
    targets = _shaped_targets(y, len(inputs), names[1], names[0])
    weights = checked_weights(weights, len(inputs), names[2], names[0])
    inputs, targets = with_stand_ins(weights, inputs, targets, xp=np)
    return _finite(inputs, names[0]), _finite(targets, names[1]), weights


def checked_inputs(x: Any, name: str = "x", least_rows: int = 1) -> np.ndarray:
    """(n, d) finite real numbers, at least one column and `least_rows` rows.

    Raises:
        ValueError: they are something else.
    """
    return _finite(_shaped_inputs(x, name, least_rows), name)


def _shaped_inputs(x: Any, name: str, least_rows: int) -> np.ndarray:
    """`checked_inputs`, but entries need not be finite."""
    array = as_numbers(x, name)
    if array.ndim != 2:
        # scikit-learn's checks look for "Reshape your data" and for these words on 0 features and 1 sample
        advice = "; Reshape your data: one input is x[:, None], one row x[None]" if array.ndim == 1 else ""
        raise ValueError(f"{name}: expected an array (n, d), got shape {array.shape}{advice}")
    rows, columns = array.shape
    if columns == 0:
        raise ValueError(
            f"{name}: expected inputs, got 0 feature(s) (shape={array.shape}) while a minimum of 1 is required."
        )
    if rows < least_rows:
        raise ValueError(
            f"{name}: expected at least {least_rows} row{'s' * (least_rows > 1)}, got {rows} sample(s)"
        )
    return array


def checked_targets(y: Any, num_rows: int, name: str = "y", rows_of: str = "x") -> np.ndarray:
    """(n,) finite real numbers, or (n, m) with m > 1.

    Raises:
        ValueError: they are something else, or of another n.
    """
    return _finite(_shaped_targets(y, num_rows, name, rows_of), name)


def _shaped_targets(y: Any, num_rows: int, name: str, rows_of: str) -> np.ndarray:
    """`checked_targets`, but entries need not be finite."""
    array = as_numbers(y, name)
    several = array.ndim == 2 and len(array) == num_rows and array.shape[1] > 1
    good = several or array.shape == (num_rows,)
    require(good, name, f"shape {(num_rows,)} to go with {rows_of}", array.shape)
    return array


def checked_weights(weights: Any, num_rows: int, name: str = "weights", rows_of: str = "x") -> np.ndarray:
    """(n,) finite non-negative weights of positive finite sum; ones for None, one number for every row.

    Raises:
        ValueError: they are something else, or of another n.
    """
    if weights is None:
        return np.ones(num_rows)
    array = as_numbers(weights, name)
    if array.ndim == 0:
        array = np.full(num_rows, array)
    require(array.shape == (num_rows,), name, f"shape {(num_rows,)} to go with {rows_of}", array.shape)
    array = _finite(array, name)
    require(bool((array >= 0).all()), name, "non-negative numbers", float(array.min()))
    require(bool((array > 0).any()), name, "non-negative numbers, not all zero", 0.0)
    with np.errstate(over="ignore"):
        total = float(array.sum())
    require(math.isfinite(total), name, "weights of a finite sum", total)
    return array


def checked_offset(offset: Any, weights: np.ndarray, rows_of: str = "x") -> np.ndarray:
    """(n,) finite offsets of rows with weights (n,); one number is that of every row. Rows of weight zero may hold any values.

    Raises:
        ValueError: they are something else, or of another n.
    """
    array, num_rows = as_numbers(offset, "offset"), len(weights)
    array = np.full(num_rows, array) if array.ndim == 0 else array
    require(array.shape == (num_rows,), "offset", f"shape {(num_rows,)} to go with {rows_of}", array.shape)
    bad = ~np.isfinite(array) & (weights > 0)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"offset: expected finite numbers, got {array[at]} in row {at}")
    return np.where(weights > 0, array, array[np.argmax(weights > 0)])


def as_numbers(value: Any, name: str) -> np.ndarray:
    """The entries of an array-like of any shape as double precision numbers; they need not be finite.

    It accepts NumPy and JAX arrays, nested lists, pandas frames and series, and all else that NumPy reads as an array, of real
    numbers, booleans or numbers written as text. Masked entries, sparse matrices, complex numbers, dates and durations are refused:
    NumPy would convert them to numbers that the user did not mean.

    Raises:
        ValueError: they are not such numbers; a NotNumbersError if entries are not numbers at all.
    """
    require(value is not None, name, "an array of numbers", value)
    if scipy.sparse.issparse(value):
        raise ValueError(
            f"{name}: expected a dense array, got a sparse one of shape {value.shape}; use .toarray()"
        )
    if isinstance(value, np.ma.MaskedArray):
        value = _unmasked(value, name)
    kinds = {getattr(dtype, "kind", "") for dtype in _pandas_dtypes(value)}
    try:
        array = np.asarray(value.to_numpy(object) if _has_missing_marks(value) else value)
    except Exception as error:  # an object's own conversion may raise any error
        raise NotNumbersError(f"{name}: expected an array of numbers, got {brief_text(error)}") from error
    kinds.add(array.dtype.kind)
    if array.dtype.kind == "O":
        kinds.update(_object_kinds(array))
    if kinds & set("mM"):
        raise ValueError(
            f"{name}: expected numbers, got dates or durations; turn them into numbers of a unit of your choice"
        )
    if "c" in kinds:
        raise ValueError(f"{name}: expected real numbers, got complex ones: Complex data not supported")
    return _in_double_precision(array, name)


def _unmasked(value: np.ma.MaskedArray, name: str) -> np.ndarray:
    mask = np.ma.getmaskarray(value)
    if mask.dtype.names is None and mask.any():
        place = tuple(int(i) for i in np.argwhere(mask)[0])
        raise ValueError(
            f"{name}: expected no masked entries, got {int(mask.sum())}, the first at index {place}; drop the rows or fill them"
        )
    return np.asarray(value.data)


def _pandas_dtypes(value: Any) -> list[Any]:
    if isinstance(value, pd.DataFrame):
        return list(value.dtypes)
    return [value.dtype] if isinstance(value, pd.Series | pd.Index) else []


def _has_missing_marks(value: Any) -> bool:
    """True if pandas marks missing entries by something other than NaN; as objects they can be found and named."""
    return any(isinstance(dtype, pd.api.extensions.ExtensionDtype) for dtype in _pandas_dtypes(value))


def _object_kinds(array: np.ndarray) -> set[str]:
    """Kinds of entries, complex (c) or time (M), that NumPy would convert to different numbers, or only with a warning."""
    kinds = set()
    for entry in array.flat:
        if isinstance(entry, complex | np.complexfloating):
            kinds.add("c")
        elif isinstance(entry, np.datetime64 | np.timedelta64) or entry is pd.NaT:
            kinds.add("M")
    return kinds


def _in_double_precision(array: np.ndarray, name: str) -> np.ndarray:
    real = array.dtype.kind in "biufOSU" or jnp.issubdtype(array.dtype, np.number)
    if not real:
        raise NotNumbersError(f"{name}: expected an array of numbers, got dtype {brief_text(array.dtype)}")
    try:
        if array.dtype.kind == "O" and array.ndim:
            array = np.where(pd.isna(array), np.nan, array)
        with np.errstate(over="ignore"):  # an overflow is found later, as infinity
            return np.asarray(array.astype(np.float64, copy=False))
    except OverflowError as error:
        raise ValueError(f"{name}: expected finite numbers, got an integer too large for a float") from error
    except Exception as error:  # an entry's own conversion may raise any error
        raise NotNumbersError(f"{name}: expected an array of numbers, got {brief_text(error)}") from error


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    bad = ~np.isfinite(array)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}: expected finite numbers, no NaN and no inf, got {array[place]} at index {place}"
        )
    return array


def input_precision(x: Any) -> float:
    """The machine epsilon of the numbers in an array-like as given; for a frame, that of its coarsest column.

    Whole numbers, and all else that is not an array of floating-point numbers, have that of double precision.
    """
    types = list(x.dtypes) if isinstance(x, pd.DataFrame) else [getattr(x, "dtype", None)]
    types = [getattr(dtype, "numpy_dtype", dtype) for dtype in types]
    coarse = [dtype for dtype in types if dtype in (np.float32, np.float16, jnp.bfloat16)]
    return max((float(jnp.finfo(dtype).eps) for dtype in coarse), default=float(np.finfo(float).eps))
