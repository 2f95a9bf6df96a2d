"""`--set KEY=VALUE`: replace a part of a spec without editing its file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.console import shorten
from moejax.registry import nearest
from moejax.sweep.spec.fields import FIELDS, LONGEST_SHOWN, METHOD_FIELD
from moejax.sweep.spec.positions import MAX_NESTING, SpecError, TomlError, parse_toml

_PLAIN = ("name", "methods", "trials", "seed", "pad_samples_to")


def override_texts(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """The overrides in the form of `moejax sweep --set`.

    >>> override_texts({"trials": 5, "grid.activation": ("relu", "tanh")})
    ('trials=5', 'grid.activation=["relu", "tanh"]')
    """
    return tuple(f"{key}={json.dumps(plain(value))}" for key, value in overrides.items())


def plain(value: Any) -> Any:
    """A value in TOML's types: dicts, lists and numbers replace other mappings, sequences and NumPy arrays."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> frozenset[str]:
    """Change the parsed TOML in place.

    A field takes one value (`dim=20`) or a list, which makes it an axis (`dim=[10, 20]` or `dim=10,20`).
    Quotes around names may be left out. `precision.max_trials=500` and `precision.target.mcse=0.01` also
    work.

    Returns:
        The replaced keys: an error about one names `--set` instead of a line of the file.

    Raises:
        SpecError: an override is not KEY=VALUE, or has an unknown key.
    """
    replaced = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        shown = shorten(override, LONGEST_SHOWN)
        if not equals or not key or not text:
            raise SpecError(f"--set {shown}: expected KEY=VALUE, for example --set trials=50")
        value = _parse(text, f"--set {shown}")
        group, _, rest = key.partition(".")
        if group == "precision" and rest:
            document.pop("trials", None)
            table = _table_in(document, "precision")
            *parents, leaf = rest.split(".")
            for parent in parents:
                table = _table_in(table, parent)
            table[leaf] = value
            replaced.add(leaf)
            continue
        name = rest if group == "grid" and rest else key
        if name in _PLAIN:
            if name == "trials":
                document.pop("precision", None)
            if name == "methods" and not isinstance(value, list):
                value = [value]
            document[name] = value
        elif name in FIELDS:
            _set_field(document, name, value, as_axis=name != key)
        elif name == METHOD_FIELD:
            raise SpecError(f"--set {shown}: methods are a list: --set methods={text}")
        else:
            raise SpecError(f"--set {shown}: unknown key; {nearest(name, [*FIELDS, *_PLAIN])}")
        replaced.add(name)
    return frozenset(replaced)


def _set_field(document: dict[str, Any], name: str, value: Any, as_axis: bool) -> None:
    document.pop(name, None)
    for table in [document.get("grid"), *_list_of_tables(document.get("zip"))]:
        if isinstance(table, dict):
            table.pop(name, None)
    if not as_axis and isinstance(value, list):
        try:  # the value of a field may itself be a list, such as record = ["history"]
            FIELDS[name].coerce(value)
        except ValueError:
            as_axis = True
    if as_axis:
        _table_in(document, "grid")[name] = value if isinstance(value, list) else [value]
    else:
        document[name] = value


def _table_in(table: dict[str, Any], key: str) -> dict[str, Any]:
    """The table under a key; any other value there is replaced by a table."""
    if not isinstance(table.get(key), dict):
        table[key] = {}
    return table[key]


def _list_of_tables(tables: Any) -> list[Any]:
    return tables if isinstance(tables, list) else []


def _parse(text: str, where: str, level: int = 0) -> Any:
    if level > MAX_NESTING:
        raise SpecError(f"{where}: expected at most {MAX_NESTING} lists within each other, got more")
    try:
        document = parse_toml(f"value = {text}", where)
        if list(document) == ["value"]:
            return document["value"]
    except TomlError:
        pieces = text.removeprefix("[").removesuffix("]").split(",")
        if len(pieces) > 1 or text.startswith("["):
            return [_parse(piece.strip(), where, level + 1) for piece in pieces]
    try:
        return float(text)  # TOML does not accept .5 and 1. as numbers
    except ValueError:
        return text  # a bare word: a name without its quotes
