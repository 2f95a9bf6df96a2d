"""The settings of a trial, and their checks."""

from __future__ import annotations

import dataclasses
import functools
import math

from moejax.checks import require
from moejax.likelihood.predictors import num_free_parameters
from moejax.methods.method import STARTS, get_method, require_family, require_slopes
from moejax.methods.options import FitOptions
from moejax.model.activations import get_activation
from moejax.model.families import channel_of, get_family
from moejax.model.inputs import get_input_distribution
from moejax.moments.label_transforms import TRANSFORM_KINDS


@dataclasses.dataclass(frozen=True, slots=True)
class DataSettings:
    """The truth and the distribution of the data. Every field can be an axis of a sweep."""

    activation: str = "linear"
    dim: int = 10
    num_experts: int = 3
    num_samples: int = 10_000
    noise_std: float = 0.1
    gating_norm: float = 1.0
    gating_angle: float = 90.0
    """Angle in degrees between each gate and the span of the experts; 90 is orthogonal."""
    expert_correlation: float = 0.0
    """Cosine between every two experts."""
    expert_norms: float | tuple[float, ...] = 1.0
    """One norm for all experts, or one for each."""
    input_distribution: str = "standard_normal"
    family: str = "gaussian"
    """The output family, with its numbers: "poisson", "binomial(10)"; its dispersion is `noise_std`."""
    expert_bias: float = 0.0
    """The intercept of every expert."""
    gating_bias: float = 0.0
    """The intercept of the first gate; those of the others fall to the last one's zero in equal steps."""
    outlier_share: float = 0.0
    """Share of the labels of the sample, not of the held-out one, that are replaced by normal ones of standard deviation 10."""


@dataclasses.dataclass(frozen=True, slots=True)
class AlgorithmSettings:
    """The method of a fit and its options. Methods and algorithm fields of one instance share the same data.

    `FitOptions` explains the options and has their defaults.
    """

    method: str = "spectral_em"
    fit_activation: str | None = None
    """The activation that is fitted; None: the true one."""
    fit_family: str | None = None
    """The family that is fitted; None: the true one."""
    fit_intercept: bool = False
    """If true, the intercepts of experts and gates are fitted; otherwise the experts of other families than the Gaussian have the
    true one, or the one that is estimated with the dispersion."""
    fit_num_experts: int | None = None
    noise_knowledge: str = "known"
    """"known" or "estimated"."""
    transform: str = "weighted"
    """For all methods; a fit with residual passes takes "relaxed" by default. The default is part of the keys of stored results."""
    order: int | None = FitOptions.order
    num_restarts: int = FitOptions.num_restarts
    num_starts: int | None = FitOptions.num_starts
    start: str = FitOptions.start
    polish: bool = FitOptions.polish
    max_iterations: int = 100
    """Smaller than for a fit: trials side by side all use their whole budget. The default is part of the keys of stored results."""
    expert_steps: int = 1
    """Gauss-Newton steps of the experts in every M-step of joint EM, each with a pass over the data."""
    record: tuple[str, ...] = ()
    """Extra results: "history" of the objective (`method.MethodResult`), "path" of the errors along it."""


ADDED_LATER = {
    "family": "gaussian",
    "expert_bias": 0.0,
    "gating_bias": 0.0,
    "outlier_share": 0.0,
    "fit_family": None,
    "fit_intercept": False,
    "expert_steps": 1,
}
"""Fields that older results lack, and their defaults."""


def check_settings(data: DataSettings, algorithm: AlgorithmSettings) -> None:
    """Refuse settings that cannot be run.

    Raises:
        ValueError: "FIELD: expected .., got ..", one line.
    """
    _check_data(data)
    _check_algorithm(algorithm)
    num_fitted = _num_fitted(data, algorithm)
    require(1 <= num_fitted <= data.dim, "fit_num_experts", f"1 to dim = {data.dim}", num_fitted)
    needed = num_free_parameters(num_fitted, data.dim, "shared", fit_intercept=False) + 1
    require(
        data.num_samples >= needed,
        "num_samples",
        f"at least {needed} for k = {num_fitted}, d = {data.dim}",
        data.num_samples,
    )
    fitted, field = algorithm.fit_activation or data.activation, "fit_" if algorithm.fit_activation else ""
    channel = channel_of(algorithm.fit_family or data.family, fitted)
    try:
        require_slopes(algorithm.method, channel, polish=algorithm.polish)
    except ValueError as error:
        raise ValueError(f"{field}{error}") from None
    require_family(algorithm.method, channel)
    _check_fitted_family(data, algorithm)


