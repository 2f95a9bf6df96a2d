"""Lines of the keys of a spec, for error messages (tomllib keeps no positions)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from moejax.console import shorten

MAX_NESTING = 32
"""Most nested tables and lists in a TOML file; a spec needs four."""
_TABLE = re.compile(r"^\s*\[(\[)?\s*([\w.\-]+)\s*\]?\]")
_KEY = re.compile(r"^\s*[\"']?([\w\-]+)[\"']?\s*(?:\.[\w.\- ]+)?=")


class SpecError(ValueError):
    r"""A spec that cannot be run; the message is one line with the place, the value and the accepted values.

    Examples:
        >>> try:
        ...     moejax.sweep.parse_spec('methods = ["spectral"]\ntrials = 0')
        ... except moejax.sweep.SpecError as error:
        ...     print(error)
        SPEC:2: trials: 0 is not accepted: expected 1 to 1000000000
    """

    def __init__(self, message: str):
        super().__init__(shorten(" ".join(message.split())))


class TomlError(SpecError):
    """A text that is not TOML."""


def parse_toml(text: str, where: Path | str) -> dict[str, Any]:
    """Parse TOML that a person wrote; `where` names it in messages.

    Raises:
        TomlError: not TOML, or a number of more digits than Python reads. SpecError: nested too deeply.
    """
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # TOMLDecodeError, or Python's limit of digits
        raise TomlError(f"{where}: not valid TOML: {error}") from None
    level: list[Any] = [document]
    for _ in range(MAX_NESTING):
        level = [item for value in level for item in _items(value)]
        if not level:
            return document
    raise _too_deep(where)


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _too_deep(where: Path | str) -> SpecError:
    return SpecError(f"{where}: expected at most {MAX_NESTING} tables and lists within each other, got more")


class Places:
    """The lines of the keys of one TOML text. Tables of an array are counted from 0."""

    def __init__(self, path: Path | str, text: str = "", overridden: frozenset[str] = frozenset()):
        self.path = str(path)
        self.text = text
        self._overridden = overridden
        self._lines: dict[tuple[str, int, str], int] = {}
        table, index = "", 0
        counts: dict[str, int] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _TABLE.match(line):
                table, index = header.group(2), 0
                if header.group(1):
                    index = counts.get(table, -1) + 1
                    counts[table] = index
                self._lines[(table, index, "")] = number
            elif key := _KEY.match(line):
                self._lines.setdefault((table, index, key.group(1)), number)

    def error(self, message: str, table: str = "", key: str = "", index: int = 0) -> SpecError:
        """The error to raise: `FILE:LINE: [table] key: message`, on one line."""
        candidates = [(table, index, key), (table, index, ""), (key, 0, "")]  # the last: its key is a table
        line = next((self._lines[place] for place in candidates if place in self._lines), None)
        where = f"{self.path}:{line}" if line else self.path
        if key in self._overridden:
            where = "--set"
        shown = {"": "", "zip": "[[zip]] ", "exclude": "[[exclude]] "}.get(table, f"[{table}] ")
        name = f"{shown}{key}: " if key else f"{shown.strip()}: " if shown else ""
        return SpecError(f"{where}: {name}{message}")
