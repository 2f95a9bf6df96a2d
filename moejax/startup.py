"""Ctrl-C while the program is still being imported, which takes seconds: one line instead of a traceback.

It imports nothing that takes time, and does nothing in a process that only uses the library.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

INTERRUPTED_STATUS = 130
"""As shells have it for SIGINT."""


def is_the_program() -> bool:
    """Whether this process was started as `moejax` or `python -m moejax`."""
    words = sys.orig_argv
    return Path(sys.argv[0] if sys.argv else "").stem == "moejax" or any(
        first == "-m" and second == "moejax" for first, second in itertools.pairwise(words)
    )


def end_quietly_on_interrupt() -> None:
    """Until `raise_on_interrupt`, end the program at once by SIGINT; nothing has been begun that could be left half done."""
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
