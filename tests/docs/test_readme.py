"""What the README shows runs as printed."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import moejax

README = (Path(__file__).parents[2] / "README.md").read_text()


FIT, ACTIVATION = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "block", [pytest.param(FIT, id="fit", marks=pytest.mark.slow), pytest.param(ACTIVATION, id="activation")]
)
def test_python_examples_run(block, capsys):
    import jax

    with jax.enable_x64(False):  # as a user has it
        namespace = {}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    if "result" in namespace:
        assert namespace["result"].status == "ok"
        experts = np.asarray(namespace["experts"], np.float64)
        assert float(moejax.recovery_error(experts, namespace["result"].params.experts)) < 1e-3
        assert "recovery error" in printed
    else:
        assert not printed  # the file is a plugin, and says nothing
        assert float(namespace["moejax"].label_transform("hinge", noise_std=0.1, order=3).second_moment) > 0


def test_sweep_example_is_a_valid_spec(tmp_path):
    from moejax.sweep.spec.parse import read_spec

    (block,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert tomllib.loads(block)["name"] == "my-sweep"
    path = tmp_path / "my-sweep.toml"
    path.write_text(block)
    assert read_spec(path, ()).name == "my-sweep"


def test_linked_files_exist():
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (root / target).exists(), target
