"""Fits of rows that are read in batches, against fits of the same rows in memory."""

import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pandas as pd
import pytest

import moejax
from moejax import ArraySource, FileSource, FitOptions
from moejax.environment import compile_fast_everywhere
from moejax.fitting.pipeline import fit_rows
from moejax.fitting.streaming import files, source, survey
from moejax.fitting.streaming.checkpoint import Checkpoint
from moejax.fitting.streaming.remote import RemoteTask, run_remotely
from moejax.fitting.streaming.runners import run_here
from moejax.fitting.streaming.survey import (
    SurveyTask,
    largest_key,
    moments_of_survey,
    smallest,
    triangle_of,
)
from moejax.fitting.whitening import input_map, input_moments, map_of_moments

N, DIM, NUM_EXPERTS = 6000, 4, 2
OPTIONS = {"num_experts": NUM_EXPERTS, "method": "spectral_em", "fit_intercept": True}
KEY = jax.random.key(3)


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Several partitions and several batches in each, a subsample smaller than the sample."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (source, files):
            patch.setattr(module, "ROWS_IN_PARTITION", 1000)
        patch.setattr(source, "ROWS_AT_ONCE", 512)
        patch.setattr(survey, "ROWS_CHOSEN", 2000)
        yield


def drawn(activation="linear", seed=0):
    """Inputs with means and unequal spreads, and labels of a planted mixture of the standardised ones."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(N, DIM))
    experts, gating = 2.0 * np.eye(NUM_EXPERTS, DIM), np.zeros((NUM_EXPERTS, DIM))
    gating[0, -1] = 2.0
    prior = 1 / (1 + np.exp(-z @ gating[0]))
    chosen = (random.uniform(size=N) > prior).astype(int)
    means = np.sum(z * experts[chosen], axis=1)
    g = {"linear": lambda t: t, "relu": lambda t: np.maximum(t, 0.0)}[activation]
    y = g(means) + 0.2 * random.normal(size=N)
    return z * np.array([1.0, 10.0, 0.1, 3.0]) + np.array([5.0, -200.0, 0.0, 1.0]), y


@pytest.fixture(scope="module")
def data():
    return drawn()


@pytest.fixture(scope="module")
def in_memory(data):
    return moejax.fit(KEY, *data, **OPTIONS)


@pytest.fixture(scope="module")
def streamed(data):
    return moejax.fit(KEY, source=ArraySource(*data), **OPTIONS)


def assert_same_fit(one, other):
    """To a small part of a standard error: both end within 1e-4 nats of the same maximum."""
    assert one.status == other.status == "ok"
    assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=2e-4)
    order, own = np.argsort(other.params.experts[:, 0]), np.argsort(one.params.experts[:, 0])
    for name in ("experts", "expert_bias", "noise_std"):
        errors = getattr(other.standard_errors, name)[order]
        gap = np.abs(getattr(one.params, name)[own] - getattr(other.params, name)[order])
        assert np.all(gap <= 0.02 * errors), name
        np.testing.assert_allclose(getattr(one.standard_errors, name)[own], errors, rtol=2e-3)


def test_rows_in_batches_give_the_fit_of_all_rows(streamed, in_memory):
    assert_same_fit(streamed, in_memory)
    found = streamed.diagnostics
    assert (found["num_rows"], found["skipped_rows"], found["subsample_rows"]) == (N, 0, 2000)
    assert sum(found["effective_samples"]) == pytest.approx(N)
    assert found["num_passes"] <= 6  # the survey and a handful of Newton steps
    assert np.all(np.diff(streamed.history) >= 0)


def test_an_activation_with_a_kink_and_the_sandwich():
    x, y = drawn("relu")
    options = OPTIONS | {"activation": "relu", "covariance": "sandwich", "fit_intercept": False}
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    assert_same_fit(moejax.fit(KEY, source=ArraySource(z, y), **options), moejax.fit(KEY, z, y, **options))


@pytest.mark.parametrize("weights_are", ["counts", "reliability"])
def test_weights(data, weights_are):
    random = np.random.default_rng(1)
    weights = random.integers(0, 3, N).astype(float) if weights_are == "counts" else random.gamma(2.0, size=N)
    x, y = np.array(data[0]), np.array(data[1])
    x[weights == 0] = 7.0
    options = OPTIONS | {"weights_are": weights_are, "covariance": "sandwich"}
    assert_same_fit(
        moejax.fit(KEY, source=ArraySource(x, y, weights), **options),
        moejax.fit(KEY, x, y, weights=weights, **options),
    )


def test_the_number_of_experts_is_chosen_by_the_likelihood_of_all_rows(data):
    options = OPTIONS | {"num_experts": [1, 2]}
    streamed, whole = moejax.fit(KEY, source=ArraySource(*data), **options), moejax.fit(KEY, *data, **options)
    columns = ["num_experts", "log_likelihood", "bic", "chosen"]
    pd.testing.assert_frame_equal(streamed.selection[columns], whole.selection[columns], atol=1e-3)


@pytest.mark.parametrize("centre", [True, False])
def test_survey_has_the_moments_of_all_rows(data, centre):
    x, y = data
    x = np.column_stack([x, x[:, 0] + x[:, 1], np.full(N, 3.0)])  # a dependent and a constant column
    rows = ArraySource(x, y)
    origin = x[0]
    task = SurveyTask(origin, 2000, largest_key(2000, N), (0,))
    parts = [part for _, part in run_here(task, rows, range(len(rows.partitions)), lambda rows: None)]
    total = None
    for part in parts:
        total = task.merge(total, part)
    moments = moments_of_survey(total, origin, centre=centre)
    direct = input_moments(x, np.ones(N), centre=centre)
    np.testing.assert_allclose(
        moments.triangle.T @ moments.triangle, direct.triangle.T @ direct.triangle, rtol=1e-10, atol=1e-13
    )
    np.testing.assert_allclose(moments.origin + moments.steps * moments.mean, x.mean(axis=0), rtol=1e-12)
    found, whole = (
        map_of_moments(moments, centre=centre, precision=2.2e-16),
        input_map(x, np.ones(N), centre=centre),
    )
    assert (found.dropped, found.dependent, found.constant) == (
        whole.dropped,
        whole.dependent,
        whole.constant,
    )
    z = (x - found.mean) @ found.matrix
    np.testing.assert_allclose(z.T @ z / N, np.eye(z.shape[1]), atol=1e-9)


def test_subsample_is_uniform_and_does_not_depend_on_who_reads(data):
    rows = ArraySource(*data)
    origin = data[0][0]
    chosen = []
    for order in (range(6), reversed(range(6))):
        task, total = SurveyTask(origin, 2000, largest_key(2000, N), (5,)), None
        for index in order:
            total = task.merge(total, task(rows, index, rows.partitions[index], lambda rows: None))
        chosen.append(smallest(total.chosen, 2000))
    np.testing.assert_array_equal(chosen[0].x, chosen[1].x)
    assert len(np.unique(chosen[0].y)) == 2000
    # the mean of a third of the rows, without replacement
    error = np.std(data[1]) * np.sqrt((1 - 2000 / N) / 2000)
    assert abs(chosen[0].y.mean() - data[1].mean()) < 4 * error


@pytest.mark.parametrize("shape", [(3, 4), (300, 4), (20_000, 4), (20_001, 3)])
def test_triangle_of_blocks(shape):
    rows = np.random.default_rng(0).normal(size=shape)
    triangle = triangle_of(rows)
    assert triangle.shape == (shape[1], shape[1])
    assert not np.tril(triangle, -1).any()
    np.testing.assert_allclose(triangle.T @ triangle, rows.T @ rows, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """The rows in two Parquet files of several row groups, one in a folder of its own, beside files that do not count."""
    place = tmp_path_factory.mktemp("rows")
    frame = pd.DataFrame(data[0], columns=list("abcd")).assign(target=data[1])
    (place / "more").mkdir()
    frame[:3500].to_parquet(place / "part-0.parquet", row_group_size=400)
    frame[3500:].to_parquet(place / "more" / "part-1.parquet", row_group_size=3000, index=False)
    (place / "_metadata").write_text("nothing")
    (place / ".part.crc").write_text("nothing")
    return place


def test_a_folder_of_parquet_files(folder, in_memory):
    rows = FileSource(folder, target="target")
    assert rows.input_names == tuple("abcd")
    assert sum(rows.rows_of(part) for part in rows.partitions) == N
    assert len(rows.partitions) > 3
    assert_same_fit(moejax.fit(KEY, source=rows, **OPTIONS), in_memory)


def test_bad_rows_are_counted_in_the_result(data, tmp_path):
    frame = pd.DataFrame(data[0], columns=list("abcd")).assign(target=data[1])
    frame.loc[[10, 4000], "b"] = np.nan
    frame.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: column 'b', row 11: expected a finite number"):
        moejax.fit(KEY, source=FileSource(tmp_path / "rows.parquet", target="target"), **OPTIONS)
    rows = FileSource(tmp_path / "rows.parquet", target="target", skip_bad_rows=True)
    found = moejax.fit(KEY, source=rows, **OPTIONS).diagnostics
    assert (found["num_rows"], found["skipped_rows"]) == (N - 2, 2)


def test_sources_that_are_refused(tmp_path, data):
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 2.0]})
    frame.to_parquet(tmp_path / "one.parquet")
    with pytest.raises(ValueError, match=r"no column 'c'; .*a, b"):
        FileSource(tmp_path / "one.parquet", target="c")
    with pytest.raises(FileNotFoundError):
        FileSource(tmp_path / "none", target="a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected .parquet or .csv files in the folder, got none"):
        FileSource(tmp_path / "empty", target="a")
    frame.rename(columns={"b": "c"}).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"two.parquet: no column 'b', which .*one.parquet has"):
        FileSource(tmp_path, target="a")
    (tmp_path / "three.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="files of one kind"):
        FileSource(tmp_path, target="a")
    x = np.array(data[0])
    x[7, 2] = np.inf
    with pytest.raises(ValueError, match=r"x\[7\]: expected finite numbers"):
        moejax.fit(KEY, source=ArraySource(x, data[1]), **OPTIONS)
    with pytest.raises(ValueError, match=r"weights\[0\]: expected a number >= 0, got -1"):
        moejax.fit(KEY, source=ArraySource(*data, -np.ones(N)), **OPTIONS)
    with pytest.raises(ValueError, match="y: expected 6000 rows as in x, got 5"):
        ArraySource(data[0], data[1][:5])
    with pytest.raises(ValueError, match="x: expected no masked array"):
        ArraySource(np.ma.masked_array(data[0]), data[1])
    with pytest.raises(ValueError, match="x: expected None with a source"):
        moejax.fit(KEY, *data, source=ArraySource(*data), **OPTIONS)
    with pytest.raises(ValueError, match="method: expected multistart or spectral_em or joint_em"):
        moejax.fit(KEY, source=ArraySource(*data), **(OPTIONS | {"method": "gradient_mse"}))
    for given in ("rows.parquet", 5, ArraySource):
        with pytest.raises(ValueError, match=r"source: expected rows such as moejax\.FileSource"):
            moejax.fit(KEY, source=given, **OPTIONS)
    with pytest.raises(ValueError, match="checkpoint: expected a path"):
        moejax.fit(KEY, source=ArraySource(*data), checkpoint=5, **OPTIONS)
    with pytest.raises(ValueError, match="checkpoint: expected None without a source"):
        moejax.fit(KEY, *data, checkpoint=tmp_path / "file", **OPTIONS)


class Killed(BaseException):
    """Stands for a kill between two partitions."""


@pytest.mark.parametrize("after", [2, 9, 16])
def test_a_killed_fit_continues_where_it_was(data, tmp_path, monkeypatch, after, streamed):
    """Each partition is read once a pass, however often the fit is killed."""
    monkeypatch.setattr("moejax.fitting.streaming.checkpoint.SAVE_SECONDS", 0.0)
    options = FitOptions(method="spectral_em", fit_intercept=True)
    read = []

    def runner(task, rows, indices, on_rows):
        for index in indices:
            if len(read) == after and "killed" not in read:
                read.append("killed")
                raise Killed
            yield index, task(rows, index, rows.partitions[index], on_rows)
            read.append(index)

    def call(run):
        return fit_rows(
            KEY,
            ArraySource(*data),
            num_experts=NUM_EXPERTS,
            noise_std=None,
            options=options,
            checkpoint=tmp_path / "kept.npz",
            runner=run,
        ).result

    with pytest.raises(Killed):
        call(runner)
    assert (tmp_path / "kept.npz").exists()
    result = call(runner)
    assert result.log_likelihood == pytest.approx(streamed.log_likelihood, abs=1e-6)
    assert len(read) - 1 == 6 * result.diagnostics["num_passes"]
    assert not (tmp_path / "kept.npz").exists()


def test_a_checkpoint_of_another_fit_is_not_used(tmp_path):
    file = tmp_path / "kept.npz"
    one = Checkpoint(file, {"key": 1})
    one.put("total", (np.arange(3.0), 2), at_once=True)
    assert Checkpoint(file, {"key": 1}).get("total", (0, 0))[0].tolist() == [0.0, 1.0, 2.0]
    assert Checkpoint(file, {"key": 2}).get("total", (0, 0)) is None
    for name in ("text.npz", "arrays.npz"):
        other = tmp_path / name
        other.write_bytes(b"something else") if name == "text.npz" else np.savez(other, x=np.ones(3))
        content = other.read_bytes()
        with pytest.raises(ValueError, match="checkpoint: expected the file of an earlier fit, or a new one"):
            Checkpoint(other, {"key": 1})
        assert other.read_bytes() == content


def test_a_worker_keeps_the_rows_that_it_has_read(folder, monkeypatch):
    rows = FileSource(folder, target="target")
    task = SurveyTask(np.zeros(DIM), 2000, 1.0, (0,))
    message = RemoteTask(task, rows, rows.identity, 1, rows.partitions[1])
    first = run_remotely(message)
    monkeypatch.setattr(FileSource, "batches", None)  # a second read would fail
    second = run_remotely(message)
    assert first.rows == second.rows == rows.rows_of(rows.partitions[1])
    np.testing.assert_array_equal(first.total.triangle, second.total.triangle)


SCRIPT = """
import json, sys
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
number, processes, port, file = sys.argv[1:]
if processes != "1":
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(number))
import moejax
from moejax.fitting.streaming import source, survey
source.ROWS_IN_PARTITION, source.ROWS_AT_ONCE, survey.ROWS_CHOSEN = 1000, 512, 2000
with np.load(file) as data:
    x, y = data["x"], data["y"]
