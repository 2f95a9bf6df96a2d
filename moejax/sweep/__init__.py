"""Sweeps of parameter-recovery trials: declared in TOML, resumable, crash-safe.

spec -> plan (cells, buckets, chunks) -> engine and executors -> store -> tables, summary, figures, report
"""

from typing import TYPE_CHECKING, Any

from moejax.startup import imported_on_first_use
from moejax.sweep.plan.identity import trial_key
from moejax.sweep.spec.parse import Spec, parse_spec, read_spec
from moejax.sweep.spec.positions import SpecError

if TYPE_CHECKING:
    from moejax.sweep.commands import run
    from moejax.sweep.report.comparison import Comparison, compare
    from moejax.sweep.store.export import export_table
    from moejax.sweep.store.read import load, load_arrays, load_runs, load_timings

__all__ = [
    "Comparison",
    "Spec",
    "SpecError",
    "compare",
    "export_table",
    "load",
    "load_arrays",
    "load_runs",
    "load_timings",
    "parse_spec",
    "read_spec",
    "run",
    "trial_key",
]

_ON_FIRST_USE: dict[str, str] = {
    "run": "moejax.sweep.commands",
    "Comparison": "moejax.sweep.report.comparison",
    "compare": "moejax.sweep.report.comparison",
    "export_table": "moejax.sweep.store.export",
} | dict.fromkeys(("load", "load_arrays", "load_runs", "load_timings"), "moejax.sweep.store.read")
"""Names whose modules need pandas; workers run without it."""


def __getattr__(name: str) -> Any:
    """Import a name of `_ON_FIRST_USE`."""
    return imported_on_first_use(__name__, _ON_FIRST_USE, name)
