"""Commands that read run folders: status, export, report, compare and merge."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.console import make_console, print_json

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console


SELECTION_NAME = "selection"
"""Subfolder of a run folder for the report on a part of its cells."""


def write_results(
    folder: Path,
    *,
    page: bool = False,
    where: str = "",
    pivoted: tuple[str, pd.DataFrame] | None = None,
    out: Path | None = None,
) -> tuple[pd.DataFrame, list[Path]]:
    """Write summary.csv and the figures into a run folder, and report.html if `page`, before anything is printed.

    Args:
        folder: the run folder.
        page: write report.html too.
        where: a condition on the fields; the results are those of the cells that meet it.
        pivoted: title and table of a pivot, for the page and for pivot.csv.
        out: the folder of the files; None: the run folder.

    Returns:
        The summary, and the files.

    Raises:
        ValueError: the condition is not accepted. StoreError: the folder cannot be read or written.
    """
    from moejax.files import write_whole
    from moejax.pictures import own_style
    from moejax.sweep.report.summary import summarise
    from moejax.sweep.store.export import write_table
    from moejax.sweep.store.schema import StoreError

    summary, out = summarise(folder, where), folder if out is None else out
    path = out / "summary.csv"
    with own_style():
        from moejax.sweep.report.figures import make_figures, write_figures
        from moejax.sweep.report.page import write_report

        figures = make_figures(summary)
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda path: summary.to_csv(path, index=False))
            written = [path, *write_figures(figures, out)]
        except OSError as error:
            raise StoreError(f"{out}: the summary cannot be written: {error.strerror or error}") from None
        if pivoted is not None:
            write_table(pivoted[1], out / "pivot.csv")
            written.append(out / "pivot.csv")
        if page:
            written.append(write_report(folder, summary, figures, out=out, where=where, pivoted=pivoted))
    return summary, written


def print_results(tables: Console, summary: pd.DataFrame, written: Sequence[Path]) -> None:
    """Print the summary of a run folder, and the names of the written files."""
    from moejax.sweep.report.terminal import print_summary

    print_summary(tables, summary)
    tables.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)


def status(folder: Path, *, as_json: bool = False) -> dict[str, Any]:
    """Print the progress of a sweep; it only reads, and works while the sweep runs."""
    from moejax.sweep.report.status import read_status
    from moejax.sweep.report.terminal import print_status

    state = read_status(folder)
    print_status(make_console(quiet=as_json), state)
    result = dataclasses.asdict(state)
    if as_json:
        print_json(result)
    return result


def export(
    folder: Path, file: Path, *, where: str = "", pivot: Sequence[str] | None = None, quiet: bool = False
) -> int:
    """Write the table of trials to FILE.csv, FILE.csv.gz or FILE.parquet, or to stdout for `-`; returns the number of rows.

    `where` and `pivot` are those of `moejax.sweep.export_table`.
    """
    from moejax.sweep.store.export import STDOUT, export_table

    rows = export_table(folder, file, where=where, pivot=pivot)
    if file != STDOUT:
        make_console(quiet=quiet).print(f"{rows:,} rows written to {file}", soft_wrap=True)
    return rows


def report(
    folder: Path,
    *,
    where: str = "",
    pivot: Sequence[str] | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write summary.csv, the figures and report.html into a run folder, and print the summary.

    It works on a sweep that is running or was stopped: missing trials are shown as missing.

    Args:
        folder: the run folder.
        where: a condition on the fields: the report is on the cells that meet it.
        pivot: a table to add, as for `moejax.sweep.export_table`.
        out: the folder of the files; None: the run folder, or with `where` its subfolder `selection`, so that the report on all
            cells stays.
        quiet: print nothing.

    Raises:
        ValueError: the condition or the pivot is not accepted. OSError: there is no store, or the folder cannot be written.
    """
    from moejax.sweep.report.terminal import print_pivot
    from moejax.sweep.store.filters import matching_rows
    from moejax.sweep.store.pivot import Pivot
    from moejax.sweep.store.read import load

    folder = Path(folder)
    if out is None:
        out = folder / SELECTION_NAME if where else folder
    pivoted = None
    if pivot is not None:
        table = matching_rows(load(folder), where)
        asked = Pivot.parse(pivot, table)
        pivoted = (asked.title, asked.of(table))
    tables = make_console(quiet=quiet)
    summary, written = write_results(folder, page=True, where=where, pivoted=pivoted, out=out)
    print_results(tables, summary, written[:-1])
    if pivoted is not None:
        print_pivot(tables, *pivoted)
    tables.print(f"report: {written[-1]}", soft_wrap=True)
    return {"folder": str(folder), "written": [str(path) for path in written]}


def compare(
    run_a: Path, run_b: Path | None = None, *, out: Path | None = None, quiet: bool = False, **options: Any
) -> dict[str, Any]:
    """Print the paired differences of two runs, or of two methods of one run.

    Args:
        run_a: a run folder.
        run_b: another; None: the same.
        out: FILE.csv, FILE.csv.gz or FILE.parquet for the whole table.
        quiet: print nothing.
        options: those of `moejax.sweep.compare`.

    Raises:
        ValueError: an option, or there is no pair; OSError: a store or the file.
    """
    from moejax.sweep.report.comparison import compare as compared
    from moejax.sweep.report.terminal import print_comparison
    from moejax.sweep.store.export import check_table_name, write_table

    if out is not None:
        check_table_name(out)
    comparison = compared(run_a, run_b, **options)
    if out is not None:
        write_table(comparison.table, out)
    tables = make_console(quiet=quiet)
    print_comparison(tables, comparison)
    if out is not None:
        tables.print(f"{len(comparison.table):,} rows written to {out}", soft_wrap=True)
    return {
        "a": comparison.names[0],
        "b": comparison.names[1],
        "rows": comparison.table.to_dict("records"),
        "unpaired": comparison.unpaired.to_dict("records"),
        "notes": list(comparison.notes),
    }


def merge(
    folders: Sequence[Path],
    *,
    out: Path,
    across_versions: bool = False,
    keep_first: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the trials of several run folders into a new one, which every other command takes.

    Args:
        folders: the run folders, which stay unchanged.
        out: the new folder.
        across_versions: if true, results of different versions or sources of moejax, or of JAX, may be merged.
        keep_first: if true, the first of different numbers of one trial is kept.
        quiet: print nothing.

    Raises:
        ValueError: specs that contradict each other; OSError: a store, or numbers that differ.
    """
    from moejax.sweep.execution.provenance import check_mergeable
    from moejax.sweep.store.merge import merge_stores

    check = functools.partial(check_mergeable, across_versions=across_versions)
    done = merge_stores(folders, out, check, keep_first=keep_first, command=sys.argv)
    tables = make_console(quiet=quiet)
    line = f"{out}: {done.trials:,} trials of {done.cells:,} cells from {len(folders)} runs"
    line += f"; {done.duplicates:,} trials in several runs are kept once" if done.duplicates else ""
    line += f"; {done.replaced:,} without a result have one in another run" if done.replaced else ""
    tables.print(line, soft_wrap=True)
    return {"folder": str(out), **dataclasses.asdict(done)}
