"""Estimates, tables, figures and the report page of a sweep."""

__all__ = ["axes", "figures", "page", "progress", "status", "summary", "terminal"]
