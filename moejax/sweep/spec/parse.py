"""The spec of a sweep: a TOML file, typed and checked completely before any trial runs.

name = "sample-complexity"
methods = ["spectral", "joint_em"]
plugins = ["mine.py"]             # optional: files that register names of the spec; paths from this file's folder
trials = 100                      # or [precision] target = {metric = "recovery_error", mcse = 0.002}
seed = 0
pad_samples_to = [2048, 8192]     # optional: sample sizes padded to one of these share their programs; else to powers of two
dim = 10                          # a field fixed for the whole sweep
[grid]                            # every combination
num_samples = [1000, 10000]
[[zip]]                           # lists of equal length, walked in parallel
activation = ["linear", "relu"]
noise_std = [0.1, 0.05]
[[exclude]]                       # a cell that matches every line is left out
activation = "relu"
num_samples = 1000
"""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.registry import nearest
from moejax.sweep.spec.fields import FIELDS, METHOD_FIELD, show, whole
from moejax.sweep.spec.overrides import apply_overrides, plain
from moejax.sweep.spec.positions import Places, SpecError, parse_toml
from moejax.sweep.spec.precision import MAX_TRIALS, PRECISION_KEYS, PrecisionRule, parse_precision

__all__ = ["Spec", "SpecError", "parse_spec", "read_spec"]

TOP_LEVEL = (
    "name",
    "methods",
    "plugins",
    "trials",
    "seed",
    "pad_samples_to",
    "precision",
    "grid",
    "zip",
    "exclude",
)
STUDY_KEY = "study"
"""This key is true in the spec of a study that is no sweep (`moejax.reproduce.cell_functions`)."""
MAX_SEED = 2**63 - 1
MAX_SAMPLES = 2**31 - 1
MAX_CELLS = 10**6
STDIN = Path("-")
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LONGEST_NAME = 200
"""Longest name, in bytes, that every file system accepts for a folder."""


@dataclasses.dataclass(frozen=True)
class Spec:
    r"""A checked spec. Values have their fields' types; the order is the file's.

    Examples:
        >>> spec = moejax.sweep.parse_spec('methods = ["spectral"]\ntrials = 5\n[grid]\ndim = [4, 8]')
        >>> [cell["dim"] for cell in spec.settings()], spec.swept
        ([4, 8], ('dim',))
    """

    name: str
    methods: tuple[str, ...]
    plugins: tuple[Path, ...]
    """Python files to run before the cells are checked."""
    trials: int
    """Trials of every cell; 0 with [precision]."""
    precision: PrecisionRule | None
    seed: int
    pad_samples_to: tuple[int, ...]
    """Compiled sample sizes, in rising order."""
    fixed: Mapping[str, Any]
    grid: Mapping[str, tuple[Any, ...]]
    zips: tuple[Mapping[str, tuple[Any, ...]], ...]
    excludes: tuple[Mapping[str, tuple[Any, ...]], ...]
    places: Places = dataclasses.field(compare=False)

    @property
    def first_target(self) -> int:
        """Trials of every cell before the first look (all trials without [precision])."""
        return self.precision.looks[0] if self.precision else self.trials

    @property
    def most_trials(self) -> int:
        """Trials of a cell that does not stop early."""
        return self.precision.max_trials if self.precision else self.trials

    @property
    def swept(self) -> tuple[str, ...]:
        """The fields that are an axis, in the file's order."""
        axes = [name for group in self.zips for name in group]
        return tuple(name for name in (*self.grid, *axes) if len(set(self._values(name))) > 1)

    def _values(self, name: str) -> tuple[Any, ...]:
        return next(group[name] for group in (self.grid, *self.zips) if name in group)

    def settings(self) -> Iterator[dict[str, Any]]:
        """Field values of every cell that is not excluded; `method` is the last axis."""
        axes: list[list[dict[str, Any]]] = [
            [{name: value} for value in self.grid[name]] for name in self.grid
        ]
        for group in self.zips:
            axes.append(
                [dict(zip(group, values, strict=True)) for values in zip(*group.values(), strict=True)]
            )
        axes.append([{METHOD_FIELD: method} for method in self.methods])
        for combination in itertools.product(*axes):
            cell = dict(self.fixed)
            for part in combination:
                cell.update(part)
            if not any(_matches(cell, condition) for condition in self.excludes):
                yield cell

    def padded_size(self, num_samples: int) -> int | None:
        """The compiled sample size of a cell; None leaves it to the core."""
        return next((size for size in self.pad_samples_to if size >= num_samples), None)

    def place_of(self, field: str) -> tuple[str, int]:
        """The table (and its index) in which a field is set, for an error message."""
        if field in self.grid:
            return "grid", 0
        for index, group in enumerate(self.zips):
            if field in group:
                return "zip", index
        return "", 0

    def to_json(self) -> str:
        """The spec with its overrides applied, for the provenance."""
        content = {
            "name": self.name,
            "methods": self.methods,
            "plugins": [path.name for path in self.plugins],
            "trials": self.trials,
            "precision": None if self.precision is None else dataclasses.asdict(self.precision),
            "seed": self.seed,
            "pad_samples_to": self.pad_samples_to,
            "fixed": dict(self.fixed),
            "grid": dict(self.grid),
            "zip": [dict(group) for group in self.zips],
            "exclude": [dict(condition) for condition in self.excludes],
        }
        return json.dumps(content)


