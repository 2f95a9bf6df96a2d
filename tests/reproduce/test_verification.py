"""`moejax reproduce --verify`: committed numbers hold at another rounding, and one that does not is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_reproduce import make_root

from moejax.cli import program
from moejax.reproduce.claims import Number
from moejax.reproduce.experiment import Experiment, ExperimentFile
from moejax.reproduce.results_folder import write_table
from moejax.reproduce.runner import reproduce
from moejax.reproduce.verification import check_table, chosen
from moejax.reproduce.verify import NotReproducedError, verify

ROOT = Path(__file__).parents[2]
KEYS = ("size", "trial")
TRIALS = 40


def summary(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"value": [table["recovery_error"].mean()], "error": [table["recovery_error"].sem()]})


NUMBERS = {
    "median": Number("size == 100"),
    "mean": Number("size == 200", statistic="mean"),
    "share": Number("size == 200", statistic="success_rate"),
    "all": Number("size == 100", "share", "success_rate"),
    "largest": Number("", statistic="maximum"),
    "time": Number("", "seconds"),
    "summary": Number("", "value", "value", "summary.csv", "error"),
    "nothing": Number("size == 300"),
}


def experiment(**options) -> ExperimentFile:
    declared = Experiment(
        spec="a.toml", figure=lambda table: None, numbers=NUMBERS, summary=summary, **options
    )
    return ExperimentFile(declared, Path("a.py"), Path("a.toml"), {}, "a")


@pytest.fixture
def table(tmp_path):
    """A committed table of two sizes in tmp_path/committed."""
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"size": np.repeat([100, 200], TRIALS), "trial": np.tile(np.arange(TRIALS), 2)})
    rows = rows.assign(recovery_error=random.gamma(2.0, 0.01, 2 * TRIALS), share=0.0, seconds=1.0, status=0)
    (tmp_path / "committed").mkdir()
    write_table(rows, tmp_path / "committed" / "table.csv")
    write_table(summary(rows), tmp_path / "committed" / "summary.csv")
    return rows


def checked(tmp_path, remade, **options):
    check = check_table(experiment(**options), remade, tmp_path / "committed", KEYS, tmp_path / "scratch")
    return check, {number.name: number for number in check.numbers}


def tenth(table):
    return table[table["trial"].isin(chosen(0, "a", TRIALS, 0.1))]


def test_the_choice_is_a_tenth_and_depends_on_seed_and_name():
    assert len(chosen(0, "a", 40, 0.1)) == 4
    assert chosen(0, "a", 3, 0.1)[0] in range(3)
    assert chosen(0, "a", 1000, 0.1) == chosen(0, "a", 1000, 0.1) != chosen(1, "a", 1000, 0.1)
    assert chosen(0, "a", 1000, 0.1) != chosen(0, "b", 1000, 0.1)


def test_rounding_leaves_every_number(table, tmp_path):
    random = np.random.default_rng(1)
    remade = tenth(table)
    remade = remade.assign(
        recovery_error=remade["recovery_error"] * (1 + 1e-5 * random.normal(size=len(remade)))
    )
    check, numbers = checked(tmp_path, remade.assign(seconds=7.0, trial=remade["trial"].astype(float)))
    assert (check.rows, check.remade, check.unmatched, check.cells) == (80, 8, 0, 2)
    assert 0 < check.relative_difference < 1e-4
    assert check.largest_cell_shift < 0.01
    assert not check.differing
    verdicts = {name: number.verdict for name, number in numbers.items()}
    assert verdicts.pop("time") == "not compared: a time"
    assert set(verdicts.values()) == {"holds"}
    assert "nothing" not in verdicts


def test_a_shift_of_all_rows_is_found_in_full(table, tmp_path):
    """A tenth of the rows shows the shift of the whole: a statistic is compared on the same rows."""
    mcse = table["recovery_error"].sem()
    remade = tenth(table).assign(recovery_error=lambda t: t["recovery_error"] + 5 * mcse, share=0.5)
    check, numbers = checked(tmp_path, remade)
    assert {number.name for number in check.differing} >= {"mean", "median", "all", "largest", "summary"}
    assert numbers["mean"].shift == pytest.approx(5 * mcse, rel=1e-3)
    assert numbers["summary"].shift == pytest.approx(5 * mcse, rel=1e-3)
    assert numbers["summary"].errors == pytest.approx(5, rel=1e-2)
    assert check.largest_cell_shift > 3


def test_a_trial_that_ends_in_another_optimum_is_within_the_error(table, tmp_path):
    remade = tenth(table)
    first = remade.index[:1]
    remade = remade.assign(recovery_error=remade["recovery_error"].where(~remade.index.isin(first), 0.3))
    check, numbers = checked(tmp_path, remade)
    assert [number.name for number in check.differing] == ["largest"]  # it has no standard error
    assert numbers["median"].verdict == "holds"
    assert check.largest_cell_shift < 2


def test_rows_that_are_not_committed_are_counted(table, tmp_path):
    other = tenth(table).assign(size=300)
    check, _ = checked(tmp_path, pd.concat([tenth(table), other]))
    assert (check.remade, check.unmatched) == (8, 8)
    with pytest.raises(ValueError, match="none of 8 remade rows is in it: its spec has changed"):
        checked(tmp_path, other)
    check = check_table(experiment(), other, tmp_path / "committed", KEYS, tmp_path / "scratch", quick=True)
    assert (check.remade, check.unmatched, check.numbers) == (0, 8, ())
    (tmp_path / "committed" / "table.csv").unlink()
    with pytest.raises(ValueError, match="there is no such table"):
        checked(tmp_path, other)


STUDY = """
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from moejax.reproduce import Experiment, Number
def run_cell(cell):
    return pd.DataFrame({"error": np.random.default_rng(cell["value"]).gamma(2.0, 1.0, 50)})
