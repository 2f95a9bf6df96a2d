"""`moejax predict`: rows of a file in any order of columns, against the fit in Python; and folders and files that are refused."""

import json
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

import moejax
from moejax.cli import program as cli

N = 300


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")


def run(capsys, *arguments):
    cli.main(list(map(str, arguments)))
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, arguments)))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def rows():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"dose": rng.normal(3.0, 2.0, N), "age": rng.normal(50.0, 10.0, N)})
    table["site"] = rng.choice(["north", "south", "west"], N, p=[0.5, 0.3, 0.2])
    second = rng.uniform(size=N) < np.where(table["site"] == "south", 0.9, 0.2)
    table["effect"] = np.where(second, -1.0, 1.0) * table["dose"] + 0.1 * rng.normal(size=N)
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fit of a table with a column of text."""
    place = tmp_path_factory.mktemp("fit")
    rows().to_csv(place / "data.csv", index=False)
    command = ["fit", str(place / "data.csv"), "--target", "effect", "--num-experts", "2", "--quiet"]
    cli.main([*command, "--method", "joint_em", "--out", str(place / "out")])
    return place / "out"


def inputs(table):
    """The columns of the fit, encoded by hand: north is the most frequent site."""
    sites = [table["site"] == name for name in ("south", "west")]
    return np.column_stack([table["dose"], table["age"], *sites]).astype(float)


def test_predictions_of_new_rows_are_those_of_the_fit_in_python(capsys, folder, tmp_path):
    result, table = moejax.load_fit(folder / "fit.moejax"), rows().head(40)
    assert list(result.summary().experts[0].loc["expert"].index[:4]) == [
        "dose",
        "age",
        "site=south",
        "site=west",
    ]
    new = table[["site", "age", "dose"]].assign(note="any text")
    new.to_csv(tmp_path / "new.csv", index=False)
    command = ("predict", folder, tmp_path / "new.csv", "--level", "0.8", "--quantiles", "0.25", "0.5")
    found = pd.DataFrame(json.loads(run(capsys, *command, "--json")))
    x = inputs(table)
    low, high = result.predict_interval(x, 0.8).T
    quantiles = result.predict_quantiles(x, [0.25, 0.5])
    gates = result.gate_probabilities(x)
    expected = {
        "mean": result.predict(x),
        "std": result.predict_std(x),
        "low": low,
        "high": high,
        "quantile_0.25": quantiles[:, 0],
        "quantile_0.5": quantiles[:, 1],
        "gate_1": gates[:, 0],
        "gate_2": gates[:, 1],
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)
    for name in ("out.csv", "out.csv.gz", "out.parquet"):
        printed = run(capsys, *command, "--out", tmp_path / name)
        assert "40 rows" in printed
        read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
        pd.testing.assert_frame_equal(read(tmp_path / name), found, rtol=1e-12)


def test_rows_with_the_target_have_responsibilities_and_a_score(capsys, folder, tmp_path):
    table = rows()
    table.to_parquet(tmp_path / "new.parquet", index=False)
    printed = run(capsys, "predict", folder, tmp_path / "new.parquet", "--out", tmp_path / "out.csv")
    result, x = moejax.load_fit(folder / "fit.moejax"), inputs(table)
    found = pd.read_csv(tmp_path / "out.csv")
    expected = result.responsibilities(x, table["effect"])
    np.testing.assert_allclose(found[["responsibility_1", "responsibility_2"]], expected, atol=1e-9)
    error = np.sqrt(np.mean((table["effect"] - found["mean"]) ** 2))
    assert f"RMSE {error:.4g}" in printed
    samples = pd.read_parquet(folder / "samples.parquet")
    np.testing.assert_allclose(samples["predicted"], found["mean"], rtol=1e-9)
    blank = table.assign(effect="")
    blank.to_csv(tmp_path / "blank.csv", index=False)
    printed = run(capsys, "predict", folder, tmp_path / "blank.csv")
    assert "has no values: it was left out" in " ".join(printed.split())
    assert "RMSE" not in printed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns": {"dose": "doses"}}, "no column 'dose', an input of the fit; did you mean doses?"),
        ({"columns": {"site": "place"}}, "no column 'site', an input of the fit"),
        ({"cell": ("age", "old")}, "column 'age', row 3: expected a finite number, got 'old'"),
        ({"cell": ("age", "")}, "column 'age', row 3: expected a finite number, got an empty cell"),
        ({"cell": ("site", "souht")}, "column 'site', row 3: unknown level 'souht'; did you mean south?"),
        ({"cell": ("effect", "x")}, "column 'effect', row 3: expected a finite number, got 'x'"),
        ({"rows": 0}, "expected rows below the header, got none"),
        ({"options": ("--level", "1.5")}, "--level: expected numbers between 0 and 1"),
        ({"options": ("--quantiles", "0.5", "2")}, "--quantiles: expected numbers between 0 and 1"),
        ({"options": ("--out", "table.txt")}, "--out table.txt: expected FILE.csv"),
    ],
)
def test_bad_rows_and_options_are_one_line(capsys, folder, tmp_path, change, words):
    table = rows().head(change.get("rows", 5)).astype(object)
    if "cell" in change:
        table.loc[2, change["cell"][0]] = change["cell"][1]
    table.rename(columns=change.get("columns", {})).to_csv(tmp_path / "new.csv", index=False)
    error = refused(capsys, "predict", folder, tmp_path / "new.csv", *change.get("options", ()))
    assert words in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv"]


def test_a_folder_without_a_whole_fit_is_one_line(capsys, folder, tmp_path):
    new = tmp_path / "new.csv"
    rows().head(5).to_csv(new, index=False)
    assert "expected a folder of `moejax fit --out`" in refused(capsys, "predict", tmp_path / "none", new)
    assert "no fit" in refused(capsys, "predict", tmp_path, new)
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "fit.moejax").write_bytes((folder / "fit.moejax").read_bytes()[:300])
    assert "expected a whole file of FitResult.save" in refused(capsys, "predict", old, new)
    (old / "fit.moejax").unlink()
    assert "an earlier version wrote it: fit again" in refused(capsys, "predict", old, new)
    shutil.copy(folder / "fit.moejax", old)
    document = json.loads((folder / "fit.json").read_text())
    document["experts"][0]["coefficients"] = {"other": 1.0}
    (old / "fit.json").write_text(json.dumps(document))
    assert "of one fit, got 'those of two'" in refused(capsys, "predict", old, new)
    (old / "fit.json").write_text("{}")
    assert "expected a whole fit.json" in refused(capsys, "predict", old, new)
    assert "missing.csv" in refused(capsys, "predict", folder, tmp_path / "missing.csv")


def test_a_function_of_a_file_is_given_again(capsys, tmp_path):
    (tmp_path / "steep.py").write_text("def steep(t):\n    return 2.0 * t\n")
    function, data = f"{tmp_path / 'steep.py'}:steep", tmp_path / "data.csv"
    rows()[["dose", "effect"]].head(60).to_csv(data, index=False)
    options = ["--target", "effect", "--num-experts", "1", "--method", "joint_em", "--quiet"]
    run(capsys, "fit", data, *options, "--activation", function, "--out", tmp_path / "out")
    assert "--activation FILE.py:FUNCTION" in refused(capsys, "predict", tmp_path / "out", data)
    command = ("predict", tmp_path / "out", data, "--activation", function, "--json")
    found = pd.DataFrame(json.loads(run(capsys, *command)))
    # one expert with a function that is linear is least squares
    line = np.polynomial.Polynomial.fit(*pd.read_csv(data).to_numpy().T, 1)
    np.testing.assert_allclose(found["mean"], line(pd.read_csv(data)["dose"].to_numpy()), rtol=1e-4)


@pytest.mark.slow
def test_a_fit_of_the_mean_says_so_and_predicts(capsys, tmp_path):
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(-3, 3, 200))
    data, out = tmp_path / "data.csv", tmp_path / "out"
    pd.DataFrame({"x": x, "y": np.sin(x) + 0.1 * rng.normal(size=200)}).to_csv(data, index=False)
    command = [
        "fit",
        data,
        "--target",
        "y",
        "--num-experts",
        "1-3",
        "--objective",
        "auto",
        "--num-starts",
        "2",
    ]
    printed = run(capsys, *command, "--average", "2", "--out", out)
    words = " ".join(printed.split())
    assert "objective: mean, the target is normal about the mean of the experts; noise" in words
    assert "by BIC: mean, k = " in words
    assert "noise std" not in words
    document = json.loads((out / "fit.json").read_text())
    assert document["objective"] == "mean"
    assert document["diagnostics"]["effective_parameters"] > 3
    assert document["diagnostics"]["ridge_experts"] > 0
    assert document["in_units"]["data"]["noise_std"] == pytest.approx(0.1, rel=0.2)
    assert "noise_std" not in document["experts"][0]
    (chosen,) = (row for row in document["selection"] if row["chosen"])
    shown = document["log_likelihood"] - document["in_units"]["data"]["log_likelihood"]
    assert document["diagnostics"]["log_evidence"] + shown == pytest.approx(chosen["log_evidence"], abs=0.5)
    assert (out / "fit.png").read_bytes().startswith(b"\x89PNG")
    found = pd.DataFrame(json.loads(run(capsys, "predict", out, data, "--json")))
    assert np.sqrt(np.mean((found["mean"] - np.sin(x)) ** 2)) < 0.05
    result = moejax.load_fit(out / "fit.moejax")
    assert len(result.members) == document["num_members"]
    assert "--ridge few: expected a number" in refused(capsys, *command, "--ridge", "few")
    assert "ridge: expected a number or None with objective 'likelihood'" in refused(
        capsys, *command[:6], "--ridge", "evidence"
    )


def test_a_column_of_the_new_rows_is_the_offset_of_a_fit_with_one(capsys, tmp_path):
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"age": rng.normal(50.0, 10.0, N), "log_exposure": rng.uniform(0.0, 3.0, N)})
    table["size"] = rng.normal(size=N)
    table["events"] = rng.poisson(np.exp(0.5 * table["size"] - 0.5 + table["log_exposure"]))
    table.to_csv(tmp_path / "data.csv", index=False)
    command = (
        "fit",
        tmp_path / "data.csv",
        "--target",
        "events",
        "--num-experts",
        "1",
        "--family",
        "poisson",
    )
    command = (*command, "--method", "joint_em", "--offset", "log_exposure", "--out", tmp_path / "out")
    assert "target: events; offset: log_exposure" in " ".join(run(capsys, *command).split())

    result, x = moejax.load_fit(tmp_path / "out" / "fit.moejax"), table[["age", "size"]].to_numpy()
    offset = table["log_exposure"].to_numpy()
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["settings"]["offset"] == "log_exposure"
    assert list(result.diagnostics["input_names"]) == ["age", "size"]
    same = moejax.fit(
        jax.random.key(0),
        x,
        table["events"].to_numpy(),
        num_experts=1,
        family="poisson",
        method="joint_em",
        fit_intercept=True,
        offset=offset,
    )
    np.testing.assert_allclose(result.params.experts, same.params.experts, rtol=1e-9)
    samples = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    np.testing.assert_allclose(samples["predicted"], same.predict(x, offset=offset), rtol=1e-9)

    table[["log_exposure", "size", "age"]].head(20).to_csv(tmp_path / "new.csv", index=False)
    run(
        capsys,
        "predict",
        tmp_path / "out",
        tmp_path / "new.csv",
        "--quiet",
        "--out",
        tmp_path / "new_out.csv",
    )
    found = pd.read_csv(tmp_path / "new_out.csv")
    np.testing.assert_allclose(found["mean"], same.predict(x[:20], offset=offset[:20]), rtol=1e-9)
    table[["size", "age"]].to_csv(tmp_path / "new.csv", index=False)
    error = refused(capsys, "predict", tmp_path / "out", tmp_path / "new.csv")
    assert "no column 'log_exposure', the offset of the fit" in error

    data = ("fit", tmp_path / "data.csv", "--target", "events", "--family", "poisson")
    assert "--offset: unknown column of numbers 'log_exposur'" in refused(
        capsys, *data, "--offset", "log_exposur"
    )
    assert "--offset log_exposure: does not go with" in refused(
        capsys, *data, "--offset", "log_exposure", "--stream"
    )
