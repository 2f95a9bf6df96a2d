"""Parts and pivots of the table of trials, in files and in the report."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from stores import SPEC, made_up_store

from moejax.cli import program
from moejax.sweep import export_table, load
from moejax.sweep.report.summary import summarise

AXES = SPEC.replace("num_samples = 100\n", "") + "[grid]\nnum_samples = [100, 200]\nnoise_std = [0.1, 0.5]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_store(tmp_path_factory.mktemp("run"), AXES)[1]


@pytest.mark.parametrize(("value", "statistic"), [("recovery_error", "median"), ("mean:noise_error", "mean")])
def test_a_pivot_has_the_statistics_of_pooled_trials(run, tmp_path, value, statistic):
    file = tmp_path / "pivot.csv"
    assert export_table(run, file, pivot=("num_samples", "method,noise_std", value)) == 2
    pivot, table = pd.read_csv(file).set_index("num_samples"), load(run)
    assert list(pivot)[:2] == ["spectral, noise_std=0.1", "spectral, noise_std=0.1_mcse"]
    metric = value.rpartition(":")[2]
    for keys, trials in table.groupby(["num_samples", "method", "noise_std"]):
        values = trials[metric].dropna()
        column = f"{keys[1]}, noise_std={keys[2]}"
        assert pivot.loc[keys[0], column] == pytest.approx(values.agg(statistic))
        if statistic == "mean":
            assert pivot.loc[keys[0], f"{column}_mcse"] == pytest.approx(values.sem())
        else:  # an approximation of the same weights
            error = scipy.stats.mstats.mjci(values.to_numpy(), [0.5])[0]
            assert pivot.loc[keys[0], f"{column}_mcse"] == pytest.approx(error, rel=0.5)


def test_shares_and_counts(run, tmp_path):
    table, file = load(run), tmp_path / "pivot.csv"
    export_table(run, file, pivot=("noise_std", "method", "success_rate"))
    shares = pd.read_csv(file).set_index("noise_std")
    share = (table["recovery_error"] < 0.02).groupby([table["noise_std"], table["method"]]).mean()
    assert shares.loc[0.5, "joint_em"] == pytest.approx(share[0.5, "joint_em"])
    export_table(run, file, pivot=("noise_std", "method", "trials"), where="status == 0 and trial < 7")
    counts = pd.read_csv(file)
    assert list(counts) == ["noise_std", "spectral", "joint_em"]
    # of seven trials one failed, and there are two sizes
    assert (counts[["spectral", "joint_em"]] == 12).all(axis=None)


def test_a_part_of_the_table(run, tmp_path):
    condition = "noise_std < 0.2 and method == 'spectral' and recovery_error < 0.05"
    rows = export_table(run, tmp_path / "part.parquet", where=condition)
    part, table = pd.read_parquet(tmp_path / "part.parquet"), load(run)
    chosen = (table["noise_std"] == 0.1) & (table["method"] == "spectral") & (table["recovery_error"] < 0.05)
    assert rows == len(part) == chosen.sum()
    np.testing.assert_array_equal(part["recovery_error"], table.loc[chosen, "recovery_error"])


def test_a_report_on_a_part_leaves_that_on_all(run, capsys, monkeypatch):
    monkeypatch.setattr("moejax.sweep.report.figures.make_figures", lambda summary: [])  # they take seconds
    program.main(["report", str(run), "--quiet"])
    whole = (run / "report.html").read_bytes()
    arguments = ["--where", "noise_std == 0.5", "--pivot", "num_samples", "method", "mean:gating_error"]
    program.main(["report", str(run), *arguments])
    text = capsys.readouterr().out
    assert "mean of gating_error by num_samples and method" in text
    assert (run / "report.html").read_bytes() == whole
    page = (run / "selection" / "report.html").read_text()
    assert "Only cells with <code>noise_std == 0.5</code>" in page
    assert "4 cells, 48 trials" in page
    assert "Mean of gating_error by num_samples and method" in page
    summary = pd.read_csv(run / "selection" / "summary.csv")
    assert (summary["noise_std"] == 0.5).all()
    expected = summarise(run)
    expected = expected[expected["noise_std"] == 0.5]
    np.testing.assert_allclose(summary["median"], expected["median"])
    assert pd.read_csv(run / "selection" / "pivot.csv").shape == (2, 5)
    program.main(["report", str(run), "--json", "--out", str(run / "elsewhere")])
    written = json.loads(capsys.readouterr().out)["written"]
    assert written[-1] == str(run / "elsewhere" / "report.html")


def test_refusals_are_one_line(run, tmp_path, capsys):
    file = str(tmp_path / "table.csv")
    for arguments, words in (
        (["export", str(run), file, "--where", "noise < 1"], "noise is no column; did you mean noise_std"),
        (["report", str(run), "--where", "recovery_error < 1"], "recovery_error is no column"),
        (["report", str(run), "--where", "noise_std > 1"], "none of 8 rows meets it"),
        (
            ["export", str(run), file, "--pivot", "num_samples", "methd", "trials"],
            "COLUMNS: methd is no field",
        ),
        (["export", str(run), file, "--pivot", "method", "method", "trials"], "method: given twice"),
        (["export", str(run), file, "--pivot", "", "method", "trials"], "ROWS: expected a field"),
        (["export", str(run), file, "--pivot", "dim", "method", "max:dim"], "max: unknown statistic"),
        (["report", str(run), "--pivot", "dim", "method", "recovery"], "did you mean recovery_error"),
        (["export", str(tmp_path), file, "--where", "dim == 4"], "there is no such store"),
    ):
        with pytest.raises(SystemExit) as caught:
            program.main(arguments)
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (2, 1), error
        assert words in error
    assert not list(tmp_path.iterdir())
