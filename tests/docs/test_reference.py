"""The reference has every public name, and the example in each one's docstring runs."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stores import made_up_store

import moejax
import moejax.sweep

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGES = {"moejax": "moejax.md", "moejax.sweep": "sweep.md"}
NAMES = [
    *(f"moejax.{name}" for name in moejax.__all__),
    *(f"moejax.sweep.{name}" for name in moejax.sweep.__all__),
]
ASSUMED = {"dataclasses": dataclasses, "jax": jax, "jnp": jnp, "np": np, "moejax": moejax}
"""Imports that the examples assume; docs/reference/moejax.md names them."""


@pytest.mark.parametrize(("package", "page"), PAGES.items())
def test_every_public_name_is_in_the_reference(package, page):
    shown = re.findall(r"^::: (\S+)$", (REFERENCE / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    expected = {name for name in NAMES if name.rpartition(".")[0] == package and name != "moejax.sweep"}
    assert sorted(shown) == sorted(expected)


def test_the_page_names_what_examples_assume():
    text = (REFERENCE / "moejax.md").read_text(encoding="utf-8")
    namespace: dict = {}
    exec("\n".join(re.findall(r"^import .*$", text, flags=re.MULTILINE)), namespace)
    assert {name: namespace[name] for name in ASSUMED} == ASSUMED


def value_of(name: str):
    package, _, attribute = name.rpartition(".")
    return getattr(moejax.sweep if package == "moejax.sweep" else moejax, attribute)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "moejax.sweep"])
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    _, folder, _ = made_up_store(tmp_path)
    folder.rename(tmp_path / "runs" / "quickstart")  # the run that examples of moejax.sweep read
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(value_of(name)) or ""
    test = doctest.DocTestParser().get_doctest(text, dict(ASSUMED), name, None, None)
    assert test.examples, f"{name} has no example"
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
