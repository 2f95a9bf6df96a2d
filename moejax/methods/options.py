"""The options of a fit with their defaults, for `fit`, the estimator, the command line and the fields of a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from moejax.likelihood.information import CovarianceKind
from moejax.model.activations import ActivationLike
from moejax.model.families import FamilyLike, channel_of
from moejax.model.family import Channel
from moejax.model.inputs import LogDensity
from moejax.moments.label_transforms import TransformKind

EstimatedNoise = Literal["shared", "per_expert"]
"""The noise models of a fit; the third of `NoiseModel`, "known", follows from a given `noise_std`."""
Start = Literal["random", "kmeans"]
Objective = Literal["likelihood", "mean", "auto"]
WeightsAre = Literal["counts", "reliability"]
Gate = Literal["softmax", "constant"]
Column = int | str


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """The options of `moejax.fit`, which takes each as a keyword argument; they are the same everywhere.

    To pass one object: `moejax.fit(key, x, y, num_experts=3, **dataclasses.asdict(options))`.

    Args:
        family: the output family, a registered name ("poisson", "binomial(10)", .. : `moejax families` lists them) or a `Family`:
            the law of a label given g(a_i . x + b_i), which is its mean for Gaussian labels, the log mean for counts, the logit of
            a probability for classes. "student_t" and "ordinal(C)" have their degrees of freedom and cuts estimated.
        activation: g, a registered name or a scalar JAX function.
        noise: an estimated noise has one sigma for all experts ("shared") or one each ("per_expert").
        fit_intercept: give experts and gates biases. The theory has none; the default of `MoERegressor` and `moejax fit`, for
            data, is True. Without biases, `fit` does not subtract the mean of the inputs.
        gate: "softmax", or "constant" for gates without inputs, P(z = i | x) = p_i: a mixture of regressions. Of constant gates the
            biases are fitted, also without `fit_intercept`, which is then about the experts.
        gate_inputs: columns of x that the gates read, numbers from 0 or, if x is a DataFrame, names; None for all. The coefficients
            of the others are zero, and are no parameters.
        expert_inputs: the same for the experts. Moments are those of the experts' inputs; they are exact if the gates are
            constant or their inputs independent of these, and otherwise a start, as for gates not orthogonal to the experts.
        method: a registered method: "multistart" (spectral and random starts, the best optimum found), "spectral_em" (moments,
            EM for the gates, a few passes of EM for all parameters, polish), "spectral" (moments only), "spectral_residual"
            (moments and residual passes), "spectral_wide" (spectral_em for thousands of inputs, without d x d matrices),
            "third_moment" (for an activation without a usable order 2), "annealed_em" (EM with a noise that falls slowly, for a
            steep activation), or a method to compare with: "joint_em", "gradient_nll", "gradient_mse", "gated_losses".
        weights_are: the meaning of sample weights. "counts": a weight is a number of equal rows. "reliability": a weight is how
            much a row counts relative to the others (sampling or importance weights), and their scale has no meaning; they are
            scaled to sum to their effective number, (sum w)^2 / sum w^2 (Kish 1965). None: counts if all are whole numbers.
        objective: the density of a label. "likelihood": the mixture, sum_i P_i(x) N(y; m_i(x), sigma_i^2), the default of `fit`,
            for the study of parameters. "mean": N(y; f(x), s^2), f = sum_i P_i(x) m_i(x), for data that are a function plus noise;
            it is fitted by the method "mean_fit". "auto", the default of `MoERegressor`: the one with more evidence, which is
            -BIC / 2 for the mixture. The fit is by likelihood without a comparison if the mean has no meaning for it (another
            method than "multistart", a known noise, several outputs, gates with inputs of their own).
        average: predictions are averaged over this many of the best distinct optima, with equal weights. One of them, the best, is
            the model that the result describes. Methods "multistart" and "mean_fit".
        standardise: scale the labels of a homogeneous g for the fit, so that their unit does not matter; False fits the labels as
            given. (`moejax fit --no-standardise` also prints the results in the units of the data.)
        order: order of the tensor that is decomposed, 3 or 4; None takes the usable one with the least predicted error.
        transform: kind of the label transforms: "weighted", "relaxed" (fewer constraints at order 3 or 4, so less variance, but
            more bias if the gates are not orthogonal to the experts), "least_norm", "centred" or "polynomial" (docs/method.md).
            None: "relaxed" if there are residual passes, which remove that bias, and else "weighted".
        num_restarts: restarts of the tensor power method.
        num_starts: random starts; None takes the method's own number (multistart at most 256, the others 1).
        start: start of "joint_em": "random" (experts uniform on the unit sphere) or "kmeans" (the same experts, improved by
            clusterwise regression, Spaeth 1979: each sample goes to the expert that predicts it best).
        polish: with "spectral_em", continue to the maximum-likelihood estimate. False ends after EM for the gates, as the
            published algorithm does; `transform="polynomial"` adds its transforms. The polar refinement stays.
        max_iterations: budget of the last stage: EM steps of joint_em, passes of gradient descent, Newton steps of a polish.
        ridge: ridge on the gates for whitened inputs: the coefficient of sum_i ||w_i - mean w||^2 / 2 in nats at any sample size.
            It is a normal prior of variance 1 / ridge. `FitResult.diagnostics` reports its cost and the gates that only the
            ridge determines. None: 1e-6, but for a mean fit "evidence": one ridge on the gates and one on the experts' slopes,
            where the evidence of the data is largest. In a mean fit, a number is the ridge on both.
        chunk_size: samples that the moments process at once; None takes all.
        num_residual_passes: residual passes after the moments; None: 5 for "spectral_residual", 0 for the other methods.
        covariance: covariance of the standard errors. "observed" assumes that the model is true and that a weight is a number of
            equal rows; "sandwich" assumes neither.
        log_density: x (d,) -> () log p(x), up to a constant, of inputs that are not normal, or the name of a registered input
            distribution. The moments then use its score tensors instead of those of a normal density with the inputs' mean and
            covariance.

    Examples:
        >>> moejax.FitOptions(activation="relu").method
        'multistart'

    Source: L. Kish, Survey Sampling, 1965; H. Spaeth, Algorithm 39: clusterwise linear regression, Computing 22, 1979.
    """

    activation: ActivationLike = "linear"
    family: FamilyLike = "gaussian"
    noise: EstimatedNoise = "shared"
    fit_intercept: bool = False
    gate: Gate = "softmax"
    gate_inputs: Sequence[Column] | None = None
    expert_inputs: Sequence[Column] | None = None
    method: str = "multistart"
    weights_are: WeightsAre | None = None
    objective: Objective = "likelihood"
    average: int = 1
    standardise: bool = True
    order: int | None = None
    transform: TransformKind | None = None
    num_restarts: int = 16
    num_starts: int | None = None
    start: Start = "random"
    polish: bool = True
    max_iterations: int = 500
    ridge: float | Literal["evidence"] | None = None
    chunk_size: int | None = None
    num_residual_passes: int | None = None
    covariance: CovarianceKind = "observed"
    log_density: LogDensity | str | None = None

    @property
    def channel(self) -> Channel:
        """The channel of the labels: g if the family is Gaussian, else the family of g."""
        return channel_of(self.family, self.activation)
