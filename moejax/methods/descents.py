"""Gradient descent in the search: where EM from independent starts ends at many optima, Adam on minibatches may end at one.

The noise of its gradients keeps Adam out of small optima that hold EM, most of all with many experts and few samples for each.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moejax.likelihood.blocks import sample_scale
from moejax.methods.gradient_descent import (
    descent_starts,
    gradient_descent,
    in_label_units,
    negative_log_likelihood,
    standard_labels,
)
from moejax.methods.method import MethodConfig, Problem, noise_while_inexact
from moejax.methods.population import (
    climb,
    distinct_optima,
    in_precision_of,
    keep_best,
    rows_of,
    side_by_side,
)
from moejax.methods.search_plan import NUM_DESCENTS, Search, more_parameters
from moejax.methods.search_sample import SAME_MIXTURE, in_single_precision, search_ridge, search_sample
from moejax.methods.stages import stage
from moejax.model.mixture import log_likelihood_per_sample

DESCENT_PASSES = 100
"""Passes of each run; the pilot that chooses the learning rate has 20 more."""
DESCENT_ROWS = 2**14
"""The most rows of the data that gradient descent reads."""
EM_PASSES = 30
"""EM passes after a run, which bring equal ends together."""
FEWEST_AGREED = NUM_DESCENTS - 1
"""The search is settled if so many runs reached their best optimum, and no other start a better one."""
LEAST_GAIN = 2.0
"""And if that is better than one expert alone by so many nats for each further parameter."""
NUM_RIVALS = 3
"""The best of the other starts, which climb on the same rows to be compared."""
LEAST_LEAD = 0.15
"""And if there is another optimum among them, and it leads each by this share of its gain over one expert. The optimum of a model
that holds stands alone; on other data the good optima are close to each other, and many runs may reach one that is not the best."""


@stage(static=("config",), fast=True)
def descents(
    key: jax.Array,
    search: Search,
    *,
    problem: Problem,
    config: MethodConfig,
) -> Search:
    """Runs of gradient descent on the likelihood are finalists, and settle the search if nearly all reach one optimum.

    Args:
        key: PRNG key.
        search: the state after the independent starts.
        problem: the data, of which at most DESCENT_ROWS rows are read, in the precision of the search.
        config: the static choices.
    """
    row_key, start_key, fit_key = jax.random.split(key, 3)
    rows = in_single_precision(search_sample(row_key, problem, DESCENT_ROWS), config.fn)
    same = SAME_MIXTURE * sample_scale(rows.weights).unit
    longer = dataclasses.replace(config, max_iterations=DESCENT_PASSES, record_path=False)
    standard, unit = standard_labels(rows, longer)
    fitted = gradient_descent(
        fit_key,
        descent_starts(start_key, standard, longer, NUM_DESCENTS),
        standard,
        longer,
        loss=negative_log_likelihood(config.fn),
        noise=noise_while_inexact(longer),
    )
    rivals = in_precision_of(rows.x, rows_of(search.population, slice(NUM_RIVALS)))
    starts = side_by_side(in_label_units(fitted.ends, unit), rivals)
    climbed = climb(starts, rows, config, EM_PASSES, search_ridge(rows, config))
    ends = rows_of(climbed, slice(NUM_DESCENTS))
    optima = distinct_optima(ends, same)
    ranked = keep_best(ends, NUM_DESCENTS, same)
    sample, best = search.sample, in_precision_of(search.sample.x, rows_of(ranked.params, 0))
    value = log_likelihood_per_sample(best, sample.x, sample.y, config.fn) @ sample.weights
    gain = value - search.alone
    least_gain = LEAST_GAIN * more_parameters(sample, config) * sample_scale(sample.weights).unit
    distances = jnp.sum((climbed.profiles - ranked.profiles[:1]) ** 2, axis=1)
    lead = ranked.values[0] - climbed.values
    least_lead = LEAST_LEAD * gain * rows.weights.sum() / sample.weights.sum()
    agreed = (optima.num_best >= FEWEST_AGREED) & (gain >= least_gain)
    is_other = distances >= same
    agreed &= jnp.any(is_other) & jnp.all(~is_other | (lead >= least_lead))
    return search._replace(
        num_starts=search.num_starts + NUM_DESCENTS,
        num_passes=search.num_passes + fitted.num_passes + (NUM_DESCENTS + NUM_RIVALS) * EM_PASSES,
        optima=jax.tree.map(lambda new, old: jnp.where(agreed, new, old), optima, search.optima),
        settled=search.settled | agreed,
        by_descent=agreed,
        descended=ranked.params,
        descended_values=ranked.values,
    )
