"""Paired comparisons of runs and methods."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from stores import SPEC, made_up_store

from moejax.cli import program
from moejax.sweep import compare, load

AXES = SPEC.replace("num_samples = 100\n", "") + "[grid]\nnum_samples = [100, 200]\nnum_restarts = [4, 8]\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of made-up numbers, of which the second has another size instead of 200 and 6 trials less in each cell."""
    folders = []
    for name, spec in (("a", AXES), ("b", AXES.replace("200", "300").replace("trials = 12", "trials = 6"))):
        root = tmp_path_factory.mktemp(name)
        folders.append(made_up_store(root, spec)[1])
    return folders


def paired(folder, **chosen):
    """The columns of both methods, a row for each data set."""
    table = load(folder)
    for name, value in chosen.items():
        table = table[table[name] == value]
    return table.pivot_table(
        index=["num_samples", "num_restarts", "trial"],
        columns="method",
        values="recovery_error",
        dropna=False,
    )


def test_differences_are_those_of_a_paired_t_test(runs):
    comparison = compare(runs[0], method_a="spectral", method_b="joint_em")
    assert comparison.fields == ("num_samples", "num_restarts")
    assert len(comparison.table) == 4
    for row in comparison.table.to_dict("records"):
        both = paired(runs[0], num_samples=row["num_samples"], num_restarts=row["num_restarts"])
        numbers = both.dropna()
        test = scipy.stats.ttest_rel(numbers["joint_em"], numbers["spectral"])
        assert row["difference"] / row["difference_mcse"] == pytest.approx(test.statistic)
        assert row["difference"] == pytest.approx((numbers["joint_em"] - numbers["spectral"]).mean())
        assert (row["pairs"], row["without_number"]) == (12, 12 - len(numbers))
        assert bool(row["sign"]) == (abs(test.statistic) > 2)
        assert row["better"] == {"": "", "-": "B", "+": "A"}[row["sign"]]
        won_a, won_b = (both["spectral"] < 0.02).sum(), (both["joint_em"] < 0.02).sum()
        apart = ((both["spectral"] < 0.02) != (both["joint_em"] < 0.02)).sum()
        assert row["success_difference"] == pytest.approx((won_b - won_a) / 12)
        assert row["success_difference_mcse"] == pytest.approx(np.sqrt(apart) / 12)


def test_pooled_pairs_have_the_error_of_independent_strata(runs):
    """Both numbers of restarts see the same data: their differences are summed before the variance is taken."""
    (row,) = compare(runs[0], method_a="spectral", method_b="joint_em", by=[]).table.to_dict("records")
    both = paired(runs[0]).dropna()
    differences = (both["joint_em"] - both["spectral"]).rename("difference").reset_index()
    sums = differences.groupby(["num_samples", "trial"])["difference"].sum()
    squares = sum(len(part) * part.var(ddof=1) for _, part in sums.groupby(level="num_samples"))
    assert row["difference"] == pytest.approx(differences["difference"].mean())
    assert row["difference_mcse"] == pytest.approx(np.sqrt(squares) / len(differences))


def test_the_pooled_error_is_the_spread_of_the_difference():
    """Repeat a study 3,000 times with dependent differences in two strata of different means."""
    from moejax.sweep.report.comparison import _error_of_mean

    random = np.random.default_rng(0)
    means, errors = [], []
    data, trial = np.repeat(["a", "b"], 20), np.tile(np.repeat(np.arange(10), 2), 2)
    for _ in range(3000):
        own = np.repeat(random.normal(size=20), 2) + 0.5 * random.normal(size=40)
        differences = own + np.repeat([0.0, 5.0], 20)
        means.append(differences.mean())
        errors.append(_error_of_mean(np.zeros(40, int), data, trial, differences, 1)[0])
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.05)


def test_two_runs_pair_equal_methods_and_name_the_others(runs):
    comparison = compare(*runs)
    assert comparison.fields == ("num_restarts", "method")
    # the made-up numbers depend on the place in the spec, which is the same for the common cells
    assert (comparison.table["difference"] == 0).all()
    assert (comparison.table["better"] == "").all()
    assert (comparison.table["pairs"] == 6).all()
    assert set(zip(comparison.unpaired["side"], comparison.unpaired["num_samples"], strict=True)) == {
        ("A", 100),
        ("A", 200),
        ("B", 300),
    }
    assert comparison.unpaired.groupby("side")["trials"].sum().to_dict() == {"A": 4 * 6 + 4 * 12, "B": 4 * 6}
    again = compare(*runs, method_a="joint_em", method_b="spectral", where="num_restarts == 4")
    assert again.names == (f"{runs[0]}, joint_em", f"{runs[1]}, spectral")
    assert len(again.table) == 1


def test_a_field_that_sets_the_runs_apart_is_what_is_compared(tmp_path):
    folders = []
    for name, polish in (("one", "true"), ("other", "false")):
        (tmp_path / name).mkdir()
        folders.append(made_up_store(tmp_path / name, SPEC + f"polish = {polish}\n")[1])
    comparison = compare(*folders)
    assert comparison.names == (f"{folders[0]}, polish = true", f"{folders[1]}, polish = false")
    assert comparison.unpaired.empty
    with pytest.raises(ValueError, match="--by polish: this is what A and B differ in"):
        compare(*folders, by=["polish"])
    (tmp_path / "seed").mkdir()
    seeded = made_up_store(tmp_path / "seed", SPEC + "seed = 1\n")[1]
    with pytest.raises(ValueError, match=r"seed: .* has 0, .* has 1: no two of their trials"):
        compare(folders[0], seeded)


def test_one_pair_has_no_sign(tmp_path):
    folder = made_up_store(tmp_path)[1]
    table = compare(folder, where="trial == 0").table
    assert table["sign"].tolist() == [""]
    assert np.isnan(table["difference_mcse"]).all()


def test_refusals_are_one_line(runs, tmp_path, capsys):
    a = str(runs[0])
    for arguments, words in (
        ([str(tmp_path)], "there is no such store"),
        ([a, "--metric", "recovery"], "did you mean recovery_error?"),
        ([a, "--method-a", "spectrl"], "did you mean spectral?"),
        ([a, "--method-a", "spectral", "--method-b", "spectral"], "expected another method"),
        ([a, "--by", "dimm"], "did you mean dim?"),
        ([a, "--where", "num_samples > 1000"], "none of 96 rows meets it"),
        ([a, str(runs[1]), "--where", "num_samples > 150"], "no two trials have the same data"),
        ([a, "--out", str(tmp_path / "t.txt")], "unknown format '.txt'"),
    ):
        with pytest.raises(SystemExit) as caught:
            program.main(["compare", *arguments])
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (2, 1), error
        assert words in error
    assert not list(tmp_path.iterdir())


def test_the_command_prints_writes_and_returns_the_same(runs, tmp_path, capsys):
    out = tmp_path / "table.csv"
    arguments = [
        "compare",
        *map(str, runs),
        "--metric",
        "recovery_error",
        "--metric",
        "held_out_log_likelihood",
    ]
    program.main([*arguments, "--out", str(out)])
    text = capsys.readouterr().out
    assert "only in A, without a partner: 72 trials (num_samples = 100" in text
    assert "8 rows written" in text
    program.main([*arguments, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    table = pd.read_csv(out)
    assert table["metric"].tolist() == [row["metric"] for row in rows]
    assert table["difference"].to_numpy() == pytest.approx([row["difference"] for row in rows])
