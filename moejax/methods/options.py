"""The options of a fit with their defaults, for `fit`, the estimator, the command line and the fields of a sweep."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moejax.likelihood.em import RIDGE
from moejax.likelihood.information import CovarianceKind
from moejax.model.activations import ActivationLike
from moejax.model.inputs import LogDensity
from moejax.moments.label_transforms import TransformKind

EstimatedNoise = Literal["shared", "per_expert"]
"""The noise models of a fit; the third of `NoiseModel`, "known", follows from a given `noise_std`."""
Start = Literal["random", "kmeans"]
WeightsAre = Literal["counts", "reliability"]


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """The options of `moejax.fit`.

    Examples:
        >>> moejax.FitOptions(activation="relu").method
        'multistart'
    """

    activation: ActivationLike = "linear"
    """g, a registered name or a scalar JAX function."""
    noise: EstimatedNoise = "shared"
    """An estimated noise has one sigma for all experts ("shared") or one each ("per_expert")."""
    fit_intercept: bool = False
    """Give experts and gates biases. The theory has none; the default of `MoERegressor` and `moejax fit`, for data, is True."""
    method: str = "multistart"
    """A registered method: "multistart" (spectral and random starts, the best optimum found), "spectral_em" (moments, gating EM,
    polish), "spectral" (moments only), "spectral_residual" (moments and residual passes), or a baseline: "joint_em",
    "gradient_nll", "gradient_mse", "gated_losses"."""
    weights_are: WeightsAre | None = None
    """The meaning of sample weights. "counts": a weight is a number of equal rows. "reliability": a weight is how much a row counts
    relative to the others (sampling or importance weights), and their scale has no meaning; they are scaled to sum to their
    effective number, (sum w)^2 / sum w^2 (Kish 1965). None: counts if all are whole numbers."""
    standardise: bool = True
    """Scale the labels of a homogeneous g, so that their unit does not matter; False fits the labels as given."""
    order: int | None = None
    """Order of the tensor that is decomposed, 3 or 4; None takes the usable one with the least predicted error."""
    transform: TransformKind = "weighted"
    """Kind of the label transforms."""
    num_restarts: int = 16
    """Restarts of the tensor power method."""
    num_starts: int | None = None
    """Random starts; None takes the method's own number (multistart 256, baselines 1)."""
    start: Start = "random"
    """Start of "joint_em": "random" (unit-sphere experts) or "kmeans" (clusterwise regression from there)."""
    polish: bool = True
    """With "spectral_em", continue to the maximum-likelihood estimate; False is the published algorithm."""
    max_iterations: int = 500
    """Budget of the last stage: EM steps of joint_em, passes of gradient descent, Newton steps of a polish."""
    ridge: float = RIDGE
    """Ridge on the gates for whitened inputs: the coefficient of sum_i ||w_i - mean w||^2 / 2 in nats at any sample size. It is a
    normal prior of variance 1 / ridge. `FitResult.diagnostics` reports its cost and the gates that only the ridge determines."""
    chunk_size: int | None = None
    """Samples that the moments process at once; None takes all."""
    num_residual_passes: int | None = None
    """Residual passes after the moments; None: 5 for "spectral_residual", 0 for the other methods."""
    covariance: CovarianceKind = "observed"
    """Covariance of the standard errors: "observed" (for a true model, and weights that count rows) or "sandwich" (for neither)."""
    log_density: LogDensity | str | None = None
    """x (d,) -> () log p(x), up to a constant, of inputs that are not normal, or the name of a registered input distribution. The
    moments then use its score tensors instead of those of a normal density with the inputs' mean and covariance."""
