"""The report of a run folder: one self-contained HTML file with figures, tables and provenance."""

from __future__ import annotations

import base64
import datetime
import html
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moejax.console import duration, printable, shorten
from moejax.files import write_whole
from moejax.model.metrics import SUCCESS_THRESHOLD
from moejax.sweep.report.charts import charts_html
from moejax.sweep.report.figures import NamedFigure, picture_name
from moejax.sweep.report.page_script import TABLE_SCRIPT
from moejax.sweep.report.status import read_status
from moejax.sweep.report.summary import (
    ESTIMATES,
    SUCCESS_METRIC,
    percent,
    shown_pivot,
    swept_fields,
    with_error,
)
from moejax.sweep.spec.fields import METHOD_FIELD, show
from moejax.sweep.spec.precision import PrecisionRule
from moejax.sweep.store.read import FIELD_COLUMNS, load_runs
from moejax.sweep.store.schema import StoreError

REPORT_NAME = "report.html"
MAX_TABLE_ROWS = 2000
"""Rows of a table in the page; all rows are in summary.csv."""
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
"""The browser fetches nothing from any address. Vega compiles its expressions, which needs 'unsafe-eval'."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1a1a1a; background: #fff;
       margin: 2rem auto; max-width: 72rem; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
thead th { position: sticky; top: 0; background: #fff; vertical-align: top; cursor: pointer; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
th select { font: inherit; font-weight: normal; max-width: 9rem; } p.bar { margin: .8rem 0 .3rem; color: #444; }
p.bar input { font: inherit; padding: .15rem .4rem; width: 16rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
div.scroll { max-height: 80vh; } .chart { overflow-x: auto; } .vega-bind { margin-right: 1rem; }
p.lead { color: #444; margin-top: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #888; } td.text, th.text { text-align: left; white-space: normal; }
tr.bad td { background: #fff3df; } figure { margin: 1.2rem 0; } figcaption { color: #444; font-size: 13.5px; }
img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def write_report(
    folder: Path,
    summary: pd.DataFrame,
    figures: list[NamedFigure],
    *,
    out: Path | None = None,
    where: str = "",
    pivoted: tuple[str, pd.DataFrame] | None = None,
) -> Path:
    """Write report.html into a run folder; returns its path.

    Args:
        folder: the run folder.
        summary: from `moejax.sweep.report.summary.summarise`.
        figures: figures whose PNGs are already in the folder of the page.
        out: the folder of the page; None: the run folder.
        where: the condition that the cells of the summary meet.
        pivoted: title and table of a pivot.

    Raises:
        StoreError: the file cannot be written.
    """
    runs, out = load_runs(folder), folder if out is None else out
    spec = json.loads(runs[-1]["spec"]) if runs else {"name": folder.name, "precision": None, "seed": 0}
    recovery = summary[summary["metric"] == SUCCESS_METRIC]
    axes = swept_fields(recovery)
    page = "".join(
        [
            f"<h1>{_text(spec['name'])}</h1>",
            f"<p class=lead>{_text(_lead(recovery, spec))}</p>",
            *([f"<p>Only cells with <code>{_text(where)}</code>.</p>"] if where else []),
            *(_figure(out / picture_name(figures, i), named.caption) for i, named in enumerate(figures)),
            charts_html(summary),
            "<h2>Recovery error and success</h2>",
            "<p>Median of the recovery error 1 − min cos over trials, ± its Monte Carlo standard error, and "
            f"the share of trials with an error below {SUCCESS_THRESHOLD} (a trial without a number is none). Shaded: some "
            "trials failed or are missing.</p>",
            _method_table(recovery, axes),
            *([] if pivoted is None else _pivot(*pivoted)),
            "<h2>Failed and missing</h2>",
            _trouble(recovery, axes, read_status(folder).failures if not where else []),
            "<h2>All metrics</h2>",
            "<p>Every estimate ± its Monte Carlo standard error (Morris, White, Crowther 2019; medians: "
            "Maritz, Jarrett 1978). The same, for all cells and fields, is in <code>summary.csv</code>.</p>",
            _metric_table(summary, axes),
            "<h2>Provenance</h2>",
            _provenance(runs),
        ]
    )
    path = out / REPORT_NAME
    document = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{_text(spec['name'])} – moejax sweep</title><style>{STYLE}</style></head>"
        f"<body>{page}<script>{TABLE_SCRIPT}</script></body></html>"
    )
    try:
        write_whole(path, lambda file: file.write_text(document, encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def _lead(recovery: pd.DataFrame, spec: dict[str, Any]) -> str:
    trials, failed, missing = (int(recovery[name].sum()) for name in ("trials", "failed", "missing"))
    text = f"{len(recovery):,} cells, {trials:,} trials, {failed:,} failed, {missing:,} missing; "
    text += f"seed {spec['seed']}."
    if spec["precision"]:
        rule = PrecisionRule(**spec["precision"])
        ended = recovery["ended"].value_counts()
        text += (
            f" Trials were added until the Monte Carlo standard error of the {rule.statistic} of "
            f"{rule.metric} was at most {rule.mcse:g}, up to {rule.max_trials:,} trials: "
            + ", ".join(f"{count:,} cells {reason}" for reason, count in ended.items())
            + "."
        )
    return text


def _figure(picture: Path, caption: str) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _method_table(recovery: pd.DataFrame, axes: Sequence[str]) -> str:
    methods = list(dict.fromkeys(recovery[METHOD_FIELD]))
    rows: dict[tuple[str, ...], dict[str, Mapping[Hashable, Any]]] = {}
    for record in recovery.to_dict("records"):
        setting = tuple(_plain(record[name]) for name in axes)
        rows.setdefault(setting, {})[record[METHOD_FIELD]] = record
    body = []
    for setting, cells in rows.items():
        entries: list[Entry] = list(setting)
        for method in methods:
            cell = cells.get(method)
            entries += (
                ["", ""]
                if cell is None
                else [
                    _estimate(cell, "median"),
                    _estimate(cell, "success_rate", as_percent=True),
                ]
            )
        bad = any(cell["failed"] or cell["missing"] for cell in cells.values())
        body.append((bad, entries))
    heads = [*axes, *(head for method in methods for head in (method, "success"))]
    return _table(heads, body, texts=len(axes))


def _estimate(record: Mapping[Hashable, Any], name: str, *, as_percent: bool = False) -> Entry:
    value, mcse = float(record[name]), float(record[f"{name}_mcse"])
    return percent(value) if as_percent else with_error(value, mcse), value, mcse


def _trouble(recovery: pd.DataFrame, axes: Sequence[str], failures: Sequence[tuple[str, int]]) -> str:
    bad = recovery[(recovery["failed"] > 0) | (recovery["missing"] > 0)]
    if bad.empty:
        return "<p>None: every planned trial was run, and none failed.</p>"
    heads = [*axes, METHOD_FIELD, "planned", "run", "failed", "missing"]
    body = [
        (
            False,
            [
                *(_plain(record[name]) for name in (*axes, METHOD_FIELD)),
                *(f"{record[name]:,}" for name in ("planned", "trials", "failed", "missing")),
            ],
        )
        for record in bad.to_dict("records")
    ]
    reasons = "".join(f"<li>{count:,} × {_text(shorten(reason))}</li>" for reason, count in failures)
    return f"<ul>{reasons}</ul>" + _table(heads, body, texts=len(axes) + 1)


def _pivot(title: str, table: pd.DataFrame) -> list[str]:
    shown = shown_pivot(table)
    body = [(False, list(row)) for row in shown.itertuples(index=False)]
    texts = sum(name in FIELD_COLUMNS or name == METHOD_FIELD for name in shown)
    return [
        f"<h2>{_text(title[0].upper() + title[1:])}</h2>",
        _table([str(name) for name in shown], body, texts=texts),
    ]


def _metric_table(summary: pd.DataFrame, axes: Sequence[str]) -> str:
    heads = [
        *axes,
        METHOD_FIELD,
        "metric",
        "trials",
        *(name.replace("_", " ") for name in ESTIMATES),
        "ended",
    ]
    body = []
    for record in summary.head(MAX_TABLE_ROWS).to_dict("records"):
        estimates = (_estimate(record, name) for name in ESTIMATES)
        names = [_plain(record[name]) for name in (*axes, METHOD_FIELD)]
        body.append((False, [*names, record["metric"], f"{record['trials']:,}", *estimates, record["ended"]]))
    return _table(heads, body, texts=len(axes) + 2, total=len(summary))


Entry = str | tuple[str, float, float]
"""The text of a cell of a table; or the text of an estimate with its value and standard error, for sorting and for hover."""


def _table(
    heads: Sequence[str],
    body: Sequence[tuple[bool, Sequence[Entry]]],
    texts: int,
    total: int | None = None,
    *,
    plain: bool = False,
) -> str:
    def row(tag: str, entries: Iterable[Entry], shade: bool = False) -> str:
        marked = (_cell(tag, entry, index < texts) for index, entry in enumerate(entries))
        return f"<tr{' class=bad' if shade else ''}>{''.join(marked)}</tr>"

    rows = "".join(row("td", entries, shade) for shade, entries in body[:MAX_TABLE_ROWS])
    total = len(body) if total is None else total
    more = (
        f"<p>{total - MAX_TABLE_ROWS:,} more rows are in summary.csv.</p>" if total > MAX_TABLE_ROWS else ""
    )
    sortable = " class=sortable" if len(body) > 1 and not plain else ""
    head = row("th", heads)
    return (
        f"<div class=scroll><table{sortable}><thead>{head}</thead><tbody>{rows}</tbody></table></div>{more}"
    )


def _cell(tag: str, entry: Entry, is_text: bool) -> str:
    marks = " class=text" if is_text else ""
    if isinstance(entry, tuple):
        text, value, mcse = entry
        if math.isfinite(value):
            exact = f"{value:.7g}" + (f" ± {mcse:.3g}" if math.isfinite(mcse) else "")
            marks += f' data-value="{value!r}" title="{exact}"'
        entry = text
    return f"<{tag}{marks}>{_text(entry)}</{tag}>"


def _provenance(runs: Sequence[dict[str, Any]]) -> str:
    body = []
    for run in runs:
        git = run["git"]
        code = "" if git is None else git["commit"][:12] + (" with changes" if git["dirty"] else "")
        entries = [
            _date(run["started"]),
            f"{run['trials']:,}",
            "stopped early" if run["wall_seconds"] is None else duration(run["wall_seconds"]),
            "" if run["compile_seconds"] is None else duration(run["compile_seconds"]),
            run["workers"],
            f"{run['devices'] or '—'}, {run['precision']}",
            f"{run['host']}, {run.get('cores')} cores, {run['processor']}",
            code,
            ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        ]
        body.append((False, entries))
    heads = ["started", "trials", "wall", "compiling", "workers", "device", "host", "commit", "versions"]
    parts = [_table(heads, body, texts=len(heads), plain=True)]
    if runs:
        last = runs[-1]
        changes = "".join(f"\n# --set {override}" for override in last["overrides"])
        parts.append(f"<p>Spec of the last run ({_text(last['spec_file'])}):</p>")
        parts.append(f"<pre>{_text(last['spec_text'].rstrip() + changes)}</pre>")
        for plugin in last["plugins"]:
            parts.append(f"<p>Plugin {_text(plugin['path'])}:</p><pre>{_text(plugin['source'])}</pre>")
    return "".join(parts)


def _date(seconds: float) -> str:
    """Unix time as a date; the clock may have been wrong by any amount."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "—"


def _plain(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return value if isinstance(value, str) else show(value)


def _text(value: str) -> str:
    return html.escape(printable(value), quote=True)
