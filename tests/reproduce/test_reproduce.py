"""`moejax reproduce`: experiments as one run, equal to the sweeps run alone; resumable; honest about what failed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from moejax.cli import program as cli
from moejax.reproduce.cell_functions import read_study
from moejax.reproduce.claims import Number, compute, render
from moejax.reproduce.experiment import Experiment, load_experiments, load_module
from moejax.reproduce.runner import reproduce
from moejax.sweep import commands, load
from moejax.sweep.plan.plan import join_plans, make_plan
from moejax.sweep.report.summary import estimates
from moejax.sweep.spec.overrides import override_texts
from moejax.sweep.spec.parse import parse_spec, read_spec

ROOT = Path(__file__).parents[2]

SWEEP = """
name = "NAME"
methods = ["joint_em"]
trials = 3
dim = 3
num_experts = 2
max_iterations = 4

[grid]
num_samples = [100, 200]
noise_std = [0.1, 0.5]
"""
EXPERIMENT = """
from matplotlib.figure import Figure
from moejax.reproduce import Experiment, Number
def figure(table):
    figure = Figure()
    axis = figure.subplots()
    axis.plot(table["num_samples"], table["recovery_error"], "o")
    return figure
EXPERIMENT = Experiment(
    spec="sweeps/NAME.toml",
    quick={QUICK},
    numbers={"error": Number("noise_std == 0.1")},
    shows="The median error is {error}.",
    shows_not="It does not show much.",
    seconds=True,
    figure=figure,
)
"""
STUDY = """
import os
import pandas as pd
from matplotlib.figure import Figure
from moejax.reproduce import Experiment
def run_cell(cell):
    import jax.numpy as jnp
    if cell["value"] == 3:
        raise RuntimeError("no threes")
    with open(os.environ["STUDY_LOG"], "a") as log:
        log.write(f"{cell['group']}{cell['value']}\\n")
    return pd.DataFrame({"square": [cell["value"] ** 2, 0], "precision": str(jnp.zeros(1).dtype)})
def figure(table):
    if "nine" in set(table["group"]):
        raise KeyError("nothing")
    return Figure()