def _matches(cell: Mapping[str, Any], condition: Mapping[str, tuple[Any, ...]]) -> bool:
    return all(cell.get(name, _default(name)) in values for name, values in condition.items())


def _default(name: str) -> Any:
    return FIELDS[name].default if name in FIELDS else None


SpecSource = Path | str | Mapping[str, Any] | Spec


def read_spec(spec: SpecSource, overrides: Sequence[str] = ()) -> Spec:
    r"""Read and check a spec.

    Args:
        spec: a TOML file (`-` is stdin), a mapping with the keys and tables of one, or a checked spec.
        overrides: `KEY=VALUE` strings that replace values of it.

    Raises:
        SpecError: one line with file, line, field, value and the accepted values; or there are overrides for a checked spec.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("small.toml").write_text('methods = ["spectral"]\ntrials = 5')
        >>> moejax.sweep.read_spec(Path("small.toml"), ["trials=7"]).trials
        7
    """
    if isinstance(spec, Spec):
        if overrides:
            raise SpecError("overrides: expected a path or a mapping as the spec with them, got a Spec")
        return spec
    if isinstance(spec, Mapping):
        document = plain(spec)
        return _checked(document, json.dumps(document, indent=1, default=str), "sweep", overrides)
    path = Path(spec)
    return parse_spec(read_spec_text(path), path, overrides)


