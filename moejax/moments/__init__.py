"""Experts from moments of labels and inputs; no d x d x d tensor is ever formed."""

__all__ = [
    "cross_moments",
    "label_transforms",
    "noise",
    "orders",
    "score_tensors",
    "spectral",
    "tensor_power",
]
