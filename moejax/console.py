"""Output of the program: tables that show a user's words unchanged, JSON, error lines; and the case of a reader that has gone."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import select
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

LONGEST_MESSAGE = 1000
"""Longest message, in characters, that a person reads and a screen holds."""
LONGEST_TAIL = 40
"""Most characters of the note on how much text was left out."""
CLOSED_PIPE_STATUS = 141
"""Exit status when the reader of the output is gone, as shells count it: 128 + SIGPIPE."""
OUTPUT_ERROR_STATUS = 2
DEFAULT_WIDTH = 80
WIDEST = 10_000
_ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's control characters, invisible formats, lone surrogates and separators of lines and paragraphs."""


def printable(text: str) -> str:
    """The text with control characters written as escapes: a name cannot colour, move or clear a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in _ESCAPED_CATEGORIES
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def shorten(text: str, most: int = LONGEST_MESSAGE) -> str:
    """The text if it has at most `most` characters; else its beginning and the number of characters left out."""
    if len(text) <= most:
        return text
    kept = most - LONGEST_TAIL
    return f"{text[:kept]}... ({len(text) - kept:,} more characters)"


def error_line(error: BaseException | str) -> str:
    """The message of an error on one line that fits a screen; an error of the operating system begins with the file."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    return shorten(printable(" ".join(text.split())))


class PlainConsole(Console):
    """A console that shows strings as they are: `[red]` and `:smile:` in a name are the name's own characters.

    Rich sends every string through `render_str`, those in the cells, heads and titles of tables too. Styles come as `Text`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text: without markup or emoji, and with control characters shown."""
        plain: dict[str, Any] = {"emoji": False, "markup": False}
        return super().render_str(printable(text), **(options | plain))

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Rich does, but let a table be wider than the terminal: it would lose numbers."""
        given = self._width
        if len(objects) == 1 and isinstance(objects[0], Table):
            self.width = max(self.width, self._least_width(objects[0]))
        try:
            super().print(*objects, **options)
        finally:
            self._width = given

    def _least_width(self, table: Table) -> int:
        """The width at which no number, head or word of a table is cut."""
        for column in table.columns:
            column.overflow = "fold"
            column.no_wrap = column.no_wrap or column.justify == "right"
            texts = (column.header, *column.cells)
            parts = (str(text).splitlines() if column.no_wrap else str(text).split() for text in texts)
            column.min_width = max((cell_len(part) for part in itertools.chain(*parts)), default=0)
        return Measurement.get(self, self.options.update(width=WIDEST), table).minimum

    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to `output_that_may_close`; Rich would end the process with status 1."""
        raise  # noqa: PLE0704 - Rich calls this while it handles the BrokenPipeError


class _LossyStream:
    """A stream that drops all further output once its reader is gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _drop_output(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _drop_output(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_console(*, quiet: bool = False) -> Console:
    """The console of tables, on stdout."""
    return PlainConsole(quiet=quiet, width=_width())


def make_notes(*, quiet: bool = False) -> Console:
    """The console of progress and notes, on stderr: work goes on after their reader has gone."""
    stream: Any = sys.stderr if sys.stderr is None else _LossyStream(sys.stderr)
    return PlainConsole(file=stream, quiet=quiet, width=_width())


def _width() -> int | None:
    """A width if COLUMNS is 0, for which Rich would print nothing; None leaves the choice to Rich."""
    return DEFAULT_WIDTH if os.environ.get("COLUMNS", "").strip() == "0" else None


def print_json(value: Any, indent: int | None = None) -> None:
    """Print a result as JSON; a number that is not finite is null, because JSON cannot represent it."""
    print(json.dumps(_finite(value), indent=indent, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_error(error: BaseException | str) -> None:
    """Print an error, or a warning, as the program's one line on stderr."""
    print(f"moejax: {error_line(error)}", file=sys.stderr)


@contextlib.contextmanager
def output_that_may_close() -> Iterator[None]:
    """End the process quietly with status 141, as other programs do, if the reader of its output goes (`moejax ... | head`).

    A character that the terminal's encoding lacks is replaced. Buffered output is written before the block ends,
    so that no error is left for Python's shutdown. Any other error of stdout, such as a full disk, is one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except BrokenPipeError as error:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        if not closed:
            print_error(error)
            raise SystemExit(OUTPUT_ERROR_STATUS) from None
        for stream in closed:
            _drop_output(stream)
        raise SystemExit(CLOSED_PIPE_STATUS) from None
    except OSError as error:
        _drop_output(sys.stdout)
        print_error(f"the output cannot be written: {error.strerror or error}")
        raise SystemExit(OUTPUT_ERROR_STATUS) from None


def _is_closed(stream: TextIO | None) -> bool:
    """True if the reader of a pipe has gone."""
    if stream is None:
        return False
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False  # no file, as in a notebook or under test
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output(stream: TextIO) -> None:
    """Discard buffered output, so that flushing it at Python's shutdown cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 8 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(seconds, 0.0)
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
