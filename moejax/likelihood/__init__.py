"""The likelihood: its EM steps, its derivatives, the ascent to its maximum and the information there."""

from moejax.likelihood.em import gating_em, joint_em
from moejax.likelihood.fisher import fisher_information
from moejax.likelihood.information import (
    COVARIANCE_KINDS,
    confidence_intervals,
    covariance,
    cramer_rao_bound,
    parameter_blocks,
    standard_errors,
)
from moejax.likelihood.predictors import free_parameters

__all__ = [
    "COVARIANCE_KINDS",
    "confidence_intervals",
    "covariance",
    "cramer_rao_bound",
    "fisher_information",
    "free_parameters",
    "gating_em",
    "joint_em",
    "parameter_blocks",
    "standard_errors",
]
