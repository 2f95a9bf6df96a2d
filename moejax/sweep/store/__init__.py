"""The SQLite store of results: writing, reading, checking, repairing and merging it."""

__all__ = ["digests", "filters", "lock", "merge", "read", "repair", "schema", "soundness", "store"]
