"""The report page: charts with numbers on hover, tables to sort and filter, and nothing from another address."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import vl_convert
from stores import SPEC, made_up_store

from moejax.sweep import commands
from moejax.sweep.report import charts
from moejax.sweep.report.summary import summarise

AXES = SPEC.replace("num_samples = 100\n", "") + (
    '[grid]\nnum_samples = [100, 200, 400]\nactivation = ["linear", "relu"]\nnoise_std = [0.1, 0.5]\n'
    "gating_norm = [1.0, 2.0]\n"
)


class Cells(HTMLParser):
    """Attributes of all tags, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def without_pictures():
    """Pictures take seconds, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moejax.sweep.report.figures.make_figures", lambda summary: [])
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_pictures):
    folder = made_up_store(tmp_path_factory.mktemp("run"), AXES)[1]
    commands.report(folder, quiet=True)
    return folder


def parsed(run):
    page = Cells()
    page.feed((run / "report.html").read_text())
    return page


def test_the_page_fetches_nothing(run):
    page = parsed(run)
    for tag, marks in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert "href" not in marks
        assert marks.get("src", "data:").startswith("data:")
    (policy,) = [marks["content"] for tag, marks in page.tags if "http-equiv" in marks]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert not re.search(r"https?:|\*", policy)
    assert "url(" not in (run / "report.html").read_text().partition("</style>")[0]


def test_cells_of_tables_have_their_exact_numbers(run):
    summary = summarise(run)
    estimates = {round(value, 12) for name in ("median", "success_rate") for value in summary[name].dropna()}
    marked = [marks for tag, marks in parsed(run).tags if tag == "td" and "data-value" in marks]
    assert len(marked) > 2 * 48
    shown = {round(float(marks["data-value"]), 12) for marks in marked}
    assert estimates <= shown
    assert all(re.match(r"[-\d.e+]+( ± [\d.e+-]+)?$", marks["title"]) for marks in marked)
    assert sum(marks.get("class") == "sortable" for _, marks in parsed(run).tags) == 3


def test_the_charts_are_in_the_page_and_draw_every_cell(run):
    """Vega-Lite itself compiles the specifications; a mark's description has the numbers that are shown on hover."""
    page = parsed(run)
    (data,) = [script for script in page.scripts if script.startswith("[{")]
    specs, _ = json.JSONDecoder().raw_decode(data)
    summary = summarise(run)
    assert specs == [spec for _, spec in charts.charts(summary)]
    recovery = summary[summary["metric"] == "recovery_error"]
    assert len(specs[0]["data"]["values"]) == recovery["median"].notna().sum() == 48
    svg = vl_convert.vegalite_to_svg(json.dumps(specs[0]))
    marks = re.findall(r'<path aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="point"', svg)
    assert len(marks) == 24  # of the chosen gating_norm = 1
    chosen = recovery[recovery["gating_norm"] == 1.0]
    medians = sorted(float(re.search(r"; median: ([\d.e-]+)", text)[1]) for text in marks)
    np.testing.assert_allclose(medians, np.sort(chosen["median"]), rtol=1e-3)
    for spec in specs[1:]:
        assert "<svg" in vl_convert.vegalite_to_svg(json.dumps(spec))


def test_values_end_no_script_and_are_no_code(tmp_path, without_pictures):
    evil = "</script><img src=http://example.org>"
    spec = SPEC.replace("made-up", "<img src=http:example.org>") + f"# {evil}\n"
    folder = made_up_store(tmp_path, spec)[1]
    commands.report(folder, quiet=True)
    page = parsed(folder)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert [tag for tag, _ in page.tags].count("img") == 0
    table = summarise(folder).assign(method=evil)
    assert "<img" not in charts.charts_html(table).rpartition("<script>")[2]


def test_a_run_of_one_cell_or_without_numbers_has_charts_or_none(tmp_path):
    folder = made_up_store(tmp_path, SPEC)[1]
    found = charts.charts(summarise(folder))
    assert [title for title, _ in found][-1] == "Any metric (median)"
    for _, spec in found:
        assert "<svg" in vl_convert.vegalite_to_svg(json.dumps(spec))
    empty = summarise(folder).assign(median=np.nan, success_rate=np.nan)
    assert charts.charts(empty) == []
    assert charts.charts_html(empty) == ""


def test_without_the_package_the_page_names_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    charts.program.cache_clear()
    try:
        commands.report(run, quiet=True)
    finally:
        charts.program.cache_clear()
    text = (run / "report.html").read_text()
    assert "pip install &#x27;moejax[report]&#x27;" in text or "pip install 'moejax[report]'" in text
    assert len(text) < 800_000
    assert [tag for tag, _ in parsed(run).tags].count("script") == 1
