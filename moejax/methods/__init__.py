"""The methods: each is a registered function from a sample to an estimate."""

from typing import Any

from moejax.methods.annealed import annealed_em
from moejax.methods.from_moments import (
    EM_STEPS,
    EM_TOLERANCE,
    MOMENT_PASSES,
    climbed_from,
    em_before_polish,
    polish_from,
    spectral,
    spectral_em,
    spectral_residual,
)
from moejax.methods.gated_loss import gated_losses
from moejax.methods.global_search import multistart
from moejax.methods.gradient_descent import gradient_mse, gradient_nll
from moejax.methods.joint_em import joint_em_starts
from moejax.methods.mean_search import mean_fit
from moejax.methods.method import (
    STARTS,
    Method,
    MethodConfig,
    MethodResult,
    Moments,
    Problem,
    Registered,
    SearchEnd,
    Slopes,
    Start,
    finish,
    get_method,
    lookup_method,
    method_names,
    moments_of,
    register_method,
    require_slopes,
    with_path,
)
from moejax.methods.spectral_wide import spectral_wide
from moejax.methods.starts import label_mean, label_spread, random_starts, zero_gates
from moejax.methods.third_moment import third_moment

__all__ = [
    "EM_STEPS",
    "EM_TOLERANCE",
    "MOMENT_PASSES",
    "STARTS",
    "Method",
    "MethodConfig",
    "MethodResult",
    "Moments",
    "Problem",
    "Registered",
    "SearchEnd",
    "Slopes",
    "Start",
    "annealed_em",
    "climbed_from",
    "em_before_polish",
    "finish",
    "gated_losses",
    "get_method",
    "gradient_mse",
    "gradient_nll",
    "joint_em_starts",
    "label_mean",
    "label_spread",
    "lookup_method",
    "mean_fit",
    "method_names",
    "moments_of",
    "multistart",
    "polish_from",
    "random_starts",
    "register_method",
    "require_slopes",
    "spectral",
    "spectral_em",
    "spectral_residual",
    "spectral_wide",
    "third_moment",
    "with_path",
    "zero_gates",
]

_ANY_LABEL_ANY_INPUTS: dict[str, Any] = {"families": True, "separate_inputs": True}
register_method("spectral", spectral, moments="required", slopes="unused", **_ANY_LABEL_ANY_INPUTS)
register_method(
    "spectral_residual", spectral_residual, moments="required", slopes="unused", **_ANY_LABEL_ANY_INPUTS
)
register_method("spectral_em", spectral_em, moments="required", slopes="polish", **_ANY_LABEL_ANY_INPUTS)
register_method("spectral_wide", spectral_wide, moments="required", wide=True)
register_method("third_moment", third_moment, moments="third", slopes="polish", **_ANY_LABEL_ANY_INPUTS)
register_method("annealed_em", annealed_em, moments="optional", separate_inputs=True)
register_method("joint_em", joint_em_starts, moments="none", several_outputs=True, **_ANY_LABEL_ANY_INPUTS)
register_method("gradient_nll", gradient_nll, moments="none", families=True)
register_method("gradient_mse", gradient_mse, moments="none")
register_method("gated_losses", gated_losses, moments="required", order=4)
register_method("mean_fit", mean_fit, moments="none", staged=True)
register_method(
    "multistart", multistart, moments="optional", several_outputs=True, staged=True, **_ANY_LABEL_ANY_INPUTS
)
