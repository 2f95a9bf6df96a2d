"""The tutorials run as printed, block after block, and print what their pages show."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import sys
from pathlib import Path

import jax
import pytest

from moejax.cli import program

PAGES = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
WORDS = ("python", "console", "toml", "text")


@pytest.fixture
def as_a_user(tmp_path, monkeypatch):
    """An empty folder to work in, an environment that is put back, and no module left behind."""
    variables, modules = dict(os.environ), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    yield
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(variables)


def run_python(code: str, namespace: dict) -> None:
    """A block as a user runs it: in single precision, with JAX's own rules of promotion."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "tutorial", "exec"), namespace)


def run_commands(text: str) -> None:
    for line in text.splitlines():
        assert line.startswith("$ moejax "), line
        program.main(shlex.split(line)[2:])


def outputs(page: str):
    """Run a page; (a block, what it printed, what the page shows after it) for every block that runs."""
    namespace: dict = {"__name__": "tutorial"}
    blocks = [match.groups() for match in BLOCK.finditer(page)]
    assert page.count("\n```") == 2 * len(blocks), "a block that this test does not understand"
    for index, (word, title, text) in enumerate(blocks):
        assert word in WORDS, word
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif word in ("python", "console"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if word == "python":
                    run_python(text, namespace)
                else:
                    run_commands(text)
            follows = blocks[index + 1] if index + 1 < len(blocks) else ("", None, "")
            yield text, printed.getvalue(), follows[2] if follows[0] == "text" else ""


def trimmed(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_tutorial_prints_what_its_page_shows(path, as_a_user):
    checker = doctest.OutputChecker()
    ran = list(outputs(path.read_text(encoding="utf-8")))
    assert ran
    for block, printed, shown in ran:
        same = checker.check_output(trimmed(shown), trimmed(printed), doctest.ELLIPSIS)
        assert same, f"{path.name}: after\n\n{block}\nthe page shows\n\n{shown}\nbut it prints\n\n{printed}"


def test_there_are_five_tutorials():
    assert [path.stem for path in PAGES] == ["counts", "extend", "fit_your_data", "recover", "sweep"]
