"""Estimates, tables, figures and the report page of a sweep."""

__all__ = [
    "axes",
    "charts",
    "comparison",
    "figures",
    "page",
    "page_script",
    "pairing",
    "progress",
    "status",
    "summary",
    "terminal",
]
