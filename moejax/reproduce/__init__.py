"""`moejax reproduce`: the figures and tables of experiments/."""

__all__ = ["cell_functions", "claims", "experiment", "results_folder", "runner"]
