"""Shapes of a mixture and a sample that belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.checks import require

if TYPE_CHECKING:
    from moejax.model.mixture import AnyParams


def require_shapes(params: AnyParams, x: Any = None, y: Any = None, weights: Any = None) -> None:
    """Refuse arrays whose shapes do not belong together; shapes are known while JAX traces a function.

    Raises:
        ValueError: one line with the name, the expected and the given shape.
    """
    require(
        np.ndim(params.experts) in (2, 3), "params.experts", "(k, d), or (k, m, d)", np.shape(params.experts)
    )
    num_experts, *outputs, dim = np.shape(params.experts)
    expected = {
        "gating": (num_experts, dim),
        "noise_std": (num_experts, *outputs),
        "expert_bias": (num_experts, *outputs),
        "gating_bias": (num_experts,),
    }
    shapes = {f"params.{name}": (shape, getattr(params, name)) for name, shape in expected.items()}
    if x is not None:
        require(np.ndim(x) == 2, "x", f"two axes, (n, {dim})", np.shape(x))
        num_rows = np.shape(x)[0]
        shapes["x"] = (num_rows, dim), x
        shapes["y"] = (num_rows, *outputs), y
        shapes["weights"] = (num_rows,), weights
    for name, (shape, array) in shapes.items():
        if array is not None:
            require(np.shape(array) == shape, name, f"the shape {shape}", np.shape(array))
