"""A user's own activation, method, input distribution or metric: one Python file, run here and in every worker.

The file registers what it brings (for example with `moejax.register_activation`). Its source is part of the
key of every result of the sweep, comments and layout apart: a changed function never passes for the old one.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from moejax.user_code import run_user_code


@dataclasses.dataclass(frozen=True)
class Plugin:
    """The text of a plugin file, as it is sent to workers."""

    path: str
    source: str
    digest: str
    """sha256 of the syntax tree, in hex."""

    @property
    def module_name(self) -> str:
        return f"moejax_plugin_{self.digest[:16]}"


def read_plugin(path: Path) -> Plugin:
    """Read a plugin file and check its syntax; nothing is run.

    Raises:
        ValueError: the file cannot be read or is not Python.
    """
    try:
        source = importlib.util.decode_source(
            Path(path).read_bytes()
        )  # as import reads it: by its coding line
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"plugin {path}: cannot be read: {error}") from None
    return Plugin(str(path), source, hashlib.sha256(syntax_of(source, f"plugin {path}").encode()).hexdigest())


def syntax_of(source: str, where: str) -> str:
    """The syntax tree of a Python text, as text: comments and layout do not count.

    Raises:
        ValueError: not Python.
    """
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError as error:
        raise ValueError(f"{where}:{error.lineno}: not valid Python: {error.msg}") from None
    except ValueError as error:  # a null character
        raise ValueError(f"{where}: not valid Python: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{where}: not valid Python: nested too deeply") from None


def run_plugin(plugin: Plugin) -> None:
    """Run a plugin in this process, once.

    Raises:
        ValueError: the file raised; the message names the file and the error.
    """
    if plugin.module_name in sys.modules:
        return
    module = types.ModuleType(plugin.module_name)
    module.__file__ = plugin.path
    run_user_code(
        lambda: exec(compile(plugin.source, plugin.path, "exec"), module.__dict__),
        module,
        f"plugin {plugin.path}:",
    )


def run_plugins(paths: Sequence[Path]) -> tuple[Plugin, ...]:
    """Read plugins, equal ones once, and run them in this process.

    Raises:
        ValueError: see `read_plugin` and `run_plugin`.
    """
    plugins = {plugin.digest: plugin for plugin in map(read_plugin, paths)}
    for plugin in plugins.values():
        run_plugin(plugin)
    return tuple(plugins.values())


def plugins_digest(plugins: Sequence[Plugin]) -> str:
    """One digest of all plugins, in hex, whatever their order; empty without plugins."""
    if not plugins:
        return ""
    return hashlib.sha256("".join(sorted(plugin.digest for plugin in plugins)).encode()).hexdigest()
