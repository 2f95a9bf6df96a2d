"""g(t) = sin(2t): it oscillates within the spread of the inputs, and labels say nearly nothing of their predictor's square."""

import jax.numpy as jnp

import moejax


def sin_2t(t):
    return jnp.sin(2.0 * t)


moejax.register_activation("sin_2t", sin_2t)
