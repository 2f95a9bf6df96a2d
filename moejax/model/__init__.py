"""The mixture of experts itself: activations, parameters, likelihood, input distributions, random instances and errors."""

from moejax.model.activations import activation_facts, activation_names, get_activation, register_activation
from moejax.model.families import family_names, get_family, register_family
from moejax.model.family import Family
from moejax.model.gaussian import standard_normal
from moejax.model.inputs import get_input_distribution, get_log_density, register_input_distribution
from moejax.model.instances import InstanceScales, random_params
from moejax.model.metrics import (
    SUCCESS_THRESHOLD,
    align,
    bottleneck_assignment,
    expert_distances,
    match_experts,
    recovery_error,
    register_metric,
)
from moejax.model.mixture import (
    MoEParams,
    log_likelihood,
    log_likelihood_per_sample,
    make_params,
    predict,
    regauge,
    responsibilities,
    sample,
    sample_labels,
)
from moejax.model.small_linear_algebra import unit_rows

__all__ = [
    "SUCCESS_THRESHOLD",
    "Family",
    "InstanceScales",
    "MoEParams",
    "activation_facts",
    "activation_names",
    "align",
    "bottleneck_assignment",
    "expert_distances",
    "family_names",
    "get_activation",
    "get_family",
    "get_input_distribution",
    "get_log_density",
    "log_likelihood",
    "log_likelihood_per_sample",
    "make_params",
    "match_experts",
    "predict",
    "random_params",
    "recovery_error",
    "regauge",
    "register_activation",
    "register_family",
    "register_input_distribution",
    "register_metric",
    "responsibilities",
    "sample",
    "sample_labels",
    "standard_normal",
    "unit_rows",
]