options = dict(num_experts=2, method="spectral_em", fit_intercept=True)
result = moejax.fit(jax.random.key(3), source=moejax.ArraySource(x, y), **options)
x[5500, 1] = np.nan
try:
    moejax.fit(jax.random.key(3), source=moejax.ArraySource(x, y), **options)
except ValueError as error:
    print(json.dumps([len(jax.local_devices()), jax.process_count(), result.log_likelihood, result.diagnostics["num_rows"],
                      result.params.experts.tolist(), str(error)]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "processes"), [(4, 1), (1, 2)])
def test_devices_and_processes(data, tmp_path, devices, processes, streamed, monkeypatch, unused_port):
    """Rows on several devices, and partitions shared by processes of jax.distributed, give the same fit, or the same error."""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
    compile_fast_everywhere(level=0)
    np.savez(tmp_path / "data.npz", x=data[0], y=data[1])
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    started = [
        subprocess.Popen(
            [*command, str(number), str(processes), str(unused_port), str(tmp_path / "data.npz")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        here, count, value, rows, experts, error = json.loads(out.splitlines()[-1])
        assert (here, count, rows) == (devices, processes, N)
        assert value == pytest.approx(streamed.log_likelihood, abs=1e-6)
        np.testing.assert_allclose(experts, streamed.params.experts, rtol=1e-7, atol=1e-7)
        assert error.startswith("x[5500]: expected finite numbers")


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