EXPERIMENT = Experiment(spec="sweeps/study.toml", program=("group",), run_cell=run_cell, figure=figure)
"""


def make_root(folder: Path, names=("first", "second"), quick=None) -> Path:
    for name in ("experiments", "sweeps"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        own = {"trials": 2 + number, "num_samples": [100 + number]} if quick is None else quick
        text = EXPERIMENT.replace("{QUICK}", repr(own)).replace("NAME", name)
        (folder / "experiments" / f"{name}.py").write_text(text)
        (folder / "sweeps" / f"{name}.toml").write_text(SWEEP.replace("NAME", name))
    return folder


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["reproduce", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_refusals_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")
    assert "no experiments" in refused(capsys, "--root", str(tmp_path / "nowhere"))
    make_root(tmp_path)
    error = refused(capsys, "frist", "--root", str(tmp_path))
    assert "frist" in error
    assert "did you mean first" in error
    third = tmp_path / "experiments" / "third.py"
    third.write_text('SPEC = "sweeps/first.toml"\n')
    assert "expected EXPERIMENT = Experiment(" in refused(capsys, "third", "--root", str(tmp_path))
    third.unlink()
    (tmp_path / "sweeps" / "first.toml").unlink()
    assert "first.toml" in refused(capsys, "first", "--root", str(tmp_path))
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_how_long_the_last_full_runs_took(capsys, tmp_path):
    make_root(tmp_path)
    for name, seconds in (("first", 70.0), ("second", 50.4)):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"quick": False, "wall_seconds": seconds}))
    reproduce(root=tmp_path, workers=1, dry_run=True)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "last full runs together: 2 min 0 s" in lines
    assert any(line.startswith("first") and line.endswith("1 min 10 s") for line in lines)
    (tmp_path / "results" / "second" / "manifest.json").write_text(json.dumps({"quick": True}))
    reproduce(root=tmp_path, workers=1, dry_run=True)
    assert "together" not in capsys.readouterr().out


def test_plans_are_joined_by_shape():
    first, second = (
        make_plan(parse_spec(SWEEP.replace("NAME", name), overrides=overrides))
        for name, overrides in (("first", ()), ("second", ("trials=5", "num_samples=[200, 300, 600]")))
    )
    joint = join_plans([first, second])
    assert [cell.result_hash for cell in joint.cells] == [
        cell.result_hash for plan in (first, second) for cell in plan.cells
    ]
    # padded to 256 (four cells of the first, two of the second), 512 and 1024
    assert [len(bucket.cells) for bucket in joint.buckets] == [6, 2, 2]
    for position, cell in enumerate(joint.cells):
        assert position in joint.buckets[cell.bucket].cells
    for bucket in joint.buckets:
        trials = sum(3 if position < 4 else 5 for position in bucket.cells)
        assert bucket.chunk_size * -(-trials // bucket.chunk_size) < trials + bucket.chunk_size
    assert join_plans([first]) is first
    other_seed = make_plan(parse_spec(SWEEP, overrides=("seed=1",)))
    with pytest.raises(ValueError, match="seed"):
        join_plans([first, other_seed])
    precise = make_plan(
        parse_spec(
            SWEEP,
            overrides=('precision.target={metric="recovery_error", mcse=0.1}', "precision.max_trials=9"),
        )
    )
    with pytest.raises(ValueError, match="runs alone"):
        join_plans([first, precise])


@pytest.fixture(scope="module")
def quick_root(tmp_path_factory):
    """A root whose two experiments have run once, quick; and what reproduce said."""
    root = make_root(tmp_path_factory.mktemp("root"))
    said = reproduce(root=root, quick=True, workers=1, quiet=True)
    return root, said


@pytest.mark.slow
def test_rows_are_those_of_the_sweeps_alone(quick_root, tmp_path):
    root, said = quick_root
    assert said["programs"] == 1  # both experiments' sizes are padded to 256
    for number, name in enumerate(("first", "second")):
        table = load(root / "runs" / name)
        assert len(table) == 2 * (2 + number)
        overrides = (f"trials={2 + number}", f"num_samples=[{100 + number}]")
        commands.sweep(
            root / "sweeps" / f"{name}.toml", out=tmp_path / name, set=overrides, workers=1, quiet=True
        )
        pd.testing.assert_frame_equal(load(tmp_path / name), table, rtol=1e-6)
    first, second = (load(root / "runs" / name) for name in ("first", "second"))
    assert not np.isin(first["recovery_error"], second["recovery_error"]).any()


@pytest.mark.slow
def test_results_say_where_they_come_from(quick_root):
    root, _ = quick_root
    for name in ("first", "second"):
        folder = root / "results" / name
        table = pd.read_csv(folder / "table.csv")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["rows"] == len(table)
        assert manifest["not_ok"] == (table["status"] != 0).sum() == sum(manifest["not_ok_reasons"].values())
        assert manifest["quick"]
        assert manifest["command"] == f"moejax reproduce {name} --quick"
        assert manifest["spec_file"] == f"sweeps/{name}.toml"
        assert manifest["spec_text"] == (root / "sweeps" / f"{name}.toml").read_text()
        assert (
            manifest["spec"]["grid"]["num_samples"]
            == tomllib.loads(
                "\n".join(line for line in manifest["overrides"] if line.startswith("num_samples"))
            )["num_samples"]
        )
        assert {"git", "versions", "precision", "processor", "wall_seconds", "compile_seconds"} <= set(
            manifest
        )
        assert str(root) not in json.dumps(manifest)
        assert (table["seconds"] > 0).all()
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "figure.pdf").read_bytes().startswith(b"%PDF")
        claims = json.loads((folder / "claims.json").read_text())
        median = table.loc[table["noise_std"] == 0.1, "recovery_error"].median()
        assert claims["numbers"]["error"]["value"] == pytest.approx(median, rel=1e-12)
        gallery = (root / "results" / "README.md").read_text()
        assert claims["text"] in gallery
        assert f"{name}/figure.png" in gallery


@pytest.mark.slow
def test_a_second_call_runs_nothing_and_gives_the_same_bytes(quick_root):
    root, _ = quick_root
    kept = ("table.csv", "figure.png", "figure.pdf", "claims.json")
    before = {path: path.read_bytes() for path in root.glob("results/*/*") if path.name in kept}
    assert len(before) == 8
    again = reproduce(root=root, quick=True, workers=1, quiet=True)
    assert again["compilations"] == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_quick_run_does_not_replace_a_full_one(quick_root):
    root, _ = quick_root
    full = reproduce(["first"], root=root, workers=1, quiet=True)
    assert full["results"] == str(root / "results")
    manifest = json.loads((root / "results" / "first" / "manifest.json").read_text())
    assert not manifest["quick"]
    assert manifest["rows"] == 12
    quick = reproduce(["first"], root=root, quick=True, workers=1, quiet=True)
    assert Path(quick["results"]) == root / "runs" / "quick" / "results"
    assert json.loads((root / "results" / "first" / "manifest.json").read_text()) == manifest
    seeded = reproduce(["first"], root=root, quick=True, seed=5, workers=1, quiet=True)
    assert Path(seeded["results"]) == root / "runs" / "seed-5" / "results"
    ours, theirs = (pd.read_csv(Path(said["results"]) / "first" / "table.csv") for said in (quick, seeded))
    assert not np.isclose(ours["recovery_error"], theirs["recovery_error"]).any()


@pytest.mark.slow
def test_an_experiment_whose_figure_fails_does_not_stop_the_others(quick_root):
    root, _ = quick_root
    broken = EXPERIMENT.replace("{QUICK}", repr({"trials": 2, "num_samples": [100]})).replace("NAME", "first")
    broken = broken.replace("    return figure\n", "    raise KeyError('nothing')\n")
    (root / "experiments" / "broken.py").write_text(broken)
    try:
        with pytest.raises(ValueError, match="broken: KeyError: 'nothing'"):
            reproduce(["broken", "second"], root=root, quick=True, workers=1, quiet=True)
    finally:
        (root / "experiments" / "broken.py").unlink()
    assert (root / "runs" / "quick" / "results" / "second" / "table.csv").is_file() or (
        root / "results" / "second" / "table.csv"
    ).is_file()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"qucik": {"trials": 2}}, TypeError, "qucik"),
        ({"figure": "figure"}, ValueError, "figure: expected a function, got 'figure'"),
        ({"spec": 3}, ValueError, "spec: expected the path of a TOML file, got 3"),
        ({"precision": "float16"}, ValueError, "precision: expected float32 or float64, got 'float16'"),
        ({"program": ("group",)}, ValueError, "run_cell: expected a function for a study, got None"),
    ],
)
def test_a_field_that_is_not_known_or_not_right_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Experiment(**({"spec": "sweeps/first.toml", "figure": lambda table: None} | fields))


def test_a_misspelt_field_is_one_line_that_names_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")
    file = make_root(tmp_path) / "experiments" / "first.py"
    file.write_text(file.read_text().replace("quick=", "qucik="))
    error = refused(capsys, "first", "--quick", "--root", str(tmp_path))
    assert "first.py" in error
    assert "qucik" in error


def test_studies_resume_cell_by_cell(tmp_path, monkeypatch):
    make_root(tmp_path, names=())
    log = tmp_path / "log"
    monkeypatch.setenv("STUDY_LOG", str(log))
    (tmp_path / "experiments" / "study.py").write_text(STUDY)
    spec = tmp_path / "sweeps" / "study.toml"
    spec.write_text(
        'name = "study"\nstudy = true\nfixed = [1, 2]\n[grid]\ngroup = ["a", "b"]\nvalue = [1, 2]\n'
    )
    said = reproduce(root=tmp_path, workers=1, quiet=True)
    assert said["programs"] == 2  # one for each group
    assert log.read_text().split() == ["a1", "a2", "b1", "b2"]
    table = pd.read_csv(tmp_path / "results" / "study" / "table.csv")
    assert table["square"].tolist() == [1, 0, 4, 0] * 2
    assert set(table["precision"]) == {"float64"}
    # a larger grid runs only what is missing, and a cell that raises is a row with its reason
    spec.write_text(
        'name = "study"\nstudy = true\nfixed = [1, 2]\n[grid]\ngroup = ["a", "b"]\nvalue = [1, 2, 3]\n'
    )
    reproduce(root=tmp_path, workers=1, quiet=True)
    assert log.read_text().split() == ["a1", "a2", "b1", "b2"]
    table = pd.read_csv(tmp_path / "results" / "study" / "table.csv")
    assert table.loc[table["status"] != 0, "reason"].tolist() == ["RuntimeError: no threes"] * 2
    assert json.loads((tmp_path / "results" / "study" / "manifest.json").read_text())["not_ok"] == 2
    # if none has a result, the results of before stay, and the reason is told
    spec.write_text('name = "study"\nstudy = true\nfixed = [1, 2]\n[grid]\ngroup = ["a", "b"]\nvalue = [3]\n')
    with pytest.raises(ValueError, match=r"^study: 2 of 2 rows failed, most often: RuntimeError: no threes$"):
        reproduce(root=tmp_path, workers=1, quiet=True)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results" / "study" / "table.csv"), table)
    spec.write_text(
        'name = "study"\nstudy = true\nfixed = [1, 2]\n[grid]\ngroup = ["nine"]\nvalue = [1, 3]\n'
    )
    with pytest.raises(
        ValueError, match=r"study: 1 of 3 rows failed, most often: RuntimeError: no threes \(then KeyError"
    ):
        reproduce(root=tmp_path, workers=1, quiet=True)
    with pytest.raises(ValueError, match="valeu: unknown key; did you mean value"):
        read_study(spec, {"valeu": [1]})


@pytest.mark.slow
def test_every_experiment_of_the_repository_has_a_plan_and_the_quick_ones_share_their_programs():
    full, quick = load_experiments(ROOT), load_experiments(ROOT, quick=True)
    assert {
        "quickstart", "convergence", "sample-size", "noise", "dimension", "num-experts", "gating-scale", "non-linearity",
        "gating-em", "input-distribution", "phase-diagram", "restarts", "real-data",
    } <= {experiment.name for experiment in full}  # fmt: skip
    for experiment in (*full, *quick):
        assert experiment.declared.shows.count(".") >= 1, experiment.name
        assert experiment.declared.shows_not.startswith("It does not show"), experiment.name
        if not experiment.is_study:
            spec = read_spec(experiment.spec_path, override_texts(experiment.overrides))
            assert spec.name == experiment.name
            assert spec.precision is None  # it could not run with the others
            assert (spec.trials <= 20) == (experiment in quick) or experiment.name in (
                "convergence",
                "phase-diagram",
            )
    done = subprocess.run(
        [sys.executable, "-m", "moejax.cli", "reproduce", "--quick", "--dry-run", "--quiet", "--json"],
        capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert json.loads(done.stdout)["programs"] <= 40


@pytest.mark.slow
def test_another_seed_agrees_within_monte_carlo_error(tmp_path):
    """Means of log errors and success rates of the quick form of one experiment, on two seeds, within 4 standard errors."""
    root, tables = _root_with(tmp_path, "gating_scale"), []
    experiment = root / "experiments" / "gating_scale.py"
    small = experiment.read_text().replace('"num_samples": 4000', '"num_samples": 2000')
    experiment.write_text(small.replace('"gating_norm": [1.0, 4.0]', '"gating_norm": [1.0]'))
    spec = root / "sweeps" / "gating-scale.toml"
    two = 'methods = ["spectral", "spectral_em"]'  # each costs a program
    spec.write_text(re.sub("^methods = .*", two, spec.read_text(), flags=re.MULTILINE))
    for seed in (1, 2):
        reproduce(
            ["gating-scale"],
            root=root,
            quick=True,
            seed=seed,
            workers=1,
            quiet=True,
        )
        folder = tmp_path / "runs" / f"seed-{seed}" / "results" / "gating-scale"
        table = pd.read_csv(folder / "table.csv")
        tables.append(table.assign(log_error=np.log(table["recovery_error"])))
    by = ["gating_angle", "gating_norm"]
    for metric, estimate in (("log_error", "mean"), ("log_likelihood_per_sample", "mean")):
        first, second = (estimates(table, by, metric) for table in tables)
        pd.testing.assert_frame_equal(first[[*by, "method"]], second[[*by, "method"]])
        gap = (first[estimate] - second[estimate]).abs()
        error = np.hypot(first[f"{estimate}_mcse"], second[f"{estimate}_mcse"])
        assert (error > 0).all()
        assert (gap < 4 * error).all(), (metric, (gap / error).max())
    # and it would notice: moments alone differ from the polish by far more
    first = estimates(tables[0], by, "log_error").pivot_table(
        index=by, columns="method", values=["mean", "mean_mcse"]
    )
    difference = first["mean"]["spectral"] - first["mean"]["spectral_em"]
    assert (
        difference > 4 * np.hypot(first["mean_mcse"]["spectral"], first["mean_mcse"]["spectral_em"])
    ).all()


def _root_with(folder: Path, name: str) -> Path:
    """A root with one of the repository's experiments."""
    for kind, file in (("experiments", f"{name}.py"), ("sweeps", f"{name.replace('_', '-')}.toml")):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / file).write_text((ROOT / kind / file).read_text())
    return folder


