"""Sweeps of parameter-recovery trials: declared in TOML, resumable, crash-safe.

spec -> plan (cells, buckets, chunks) -> engine and executors -> store -> tables, summary, figures, report
"""

from moejax.sweep.plan.identity import trial_key
from moejax.sweep.spec.parse import Spec, parse_spec, read_spec
from moejax.sweep.spec.positions import SpecError
from moejax.sweep.store.read import export_table, load, load_arrays, load_runs, load_timings

__all__ = [
    "Spec",
    "SpecError",
    "export_table",
    "load",
    "load_arrays",
    "load_runs",
    "load_timings",
    "parse_spec",
    "read_spec",
    "trial_key",
]
