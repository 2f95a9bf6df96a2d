"""The command line: `moejax fit | predict | sweep | status | report | export | compare | merge | reproduce | activations | info`.

A bad value gives one line on stderr and exit status 2, and no change on disk. Platform, precision and the compilation
cache are set here, before any computation, and recorded with the results.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform as host_platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

import moejax
from moejax.checks import NoResultError
from moejax.cli.options import (
    Activations,
    Command,
    Common,
    Compare,
    Export,
    Families,
    Fit,
    Info,
    Merge,
    Predict,
    Report,
    Reproduce,
    Status,
    Sweep,
)
from moejax.console import make_console, output_that_may_close, print_error, print_json
from moejax.environment import (
    available_cores,
    cache_folder,
    compilation_cache_folder,
    compile_fast_everywhere,
    cpu_model,
    keep_compiled_programs,
    memory_bytes,
    pin_random_numbers,
    require_devices,
    use_single_thread,
    why_no_cache,
)
from moejax.startup import raise_on_interrupt

if TYPE_CHECKING:
    from moejax.sweep.execution.location import Place

USER_ERROR_STATUS = 2
NO_RESULT_STATUS = 1
_SETTING = re.compile(r"[A-Za-z_.]+\s*=")
_PYTHON_FILE = re.compile(r"\.py$")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `moejax` program."""
    with output_that_may_close():
        _run_command(sys.argv[1:] if arguments is None else arguments)


def one_option_each(arguments: Sequence[str]) -> list[str]:
    """Split an option with a list, `--set A B`, into one for each value, `--set A --set B`, so that it can be given twice.

    The list ends at the first word that does not look like a value: `--set trials=7 SPEC` does not take SPEC.

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
            ]  # the first word is always taken: if it is no value, the command reports it
            taken += 1
            continue
        option, taken = (argument, 0) if argument in looks_like else (None, 0)
        if option is None:
            spread.append(argument)
    return spread if option is None or taken else [*spread, option]


def with_homes(command: Any) -> Any:
    """The command with `~` in its paths replaced by the home folder; a shell leaves a quoted `~` unchanged.

    Raises:
        ValueError: the home folder does not exist.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        try:
            if isinstance(value, Path):
                changes[field.name] = value.expanduser()
            elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
                changes[field.name] = tuple(item.expanduser() for item in value)
        except RuntimeError as error:  # pathlib raises it for a user without a home
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
        description="Parameter recovery for mixtures of experts: fits, sweeps and their figures. `--version` prints the version, "
        "`moejax COMMAND --help` the options of a command.",
        args=one_option_each(arguments) or ["--help"],
    )
    from moejax.sweep.execution.signals import exit_status, stopped_by_signals

    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend is of no use here: figures go into files
    try:
        command = with_homes(command)
        configure_jax(command.common, "float32" if isinstance(command, Sweep | Reproduce) else "float64")
        if isinstance(command, Fit | Predict | Sweep | Reproduce | Activations | Families):
            keep_programs()
        # a sweep first decides which processes need the devices
        if isinstance(command, Fit | Predict | Activations | Families | Info):
            require_devices()
        with stopped_by_signals():
            _RUN[type(command)](command)
    except KeyboardInterrupt as stop:
        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print("moejax: interrupted", file=sys.stderr)
        sys.exit(exit_status(stop))
    except BrokenPipeError:  # the reader of the output is gone
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
    except NoResultError as error:
        if os.environ.get("MOEJAX_TRACEBACK"):
            raise
        print_error(error)
        sys.exit(NO_RESULT_STATUS)


def configure_jax(common: Common, default_precision: str) -> None:
    """Set platform, precision and random numbers.

    Raises:
        ValueError: the platform does not exist.
    """
    import jax

    pin_random_numbers()
    jax.config.update("jax_enable_x64", (common.precision or default_precision) == "float64")
    if common.platform is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(common.platform, common.platform))
        require_devices(f"--platform {common.platform}")


