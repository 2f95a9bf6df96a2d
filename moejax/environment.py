"""What this process runs on: devices, cores and memory, within the limits of a container, and the random numbers' generator."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

DEVICES = Path("/dev")
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows the limits of containers and batch jobs, and which of them are this process's."""
PRNG = "threefry2x32"
"""The generator of every trial's random numbers; keys are its key data."""


def pin_random_numbers() -> None:
    """Make JAX draw the same numbers whatever JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE say."""
    import jax

    for name, value in {"jax_default_prng_impl": PRNG, "jax_threefry_partitionable": True}.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


NO_THREAD = "can't start new thread"
NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "MemoryError")
"""Parts of the messages of RuntimeErrors, Python's and XLA's, that come from the machine."""


def out_of_memory(reason: str) -> bool:
    """Whether the words of an error say that memory ran out."""
    return any(part in reason for part in NO_MEMORY)


def is_machines_fault(error: BaseException) -> bool:
    """Whether an error says nothing of what was run: memory, threads or files ran out."""
    if isinstance(error, MemoryError | OSError):
        return True
    return isinstance(error, RuntimeError) and (NO_THREAD in str(error) or out_of_memory(str(error)))


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


def available_cores() -> list[int]:
    """The cores this process may use: those of its affinity, no more than its container's share of time is worth."""
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    share = _least(_processor_shares())
    return cores if share is None else cores[: max(math.ceil(share), 1)]


def memory_bytes() -> int | None:
    """Memory of this machine, or of the container if that has less; None where the system does not say."""
    try:
        total: float | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        total = None
    least = _least([*_memory_limits(), *([] if total is None else [total])])
    return None if least is None else int(least)


def visible_gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs for CUDA_VISIBLE_DEVICES, found without starting a backend here."""
    devices = [path.name.removeprefix("nvidia") for path in DEVICES.glob("nvidia[0-9]*")]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return tuple(sorted(devices, key=int))
    if not devices and not (DEVICES / "dxg").exists():  # dxg: Windows' GPUs under Linux
        return ()  # the variable makes no GPU
    names = (name.strip() for name in given.split(","))
    return tuple(itertools.takewhile(_names_a_gpu, names))  # CUDA, too, stops at the first that is none


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU, as its driver's program tells it; None where that is not there."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in said.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _names_a_gpu(name: str) -> bool:
    return name.isdigit() or name.startswith(("GPU-", "MIG-"))


def _least(values: Iterator[float] | list[float]) -> float | None:
    return min(values, default=None)


def _processor_shares() -> Iterator[float]:
    """Cores' worth of time that each enclosing group may use."""
    for folder in _groups("cpu"):
        quota, _, period = _content(folder / "cpu.max").partition(" ")  # the second version of the interface
        if not quota:
            quota, period = (_content(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[float]:
    """Bytes that each enclosing group may hold."""
    for folder in _groups("memory"):
        limit = _content(folder / "memory.max") or _content(folder / "memory.limit_in_bytes")
        if limit.isdigit():
            yield int(limit)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups that this process is in, the innermost first, for both versions of the interface."""
    for line in _content(OWN_CGROUPS).splitlines():
        _, controllers, inner = ([*line.split(":", 2), "", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        within = Path(inner.lstrip("/"))
        yield from (root / part for part in (within, *within.parents))


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
