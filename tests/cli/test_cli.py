"""The command line as a user meets it: results on disk, JSON, and one line with exit status 2 for a bad value."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
from rich.table import Table

import moejax
from moejax.cli import program as cli
from moejax.cli.activations import activation_row
from moejax.cli.fit_tables import _strongest
from moejax.cli.options import Info
from moejax.console import (
    PlainConsole,
    error_line,
    make_console,
    make_notes,
    output_that_may_close,
    print_json,
)
from moejax.environment import compilation_cache_folder
from moejax.methods.options import FitOptions


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "")


def run(capsys, *arguments):
    cli.main(list(arguments))
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_without_arguments_it_prints_the_commands():
    done = subprocess.run([sys.executable, "-m", "moejax.cli"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("fit", "predict", "sweep", "status", "report", "export", "activations", "info"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["fit", "predict", "sweep", "reproduce", "activations"])
def test_help_explains_every_option_and_hides_none(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = re.sub(r"\s*│\s*", " ", capsys.readouterr().out)
    assert "None" not in text
    unexplained = r"(--[\w-]+)( \S+)? \((?:default|required)"  # nothing between the option and its default
    assert re.findall(unexplained, text) == []


@pytest.mark.slow
def test_fit_writes_json_parquet_and_png(capsys, tmp_path):
    out = tmp_path / "out"
    printed = run(
        capsys,
        "fit",
        "--dataset",
        "diabetes",
        "--num-experts",
        "2",
        "--method",
        "joint_em",
        "--num-starts",
        "4",
        "--out",
        str(out),
    )
    assert "What each expert does" in printed
    document = json.loads((out / "fit.json").read_text())
    assert document["num_samples"] == 442
    assert document["status"] == "ok"
    # two linear experts explain more than one: scikit-learn's linear regression has R^2 = 0.5177 on these data
    assert document["r_squared"] > 0.5177
    assert document["history"][-1] == pytest.approx(document["log_likelihood"], abs=0.1)
    parameters = pd.read_parquet(out / "parameters.parquet")
    assert len(parameters) == 2 * 11
    samples = pd.read_parquet(out / "samples.parquet")
    shares = samples.filter(like="responsibility_").to_numpy()
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-12)
    residual = samples["target"] - samples["predicted"]
    in_data, standardised = (document["in_units"][name] for name in ("data", "standardised"))
    assert np.sqrt((residual**2).mean()) == pytest.approx(in_data["rmse"])
    assert (
        standardised["rmse"]
        == document["rmse"]
        == pytest.approx(in_data["rmse"] / samples["target"].std(ddof=0))
    )
    assert parameters["coefficient"][0] == pytest.approx(in_data["experts"][0]["coefficients"]["age"])
    assert parameters["standardised_coefficient"][0] == standardised["experts"][0]["coefficients"]["age"]
    # what repeats the fit from Python
    settings = document["settings"]
    data = sklearn.datasets.load_diabetes(scaled=False)
    again = moejax.fit(
        jax.random.wrap_key_data(jnp.asarray(settings["key"], jnp.uint32)),
        data.data,
        data.target,
        num_experts=settings["num_experts"],
        **{field.name: settings[field.name] for field in dataclasses.fields(FitOptions)},
    )
    assert again.log_likelihood == pytest.approx(in_data["log_likelihood"], abs=1e-6)
    assert again.params.experts[0, 0] == pytest.approx(in_data["experts"][0]["coefficients"]["age"], rel=1e-6)
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_fit_of_one_target_of_a_data_set_in_a_folder(capsys, tmp_path):
    from stock_workbook import STOCK, stock_file

    from moejax.fitting.datasets import STOCK_PERIODS, STOCK_TARGETS

    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(6), size=100)
    cells = np.concatenate([weights, weights @ rng.normal(size=(6, 6)), rng.uniform(size=(100, 6))], axis=1)
    (tmp_path / STOCK).write_bytes(stock_file(dict.fromkeys(STOCK_PERIODS, cells)))
    where = ["fit", "--dataset", "stock_portfolio", "--data-dir", str(tmp_path)]
    assert STOCK_TARGETS[3] in refused(capsys, *where)
    options = ["--target", "total_risk", "--num-experts", "1", "--method", "joint_em", "--json"]
    document = json.loads(run(capsys, *where, *options))
    assert document["settings"]["target"] == "total_risk"
    assert document["diagnostics"]["collinear_directions_dropped"] == 1
    assert document["diagnostics"]["collinear_inputs"] == [[0, 1, 2, 3, 4, 5]]
    assert document["r_squared"] > 0.999999  # the target is linear in the inputs


@pytest.mark.slow
def test_fit_of_a_file_as_json(capsys, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    table = pd.DataFrame(x, columns=["left", "right"])
    table["y"] = np.where(rng.random(400) < 0.5, x[:, 0], x[:, 1]) + 0.1 * rng.normal(size=400)
    table.to_csv(tmp_path / "data.csv", index=False)
    options = ["--target", "y", "--num-experts", "2", "--method", "joint_em", "--json"]
    document = json.loads(run(capsys, "fit", str(tmp_path / "data.csv"), *options))
    assert {expert["expert"] for expert in document["experts"]} == {1, 2}
    assert set(document["experts"][0]["coefficients"]) == {"left", "right"}


PLUGIN = """
import dataclasses
import jax.numpy as jnp
import moejax
from moejax.methods import get_method

