"""`moejax fit` of folders, read in batches by this process or by the workers of a Dask scheduler."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from dask_programs import scheduler_and_workers
from distributed import Client

from moejax.cli import program as cli
from moejax.environment import compile_fast_everywhere

N = 60_000
OPTIONS = ("--target", "y", "--num-experts", "2", "--method", "spectral_em")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of two lines in twelve files."""
    place = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(0)
    z = random.normal(size=(N, 3))
    first = random.uniform(size=N) < 1 / (1 + np.exp(-2.0 * z[:, 2]))
    y = np.where(first, z[:, 0] + 1.0, z[:, 1]) + 0.2 * random.normal(size=N)
    frame = pd.DataFrame(z * [1.0, 10.0, 0.1], columns=["a", "b", "c"]).assign(y=y)
    for number, rows in enumerate(np.array_split(np.arange(N), 12)):
        frame.iloc[rows].to_parquet(place / f"part-{number:02d}.parquet", index=False)
    return place


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "cache"))


def fitted(out):
    return json.loads((out / "fit.json").read_text())


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The fit of the same rows in memory."""
    place = tmp_path_factory.mktemp("whole")
    pd.concat(map(pd.read_parquet, sorted(folder.iterdir()))).to_parquet(place / "rows.parquet", index=False)
    cli.main(["fit", str(place / "rows.parquet"), *OPTIONS, "--out", str(place / "out"), "--quiet"])
    return fitted(place / "out")


def coefficients(fit):
    experts = fit["in_units"]["data"]["experts"]
    return np.array(sorted([*e["coefficients"].values(), e["bias"], e["noise_std"]] for e in experts))


def assert_same(fit, whole):
    assert fit["status"] == whole["status"] == "ok"
    assert fit["num_samples"] == whole["num_samples"] == N
    value, other = (document["in_units"]["data"]["log_likelihood"] for document in (fit, whole))
    assert value == pytest.approx(other, abs=1e-3)
    np.testing.assert_allclose(coefficients(fit), coefficients(whole), atol=1e-5)


def test_a_folder_is_fitted_as_its_rows_in_memory_are(folder, whole, tmp_path, capsys):
    cli.main(["fit", str(folder), *OPTIONS, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "parameters, likelihood and errors are those of all 60,000 rows" in printed
    assert_same(fitted(tmp_path / "out"), whole)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "calibration.png",
        "coefficients.png",
        "convergence.png",
        "fit.json",
        "fit.moejax",
        "parameters.parquet",
        "responsibilities.png",
        "samples.parquet",
    ]
    assert (
        not list((tmp_path / "cache" / "fits").glob("*")) if (tmp_path / "cache" / "fits").exists() else True
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{folder}", "--target", "z"), "no column 'z'"),
        (("{folder}",), "expected a file or a folder and --target COLUMN"),
        (("{file}", "--target", "y", "--skip-bad-rows"), "--skip-bad-rows: goes with rows"),
        (
            ("{folder}", "--target", "y", "--cluster", "nowhere"),
            "--cluster nowhere: expected tls://HOST:PORT",
        ),
        (("{folder}", "--target", "y", "--method", "spectral"), "method: expected multistart or spectral_em"),
        (("{folder}", "--target", "y", "--separator", "#"), "separator"),
        (("{bad}", "--target", "y"), "part-00.csv: column 'a', row 2: expected a finite number, got 'x'"),
    ],
)
def test_a_bad_value_is_one_line(folder, tmp_path, capsys, arguments, words):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "part-00.csv").write_text("a,y\n1,2\nx,3\n4,5\n")
    places = {"folder": folder, "file": folder / "part-00.parquet", "bad": tmp_path / "bad"}
    given = [word.format(**places) for word in arguments]
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", *given, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def program(*arguments):
    return [sys.executable, "-m", *arguments]


def test_ctrl_c_keeps_a_checkpoint_from_which_the_same_command_continues(
    folder, whole, tmp_path, monkeypatch
):
    compile_fast_everywhere(level=0)
    command = program("moejax.cli", "fit", str(folder), *OPTIONS, "--out", str(tmp_path / "out"))
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    kept, deadline = tmp_path / "out" / ".checkpoint.npz", time.monotonic() + 120
    while not kept.exists():  # written at the end of the survey
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=120)
    assert started.returncode == 130, error
    assert "the same command continues" in error
    assert kept.exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {kept}" in "".join(done.stderr.split("\n"))
    assert_same(fitted(tmp_path / "out"), whole)
    assert not kept.exists()


@pytest.mark.slow
def test_dask_workers_read_the_batches_and_one_that_dies_is_replaced(folder, whole, tmp_path):
    compile_fast_everywhere(level=0)
    with scheduler_and_workers(tmp_path, 2) as address:
        command = program(
            "moejax.cli", "fit", str(folder), *OPTIONS, "--out", str(tmp_path / "out"), "--cluster", address
        )
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
            victim = next(iter(client.run(os.getpid).values()))
            started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            deadline = time.monotonic() + 120
            while not any("moejax" in key for keys in client.processing().values() for key in map(str, keys)):
                assert time.monotonic() < deadline
                assert started.poll() is None, started.communicate()
                time.sleep(0.005)
            os.kill(victim, signal.SIGKILL)
            _, error = started.communicate(timeout=300)
            assert started.returncode == 0, error
    assert "without TLS" in error
    assert_same(fitted(tmp_path / "out"), whole)
