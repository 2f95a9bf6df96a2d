"""The machine and the process: devices, cores and memory, threads, the cache, git, and the random numbers' generator."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEVICES = Path("/dev")
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Folder in which Linux lists the limits of containers and batch jobs, and the file with the groups of this process."""
PRNG = "threefry2x32"
"""The generator of every trial's random numbers; keys are its key data."""
PINNED = {"jax_default_prng_impl": PRNG, "jax_threefry_partitionable": True}


def pin_random_numbers() -> None:
    """Make JAX draw the same numbers for any values of JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE."""
    import jax

    for name, value in PINNED.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


@contextlib.contextmanager
def pinned_random_numbers() -> Iterator[None]:
    """`pin_random_numbers` within the block; afterwards JAX's configuration is as before."""
    import jax

    before = {name: jax.config.values[name] for name in PINNED}
    pin_random_numbers()
    try:
        yield
    finally:
        for name, value in before.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)


EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)
NO_THREAD = "can't start new thread"
NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "MemoryError")
"""Parts of messages that show that memory ran out, in RuntimeErrors of Python and XLA."""


def out_of_memory(reason: str) -> bool:
    """True if the message of an error says that memory ran out."""
    return any(part in reason for part in NO_MEMORY)


def is_machines_fault(error: BaseException) -> bool:
    """True if an error comes from the machine, not from the work: memory, threads or files ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in EXHAUSTED):
        return True
    return isinstance(error, RuntimeError) and (NO_THREAD in str(error) or out_of_memory(str(error)))


def require_devices(named_by: str | None = None) -> None:
    """Start JAX's backend; without one, the error is one line.

    Args:
        named_by: the option that names the platform; default: JAX_PLATFORMS and its value.

    Raises:
        ValueError: JAX finds no device of the platform.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts if no plugin is installed
        named_by = named_by or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{named_by}: JAX finds no such device here" + (f" ({reason})" if reason else "")
        ) from error


def available_cores() -> list[int]:
    """The cores this process may use: those of its affinity, but no more than its container's share of CPU time allows."""
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    share = _least(_processor_shares())
    return cores if share is None else cores[: max(math.ceil(share), 1)]


def memory_bytes() -> int | None:
    """Memory of this machine, or of the container if that has less; None if the system does not report it."""
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
        return ()  # the variable cannot create a GPU
    names = (name.strip() for name in given.split(","))
    # CUDA, too, stops at the first name that is no GPU
    return tuple(itertools.takewhile(_names_a_gpu, names))


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU, as `nvidia-smi` reports it; None without that program."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in output.split()) * 2**20
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


def cache_folder() -> Path | None:
    """MOEJAX_CACHE_DIR, or `moejax` in the user's cache folder.

    None, and nothing is kept, if MOEJAX_CACHE_DIR is empty, if the user has no home folder, or if the folder does not
    exist and cannot be made.
    """
    folder = _chosen_folder()
    return None if folder is None or (_obstacle(folder) and not folder.is_dir()) else folder


def why_no_cache() -> str:
    """The reason why the cache cannot be written; empty if it can, or if the user turned it off."""
    if os.environ.get("MOEJAX_CACHE_DIR") == "":
        return ""
    folder = _chosen_folder()
    return "there is no home folder" if folder is None else _obstacle(folder)


def _chosen_folder() -> Path | None:
    chosen = os.environ.get("MOEJAX_CACHE_DIR")
    if chosen == "":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moejax"
    except RuntimeError:  # pathlib raises it for a user without a home
        return None


def _obstacle(folder: Path) -> str:
    """The reason why a folder cannot be made or written, found from its first existing parent; empty if it can."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, StopIteration) as error:
        return f"{folder} cannot be used ({getattr(error, 'strerror', None) or 'no such folder'})"
    if not existing.is_dir():
        return f"{folder} cannot be used ({existing} is not a folder)"
    return "" if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written"


def compilation_cache_folder() -> Path | None:
    """Folder of compiled programs, one for each kind of CPU: MOEJAX_CACHE_DIR, or the user's cache folder.

    None, and no cache, if MOEJAX_CACHE_DIR is empty or the folder cannot be written.
    """
    base = None if why_no_cache() else cache_folder()
    return None if base is None else base / "programs" / re.sub(r"[^A-Za-z0-9]+", "-", cpu_model()).strip("-")


def keep_compiled_programs(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keep the programs that this process compiles on disk, for later processes. The command line does so by itself.

    Args:
        folder: where; it is made. None takes MOEJAX_CACHE_DIR, or `moejax` in the user's cache folder. It is returned.

    Raises:
        ValueError: the folder cannot be made or written, or there is none.

    Examples:
        >>> moejax.keep_compiled_programs("programs").name
        'programs'
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    chosen = compilation_cache_folder() if folder is None else Path(folder).expanduser().absolute()
    if chosen is None:
        raise ValueError(f"folder: {why_no_cache() or 'MOEJAX_CACHE_DIR is empty'}; name one")
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder: {chosen} cannot be made ({error.strerror})") from error
    reason = _obstacle(chosen)
    if reason:
        raise ValueError(f"folder: {reason}")
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_KEPT)
    compilation_cache.reset_cache()  # a process that has compiled something asks for the folder no more
    return chosen


SHORTEST_KEPT = 0.5  # seconds of compilation


def cpu_model() -> str:
    """The processor's model and, if known, its family and stepping: compiled programs differ by them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    fields = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", text, flags=re.MULTILINE))
    return " ".join([platform.machine(), *fields.values()])