@pytest.mark.slow
def test_new_activation_goes_from_definition_to_figure(tmp_path):
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "docs" / "new_activation.py"), "--quick", "--workers", "1",
            "--out", str(tmp_path / "run"),
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MOEJAX_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "soft_threshold" in done.stdout
    assert (tmp_path / "run" / "sample_size.png").read_bytes().startswith(b"\x89PNG")
    table = load(tmp_path / "run")
    assert set(table["activation"]) == {"soft_threshold"}
    polished = table[(table["method"] == "spectral_em") & (table["num_samples"] == 4000)]
    assert (polished["recovery_error"] < 0.02).mean() > 0.5


def experiment_module(name: str):
    return load_module(ROOT / "experiments" / f"{name}.py")


def test_predicted_contraction_is_that_of_the_em_map():
    """I - I_complete^-1 I_observed, with the observed information by automatic differentiation of the log-likelihood."""
    module = experiment_module("gating_em")
    rng = np.random.default_rng(0)
    x, experts = rng.normal(size=(300, 5)), rng.normal(size=(3, 5))
    gating = np.concatenate([rng.normal(size=(2, 5)), np.zeros((1, 5))])
    y = np.tanh((x * experts[rng.integers(3, size=300)]).sum(axis=1)) + 0.7 * rng.normal(size=300)
    means = np.tanh(x @ experts.T)

    def value(gates):
        logits = jnp.concatenate([x @ gates.reshape(2, 5).T, np.zeros((300, 1))], axis=1)
        evidence = jax.nn.logsumexp(logits - 0.5 * ((y[:, None] - means) / 0.7) ** 2, axis=1)
        return jnp.mean(evidence - jax.nn.logsumexp(logits, axis=1))

    observed = -np.asarray(jax.jit(jax.hessian(value))(gating[:2].reshape(-1)))
    prior = np.exp(x @ gating.T)
    prior = (prior / prior.sum(axis=1, keepdims=True))[:, :2]
    products = [np.kron(np.diag(p) - np.outer(p, p), np.outer(r, r)) for p, r in zip(prior, x, strict=True)]
    missing = np.eye(10) - np.linalg.solve(np.mean(products, axis=0), observed)
    expected = np.linalg.eigvals(missing).real.max()
    assert module.predicted_rate(gating, experts, x, y, "tanh", 0.7) == pytest.approx(expected, rel=1e-9)
    history = -1000.0 - 50.0 * 0.6 ** (
        2.0 * np.arange(60)
    )  # the distance shrinks by 0.6 a step, its square by 0.36
    assert module.measured_rate(history) == pytest.approx(0.6, rel=1e-3)


