"""docs/sweeps.md names every field, key and column there is."""

from pathlib import Path

import pytest

from moejax.model.inputs import input_distribution_names
from moejax.moments.label_transforms import TRANSFORM_KINDS
from moejax.sweep.spec.fields import FIELDS
from moejax.sweep.spec.precision import PRECISION_KEYS, STATISTICS
from moejax.sweep.trial.measures import metric_names

TEXT = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "names", [FIELDS, PRECISION_KEYS, STATISTICS, TRANSFORM_KINDS, metric_names(), input_distribution_names()]
)
def test_every_name_is_told(names):
    assert names
    assert [name for name in names if name not in TEXT] == []


def test_defaults_are_those_of_the_program():
    assert (FIELDS["num_restarts"].default, FIELDS["max_iterations"].default) == (16, 100)
    sizes = [FIELDS[name].default for name in ("dim", "num_experts", "num_samples")]
    assert f"| {', '.join(map(str, sizes))} |" in TEXT
