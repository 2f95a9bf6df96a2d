"""A user's own activation, method, input distribution or metric: one Python file, run here and in every worker.

The file registers its functions (for example with `moejax.register_activation`). All that it depends on is part of the key of every
result of the sweep (`moejax.sweep.plan.user_code`): after a change of a function, helper or declared data file, old results do not
count.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moejax.registry import recorded_registrations
from moejax.sweep.plan.user_code import UserFile, read_user_file, run_user_file, serve_helpers

Plugin = UserFile
"""A plugin in the form that is sent to workers."""

_registrations: dict[str, list[Callable[[], None]]] = {}
"""Digest -> functions that, called in order, repeat the plugin's registrations."""
_used: list[str] = []
"""Digests of the plugins whose registrations and helpers are in force."""


def read_plugin(path: Path) -> Plugin:
    """Read a plugin file, its helpers and data files, and check the syntax; nothing is run.

    Raises:
        ValueError: see `moejax.sweep.plan.user_code.read_user_file`.
    """
    return read_user_file(path, f"plugin {path}")


def module_name(plugin: Plugin) -> str:
    """The name under which the plugin's module is known to Python."""
    return f"moejax_plugin_{plugin.digest[:16]}"


def use_plugins(plugins: Sequence[Plugin]) -> None:
    """Put the registrations of these plugins in force; each plugin runs once in a process.

    A worker that serves two sweeps may have two plugins, or two versions of one, that give one name to different functions.

    Raises:
        ValueError: a file raised, a data file is missing or has changed, or two plugins have different helpers of one name;
            the message names the file.
    """
    digests = [plugin.digest for plugin in plugins]
    if digests == _used and all(module_name(plugin) in sys.modules for plugin in plugins):
        return
    _check_helpers(plugins)
    _used.clear()
    for plugin in plugins:
        plugin.check_data_files(f"plugin {plugin.path}")
        if module_name(plugin) in sys.modules:
            serve_helpers(plugin)
            for register_again in _registrations.get(plugin.digest, []):
                register_again()
            continue
        with recorded_registrations() as registrations:
            run_user_file(plugin, module_name(plugin), f"plugin {plugin.path}:")
        _registrations[plugin.digest] = registrations
    _used.extend(digests)


def _check_helpers(plugins: Sequence[Plugin]) -> None:
    for first, second in itertools.combinations(plugins, 2):
        others = {helper.name: helper for helper in second.helpers}
        for helper in first.helpers:
            if helper.name in others and others[helper.name].source != helper.source:
                raise ValueError(
                    f"plugins {first.path} and {second.path} import two different files as {helper.name!r}; rename one"
                )


def run_plugins(paths: Sequence[Path]) -> tuple[Plugin, ...]:
    """Read plugins, equal ones once, and use them in this process.

    Raises:
        ValueError: see `read_plugin` and `use_plugins`.
    """
    plugins = {plugin.digest: plugin for plugin in map(read_plugin, paths)}
    use_plugins(tuple(plugins.values()))
    return tuple(plugins.values())


def plugins_digest(plugins: Sequence[Plugin]) -> str:
    """One digest of all plugins, in hex, in any order; empty without plugins."""
    if not plugins:
        return ""
    return hashlib.sha256("".join(sorted(plugin.digest for plugin in plugins)).encode()).hexdigest()