BLAS_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""They are read when NumPy is imported."""
SINGLE_THREADED = {
    # LLVM compiles a program on one core faster in one piece than in 32.
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1",
    "NPROC": "1",  # the size of XLA's own thread pool
    **BLAS_THREADS,
}


def use_single_thread() -> None:
    """Make XLA run on one thread in this process; it must be called before JAX starts its backend.

    With it, the numbers of `--workers 1` are those of any single-threaded worker, bit for bit.
    """
    for name, value in single_threaded_environment().items():
        os.environ[name] = value


def _older_code_generator() -> dict[str, bool]:
    """The choice of the older of the two code generators for CPUs, which jaxlib has up to 0.10; later, none."""
    import jaxlib.version

    has_both = tuple(map(int, jaxlib.version.__version__.split(".")[:2])) <= (0, 10)
    return {"xla_cpu_use_fusion_emitters": False} if has_both else {}


def compiled_fast() -> dict[str, bool | int]:
    """Options of `jax.jit` for a program that runs for less time than it compiles: it compiles faster and runs longer.

    docs/evidence/performance.md has both times for a trial. Options that XLA_FLAGS name are left to the user.
    """
    given = os.environ.get("XLA_FLAGS", "")
    options = {"xla_backend_optimization_level": 1} | _older_code_generator()
    return {name: value for name, value in options.items() if name not in given}


def compile_fast_everywhere(level: int) -> None:
    """Make XLA compile fast, in this process and those that it starts, unless XLA_FLAGS choose otherwise.

    With level 1, a trial compiles in half the time and runs a quarter longer; with 0, in a third, and runs five times as long. Call
    it before JAX starts its backend.
    """
    options = {"xla_backend_optimization_level": level} | _older_code_generator()
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
    given = os.environ.get("XLA_FLAGS", "")
    if flags not in given:  # XLA takes the last of two equal flags: the user's
        os.environ["XLA_FLAGS"] = f"{flags} {given}".strip()


def single_threaded_environment() -> dict[str, Any]:
    """Environment of a single-threaded process; flags that the user gave to XLA are kept."""
    given = os.environ.get("XLA_FLAGS", "")
    flags = SINGLE_THREADED["XLA_FLAGS"]
    return SINGLE_THREADED | {"XLA_FLAGS": given if flags in given else f"{given} {flags}".strip()}


GIT_PLACES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
)
"""Variables that tell git where a repository is."""


def float_precision() -> str:
    """JAX's setting in this process, "float32" or "float64"."""
    import jax

    return "float64" if jax.config.values["jax_enable_x64"] else "float32"


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds the package, and whether it was changed since; None without one.

    A repository counts only if it tracks the files of the folder: one that merely contains an ignored virtual environment
    does not.

    Changes in results/ do not count: `moejax reproduce` writes them, and no number depends on them.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not _git(folder, "ls-files", "--", "."):
        return None
    sources = (":(top)", ":(top,exclude)results")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    # a hook of another repository is run with that repository named in the environment
    environment = {name: value for name, value in os.environ.items() if name not in GIT_PLACES}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None  # no git, or no checkout: only the versions are known
    return done.stdout.strip()


def processor_name() -> str:
    """The CPU's name, if the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def runs_on_cpu() -> bool:
    """True if a program that is traced now will run on a CPU: the device of `jax.default_device`, else JAX's default device.

    Sizes of blocks depend on it. JAX's own caches of programs have the default device in their keys.
    """
    import jax

    device = jax.config.values.get("jax_default_device")
    if device is None:
        return jax.default_backend() == "cpu"
    return (device if isinstance(device, str) else device.platform) == "cpu"
