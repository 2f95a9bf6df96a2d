"""The options of every command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from moejax.methods.options import EstimatedNoise, FitOptions


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every command."""

    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Device; default: the one that JAX finds."""
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
    """Column to explain; with --dataset, one of its targets if it has several."""
    separator: str | None = None
    """Separator of the file's columns: "," ";" "|" or tab; default: the one that cuts all rows into equally many fields."""
    decimal: Literal[".", ","] | None = None
    """Decimal sign of the file's numbers; default: found from the file."""
    dataset: str | None = None
    """A data set by name instead of a file: airfoil, concrete, stock_portfolio or diabetes."""
    data_dir: Path | None = None
    """Folder that holds the data set's file; default: MOEJAX_DATA_DIR, then the cache, then a download from UCI."""
    num_experts: str = "3"
    """A number, several ("2,3,4" or "1-5"), or "auto"; among several, the fit with the least BIC is kept."""
    activation: str = "linear"
    """A registered activation, or FILE.py:FUNCTION."""
    method: str = FitOptions.method
    noise: EstimatedNoise = FitOptions.noise
    noise_std: float | None = None
    """Known noise, in the target's own units; default: estimated."""
    fit_intercept: bool = True
    """Biases in experts and gates."""
    standardise: bool = True
    """Show coefficients and errors per standard deviation of inputs and target; results hold both."""
    covariance: Literal["observed", "sandwich"] = FitOptions.covariance
    """Kind of the standard errors: "observed" assumes that the model is true, "sandwich" does not."""
    num_starts: int | None = FitOptions.num_starts
    """Random starts; default: the method's own number."""
    max_iterations: int = FitOptions.max_iterations
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
    """With --dry-run: time one chunk of every program and estimate the total time."""
    workers: int | None = None
    """Number of processes; 1 is this one. Default: one for each core or GPU."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE, an override of the spec; may be given several times."""
    plugin: UseAppendAction[tuple[Path, ...]] = ()
    """A Python file that registers activations, methods or input distributions."""
    cluster: str | None = None
    """tls://HOST:PORT or tcp://HOST:PORT of a Dask scheduler, or slurm:FILE.toml."""
    security: Path | None = None
    """TOML file with the certificates for --cluster; docs/security.md explains how to make it."""
    worker_timeout: float | None = None
    """End after this many seconds without any worker; default: 120 on this machine, never for a cluster."""
    vmap_width: int | None = None
    """Trials side by side in one program; default 1 on CPUs."""
    retry_failed: bool = False
    """Rerun failed trials (an exception, or a worker that died)."""
    repair: bool = False
    """First reduce a damaged store to its sound rows."""
    across_versions: bool = False
    """Continue even if the folder holds results of another version or source of moejax, or of another JAX."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Status:
    """Count the trials of a run folder: done, failed, left; works while the sweep runs."""

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
    """A seed that replaces the specs' own; its results go to separate folders."""
    out: Path | None = None
    """Folder of the results; default ROOT/results."""
    workers: int | None = None
    """Number of processes; 1 is this one. Default: one for each core or GPU."""
    dry_run: bool = False
    """Print the plan; run nothing."""
    across_versions: bool = False
    """Continue even if a run folder holds results of another version or source of moejax, or of another JAX."""
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