def read_spec_text(path: Path) -> str:
    """The text of a spec, with or without a byte order mark; of stdin for `-`.

    Raises:
        SpecError: it cannot be read, or is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    try:
        content = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        return content.decode("utf-16" if content.startswith(_UTF_16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(f"{path}: cannot read the spec: not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"{path}: cannot read the spec: {reason}") from None


def parse_spec(text: str, path: Path | str = "SPEC", overrides: Sequence[str] = ()) -> Spec:
    r"""Check the text of a spec.

    Args:
        text: TOML.
        path: the file that messages name; without the key `name` it is also the name of the sweep.
        overrides: `KEY=VALUE` strings that replace values of it.

    Raises:
        SpecError: one line with file, line, field, value and the accepted values.

    Examples:
        >>> moejax.sweep.parse_spec('name = "mine"\nmethods = ["spectral"]\ntrials = 5').name
        'mine'
    """
    return _checked(parse_toml(text, path), text, path, overrides)


def _checked(document: dict[str, Any], text: str, path: Path | str, overrides: Sequence[str]) -> Spec:
    overridden = apply_overrides(document, overrides)
    places = Places(path, text, overridden)
    if STUDY_KEY in document:
        raise places.error(
            f"not a sweep: run it by moejax reproduce {_name(places, document, path)}", key=STUDY_KEY
        )

    fixed: dict[str, Any] = {}
    for key, value in document.items():
        if key in TOP_LEVEL:
            continue
        _check_known(places, key, "", extra=TOP_LEVEL)
        fixed[key] = _coerced(places, key, value, "")

    grid = _lists(places, document.get("grid", {}), "grid", 0)
    zips = _tables(places, document, "zip")
    for index, group in enumerate(zips):
        lengths = {name: len(values) for name, values in group.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise places.error(f"the lists must have one length; {counts}", "zip", index=index)
    excludes = _tables(places, document, "exclude", scalars=True)
    _check_once(places, fixed, grid, zips)

    if "trials" in document and "precision" in document:
        raise places.error("give either trials or [precision], not both", key="trials")
    if "trials" not in document and "precision" not in document:
        raise places.error('missing: "trials = 100", or a [precision] table', key="trials")
    trials, precision = 0, None
    if "trials" in document:
        trials = _whole(places, "trials", document["trials"], 1, MAX_TRIALS)
    else:
        precision = parse_precision(_table(places, document, "precision"), places)
    methods = _names(places, document, "methods", 'missing: for example methods = ["spectral_em"]')
    _check_number_of_cells(places, [grid.values(), *(list(group.values())[:1] for group in zips), [methods]])
    return Spec(
        name=_name(places, document, path),
        methods=methods,
        plugins=tuple(Path(path).parent / name for name in _names(places, document, "plugins")),
        trials=trials,
        precision=precision,
        seed=_whole(places, "seed", document.get("seed", 0), 0, MAX_SEED),
        pad_samples_to=_sizes(places, "pad_samples_to", document.get("pad_samples_to", [])),
        fixed=fixed,
        grid=grid,
        zips=tuple(group for group in zips if group),
        excludes=tuple(condition for condition in excludes if condition),
        places=places,
    )


def _name(places: Places, document: Mapping[str, Any], path: Path | str) -> str:
    name = document.get("name", "stdin" if path == STDIN else Path(path).stem)
    good = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= LONGEST_NAME
    if not good or name in (".", "..") or name != name.strip() or set(name) & set("/\\"):
        raise places.error(
            f"{show(name)} is not accepted: expected a name that can be a folder's", key="name"
        )
    return name


def _names(
    places: Places, document: Mapping[str, Any], key: str, missing: str | None = None
) -> tuple[str, ...]:
    """A list of names, each once. Without one, the error is `missing`; if that is None, the result is ()."""
    names = document.get(key)
    if names is None:
        if missing:
            raise places.error(missing, key=key)
        return ()
    good = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    if not good or not names:
        raise places.error(f"{show(names)} is not accepted: expected a list of one or more names", key=key)
    return tuple(dict.fromkeys(names))


def _whole(places: Places, key: str, value: Any, least: int, most: int) -> int:
    number = whole(value)
    if number is None:
        raise places.error(f"{show(value)} is not accepted: expected a whole number", key=key)
    if not least <= number <= most:
        raise places.error(f"{show(value)} is not accepted: expected {least} to {most}", key=key)
    return number


def _sizes(places: Places, key: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise places.error(f"{show(values)} must be a list, for example [{show(values)}]", key=key)
    return tuple(sorted({_whole(places, key, value, 1, MAX_SAMPLES) for value in values}))


def _table(places: Places, document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise places.error(f"{show(table)} is not accepted: expected a table, [{key}]", key=key)
    return table


def _tables(
    places: Places, document: Mapping[str, Any], key: str, scalars: bool = False
) -> list[dict[str, tuple[Any, ...]]]:
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise places.error(f"expected a list of tables: write [[{key}]] in double brackets", key)
    return [_lists(places, table, key, index, scalars) for index, table in enumerate(tables)]


def _lists(
    places: Places, table: Any, name: str, index: int, scalars: bool = False
) -> dict[str, tuple[Any, ...]]:
    """A table of lists of field values; with `scalars`, a single value is a list of one, and `method` is allowed."""
    if not isinstance(table, dict):
        raise places.error(f"{show(table)} is not accepted: expected a table, [{name}]", key=name)
    lists: dict[str, tuple[Any, ...]] = {}
    for key, given in table.items():
        values = [given] if scalars and not isinstance(given, list) else given
        if scalars and key == METHOD_FIELD:
            lists[key] = tuple(values)
            if not all(isinstance(value, str) for value in lists[key]):
                raise places.error(f"{show(given)} is not accepted: expected names", name, key, index)
            continue
        _check_known(places, key, name, index)
        if not isinstance(values, list):
            raise places.error(
                f"{show(values)} must be a list, for example [{show(values)}]", name, key, index
            )
        if not values:
            raise places.error("an empty list: expected at least one value", name, key, index)
        lists[key] = tuple(_coerced(places, key, value, name, index) for value in values)
        if name == "grid":
            lists[key] = tuple(dict.fromkeys(lists[key]))
    return lists


def _check_known(places: Places, key: str, table: str, index: int = 0, extra: Sequence[str] = ()) -> None:
    if key in FIELDS:
        return
    if key == METHOD_FIELD:
        raise places.error('methods are listed at the top: methods = ["spectral_em"]', table, key, index)
    if key in PRECISION_KEYS:
        raise places.error("unknown field; it belongs in [precision]", table, key, index)
    raise places.error(f"unknown field; {nearest(key, [*FIELDS, *extra])}", table, key, index)


def _coerced(places: Places, key: str, value: Any, table: str, index: int = 0) -> Any:
    try:
        return FIELDS[key].coerce(value)
    except ValueError as error:
        raise places.error(str(error), table, key, index) from None


def _check_number_of_cells(places: Places, axes: Sequence[Iterable[Sequence[Any]]]) -> None:
    """Refuse a grid with too many cells before they are listed."""
    cells = math.prod(len(values) for lists in axes for values in lists)
    if cells > MAX_CELLS:
        raise places.error(f"expected at most {MAX_CELLS:,} cells, got {show(cells)}", key="grid")


def _check_once(
    places: Places, fixed: Mapping[str, Any], grid: Mapping[str, Any], zips: Sequence[Mapping[str, Any]]
) -> None:
    seen = dict.fromkeys(fixed, "at the top")
    for table, group, index in [
        ("grid", grid, 0),
        *[("zip", group, index) for index, group in enumerate(zips)],
    ]:
        for name in group:
            if name in seen:
                raise places.error(f"set twice: here and {seen[name]}", table, name, index)
            seen[name] = "in [grid]" if table == "grid" else "in a [[zip]]"
