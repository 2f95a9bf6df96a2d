"""`moejax reproduce`: the figures and tables of experiments/. Experiments import all that they need of it from here."""

from moejax.pictures import COLOURS
from moejax.reproduce.claims import Number
from moejax.reproduce.experiment import Experiment
from moejax.sweep.monte_carlo import mean_and_mcse
from moejax.sweep.report.axes import HEAT_MAP, MARKERS, draw_heat_map
from moejax.sweep.report.figures import line_figure
from moejax.sweep.report.summary import estimates

__all__ = [
    "COLOURS",
    "HEAT_MAP",
    "MARKERS",
    "Experiment",
    "Number",
    "draw_heat_map",
    "estimates",
    "line_figure",
    "mean_and_mcse",
]
