"""The mixture of experts itself: activations, parameters, likelihood, input distributions, random instances and errors."""

__all__ = ["activations", "gaussian", "inputs", "instances", "metrics", "mixture", "small_linear_algebra"]
