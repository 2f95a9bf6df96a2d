"""The time in which the program and the library are imported.

Ctrl-C in the program gives one line instead of a traceback. Names that need pandas or scikit-learn are imported on first use. This
module imports nothing that takes time.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED_STATUS = 130
"""Exit status after SIGINT, as shells count it: 128 + SIGINT."""


def is_the_program() -> bool:
    """True if this process was started as `moejax` or `python -m moejax`."""
    words = sys.orig_argv
    return Path(sys.argv[0] if sys.argv else "").stem == "moejax" or any(
        first == "-m" and second == "moejax" for first, second in itertools.pairwise(words)
    )


def end_quietly_on_interrupt() -> None:
    """Let SIGINT end the program at once, until `raise_on_interrupt`: no work has begun that could be left half done."""
    if threading.current_thread() is not threading.main_thread() or not is_the_program():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Have SIGINT raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"moejax: interrupted\n")
    os._exit(INTERRUPTED_STATUS)


def imported_on_first_use(package: str, modules: Mapping[str, str], name: str) -> Any:
    """The value of a public name of `package`, for the package's `__getattr__`.

    Args:
        package: the package's `__name__`; the value becomes an attribute of it.
        modules: name -> module that defines it.
        name: the name that was asked for.

    Raises:
        AttributeError: the name is not in `modules`.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(modules[name]), name)
    setattr(sys.modules[package], name, value)
    return value