@pytest.mark.slow
def test_one_expert_is_linear_regression_on_a_fold(monkeypatch):
    from sklearn.linear_model import LinearRegression

    module = experiment_module("real_data")
    monkeypatch.setattr(module, "NUMBERS", (1,))
    cell = {"dataset": "diabetes", "model": "joint_em", "split": 7, "repeats": 2, "folds": 5, "seed": 0}
    data = module.load("diabetes")
    splits = module.folds_of(len(data.y), cell)
    assert np.sort(np.concatenate([held for _, held in splits[5:]])).tolist() == list(range(len(data.y)))
    (row,) = module.run_cell(cell | {"num_starts": 1}).itertuples()
    assert (row.repeat, row.fold) == (1, 2)
    train, held = splits[7]
    model = LinearRegression().fit(data.x[train], data.y[train])
    scale = data.y[train].std()
    error = (data.y[held] - model.predict(data.x[held])) / scale
    sigma = np.sqrt(np.mean((data.y[train] - model.predict(data.x[train])) ** 2)) / scale
    log_likelihood = np.mean(-0.5 * (error / sigma) ** 2) - np.log(sigma * np.sqrt(2 * np.pi))
    assert row.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
    assert row.held_out_log_likelihood == pytest.approx(log_likelihood, rel=1e-5)
    assert row.coverage == np.mean(np.abs(error / sigma) <= 1.6448536)
    outsider = module.run_cell(cell | {"model": "linear_regression"}).iloc[0]
    assert outsider["rmse"] == pytest.approx(row.rmse, rel=1e-6)
    assert module.run_cell(cell | {"split": 10}).empty


