"""The page of the method names the file behind every formula, and the pages' links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\[`(moejax/[\w/]+\.py)`\]\(\.\./(moejax/[\w/]+\.py)\)", METHOD)
MOST_LINES_TO_THE_FILE = 8


def test_named_files_exist_and_links_go_to_them():
    assert NAMED
    assert METHOD.count("`moejax/") == len(NAMED), "a file is named without a link to it"
    for shown, target in NAMED:
        assert shown == target
        assert (ROOT / target).is_file(), target


def test_names_in_parentheses_are_in_the_file():
    pairs = re.findall(r"\]\(\.\./(moejax/[\w/]+\.py)\) \(((?:`\w+`(?:, )?)+)\)", METHOD)
    assert pairs
    for file, names in pairs:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert f"def {name}(" in text, (file, name)


@pytest.mark.parametrize("room", ["moments", "likelihood", "methods"])
def test_every_file_of_the_mathematics_is_named(room):
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moejax" / room).glob("*.py")
        if path.name not in ("__init__.py", "method.py", "options.py")  # contract and options compute nothing
    }
    assert files - {shown for shown, _ in NAMED} == set()


def test_every_formula_names_its_file():
    lines = METHOD.splitlines()
    ends = [number for number, line in enumerate(lines) if line == "$$"][1::2]
    assert len(ends) > 10
    for end in ends:
        after = lines[end + 1 : end + 1 + MOST_LINES_TO_THE_FILE]
        until = after.index("$$") if "$$" in after else len(after)
        assert any(line.startswith("Code: ") for line in after[:until]), "\n".join(lines[end - 5 : end + 1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_linked_files_exist(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    for target in targets:
        assert ":" in target or (page.parent / target).exists(), target
