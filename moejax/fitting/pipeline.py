"""fit(): a mixture of experts from a user's arrays, in the user's units.

The inputs are whitened (unless they are standard normal already, to sampling error) and the labels converted to the unit of the
fit, on the host in double precision. One compiled program runs the method. Parameters, errors and likelihoods are returned, again
on the host in double precision, in the units of the data.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import require
from moejax.fitting.arguments import checked_options, key_data, noise_levels, number_of_experts, prng_key
from moejax.fitting.array_checks import checked_arrays, checked_offset, input_precision
from moejax.fitting.input_roles import names_of, with_numbered_columns
from moejax.fitting.objectives import fit_by_objective
from moejax.fitting.preparation import Sample, rescaled_weights
from moejax.fitting.result import FitResult
from moejax.fitting.streaming.fit import SourceFit, fit_source
from moejax.fitting.streaming.source import Source
from moejax.likelihood.information import CovarianceKind
from moejax.methods.options import Column, EstimatedNoise, FitOptions, Gate, Objective, Start, WeightsAre
from moejax.model.activations import ActivationLike, activation_name, unregistered
from moejax.model.families import FamilyLike
from moejax.model.inputs import LogDensity
from moejax.model.mixture import with_stand_ins
from moejax.moments.label_transforms import TransformKind

_OPTIONS = tuple(field.name for field in dataclasses.fields(FitOptions))


def fit(  # noqa: D417 - the other arguments are the fields of FitOptions, explained there
    key: jax.Array,
    x: Any = None,
    y: Any = None,
    *,
    num_experts: int | str | Sequence[int],
    source: Source | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    activation: ActivationLike = FitOptions.activation,
    family: FamilyLike = FitOptions.family,
    noise_std: float | None = None,
    noise: EstimatedNoise = FitOptions.noise,
    fit_intercept: bool = FitOptions.fit_intercept,
    gate: Gate = FitOptions.gate,
    gate_inputs: Sequence[Column] | None = FitOptions.gate_inputs,
    expert_inputs: Sequence[Column] | None = FitOptions.expert_inputs,
    method: str = FitOptions.method,
    weights: Any = None,
    offset: Any = None,
    weights_are: WeightsAre | None = FitOptions.weights_are,
    objective: Objective = FitOptions.objective,
    average: int = FitOptions.average,
    standardise: bool = FitOptions.standardise,
    order: int | None = FitOptions.order,
    transform: TransformKind | None = FitOptions.transform,
    num_restarts: int = FitOptions.num_restarts,
    num_starts: int | None = FitOptions.num_starts,
    start: Start = FitOptions.start,
    polish: bool = FitOptions.polish,
    max_iterations: int = FitOptions.max_iterations,
    ridge: float | Literal["evidence"] | None = FitOptions.ridge,
    chunk_size: int | None = FitOptions.chunk_size,
    num_residual_passes: int | None = FitOptions.num_residual_passes,
    covariance: CovarianceKind = FitOptions.covariance,
    log_density: LogDensity | str | None = FitOptions.log_density,
) -> FitResult:
    """Fit y | x, z = i ~ N(g(a_i . x + b_i), sigma_i^2), z ~ softmax(w . x + c), by the named method.

    With another `family`, y | x, z = i ~ p(. | g(a_i . x + b_i); s_i), s_i its dispersion.

    Inputs are whitened, and labels of a homogeneous g (linear, relu, abs) are scaled, so that their units do not matter. Other
    activations are fitted to the labels as given. Labels outside their range and constant columns are reported.

    Several outputs (n, m) share the gates; each has its own experts and noise, and given z and x they are independent. They are
    fitted without moments, by "multistart" or "joint_em", and have no standard errors.

    Args:
        key: PRNG key of random restarts and starts.
        x: (n, d) inputs, any units.
        y: (n,) labels, or (n, m), in the units of g's values.
        num_experts: k; for a method of moments, up to the rank of the inputs. For several (a range or list), or "auto" for 1 to 12,
            each that the data admit is fitted, "auto" until BIC has risen twice, and the result is the one with the least BIC among
            those with status "ok". A mean fit takes the number with the most evidence.
        source: instead of x, y and weights, rows that are read in batches for every pass over the data, such as
            `moejax.FileSource` or `moejax.ArraySource`: memory for a few batches suffices. The method, one that ends at a maximum
            of the likelihood, runs on a random subsample, and a few Newton passes over all rows climb from there. Everything
            about the estimate is that of all rows; the diagnostics of the sample are those of the subsample, counts scaled up.
        checkpoint: with a source, a file from which the same call continues after a kill; it is removed at the end.
        noise_std: sigma (of another family its dispersion) if it is known, () or (m,), in units of y; None estimates it, from the
            labels' marginal likelihood for the moments and then jointly with the other parameters.
        weights: (n,) non-negative sample weights; None for ones. Rows of weight zero are ignored and may hold any values.
        offset: (n,) known addend o to the linear predictor of every expert, g(a_i . x + b_i + o), or None. Of counts with exposure
            e it is log e: their log means are a_i . x + b_i + log e. Moments assume that there is none, so that the method is one
            that needs none ("multistart", "joint_em", "annealed_em"). It goes with one output and a fit by likelihood. Predictions
            for new rows are given the offset of these.

    The other arguments are the fields of `FitOptions`, which explains them.

    Returns:
        FitResult.

    Raises:
        ValueError: one line with the argument, the accepted values and the given one.

    Examples:
        >>> truth = moejax.make_params([[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 0]], noise_std=0.1)
        >>> x, y, _ = moejax.sample(jax.random.key(0), truth, "linear", 500)
        >>> result = moejax.fit(jax.random.key(1), x, y, num_experts=2, method="spectral_em")
        >>> result.status, bool(moejax.recovery_error(truth.experts, result.params.experts) < 0.01)
        ('ok', True)
    """
    given = locals()  # every option is an argument of the same name
    options = FitOptions(**{name: given[name] for name in _OPTIONS})
    if source is None:
        require(checkpoint is None, "checkpoint", "None without a source", checkpoint)
        return _fit(key, x, y, num_experts, noise_std, weights, offset, options)
    require(offset is None, "offset", "None with a source", type(offset).__name__)
    for name, array in (("x", x), ("y", y), ("weights", weights)):
        require(array is None, name, "None with a source, which has it", type(array).__name__)
    is_place = checkpoint is None or isinstance(checkpoint, str | os.PathLike)
    require(is_place, "checkpoint", "a path, or None", checkpoint)
    place = None if checkpoint is None else Path(checkpoint)
    fitted = fit_rows(
        key, source, num_experts=num_experts, noise_std=noise_std, options=options, checkpoint=place
    )
    return fitted.result


def fit_rows(
    key: jax.Array,
    source: Source,
    *,
    num_experts: int | str | Sequence[int],
    noise_std: float | None,
    options: FitOptions,
    **how: Any,
) -> SourceFit:
    """`fit` of a source, with its options in one object; `how` are the other arguments of `fit_source`."""
    good = not isinstance(source, type) and all(hasattr(source, name) for name in ("batches", "partitions"))
    require(good, "source", "rows such as moejax.FileSource or moejax.ArraySource", source)
    given, options = options, checked_options(options)
    chosen, key, levels = number_of_experts(num_experts), prng_key(key), noise_levels(noise_std, ())
    fitted = fit_source(key, source, chosen, levels, options, **how)
    settings = fit_settings(key, given, options, chosen, levels) | {"weights_are": fitted.weights_are}
    result = dataclasses.replace(fitted.result, settings=settings, _function=unregistered(given.activation))
    return fitted._replace(result=result)


def _fit(
    key: jax.Array,
    x: Any,
    y: Any,
    num_experts: int | str | Sequence[int],
    noise_std: float | None,
    weights: Any,
    offset: Any,
    options: FitOptions,
) -> FitResult:
    """`fit` of arrays, with its options in one object."""
    given, options = options, checked_options(options)
    chosen = number_of_experts(num_experts)
    key = prng_key(key)
    arrays = checked_arrays(x, y, weights)
    addend = None if offset is None else checked_offset(offset, arrays[2])
    options = with_numbered_columns(options, arrays[0].shape[1], names_of(x))
    levels = noise_levels(noise_std, arrays[1].shape[1:])
    require(
        options.start == "random" or arrays[1].ndim == 1,
        "start",
        "'random' for several outputs",
        options.start,
    )
    resolved, kind = rescaled_weights(arrays[2], options.weights_are)
    x_kept, y_kept = with_stand_ins(resolved, *arrays[:2], xp=np)  # a small weight may have become zero
    sample = Sample(x_kept, y_kept, resolved, input_precision(x), addend)
    result = fit_by_objective(key, sample, chosen, levels, options)
    settings = fit_settings(key, given, options, chosen, levels) | {"weights_are": kind}
    columns = getattr(x, "columns", None)  # of a table
    if columns is not None and all(isinstance(name, str) for name in columns):
        result = dataclasses.replace(result, diagnostics=result.diagnostics | {"input_names": list(columns)})
    return dataclasses.replace(result, settings=settings, _function=unregistered(given.activation))


def fit_settings(
    key: jax.Array,
    given: FitOptions,
    options: FitOptions,
    num_experts: int | str | Sequence[int],
    levels: np.ndarray | None,
) -> dict[str, Any]:
    """Every option of a fit by name, as plain values."""
    density = given.log_density
    return vars(options) | {
        "num_experts": num_experts if isinstance(num_experts, int | str) else list(num_experts),
        "activation": activation_name(given.activation),
        "family": given.family if isinstance(given.family, str) else given.family.name,
        "noise_std": None if levels is None else levels.tolist(),
        "log_density": density if isinstance(density, str) or density is None else repr(density),
        "key": key_data(key),
        "precision": str(jnp.result_type(float)),
    }
