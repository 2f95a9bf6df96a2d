"""Signals that end a sweep in good order: what is done is committed, workers and queued jobs are cancelled."""

from __future__ import annotations

import contextlib
import signal
import sys
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


_swallowed: list[KeyboardInterrupt] = []
"""A stop that came, until it has been seen to arrive."""


def raise_if_stopped() -> None:
    """Raise the stop that a signal asked for, if it was raised where nobody could catch it: JAX's hook into garbage collection,
    for example, prints and forgets whatever is raised while it runs.
    """
    if _swallowed:
        raise _swallowed.pop()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within the block, the first SIGTERM or SIGHUP raises `Stopped`, and a second one ends the process at once.

    A Ctrl-C raises KeyboardInterrupt as ever. Both are raised by `raise_if_stopped` if they get lost. A signal that is ignored
    (nohup) stays ignored, and so does one that the caller handles.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    numbers = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL
    ]

    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def stop(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise _noted(Stopped(number))

    def interrupt(_: int, __: FrameType | None) -> None:
        raise _noted(KeyboardInterrupt())

    def tell_unraisable(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):  # else `raise_if_stopped` has it
            told_before(lost)

    told_before, sys.unraisablehook = sys.unraisablehook, tell_unraisable
    for number in numbers:
        signal.signal(number, stop)
    if interrupts:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = told_before
        _swallowed.clear()


def _noted(stop: KeyboardInterrupt) -> KeyboardInterrupt:
    _swallowed[:] = [stop]
    return stop
