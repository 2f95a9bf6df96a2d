"""Signals that end a sweep in good order: what is done is committed, workers and queued jobs are cancelled."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNAL_STATUS = 128
"""A shell's exit status of a program that a signal ended is this and the signal's number."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: it ends what runs as Ctrl-C does, with a status of its own."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(stop: KeyboardInterrupt) -> int:
    """The exit status of a program that was stopped so."""
    return SIGNAL_STATUS + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within the block, the first SIGTERM or SIGHUP raises `Stopped`; a second one ends the process at once.

    A signal that is ignored (nohup) stays ignored, and so does one that the caller handles.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    numbers = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL
    ]

    def stop(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