def keep_programs() -> None:
    """Keep compiled programs in the cache; without a cache, print a line and continue."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # the user's choice
    reason, folder = why_no_cache(), compilation_cache_folder()
    if folder is not None:
        try:
            keep_compiled_programs(folder)
        except ValueError as error:
            reason = str(error).removeprefix("folder: ")
    if reason:
        print_error(f"{reason}: compiled programs are not kept; MOEJAX_CACHE_DIR can name another folder")


def own_process(place: Place) -> None:
    """Make this process the coordinator of a sweep: one thread on CPUs, and no accelerator that workers need."""
    import jax

    if not place.accelerated:
        use_single_thread()
    elif place.has_processes:
        jax.config.update("jax_platforms", "cpu")


def _own_process_of_many_programs(place: Place, level: int) -> None:
    """Do the same for a run of many programs with few trials each; see `compile_fast_everywhere`."""
    own_process(place)
    if not place.accelerated:
        compile_fast_everywhere(level)


def _print_json(value: Any) -> None:
    print_json(value, indent=2)


def _run_fit(command: Fit) -> None:
    from moejax.cli.fit import fit_command

    result = fit_command(command)
    if command.common.json:
        _print_json(result)


def _run_predict(command: Predict) -> None:
    from moejax.cli.predict import predict_command

    rows = predict_command(command)
    if command.common.json:
        _print_json(rows)


def _run_sweep(command: Sweep) -> None:
    from moejax.sweep import commands

    options = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    spec, common = options.pop("spec"), options.pop("common")
    commands.sweep(spec, **options, quiet=common.quiet, as_json=common.json, own_process=own_process)


def _run_status(command: Status) -> None:
    from moejax.sweep import commands

    commands.status(command.folder, as_json=command.common.json)


def _run_report(command: Report) -> None:
    from moejax.sweep import commands

    result = commands.report(
        command.folder,
        where=command.where or "",
        pivot=command.pivot,
        out=command.out,
        quiet=command.common.quiet or command.common.json,
    )
    if command.common.json:
        _print_json(result)


def _run_export(command: Export) -> None:
    from moejax.sweep import commands

    where, pivot = command.where or "", command.pivot
    commands.export(command.folder, command.file, where=where, pivot=pivot, quiet=command.common.quiet)


def _run_compare(command: Compare) -> None:
    from moejax.sweep import commands

    metrics = command.metric or ("recovery_error",)
    result = commands.compare(
        command.run_a,
        command.run_b,
        metrics=metrics,
        by=_listed(command.by),
        method_a=command.method_a,
        method_b=command.method_b,
        where=command.where or "",
        out=command.out,
        quiet=command.common.quiet or command.common.json,
    )
    if command.common.json:
        _print_json(result)


def _run_merge(command: Merge) -> None:
    from moejax.sweep import commands

    result = commands.merge(
        command.folders,
        out=command.out,
        across_versions=command.across_versions,
        keep_first=command.keep_first,
        quiet=command.common.quiet or command.common.json,
    )
    if command.common.json:
        _print_json(result)


def _listed(names: str | None) -> list[str] | None:
    """The names of a list such as "a,b"; None if there is no list."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def _run_reproduce(command: Reproduce) -> None:
    from moejax.reproduce.runner import reproduce

    options = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    common, verifies = options.pop("common"), options.pop("verify")
    # the time of a quick run is nearly all compilation, that of a whole one half
    prepare = functools.partial(_own_process_of_many_programs, level=0 if command.quick else 1)
    if not verifies:
        reproduce(**options, quiet=common.quiet, as_json=common.json, own_process=prepare)
        return
    from moejax.cli.rounding import round_like_another_machine
    from moejax.reproduce.verify import verify

    for name in ("dry_run", "across_versions"):
        if options.pop(name):
            raise ValueError(f"--{name.replace('_', '-')}: does not go with --verify")

    def rounded(place: Place) -> None:
        prepare(place)
        round_like_another_machine()

    verify(**options, quiet=common.quiet, as_json=common.json, own_process=rounded)


def _run_activations(command: Activations) -> None:
    from moejax.cli.activations import activation_rows, print_activation_rows

    rows = activation_rows(command.which, command.noise_std)
    if command.common.json:
        _print_json(rows)
    elif not command.common.quiet:
        print_activation_rows(rows)


def _run_families(command: Families) -> None:
    from moejax.cli.families import family_rows, print_family_rows

    rows = family_rows(command.which, command.norm, command.intercept, command.dispersion)
    if command.common.json:
        _print_json(rows)
    elif not command.common.quiet:
        print_family_rows(rows)


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
            text = ", ".join(f"{package} {version}" for package, version in value.items())
        else:
            text = ", ".join(value) if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), text)
    make_console().print(table)


_RUN = {
    Fit: _run_fit,
    Predict: _run_predict,
    Sweep: _run_sweep,
    Status: _run_status,
    Report: _run_report,
    Export: _run_export,
    Compare: _run_compare,
    Merge: _run_merge,
    Reproduce: _run_reproduce,
    Activations: _run_activations,
    Families: _run_families,
    Info: _run_info,
}
