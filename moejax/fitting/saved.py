"""Fits in files: a JSON document with every number to its last digit, and arrays beside it, in one ZIP archive without pickle.

The document is written from the fields of `FitResult`. JSON has no tuples, arrays, tables or keys that are numbers: each of them is
an object with one key, the kind of value.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from moejax.checks import require
from moejax.files import write_whole
from moejax.fitting.data_units import DataUnits
from moejax.fitting.label_units import LabelMap
from moejax.fitting.result import FitResult, FittedInOwnUnits
from moejax.fitting.whitening import InputMap
from moejax.likelihood.free_columns import FreeColumns
from moejax.likelihood.information import Covariance
from moejax.model.activations import (
    ActivationLike,
    activation_name,
    activation_names,
    get_activation,
    unregistered,
    values_on_host,
)
from moejax.model.families import get_family
from moejax.model.mixture import MoEParams

FORMAT, VERSION = "moejax fit", 1
DOCUMENT = "fit.json"
FUNCTION, FAMILY = "_function", "_family"
"""The field with a function, which is given again to `load_fit`."""
_TUPLES = {
    cls.__name__: cls
    for cls in (MoEParams, FittedInOwnUnits, FreeColumns, Covariance, DataUnits, InputMap, LabelMap)
}
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    json.JSONDecodeError,
    UnicodeDecodeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
)
"""The errors of reading a file that is no whole saved fit."""
_POINTS = np.linspace(-3.0, 3.0, 25)
"""Arguments at which the activation of a file and the one of its name are compared."""


def save_fit(result: FitResult, path: str | os.PathLike[str]) -> None:
    """Write a fit to a file; `FitResult.save` explains it.

    Raises:
        ValueError: another file has this name, or the result holds a value that has no form in a file; OSError: the file cannot be
            written.
    """
    file = Path(path)
    if file.exists():
        require(file.is_file() and _is_fit(file), "path", "a new file, or one of a saved fit", str(file))
    arrays: list[np.ndarray] = []
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    function, family = values.pop(FUNCTION), values.pop(FAMILY)
    words = "a registered family (moejax.register_family), whose name is stored"
    require(family is None, "family", words, None if family is None else family.name)
    fields = {name: _encoded(value, arrays) for name, value in values.items()}
    name = _activation_of(result)
    document = {
        "format": FORMAT,
        "version": VERSION,
        # a function of the user's may have the name of a registered one
        "activation_values": _values(name) if function is None and name in activation_names() else None,
        "fields": fields,
    }

    def write(unfinished: Path) -> None:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(DOCUMENT, json.dumps(document, allow_nan=False, indent=1))
            for index, array in enumerate(arrays):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array, allow_pickle=False)
                archive.writestr(f"{index}.npy", buffer.getvalue())

    write_whole(file, write)


def load_fit(path: str | os.PathLike[str], *, activation: ActivationLike | None = None) -> FitResult:
    """Return the fit that `FitResult.save` wrote to a file, with every number to its last digit.

    Args:
        path: the file.
        activation: g, if the fit's own is not registered under its name.

    Raises:
        ValueError: the file is no saved fit, is damaged or of another version, or its activation is not registered and not given;
            OSError: it cannot be read.

    Examples:
        >>> import tempfile
        >>> x = np.random.default_rng(0).normal(size=(100, 2))
        >>> result = moejax.fit(jax.random.key(0), x, x[:, 0], num_experts=1, noise_std=0.1, method="joint_em")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result.save(f"{folder}/line.fit")
        ...     again = moejax.load_fit(f"{folder}/line.fit")
        >>> bool((again.params.experts == result.params.experts).all()), again.status == result.status
        (True, True)
    """
    file = Path(path)
    with file.open("rb"):  # a missing file is an OSError
        pass
    try:
        document, arrays = _read(file)
        require(document.get("format") == FORMAT, "path", "a file of FitResult.save", str(file))
        version = document.get("version")
        require(
            version == VERSION, "path", f"a saved fit of version {VERSION}", f"version {version} in {file}"
        )
        known = {field.name for field in dataclasses.fields(FitResult)} - {FUNCTION, FAMILY}
        fields = {
            name: _decoded(value, arrays) for name, value in document["fields"].items() if name in known
        }
        result = FitResult(**fields)
        values = document["activation_values"]
    except _DAMAGED:
        raise ValueError(f"path: expected a whole file of FitResult.save, got {file}") from None
    result = _with_activation(result, values, activation)
    try:
        get_family(str(result.diagnostics.get("family", "gaussian")))
    except ValueError as error:
        raise ValueError(f"{error}; register the family of the fit before") from None
    return result


def _read(file: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    with zipfile.ZipFile(file) as archive:
        document = json.loads(archive.read(DOCUMENT))
        names = sorted(
            (name for name in archive.namelist() if name.endswith(".npy")), key=lambda name: int(name[:-4])
        )
        arrays = [
            np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False) for name in names
        ]
    return document, arrays


def _is_fit(file: Path) -> bool:
    """True if a file is a saved fit of any version, damaged or not in its numbers."""
    try:
        with zipfile.ZipFile(file) as archive:
            return json.loads(archive.read(DOCUMENT)).get("format") == FORMAT
    except (*_DAMAGED, OSError):
        return False


def _activation_of(result: FitResult) -> str:
    return str(result.settings.get("activation", result.diagnostics.get("activation", "")))


def _values(activation: ActivationLike) -> list[float]:
    return values_on_host(get_activation(activation), _POINTS).tolist()


def _with_activation(
    result: FitResult, values: list[float] | None, given: ActivationLike | None
) -> FitResult:
    """The result, if its activation is known here.

    Args:
        result: as read.
        values: those of the activation when it was saved; None if it was not registered then.
        given: the argument of `load_fit`.

    Raises:
        ValueError: it is not registered and not given, or another function has its name.
    """
    name = _activation_of(result)
    if given is None:
        known_here = name in activation_names() if values is not None else not name
        remedy = "to be registered, or given as load_fit(path, activation=..)"
        require(known_here, "activation", f"{name!r}, the fit's, {remedy}", None)
    if values is not None:
        same = np.allclose(_values(name if given is None else given), values, rtol=1e-5, atol=1e-7)
        got = name if given is None else activation_name(given)
        require(same, "activation", f"the function {name!r} of the fit", f"another one, {got}")
    if given is None:
        return result
    get_activation(given)
    settings = result.settings | {"activation": activation_name(given)}
    return dataclasses.replace(result, settings=settings, _function=unregistered(given))


def _encoded(value: Any, arrays: list[np.ndarray]) -> Any:
    """A value as one that JSON can hold; arrays are appended to `arrays`.

    Raises:
        ValueError: it has no such form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else {"float": repr(number)}
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        require(array.dtype.kind in "biuf", "save", "arrays of numbers", array.dtype)
        arrays.append(array)
        return {"array": len(arrays) - 1}
    if isinstance(value, pd.DataFrame):
        columns = [
            [str(name), str(column.dtype), _encoded(column.tolist(), arrays)]
            for name, column in value.items()
        ]
        return {"table": columns}
    if isinstance(value, dict):
        return {"dict": [[_encoded(key, arrays), _encoded(item, arrays)] for key, item in value.items()]}
    if isinstance(value, list):
        return [_encoded(item, arrays) for item in value]
    if isinstance(value, tuple):
        items = [_encoded(item, arrays) for item in value]
        if hasattr(value, "_fields"):
            require(
                type(value).__name__ in _TUPLES, "save", "a fit's own kinds of values", type(value).__name__
            )
            return {"named": [type(value).__name__, items]}
        return {"tuple": items}
    raise ValueError(f"save: expected numbers, words, arrays and tables, got {type(value).__name__}")


def _decoded(value: Any, arrays: list[np.ndarray]) -> Any:
    """The inverse of `_encoded`."""
    if isinstance(value, list):
        return [_decoded(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    decode: dict[str, Callable[[], Any]] = {
        "float": lambda: float(content),
        "array": lambda: arrays[content],
        "dict": lambda: {_decoded(key, arrays): _decoded(item, arrays) for key, item in content},
        "tuple": lambda: tuple(_decoded(content, arrays)),
        "named": lambda: _TUPLES[content[0]](*_decoded(content[1], arrays)),
        "table": lambda: pd.DataFrame(
            {name: pd.Series(_decoded(items, arrays), dtype=dtype) for name, dtype, items in content}
        ),
    }
    return decode[kind]()
