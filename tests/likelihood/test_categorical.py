"""The ascent of the categorical likelihood, against SciPy's optimiser and a likelihood by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.categorical import maximise_categorical

RIDGES = (0.02, 0.01)
CLASSES, EXPERTS, SIZE = 3, 2, 3


def penalised(rows, design, y, weights):
    """The objective by NumPy and SciPy: nats, and its part without the penalty."""
    rows = rows.reshape(-1, SIZE)
    cut = CLASSES * EXPERTS
    log_gates = scipy.special.log_softmax(design @ rows[cut:].T, axis=1)
    experts = (design @ rows[:cut].T).reshape(len(y), EXPERTS, CLASSES)
    own = scipy.special.log_softmax(experts, axis=2)[np.arange(len(y)), :, y]
    value = weights @ scipy.special.logsumexp(log_gates + own, axis=1)
    return value - 0.5 * RIDGES[0] * np.sum(rows[:cut] ** 2) - 0.5 * RIDGES[1] * np.sum(
        rows[cut:] ** 2
    ), value


@pytest.fixture(scope="module")
def climbed():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(90, 2)), rng.integers(0, CLASSES, 90)
    weights = rng.uniform(0.0, 2.0, 90)
    weights[:5] = 0.0
    start = np.concatenate([np.zeros((CLASSES * EXPERTS, SIZE)), [[1.0, -1.0, 0.5], [-1.0, 1.0, -0.5]]])
    with jax.enable_x64(True):

        @jax.jit
        def run(rows, x, y, weights):
            blocks = sample_blocks(x, y, weights, fit_intercept=True)
            return maximise_categorical(
                rows,
                blocks,
                num_classes=CLASSES,
                num_steps=1000,
                expert_ridge=RIDGES[0],
                gate_ridge=RIDGES[1],
            )

        end = run(*(jnp.asarray(a, float) for a in (start, x, y, weights)))
        end = jax.tree.map(np.asarray, end)
    return end, (np.column_stack([x, np.ones(90)]), y, weights), start


def test_the_ascent_ends_at_a_maximum_of_the_likelihood_by_hand(climbed):
    end, sample, _ = climbed
    assert end.converged
    value, likelihood = penalised(end.rows, *sample)
    assert end.objective == pytest.approx(value, abs=1e-9)
    assert end.log_likelihood == pytest.approx(likelihood, abs=1e-9)
    better = scipy.optimize.minimize(lambda rows: -penalised(rows, *sample)[0], end.rows.reshape(-1))
    assert -better.fun < value + 1e-6


def test_the_objective_never_decreases_and_begins_at_the_start(climbed):
    end, sample, start = climbed
    history = end.history[: end.num_steps]
    assert history[0] == pytest.approx(penalised(start, *sample)[0])
    assert np.all(np.diff(history) >= 0)
    assert history[-1] == end.objective
    assert np.isnan(end.history[end.num_steps :]).all()


def test_no_class_and_no_expert_is_a_reference(climbed):
    rows = climbed[0].rows
    experts = rows[: CLASSES * EXPERTS].reshape(EXPERTS, CLASSES, SIZE)
    np.testing.assert_allclose(experts.sum(axis=1), 0.0, atol=1e-9)
    np.testing.assert_allclose(rows[CLASSES * EXPERTS :].sum(axis=0), 0.0, atol=1e-9)
