"""Signals that end a sweep in good order: finished trials are committed, workers and queued jobs are cancelled."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNAL_STATUS = 128
"""The exit status after a signal, as shells count it, is this plus the signal's number."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: it ends the run as Ctrl-C does, with a different exit status."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(stop: KeyboardInterrupt) -> int:
    """The exit status of a program that this interrupt stopped."""
    return SIGNAL_STATUS + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


_swallowed: list[KeyboardInterrupt] = []
"""A stop that was raised, until it is known to have been caught."""


def raise_if_stopped() -> None:
    """Raise a signal's stop again if it was raised where it could not be caught.

    JAX's hook into garbage collection, for example, prints and drops every error raised while it runs.
    """
    if _swallowed:
        raise _swallowed.pop()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """In the block, the first SIGTERM or SIGHUP raises `Stopped`, and a second one ends the process at once.

    Ctrl-C raises KeyboardInterrupt as usual. `raise_if_stopped` raises both again if they were lost. One that came out of a
    library as another error (a lock that it left half taken) ends the block as the stop that it was. A signal that is ignored
    (nohup) stays ignored, and a signal that the caller handles stays with its handler.
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
        if not isinstance(lost.exc_value, KeyboardInterrupt):  # otherwise `raise_if_stopped` raises it
            told_before(lost)

    told_before, sys.unraisablehook = sys.unraisablehook, tell_unraisable
    for number in numbers:
        signal.signal(number, stop)
    if interrupts:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if _swallowed:
            raise _swallowed.pop() from error
        raise
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
