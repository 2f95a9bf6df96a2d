"""The summary of experiments/scale.py on times of known exponents."""

from pathlib import Path

import numpy as np
import pandas as pd

from moejax.reproduce.experiment import load_module

EXPERIMENT = load_module(Path(__file__).parents[2] / "experiments" / "scale.py")


def test_exponents_are_those_of_the_times():
    sizes, passes = np.array([100, 400, 6400]), np.array([10, 20, 80])  # passes grow with n to the power 1/2
    many = {"axis": "num_samples", "method": "spectral_em", "rows": "in memory", "num_samples": sizes}
    one = {"axis": "dim", "method": "spectral_wide", "rows": "on the device", "dim": [20]}
    table = pd.concat(
        [
            pd.DataFrame(many | {"passes": passes, "seconds": 3e-4 * sizes**1.5}),
            pd.DataFrame(one | {"passes": [5], "seconds": [1.0]}),
        ]
    )
    found = EXPERIMENT.summary(table).set_index("axis")
    assert found["fits"].to_dict() == {"num_samples": 3, "dim": 1}
    np.testing.assert_allclose(found["exponent_of_seconds"], [1.5, np.nan])
    np.testing.assert_allclose(found["exponent_of_pass_seconds"], [1.0, np.nan])
