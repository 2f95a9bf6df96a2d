"""The SQLite store of results: writing, reading, checking and repairing it."""

__all__ = ["digests", "lock", "read", "repair", "schema", "soundness", "store"]