def test_real_data_pairs_folds():
    module = experiment_module("real_data")
    rng = np.random.default_rng(0)
    rows = []
    for repeat in range(2):
        for fold in range(5):
            line = rng.normal(1.0, 0.1)
            place = {"dataset": "d", "repeat": repeat, "fold": fold, "folds": 5, "seconds": 1.0}
            rows.append(place | {"variant": "linear_regression", "rmse": line})
            rows.append(place | {"variant": "hist_gradient_boosting", "rmse": line - 0.1 - 0.02 * repeat})
            experts = {"num_experts": 2.0 + (fold == 0), "objective": "mean" if fold else "likelihood"}
            rows.append(place | {"variant": module.OURS[1], "rmse": line - 0.1} | experts)
    rows.append({"dataset": "d", "variant": module.SLOPES, "folds": 5})
    table = pd.DataFrame(rows).assign(held_out_log_likelihood=0.0, coverage=0.9)
    summary = module.summary(table).set_index("variant")
    ours = summary.loc[module.OURS[1]]
    assert (ours["median_num_experts"], ours["share_of_mean"]) == (2.0, 0.8)
    assert ours["rmse_gain"] == pytest.approx(-0.1)
    assert ours["rmse_gain_se"] == pytest.approx(0.0, abs=1e-12)
    less = np.repeat([0.0, 0.02], 5)  # five folds of each repetition
    assert ours["rmse_less_boosting"] == pytest.approx(less.mean())
    assert ours["rmse_less_boosting_se"] == pytest.approx(np.sqrt((1 / 10 + 1 / 4) * less.var(ddof=1)))
    lines = table.loc[table["variant"] == "linear_regression", "rmse"]
    expected = np.sqrt((1 / 10 + 1 / 4) * lines.var())
    assert summary.loc["linear_regression", "rmse_se"] == pytest.approx(expected)


