"""Rows are what made them: plugins with what they need from beside themselves, names, random numbers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.environment import PRNG, pin_random_numbers, visible_gpus
from moejax.registry import registered_state
from moejax.sweep import load
from moejax.sweep.plan.plugins import read_plugin, run_plugins, use_plugins

PLUGIN = """
from pathlib import Path
import jax.numpy as jnp
import moejax

plugin_files = ["shift.txt"]
SHIFT = float((Path(__file__).parent / "shift.txt").read_text())

def scaled_tanh(t):
    import helper          # found also when the function is called
    from parts.inner import TWICE
    return helper.SCALE * jnp.tanh(t) + SHIFT * TWICE * t

moejax.register_activation("scaled_tanh", scaled_tanh)
"""
SPEC = """
name = "tiny"
methods = ["joint_em"]
trials = 2
dim = 3
num_experts = 2
num_samples = 60
max_iterations = 3
activation = "scaled_tanh"
plugins = ["mine.py"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A plugin with a helper, a package and a data file; not the folder in which the command is given."""
    inner = tmp_path / "inputs"
    (inner / "parts").mkdir(parents=True)
    (inner / "mine.py").write_text(PLUGIN)
    (inner / "helper.py").write_text("SCALE = 1.0\n")
    (inner / "parts" / "inner.py").write_text("TWICE = 2.0\n")
    (inner / "shift.txt").write_text("0.25")
    (inner / "spec.toml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    yield inner
    for name in ("helper", "parts", "parts.inner"):
        sys.modules.pop(name, None)


CHANGES = {
    "helper.py": "SCALE = 3.0\n",
    "parts/inner.py": "TWICE = 3.0\n",
    "shift.txt": "0.5",
    "mine.py": PLUGIN.replace("jnp.tanh(t)", "jnp.sin(t)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_plugin_needs_is_part_of_it(folder, name):
    before = run_plugins([folder / "mine.py"])
    function = moejax.model.activations.get_activation("scaled_tanh")
    assert float(function(1.0)) == pytest.approx(np.tanh(1.0) + 0.5)
    (folder / name).write_text(CHANGES[name])
    after = run_plugins([folder / "mine.py"])
    assert before[0].digest != after[0].digest
    scale = 3.0 if name == "helper.py" else 1.0
    slope = {"parts/inner.py": 0.75, "shift.txt": 1.0}.get(name, 0.5)
    shape = np.sin(1.0) if name == "mine.py" else np.tanh(1.0)
    function = moejax.model.activations.get_activation("scaled_tanh")
    assert float(function(1.0)) == pytest.approx(scale * shape + slope)


def test_comments_change_no_digest_and_the_order_of_names_neither(folder):
    before = read_plugin(folder / "mine.py")
    (folder / "helper.py").write_text("# the scale\nSCALE   = 1.0\n")
    (folder / "unused.py").write_text("SCALE = 7.0\n")
    assert read_plugin(folder / "mine.py").digest == before.digest
    assert [helper.name for helper in before.helpers] == ["helper", "parts", "parts.inner"]


def test_a_module_that_python_finds_elsewhere_is_no_helper(folder):
    (folder / "random.py").write_text("raise ValueError('not the one of the standard library')\n")
    (folder / "jax.py").write_text("raise ValueError('not JAX')\n")
    (folder / "plain.py").write_text("import random\nimport jax\nrandom.random(), jax.numpy.ones(1)\n")
    (plugin,) = run_plugins([folder / "plain.py"])
    assert plugin.helpers == ()


def test_a_data_file_that_changes_while_a_sweep_runs_is_refused(folder):
    plugin = read_plugin(folder / "mine.py")
    (folder / "shift.txt").write_text("0.5")
    with pytest.raises(ValueError, match=r"mine\.py: plugin_files: shift\.txt: another content"):
        use_plugins([plugin])
    (folder / "shift.txt").unlink()
    with pytest.raises(ValueError, match=r"plugin_files: .*shift\.txt: cannot be read: No such file"):
        read_plugin(folder / "mine.py")


@pytest.mark.parametrize("value", ["3", "[3]", "'shift.txt'", "[name for name in ()]", "{1: 2}"])
def test_plugin_files_are_a_literal_list_of_names(tmp_path, value):
    path = tmp_path / "mine.py"
    path.write_text(f"plugin_files = {value}\n")
    with pytest.raises(ValueError, match=r"mine\.py: plugin_files: expected a list of names"):
        read_plugin(path)


def test_two_plugins_with_two_helpers_of_one_name_are_refused(folder, tmp_path):
    (tmp_path / "other.py").write_text("import helper\n")
    (tmp_path / "helper.py").write_text("SCALE = 5.0\n")
    with pytest.raises(ValueError, match=r"two different files as 'helper'"):
        run_plugins([folder / "mine.py", tmp_path / "other.py"])


def test_a_worker_of_two_sweeps_has_the_names_of_the_one_that_it_serves(tmp_path):
    plugins = []
    for number in (1, 2):
        path = tmp_path / f"plugin_{number}.py"
        path.write_text(
            f"import moejax\nmoejax.register_activation('mine', lambda t: {number}.0 * t**{number})\n"
        )
        plugins.append(read_plugin(path))
    states = []
    for index in (0, 1, 0, 1):
        use_plugins([plugins[index]])
        assert float(moejax.model.activations.get_activation("mine")(2.0)) == (2.0, 8.0)[index]
        states.append(registered_state())
    assert states[:2] == states[2:]  # the same programs again, not others
    assert states[0] != states[1]


@pytest.mark.slow
def test_a_changed_helper_makes_new_rows_and_workers_find_it(folder, tmp_path, monkeypatch):
    """In processes of their own, from another folder: what a user does."""
    out = tmp_path / "run"

    def run(*options):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "moejax",
                "sweep",
                str(folder / "spec.toml"),
                "--out",
                str(out),
                "--json",
                *options,
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert '"trials_run": 2' in run("--workers", "2")
    first = load(out)
    assert np.isfinite(first["recovery_error"]).all()
    (folder / "helper.py").write_text("SCALE = 3.0\n")
    assert '"trials_run": 2' in run("--workers", "1")
    second = load(out)
    assert '"trials_run": 0' in run("--workers", "1")  # the digest is that of another process
    assert not np.isclose(first["log_likelihood_per_sample"], second["log_likelihood_per_sample"]).any()


def test_built_in_names_are_given_away_only_if_that_is_asked_for():
    def twice(t):
        return 2.0 * t

    with pytest.raises(ValueError, match=r"activation: 'relu' is built in; .*replace=True"):
        moejax.register_activation("relu", twice)
    with pytest.raises(ValueError, match=r"method: 'joint_em' is built in"):
        moejax.register_method("joint_em", lambda key, problem, config: None, moments="none")
    with pytest.raises(ValueError, match=r"input_distribution: 'uniform' is built in"):
        moejax.register_input_distribution("uniform", lambda key, n, d, dtype: jnp.zeros((n, d), dtype))
    relu = moejax.model.activations.get_activation("relu")
    moejax.register_activation("relu", relu)  # the same again is no change
    assert registered_state() == ()
    moejax.register_activation("relu", twice, replace=True)
    assert moejax.model.activations.get_activation("relu") is twice
    assert registered_state() == (("activation", "relu", 1),)


def test_a_plugin_cannot_give_relu_to_another_function_unawares(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import jax.numpy as jnp, moejax\nmoejax.register_activation('relu', jnp.tanh)\n")
    with pytest.raises(ValueError, match=r"mine\.py: raised ValueError: activation: 'relu' is built in"):
        run_plugins([path])


def test_random_numbers_are_pinned():
    """JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE change no draw of ours."""
    names = ("jax_default_prng_impl", "jax_threefry_partitionable")
    before = {name: jax.config.values[name] for name in names}
    expected = jax.random.normal(jax.random.key(3, impl=PRNG), (5, 2))
    try:
        jax.config.update("jax_default_prng_impl", "rbg")
        jax.config.update("jax_threefry_partitionable", False)
        assert not np.array_equal(jax.random.normal(jax.random.key(3, impl=PRNG), (5, 2)), expected)
        pin_random_numbers()
        np.testing.assert_array_equal(jax.random.normal(jax.random.key(3), (5, 2)), expected)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize(
    ("given", "devices", "expected"),
    [
        (None, [], ()),
        (None, ["nvidia1", "nvidia0", "nvidiactl"], ("0", "1")),
        ("NoDevFiles", [], ()),
        ("0", [], ()),
        ("", ["nvidia0"], ()),
        ("-1", ["nvidia0"], ()),
        ("1, 0", ["nvidia0", "nvidia1"], ("1", "0")),
        ("0,-1,1", ["nvidia0", "nvidia1"], ("0",)),
        ("GPU-8932f937,MIG-d5", ["nvidia0"], ("GPU-8932f937", "MIG-d5")),
    ],
)
def test_a_variable_makes_no_gpu(tmp_path, monkeypatch, given, devices, expected):
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr("moejax.environment.DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == expected


def test_a_study_of_other_code_is_not_mixed(tmp_path, monkeypatch):
    from moejax.reproduce import cell_functions as study
    from moejax.sweep.execution import provenance
    from moejax.sweep.execution.executors import InProcessExecutor
    from moejax.sweep.plan.chunks import WorkerSettings
    from moejax.sweep.store.schema import StoreError

    path = tmp_path / "study.py"
    path.write_text(
        "import pandas as pd\nfrom moejax.reproduce import Experiment\n"
        "def run_cell(cell):\n    return pd.DataFrame([{'b': cell['a'] + 1}])\n"
        "EXPERIMENT = Experiment(spec='study.toml', run_cell=run_cell, figure=print)\n"
    )
    part = tmp_path / "cell.parquet"
    unit = study.StudyUnit(path, ({"a": 1},), (part,), True, WorkerSettings(True, None))
    assert study.run_study([unit], InProcessExecutor).cells_run == 1
    assert study.run_study([unit], InProcessExecutor).cells_run == 0
    now = provenance.made_by()
    monkeypatch.setattr(provenance, "made_by", lambda: now | {"source": 64 * "0"})
    with pytest.raises(
        StoreError, match=r"source has the digest .* and this is 000000000000; .*--across-versions"
    ):
        study.run_study([unit], InProcessExecutor)
    assert study.run_study([unit], InProcessExecutor, across_versions=True).table["b"].tolist() == [2]
