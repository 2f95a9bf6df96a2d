"""Fits of rows that do not fit in memory: sources, passes over them, and what is kept between passes."""

__all__ = [
    "checkpoint",
    "files",
    "fit",
    "remote",
    "runners",
    "source",
    "sums",
    "survey",
    "text_rows",
]
