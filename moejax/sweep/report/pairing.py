"""The pairs of trials that two sides of a comparison have in common, and the trials without a partner."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moejax.registry import nearest
from moejax.sweep.spec.fields import ALGORITHM_FIELDS, METHOD_FIELD, show
from moejax.sweep.store.filters import matching_rows
from moejax.sweep.store.read import FIELD_COLUMNS, load_runs, metric_columns, read_rows

MATCHED = tuple(name for name in ALGORITHM_FIELDS if name != "record")
"""Algorithm fields that both trials of a pair share; `record` changes no number."""


@dataclasses.dataclass(frozen=True)
class Side:
    """The trials of one side, and its run."""

    folder: Path
    cells: pd.DataFrame
    """A row per cell: its fields, `method`, `data_hash`."""
    rows: pd.DataFrame
    """A row per trial: `position` (of its cell), `trial`, the metrics."""
    metrics: list[str]
    run: dict[str, Any]
    seed: int

    @classmethod
    def read(cls, folder: Path | str, where: str) -> Side:
        """The trials of a run folder that meet a condition; ValueError if there are none."""
        cells, rows = read_rows(folder)
        if rows.empty:
            raise ValueError(f"{folder}: there are no trials in this run yet")
        run = load_runs(folder)[-1]
        if where:
            fields = cells[[*FIELD_COLUMNS, METHOD_FIELD]].take(rows["position"].to_numpy())
            fields.index = rows.index
            rows = rows.loc[
                matching_rows(pd.concat([fields, rows.drop(columns="position")], axis=1), where).index
            ]
        side = cls(Path(folder), cells, rows, metric_columns(rows), run, json.loads(run["spec"])["seed"])
        return side.where(np.isin(np.arange(len(cells)), rows["position"]))

    def where(self, chosen: np.ndarray) -> Side:
        """The side with some of its cells; `chosen` is (cells,) bool."""
        place = np.cumsum(chosen) - 1
        rows = self.rows[chosen[self.rows["position"]]]
        rows = rows.assign(position=place[rows["position"]])
        return dataclasses.replace(self, cells=self.cells[chosen].reset_index(drop=True), rows=rows)

    def only(self, method: str) -> Side:
        """The side with the trials of one method."""
        return self.where((self.cells[METHOD_FIELD] == method).to_numpy())

    @property
    def methods(self) -> list[str]:
        """The methods that have trials."""
        return list(dict.fromkeys(self.cells[METHOD_FIELD]))

    def constant(self, field: str) -> Any:
        """(value,) of a field that has one value; None if it has several."""
        values = {show(value): value for value in self.cells[field]}
        return tuple(values.values()) if len(values) == 1 else None


def check_draws(a: Side, b: Side) -> None:
    """Refuse runs whose random numbers differ."""
    facts = (
        ("seed", a.seed, b.seed),
        *((name, a.run.get(name), b.run.get(name)) for name in ("precision", "prng")),
    )
    for name, one, other in facts:
        if one is not None and other is not None and one != other:
            raise ValueError(
                f"{name}: {a.folder} has {one}, {b.folder} has {other}: no two of their trials have the same data"
            )


def chosen_methods(
    a: Side, b: Side, method_a: str | None, method_b: str | None, same: bool
) -> tuple[Side, Side, bool]:
    """Both sides with their methods, and true if each has one of its own."""
    for option, method, side in (("--method-a", method_a, a), ("--method-b", method_b, b)):
        if method is not None and method not in side.methods:
            raise ValueError(f"{option} {method}: not in {side.folder}; {nearest(method, side.methods)}")
    if method_a is None and method_b is None:
        if not same:
            common = [method for method in a.methods if method in b.methods]
            if common:
                return a, b, False
            if len(a.methods) == len(b.methods) == 1:
                return a, b, True
        elif len(a.methods) == 2:
            return a.only(a.methods[0]), b.only(a.methods[1]), True
        raise ValueError(
            f"--method-a, --method-b: expected two methods to compare; A has {', '.join(a.methods)}, B has {', '.join(b.methods)}"
        )
    if method_a is None or method_b is None:
        option, given, side = ("--method-a", method_b, a) if method_a is None else ("--method-b", method_a, b)
        others = [method for method in side.methods if method != given]
        candidates = others if same else [given] if given in side.methods else others
        if len(candidates) != 1:
            raise ValueError(
                f"{option}: expected a method to compare with {given}; known: {', '.join(others)}"
            )
        method_a, method_b = method_a or str(candidates[0]), method_b or str(candidates[0])
    if same and method_a == method_b:
        raise ValueError(
            f"--method-b {method_b}: expected another method than that of --method-a, or another run"
        )
    return a.only(method_a), b.only(method_b), method_a != method_b


def fields_apart(a: Side, b: Side) -> list[str]:
    """Algorithm fields with one value in each run that is not the same."""
    constants = ((name, a.constant(name), b.constant(name)) for name in MATCHED)
    return [name for name, one, other in constants if one is not None and other is not None and one != other]


def pairs_of(a: Side, b: Side, matched: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Trials of both sides, those with equal keys side by side; and the fields that name a configuration.

    Columns: the fields; `data`, the data hash; `trial`; every metric with the suffixes _a and _b; `_merge`.
    """
    fields = [
        name
        for name in (*FIELD_COLUMNS, METHOD_FIELD)
        if name in matched or name not in (*MATCHED, METHOD_FIELD)
    ]
    fields.remove("record")
    numbers: dict[str, int] = {}
    sides = []
    for side in (a, b):
        texts = side.cells[[*matched]].map(show).to_numpy().tolist()
        keys = ["\n".join([data, *text]) for data, text in zip(side.cells["data_hash"], texts, strict=True)]
        number = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        rows = side.rows.assign(key=number[side.rows["position"]])
        # a spec may record other arrays for the same numbers
        sides.append((side.cells.assign(key=number), rows.drop_duplicates(["key", "trial"])))
    kept = [rows[["key", "trial", *side.metrics]] for (_, rows), side in zip(sides, (a, b), strict=True)]
    pairs = kept[0].merge(kept[1], on=["key", "trial"], how="outer", suffixes=("_a", "_b"), indicator=True)
    one_side = {name for name in (*a.metrics, *b.metrics) if name in pairs}  # a plugin's metric of one run
    pairs = pairs.drop(columns=list(one_side))
    known = pd.concat([cells for cells, _ in sides]).drop_duplicates("key").set_index("key")
    pairs = pairs.join(known[[*fields, "data_hash"]], on="key")
    pairs = pairs.sort_values(["key", "trial"], kind="stable", ignore_index=True)
    return pairs.rename(columns={"data_hash": "data"}), fields


def names_of(a: Side, b: Side, same: bool, methods_differ: bool, apart: Sequence[str]) -> tuple[str, str]:
    """The names of both sides: the folder, if there are two, and the method or the fields that set them apart."""
    names = []
    for side in (a, b):
        parts = [] if same else [str(side.folder)]
        if methods_differ:
            parts.append(side.methods[0])
        parts += [f"{name} = {show(side.constant(name)[0])}" for name in apart]
        names.append(", ".join(parts))
    return names[0], names[1]


def notes_of(a: Side, b: Side) -> list[str]:
    """Lines on code that differs between the runs."""
    notes = []
    one, other = (side.run["versions"]["moejax"] for side in (a, b))
    if one != other:
        notes.append(f"A was run by moejax {one}, B by {other}")
    elif a.run.get("source") != b.run.get("source"):
        notes.append(f"A and B were run by different sources of moejax {one}")
    plugins = [[plugin["source"] for plugin in side.run["plugins"]] for side in (a, b)]
    if plugins[0] != plugins[1]:
        notes.append(
            "the plugins of A and B differ: a name may stand for another function, and then the data differ too"
        )
    return notes
