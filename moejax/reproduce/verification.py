"""`moejax reproduce --verify`: remakes a random tenth of every committed table and compares it, number by number.

The remade rows have the same data as the committed ones; only rounding differs. So the difference of a statistic over the same
rows, remade minus committed, is the shift that another machine would see. A number holds if its shift is within 2 standard
errors, those of the number and of the shift together.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moejax.model.metrics import SUCCESS_THRESHOLD
from moejax.reproduce.claims import SUMMARY_NAME, TABLE_NAME, Claim, Number, compute, read_results, text_of
from moejax.reproduce.results_folder import write_table
from moejax.sweep.spec.fields import METHOD_FIELD
from moejax.sweep.store.read import FIELD_COLUMNS

if TYPE_CHECKING:
    from moejax.reproduce.experiment import ExperimentFile

LIMIT = 2.0
"""A number differs if it is shifted by more standard errors."""
WITHOUT_ERROR = 0.01
"""A number without a standard error differs if it is shifted by more than this share of it."""
RESAMPLES = 200
GROUPS = 4
"""Parts of the remade rows that give the standard error of a summary's shift."""
TIME_COLUMN = "seconds"
MAIN_METRIC = "recovery_error"
HOLDS, DIFFERS, NOT_REMADE, NOT_COMPARED = "holds", "differs", "not remade", "not compared: a time"


@dataclasses.dataclass(frozen=True)
class NumberCheck:
    """The verdict on a number of a sentence."""

    name: str
    text: str
    """The number as committed."""
    rows: int
    """Its remade rows."""
    shift: float
    """Estimated difference at the other rounding; NaN if nothing was compared."""
    errors: float
    """The shift in standard errors; NaN if there is no standard error."""
    verdict: str


@dataclasses.dataclass(frozen=True)
class TableCheck:
    """The comparison of an experiment's table with its remade rows."""

    name: str
    rows: int
    remade: int
    unmatched: int
    """Remade rows that are not in the committed table, such as those of a quick run's own sizes."""
    relative_difference: float
    """Median over the remade rows of |remade - committed| / |committed| of the recovery error; NaN if there is none."""
    cells: int
    largest_cell_shift: float
    """The largest shift of a cell's mean recovery error, in standard errors."""
    numbers: tuple[NumberCheck, ...]

    @property
    def differing(self) -> list[NumberCheck]:
        """The numbers that do not hold."""
        return [check for check in self.numbers if check.verdict == DIFFERS]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The same rows, committed and remade, in the same order."""

    committed: pd.DataFrame
    remade: pd.DataFrame
    places: np.ndarray
    """Their positions in the committed table."""


def chosen(seed: int, name: str, count: int, share: float) -> list[int]:
    """A random part of range(count), at least one, sorted; seed and name of the experiment determine it."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return sorted(random.choice(count, size=max(1, round(share * count)), replace=False).tolist())


def check_table(
    experiment: ExperimentFile,
    remade: pd.DataFrame,
    results: Path,
    keys: Sequence[str],
    scratch: Path,
    *,
    quick: bool = False,
) -> TableCheck:
    """Compare remade rows with the committed table.

    Args:
        experiment: the experiment.
        remade: its remade rows.
        results: the committed results of this experiment.
        keys: columns that identify a row; rows with equal keys are taken in their order.
        scratch: a folder for a table with the digits of a committed one.
        quick: the remade rows are those of a quick run: there may be none of the committed table.

    Raises:
        ValueError: there is no committed table, or none of the remade rows is in it.
    """
    tables = read_results(results)
    if TABLE_NAME not in tables:
        raise ValueError(
            f"{results / TABLE_NAME}: there is no such table; `moejax reproduce {experiment.name}` makes it"
        )
    committed = tables[TABLE_NAME]
    scratch.mkdir(parents=True, exist_ok=True)
    write_table(remade, scratch / TABLE_NAME)
    remade = read_results(scratch)[TABLE_NAME]
    places, own = _matched(committed, remade, [key for key in keys if key in committed and key in remade])
    if not len(places):
        if quick:  # its sizes may be others than those of the full run
            return TableCheck(experiment.name, len(committed), 0, len(remade), math.nan, 0, math.nan, ())
        raise ValueError(
            f"{results / TABLE_NAME}: none of {len(remade)} remade rows is in it: its spec has changed"
        )
    rows = _Rows(
        committed.iloc[places].reset_index(drop=True), remade.iloc[own].reset_index(drop=True), places
    )
    numbers = [
        _check_number(name, number, tables, rows, experiment, scratch)
        for name, number in experiment.declared.numbers.items()
    ]
    relative, cells, largest = _cell_shifts(committed, rows, [key for key in keys if key != "trial"])
    return TableCheck(
        experiment.name,
        len(committed),
        len(rows.remade),
        len(remade) - len(rows.remade),
        relative,
        cells,
        largest,
        tuple(check for check in numbers if check is not None),
    )


