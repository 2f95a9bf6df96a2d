"""A method for the experiment non-linearity: moments by the tensor power method, without polar refinement."""

import dataclasses

from moejax.methods import register_method, spectral


def spectral_power(key, problem, config):
    return spectral(key, problem, dataclasses.replace(config, num_polar_iterations=0))


register_method("spectral_power", spectral_power, moments="required")
