"""A user's Python file: a plugin, an experiment, or the file of FILE.py:FUNCTION.

A result depends on the file, on the modules that it imports from its folder (its helpers), and on the files that it names in
`plugin_files`: all are in its digest. Helpers are read once and run from that text, here and in every worker: an edit of a helper
during a sweep has no effect on it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from moejax.console import shorten

FILES_NAME = "plugin_files"
"""The variable in which a file lists its data files, as a literal list of names in its folder."""
PACKAGE = "moejax"


@dataclasses.dataclass(frozen=True)
class Helper:
    """A module in the folder of a user's file that the file imports."""

    name: str
    """Name in the import: `helper`, or `package.part`."""
    path: str
    source: str
    is_package: bool


@dataclasses.dataclass(frozen=True)
class UserFile:
    """The text of a user's Python file, its helpers and its data files."""

    path: str
    """Path as given, for messages."""
    folder: str
    """The absolute path of its folder."""
    source: str
    helpers: tuple[Helper, ...]
    data_files: tuple[tuple[str, str], ...]
    """(name, sha256) of the files in `plugin_files`."""
    digest: str
    """sha256, in hex, of its syntax tree, its helpers' and its data files: comments and layout do not count."""

    def check_data_files(self, what: str) -> None:
        """Raise ValueError if a data file is missing, or has changed since it was first read."""
        for name, digest in self.data_files:
            if _digest_of_data(Path(self.folder, name), f"{what}: {FILES_NAME}") != digest:
                raise ValueError(
                    f"{what}: {FILES_NAME}: {name}: another content than when this run was planned"
                )


def read_user_file(path: Path, what: str) -> UserFile:
    """Read a user's file, its helpers and its data files; nothing is run.

    Args:
        path: the Python file.
        what: the beginning of messages.

    Raises:
        ValueError: one of them cannot be read or is not Python, or `plugin_files` is no literal list of names.
    """
    source = read_source(path, what)
    syntax = _parse(source, what)
    folder = Path(os.path.abspath(path)).parent
    helpers = tuple(_helpers(syntax, folder))
    data_files = tuple(
        (name, _digest_of_data(folder / name, f"{what}: {FILES_NAME}")) for name in _file_names(syntax, what)
    )
    digest = hashlib.sha256(ast.dump(syntax).encode())
    for helper in helpers:
        digest.update(f"\n{helper.name}:{ast.dump(_parse(helper.source, helper.path))}".encode())
    for name, content in data_files:
        digest.update(f"\n{name}:{content}".encode())
    return UserFile(str(path), str(folder), source, helpers, data_files, digest.hexdigest())


