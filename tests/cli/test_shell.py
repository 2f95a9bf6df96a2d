"""In a shell: options mean what they say, files come before words, and nothing but the result is on stdout."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.table import Table
from stores import made_up_store

import moejax
from moejax.cli import program as cli
from moejax.cli.options import Info, Sweep
from moejax.console import PlainConsole
from moejax.files import folder_for_results
from moejax.pictures import own_style, save_picture
from moejax.sweep import read_spec

SPEC = 'name = "tiny"\nmethods = ["joint_em"]\ntrials = 6\ndim = 3\nnum_experts = 2\nnum_samples = 200\n'


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(cli, "keep_programs", lambda: None)


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(SPEC)
    return "a.toml"


def plan(capsys, *arguments: str) -> dict:
    """What a dry run says."""
    cli.main(["sweep", *arguments, "--dry-run", "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.toml", "--set", "trials=7", "--set", "dim=5"],
        ["a.toml", "--set", "trials=7", "dim=5"],
        ["--set", "trials=7", "dim=5", "a.toml"],
        ["--set", "trials=7", "a.toml", "--set", "dim=5"],
        ["--set", "trials = 7", "--set=dim=5", "a.toml"],
    ],
)
def test_every_setting_counts_wherever_it_stands(spec, capsys, arguments):
    said = plan(capsys, *arguments)
    assert said["trials"] == 7
    assert "d=5" in said["programs"][0]["label"]


@pytest.mark.parametrize("between", [["--plugin"], []])
def test_every_plugin_counts(spec, tmp_path, capsys, between):
    for name in ("pa", "pb"):
        Path(f"{name}.py").write_text(
            f"import moejax\nmoejax.register_activation('{name}', lambda t: t + t**2)\n"
        )
    said = plan(capsys, "--plugin", "pa.py", *between, "pb.py", spec, "--set", "activation=pa,pb")
    assert said["cells"] == 2


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"moejax {moejax.__version__}\n"


def test_a_spec_from_stdin_is_read_once(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(SPEC.encode())))
    read = read_spec(Path("-"), ["trials=9"])
    assert (read.name, read.trials, read.places.text) == ("tiny", 9, SPEC)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_spec_with_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "a.toml"
    path.write_bytes(SPEC.replace("tiny", "größe").encode(encoding))
    assert read_spec(path).name == "größe"


def test_the_table_on_stdout_and_packed(tmp_path, capsys):
    _, folder, _ = made_up_store(tmp_path)
    cli.main(["export", str(folder), "-"])
    shown = pd.read_csv(io.StringIO(capsys.readouterr().out))
    cli.main(["export", str(folder), str(tmp_path / "t.csv.gz")])
    with gzip.open(tmp_path / "t.csv.gz", "rt") as file:
        pd.testing.assert_frame_equal(pd.read_csv(file), shown)
    first = (tmp_path / "t.csv.gz").read_bytes()
    cli.main(["export", str(folder), str(tmp_path / "t.csv.gz")])
    assert (tmp_path / "t.csv.gz").read_bytes() == first


def test_a_tilde_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = cli.with_homes(Sweep(Path("~/a.toml"), out=Path("~/r"), plugin=(Path("~/p.py"), Path("q.py"))))
    assert (command.spec, command.out) == (tmp_path / "a.toml", tmp_path / "r")
    assert command.plugin == (tmp_path / "p.py", Path("q.py"))
    with pytest.raises(ValueError, match=r"--out: ~nobody-of-this-name/r: "):
        cli.with_homes(Sweep(Path("a"), out=Path("~nobody-of-this-name/r")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--dataset", "diabetes", "--data-dir", "nope"], "data_dir: 'diabetes' is in no folder"),
        (["status", "a.toml"], "a.toml: is a file; expected a folder that `moejax sweep` has written"),
        (
            ["fit", "--dataset", "diabetes", "--num-experts", "1", "--num-starts", "1", "--out", "/proc/x"],
            "--out /proc/x",
        ),
        (["fit", "nope.csv", "--target", "y"], "nope.csv: No such file or directory"),
        (["sweep", "a.toml", "--set", "name=' '"], "expected a name that can be a folder's"),
        (["sweep", "a.toml", "--set", "trials=1" + 400 * "0"], "trials: 1000"),
    ],
)
def test_what_cannot_be_meant_is_one_line(spec, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    assert said.err.startswith("moejax: ")
    assert said.err.count("\n") == 1
    assert words in said.err


def test_a_folder_gets_all_files_or_none(tmp_path):
    out = tmp_path / "new" / "folder"

    def fill_the_disk() -> None:
        with folder_for_results(out, "--out") as scratch:
            (scratch / "a").write_text("half")
            raise OSError(28, "disk full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    (out / "a").write_text("old")
    with folder_for_results(out, "--out") as scratch:
        (scratch / "a").write_text("new")
        (scratch / "b").write_text("new")
        assert (out / "a").read_text() == "old"
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a": "new", "b": "new"}
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"--out .*file: cannot be written"),
        folder_for_results(tmp_path / "file", "--out"),
    ):
        pass


def test_figures_are_the_same_whatever_matplotlibrc_says(tmp_path):
    import matplotlib
    from matplotlib.figure import Figure

    def draw(name: str) -> bytes:
        with own_style():
            figure = Figure()
            figure.subplots().plot([1, 2], label="a $x$")
            save_picture(figure, tmp_path / name)
        return (tmp_path / name).read_bytes()

    expected = {kind: draw(f"a.{kind}") for kind in ("png", "pdf")}
    changed = {"font.size": 30, "text.usetex": True, "figure.dpi": 7, "axes.facecolor": "red"}
    with matplotlib.rc_context(changed):
        assert {kind: draw(f"b.{kind}") for kind in expected} == expected
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.slow
def test_a_notebooks_backend_and_an_ascii_stdout_lose_nothing(tmp_path):
    """In a process of its own: matplotlib looks at MPLBACKEND when it is imported, Python at PYTHONIOENCODING when it starts."""
    _, folder, _ = made_up_store(tmp_path)
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONIOENCODING": "ascii",
        "MOEJAX_CACHE_DIR": "",
    }
    command = [sys.executable, "-m", "moejax", "report", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"?" in done.stdout  # the sign of plus or minus
    written = {path.name for path in folder.iterdir()}
    assert {"summary.csv", "figure.png", "figure.pdf", "report.html"} <= written


def test_a_plugin_that_prints_leaves_stdout_to_the_result(spec, capsys):
    Path("p.py").write_text("print('hello from the plugin')\n")
    assert plan(capsys, spec, "--plugin", "p.py")["trials"] == 6  # what was printed is JSON


@pytest.mark.parametrize("width", [1, 20, 80])
def test_a_narrow_terminal_gets_numbers(width, capsys):
    table = Table("expert", title="What each expert does")
    table.add_column("log-likelihood", justify="right")
    table.add_column("setting")
    table.add_row("1", "-1234.5678", "some words that may break")
    PlainConsole(width=width).print(table)
    said = capsys.readouterr().out
    assert "…" not in said
    for whole in ("log-likelihood", "-1234.5678", "words", "expert"):
        assert whole in said


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.02, 0.5])
def test_ctrl_c_while_it_starts_is_one_line(tmp_path, pause):
    import signal
    import time

    program = subprocess.Popen(
        [sys.executable, "-m", "moejax", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    maps = Path(f"/proc/{program.pid}/maps")
    while program.poll() is None and "numpy" not in maps.read_text():  # Python itself has started
        time.sleep(0.01)
    time.sleep(pause)
    program.send_signal(signal.SIGINT)
    said = program.communicate(timeout=60)
    assert (program.returncode, said) == (130, (b"", b"moejax: interrupted\n"))


def test_nans_that_jax_shall_stop_at_are_one_line(spec, capsys, monkeypatch):
    def stopped(command):
        raise FloatingPointError("invalid value (nan) encountered in jit(f)")

    monkeypatch.setitem(cli._RUN, Info, stopped)
    with pytest.raises(SystemExit):
        cli.main(["info"])
    assert capsys.readouterr().err.startswith(
        "moejax: JAX_DEBUG_NANS: invalid value (nan) encountered in jit(f); "
    )


def test_a_disk_that_is_full_when_a_fit_is_saved_is_named(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moejax.cli.fit.write_fit", full)
    out = tmp_path / "fitted"
    with pytest.raises(SystemExit) as caught:
        cli.main(
            ["fit", "--dataset", "diabetes", "--num-experts", "1", "--method", "joint_em", "--out", str(out)]
        )
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"moejax: --out {out}: cannot be written: No space left on device\n"
    assert not out.exists()
