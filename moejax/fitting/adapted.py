"""Output families with parameters of their own that are estimated: degrees of freedom, cuts between classes."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np

from moejax.environment import compiled_fast
from moejax.fitting.family_labels import require_support
from moejax.fitting.preparation import Sample
from moejax.likelihood.polish import PolishRun
from moejax.methods.from_moments import polish_from
from moejax.methods.method import MethodConfig, MethodResult, Problem
from moejax.methods.options import FitOptions
from moejax.model.family import Family
from moejax.model.mixture import MoEParams, log_joint, weighted_sum

MOST_ROUNDS = 10
"""Most times that the family is estimated and the mixture polished in turn."""
SETTLED = 0.01
"""The rounds end if the log-likelihood gained less than this many nats."""


def with_first_family(options: FitOptions, sample: Sample) -> FitOptions:
    """The options with a family whose own parameters are guessed from the labels, if it has such parameters.

    Raises:
        ValueError: labels that the family cannot have.
    """
    base = options.channel
    if not isinstance(base, Family) or base.adapt is None:
        return options
    require_support(sample.y, sample.weights, base)
    used = sample.weights > 0
    family = base.adapt(sample.y[used], None, None, sample.weights[used])
    return dataclasses.replace(options, family=family, activation="linear")  # the family has g in it already


def adapted(
    result: MethodResult, problem: Problem, config: MethodConfig, base: Family
) -> tuple[MethodResult, MethodConfig]:
    """A result and its configuration with the parameters of the family estimated in turn with the mixture.

    Each round takes the family of the largest expected log-likelihood given predictors and responsibilities, and polishes the
    mixture from there: a step of EM in blocks, which does not lower the likelihood. The best round is the result.

    Args:
        result: with the family in `config`.
        problem: one output.
        config: with a family that `base.adapt` made.
        base: the family whose parameters are estimated.
    """
    assert base.adapt is not None, "the family has parameters of its own"
    y, weights = np.asarray(problem.y, np.float64), np.asarray(problem.weights, np.float64)
    used = weights > 0
    best, value, tried = (result, config), -np.inf, [config.fn]
    for _ in range(MOST_ROUNDS):
        result, config = best
        here = jax.tree.map(np.asarray, _experts_of(result.params, problem, config))
        if float(here.log_likelihood) < value + SETTLED:
            break
        value = float(here.log_likelihood)
        t, shares = (np.asarray(a, np.float64)[used] for a in (here.predictors, here.responsibilities))
        s = np.asarray(result.params.noise_std, np.float64)
        family = base.adapt(y[used], t, s, shares * weights[used][:, None])
        if any(family is other for other in tried):
            break
        tried.append(family)
        config = dataclasses.replace(config, fn=family)
        run = _polished(result.params, problem, config)
        if not float(run.log_likelihood) > value:
            break
        passes = result.num_iterations + run.num_steps
        best = result._replace(params=run.params, num_iterations=passes, optima=None, finalists=None), config
    return best


class _AtExperts(NamedTuple):
    """A mixture on its sample."""

    log_likelihood: jax.Array
    """() nats."""
    predictors: jax.Array
    """(n, k) linear predictors of the experts."""
    responsibilities: jax.Array
    """(n, k)"""


@functools.partial(jax.jit, static_argnames="config", compiler_options=compiled_fast())
def _polished(params: MoEParams, problem: Problem, config: MethodConfig) -> PolishRun:
    with jax.default_matmul_precision("highest"):
        return polish_from(params, problem, config)


@functools.partial(jax.jit, static_argnames="config", compiler_options=compiled_fast())
def _experts_of(params: MoEParams, problem: Problem, config: MethodConfig) -> _AtExperts:
    joint = log_joint(params, problem.x, problem.y, config.fn)
    value = weighted_sum(jax.nn.logsumexp(joint, axis=1), problem.weights)
    predictors = problem.x @ params.experts.T + params.expert_bias[None]
    return _AtExperts(value, predictors, jax.nn.softmax(joint, axis=1))
