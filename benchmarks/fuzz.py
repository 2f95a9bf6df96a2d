"""A fuzz test: many bad and strange inputs must give no traceback, no hang, and no non-finite number with status ok.

    python benchmarks/fuzz.py                                     10,000 inputs, split evenly over the kinds
    python benchmarks/fuzz.py --count 500 --only spec_text        one kind (--only may be given more than once)
    python benchmarks/fuzz.py --only spec_text --seed 0 --index 17 --count 1         repeat one input

A kind is a function that takes a NumPy generator, draws one input, runs it, and returns None, or a string that names a
silent fault. A refusal is a ValueError or OSError of one line that moejax itself raised; every other exception is counted as a
traceback, and an input that takes longer than the limit as a hang. The kinds are the tables `KINDS` of the files fuzz_*.py in
this folder. Such a file may also have `SHARES` (kind -> relative number of inputs, 1 by default) and `last_input()`, which returns
the text of the last input. Each failing input is written to a separate file in the folder of `--out`, with the command that
repeats it.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import importlib
import os
import resource
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Before NumPy and JAX are imported: the inputs are small, and threads would cost more than they save.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

Kind = Callable[[np.random.Generator], "str | None"]

HERE = Path(__file__).resolve().parent
LONGEST_LINE = 1000
"""Longest refusal, in characters, that fits a screen."""
STUCK = 4
"""A call that Python cannot interrupt ends the process after this many times the limit."""


class TookTooLong(BaseException):
    """The time limit of an input is over. It is no `Exception`, so the code under test cannot catch it by accident."""


@dataclasses.dataclass
class Count:
    """Outcomes of the inputs of one kind."""

    tried: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    silent: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def faults(self) -> int:
        """Number of inputs that showed a fault."""
        return self.tracebacks + self.hangs + self.silent


def load_kinds() -> tuple[dict[str, Kind], dict[str, float], dict[str, Callable[[], str]]]:
    """The kinds of every fuzz_*.py in this folder, their shares, and the functions that show the last input."""
    sys.path.insert(0, str(HERE))
    kinds: dict[str, Kind] = {}
    shares: dict[str, float] = {}
    shown: dict[str, Callable[[], str]] = {}
    for path in sorted(HERE.glob("fuzz_*.py")):
        module = importlib.import_module(path.stem)
        for name, kind in getattr(module, "KINDS", {}).items():
            if name in kinds:
                raise ValueError(f"{path.name}: the kind {name} is in another file too")
            kinds[name] = kind
            shares[name] = getattr(module, "SHARES", {}).get(name, 1.0)
            shown[name] = getattr(module, "last_input", lambda: "")
    return kinds, shares, shown


def generator(kind: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one input; they do not depend on the other inputs."""
    return np.random.default_rng([seed, zlib.crc32(kind.encode()), index])


def is_refusal(error: BaseException) -> bool:
    """True if an exception is a clear refusal: one line that moejax (or scikit-learn, in the estimator's name) raised."""
    if not isinstance(error, ValueError | OSError | TypeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = frames[-1].filename if frames else ""
    if f"{os.sep}sklearn{os.sep}" in raised_in:
        return True
    own = f"{os.sep}moejax{os.sep}" in raised_in or Path(raised_in).parent == HERE
    text = str(error)
    return (
        own and isinstance(error, ValueError | OSError) and "\n" not in text and 0 < len(text) <= LONGEST_LINE
    )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in the block after this time; a call that never returns to Python ends the process."""

    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(STUCK * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def run_one(kind: Kind, rng: np.random.Generator, limit: float) -> tuple[str, str]:
    """Run one input; returns ("ok" | "refused" | "tracebacks" | "hangs" | "silent", a description)."""
    try:
        with time_limit(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            silent = kind(rng)
    except TookTooLong:
        return "hangs", f"took longer than {limit:g} s\n{traceback.format_exc()}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a library must not end its caller's process
        if is_refusal(error):
            return "refused", str(error)
        return "tracebacks", traceback.format_exc()
    return ("ok", "") if silent is None else ("silent", silent)


def run_kind(
    name: str, kind: Kind, indices: range, seed: int, limit: float, folder: Path, shown: Callable[[], str]
) -> Count:
    """Run the inputs of one kind; write the failing ones into the folder."""
    count = Count()
    current = folder / f"{name}-running.txt"
    for index in indices:
        again = f"python benchmarks/fuzz.py --only {name} --seed {seed} --index {index} --count 1"
        current.write_text(again + "\n", encoding="utf-8")  # the last input, in case it ends the process
        started = time.perf_counter()
        outcome, seen = run_one(kind, generator(name, seed, index), limit)
        seconds = time.perf_counter() - started
        count.tried += 1
        count.seconds += seconds
        count.slowest = max(count.slowest, seconds)
        if outcome == "ok":
            continue
        setattr(count, outcome, getattr(count, outcome) + 1)
        if outcome != "refused":
            last = [line for line in seen.splitlines() if line.strip()][-1]
            print(f"{name} {index}: {outcome}: {last[:200]}", flush=True)
            text = f"{again}\n\n{outcome}: {seen}\n\ninput:\n{shown()}\n"
            path = folder / f"{name}-{seed}-{index}.txt"
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
    current.unlink(missing_ok=True)
    return count


def print_table(counts: dict[str, Count]) -> None:
    """One line for each kind, and their sum."""
    from rich.console import Console
    from rich.table import Table

    total = Count()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kind", no_wrap=True)
    for head in ("inputs", "refused", "tracebacks", "hangs", "silent", "ms/input", "slowest, s"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, count in [*counts.items(), ("all", total)]:
        table.add_row(
            name,
            *(f"{n:,}" for n in (count.tried, count.refused, count.tracebacks, count.hangs, count.silent)),
            f"{1e3 * count.seconds / max(count.tried, 1):.1f}",
            f"{count.slowest:.2f}",
        )
        for field in dataclasses.fields(Count):
            merge = max if field.name == "slowest" else lambda a, b: a + b
            setattr(total, field.name, merge(getattr(total, field.name), getattr(count, field.name)))
    Console(width=max(110, Console().width)).print(table)


def main() -> None:
    """Read the options, run the inputs, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="run this kind alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one input (default: 30)")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that the process may use (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="folder of failing inputs")
    options = parser.parse_args()
    kinds, shares, shown = load_kinds()
    unknown = [name for name in options.only if name not in kinds]
    if unknown:
        parser.error(f"--only: no kind {unknown[0]}; known: {', '.join(kinds)}")
    chosen = {name: kind for name, kind in kinds.items() if not options.only or name in options.only}
    most = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    options.out.mkdir(parents=True, exist_ok=True)
    whole = sum(shares[name] for name in chosen)
    counts = {}
    for name, kind in chosen.items():
        number = max(1, round(options.count * shares[name] / whole))
        indices = range(options.index, options.index + number)
        counts[name] = run_kind(name, kind, indices, options.seed, options.limit, options.out, shown[name])
    print_table(counts)
    faults = sum(count.faults for count in counts.values())
    if faults:
        print(f"{faults:,} faults: see {options.out}")
        sys.exit(1)


if __name__ == "__main__":
    main()
