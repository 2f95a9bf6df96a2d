"""Fits of rows that do not fit in memory: sources, passes over them, and what is kept between passes."""
