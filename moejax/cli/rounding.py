"""Rounding like that of another machine, for `moejax reproduce --verify`."""

from __future__ import annotations

import os
import platform


def round_like_another_machine() -> None:
    """Make XLA's programs round like those of another processor, in this process and those that it starts.

    On x86 they use the instructions of SSE 4.2 only, which do not fuse multiplication and addition and have short vectors. On other
    processors they are not optimised. Call it before JAX starts its backend.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flag = "--xla_cpu_max_isa=SSE4_2" if x86 else "--xla_backend_optimization_level=0"
    # XLA takes the last of two equal flags
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
