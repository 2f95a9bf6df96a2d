"""The command line: `moejax fit | sweep | status | report | export | reproduce | activations | info`.

A bad value ends with one line on stderr and exit status 2, with nothing on disk changed. Platform, precision and the compilation
cache are set here, before anything is computed, and recorded with the results.
"""

from __future__ import annotations

import dataclasses
import os
import platform as host_platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import (
    OmitArgPrefixes,
    OmitSubcommandPrefixes,
    Positional,
    UseAppendAction,
    arg,
    subcommand,
)

import moejax
from moejax.cache import cache_folder, why_no_cache
from moejax.console import make_console, output_that_may_close, print_error, print_json
from moejax.environment import available_cores, memory_bytes, pin_random_numbers, require_devices
from moejax.startup import raise_on_interrupt

USER_ERROR_STATUS = 2
NO_RESULT_STATUS = 1
_SETTING = re.compile(r"[A-Za-z_.]+\s*=")
_PYTHON_FILE = re.compile(r"\.py$")


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every command."""

    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; default: what JAX finds."""
    precision: Literal["float32", "float64"] | None = None
    """Default: float32 for sweeps, float64 for everything else."""
    quiet: bool = False
    """Print no progress and no tables."""
    json: bool = False
    """Print the result as JSON."""


CommonOptions = Annotated[Common, arg(name="")]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fit a mixture of experts to a CSV or Parquet file, or to a data set by name."""

    data: Positional[Path | None] = None
    """A .csv, .tsv (also .gz) or .parquet file with a header; every column but the target is an input."""
    target: str | None = None
    """Column to explain; with --dataset, one of its targets where it has several."""
    separator: str | None = None
    """Of the file's columns: "," ";" "|" or tab; default: the one that cuts all rows alike."""
    decimal: Literal[".", ","] | None = None
    """Decimal sign of the file's numbers; default: as they are written."""
    dataset: str | None = None
    """A data set by name instead of a file: airfoil, concrete, stock_portfolio or diabetes."""
    data_dir: Path | None = None
    """Folder that holds the data set's file; default: MOEJAX_DATA_DIR, then the cache, then a download from UCI."""
    num_experts: str = "3"
    """A number, several ("2,3,4" or "1-5"), or "auto"; of several, the one with the least BIC is kept."""
    activation: str = "linear"
    """A registered activation, or FILE.py:FUNCTION."""
    method: str = "multistart"
    noise: Literal["shared", "per_expert"] = "shared"
    noise_std: float | None = None
    """Known noise, in the target's own units; default: estimated."""
    intercept: bool = True
    """Biases in experts and gates."""
    standardise: bool = True
    """Show coefficients and errors per standard deviation of inputs and target; results hold both."""
    covariance: Literal["observed", "sandwich"] = "observed"
    """Of the standard errors: "observed" takes the model for true, "sandwich" does not."""
    num_starts: int | None = None
    """Random starts; default: the method's own number."""
    max_iterations: int = 500
    seed: int = 0
    out: Path | None = None
    """Folder for fit.json, parameters.parquet, samples.parquet and convergence.png."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run the sweep that a TOML file declares; the same command again resumes it."""

    spec: Positional[Path]
    """The TOML file; - reads it from stdin."""
    out: Path | None = None
    """Run folder; default runs/NAME."""
    dry_run: bool = False
    """Print cells, compilations and memory; run nothing."""
    pilot: bool = False
    """With --dry-run: time one chunk of every program and estimate the whole."""
    workers: int | None = None
    """Processes; 1: this one. Default: one for each core or GPU."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE, an override of the spec; may be given several times."""
    plugin: UseAppendAction[tuple[Path, ...]] = ()
    """A Python file that registers activations, methods or input distributions."""
    cluster: str | None = None
    """tls://HOST:PORT or tcp://HOST:PORT of a Dask scheduler, or slurm:FILE.toml."""
    security: Path | None = None
    """TOML file with the certificates for --cluster; docs/security.md says how to make it."""
    worker_timeout: float | None = None
    """End after this many seconds without any worker; default: 120 on this machine, never for a cluster."""
    vmap_width: int | None = None
    """Trials side by side in one program; default 1 on CPUs."""
    retry_failed: bool = False
    """Run trials again that raised or whose worker died."""
    repair: bool = False
    """First replace a damaged store by what is sound in it."""
    across_versions: bool = False
    """Go on although the folder holds results of another version or source of moejax, or of another JAX."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Status:
    """What a run folder holds: done, failed, left; works while the sweep runs."""

    folder: Positional[Path]
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Report:
    """Write summary tables, figures and a self-contained report.html into a run folder."""

    folder: Positional[Path]
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the table of a run folder to a CSV or Parquet file."""

    folder: Positional[Path]
    file: Positional[Path]
    """FILE.csv, FILE.csv.gz or FILE.parquet; - is CSV on stdout."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Make the figures and tables of experiments/ into results/; the same command again resumes."""

    names: Positional[tuple[str, ...]] = ()
    """Experiments; default: all."""
    quick: bool = False
    """The small version of each, all as one sweep: minutes. It never replaces the results of a full run."""
    root: Path = Path()
    """Folder with experiments/ and sweeps/; default: here."""
    seed: int | None = None
    """Another seed than the specs' own, into folders of its own."""
    out: Path | None = None
    """Folder of the results; default ROOT/results."""
    workers: int | None = None
    """Processes; 1: this one. Default: one for each core or GPU."""
    dry_run: bool = False
    """Print the plan; run nothing."""
    across_versions: bool = False
    """Go on although a run folder holds results of another version or source of moejax, or of another JAX."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Activations:
    """Constants of the label transforms of the activations, and whether they are usable."""

    which: Positional[str | None] = None
    """A registered name, or FILE.py:FUNCTION; default: all registered ones."""
    noise_std: float = 0.1
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Info:
    """Versions, devices, precision and the compilation cache."""

    common: CommonOptions = Common()


Command = (
    Annotated[Fit, subcommand("fit")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Activations, subcommand("activations")]
    | Annotated[Info, subcommand("info")]
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `moejax` program."""
    with output_that_may_close():
        _run_command(sys.argv[1:] if arguments is None else arguments)


