"""Fits of a user's arrays and tables, in the user's units."""

__all__ = [
    "arguments",
    "array_checks",
    "data_units",
    "datasets",
    "delimited_text",
    "diagnostics",
    "estimation",
    "estimator",
    "estimator_inputs",
    "label_units",
    "pipeline",
    "predictive",
    "preparation",
    "result",
    "selection",
    "streaming",
    "tables",
    "uncertainty",
    "whitening",
]
