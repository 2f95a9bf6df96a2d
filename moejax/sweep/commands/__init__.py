"""The commands of sweeps that the command line calls, and `run`, the function for sweeps in Python.

Each command prints for a person (tables on stdout, progress on stderr) and returns the same content as plain data;
`as_json` prints that data instead. A user's error is a ValueError or OSError with one line.
"""

from moejax.sweep.commands.reading import compare, export, merge, report, status
from moejax.sweep.commands.running import run, sweep

__all__ = ["compare", "export", "merge", "report", "run", "status", "sweep"]
