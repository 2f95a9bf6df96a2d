"""The experiments of a root folder. Each is a Python file in experiments/ that builds an `Experiment` under the name EXPERIMENT.

def figure(table): ...                # results/NAME/table.csv, read back -> a matplotlib Figure

EXPERIMENT = Experiment(spec="sweeps/noise.toml", quick={"trials": 10}, figure=figure)
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.checks import brief, require
from moejax.registry import nearest
from moejax.reproduce.claims import Number
from moejax.sweep.plan.user_code import read_user_file, run_user_file
from moejax.sweep.spec.positions import SpecError

if TYPE_CHECKING:
    import pandas as pd

EXPERIMENTS_FOLDER = "experiments"
PRECISIONS = ("float32", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The declaration of an experiment: a sweep or a study, and the figure and the sentences made from its table.

    >>> from moejax.reproduce import Experiment
    >>> Experiment(spec="sweeps/noise.toml", figure=lambda table: None).quick
    {}

    Raises:
        TypeError: an unknown field; ValueError: a field with a value that is not accepted.
    """

    spec: str | Path
    """The TOML file, relative to the root or to the experiment."""
    figure: Callable[[pd.DataFrame], Any]
    """results/NAME/table.csv, read back -> a matplotlib Figure."""
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Overrides of the spec for --quick."""
    shows: str = ""
    """A sentence for the gallery; a {name} in it is a number of `numbers`."""
    shows_not: str = ""
    """A sentence for the gallery on the limits of the experiment."""
    part: str = ""
    """The heading of the gallery under which the figure stands; headings are in alphabetical order."""
    place: int = 0
    """The place under the heading, before the name."""
    numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    """The numbers in the sentences."""
    summary: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    """The table -> summary.csv."""
    extend: Callable[[pd.DataFrame, Path], pd.DataFrame] | None = None
    """(table, run folder) -> the table with more columns, made from the store's arrays by `result_hash` and `trial`."""
    seconds: bool = False
    """If true, the table has a column of compute seconds."""
    run_cell: Callable[[dict[str, Any]], pd.DataFrame] | None = None
    """For a study: cell -> its rows (see `moejax.reproduce.cell_functions`)."""
    program: tuple[str, ...] = ()
    """For a study: each combination of values of these fields has its own program."""
    precision: str = "float64"
    """Precision of a study."""
    compiles: Callable[[dict[str, Any]], bool] | None = None
    """For a study: cell -> true if it compiles a program; None means that every cell does."""

    def __post_init__(self) -> None:
        require(isinstance(self.spec, str | Path), "spec", "the path of a TOML file", self.spec)
        for name in ("figure", "summary", "extend", "run_cell", "compiles"):
            value = getattr(self, name)
            require(callable(value) or (value is None and name != "figure"), name, "a function", value)
        require(self.precision in PRECISIONS, "precision", " or ".join(PRECISIONS), self.precision)
        study_only = (self.program, self.compiles, self.precision != "float64")
        require(self.run_cell is not None or not any(study_only), "run_cell", "a function for a study", None)


@dataclasses.dataclass(frozen=True)
class ExperimentFile:
    """A checked experiment of a root folder, with its final spec."""

    declared: Experiment
    path: Path
    spec_path: Path
    overrides: dict[str, Any]
    name: str

    @property
    def question(self) -> str:
        """The question that the figure answers: the beginning of the file's docstring, up to its question mark; "" without one."""
        question, mark, _ = (load_module(self.path).__doc__ or "").strip().split("\n")[0].partition("?")
        return question + mark if mark else ""

    @property
    def is_study(self) -> bool:
        """True if it has its own function instead of a sweep."""
        return self.declared.run_cell is not None


def load_experiments(
    root: Path, names: Sequence[str] = (), *, quick: bool = False, seed: int | None = None
) -> list[ExperimentFile]:
    """All experiments of a root folder, or the named ones, in alphabetical order.

    Raises:
        ValueError: there are none, a name is unknown, or a file has no EXPERIMENT.
    """
    files = sorted((root / EXPERIMENTS_FOLDER).glob("*.py"))
    files = [file for file in files if not file.name.startswith("_")]
    if not files:
        raise ValueError(
            f"--root {root}: no experiments there: expected {EXPERIMENTS_FOLDER}/*.py, each with EXPERIMENT = Experiment(..)"
        )
    known = {file.stem.replace("_", "-"): file for file in files}
    requested = [name.replace("_", "-") for name in names]
    for name, given in zip(requested, names, strict=True):
        if name not in known:
            raise ValueError(f"{given}: no such experiment; {nearest(name, known)}")
    experiments = []
    for name, file in known.items():
        if requested and name not in requested:
            continue
        declared = load_experiment(file)
        overrides = dict(declared.quick) if quick else {}
        if seed is not None:
            overrides["seed"] = seed
        spec_path = _spec_path(declared.spec, root, name)
        experiments.append(ExperimentFile(declared, file, spec_path, overrides, name))
    return experiments


def _spec_path(spec: str | Path, root: Path, name: str) -> Path:
    """The file that `spec` names, relative to the root or to the experiment."""
    for folder in (root, root / EXPERIMENTS_FOLDER):
        if (folder / spec).is_file():
            return folder / spec
    raise SpecError(f"{root / spec}: cannot read the spec of the experiment {name}: no such file")


def load_module(path: Path) -> types.ModuleType:
    """The module of an experiment's file, loaded once in a process.

    Raises:
        ValueError: the file cannot be read, or raised; the message names the file and the error.
    """
    name = f"moejax_experiment_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    return run_user_file(read_user_file(path, str(path)), name, f"{path}:")


def load_experiment(path: Path) -> Experiment:
    """The EXPERIMENT of a file.

    Raises:
        ValueError: the file cannot be read, raised, or has none; the message names the file and the error.
    """
    experiment = getattr(load_module(path), "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise ValueError(
            f"{path}: expected EXPERIMENT = Experiment(spec=.., figure=..) of moejax.reproduce, got {brief(experiment)}"
        )
    return experiment
