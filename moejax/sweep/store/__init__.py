"""The SQLite store of results: writing, reading, checking, repairing and merging it."""

__all__ = [
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
