"""Running a user's Python file: a plugin, an experiment, or the file of FILE.py:FUNCTION."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator

from moejax.console import shorten


def run_user_code(run: Callable[[], object], module: types.ModuleType, where: str) -> None:
    """Run a user's file as the module that it is in.

    It prints to stderr, since stdout holds our results; it sees no command-line options, since they are not its own; and it ends no
    process but by a line that names it.

    Raises:
        ValueError: it raised, or called exit; the message begins with `where`.
    """
    name = module.__name__
    sys.modules[name] = module  # before it runs, as import does: dataclasses look there
    try:
        with contextlib.redirect_stdout(sys.stderr), _no_arguments(module.__file__ or name):
            run()
    except SystemExit as error:
        del sys.modules[name]
        raise ValueError(
            f"{where} called exit ({shorten(str(error.code), 100)}); expected a file that only defines and registers"
        ) from None
    except Exception as error:
        del sys.modules[name]
        text = " ".join(f"{where} raised {type(error).__name__}: {error}".split())
        raise ValueError(shorten(text)) from error


@contextlib.contextmanager
def _no_arguments(program: str) -> Iterator[None]:
    arguments, sys.argv = sys.argv, [program]
    try:
        yield
    finally:
        sys.argv = arguments
