"""Random values of every type, texts, and damage to texts, for fuzz_sweeps.py and fuzz_stores.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.sweep.spec.fields import FIELDS

last = [""]
"""The text of the last input."""

WORDS = (
    "relu", "linear", "default", "history", "path", "kmeans", "known", "estimated", "spectral", "joint_em", "nope", "",
    " ", "[red]", "[/x]", "[link=x]y[/link]", ":smile:", "é", "\u202e", "\x1b[31m", "\x00", "a" * 3000, "a\nb", "../x", "~",
    "$x^{", "%s", "{0}", "-1", "1e5", "nan", "None", "true", "method", "recovery_error", "mean", "\ud800", "名前", "_", "'", '"',
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 10, 200, 1000, 10**6, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, -(10**400),
    0.0, -0.0, 0.1, 0.5, 1.0, 2.5, 90.0, 1e-300, 5e-324, 1e30, 1e308, 1.7e308, -1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip


def pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    """One of the values, unchanged."""
    return values[int(rng.integers(len(values)))]


def any_value(rng: np.random.Generator, depth: int = 0) -> Any:
    """A value of any type of TOML and JSON."""
    kind = rng.random()
    if kind < 0.4:
        return pick(rng, NUMBERS)
    if kind < 0.7:
        return pick(rng, WORDS)
    if kind < 0.78:
        return bool(rng.random() < 0.5)
    if kind < 0.82:
        return deep(int(pick(rng, [2, 40, 400, 5000])), int(rng.integers(2)))
    if depth > 2:
        return []
    if kind < 0.95:
        return [any_value(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    return {str(pick(rng, [*FIELDS, *WORDS])): any_value(rng, depth + 1) for _ in range(rng.integers(0, 3))}


def deep(levels: int, table: int) -> Any:
    """A list, or a table, of this depth."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if table else [value]
    return value


def fitting_value(rng: np.random.Generator, name: str) -> Any:
    """A value of the field's own type, mostly a sensible one."""
    return pick(rng, GOOD_VALUES.get(name, (FIELDS[name].default,)))


GOOD_VALUES: dict[str, tuple[Any, ...]] = {
    "activation": ("linear", "relu", "sigmoid", "abs", "tanh"),
    "dim": (1, 2, 3, 5, 10, 1e2),
    "num_experts": (1, 2, 3, 10),
    "num_samples": (50, 200, 1000, 1e4, 10**9),
    "noise_std": (0.1, 1, 0.01, 1e-12, 1e12),
    "gating_norm": (0, 1.0, 30.0),
    "gating_angle": (0, 45.0, 90),
    "expert_correlation": (0.0, -0.4, 0.99),
    "expert_norms": (1.0, [1.0, 2.0], [1, 2, 3]),
    "input_distribution": ("standard_normal", "uniform", "student_t"),
    "fit_num_experts": (1, 2, 4, "default"),
    "noise_knowledge": ("known", "estimated"),
    "transform": ("weighted", "polynomial", "centred", "least_norm"),
    "order": (3, 4, "default"),
    "num_starts": (1, 8, "default"),
    "polish": (True, False),
    "max_iterations": (1, 50),
    "record": ([], ["history"], ["path", "history"]),
}


def toml_text(value: Any) -> str:
    """A value as TOML; very deep nesting is written without recursion."""
    opened, closed = "", ""
    while isinstance(value, list | dict) and len(value) == 1 and (isinstance(value, list) or "a" in value):
        opened, closed = (
            opened + ("[" if isinstance(value, list) else "{a = "),
            ("]" if isinstance(value, list) else "}") + closed,
        )
        value = value[0] if isinstance(value, list) else value["a"]
    if isinstance(value, list):
        inner = "[" + ", ".join(map(toml_text, value)) + "]"
    elif isinstance(value, dict):
        inner = "{" + ", ".join(f"{quoted(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, bool):
        inner = str(value).lower()
    elif isinstance(value, str):
        inner = quoted(value)
    else:
        inner = str(value)
    return opened + inner + closed


def quoted(text: str) -> str:
    """A TOML string, escapes as JSON has them (a lone surrogate is no TOML, but is sent too)."""
    return json.dumps(text).replace("\\/", "/")


def mutated(rng: np.random.Generator, text: str) -> str:
    """A text with some characters changed, repeated, removed or inserted."""
    characters = list(text)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(characters) + 1))
        action = rng.integers(4)
        if action == 0:
            characters[place:place] = pick(
                rng, ["[", "]", "{", "}", '"', "'", "=", "\n", "#", ",", ".", "\x00", "\ufeff", "9" * 5000]
            )
        elif action == 1:
            del characters[place : place + int(rng.integers(1, 20))]
        elif action == 2:
            characters[place:place] = characters[max(place - 30, 0) : place]
        elif place < len(characters):
            characters[place] = chr(int(rng.integers(1, 0x3000)))
    return "".join(characters)
