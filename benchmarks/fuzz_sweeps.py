"""Kinds of input for fuzz.py: specs, --set, plugins and command lines.

Nothing is compiled: specs are planned, never run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_stores import sound_folder
from fuzz_values import NUMBERS, WORDS, any_value, fitting_value, last, mutated, pick, quoted, toml_text

from moejax import cli, methods
from moejax.console import PlainConsole
from moejax.sweep.fields import FIELDS
from moejax.sweep.plan import make_plan
from moejax.sweep.plugins import run_plugins
from moejax.sweep.screen import print_plan
from moejax.sweep.spec import TOP_LEVEL, parse_spec, read_spec

os.environ["MOEJAX_CACHE_DIR"] = ""
os.environ["MOEJAX_TRACEBACK"] = "1"  # errors come out as they are: a line that hides a fault is no refusal


def last_input() -> str:
    """The text of the input that ran last."""
    return last[0]


def spec_document(rng: np.random.Generator) -> dict[str, Any]:
    """A spec, sound but for a few places."""
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
    """A spec as a TOML file would be written."""
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
    """A key, quoted where it must be."""
    return key if key.isascii() and key.replace("_", "").isalnum() else quoted(key)


def plan_is_sound(plan: Any) -> str | None:
    """A plan that was accepted is made of finite, positive numbers, and prints and stores."""
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
    """Bytes of a spec file: byte order marks, other encodings, what is no text at all."""
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


PLUGIN_LINES = (
    "import moejax", "import sys", "sys.exit(3)", "raise SystemExit", "exit('bye')", "quit()",
    "raise SystemExit({1: 2})", "import argparse; argparse.ArgumentParser().parse_args(['--nope'])",
    "import argparse; argparse.ArgumentParser().parse_args()", "print('[/x]')", "1/0",
    "raise ValueError('[red]' * 5000)", "raise OSError('a\\nb')", "def f(t): return t",
    "moejax.register_activation('f', lambda t: t)", "moejax.register_activation('[red]', lambda t: t)",
    "moejax.register_activation('relu2', lambda t: 1/0)",
    "moejax.register_metric('digest', lambda r, f: 0.0)", "import nowhere_to_be_found",
    "# -*- coding: latin-1 -*-", "\ufeff", "x = '\x00'", "x = " + "(" * 500, "x = " + "-" * 5000 + "1",
    "raise Exception", "raise KeyError('k')", "assert False", "class E(Exception): pass",
    "raise RecursionError", "é = 1", "return", "def g(): return g()\ng()",
    "from __future__ import annotations", "x = 1_000", "x ==== 1",
    "raise BaseExceptionGroup('a', [ValueError()])",
)  # fmt: skip


def plugin_file(rng: np.random.Generator) -> str | None:
    """A plugin that may raise, exit, print, or be no Python."""
    lines = [pick(rng, PLUGIN_LINES) for _ in range(rng.integers(1, 5))]
    text = "\n".join(lines)
    if rng.random() < 0.2:
        text = mutated(rng, text)
    last[0] = text
    before = dict(sys.modules)
    with (
        tempfile.TemporaryDirectory() as folder,
        registries_kept(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        path = Path(folder) / "plugin.py"
        path.write_bytes(text.encode(pick(rng, ["utf-8", "utf-8", "latin-1"]), "replace"))
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                run_plugins([path])
        finally:
            for name in set(sys.modules) - set(before):
                if name.startswith("moejax_plugin_"):
                    del sys.modules[name]
        return f"it printed to stdout: {out.getvalue()[:80]!r}" if out.getvalue() else None


@contextlib.contextmanager
def registries_kept() -> Iterator[None]:
    """What a plugin registers is forgotten afterwards."""
    from moejax import activations, inputs, metrics

    kept = [(module._REGISTRY, dict(module._REGISTRY)) for module in (activations, inputs, metrics, methods)]
    try:
        yield
    finally:
        for registry, content in kept:
            registry.clear()
            registry.update(content)


CLI_COMMANDS = (
    "sweep",
    "status",
    "report",
    "export",
    "activations",
    "info",
    "reproduce",
    "fit",
    "predict",
    "nope",
    "",
)
CLI_OPTIONS = (
    "--dry-run", "--out", "--workers", "--set", "--plugin", "--vmap-width", "--retry-failed", "--repair",
    "--across-versions", "--quiet", "--json", "--precision", "--platform", "--noise-std", "--root",
    "--seed", "--quick", "--help", "--cluster", "--nope", "--pilot", "--no-quiet",
)  # fmt: skip
CLI_VALUES = (
    "0", "1", "-1", "2.5", "1e5", "nan", "inf", "9" * 30, "9" * 5000, "", " ", "x", "[red]", "[/x]", "relu",
    "linear", "abs", "float32", "float64", "float16", "cpu", "gpu", "dim=3", "trials=2", "dim=",
    "spec.toml", "nope.toml", ".", "/", "/dev/null", "run", "bad", "t.csv", "t.parquet", "t.xlsx",
    "no/t.csv", "run/t.csv", "plugin.py", "exits.py", "plugin.py:f", "plugin.py:", ":", "a:b:c",
    "exits.py:f", "\x1b[31m", "é", "\udcff", "a" * 300, "slurm:nope.toml", "slurm:spec.toml", "tcp://:x",
    "--", "-x", "empty",
)  # fmt: skip


OPTIONS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "sweep": {
        "--set": CLI_VALUES,
        "--plugin": ("plugin.py", "exits.py", "nope.py", ".", "spec.toml"),
        "--workers": ("1", "2", "0", "-1", "9" * 30),
        "--vmap-width": ("1", "8", "0", "9" * 30),
        "--cluster": ("slurm:nope.toml", "slurm:spec.toml", "slurm:", "slurm:."),
        "--out": CLI_VALUES,
        "--precision": ("float32", "float64"),
        "--retry-failed": (),
        "--repair": (),
        "--across-versions": (),
    },
    "activations": {
        "--noise-std": CLI_VALUES[:11],
        "--platform": ("cpu",),
        "--precision": ("float32", "float64"),
    },
    "status": {"--precision": ("float32",)},
}
"""Options that a command has, and values for them; () for a switch."""


@functools.cache
def _working_folder() -> Path:
    """A folder with what the command lines name: specs, plugins, a sound and a damaged run folder."""
    root = Path(tempfile.mkdtemp(prefix="moejax-fuzz-"))
    (root / "spec.toml").write_text(
        'methods = ["joint_em"]\ntrials = 2\ndim = 3\nnum_experts = 2\nnum_samples = 100\n'
    )
    (root / "plugin.py").write_text("import moejax\ndef f(t):\n    return t\n")
    (root / "exits.py").write_text("import sys\nsys.exit(4)\n")
    for name in ("run", "bad", "empty"):
        (root / name).mkdir()
    content = sound_folder()[1]
    (root / "run" / "store.sqlite").write_bytes(content)
    (root / "bad" / "store.sqlite").write_bytes(content[:5000] + bytes(3000) + content[8000:])
    (root / "empty" / "store.sqlite").write_bytes(b"")
    return root


def arguments(rng: np.random.Generator) -> str | None:
    """A command line: the right command, options and values of all kinds."""
    words = [str(pick(rng, CLI_COMMANDS[:7] if rng.random() < 0.9 else CLI_COMMANDS))]
    usual = {
        "sweep": ["spec.toml", "--dry-run"], "status": [str(pick(rng, ["run", "bad", "empty"]))], "report": ["bad"],
        "export": [str(pick(rng, ["run", "bad", "empty"])), "t.csv"], "activations": ["relu"], "reproduce": ["--dry-run"],
    }  # fmt: skip
    if rng.random() < 0.8:
        words += usual.get(words[0], [])
    own = OPTIONS_OF.get(words[0], {}) | dict.fromkeys(("--quiet", "--json"), ())
    for _ in range(rng.integers(0, 4)):
        if rng.random() < 0.7:
            option = str(pick(rng, list(own)))
            words.append(option)
            words += [str(pick(rng, own[option]))] if own[option] else []
        else:
            words.append(str(pick(rng, CLI_OPTIONS)))
            words += [str(pick(rng, CLI_VALUES))] if rng.random() < 0.7 else []
    if words[0] == "sweep" and "--dry-run" not in words:
        words.append("--dry-run")  # nothing is compiled here
    if words[0] in ("fit", "predict", "reproduce") and not {"--help", "--root"} & set(words):
        words.append("--nope")  # those are other files' kinds
    return run_line(words)


def run_line(words: Sequence[str]) -> str | None:
    """Run a command line in this process; its own refusals are one line with status 2."""
    last[0] = repr(list(words))
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(_working_folder())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), figures_left_out():
            cli.main(list(words))
    except SystemExit as ended:
        if ended.code in (0, None):
            return None
        if ended.code != 2:
            return f"ended with status {ended.code}: {err.getvalue()[-300:]}"
        return None  # the argument parser's own errors, as it prints them
    finally:
        os.chdir(before)
        for name in ("summary.csv", "report.html", "t.csv"):
            (_working_folder() / "run" / name).unlink(missing_ok=True)
    if "--json" in words and words[0] in ("status", "activations", "info", "sweep"):
        json.loads(out.getvalue(), parse_constant=lambda word: 1 / 0)
    return None


@contextlib.contextmanager
def figures_left_out() -> Iterator[None]:
    """Without figures, which take seconds and are made from the same table."""
    from moejax.sweep import figures

    kept = figures.write_figures
    figures.write_figures = lambda named, folder: []
    try:
        yield
    finally:
        figures.write_figures = kept


KINDS: dict[str, Callable[[np.random.Generator], str | None]] = {
    "spec_text": spec_text,
    "spec_garbled": spec_garbled,
    "spec_file": spec_file,
    "overrides": overrides,
    "plugin_file": plugin_file,
    "arguments": arguments,
}
SHARES = {"spec_text": 3.0, "overrides": 3.0}
