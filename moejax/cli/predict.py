"""`moejax predict`: reads a fit and new rows, and prints or writes the predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from moejax.checks import require
from moejax.cli.activations import load_function
from moejax.cli.options import Predict
from moejax.console import make_console
from moejax.files import write_whole
from moejax.fitting.categories import Category, categories_from
from moejax.fitting.new_rows import NewRows, read_new_rows
from moejax.fitting.result import FitResult
from moejax.fitting.result_predictions import checked_levels
from moejax.fitting.saved import load_fit
from moejax.model.activations import get_activation
from moejax.sweep.plan.plugins import run_plugins

FIT, DOCUMENT = "fit.moejax", "fit.json"
"""The files of a folder of `moejax fit --out` that predictions need."""
ROWS_SHOWN = 10
"""Rows that are printed if there is no file for them."""
MOST_DECIMALS = 6
SUFFIXES = (".csv", ".csv.gz", ".parquet")


class FolderOfFit(NamedTuple):
    """A fit as `moejax fit --out` wrote it."""

    result: FitResult
    input_names: tuple[str, ...]
    categories: tuple[Category, ...]
    target: str
    offset: str | None
    """The column of the offset, if the fit had one."""


def read_fit(folder: Path, activation: str | None = None) -> FolderOfFit:
    """The fit in a folder.

    Raises:
        ValueError: it holds no whole fit of this version, or the fit's activation is not known here.
    """
    if not folder.is_dir():
        raise ValueError(f"FIT_DIR {folder}: expected a folder of `moejax fit --out`, got no folder")
    for name in (FIT, DOCUMENT):
        if not (folder / name).is_file():
            hint = "an earlier version wrote it: fit again" if (folder / DOCUMENT).is_file() else "no fit"
            raise ValueError(
                f"FIT_DIR {folder}: expected a folder of `moejax fit --out`, got one without {name} ({hint})"
            )
    given = None if activation is None else _function(activation)
    try:
        result = load_fit(folder / FIT, activation=given)
    except ValueError as error:
        text = str(error).replace(
            "load_fit(path, activation=..)", "--activation FILE.py:FUNCTION or --plugin"
        )
        raise ValueError(f"FIT_DIR {folder}: {text}") from None
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        categories = categories_from(document["categories"])
        target, offset = str(document["settings"]["target"]), document["settings"].get("offset")
        names = tuple(document["experts"][0]["coefficients"])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"FIT_DIR {folder}: expected a whole {DOCUMENT} of `moejax fit`, got another"
        ) from None
    same = list(names) == list(result.diagnostics.get("input_names", ()))
    require(same, f"FIT_DIR {folder}", f"{FIT} and {DOCUMENT} of one fit", "those of two")
    return FolderOfFit(result, names, categories, target, offset)


def _function(activation: str) -> Any:
    return load_function(activation) if ":" in activation else get_activation(activation)


def predict_command(command: Predict) -> list[dict[Hashable, Any]]:
    """Predict, then print or write by the options of `moejax predict`; returns a record for each row.

    Raises:
        ValueError: about the fit, the rows or an option, in one line; OSError: the file cannot be read or written.
    """
    quiet, out = command.common.quiet or command.common.json, command.out
    (level,) = checked_levels([command.level], "--level")
    quantiles = checked_levels(command.quantiles, "--quantiles") if command.quantiles else []
    if out is not None and not out.name.lower().endswith(SUFFIXES):
        raise ValueError(f"--out {out}: expected FILE.csv, FILE.csv.gz or FILE.parquet")
    run_plugins(command.plugin)
    fit = read_fit(command.fit, command.activation)
    rows = read_new_rows(
        command.data,
        fit.input_names,
        fit.categories,
        fit.target,
        fit.offset,
        separator=command.separator,
        decimal=command.decimal,
    )
    table = predictions(fit.result, rows, level, quantiles)
    if out is not None:
        _write(table, out)
    if not quiet:
        _print(table, fit, rows, level, quantiles)
        if out is not None:
            make_console().print(f"written to {out}: {len(table):,} rows", soft_wrap=True)
    return table.to_dict("records")


def predictions(result: FitResult, rows: NewRows, level: float, quantiles: list[float]) -> pd.DataFrame:
    """A row of predictions for each row.

    The columns are `mean`, `std`, `low` and `high` (the ends of the interval), `quantile_q` for each level q, and the share
    of each expert: `gate_i` given the inputs, or `responsibility_i` if the rows have the target too.
    """
    levels = [0.5 - 0.5 * level, 0.5 + 0.5 * level, *quantiles]
    of_rows = {"offset": rows.offset}
    found = result.predict_quantiles(rows.x, levels, **of_rows)
    columns = {"mean": result.predict(rows.x, **of_rows), "std": result.predict_std(rows.x, **of_rows)}
    columns |= {"low": found[:, 0], "high": found[:, 1]}
    columns |= {f"quantile_{q:.10g}": found[:, 2 + i] for i, q in enumerate(quantiles)}
    name = "gate" if rows.y is None else "responsibility"
    shares = (
        result.gate_probabilities(rows.x)
        if rows.y is None
        else result.responsibilities(rows.x, rows.y, **of_rows)
    )
    columns |= {f"{name}_{i + 1}": shares[:, i] for i in range(shares.shape[1])}
    return pd.DataFrame(columns)


def _write(table: pd.DataFrame, out: Path) -> None:
    def write(file: Path) -> None:
        if out.name.lower().endswith(".parquet"):
            table.to_parquet(file, index=False)
        else:
            compression: Any = "gzip" if out.name.lower().endswith(".gz") else None
            table.to_csv(file, index=False, compression=compression)

    try:
        write_whole(out, write)
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _form(std: float) -> str:
    """The format of numbers with three digits of their standard deviation."""
    place = math.floor(math.log10(std)) if 0 < std < math.inf else 0
    return f".{max(2 - place, 0)}f" if -MOST_DECIMALS <= place <= MOST_DECIMALS else ".4g"


def _print(
    table: pd.DataFrame, fit: FolderOfFit, rows: NewRows, level: float, quantiles: list[float]
) -> None:
    console = make_console()
    result = fit.result
    kind = "the mean of" if result.objective == "mean" else "a mixture of"
    averaged = f", averaged over {len(result.members)} models" if len(result.members) > 1 else ""
    console.print(
        f"{fit.target} at {len(table):,} rows, by {kind} {len(result.params.noise_std)} experts{averaged}"
    )
    if rows.y is not None:
        covered = np.mean((rows.y >= table["low"]) & (rows.y <= table["high"]))
        error = np.sqrt(np.mean((rows.y - table["mean"]) ** 2))
        console.print(
            f"RMSE {error:.4g}; {covered:.1%} of the targets are in their {100 * level:g}% intervals; "
            f"log density {result.log_density(rows.x, rows.y, offset=rows.offset).mean():.4f} nats a row"
        )
    shown = Table(box=box.SIMPLE, pad_edge=False)
    expert = "likeliest expert" if result.objective == "likelihood" else "largest gate"
    headings = ["row", "mean", "std", f"{100 * level:g}% interval", *(f"{q:g} quantile" for q in quantiles)]
    for heading in (*headings, expert):
        shown.add_column(heading, justify="right")
    shares = table.filter(regex="^(gate|responsibility)_").to_numpy()
    form = _form(float(table["std"].head(ROWS_SHOWN).median()))
    for row, numbers in enumerate(table.head(ROWS_SHOWN).to_dict("records")):
        best = int(shares[row].argmax())
        shown.add_row(
            str(row + 1),
            f"{numbers['mean']:{form}}",
            f"{numbers['std']:{form}}",
            f"{numbers['low']:{form}} to {numbers['high']:{form}}",
            *(f"{numbers[f'quantile_{q:.10g}']:{form}}" for q in quantiles),
            f"{best + 1} ({shares[row, best]:.2f})",
        )
    console.print(shown)
    if len(table) > ROWS_SHOWN:
        console.print(f".. and {len(table) - ROWS_SHOWN:,} more rows; --out FILE.csv writes all of them")
    for note in rows.notes:
        console.print(f"note: {note}")
