"""The progress of a sweep on the screen: a bar with the time left on a terminal, else an occasional line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from moejax.console import duration

LINE_SECONDS = 15.0
MAX_NOTES = 20


class SweepProgress:
    """Reports to a console; if quiet, only notes of trouble."""

    def __init__(self, console: Console, bar: Progress | None, quiet: bool):
        self._console = console
        self._bar = bar
        self._quiet = quiet
        self._task = None if bar is None else bar.add_task("trials", total=None, counts="")
        self._last_line = time.monotonic()
        self._notes = 0

    def update(
        self,
        trials_done: int,
        trials_known: int,
        work_done: float,
        work_known: float,
        seconds_left: float | None,
    ) -> None:
        """Show the counts so far, in the bar or, without one, in an occasional line."""
        counts = f"{trials_done:,}/{trials_known:,} trials"
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=work_done,
                total=work_known or None,
                counts=counts,
                seconds_left=seconds_left,
            )
        elif (
            not self._quiet
            and time.monotonic() - self._last_line > LINE_SECONDS
            and trials_done < trials_known
        ):
            self._last_line = time.monotonic()
            when = "" if seconds_left is None else f", {duration(seconds_left)} left"
            self._console.print(f"{counts}{when}")

    def note(self, line: str) -> None:
        """Print a line on an event; after MAX_NOTES lines, no more are shown."""
        self._notes += 1
        if self._notes <= MAX_NOTES:
            self._console.print(Text(line, style="yellow"), soft_wrap=True)
        elif self._notes == MAX_NOTES + 1:
            self._console.print(Text("more of the same follows and is not shown", style="yellow"))


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.fields.get("seconds_left")
        return Text("time left: ?" if left is None else f"{duration(left)} left", style="cyan")


@contextmanager
def sweep_progress(console: Console, quiet: bool) -> Iterator[SweepProgress]:
    """A progress report that ends with the block, also after an error."""
    if quiet or not console.is_terminal:
        yield SweepProgress(console, None, quiet)
        return
    columns = (
        BarColumn(bar_width=None),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        _TimeLeft(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield SweepProgress(console, bar, quiet)
