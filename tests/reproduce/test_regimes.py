"""The summary of experiments/regimes.py by hand, and its choice of the trials that the search has."""

import itertools
import tomllib
from pathlib import Path
from types import SimpleNamespace

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


def test_the_search_has_the_first_trials_and_cells_near_the_border_more(monkeypatch):
    """A cell ends at the first look at which both paired differences have a small standard error."""
    monkeypatch.setattr(EXPERIMENT, "_prepared", lambda cell: dict.fromkeys(EXPERIMENT.METHODS, (None, 0.0)))
    monkeypatch.setattr(EXPERIMENT, "_search", lambda cell, spec, hyperparameters, key: (GOOD, 5))
    cell = {"shape": "10x2", "ratio": 30, "looks": [4, 8], "seed": 0, "largest_error": 0.1}
    cell |= {"search_shapes": ["10x2"], "search_trials": 6}
    for errors, trials, searched in (([GOOD], 4, 4), ([GOOD, BAD, BAD], 8, 6)):
        cycle = itertools.cycle(errors)
        monkeypatch.setattr(
            EXPERIMENT,
            "run_trials",
            lambda *_, cycle=cycle: SimpleNamespace(recovery_error=[next(cycle)], num_iterations=[3]),
        )
        found = EXPERIMENT.run_cell(cell).groupby("method")["trial"].apply(list)
        for method in EXPERIMENT.METHODS:
            assert found[method] == list(range(trials))
        assert found["multistart"] == list(range(searched))


def test_numbers_about_the_search_are_of_the_trials_that_it_has():
    spec = tomllib.loads((ROOT / "sweeps" / "regimes.toml").read_text())
    cells = pd.DataFrame(
        itertools.product(spec["grid"]["shape"], range(max(spec["looks"]))), columns=["shape", "trial"]
    )
    chosen = cells.query(EXPERIMENT.SEARCHED)
    expected = itertools.product(spec["search_shapes"], range(spec["search_trials"]))
    assert set(chosen.itertuples(index=False, name=None)) == set(expected)
