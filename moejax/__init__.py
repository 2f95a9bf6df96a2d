"""moejax: parameter recovery for mixtures of experts, from moments to the maximum-likelihood estimate."""

# ruff: noqa: E402 - before the imports that take seconds
from moejax.startup import end_quietly_on_interrupt

end_quietly_on_interrupt()

from typing import TYPE_CHECKING, Any

from moejax import methods  # noqa: F401 - it registers the methods
from moejax.fitting.pipeline import fit
from moejax.fitting.result import FitResult
from moejax.methods.method import register_method
from moejax.model.activations import activation_names, register_activation
from moejax.model.inputs import register_input_distribution
from moejax.model.metrics import recovery_error, register_metric
from moejax.model.mixture import MoEParams, log_likelihood, make_params, predict, responsibilities, sample
from moejax.moments.label_transforms import LabelTransform
from moejax.moments.orders import label_transform
from moejax.registry import take_for_built_in

if TYPE_CHECKING:
    from moejax.fitting.estimator import MoERegressor

take_for_built_in()

__version__ = "0.2.0"

__all__ = [
    "FitResult",
    "LabelTransform",
    "MoEParams",
    "MoERegressor",
    "activation_names",
    "fit",
    "label_transform",
    "log_likelihood",
    "make_params",
    "predict",
    "recovery_error",
    "register_activation",
    "register_input_distribution",
    "register_method",
    "register_metric",
    "responsibilities",
    "sample",
]


def __getattr__(name: str) -> Any:
    """The estimator, on first use: scikit-learn takes a second to import, and little else here needs it."""
    if name == "MoERegressor":
        from moejax.fitting.estimator import MoERegressor

        return MoERegressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
