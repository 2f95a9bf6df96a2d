"""Kinds of input for fuzz.py: specs and --set.

No program is compiled: specs are planned, never run.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_values import NUMBERS, WORDS, any_value, fitting_value, last, mutated, pick, quoted, toml_text

from moejax.console import PlainConsole
from moejax.methods import method as methods
from moejax.sweep.plan.plan import make_plan
from moejax.sweep.report.terminal import print_plan
from moejax.sweep.spec.fields import FIELDS
from moejax.sweep.spec.parse import TOP_LEVEL, parse_spec, read_spec


def last_input() -> str:
    """The text of the last input."""
    return last[0]


def spec_document(rng: np.random.Generator) -> dict[str, Any]:
    """A spec that is sound except in a few places."""
    names = list(rng.permutation(list(FIELDS)))
    chaos = rng.random() < 0.7
    document: dict[str, Any] = {
        "methods": list(rng.permutation(list(methods.method_names()))[:2]),
        "trials": 3,
    }

    def value(name: str) -> Any:
        return any_value(rng) if chaos and rng.random() < 0.15 else fitting_value(rng, name)

    for _ in range(rng.integers(0, 4)):
        name = names.pop()
        document[name] = value(name)
    grid = {}
    for _ in range(rng.integers(0, 4)):
        name = names.pop()
        grid[name] = [value(name) for _ in range(rng.integers(1, 4))]
    if grid:
        document["grid"] = grid
    if rng.random() < 0.3:
        length = int(rng.integers(1, 4))
        document["zip"] = [
            {name: [value(name) for _ in range(length)] for name in (names.pop(), names.pop())}
        ]
    if rng.random() < 0.3:
        name = str(pick(rng, list(FIELDS)))
        document["exclude"] = [
            {name: value(name), **({"method": any_value(rng)} if rng.random() < 0.3 else {})}
        ]
    if rng.random() < 0.2:
        document.pop("trials")
        target = {"metric": "recovery_error", "mcse": 0.01, "statistic": "mean"}
        table: dict[str, Any] = {"target": target, "min_trials": 4, "max_trials": 100}
        if chaos:
            pick(rng, [target, table])[
                str(pick(rng, ["metric", "mcse", "min_trials", "max_trials", "statistic"]))
            ] = any_value(rng)
        document["precision"] = table
    if chaos and rng.random() < 0.4:
        document[str(pick(rng, [*TOP_LEVEL, *FIELDS, *WORDS[:20]]))] = any_value(rng)
    document.pop("plugins", None)
    return document


def document_text(document: dict[str, Any]) -> str:
    """The text of a spec as TOML."""
    plain = {
        key: value for key, value in document.items() if key not in ("grid", "zip", "exclude", "precision")
    }
    lines = [f"{key_text(key)} = {toml_text(value)}" for key, value in plain.items()]
    for name in ("grid", "precision", "zip", "exclude"):
        tables = document.get(name)
        for table in tables if isinstance(tables, list) else [tables]:
            if isinstance(table, dict):
                lines += [f"[[{name}]]" if name in ("zip", "exclude") else f"[{name}]"]
                lines += [f"{key_text(key)} = {toml_text(value)}" for key, value in table.items()]
            elif table is not None:
                lines.insert(0, f"{name} = {toml_text(table)}")
    return "\n".join(lines) + "\n"


def key_text(key: str) -> str:
    """A key, quoted if necessary."""
    return key if key.isascii() and key.replace("_", "").isalnum() else quoted(key)


def plan_is_sound(plan: Any) -> str | None:
    """Check that an accepted plan has finite, positive numbers, and can be printed and stored."""
    for bucket in plan.buckets:
        numbers = (bucket.work, bucket.memory_bytes, bucket.chunk_size, bucket.vmap_width)
        if not all(math.isfinite(number) and number >= 1 for number in numbers):
            return f"the bucket {bucket.label} has {numbers}"
    for cell in plan.cells[:50]:
        for name, value in cell.fields().items():
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(item, float) and not math.isfinite(item) for item in values):
                return f"{name} = {value} was accepted"
    plan.spec.to_json().encode()
    print_plan(PlainConsole(file=io.StringIO(), width=80), plan, 2)
    return None


def planned(text: str, overrides: Sequence[str] = ()) -> str | None:
    """Parse and plan a text."""
    last[0] = text + "".join(f"\n# --set {override!r}" for override in overrides)
    return plan_is_sound(
        make_plan(parse_spec(text, "fuzz.toml", overrides), vmap_width=1, worker_memory_bytes=2**32)
    )


def spec_text(rng: np.random.Generator) -> str | None:
    """A spec with some values of other types and sizes."""
    return planned(document_text(spec_document(rng)))


def spec_garbled(rng: np.random.Generator) -> str | None:
    """A spec whose text was damaged."""
    return planned(mutated(rng, document_text(spec_document(rng))))


def spec_file(rng: np.random.Generator) -> str | None:
    """Bytes of a spec file: byte order marks, other encodings, and bytes that are no text."""
    text = document_text(spec_document(rng))
    encoding = pick(rng, ["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-8"])
    content = bytearray(text.encode(encoding, "replace"))
    for _ in range(rng.integers(0, 4)):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.toml"
        path.write_bytes(content)
        last[0] = repr(bytes(content))
        return plan_is_sound(make_plan(read_spec(path)))


def overrides(rng: np.random.Generator) -> str | None:
    """--set with keys and values of all kinds, over a sound spec."""
    document = {
        "methods": ["joint_em"],
        "trials": 3,
        "dim": 3,
        "num_experts": 2,
        "grid": {"noise_std": [0.1, 0.2]},
    }
    if rng.random() < 0.2:
        document[str(pick(rng, ["grid", "zip", "precision", "exclude"]))] = any_value(rng)
    texts = [override(rng) for _ in range(rng.integers(1, 4))]
    return planned(document_text(document), texts)


def override(rng: np.random.Generator) -> str:
    """One KEY=VALUE."""
    keys = [
        *FIELDS,
        *TOP_LEVEL,
        "grid.dim",
        "grid.",
        "precision.max_trials",
        "precision.target.mcse",
        "precision",
        "zip.dim",
    ]
    keys += ["precision." + "a." * 3000 + "b", "method", "", "dim ", "Dim", "exclude.dim", "n", "="]
    key = str(pick(rng, keys if rng.random() < 0.5 else list(FIELDS)))
    kind = rng.random()
    if kind < 0.45 and key in FIELDS:
        value = fitting_value(rng, key)
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    elif kind < 0.75:
        value = any_value(rng)
        text = toml_text(value) if rng.random() < 0.6 else str(pick(rng, [*NUMBERS[:14], *WORDS]))
    else:
        marks = [
            "[",
            "]",
            ",",
            "{",
            '"',
            "=",
            "1",
            "x",
            " ",
            "[[",
            "0x" + "f" * 5000,
            "[" * 3000,
            "9" * 5000,
            "\n",
            ".5",
            "1.",
        ]
        text = "".join(pick(rng, marks) for _ in range(rng.integers(0, 6)))
    return f"{key}={text}" if rng.random() < 0.95 else text


KINDS: dict[str, Callable[[np.random.Generator], str | None]] = {
    "spec_text": spec_text,
    "spec_garbled": spec_garbled,
    "spec_file": spec_file,
    "overrides": overrides,
}
SHARES = {"spec_text": 3.0, "overrides": 3.0}
