"""Sweeps from Python: `moejax.sweep.run` takes files, mappings and specs, and leaves its process as it was."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tomllib

import jax
import numpy as np
import pandas as pd
import pytest
from test_sweep_run import fake  # noqa: F401 - a fixture

import moejax
from moejax.checks import NoResultError
from moejax.sweep import SpecError, load, load_runs, read_spec


def process_state() -> dict:
    """What a caller's other code depends on."""
    loggers = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
    return {
        "environment": dict(os.environ),
        "jax": dict(jax.config.values),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "hooks": (sys.excepthook, sys.unraisablehook),
        "levels": [logging.getLogger(name).level for name in loggers],
    }


@pytest.fixture
def other_random_numbers():
    """JAX's configuration as a caller may have it: a sweep draws its own numbers all the same."""
    jax.config.update("jax_threefry_partitionable", False)
    yield
    jax.config.update("jax_threefry_partitionable", True)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        pytest.param({"workers": 2}, marks=pytest.mark.slow),
        {"workers": 1, "dry_run": True},
        {"workers": 2, "dry_run": True},
    ],
    ids=str,
)
def test_the_process_is_as_it_was(fake, tmp_path, monkeypatch, capsys, other_random_numbers, options):  # noqa: F811
    import distributed  # noqa: F401 - it sets levels of loggers when it is imported

    toml, plugin = fake
    for name in ("XLA_FLAGS", "NPROC", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = process_state()
    table = moejax.sweep.run(toml, plugins=[plugin], out=tmp_path / "run", **options)
    assert process_state() == before
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    if "dry_run" in options:
        assert table["cells"].sum() == 12
        assert not (tmp_path / "run").exists()
        return
    assert len(table) == 360
    (record,) = load_runs(tmp_path / "run")
    assert record["prng"] == "threefry2x32, partitionable"
    assert ("multi_thread_eigen=false" in record["xla_flags"]) == (options["workers"] == 2)


def test_after_an_error_the_process_is_as_it_was(fake, tmp_path, other_random_numbers):  # noqa: F811
    toml, plugin = fake
    before = process_state()
    with pytest.raises(NoResultError, match="no trial has a result"):
        moejax.sweep.run(
            toml,
            plugins=[plugin],
            out=tmp_path / "run",
            workers=1,
            overrides={"trials": 20, "activation": "always_raises"},
        )
    with pytest.raises(SpecError, match="activation: unknown activation 'nope'"):
        moejax.sweep.run(toml, plugins=[plugin], workers=1, overrides={"activation": "nope"})
    assert process_state() == before


def test_a_file_a_mapping_and_a_spec_are_one_sweep(fake, tmp_path, monkeypatch):  # noqa: F811
    toml, plugin = fake
    mapping = tomllib.loads(toml.read_text())
    mapping["grid"]["num_samples"] = tuple(np.array(mapping["grid"]["num_samples"]))
    monkeypatch.chdir(tmp_path)
    options = {"plugins": [str(plugin)], "workers": 1}
    table = moejax.sweep.run(str(toml), out="file", **options)
    pd.testing.assert_frame_equal(load("file"), table)
    for number, spec in enumerate((mapping, read_spec(toml))):
        again = moejax.sweep.run(spec, out=f"{number}", **options)
        pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert mapping == mapping | {"name": "fake", "trials": 30}
    fewer = {"trials": 10, "grid.noise_std": np.array([0.1, 0.3])}
    changed = moejax.sweep.run(mapping, overrides=fewer, **options)
    assert len(changed) == 2 * 3 * 2 * 10
    assert (tmp_path / "runs" / "fake" / "store.sqlite").is_file()
    texts = ("trials=10", "grid.noise_std=0.1,0.3")
    same = moejax.sweep.run(toml, overrides=texts, out="texts", **options)
    pd.testing.assert_frame_equal(same, changed, check_exact=True)


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ({"trials": 3}, {}, "sweep: methods: missing"),
        ({"methods": ["spectral"], "trials": 3, "dimm": 3}, {}, "sweep: dimm: unknown field; did you mean dim"),
        ({"methods": ["spectral"], "trials": 3}, {"overrides": {"tirals": 5}}, "tirals=5: unknown key; did you mean trials"),
        ({"methods": ["spectral"], "trials": 3}, {"workers": 0}, "--workers 0: expected a number of at least 1"),
        ("missing.toml", {}, "missing.toml: cannot read the spec"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_line(tmp_path, monkeypatch, spec, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        moejax.sweep.run(spec, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checked_spec_takes_no_overrides(fake):  # noqa: F811
    with pytest.raises(SpecError, match="overrides: expected a path or a mapping"):
        moejax.sweep.run(read_spec(fake[0]), overrides={"trials": 3})
    with pytest.raises(ValueError, match="worker_timout"):
        moejax.sweep.run(fake[0], worker_timout=3.0)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("retry_faild", "did you mean retry_failed?"),
        ("plugin", "did you mean plugins?"),
        ("set", "known: out, dry_run, workers, overrides, plugins, quiet, cluster, "),
    ],
)
def test_an_unknown_option_is_one_line_with_the_nearest_names(option, hint):
    with pytest.raises(ValueError, match=f"^{option}: unknown option of moejax.sweep.run; {re.escape(hint)}"):
        moejax.sweep.run({}, **{option: 1})
