"""What this process runs on: the devices that JAX finds."""

from __future__ import annotations

import os

PRNG = "threefry2x32"
"""The generator of every trial's random numbers; keys are its key data."""


def pin_random_numbers() -> None:
    """Make JAX draw the same numbers whatever JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE say."""
    import jax

    for name, value in {"jax_default_prng_impl": PRNG, "jax_threefry_partitionable": True}.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


NO_THREAD = "can't start new thread"
RESOURCES = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", NO_THREAD)
"""Parts of the messages of RuntimeErrors, Python's and XLA's, that come from the machine."""


def is_machines_fault(error: BaseException) -> bool:
    """Whether an error says nothing of what was run: memory, threads or files ran out."""
    if isinstance(error, MemoryError | OSError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in RESOURCES)


def require_devices(named_by: str | None = None) -> None:
    """Start JAX's backend, or say in one line that there is none.

    Args:
        named_by: the option that names the platform; default: JAX_PLATFORMS and its value.

    Raises:
        ValueError: JAX finds no device of the platform.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where no plugin is installed
        named_by = named_by or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{named_by}: JAX finds no such device here" + (f" ({reason})" if reason else "")
        ) from error
