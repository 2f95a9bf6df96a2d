"""Kinds of input for fuzz.py: specs, --set, stores and command-line arguments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moejax.sweep.fields import FIELDS
from moejax.sweep.spec import parse_spec

_last = [""]


def last_input() -> str:
    """The text of the input that ran last."""
    return _last[0]


def spec_fields(rng: np.random.Generator) -> None:
    """A field of a spec with a value of some other type."""
    values = ("1" + 400 * "0", "inf", "nan", "-1", "true", '"a"', "[]", "[[1]]", "1e308", "2020-01-01")
    name = str(rng.choice(list(FIELDS)))
    text = f'methods = ["joint_em"]\ntrials = 3\n{name} = {rng.choice(values)}\n'
    _last[0] = text
    parse_spec(text)


KINDS: dict[str, Callable[[np.random.Generator], str | None]] = {"spec_fields": spec_fields}