def _check_fitted_family(data: DataSettings, algorithm: AlgorithmSettings) -> None:
    """Refuse families whose parameters have no values, and a fitted one that cannot have the true labels."""
    fitted = algorithm.fit_family or data.family
    families = {"family": data.family, "fit_family": fitted}
    for field, name in families.items():
        words = "one with its parameters, as student_t(3) or ordinal(3,-1,1)"
        require(get_family(name).num_parameters == 0, field, words, name)
    truth, support = (get_family(name).support for name in families.values())
    real, positive = support == "real", support == "positive" and truth == "positive"
    counts = (support == "counts" and truth not in ("real", "positive")) or support == truth
    require(real or positive or counts, "fit_family", f"one for labels of {data.family}", fitted)
    gaussian = fitted == "gaussian"
    words = "'random' with another family than the Gaussian"
    require(gaussian or algorithm.start == "random", "start", words, algorithm.start)
    words = "0 for Gaussian experts whose intercepts are not fitted (fit_intercept)"
    none = data.expert_bias == 0 or algorithm.fit_intercept or not gaussian
    require(none, "expert_bias", words, data.expert_bias)
    words = "0 where the intercepts of the gates are not fitted (fit_intercept)"
    require(data.gating_bias == 0 or algorithm.fit_intercept, "gating_bias", words, data.gating_bias)
    words = "0 with labels that are not real numbers"
    require(truth == "real" or data.outlier_share == 0, "outlier_share", words, data.outlier_share)


@functools.lru_cache(maxsize=1024)  # a sweep calls this for every method of the same data
def _check_data(data: DataSettings) -> None:
    for field in ("dim", "num_experts", "num_samples"):
        require(getattr(data, field) >= 1, field, "a positive number", getattr(data, field))
    require(data.num_experts <= data.dim, "num_experts", f"at most dim = {data.dim}", data.num_experts)
    noise_std, gating_norm = data.noise_std, data.gating_norm
    require(math.isfinite(noise_std) and noise_std > 0, "noise_std", "a positive finite number", noise_std)
    require(math.isfinite(gating_norm) and gating_norm >= 0, "gating_norm", "a number >= 0", gating_norm)
    require(0 <= data.gating_angle <= 90, "gating_angle", "degrees from 0 to 90", data.gating_angle)
    require(
        data.dim > data.num_experts
        or data.gating_angle == 0
        or data.gating_norm == 0
        or data.num_experts == 1,
        "gating_angle",
        "0 where dim = num_experts (nothing is orthogonal to the experts' span)",
        data.gating_angle,
    )
    lowest = -1.0 / max(data.num_experts - 1, 1)
    require(
        lowest < data.expert_correlation < 1,
        "expert_correlation",
        f"between {lowest:.3g} and 1",
        data.expert_correlation,
    )
    norms = norms_of_experts(data)
    require(
        len(norms) == data.num_experts, "expert_norms", f"one number or {data.num_experts}", data.expert_norms
    )
    require(
        all(math.isfinite(v) and v > 0 for v in norms), "expert_norms", "positive numbers", data.expert_norms
    )
    require(0 <= data.outlier_share < 1, "outlier_share", "a number from 0 to below 1", data.outlier_share)
    for field in ("expert_bias", "gating_bias"):
        require(math.isfinite(getattr(data, field)), field, "a finite number", getattr(data, field))
    get_activation(data.activation)
    get_input_distribution(data.input_distribution)


@functools.lru_cache(maxsize=1024)
def _check_algorithm(algorithm: AlgorithmSettings) -> None:
    if algorithm.fit_activation is not None:
        try:
            get_activation(algorithm.fit_activation)
        except ValueError as error:
            raise ValueError(f"fit_{error}") from None
    get_method(algorithm.method)
    known = ("known", "estimated")
    require(
        algorithm.noise_knowledge in known, "noise_knowledge", " or ".join(known), algorithm.noise_knowledge
    )
    require(
        algorithm.transform in TRANSFORM_KINDS,
        "transform",
        f"one of {', '.join(TRANSFORM_KINDS)}",
        algorithm.transform,
    )
    require(algorithm.order in (None, 3, 4), "order", "3 or 4", algorithm.order)
    for field in ("num_restarts", "num_starts", "max_iterations", "expert_steps"):
        value = getattr(algorithm, field)
        require(value is None or value >= 1, field, "a positive number", value)
    require(algorithm.start in STARTS, "start", " or ".join(STARTS), algorithm.start)
    require(
        set(algorithm.record) <= {"history", "path"},
        "record",
        'a list of "history" and "path"',
        list(algorithm.record),
    )


def _num_fitted(data: DataSettings, algorithm: AlgorithmSettings) -> int:
    return data.num_experts if algorithm.fit_num_experts is None else algorithm.fit_num_experts


def norms_of_experts(data: DataSettings) -> tuple[float, ...]:
    """The norm of each expert, from one number for all or from a list."""
    if isinstance(data.expert_norms, int | float):
        return (float(data.expert_norms),) * data.num_experts
    return tuple(data.expert_norms)
