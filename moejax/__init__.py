"""moejax: parameter recovery for mixtures of experts, from moments to the maximum-likelihood estimate."""

from moejax import baselines as _baselines  # noqa: F401 - registers them
from moejax.activations import activation_names, register_activation
from moejax.fitting import FitResult, fit
from moejax.inputs import register_input_distribution
from moejax.label_transforms import LabelTransform, label_transform
from moejax.methods import register_method
from moejax.metrics import recovery_error
from moejax.model import MoEParams, log_likelihood, make_params, predict, responsibilities, sample

__version__ = "0.1.0"

__all__ = [
    "FitResult",
    "LabelTransform",
    "MoEParams",
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
    "responsibilities",
    "sample",
]