def one_option_each(arguments: Sequence[str]) -> list[str]:
    """Options that take a list, `--set A B`, as one option for each value, `--set A --set B`: then they can be given twice.

    What follows belongs to the option while it looks like one of its values, so that `--set trials=7 SPEC` leaves SPEC alone.

    >>> one_option_each(["--set", "trials=7", "dim=5", "a.toml"])
    ['--set', 'trials=7', '--set', 'dim=5', 'a.toml']
    """
    looks_like = {"--set": _SETTING.match, "--plugin": _PYTHON_FILE.search}
    spread: list[str] = []
    option: str | None = None
    taken = 0
    for argument in arguments:
        if option is not None and (taken == 0 or looks_like[option](argument)):
            spread += [
                option,
                argument,
            ]  # the first value whatever it looks like: its error is told by the command
            taken += 1
            continue
        option, taken = (argument, 0) if argument in looks_like else (None, 0)
        if option is None:
            spread.append(argument)
    return spread if option is None or taken else [*spread, option]


def with_homes(command: Any) -> Any:
    """The command with `~` in its paths as the home folder that it stands for: a shell leaves it where it is quoted.

    Raises:
        ValueError: there is no such home.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        try:
            if isinstance(value, Path):
                changes[field.name] = value.expanduser()
            elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
                changes[field.name] = tuple(item.expanduser() for item in value)
        except RuntimeError as error:  # pathlib's word for a user without a home
            raise ValueError(f"--{field.name.replace('_', '-')}: {value}: {error}") from None
    return dataclasses.replace(command, **changes)


def _run_command(arguments: list[str]) -> None:
    raise_on_interrupt()
    if arguments == ["--version"]:
        print(f"moejax {moejax.__version__}")
        return
    command = tyro.cli(
        OmitArgPrefixes[OmitSubcommandPrefixes[Command]],
        prog="moejax",
        description="Parameter recovery for mixtures of experts: fits, sweeps and their figures. `--version` tells the version.",
        args=one_option_each(arguments) or ["--help"],
    )
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is not ours: figures go into files
    try:
        command = with_homes(command)
        configure_jax(command.common, "float32" if isinstance(command, Sweep | Reproduce) else "float64")
        if isinstance(command, Fit | Sweep | Reproduce | Activations):
            keep_programs()
        if isinstance(command, Fit | Activations | Info):  # a sweep decides first who needs the devices
            require_devices()
        _RUN[type(command)](command)
    except KeyboardInterrupt as stop:
        from moejax.sweep.signals import exit_status

        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print("moejax: interrupted", file=sys.stderr)
        sys.exit(exit_status(stop))
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print_error(error)
        sys.exit(USER_ERROR_STATUS)
    except FloatingPointError as error:
        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print_error(
            f"JAX_DEBUG_NANS: {error}; some of moejax's steps are NaN and left out where they do not apply: run without it"
        )
        sys.exit(USER_ERROR_STATUS)
    except RuntimeError as error:
        if type(error).__name__ != "NoResultError" or os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print_error(error)
        sys.exit(NO_RESULT_STATUS)


def configure_jax(common: Common, default_precision: str) -> None:
    """Platform, precision and random numbers.

    Raises:
        ValueError: the platform is not there.
    """
    import jax

    pin_random_numbers()
    jax.config.update("jax_enable_x64", (common.precision or default_precision) == "float64")
    if common.platform is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(common.platform, common.platform))
        require_devices(f"--platform {common.platform}")


def keep_programs() -> None:
    """Keep compiled programs in the cache; without one, say so in a line and go on."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # the user's choice
    reason, folder = why_no_cache(), compilation_cache_folder()
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason, folder = f"{folder} cannot be made ({error.strerror})", None
    if reason:
        print_error(f"{reason}: compiled programs are not kept; MOEJAX_CACHE_DIR can name another folder")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compilation_cache_folder() -> Path | None:
    """Where compiled programs are kept, apart for each kind of CPU: MOEJAX_CACHE_DIR, or the user's cache folder.

    None, and no cache, where MOEJAX_CACHE_DIR is set to nothing, or where nothing can be written.
    """
    base = None if why_no_cache() else cache_folder()
    return None if base is None else base / "programs" / re.sub(r"[^A-Za-z0-9]+", "-", cpu_model()).strip("-")