def figure(table):
    return Figure()
NUMBERS = {f"mean_{value}": Number(f"value == {value}", "error", "mean") for value in range(20)}
EXPERIMENT = Experiment(spec="sweeps/study.toml", numbers=NUMBERS, run_cell=run_cell, figure=figure)
"""


@pytest.fixture
def study_root(tmp_path):
    """A root whose study of twenty cells has committed results."""
    make_root(tmp_path, names=())
    (tmp_path / "experiments" / "study.py").write_text(STUDY)
    (tmp_path / "sweeps" / "study.toml").write_text(f"study = true\n[grid]\nvalue = {list(range(20))}\n")
    reproduce(root=tmp_path, workers=1, quiet=True)
    return tmp_path


def test_a_tenth_of_the_cells_of_a_study(study_root, capsys):
    results = study_root / "results" / "study"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    result = verify(root=study_root, workers=1)
    (check,) = result["experiments"]
    assert (check["rows"], check["remade"], check["cells"]) == (1000, 100, 2)
    verdicts = [number["verdict"] for number in check["numbers"]]
    assert (verdicts.count("holds"), verdicts.count("not remade")) == (2, 18)
    assert "100 of 1,000 rows remade" in capsys.readouterr().out
    other = verify(root=study_root, workers=1, quiet=True, seed=1)
    remade = [{n["name"] for n in r["experiments"][0]["numbers"] if n["rows"]} for r in (result, other)]
    assert remade[0] != remade[1]
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before
    table = pd.read_csv(results / "table.csv")
    wrong = int(sorted(remade[0])[0].removeprefix("mean_"))
    table.loc[table["value"] == wrong, "error"] += 2.0
    table.to_csv(results / "table.csv", index=False)
    with pytest.raises(NotReproducedError, match=f"1 of 20 numbers differ .*study mean_{wrong} "):
        verify(root=study_root, workers=1, quiet=True)
    with pytest.raises(SystemExit) as caught:
        program.main(["reproduce", "--verify", "--root", str(study_root), "--workers", "1", "--quiet"])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "standard errors" in error


def test_refusals_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    make_root(tmp_path)
    for arguments, words in (
        ([], "no committed table of any experiment"),
        (["first"], "first: there is no "),
        (["frist"], "did you mean first"),
        (["--dry-run"], "--dry-run: does not go with --verify"),
    ):
        with pytest.raises(SystemExit) as caught:
            program.main(["reproduce", "--verify", "--root", str(tmp_path), *arguments])
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (2, 1), error
        assert words in error
    assert not (tmp_path / "runs").exists()


def test_the_command_remakes_a_sweep_at_another_rounding(tmp_path):
    """The quick one, as continuous integration runs it: in its own process, which rounds like another machine."""
    root = make_root(tmp_path, names=("first",), quick={"trials": 2})
    reproduce(root=root, workers=1, quiet=True)
    command = [sys.executable, "-m", "moejax", "reproduce", "--verify", "--quick", "--root", str(root)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "MOEJAX_CACHE_DIR": str(tmp_path),
    }
    environment.pop("JAX_ENABLE_X64", None)
    done = subprocess.run(
        [*command, "--workers", "1", "--precision", "float64", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (check,) = json.loads(done.stdout)["experiments"]
    assert (check["rows"], check["remade"], check["unmatched"]) == (12, 4, 0)
    assert check["relative_difference"] < 1e-4
    (number,) = check["numbers"]
    assert number["verdict"] == "holds"
    (record,) = (root / "runs" / "verify").glob("quick-0-*/verify.json")
    assert json.loads(record.read_text())["experiments"] == [check]