def three_passes(key, problem, config):
    return get_method("joint_em")(key, problem, dataclasses.replace(config, max_iterations=3))

moejax.register_activation("doubled", lambda t: 2.0 * t)
moejax.register_method("three_passes", three_passes, moments="none")
"""


@pytest.mark.slow
def test_fit_takes_an_activation_and_a_method_of_a_plugin(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    x = np.random.default_rng(0).normal(size=200)
    pd.DataFrame({"x": x, "y": 3.0 * x}).to_csv(tmp_path / "data.csv", index=False)
    plugin = ["--plugin", str(tmp_path / "mine.py")]
    options = ["--target", "y", "--num-experts", "1", "--activation", "doubled", "--method", "three_passes"]
    document = json.loads(run(capsys, "fit", str(tmp_path / "data.csv"), *options, *plugin, "--json"))
    slope = document["in_units"]["data"]["experts"][0]["coefficients"]["x"]
    assert slope == pytest.approx(1.5, rel=1e-6)  # g(1.5 x) = 3 x
    assert document["settings"]["plugins"] == plugin[1:]
    missing = refused(capsys, "fit", str(tmp_path / "data.csv"), *options, "--plugin", "nowhere.py")
    assert "plugin nowhere.py" in missing


@pytest.mark.slow
def test_fit_of_a_file_with_other_separators_and_a_constant_column(capsys, tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"left": rng.normal(size=200), "[/same]": 7.0})
    table["y"] = 2.0 * table["left"] + 0.1 * rng.normal(size=200)
    table.to_csv(tmp_path / "data.csv", index=False, sep=";", decimal=",")
    options = ["--target", "y", "--num-experts", "1", "--method", "joint_em"]
    document = json.loads(run(capsys, "fit", str(tmp_path / "data.csv"), *options, "--json"))
    assert document["in_units"]["data"]["experts"][0]["coefficients"]["left"] == pytest.approx(2.0, abs=0.05)
    assert document["diagnostics"]["constant_inputs"] == [1]
    several = json.loads(
        run(capsys, "fit", str(tmp_path / "data.csv"), *options, "--num-experts", "1,90", "--json")
    )
    first, left_out = several["selection"]
    assert first["log_likelihood"] == pytest.approx(document["log_likelihood"])
    assert first["bic"] == pytest.approx(-2 * document["log_likelihood"] + 3 * np.log(200))
    assert left_out["bic"] is None
    assert "at least" in left_out["status"]
    printed = run(capsys, "fit", str(tmp_path / "data.csv"), *options, "--separator", ";", "--decimal", ",")
    assert "left out, because they do not vary: inputs 2" in printed
    assert "separator" in refused(capsys, "fit", str(tmp_path / "data.csv"), *options, "--separator", "/")


@pytest.mark.slow
def test_fit_of_text_with_gates_and_experts_of_their_own_inputs(capsys, tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(300, 2)), columns=["dose", "age"])
    table["site"] = rng.choice(["north", "south", "west"], 300, p=[0.5, 0.3, 0.2])
    second = rng.uniform(size=300) < np.where(table["site"] == "south", 0.9, 0.2)
    table["y"] = np.where(second, -1.0, 1.0) * table["dose"] + 0.1 * rng.normal(size=300)
    file, out = tmp_path / "data.csv", tmp_path / "out"
    table.to_csv(file, index=False)
    command = ["fit", str(file), "--target", "y", "--num-experts", "2", "--method", "joint_em"]
    printed = run(
        capsys, *command, "--gate-inputs", "site", "--expert-inputs", "dose, age", "--out", str(out)
    )
    words = " ".join(printed.split())
    assert (
        "column 'site' holds text: it became 'site=south', 'site=west', against its most frequent level"
        in words
    )
    document = json.loads((out / "fit.json").read_text())
    assert document["categories"] == [{"column": "site", "reference": "north", "levels": ["south", "west"]}]
    expert = document["in_units"]["data"]["experts"][0]
    assert set(expert["coefficients"]) == {"dose", "age", "site=south", "site=west"}
    assert expert["coefficients"]["site=south"] == expert["coefficient_errors"]["site=south"] == 0.0
    assert expert["gating"]["dose"] == 0.0
    # the log odds of the second expert in the south and in the north differ by log(0.9 / 0.1) - log(0.2 / 0.8)
    error = expert["gating_errors"]["site=south"]
    assert abs(abs(expert["gating"]["site=south"]) - 3.58) < 4.0 * error < 4.0

    constant = json.loads(run(capsys, *command, "--gate", "constant", "--json"))
    assert not any(any(one["gating"].values()) for one in constant["experts"])
    assert "anywhere" in run(capsys, *command, "--gate", "constant")
    assert "did you mean site" in refused(capsys, *command, "--gate-inputs", "sites")
    assert "each input once" in refused(capsys, *command, "--expert-inputs", "dose,dose")
    assert "with a source" in refused(capsys, *command, "--gate-inputs", "site", "--stream")


def test_a_coefficient_without_a_standard_error_is_printed():
    assert _strongest({"a": 2.0, "b": -3.0}, {"a": None, "b": 0.25}) == "b -3±0.25\na +2±?"


def test_activations_json_has_the_fixed_fields(capsys):
    (row,) = json.loads(run(capsys, "activations", "relu", "--json"))
    assert row["name"] == "relu"
    assert row["noise_std"] == 0.1
    # METHOD's reference values at sigma = 0.1
    for field, value in {
        "alpha": -3.2936,
        "beta": 2.2258,
        "gamma": -1.5958,
        "c3": 0.37209,
        "c2": 0.36338,
    }.items():
        assert row[field] == pytest.approx(value, abs=6e-5 if abs(value) > 1 else 6e-6)
    assert set(row["order3"]) == {"polynomial", "centred", "least_norm", "weighted", "relaxed"}
    assert row["order"] == 3


def test_activations_of_a_users_file(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n\ndef hinge(t):\n    return jnp.maximum(t, 0.3)\n\ndef flat(t):\n    return 0 * t\n"
    )
    (row,) = json.loads(run(capsys, "activations", f"{file}:hinge", "--json"))
    assert row["order"] == 3
    (row,) = json.loads(run(capsys, "activations", f"{file}:flat", "--json"))
    assert row["order"] is None
    assert "constant" in row["reason"]
    assert "no usable order" in run(capsys, "activations", f"{file}:flat")
    assert "functions: flat, hinge" in refused(capsys, "activations", f"{file}:hindge").replace(
        "hinge, flat", "flat, hinge"
    )


def test_even_activations_have_null_where_there_is_nothing(capsys):
    (row,) = json.loads(run(capsys, "activations", "abs", "--json"))
    assert row["alpha"] is None
    assert set(row["order3"].values()) == {None}
    assert row["order"] == 4


def test_info_names_the_cache(capsys, monkeypatch, tmp_path):
    info = json.loads(run(capsys, "info", "--json"))
    assert info["precision"] == "float64"
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path))
    assert str(compilation_cache_folder()).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit"], ["--dataset"]),
        (["fit", "data.csv"], ["--target"]),
        (["fit", "missing.csv", "--target", "y"], ["missing.csv"]),
        (["fit", "--dataset", "iris"], ["iris", "diabetes"]),
        (["fit", "--dataset", "diabetes", "--target", "bmi"], ["target", "'bmi'", "disease progression"]),
        (["fit", "--dataset", "concrete", "--data-dir", "nowhere"], ["data_dir", "'nowhere'"]),
        (["fit", "data.csv", "--target", "y", "--data-dir", "."], ["--data-dir", "--dataset"]),
        (["fit", "--dataset", "diabetes", "--activation", "sigmod"], ["sigmod", "did you mean sigmoid"]),
        (["fit", "--dataset", "diabetes", "--num-experts", "40"], ["at least 871 rows", "40", "442"]),
        (["fit", "--dataset", "diabetes", "--num-experts", "few"], ["--num-experts", "few", "auto"]),
        (["fit", "--dataset", "diabetes", "--method", "magic"], ["method", "magic"]),
        (["fit", "--dataset", "diabetes", "--noise-std", "0"], ["noise_std", "0.0"]),
        (["fit", "--dataset", "diabetes", "--seed", "9" * 400], ["--seed", "a whole number", "bits"]),
        (["activations", "rellu"], ["rellu", "did you mean relu"]),
        (["activations", "relu", "--noise-std", "-1"], ["noise_std", "-1"]),
        (["activations", "nowhere.py:f"], ["nowhere.py"]),
        (["sweep", "missing.toml"], ["missing.toml"]),
        (["status", "missing-folder"], ["missing-folder"]),
    ],
)
def test_a_bad_value_is_one_line_and_exit_status_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, *arguments)
    for word in words:
        assert word in error, error
    assert list(tmp_path.iterdir()) == []


def test_interrupts_end_in_one_line(monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._RUN, Info, interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["info"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "moejax: interrupted\n"


def test_a_step_has_no_constants_and_no_warnings(recwarn):
    row = activation_row(lambda t: jnp.where(t > 0, 1.0, 0.0), 0.1)
    assert row["order"] is None or row["order"] == 0
    assert (row["c2"], row["gamma"]) == (0.0, None)
    assert not recwarn.list


def test_a_closed_pipe_ends_the_program_quietly():
    """As `moejax ... | head -c 0`: no traceback, nothing on stderr, the status of a program that SIGPIPE ended."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "moejax.cli", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.fixture
