"""The SQLite store of results: writing, reading, checking, repairing and merging it."""

__all__ = [
    "costs",
    "digests",
    "export",
    "filters",
    "lock",
    "merge",
    "pivot",
    "read",
    "repair",
    "schema",
    "soundness",
    "store",
]
