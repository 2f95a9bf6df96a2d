"""Summaries, their Monte Carlo standard errors, figures and the report."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_sweep_fake_core import write_inputs
from test_sweep_run import fake as fake  # a fixture

from moejax.console import duration
from moejax.sweep import commands
from moejax.sweep import trial as core
from moejax.sweep.execution.worker import COMPILE_EVENT
from moejax.sweep.monte_carlo import (
    mean_and_mcse,
    median_and_mcse,
    root_mean_square_and_mcse,
    success_and_mcse,
)
from moejax.sweep.report.figures import make_figures, write_figures
from moejax.sweep.report.summary import ESTIMATES, percent, summarise, swept_fields, with_error
from moejax.sweep.report.terminal import print_summary
from moejax.sweep.spec.precision import PrecisionRule
from moejax.sweep.store.read import FIELD_COLUMNS


@pytest.mark.parametrize("trials", [25, 200])
def test_monte_carlo_standard_errors_are_the_spread_of_the_estimates(trials):
    """Repeat a study 4,000 times: the mean reported error is the spread of the estimates."""
    values = np.random.default_rng(0).gamma(2.0, size=(4000, trials))
    tolerances = {mean_and_mcse: 0.05, median_and_mcse: 2.5 / trials + 0.05, root_mean_square_and_mcse: 0.08}
    for estimator, tolerance in tolerances.items():
        estimates, errors = estimator(values)
        assert np.sqrt((errors**2).mean()) == pytest.approx(estimates.std(), rel=tolerance), estimator
    shares, errors = success_and_mcse(values * 0.01)
    assert np.sqrt((errors**2).mean()) == pytest.approx(shares.std(), rel=0.05)


def test_estimates_equal_closed_forms():
    values = np.array([[0.0, 0.01, 0.03, 0.04, np.nan]])
    good = values[:, :4]
    assert mean_and_mcse(good)[1][0] == pytest.approx(good.std(ddof=1) / 2)
    assert median_and_mcse(good)[0][0] == 0.02
    assert root_mean_square_and_mcse(good)[0][0] == pytest.approx(np.sqrt((good**2).mean()))
    share, error = success_and_mcse(values)
    assert (share[0], error[0]) == (0.4, pytest.approx(np.sqrt(0.4 * 0.6 / 5)))
    assert np.isnan(mean_and_mcse(good[:, :1])[1][0])


def test_maritz_jarrett_is_the_bootstrap_error_of_a_median():
    random = np.random.default_rng(1)
    values = random.normal(size=(1, 41))
    medians = np.median(random.choice(values[0], size=(40_000, 41)), axis=1)
    assert median_and_mcse(values)[1][0] == pytest.approx(medians.std(), rel=0.02)


def test_stopping_rule_looks_only_at_whole_rounds():
    rule = PrecisionRule("recovery_error", 0.1, "mean", 10, 100)
    assert rule.looks == (10, 20, 40, 80, 100)
    draws = np.random.default_rng(3).normal(size=100)
    target, reached = rule.target_after(draws)
    assert (target, reached) == (100, bool(draws.std(ddof=1) / 10 <= 0.1))
    assert rule.target_after(draws[:39]) == (40, False)
    assert rule.target_after(0.001 * draws[:10]) == (10, True)
    assert rule.target_after(np.full(100, np.nan)) == (100, False)
    assert PrecisionRule("recovery_error", 0.1, "mean", 30, 30).looks == (30,)


@pytest.mark.parametrize(
    ("value", "mcse", "text"),
    [
        (0.01234, 0.00042, "0.01234 ± 0.00042"),
        (0.5, 0.013, "0.500 ± 0.013"),
        (12.3, 2.1, "12.3 ± 2.1"),
        (0.000123, 0.0000045, "(1.230 ± 0.045)e-4"),
        (float("nan"), 1.0, "—"),
        (0.25, float("nan"), "0.25"),
        (1.234e9, 5.6e6, "(1.2340 ± 0.0056)e9"),
        (0.5, 3e300, "(0.0 ± 3.0)e300"),
        (-5e-324, 5e-324, "-4.9e-324 ± 4.9e-324"),
        (1e-20, 1e-22, "(1.000 ± 0.010)e-20"),
    ],
)
def test_numbers_are_shown_with_the_digits_their_error_allows(value, mcse, text):
    assert with_error(value, mcse) == text


def test_durations():
    assert [duration(s) for s in (float("nan"), float("inf"))] == ["?", "?"]
    assert [percent(share) for share in (0.125, float("nan"))] == ["12%", "—"]
    assert [duration(s) for s in (0.04, 9.96, 59.4, 61, 3700)] == [
        "0.0 s",
        "10.0 s",
        "59 s",
        "1 min 1 s",
        "1 h 1 min",
    ]


@pytest.fixture
def run_folder(fake, tmp_path):
    """A small sweep with a refused cell, and with cells that a later spec left unfinished."""
    toml, plugin = fake
    commands.sweep(
        toml, out=tmp_path / "run", plugin=[plugin], workers=1, quiet=True, set=["activation=refuses"]
    )
    return tmp_path / "run"


def test_summary_has_a_row_for_every_cell_failed_ones_too(run_folder):
    summary = summarise(run_folder)
    assert len(summary) == 12 * len(core.METRICS)
    assert not summary.duplicated([*FIELD_COLUMNS[:5], "method", "metric"]).any()
    assert {f"{name}_mcse" for name in ESTIMATES} <= set(summary.columns)
    recovery = summary[summary["metric"] == "recovery_error"].set_index("noise_std")
    assert (recovery.loc[0.5, "failed"] == 30).all()
    assert recovery.loc[0.5, "median"].isna().all()
    assert (recovery.loc[0.5, "success_rate"] == 0).all()
    assert recovery.loc[0.1, "median"].notna().all()
    assert (recovery["missing"] == 0).all()
    assert swept_fields(summary) == ["noise_std", "num_samples"]


@pytest.mark.parametrize("width", [80, 200])
def test_a_narrow_summary_cuts_no_number(run_folder, width):
    summary = summarise(run_folder)
    wide = summary.assign(
        expert_correlation=summary["noise_std"] / 2,
        input_distribution=["gaussian_mixture", "student_t"] * (len(summary) // 2),
    )
    text = io.StringIO()
    print_summary(Console(file=text, width=width), wide)
    shown = text.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for record in wide[wide["metric"] == "recovery_error"].to_dict("records"):
        assert with_error(record["median"], record["median_mcse"]) in shown
        assert str(record["expert_correlation"]) in shown


class Page(HTMLParser):
    """The tags of a page, checked to be closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_report_is_one_sound_page(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("moejax.sweep.report.figures.write_figures", write_figures)  # the real one again
    result = commands.report(run_folder)
    assert "report.html" in capsys.readouterr().out
    assert result["written"][-1].endswith("report.html")
    text = (run_folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.stack == []
    assert page.counts["img"] == 2
    assert not re.search(r'(src|href)="(?!data:)', re.sub("<script>.*?</script>", "", text, flags=re.DOTALL))
    for words in (
        "12 cells, 360 trials, 180 failed, 0 missing",
        "Failed and missing",
        "--set activation=refuses",
    ):
        assert words in text
    assert not re.search(r">[^<]*\bnan\b[^<]*</td>", text)


def table_of(**axes: list) -> pd.DataFrame:
    """A summary as `summarise` makes it, with smooth errors."""
    grid = pd.MultiIndex.from_product([*axes.values(), ["spectral", "joint_em"]], names=[*axes, "method"])
    table = grid.to_frame(index=False)
    for name in FIELD_COLUMNS:
        if name not in table:
            table[name] = None if name == "order" else 1
    size = table.get("num_samples", pd.Series(100, index=table.index)).astype(float)
    error = np.where(table["method"] == "spectral", 30.0, 2.0) / size
    return table.assign(
        metric="recovery_error", planned=10, trials=10, failed=0, missing=0, ended="all trials",
        median=error, median_mcse=0.1 * error, success_rate=(error < 0.02) * 1.0, success_rate_mcse=0.05,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("axes", "kinds"),
    [
        ({"num_samples": [100, 1000, 10000]}, ["lines", "lines"]),
        (
            {"activation": ["linear", "relu", "abs"], "noise_std": [0.1, 0.5], "num_samples": [100, 1000]},
            ["lines", "lines"],
        ),
        ({"dim": [4, 8, 16], "num_samples": [100, 400, 1000]}, ["heatmap", "heatmap", "lines", "lines"]),
        ({"activation": ["linear", "relu"]}, ["lines", "lines"]),
        ({}, ["lines", "lines"]),
        (
            {"num_samples": [100, 200], "dim": [3, 4], "num_experts": [2, 3], "polish": [True, False]},
            ["lines", "lines", "lines", "lines"],
        ),
    ],
)
def test_figures_follow_what_was_swept(axes, kinds, tmp_path):
    figures = make_figures(table_of(**axes))
    assert [re.search("lines|heatmap", named.name).group() for named in figures] == kinds
    written = write_figures(figures, tmp_path)
    assert len(written) == len(set(written)) == len(kinds) + 1
    image = matplotlib.image.imread(tmp_path / "figure.png")
    assert image.shape[0] >= 500
    assert image[..., :3].std() > 0.02


def test_the_quickstart_figure_has_panels_lines_bars_and_a_slope():
    table = table_of(
        activation=["linear", "relu", "sigmoid"], noise_std=[0.1, 0.3], num_samples=[1000, 4000, 16000]
    )
    figure = make_figures(table)[0].figure
    assert len(figure.axes) == 6
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert len(axis.containers) == 2  # an errorbar for each method
        slopes = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert len(slopes) == 1
        x, y = slopes[0].get_data()
        assert np.diff(np.log(y))[0] == pytest.approx(-np.diff(np.log(x))[0])
    assert figure.get_supxlabel() == "number of samples n"
    assert "median recovery error" in figure.get_supylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "spectral",
        "joint_em",
        "slope 1/n",
    ]


def test_a_compilation_is_named_as_jax_names_it():
    """The event that is counted is the one that JAX sends (and not one that newer versions renamed)."""
    import jax

    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: events.append(event))
    jax.jit(lambda x: x * 3.25 + 1.5)(np.float32(2.0))
    assert COMPILE_EVENT in events


def test_a_folder_without_a_sweep_is_one_line(tmp_path):
    for command in (commands.status, commands.report):
        with pytest.raises(OSError, match="there is no such store"):
            command(tmp_path)
    assert write_inputs(tmp_path)
