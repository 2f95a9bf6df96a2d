"""Tables on the terminal: the plan, the state and the summary of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

from moejax.console import duration, shorten
from moejax.model.metrics import SUCCESS_THRESHOLD
from moejax.sweep.plan.estimate import BucketTiming, total_seconds
from moejax.sweep.plan.plan import Plan
from moejax.sweep.report.comparison import BEYOND, Comparison
from moejax.sweep.report.status import Status
from moejax.sweep.report.summary import SUCCESS_METRIC, percent, shown_pivot, swept_fields, with_error
from moejax.sweep.spec.fields import METHOD_FIELD, SHORT, show
from moejax.sweep.store.read import FIELD_COLUMNS

MAX_ROWS = 60
MAX_UNPAIRED = 5
"""Configurations of trials without a partner that are named."""


def print_plan(console: Console, plan: Plan, workers: int, timings: Sequence[BucketTiming] = ()) -> None:
    """Cells, buckets, compilations and memory of a plan; with timings, an estimate of its time."""
    spec = plan.spec
    at_most = "" if spec.precision is None else f" at first, at most {plan.most_trials:,}"
    console.print(
        f"{spec.name}: {len(plan.cells):,} cells, {plan.first_trials:,} trials{at_most}, "
        f"{len(plan.buckets)} compiled programs"
        + (f"; {plan.duplicates:,} equal cells run once" if plan.duplicates else "")
    )
    columns = ["trials", "chunks", "memory"]
    table = _program_table([*columns, "compile", "per trial"] if timings else columns)
    for index, bucket in enumerate(plan.buckets[:MAX_ROWS]):
        row = [
            bucket.label,
            f"{len(bucket.cells) * spec.first_target:,}",
            f"{plan.chunks_of(bucket):,} x {bucket.chunk_size}" + _width(bucket.vmap_width),
            memory(bucket.chunk_bytes),
        ]
        if timings:
            row.append(duration(timings[index].compile_seconds))
            row.append(f"{1e3 * timings[index].chunk_seconds / bucket.chunk_size:.1f} ms")
        table.add_row(*row)
    console.print(table)
    if len(plan.buckets) > MAX_ROWS:
        console.print(f"... and {len(plan.buckets) - MAX_ROWS} more programs")
    if timings:
        seconds = total_seconds(plan, list(timings), workers)
        console.print(f"estimated time on {workers} worker{'s' if workers > 1 else ''}: {duration(seconds)}")


def _program_table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("program", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _width(vmap_width: int) -> str:
    return f" ({vmap_width} wide)" if vmap_width > 1 else ""


def memory(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def print_summary(console: Console, summary: pd.DataFrame) -> None:
    """Median recovery error and success rate, one row per setting and method; no text is cut on a narrow terminal."""
    table = summary[summary["metric"] == SUCCESS_METRIC]
    axes = swept_fields(table)
    screen = _summary_table(table, axes, in_one_column=False)
    unlimited = console.options.update(max_width=10_000)
    if console.measure(screen, options=unlimited).maximum > console.width:
        screen = _summary_table(table, axes, in_one_column=True)
    console.print(screen)
    if len(table) > MAX_ROWS:
        console.print(f"... and {len(table) - MAX_ROWS} more rows: see summary.csv")


def _summary_table(table: pd.DataFrame, axes: list[str], *, in_one_column: bool) -> Table:
    """The table has a column for each swept field, or one column for all of them, whose lines break between fields."""
    screen = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    names = [SHORT.get(name, name) for name in axes]
    if in_one_column:
        screen.add_column("setting", overflow="fold")
    for name in (*([] if in_one_column else names), METHOD_FIELD):
        screen.add_column(name, no_wrap=True)
    for name in ("median error ± MCSE", f"< {SUCCESS_THRESHOLD}", "trials"):
        screen.add_column(name, justify="right", no_wrap=True)
    settings: list[tuple[list[str], list[tuple[str, ...]]]] = []
    for record in table.head(MAX_ROWS).to_dict("records"):
        setting = [_plain(record[name]) for name in axes]
        if not settings or settings[-1][0] != setting:
            settings.append((setting, []))
        notes = [
            f"{record[name]:,} {word}"
            for name, word in (("failed", "not ok"), ("missing", "missing"))
            if record[name]
        ]
        settings[-1][1].append(
            (
                record[METHOD_FIELD],
                with_error(record["median"], record["median_mcse"]),
                percent(record["success_rate"]),
                ", ".join([f"{record['trials']:,}", *notes]),
            )
        )
    for setting, methods in settings:
        pairs = (f"{name}={value}" for name, value in zip(names, setting, strict=True))
        screen.add_row(
            *([", ".join(pairs)] if in_one_column else setting),
            *("\n".join(lines) for lines in zip(*methods, strict=True)),
        )
    return screen


def print_pivot(console: Console, title: str, table: pd.DataFrame) -> None:
    """A pivot, every estimate with its Monte Carlo standard error."""
    console.print(title, soft_wrap=True)
    shown = shown_pivot(table)
    screen = Table(box=None, pad_edge=False, header_style="bold")
    for name in shown:
        screen.add_column(str(name), justify="left" if name in FIELD_COLUMNS else "right", no_wrap=True)
    for row in shown.head(MAX_ROWS).itertuples(index=False):
        screen.add_row(*row)
    console.print(screen)
    if len(shown) > MAX_ROWS:
        console.print(f"... and {len(shown) - MAX_ROWS} more rows: see pivot.csv")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else show(value)


def print_status(console: Console, status: Status) -> None:
    """Done, failed, left, rate and time left, in all and per bucket."""
    rate = f", {status.rate:.1f} trials/s" if status.rate else ""
    left = (
        ""
        if not status.left or status.seconds_left is None
        else f", about {duration(status.seconds_left)} left"
    )
    state = "running" if status.running else "complete" if not status.left else "stopped"
    console.print(
        f"{status.name}: {state}; {status.done:,} of {status.planned:,} trials done, "
        f"{status.failed:,} of them failed, {status.left:,} left{rate}{left}"
    )
    table = _program_table(["done", "failed", "left", "ms/trial", "time left"])
    for bucket in status.buckets[:MAX_ROWS]:
        table.add_row(
            bucket.label,
            f"{bucket.done:,}",
            f"{bucket.failed:,}",
            f"{bucket.left:,}",
            "" if bucket.trial_seconds is None else f"{1e3 * bucket.trial_seconds:.1f}",
            "" if bucket.seconds_left is None or not bucket.left else duration(bucket.seconds_left),
        )
    console.print(table)
    if len(status.buckets) > MAX_ROWS:
        console.print(f"... and {len(status.buckets) - MAX_ROWS} more programs")
    for reason, count in status.failures[:5]:
        console.print(f"failed: {count:,} x {shorten(reason)}")


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The paired differences, a line per configuration and metric, and the trials without a partner."""
    table, fields = comparison.table, comparison.fields
    console.print(f"A: {comparison.names[0]}\nB: {comparison.names[1]}", soft_wrap=True)
    several = table["metric"].nunique() > 1
    screen = Table(box=None, pad_edge=False, header_style="bold")
    for name in (*fields, *(["metric"] if several else [])):
        screen.add_column(SHORT.get(name, name), no_wrap=True)
    heads = [
        "pairs",
        "mean A",
        "mean B",
        "B - A ± error",
        "better",
        "< 0.02 A",
        "B",
        "B - A ± error",
        "better",
    ]
    succeeds = "success_a" in table
    for head in heads if succeeds else heads[:5]:
        screen.add_column(head, justify="right", no_wrap=True)
    for record in table.head(MAX_ROWS).to_dict("records"):
        cells = [_plain(record[name]) for name in fields] + ([record["metric"]] if several else [])
        cells += [f"{record['pairs']:,}", *(f"{record[name]:.3g}" for name in ("mean_a", "mean_b"))]
        cells += [
            with_error(record["difference"], record["difference_mcse"]),
            record["better"] or record["sign"] or "=",
        ]
        if succeeds and record["metric"] == SUCCESS_METRIC:
            difference = (
                f"{100 * record['success_difference']:+.0f} ± {100 * record['success_difference_mcse']:.0f} %"
            )
            cells += [percent(record["success_a"]), percent(record["success_b"]), difference]
            cells.append(record["success_better"] or "=")
        screen.add_row(*cells)
    console.print(screen)
    if len(table) > MAX_ROWS:
        console.print(f"... and {len(table) - MAX_ROWS:,} more rows: --out FILE.csv has all")
    without = int(table["without_number"].sum())
    if without:
        console.print(f"{without:,} pairs without two finite numbers are left out of the means")
    console.print(
        f"better: the side that is better by more than {BEYOND:g} standard errors; =: neither", soft_wrap=True
    )
    for side, rows in comparison.unpaired.groupby("side"):
        names = [name for name in rows if name not in ("side", "trials")]
        parts = [
            ", ".join([*(f"{name} = {show(record[name])}" for name in names), f"{record['trials']:,} trials"])
            for record in rows.head(MAX_UNPAIRED).to_dict("records")
        ]
        more = f"; and {len(rows) - MAX_UNPAIRED:,} more configurations" if len(rows) > MAX_UNPAIRED else ""
        total = int(rows["trials"].sum())
        console.print(
            f"only in {side}, without a partner: {total:,} trials ({'; '.join(parts)}{more})", soft_wrap=True
        )
    for note in comparison.notes:
        console.print(f"note: {note}", soft_wrap=True)