def closed_pipe():
    """A stream that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", encoding="utf-8")
    yield stream
    stream.close()  # would raise if anything were left in it


@pytest.mark.parametrize("console", [False, True])
def test_what_is_printed_into_a_closed_pipe_is_dropped(closed_pipe, console, monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    with pytest.raises(SystemExit) as caught, output_that_may_close():
        (make_console().print if console else print)("a line")
    assert caught.value.code == 141


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - closed below
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as caught, output_that_may_close():
        print("a line")
    stream.close()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "moejax: the output cannot be written: No space left on device\n"


def test_progress_goes_on_when_nobody_reads_it(closed_pipe, monkeypatch):
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    for _ in range(3):
        make_notes().print("a line")


def test_a_name_is_shown_as_it_is():
    out = io.StringIO()
    console = PlainConsole(file=out, width=80, force_terminal=True, color_system="standard")
    table = Table("[bold]head", title="[red]title[/x]")
    table.add_row("[/x] :smile: \x1b[31m \u202e")
    console.print(table)
    console.print("[link=x]y[/link] a\x07b")
    for words in (
        "[bold]head",
        "[red]title[/x]",
        "[/x] :smile: \\x1b[31m \\u202e",
        "[link=x]y[/link] a\\x07b",
    ):
        assert words in re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
    assert "\x1b[31m" not in out.getvalue()


def test_every_console_is_a_plain_one():
    """A console of Rich's own would take `[red]` in a user's name for a style."""
    package = Path(moejax.__file__).parent
    own = [
        path.name
        for path in package.rglob("*.py")
        if re.search(r"\bConsole\(", path.read_text(encoding="utf-8")) and path.name != "console.py"
    ]
    assert own == []


def test_an_error_is_one_line_that_fits_a_screen():
    line = error_line("a\nb\x1b[31m" + 5000 * "x")
    assert line.startswith("a b\\x1b[31mxxx")
    assert line.endswith(" more characters)")
    assert len(line) <= 1000
    assert error_line("short") == "short"


def test_json_has_no_word_for_a_number_that_is_not_finite(capsys):
    print_json({"a": [float("nan"), (1.5, float("inf"))], "b": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [1.5, None]], "b": "x"}


def test_a_terminal_without_a_width_still_prints(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "0")
    make_console().print("a line")
    assert capsys.readouterr().out == "a line\n"


def test_without_a_home_folder_there_is_no_cache_and_a_line_says_so(capsys, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOEJAX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    cli.main(["activations", "linear", "--quiet"])
    error = capsys.readouterr().err
    assert error.startswith("moejax: there is no home folder: compiled programs are not kept")
    assert error.count("\n") == 1
    cli.main(["info", "--quiet"])
    assert capsys.readouterr().err == ""  # it compiles nothing


def test_a_cache_that_cannot_be_written_is_done_without(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert compilation_cache_folder() is None
    cli.main(["activations", "linear", "--quiet"])
    assert "is not a folder): compiled programs are not kept" in capsys.readouterr().err
    monkeypatch.setenv("MOEJAX_CACHE_DIR", "~/x")
    assert "~" not in str(compilation_cache_folder())


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'nonsense'\nmore"), AssertionError()]
)
def test_a_platform_that_is_not_there_is_one_line(capsys, monkeypatch, tmp_path, error):
    import jax

    def no_devices():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.chdir(tmp_path)
    assert "JAX_PLATFORMS=nonsense: JAX finds no such device here" in refused(capsys, "activations", "relu")
    assert "--platform tpu: JAX finds no such device here" in refused(capsys, "info", "--platform", "tpu")
    monkeypatch.setitem(jax.config.values, "jax_platforms", "nonsense")
    from stores import made_up_store

    toml, folder, _ = made_up_store(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert "JAX_PLATFORMS=nonsense" in refused(
        capsys, "sweep", str(toml), "--workers", "1", "--out", str(tmp_path / "new")
    )
    assert sorted(tmp_path.rglob("*")) == before
    cli.main(["status", str(folder)])  # needs no device


def test_functions_of_a_file_that_exits_or_has_dataclasses(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import sys\nsys.exit(5)\n")
    assert "called exit (5)" in refused(capsys, "activations", f"{file}:f")
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\nimport jax.numpy as jnp\n\n"
        "@dataclasses.dataclass\nclass Knee:\n    at: float = 0.3\n\n"
        "print('loading')\n\ndef hinge(t):\n    return jnp.maximum(t, Knee().at)\n"
    )
    (row,) = json.loads(run(capsys, "activations", f"{file}:hinge", "--json"))
    assert row["order"] == 3


def test_results_are_written_before_they_are_printed(monkeypatch, tmp_path, closed_pipe):
    """A reader that goes away takes no file with it."""
    from stores import made_up_store

    monkeypatch.setattr("moejax.sweep.report.figures.make_figures", lambda summary: [])
    _, folder, _ = made_up_store(tmp_path)
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(folder)])
    assert caught.value.code == 141
    assert (folder / "summary.csv").stat().st_size > 500
    assert (folder / "report.html").stat().st_size > 1000


def test_an_export_replaces_a_file_whole_or_not_at_all(monkeypatch, tmp_path, capsys):
    import pandas as pd
    from stores import made_up_store

    _, folder, _ = made_up_store(tmp_path)
    target = tmp_path / "t.csv"
    target.write_text("old")

    def full(table, path, **_):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        assert "No space left" in refused(capsys, "export", str(folder), str(target))
    assert target.read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".t.csv")]
    run(capsys, "export", str(folder), str(target))
    assert len(pd.read_csv(target)) == 24
