"""The files that a repository is expected to have agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import moejax

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
HOOKS = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_versions_and_licences_agree():
    (version,) = re.findall(r'^version: "(.+)"$', CITATION, flags=re.MULTILINE)
    assert version == moejax.__version__
    assert PROJECT["dynamic"] == ["version"]  # from moejax/__init__.py
    (licence,) = re.findall(r"^license: (.+)$", CITATION, flags=re.MULTILINE)
    assert licence == PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_paper_is_a_reference():
    assert "Breaking the gridlock in Mixture-of-Experts: Consistent and Efficient Algorithms" in CITATION
    assert re.findall(r"family-names: (\w+)", CITATION) == ["Makkuva", "Viswanath", "Kannan", "Oh"]


def test_hooks_are_local_and_call_what_there_is():
    assert re.findall(r"^  - repo: (.+)$", HOOKS, flags=re.MULTILINE) == ["local"]
    assert re.findall(r"^      - id: (.+)$", HOOKS, flags=re.MULTILINE) == [
        "ruff",
        "ruff-format",
        "types",
        "import-rule",
    ]
    targets = re.findall(r"entry: make (\w+)", HOOKS)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target
    (tested,) = re.findall(r"pytest -q (\S+)", HOOKS)
    assert (ROOT / tested).is_file()


def test_every_target_that_contributors_are_told_of_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") + (ROOT / "README.md").read_text(
        encoding="utf-8"
    )
    for target in set(re.findall(r"\bmake ([a-z-]+)", text)) - {"and"}:
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target
