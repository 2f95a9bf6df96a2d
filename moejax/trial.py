"""One trial: (key, hyperparameters, static spec) -> TrialResult; and the settings a sweep may vary.

A trial draws a random mixture of experts and a sample from it, fits the sample with one method and measures
the recovery. `DataSettings` and `AlgorithmSettings` are what a user writes down; `prepare` turns them, on the
host, into a static `TrialSpec` (one compiled program each) and the traced `Hyperparameters` (data: they never
cost a compilation).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What the truth is and how the data are drawn. Every field can be an axis of a sweep."""

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


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
    """How a sample is fitted. Methods and algorithm fields of one instance share the same data."""

    method: str = "spectral_em"
    fit_activation: str | None = None
    """The activation that is fitted; None: the true one."""
    fit_num_experts: int | None = None
    noise_knowledge: str = "known"
    """"known" or "estimated"."""
    transform: str = "weighted"
    order: int | None = None
    """Order of the tensor that is decomposed, 3 or 4; None: the usable one with the least standard error."""
    num_restarts: int = 16
    """Restarts of the tensor power method."""
    num_starts: int = 1
    """Random starts of a method that uses them (joint_em)."""
    polish: bool = True
    max_iterations: int = 100
    """Budget of the method's iterations (EM steps of joint_em, Fisher-scoring steps of a polish)."""
    record: tuple[str, ...] = ()
    """Extra results: "history"."""
