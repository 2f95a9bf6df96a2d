"""The shapes that signatures say are checked in these tests, in every room that says them."""

import jax.numpy as jnp
import jaxtyping
import pytest

from moejax.likelihood.blocks import sample_scale
from moejax.likelihood.predictors import weighted_gram
from moejax.methods.starts import zero_gates
from moejax.model.mixture import posterior, weighted_sum
from moejax.model.small_linear_algebra import unit_rows
from moejax.moments.cross_moments import second_moment


def ones(*shape):
    return jnp.ones(shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda: weighted_sum(ones(3), ones(2)),
        lambda: posterior(ones(3, 2), ones(3, 4), ones(3), ones(2), xp=jnp),
        lambda: second_moment(ones(3), ones(3)),
        lambda: second_moment(ones(3, 2), ones(4)),
        lambda: sample_scale(ones(3, 1)),
        lambda: weighted_gram(ones(2, 5), ones(3, 4)),
        lambda: zero_gates(ones(2), ones()),
        lambda: unit_rows(jnp.ones((2, 2), jnp.int32)),
    ],
    ids=["weights", "experts", "rank", "samples", "column", "block", "frame", "whole numbers"],
)
def test_another_shape_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_shapes_as_they_are_said_pass():
    assert weighted_sum(ones(3, 2), ones(3)).shape == (2,)
    assert posterior(ones(3, 2), ones(3, 2), ones(3), ones(2), xp=jnp).shape == (3, 2)
    assert second_moment(ones(3, 2), ones(3)).shape == (2, 2)
    assert weighted_gram(ones(2, 5), ones(3, 5)).shape == (3, 2, 2)
    assert zero_gates(ones(2, 3), ones()).experts.shape == (2, 3)
