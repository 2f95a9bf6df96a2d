"""moejax: parameter recovery for mixtures of experts, from moments to the maximum-likelihood estimate."""

# ruff: noqa: E402 - before the imports that take seconds
from moejax.startup import end_quietly_on_interrupt, imported_on_first_use

end_quietly_on_interrupt()

import importlib
from typing import TYPE_CHECKING, Any

from moejax import methods  # noqa: F401 - it registers the methods
from moejax.environment import keep_compiled_programs
from moejax.methods.method import register_method
from moejax.methods.options import FitOptions
from moejax.model.activations import activation_names, register_activation
from moejax.model.families import family_names, get_family, register_family
from moejax.model.family import Family
from moejax.model.inputs import register_input_distribution
from moejax.model.metrics import recovery_error, register_metric
from moejax.model.mixture import MoEParams, log_likelihood, make_params, predict, responsibilities, sample
from moejax.moments.label_transforms import LabelTransform
from moejax.moments.orders import label_transform
from moejax.registry import take_for_built_in

if TYPE_CHECKING:
    from moejax import sweep
    from moejax.fitting.classifier import MoEClassifier
    from moejax.fitting.estimator import MoERegressor
    from moejax.fitting.pipeline import fit
    from moejax.fitting.plots import plot_calibration, plot_coefficients, plot_fit, plot_responsibilities
    from moejax.fitting.result import FitResult
    from moejax.fitting.saved import load_fit
    from moejax.fitting.streaming.files import FileSource
    from moejax.fitting.streaming.source import ArraySource

take_for_built_in()

__version__ = "0.2.0"

__all__ = [
    "ArraySource",
    "Family",
    "FileSource",
    "FitOptions",
    "FitResult",
    "LabelTransform",
    "MoEClassifier",
    "MoEParams",
    "MoERegressor",
    "activation_names",
    "family_names",
    "fit",
    "get_family",
    "keep_compiled_programs",
    "label_transform",
    "load_fit",
    "log_likelihood",
    "make_params",
    "plot_calibration",
    "plot_coefficients",
    "plot_fit",
    "plot_responsibilities",
    "predict",
    "recovery_error",
    "register_activation",
    "register_family",
    "register_input_distribution",
    "register_method",
    "register_metric",
    "responsibilities",
    "sample",
    "sweep",
]

_ON_FIRST_USE = {
    "ArraySource": "moejax.fitting.streaming.source",
    "FileSource": "moejax.fitting.streaming.files",
    "FitResult": "moejax.fitting.result",
    "MoEClassifier": "moejax.fitting.classifier",
    "MoERegressor": "moejax.fitting.estimator",
    "fit": "moejax.fitting.pipeline",
    "load_fit": "moejax.fitting.saved",
    "plot_calibration": "moejax.fitting.plots",
    "plot_coefficients": "moejax.fitting.plots",
    "plot_fit": "moejax.fitting.plots",
    "plot_responsibilities": "moejax.fitting.plots",
}
"""Names whose modules need pandas, SciPy or scikit-learn, which take as long to import as everything else together."""


def __getattr__(name: str) -> Any:
    """Import a name of `_ON_FIRST_USE`, or the room `sweep`, on first use."""
    if name == "sweep":
        return importlib.import_module("moejax.sweep")
    return imported_on_first_use(__name__, _ON_FIRST_USE, name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
