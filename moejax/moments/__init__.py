"""Experts from moments of labels and inputs; no d x d x d tensor is ever formed."""

from moejax.moments.label_transforms import TRANSFORM_KINDS, LabelTransform
from moejax.moments.noise import estimate_noise_std
from moejax.moments.orders import choose_order, label_transform, predicted_mse
from moejax.moments.spectral import SpectralEstimate, host_transforms, spectral_estimate, traced_transforms
from moejax.moments.tensor_power import tensor_power_method

__all__ = [
    "TRANSFORM_KINDS",
    "LabelTransform",
    "SpectralEstimate",
    "choose_order",
    "estimate_noise_std",
    "host_transforms",
    "label_transform",
    "predicted_mse",
    "spectral_estimate",
    "tensor_power_method",
    "traced_transforms",
]
