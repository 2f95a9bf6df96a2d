"""`--set KEY=VALUE`: replace a part of a spec without editing its file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from moejax.sweep.fields import FIELDS, METHOD_FIELD, nearest
from moejax.sweep.places import SpecError

_PLAIN = ("name", "methods", "trials", "seed", "pad_samples_to")


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> frozenset[str]:
    """Change the parsed TOML in place.

    A field takes one value (`dim=20`) or a list, which makes it an axis (`dim=[10, 20]` or `dim=10,20`).
    Quotes around names may be left out. `precision.max_trials=500` and `precision.target.mcse=0.01` work
    as well.

    Returns:
        The keys that were replaced, so that an error can say `--set` instead of a line of the file.

    Raises:
        SpecError: not KEY=VALUE, or an unknown key.
    """
    replaced = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key or not text:
            raise SpecError(f"--set {override}: expected KEY=VALUE, for example --set trials=50")
        value = _parse(text)
        group, _, rest = key.partition(".")
        if group == "precision" and rest:
            document.pop("trials", None)
            table = document.setdefault("precision", {})
            *parents, leaf = rest.split(".")
            for parent in parents:
                table = table.setdefault(parent, {})
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
            raise SpecError(f"--set {override}: methods are a list: --set methods={text}")
        else:
            raise SpecError(f"--set {override}: unknown key; {nearest(name, [*FIELDS, *_PLAIN])}")
        replaced.add(name)
    return frozenset(replaced)


def _set_field(document: dict[str, Any], name: str, value: Any, as_axis: bool) -> None:
    document.pop(name, None)
    for table in [document.get("grid"), *_list_of_tables(document.get("zip"))]:
        if isinstance(table, dict):
            table.pop(name, None)
    if not as_axis and isinstance(value, list):
        try:  # a field whose own value is a list, such as record = ["history"]
            FIELDS[name].coerce(value)
        except ValueError:
            as_axis = True
    if as_axis:
        document.setdefault("grid", {})[name] = value if isinstance(value, list) else [value]
    else:
        document[name] = value


def _list_of_tables(tables: Any) -> list[Any]:
    return tables if isinstance(tables, list) else []


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pieces = text.removeprefix("[").removesuffix("]").split(",")
        if len(pieces) > 1 or text.startswith("["):
            return [_parse(piece.strip()) for piece in pieces]
    try:
        return float(text)  # .5 and 1. are numbers to everybody but TOML
    except ValueError:
        return text  # a bare word: a name without its quotes
