"""Charts of the report page with the numbers on hover: Vega-Lite specifications, and the program that draws them.

The program (Vega, Vega-Lite and Vega-Embed) comes from the package vl-convert-python, which holds it, and is written into the page:
nothing is fetched. Without the package the page has the tables and the pictures only.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moejax.model.metrics import SUCCESS_THRESHOLD
from moejax.pictures import COLOURS
from moejax.sweep.report.axes import LABELS, QUANTITIES, distinct_values, is_logarithmic, is_numeric
from moejax.sweep.report.figures import MAX_PANELS, x_axis_of
from moejax.sweep.report.summary import SUCCESS_METRIC, swept_fields
from moejax.sweep.spec.fields import METHOD_FIELD, show

MOST_ROWS = 20_000
"""Rows of the summary that are drawn at most."""
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"  # a name, which is not fetched
ESTIMATES = ("median", "success_rate")


@functools.cache
def program() -> str | None:
    """The program that draws the charts; None if its package is not installed."""
    try:
        import vl_convert
    except ModuleNotFoundError:
        return None
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def charts(summary: pd.DataFrame) -> list[tuple[str, dict[str, Any]]]:
    """Titles and Vega-Lite specifications: the recovery error, the success rate, and any metric by choice.

    Args:
        summary: from `moejax.sweep.report.summary.summarise`.
    """
    table = summary[summary["metric"] == SUCCESS_METRIC]
    if table.empty:
        return []
    axes = swept_fields(table)
    x_name = x_axis_of(table, axes)
    rest = sorted(
        (name for name in axes if name != x_name),
        key=lambda name: (is_numeric(table[name]), table[name].map(show).nunique()),
    )
    panels = [name for name in rest if table[name].map(show).nunique() <= MAX_PANELS][:2]
    choices = {name: _words(table, name) for name in rest if name not in panels}
    positive = bool((table["median"].dropna() > 0).all())
    found = []
    for estimate, title in (
        ("median", f"Median {QUANTITIES[SUCCESS_METRIC]}"),
        ("success_rate", QUANTITIES["success_rate"]),
    ):
        scale = {"type": "log"} if estimate == "median" and positive else {}
        scale |= {"domain": [0, 1]} if estimate == "success_rate" else {}
        if table[estimate].notna().any():
            found.append(
                (_sentence(title), _chart(table, axes, x_name, panels, choices, estimate, title, scale))
            )
    kept = summary[summary["median"].notna()]
    metrics = {"metric": [str(metric) for metric in dict.fromkeys(kept["metric"])]}
    if len(metrics["metric"]) > 1:
        found.append(
            (
                "Any metric (median)",
                _chart(kept, axes, x_name, panels, choices | metrics, "median", "median", {"zero": False}),
            )
        )
    return found


def _chart(
    table: pd.DataFrame,
    axes: Sequence[str],
    x_name: str,
    panels: Sequence[str],
    choices: Mapping[str, Sequence[str]],
    estimate: str,
    title: str,
    scale: Mapping[str, Any],
) -> dict[str, Any]:
    """A line per method with bars of one standard error; panels by two fields, a choice of one value of the others."""
    numeric = x_name in table and is_numeric(table[x_name])
    logarithmic = numeric and is_logarithmic(table[x_name], x_name)
    x = {
        "field": _field(x_name),
        "type": "quantitative" if numeric else "nominal",
        "title": LABELS.get(x_name, x_name),
        "scale": ({"type": "log"} if logarithmic else {"zero": False}) | {"nice": False, "padding": 25}
        if numeric
        else {},
        "sort": None,
    }
    if numeric:
        x["axis"] = {
            "values": [float(value) for value in distinct_values(table[x_name])],
            "format": "~s",
            "grid": False,
        }
    y = {"field": "value", "type": "quantitative", "title": title, "scale": dict(scale)}
    colour = {
        "field": METHOD_FIELD,
        "type": "nominal",
        "sort": None,
        "scale": {"range": list(COLOURS)},
    }
    shown = [*axes, METHOD_FIELD, *(["metric"] if "metric" in choices else [])]
    tooltip = [{"field": _field(name), "type": "nominal", "title": name} for name in shown]
    tooltip += [
        {"field": name, "type": "quantitative", "title": words, "format": ".4~g"}
        for name, words in (("value", estimate.replace("_", " ")), ("error", "± standard error"))
    ]
    tooltip += [
        {"field": name, "type": "quantitative", "title": name} for name in ("trials", "failed", "missing")
    ]
    faded = {"condition": {"param": "picked", "value": 1}, "value": 0.12}
    position = {"x": x, "y": y, "color": colour, "opacity": faded}
    layers = [
        *([{"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": position}] if numeric else []),
        {
            "mark": {"type": "rule"},
            "encoding": position | {"y": y | {"field": "low"}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 55},
            "params": [
                {"name": "picked", "select": {"type": "point", "fields": [METHOD_FIELD]}, "bind": "legend"}
            ],
            "encoding": position | {"tooltip": tooltip},
        },
    ]
    params = [
        {
            "name": f"choice_{index}",
            "value": values[0],
            "bind": {"input": "select", "options": list(values), "name": f"{name}: "},
        }
        for index, (name, values) in enumerate(choices.items())
    ]
    filters = [
        {"filter": f"datum['{_field(name)}'] === choice_{index}"} for index, name in enumerate(choices)
    ]
    inner: dict[str, Any] = {"layer": layers, "width": 300 if panels else 620, "height": 230}
    common = {
        "$schema": SCHEMA,
        "data": {"values": _values(table.head(MOST_ROWS), shown, x_name, estimate)},
        "transform": filters,
        "params": params,
        "config": {"font": "system-ui, sans-serif"},
    }
    if not panels:
        return common | inner
    facet = {
        side: {
            "field": _field(name),
            "type": "nominal",
            "title": LABELS.get(name, name),
            "sort": _words(table, name),
        }
        for side, name in zip(("column", "row"), panels, strict=False)
    }
    return common | {"facet": facet, "spec": inner}


def _values(table: pd.DataFrame, shown: Sequence[str], x_name: str, estimate: str) -> list[dict[str, Any]]:
    """The rows of a chart; numbers that are not finite are left out."""
    rows = []
    for record in table.to_dict("records"):
        value, error = float(record[estimate]), float(record[f"{estimate}_mcse"])
        if not math.isfinite(value):
            continue
        row: dict[str, Any] = {_field(name): _word(record[name]) for name in shown}
        if x_name in record and is_numeric(pd.Series([record[x_name]])):
            row[_field(x_name)] = float(record[x_name])
        error = error if math.isfinite(error) else 0.0
        # on a logarithmic axis a bar cannot reach zero
        low = max(value - error, 0.1 * value) if value > 0 and estimate != "success_rate" else value - error
        row |= {"value": value, "error": error, "low": low, "high": value + error}
        rows.append(row | {name: int(record[name]) for name in ("trials", "failed", "missing")})
    return rows


def _field(name: str) -> str:
    """A column's name in the data of a chart: "value" and the like are the estimate's own."""
    return f"field_{name}" if name not in (METHOD_FIELD, "metric") else name


def _words(table: pd.DataFrame, name: str) -> list[str]:
    return [_word(value) for value in distinct_values(table[name])]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else show(value)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def charts_html(summary: pd.DataFrame) -> str:
    """The section of the page; one line on the missing package if it is not installed, and nothing without numbers."""
    import html

    found = charts(summary)
    if not found:
        return ""
    script = program()
    if script is None:
        return (
            "<p>Charts with the numbers on hover need the package vl-convert-python "
            "(<code>pip install 'moejax[report]'</code>); then make the report again.</p>"
        )
    parts = [
        "<h2>Charts</h2><p>Point at a mark for its numbers; click on a method in the legend to see it alone. "
        f"Success is a recovery error below {SUCCESS_THRESHOLD}.</p>"
    ]
    for index, (title, _) in enumerate(found):
        parts.append(f"<h3>{html.escape(title)}</h3><div class=chart id=chart{index}></div>")
    # no sequence of the data can end the script
    data = json.dumps([spec for _, spec in found], allow_nan=False).replace("<", "\\u003c")
    parts.append(
        f"<script>{script}</script><script>{data}"
        '.forEach((spec, index) => vegaEmbed("#chart" + index, spec, '
        '{renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}}));</script>'
    )
    return "".join(parts)