def read_source(path: Path, what: str) -> str:
    """The text of a Python file, read as import does: by its coding line or byte order mark.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        source = importlib.util.decode_source(Path(path).read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{what}: cannot be read: {reason}") from None
    return source.removeprefix("\ufeff")


def _parse(source: str, what: str) -> ast.Module:
    try:
        syntax = ast.parse(source)
        ast.dump(syntax)  # it nests deeper than the parser
    except SyntaxError as error:
        raise ValueError(f"{what}:{error.lineno}: not valid Python: {error.msg}") from None
    except ValueError as error:  # a null character
        raise ValueError(f"{what}: not valid Python: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{what}: not valid Python: nested too deeply") from None
    return syntax


def _file_names(syntax: ast.Module, what: str) -> Sequence[str]:
    """The names in `plugin_files`."""
    for statement in syntax.body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if not any(isinstance(target, ast.Name) and target.id == FILES_NAME for target in targets):
            continue
        try:
            names = None if statement.value is None else ast.literal_eval(statement.value)
        except (ValueError, TypeError):
            names = None
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{what}: {FILES_NAME}: expected a list of names such as ["weights.npy"]')
        return tuple(dict.fromkeys(names))
    return ()


def _digest_of_data(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{what}: {path}: cannot be read: {reason}") from None


def _helpers(syntax: ast.Module, folder: Path) -> list[Helper]:
    """The modules that a file imports from its folder, and those that they import, sorted by name."""
    found: dict[str, Helper] = {}
    requested: set[str] = set()
    wanted = _imported(syntax)
    while wanted:
        name = wanted.pop()
        if name in requested:
            continue
        requested.add(name)
        for helper in _beside(name, folder):
            found[helper.name] = helper
            wanted |= _imported(_parse(helper.source, helper.path))
    return [found[name] for name in sorted(found)]


def _imported(syntax: ast.Module) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _beside(name: str, folder: Path) -> list[Helper]:
    """The files of the module or package of this name in a folder; none if Python finds another one first."""
    if name in (*sys.stdlib_module_names, PACKAGE):
        return []
    module, package = folder / f"{name}.py", folder / name
    if (package / "__init__.py").is_file() or (package.is_dir() and not module.is_file()):
        files = sorted(package.rglob("*.py"))
        first = package / "__init__.py"
    else:
        files = [module] if module.is_file() else []
        first = module
    elsewhere = PathFinder.find_spec(name, sys.path) if files else None
    if elsewhere is not None and elsewhere.origin is not None and Path(elsewhere.origin) != first:
        return []
    helpers = [_helper(file, folder) for file in files]
    names = {helper.name for helper in helpers}
    prefixes = {name[:dot] for name in names for dot, letter in enumerate(name) if letter == "."}
    for parent in sorted(prefixes - names):  # folders without __init__.py
        helpers.append(Helper(parent, str(folder / parent.replace(".", "/")), "", True))
    return helpers


def _helper(file: Path, folder: Path) -> Helper:
    parts = file.relative_to(folder).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    return Helper(name, str(file), read_source(file, str(file)), is_package)


class _HelperFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import finder that serves the helpers of the last files, from their texts."""

    def __init__(self) -> None:
        self.helpers: dict[str, Helper] = {}

    def serve(self, helpers: Sequence[Helper]) -> None:
        """Serve these texts under these names; a module with a different text is imported again."""
        for helper in helpers:
            module = sys.modules.get(helper.name)
            if module is not None and getattr(module, "__moejax_helper__", None) != helper:
                del sys.modules[helper.name]
            self.helpers[helper.name] = helper
        if helpers and self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        helper = self.helpers.get(fullname)
        if helper is None:
            return None
        spec = importlib.machinery.ModuleSpec(
            fullname, self, origin=helper.path, is_package=helper.is_package
        )
        spec.has_location = True
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        helper = self.helpers[module.__name__]
        module.__dict__["__moejax_helper__"] = helper
        exec(compile(helper.source, helper.path, "exec"), module.__dict__)


_finder = _HelperFinder()


def serve_helpers(file: UserFile) -> None:
    """Let imports find the helpers of a file, also imports inside its functions."""
    _finder.serve(file.helpers)


def run_user_file(file: UserFile, module_name: str, where: str) -> types.ModuleType:
    """Run a user's file as a module of this name.

    Its output goes to stderr, because stdout holds our results. It sees no command-line options, because they are not its own. If
    it calls exit, the result is an error that names the file.

    Raises:
        ValueError: it raised, or called exit; the message begins with `where`.
    """
    module = types.ModuleType(module_name)
    module.__file__ = str(Path(file.folder, Path(file.path).name))
    sys.modules[module_name] = module  # before it runs, as import does, because dataclasses look it up there
    serve_helpers(file)
    try:
        with contextlib.redirect_stdout(sys.stderr), _no_arguments(module.__file__):
            exec(compile(file.source, file.path, "exec"), module.__dict__)
    except SystemExit as error:
        del sys.modules[module_name]
        raise ValueError(
            f"{where} called exit ({shorten(str(error.code), 100)}); expected a file that only defines and registers"
        ) from None
    except Exception as error:
        del sys.modules[module_name]
        text = " ".join(f"{where} raised {type(error).__name__}: {error}".split())
        raise ValueError(shorten(text)) from error
    return module


@contextlib.contextmanager
def _no_arguments(program: str) -> Iterator[None]:
    arguments, sys.argv = sys.argv, [program]
    try:
        yield
    finally:
        sys.argv = arguments