def row_keys(cells: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The columns that identify a row: of a study its cells' values, of a sweep the fields, the method and the trial."""
    if cells is None:
        return [*FIELD_COLUMNS, METHOD_FIELD, "trial"]
    return list(dict.fromkeys(name for cell in cells for name in cell))


def _matched(
    committed: pd.DataFrame, remade: pd.DataFrame, keys: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of equal rows in both tables."""
    sides = []
    for table in (committed, remade):
        texts = pd.DataFrame({key: _texts(table[key]) for key in keys})
        texts["row"] = texts.groupby(list(keys)).cumcount()
        sides.append(texts.assign(place=np.arange(len(table))))
    both = sides[0].merge(sides[1], on=[*keys, "row"], suffixes=("", "_remade"))
    return both["place"].to_numpy(), both["place_remade"].to_numpy()


def _texts(column: pd.Series) -> pd.Series:
    """Values as text: 3 and 3.0 are equal, which depends on whether a column has empty entries."""
    if pd.api.types.is_numeric_dtype(column) and column.dtype != bool:
        return column.map("{:.9g}".format)
    return column.fillna("nan").astype(str)


def _spliced(committed: pd.DataFrame, rows: _Rows, chosen_rows: np.ndarray) -> pd.DataFrame:
    """The committed table with some of the remade rows in their places."""
    spliced = committed.copy()
    for name in committed:
        if name in rows.remade:
            values = committed[name].to_numpy(dtype=object, copy=True)
            values[rows.places[chosen_rows]] = rows.remade[name].to_numpy(dtype=object)[chosen_rows]
            spliced[name] = pd.Series(values, index=committed.index).infer_objects()
    return spliced


def _check_number(
    name: str,
    number: Number,
    tables: Mapping[str, pd.DataFrame],
    rows: _Rows,
    experiment: ExperimentFile,
    scratch: Path,
) -> NumberCheck | None:
    claim = compute(number, tables)
    if claim is None:
        return None
    if number.column == TIME_COLUMN or number.column.endswith(f"_{TIME_COLUMN}"):
        return NumberCheck(name, claim.text, 0, math.nan, math.nan, NOT_COMPARED)
    if number.file == TABLE_NAME:
        count, shift, error = _shift_in_table(number, claim, tables[TABLE_NAME], rows)
    else:
        count, shift, error = _shift_in_summary(number, claim, experiment, tables[TABLE_NAME], rows, scratch)
    if not count:
        return NumberCheck(name, claim.text, 0, math.nan, math.nan, NOT_REMADE)
    known = [value for value in (claim.mcse, error) if math.isfinite(value)]
    together = math.hypot(*known)
    errors = abs(shift) / together if together > 0 else math.nan
    if text_of(number, claim.value + shift, claim.mcse) == claim.text or shift == 0:
        holds = True  # a reader would see the same number
    elif math.isfinite(errors):
        holds = errors <= LIMIT
    else:
        holds = abs(shift) <= WITHOUT_ERROR * abs(claim.value)
    return NumberCheck(name, claim.text, count, shift, errors, HOLDS if holds else DIFFERS)


def _shift_in_table(
    number: Number, claim: Claim, committed: pd.DataFrame, rows: _Rows
) -> tuple[int, float, float]:
    """(remade rows of a number, shift, standard error of the shift) for a statistic of rows of table.csv."""

    def chosen_of(table: pd.DataFrame) -> pd.DataFrame:
        return table.query(number.rows) if number.rows else table

    old, new = chosen_of(rows.committed), chosen_of(rows.remade)
    before, after = (compute(number, {TABLE_NAME: table}) for table in (old, new))
    if before is None or after is None:
        return 0, math.nan, math.nan
    shift = after.value - before.value
    if number.statistic not in ("median", "mean", "success_rate") or not old.index.equals(new.index):
        return len(new), shift, math.nan
    total = len(chosen_of(committed))
    if number.statistic == "success_rate" and claim.mcse == 0:
        return len(new), shift, 1 / total  # all or none of the trials: one more or less is no difference
    if len(new) == 1:
        return 1, shift, claim.mcse * math.sqrt(total)  # the standard deviation of one trial
    old_values, new_values = (table[number.column].to_numpy(dtype=float) for table in (old, new))
    random = np.random.default_rng(0)
    draws = random.integers(len(new), size=(RESAMPLES, len(new)))
    statistic: Callable[[np.ndarray], np.ndarray] = {
        "median": lambda values: np.nanmedian(values, axis=1),
        "mean": lambda values: np.nanmean(values, axis=1),
        "success_rate": lambda values: (values < SUCCESS_THRESHOLD).mean(axis=1),
    }[number.statistic]
    good = np.isfinite(old_values[draws]).any(axis=1) & np.isfinite(new_values[draws]).any(axis=1)
    shifts = statistic(new_values[draws][good]) - statistic(old_values[draws][good])
    return len(new), shift, float(shifts.std()) if shifts.size else math.nan


def _shift_in_summary(
    number: Number,
    claim: Claim,
    experiment: ExperimentFile,
    committed: pd.DataFrame,
    rows: _Rows,
    scratch: Path,
) -> tuple[int, float, float]:
    """The same for a number of summary.csv, which is made from the whole table with the remade rows in it.

    If a share of all rows is remade, the shift of the summary is this share of that of a wholly remade table, to first order. Its
    standard error is that of the mean of the shifts by GROUPS parts of the remade rows. The cells of a study are remade wholly or
    not at all: a number that does not change then has no remade rows.
    """
    summary = experiment.declared.summary
    if summary is None or number.file != SUMMARY_NAME:
        return 0, math.nan, math.nan

    def shift_by(chosen_rows: np.ndarray) -> float:
        write_table(summary(_spliced(committed, rows, chosen_rows)), scratch / SUMMARY_NAME)
        after = compute(number, {SUMMARY_NAME: read_results(scratch)[SUMMARY_NAME]})
        share = 1.0 if experiment.is_study else chosen_rows.sum() / len(committed)
        return math.nan if after is None else (after.value - claim.value) / share

    count = len(rows.places)
    shift = shift_by(np.ones(count, bool))
    if math.isnan(shift) or (experiment.is_study and shift == 0):
        return 0, math.nan, math.nan
    if experiment.is_study or shift == 0 or count < GROUPS:
        return count, shift, math.nan
    parts = np.array([shift_by(np.arange(count) % GROUPS == part) for part in range(GROUPS)])
    return count, shift, float(parts.std(ddof=1) / math.sqrt(GROUPS))


def _cell_shifts(committed: pd.DataFrame, rows: _Rows, keys: Sequence[str]) -> tuple[float, int, float]:
    """(median relative difference of the recovery errors, number of cells, largest shift of a cell's mean in standard errors)."""
    keys = [key for key in keys if key in committed]
    cells = pd.DataFrame({key: _texts(rows.committed[key]) for key in keys})
    if MAIN_METRIC not in rows.committed or MAIN_METRIC not in rows.remade:
        return math.nan, len(cells.drop_duplicates()), math.nan
    old, new = (table[MAIN_METRIC].to_numpy(dtype=float) for table in (rows.committed, rows.remade))
    good = np.isfinite(old) & np.isfinite(new) & (old != 0)
    relative = float(np.median(np.abs(new[good] / old[good] - 1))) if good.any() else math.nan
    whole = committed[MAIN_METRIC].astype(float).groupby([_texts(committed[key]) for key in keys])
    spread = whole.std(ddof=1)
    differences = pd.Series(new - old).groupby([cells[key] for key in keys])
    shift, number = differences.mean(), differences.count()
    own = (differences.std(ddof=1) / np.sqrt(number)).where(number > 1, spread.reindex(shift.index))
    mcse = (spread / np.sqrt(whole.count())).reindex(shift.index)
    errors = shift.abs() / np.sqrt(mcse**2 + own**2)
    errors = errors[np.isfinite(errors)]
    return relative, len(shift), float(errors.max()) if len(errors) else math.nan
