"""The file of a sweep, checked before anything runs."""

__all__ = ["fields", "overrides", "parse", "positions", "precision"]
