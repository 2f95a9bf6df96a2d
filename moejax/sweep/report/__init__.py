"""Estimates, tables, figures and the report page of a sweep."""

__all__ = ["axes", "comparison", "figures", "page", "pairing", "progress", "status", "summary", "terminal"]
