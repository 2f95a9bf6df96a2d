"""The rooms of the package and one direction of import between them; files and functions that fit on a few screens."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moejax"
TOP = ("startup", "checks", "console", "files", "pictures", "registry", "environment")
"""Single modules that every room may import; each imports only those before it."""
ROOMS = ("model", "moments", "likelihood", "methods", "fitting", "sweep", "reproduce", "cli")
"""A room imports only from those before it, and from TOP."""
STRANGERS = ({"moments", "likelihood"}, {"fitting", "sweep"})
"""Rooms that do not know each other."""
SWEEP = ("monte_carlo", "trial", "spec", "plan", "store", "execution", "report", "commands")
"""The rooms of sweep/, in the same way."""
SWEEP_STRANGERS = ({"execution", "report"},)
FACES = {"__init__", "__main__"}
"""Of the package: they import from everywhere."""
AGAINST_THE_RULE: dict[str, set[str]] = {}
"""File -> modules that it imports although it may not. Nothing is to be added here."""
IMPORT_THE_FACE = {"cli/fit.py", "cli/program.py", "sweep/execution/provenance.py"}
"""Files that do `import moejax`, for its version."""

NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
"""Methods of named tuples: public, despite their names."""

MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 100
LONGER_FILES: dict[str, int] = {}
LONGER_FUNCTIONS: dict[str, int] = {}
"""What is longer today: it may shrink, and then its number here shrinks with it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imported(file: Path) -> Iterator[str]:
    """Dotted names below `moejax` that a file imports, in functions too; "" for the package itself."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not used here"
            module = node.module or ""
            # `from moejax.sweep import trial` is an import of moejax.sweep.trial
            names = [f"{module}.{alias.name}" if is_package(module) else module for alias in node.names]
        else:
            continue
        yield from (
            name.removeprefix("moejax").removeprefix(".") for name in names if name.split(".")[0] == "moejax"
        )


def is_package(module: str) -> bool:
    return (
        module.split(".", maxsplit=1)[0] == "moejax"
        and PACKAGE.parent.joinpath(*module.split("."), "__init__.py").is_file()
    )


def is_allowed(here: str, there: str, order: tuple[str, ...], strangers: tuple[set[str], ...]) -> bool:
    return here == there or (order.index(there) < order.index(here) and {here, there} not in strangers)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_room_imports_only_to_its_left(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in FACES:
        return
    order = (*TOP, *ROOMS)
    assert parts[0] in order, f"{name_of(file)} is in no room"
    assert parts[0] != "sweep" or parts[1] in (*SWEEP, "__init__"), f"{name_of(file)} is in no room of sweep/"
    wrong = set()
    for name in imported(file):
        there = name.split(".")
        if there == [""]:
            wrong |= set() if name_of(file) in IMPORT_THE_FACE else {"moejax"}
        elif there[0] not in order or not is_allowed(parts[0], there[0], order, STRANGERS):
            wrong.add(f"moejax.{name}")
        elif parts[0] == there[0] == "sweep" and parts[1] != "__init__":
            inner = there[1] if len(there) > 1 else ""
            if inner not in SWEEP or not is_allowed(parts[1], inner, SWEEP, SWEEP_STRANGERS):
                wrong.add(f"moejax.{name}")
    assert wrong == AGAINST_THE_RULE.get(name_of(file), set())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def private_names_of_others(tree: ast.Module) -> Iterator[str]:
    """Private names that a file imports from the package, or reads as attributes without defining them.

    Attributes of modules and classes from elsewhere (`os._exit`) are not the package's.
    """
    defined: set[str] = set()
    from_package: dict[str, bool] = {}  # by the name that an import binds
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                for alias in names:
                    from_package[(alias.asname or alias.name).split(".")[0]] = alias.name.startswith("moejax")
            case ast.ImportFrom(str(module), names):
                ours = module.split(".")[0] == "moejax"
                from_package |= {alias.asname or alias.name: ours for alias in names}
                yield from (f"{module}.{alias.name}" for alias in names if ours and is_private(alias.name))
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
                defined.add(name)
            case ast.Name(name, ast.Store()) | ast.Attribute(ast.Name("self" | "cls"), name, ast.Store()):
                defined.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            source = ast.unparse(node)
            if from_package.get(source.split(".")[0], node.attr not in defined):
                yield source


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from moejax.files import _write", ["moejax.files._write"]),
        ("from moejax import files\nfiles._write()", ["files._write"]),
        ("import moejax.files as f\nf._write()", ["f._write"]),
        ("import moejax.files\nmoejax.files._write()", ["moejax.files._write"]),
        ("from moejax import files\ndef _write():\n    files._write()", ["files._write"]),
        ("store._rows = 1", ["store._rows"]),
        ("import os\nos._exit(0)", []),
        ("class A:\n    def _b(self):\n        return other._b()", []),
        ("x._replace(a=1)", []),
    ],
)
def test_private_names_of_other_files_are_found(source, found):
    assert list(private_names_of_others(ast.parse(source))) == found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_private_name_stays_in_its_file(file):
    assert not list(private_names_of_others(ast.parse(file.read_text(encoding="utf-8"))))


def test_every_room_has_a_face():
    rooms = {*(PACKAGE / room for room in ROOMS), *(PACKAGE / "sweep" / room for room in SWEEP)}
    rooms.add(PACKAGE / "fitting" / "streaming")
    folders = {file.parent for file in FILES}
    assert folders == {PACKAGE} | {room for room in rooms if not room.with_suffix(".py").is_file()}
    for folder in folders:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        assert "__all__" in names, f"{folder.name} has no __all__"


def test_names_in_every_face_exist():
    import importlib

    for folder in {file.parent for file in FILES}:
        package = ".".join(("moejax", *folder.relative_to(PACKAGE).parts))
        module = importlib.import_module(package)
        for name in module.__all__:  # a name, or a module of the room
            if not hasattr(module, name):
                importlib.import_module(f"{package}.{name}")


def test_only_the_command_line_changes_its_process():
    """Environment, XLA flags and platform; the others put back what they change for a while."""
    door = {"use_single_thread", "compile_fast_everywhere"}
    puts_back = {"sweep/execution/dask_cluster.py", "pictures.py", "environment.py"}
    changing = re.compile(
        r"os\.environ(\[[^]]+\] = |\.(update|pop|setdefault|clear)\()|update\(.jax_platforms"
    )
    for file in FILES:
        name, text = name_of(file), file.read_text(encoding="utf-8")
        if not name.startswith("cli/"):
            assert name in puts_back or not changing.search(text), name
            assert name == "environment.py" or not any(word in text for word in door), name


def test_no_file_is_too_long():
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == LONGER_FILES


def test_no_function_is_too_long():
    lengths = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{name_of(file)}: {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert {
        name: length for name, length in lengths.items() if length > MOST_LINES_OF_FUNCTION
    } == LONGER_FUNCTIONS
