"""Conditions on the rows of a table run no code, and a slip is named."""

from __future__ import annotations

import pandas as pd
import pytest

from moejax.sweep.store.filters import matching_rows

TABLE = pd.DataFrame(
    {
        "noise_std": [0.1, 0.2, 0.3],
        "method": ["spectral", "joint_em", "joint_em"],
        "order": pd.Series([None, 3, 4], dtype=object),
        "polish": [True, False, True],
        "expert_norms": pd.Series([1.0, (1.0, 2.0), 1.0], dtype=object),
        "recovery_error": [0.5, float("nan"), 0.1],
    }
)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("", [0, 1, 2]),
        ("noise_std<0.2", [0]),
        ("0.1 < noise_std <= 0.3 and not polish", [1]),
        ("method == 'joint_em' or noise_std < 0.15", [0, 1, 2]),
        ('method in ["spectral", "other"]', [0]),
        ("method not in ('spectral',)", [1, 2]),
        ("order == default", [0]),
        ("order == None", [0]),
        ("order > 3", [2]),
        ("order != 3", [0, 2]),
        ("polish == true and 0.2 <= noise_std", [2]),
        ("expert_norms == [1, 2]", [1]),
        ("recovery_error > -1", [0, 2]),
        ("recovery_error < noise_std", [2]),
        ("noise_std > -1e3", [0, 1, 2]),
    ],
)
def test_rows_that_meet_a_condition(condition, rows):
    assert matching_rows(TABLE, condition).index.tolist() == rows


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("nois_std < 1", "nois_std is no column; did you mean noise_std?"),
        ("method == joint_em", "joint_em is no column; .*a text is written in quotes"),
        ("method == 'joint'", "none of 3 rows meets it; method is never 'joint'.*joint_em"),
        ("method < 3", "method holds text, got 3"),
        ("noise_std == '0.1'", "noise_std holds numbers, got the text '0.1'"),
        ("noise_std = 0.1", "invalid syntax"),
        ("noise_std + 1 < 2", "noise_std \\+ 1 is not accepted"),
        ("noise_std", "noise_std is not accepted"),
        ("polish is True", "`is` is not accepted"),
        ("1 < 2", "expected a column"),
        ("method in 'joint_em'", "expected COLUMN in"),
        ("__import__('os').getcwd() == ''", "is not accepted; expected columns"),
        ("noise_std.values[0] < 1", "is not accepted"),
        ("(lambda: 1)() < noise_std", "is not accepted"),
        ("[noise_std for method in 'a'] == 1", "is not accepted"),
        ("not " * 5000 + "polish", "."),
        ("(" * 4000 + "polish" + ")" * 4000, "."),
    ],
)
def test_everything_else_is_refused_in_one_line(condition, words):
    with pytest.raises(ValueError, match=words) as caught:
        matching_rows(TABLE, condition)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--where ")