def test_slopes_and_sample_sizes_are_recovered_from_tables_that_have_them():
    rng = np.random.default_rng(1)
    sizes = np.repeat([2000, 4000, 16000, 64000], 50)
    error = 300.0 / sizes * np.exp(0.2 * rng.normal(size=sizes.size))
    table = pd.DataFrame(
        {
            "activation": "relu", "method": "spectral", "transform": "weighted", "num_samples": sizes,
            "trial": np.tile(np.arange(50), 4), "recovery_error": error,
        }
    )  # fmt: skip
    slope = experiment_module("sample_size").summary(table).iloc[0]
    assert abs(slope["slope"] + 1.0) < 4 * slope["slope_se"]
    assert slope["slope_se"] == pytest.approx(0.2 / np.log(sizes).std() / np.sqrt(sizes.size), rel=0.15)
    needed = experiment_module("non_linearity").summary(table).iloc[0]
    assert abs(needed["samples_needed"] - 300.0 / 0.02) < 4 * needed["samples_needed_se"]
    assert not needed["extrapolated"]


def test_numbers_are_statistics_of_the_rows_they_name():
    errors = np.array([0.01, 0.03, 0.015, 0.5, 0.005])
    tables = {"table.csv": pd.DataFrame({"method": list("aaaab"), "recovery_error": errors})}
    median = compute(Number("method == 'a'"), tables)
    assert median.value == pytest.approx(np.median(errors[:4]))
    share = compute(Number("method == 'a'", statistic="success_rate"), tables)
    assert (share.value, share.text) == (0.5, "50 ± 25 %")
    assert compute(Number("method == 'c'"), tables) is None
    with pytest.raises(ValueError, match="one row"):
        compute(Number("method == 'a'", statistic="value"), tables)
    with pytest.raises(ValueError, match="unknown statistic 'modus'"):
        compute(Number("method == 'a'", statistic="modus"), tables)
    sentence, found = render(
        "{x} of {y}", {"x": Number("method == 'b'", statistic="count"), "y": Number("method == 'c'")}, tables
    )
    assert sentence == "1 of —"
    assert set(found) == {"x"}
