"""The summary of experiments/regimes.py by hand, and its choice of the trials that the search has."""

import itertools
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd

from moejax.reproduce.experiment import load_module

ROOT = Path(__file__).parents[2]
EXPERIMENT = load_module(ROOT / "experiments" / "regimes.py")
GOOD, BAD = 0.001, 0.5


def table(errors):
    """One cell, from the recovery errors of each method."""
    rows = [
        {"method": method, "trial": trial, "recovery_error": error, "num_iterations": 10, "seconds": 1.0}
        for method, values in errors.items()
        for trial, error in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(shape="10x4", ratio=30)


def test_differences_are_paired_on_the_trials_that_both_methods_have():
    errors = {
        "spectral_em": [GOOD, BAD, BAD, GOOD],
        "joint_em": [GOOD] * 4,
        "gradient_nll": [BAD, BAD, GOOD, GOOD],
        "multistart": [GOOD, GOOD],
    }
    found = EXPERIMENT.summary(table(errors)).set_index("method")
    assert found["trials"].to_dict() == {"spectral_em": 4, "joint_em": 4, "gradient_nll": 4, "multistart": 2}
    np.testing.assert_allclose(found["success"][list(errors)], [0.5, 1.0, 0.5, 1.0])
    np.testing.assert_allclose(found["difference"][list(errors)], [0.0, -0.5, 0.0, -0.5])
    # differences 0, -1, -1, 0; 1, 0, -1, 0; and 0, -1: the standard deviation over the root of their number
    np.testing.assert_allclose(
        found["difference_se"][list(errors)], [0.0, 0.25, np.sqrt(0.5 / 4), 0.5 / np.sqrt(2)]
    )


def test_numbers_about_the_search_are_of_the_trials_that_it_has():
    spec = tomllib.loads((ROOT / "sweeps" / "regimes.toml").read_text())
    cells = pd.DataFrame(
        itertools.product(spec["grid"]["shape"], range(max(spec["looks"]))), columns=["shape", "trial"]
    )
    chosen = cells.query(EXPERIMENT.SEARCHED)
    expected = itertools.product(spec["search_shapes"], range(spec["search_trials"]))
    assert set(chosen.itertuples(index=False, name=None)) == set(expected)