def cpu_model() -> str:
    """The processor's model and, where it tells, its family and stepping: compiled programs differ by them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{host_platform.machine()} {host_platform.processor()}"
    fields = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", text, flags=re.MULTILINE))
    return " ".join([host_platform.machine(), *fields.values()])


def _print_json(value: Any) -> None:
    print_json(value, indent=2)


def _run_fit(command: Fit) -> None:
    from moejax.fit_command import fit_command

    options = {
        field.name: getattr(command, field.name)
        for field in dataclasses.fields(command)
        if field.name != "common"
    }
    result = fit_command(**options, quiet=command.common.quiet or command.common.json)
    if command.common.json:
        _print_json(result)


def _run_sweep(command: Sweep) -> None:
    from moejax.sweep import commands

    options = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    spec, common = options.pop("spec"), options.pop("common")
    commands.sweep(spec, **options, quiet=common.quiet, as_json=common.json)


def _run_status(command: Status) -> None:
    from moejax.sweep import commands

    commands.status(command.folder, as_json=command.common.json)


def _run_report(command: Report) -> None:
    from moejax.sweep import commands

    result = commands.report(command.folder, quiet=command.common.quiet or command.common.json)
    if command.common.json:
        _print_json(result)


def _run_export(command: Export) -> None:
    from moejax.sweep import commands

    commands.export(command.folder, command.file, quiet=command.common.quiet)


def _run_reproduce(command: Reproduce) -> None:
    from moejax.reproduce import reproduce

    options = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    common = options.pop("common")
    reproduce(**options, quiet=common.quiet, as_json=common.json)


def _run_activations(command: Activations) -> None:
    from moejax.activation_table import activation_rows, print_activation_rows

    rows = activation_rows(command.which, command.noise_std)
    if command.common.json:
        _print_json(rows)
    elif not command.common.quiet:
        print_activation_rows(rows)


def _run_info(command: Info) -> None:
    import importlib.metadata

    import jax
    from rich.table import Table

    import moejax

    packages = ("jax", "jaxlib", "optax", "numpy", "scipy", "pandas", "distributed")
    info = {
        "versions": {"moejax": moejax.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
        "python": host_platform.python_version(),
        "devices": [str(device) for device in jax.devices()],
        "platform": jax.default_backend(),
        "precision": str(jax.numpy.result_type(float)),
        "processor": cpu_model(),
        "cores": len(available_cores()),
        "memory_bytes": memory_bytes(),
        "compilation_cache": jax.config.values["jax_compilation_cache_dir"]
        or str(compilation_cache_folder()),
        "cache": str(cache_folder()),
    }
    if command.common.json:
        _print_json(info)
        return
    table = Table(show_header=False)
    for name, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(f"{package} {version}" for package, version in value.items())
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    make_console().print(table)


_RUN = {
    Fit: _run_fit,
    Sweep: _run_sweep,
    Status: _run_status,
    Report: _run_report,
    Export: _run_export,
    Reproduce: _run_reproduce,
    Activations: _run_activations,
    Info: _run_info,
}


if __name__ == "__main__":
    main()
