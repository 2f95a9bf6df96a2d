"""Kinds of input for fuzz.py: plugins and command lines. Only commands that print activations compile programs."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from fuzz_stores import sound_folder
from fuzz_values import last, mutated, pick

from moejax.cli import program as cli
from moejax.registry import registrations_undone
from moejax.sweep.plan.plugins import run_plugins

os.environ["MOEJAX_CACHE_DIR"] = ""
os.environ["MOEJAX_TRACEBACK"] = "1"  # errors are raised: a line that hides a fault is no refusal


def last_input() -> str:
    """The text of the last input."""
    return last[0]


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
    """A plugin that may raise, exit, print, or be invalid Python."""
    lines = [pick(rng, PLUGIN_LINES) for _ in range(rng.integers(1, 5))]
    text = "\n".join(lines)
    if rng.random() < 0.2:
        text = mutated(rng, text)
    last[0] = text
    before = dict(sys.modules)
    with (
        tempfile.TemporaryDirectory() as folder,
        registrations_undone(),
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
"""Options of a command, and values for them; () for a switch."""


@functools.cache
def _working_folder() -> Path:
    """A folder with the files that the command lines name: specs, plugins, a sound and a damaged run folder."""
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
        words.append("--nope")  # other files have kinds for these
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
        return None  # errors of the argument parser, in its own format
    finally:
        os.chdir(before)
        for name in ("summary.csv", "report.html", "t.csv"):
            (_working_folder() / "run" / name).unlink(missing_ok=True)
    if "--json" in words and words[0] in ("status", "activations", "info", "sweep"):
        json.loads(out.getvalue(), parse_constant=lambda word: 1 / 0)
    return None


@contextlib.contextmanager
def figures_left_out() -> Iterator[None]:
    """Leave out figures, which take seconds and are made from the same table."""
    from moejax.sweep.report import figures

    kept = figures.write_figures
    figures.write_figures = lambda named, folder: []
    try:
        yield
    finally:
        figures.write_figures = kept


KINDS: dict[str, Callable[[np.random.Generator], str | None]] = {
    "plugin_file": plugin_file,
    "arguments": arguments,
}
