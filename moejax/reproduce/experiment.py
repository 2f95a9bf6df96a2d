"""The experiments of a root folder: one Python file of experiments/ each.

    SPEC = "sweeps/noise.toml"            # relative to the root
    QUICK = {"trials": 10, ...}           # what --quick changes in it
    def figure(table): ...                # results/NAME/table.csv, read back -> a matplotlib Figure

An experiment may have `SHOWS` and `SHOWS_NOT` (a sentence each, for the gallery), `NUMBERS` (those in its sentences, see
`moejax.reproduce.claims`), `summary(table) -> DataFrame` (summary.csv), `SECONDS = True` (a column of compute seconds),
`extend(table, folder)` (columns from the store's arrays, by `result_hash` and `trial`), or `run_cell(cell) -> DataFrame` with
`PROGRAM`, `PRECISION` and `compiles` where it is no recovery sweep (see `moejax.reproduce.cell_functions`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.registry import nearest
from moejax.sweep.plan.user_code import read_user_file, run_user_file
from moejax.sweep.spec.positions import SpecError

EXPERIMENTS_FOLDER = "experiments"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One file of experiments/, checked, with its spec as it will be run."""

    module: types.ModuleType
    path: Path
    spec_path: Path
    overrides: dict[str, Any]
    name: str

    @property
    def is_study(self) -> bool:
        """Whether it brings its own function instead of a sweep."""
        return hasattr(self.module, "run_cell")

    def get(self, name: str, default: Any = None) -> Any:
        """An optional name of the module."""
        return getattr(self.module, name, default)


def load_experiments(
    root: Path, names: Sequence[str] = (), *, quick: bool = False, seed: int | None = None
) -> list[Experiment]:
    """The experiments of a root folder, or those that are named, in alphabetical order.

    Raises:
        ValueError: there are none, a name is unknown, or a file has no SPEC or figure.
    """

    files = sorted((root / EXPERIMENTS_FOLDER).glob("*.py"))
    files = [file for file in files if not file.name.startswith("_")]
    if not files:
        raise ValueError(
            f"--root {root}: no experiments there: expected {EXPERIMENTS_FOLDER}/*.py, each with SPEC and figure(table)"
        )
    known = {file.stem.replace("_", "-"): file for file in files}
    asked = [name.replace("_", "-") for name in names]
    for name, given in zip(asked, names, strict=True):
        if name not in known:
            raise ValueError(f"{given}: no such experiment; {nearest(name, known)}")
    experiments = []
    for name, file in known.items():
        if asked and name not in asked:
            continue
        module = load_experiment(file)
        for needed in ("SPEC", "figure"):
            if not hasattr(module, needed):
                raise ValueError(f"{file}: expected SPEC and figure(table), got no {needed}")
        spec_path = _spec_path(module.SPEC, root, file, name)
        overrides = dict(getattr(module, "QUICK", {})) if quick else {}
        if seed is not None:
            overrides["seed"] = seed
        experiments.append(Experiment(module, file, spec_path, overrides, name))
    return experiments


def _spec_path(spec: Any, root: Path, file: Path, name: str) -> Path:
    """The file that SPEC names, relative to the root or to the experiment."""
    if not isinstance(spec, str | Path):
        raise SpecError(f"{file}: SPEC: expected the path of a TOML file, got {type(spec).__name__}")
    for folder in (root, file.parent):
        if (folder / spec).is_file():
            return folder / spec
    raise SpecError(f"{root / spec}: cannot read the spec of the experiment {name}: no such file")


def load_experiment(path: Path) -> types.ModuleType:
    """The module of an experiment's file, loaded once in a process.

    Raises:
        ValueError: it cannot be read, or raised; the message names the file and the error.
    """
    name = f"moejax_experiment_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    return run_user_file(read_user_file(path, str(path)), name, f"{path}:")
