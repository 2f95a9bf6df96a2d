"""The options of every command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from moejax.methods.options import EstimatedNoise, FitOptions, Gate, Objective

# values that may be left out: the help shows neither {None} nor a default of None
OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
OptionalText = Annotated[str | None, arg(metavar="STR", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
Platform = Annotated[Literal["cpu", "gpu", "tpu"] | None, arg(metavar="{cpu,gpu,tpu}", help_behavior_hint="")]
Precision = Annotated[
    Literal["float32", "float64"] | None, arg(metavar="{float32,float64}", help_behavior_hint="")
]
OptionalPivot = Annotated[
    tuple[str, str, str] | None, arg(metavar="ROWS COLUMNS VALUE", help_behavior_hint="")
]
DecimalSign = Annotated[Literal[".", ","] | None, arg(metavar="SIGN", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every command."""

    platform: Platform = None
    """Device; default: the one that JAX finds."""
    precision: Precision = None
    """Default: float32 for sweeps, float64 for everything else."""
    quiet: bool = False
    """Print no progress and no tables."""
    json: bool = False
    """Print the result as JSON."""


CommonOptions = Annotated[Common, arg(name="")]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fit a mixture of experts to a CSV or Parquet file, or to a data set by name."""

    data: Positional[Annotated[Path | None, arg(metavar="[DATA]", help_behavior_hint="")]] = None
    """A .csv, .tsv (also .gz) or .parquet file with a header, or a folder of such files, which is read in batches; every column
    but the target is an input."""
    target: OptionalText = None
    """Column to explain; with --dataset, one of its targets if it has several."""
    separator: OptionalText = None
    """Separator of the file's columns: "," ";" "|" or tab; default: the one that cuts all rows into equally many fields."""
    decimal: DecimalSign = None
    """Decimal sign of the file's numbers, . or ,; default: found from the file."""
    dataset: OptionalText = None
    """A data set by name instead of a file: airfoil, concrete, stock_portfolio, diabetes, cars or engel."""
    data_dir: OptionalPath = None
    """Folder that holds the data set's file; default: MOEJAX_DATA_DIR, then the cache, then a download from UCI."""
    num_experts: str = "3"
    """A number, several ("2,3,4" or "1-5"), or "auto"; among several, the fit with the least BIC is kept."""
    activation: str = "linear"
    """A registered activation, or FILE.py:FUNCTION."""
    family: str = "gaussian"
    """Law of the target: gaussian, student_t (outliers), poisson or negative_binomial (counts), gamma (positive), bernoulli, .. as
    `moejax families` lists them, or FILE.py:NAME."""
    method: str = FitOptions.method
    """A method by name, such as spectral_em, spectral or joint_em; docs/how_to_choose.md compares them."""
    noise: EstimatedNoise = FitOptions.noise
    """One noise level for all experts, or one each."""
    noise_std: OptionalFloat = None
    """Known noise, in the target's own units; default: estimated."""
    fit_intercept: bool = True
    """Biases in experts and gates."""
    gate: Gate = FitOptions.gate
    """"softmax" gates, or "constant" ones without inputs: a mixture of regressions."""
    gate_inputs: OptionalText = None
    """Columns that the gates read, such as a,b; a column of text stands for all its levels; default: all inputs."""
    expert_inputs: OptionalText = None
    """Columns that the experts read; default: all inputs."""
    offset: OptionalText = None
    """Column that is added to the linear predictor of every expert and is no input, such as the logarithm of an exposure;
    `moejax predict` reads it from the new rows."""
    standardise: bool = True
    """Scale labels for the fit (homogeneous activations), and print coefficients per standard deviation; the files hold both."""
    objective: Objective = FitOptions.objective
    """Density of the target: "likelihood" (the mixture), "mean" (normal about the mean of all experts), or "auto", the less BIC."""
    average: int = FitOptions.average
    """Predictions are averaged over this many of the best distinct optima."""
    ridge: OptionalText = None
    """A number, or "evidence" for a fit of the mean; default: 1e-6 by likelihood, "evidence" by the mean."""
    plugin: UseAppendAction[tuple[Path, ...]] = ()
    """A Python file that registers activations or methods of your own; may be given several times."""
    covariance: Literal["observed", "sandwich"] = FitOptions.covariance
    """Kind of the standard errors: "observed" assumes that the model is true, "sandwich" does not."""
    num_starts: OptionalInt = FitOptions.num_starts
    """Random starts; default: the method's own number."""
    max_iterations: int = FitOptions.max_iterations
    """Budget of passes of the method's last stage."""
    stream: bool = False
    """Read a file in batches, as a folder is: memory for a few batches suffices, and a killed command continues."""
    skip_bad_rows: bool = False
    """Leave out and count rows with a cell that is no number, if rows are read in batches; default: refuse the first."""
    cluster: OptionalText = None
    """tls://HOST:PORT or tcp://HOST:PORT of a Dask scheduler whose workers read the batches, or slurm:FILE.toml."""
    security: OptionalPath = None
    """TOML file with the certificates for --cluster; docs/security.md explains how to make it."""
    seed: int = 0
    """Seed of the random starts."""
    out: OptionalPath = None
    """Folder for fit.json, fit.moejax (which `moejax predict` and moejax.load_fit read), tables of parameters and samples, and
    pictures."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predict the target of new rows by a fit that `moejax fit --out FIT_DIR` wrote: mean, interval, quantiles, experts."""

    fit: Positional[Annotated[Path, arg(metavar="FIT_DIR")]]
    """The folder of the fit."""
    data: Positional[Annotated[Path, arg(metavar="NEW")]]
    """A .csv, .tsv (also .gz) or .parquet file with the inputs' columns, in any order; other columns are ignored."""
    out: OptionalPath = None
    """FILE.csv or FILE.parquet for the predictions, a row each; default: a short table is printed."""
    level: float = 0.9
    """Probability of the interval."""
    quantiles: Annotated[tuple[float, ...], arg(help_behavior_hint="")] = ()
    """Levels of quantiles between 0 and 1, such as 0.1 0.5 0.9."""
    separator: OptionalText = None
    """The same option as that of `moejax fit`."""
    decimal: DecimalSign = None
    """The same option as that of `moejax fit`."""
    activation: OptionalText = None
    """FILE.py:FUNCTION, if the fit was made with one; a fit does not hold its code."""
    plugin: UseAppendAction[tuple[Path, ...]] = ()
    """A Python file that registers the fit's activation; may be given several times."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run the sweep that a TOML file declares; the same command again resumes it."""

    spec: Positional[Path]
    """The TOML file; - reads it from stdin."""
    out: OptionalPath = None
    """Run folder; default runs/NAME."""
    dry_run: bool = False
    """Print cells, compilations and memory; run nothing."""
    pilot: bool = False
    """Time a trial of every method and activation first, and choose the chunk sizes by these times. With --dry-run: time one chunk
    of every program and estimate the total time."""
    workers: OptionalInt = None
    """Number of processes; 1 is this one. Default: one for each core or GPU."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE, an override of the spec; may be given several times."""
    plugin: UseAppendAction[tuple[Path, ...]] = ()
    """A Python file that registers activations, methods, input distributions or metrics."""
    cluster: OptionalText = None
    """tls://HOST:PORT or tcp://HOST:PORT of a Dask scheduler, or slurm:FILE.toml."""
    security: OptionalPath = None
    """TOML file with the certificates for --cluster; docs/security.md explains how to make it."""
    worker_timeout: OptionalFloat = None
    """End after this many seconds without any worker; default: 120 on this machine, never for a cluster."""
    vmap_width: OptionalInt = None
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
    where: OptionalText = None
    """A condition on fields, such as "noise_std < 0.2 and method == 'spectral_em'": the report is on these cells only."""
    pivot: OptionalPivot = None
    """Add a table: fields of its rows, fields of its columns, and a metric, as for `moejax export`; pivot.csv has it too."""
    out: OptionalPath = None
    """Folder of the files; default: the run folder, or with --where its subfolder `selection`."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the table of a run folder to a CSV or Parquet file."""

    folder: Positional[Path]
    file: Positional[Path]
    """FILE.csv, FILE.csv.gz or FILE.parquet; - is CSV on stdout."""
    where: OptionalText = None
    """A condition on the columns, such as "noise_std < 0.2 and method == 'spectral_em'"."""
    pivot: OptionalPivot = None
    """Fields of the rows, fields of the columns, and a metric, as in num_samples method recovery_error; STATISTIC:METRIC takes
    mean or rmse instead of the median; success_rate and trials are values too."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Compare:
    """Paired differences of two runs, or of two methods of one run, on the trials that have the same data."""

    run_a: Positional[Annotated[Path, arg(metavar="RUN_A")]]
    """The run folder of A."""
    run_b: Positional[Annotated[Path | None, arg(metavar="[RUN_B]", help_behavior_hint="")]] = None
    """The run folder of B; default: RUN_A, with another method."""
    metric: UseAppendAction[tuple[str, ...]] = ()
    """A column of the trials' table; may be given several times; default: recovery_error."""
    by: OptionalText = None
    """Fields of a row, such as num_samples,noise_std; others are pooled. Default: all that vary."""
    method_a: OptionalText = None
    """The method of A; default: trials of equal methods are compared, or the only two of a run."""
    method_b: OptionalText = None
    """The method of B."""
    where: OptionalText = None
    """A condition on the trials of both sides, such as "noise_std < 0.2"."""
    out: OptionalPath = None
    """FILE.csv, FILE.csv.gz or FILE.parquet for the whole table."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge run folders into a new one: runs on several machines, or of parts of a study."""

    folders: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN RUN [RUN ..]", help_behavior_hint="")]]
    """The run folders, which stay unchanged."""
    out: Path
    """The new folder."""
    keep_first: bool = False
    """Keep the first numbers of a trial that has different ones in several runs; default: refuse."""
    across_versions: bool = False
    """Merge results of different versions or sources of moejax, or of JAX."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Make the figures and tables of experiments/ into results/; the same command again resumes."""

    names: Positional[tuple[str, ...]] = ()
    """Experiments; default: all."""
    quick: bool = False
    """The small version of each, all as one sweep: minutes. It never replaces the results of a full run."""
    verify: bool = False
    """Remake a random tenth of the committed tables at another rounding, and compare every number of their sentences."""
    root: Path = Path()
    """Folder with experiments/ and sweeps/; default: here."""
    seed: OptionalInt = None
    """A seed that replaces the specs' own; its results go to separate folders. With --verify, the seed of the choice."""
    out: OptionalPath = None
    """Folder of the results; default ROOT/results. With --verify, of the committed ones."""
    workers: OptionalInt = None
    """Number of processes; 1 is this one. Default: one for each core or GPU."""
    dry_run: bool = False
    """Print the plan; run nothing."""
    across_versions: bool = False
    """Continue even if a run folder holds results of another version or source of moejax, or of another JAX."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Activations:
    """Constants of the label transforms of the activations, and whether they are usable."""

    which: Positional[Annotated[str | None, arg(metavar="[NAME]", help_behavior_hint="")]] = None
    """A registered name, or FILE.py:FUNCTION; default: all registered ones."""
    noise_std: float = 0.1
    """Noise level of the labels, in units of g's values."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Families:
    """Output families: what their labels tell of the experts, and whether methods of moments can use them."""

    which: Positional[Annotated[str | None, arg(metavar="[NAME]", help_behavior_hint="")]] = None
    """A name such as poisson or binomial(10), or FILE.py:NAME of a moejax.Family; default: all registered ones."""
    norm: float = 1.0
    """Norm of the experts."""
    intercept: float = 0.0
    """Their intercept."""
    dispersion: OptionalFloat = None
    """Dispersion of the family; default: an example."""
    common: CommonOptions = Common()


@dataclasses.dataclass(frozen=True)
class Info:
    """Versions, devices, precision and the compilation cache."""

    common: CommonOptions = Common()


Command = (
    Annotated[Fit, subcommand("fit")]
    | Annotated[Predict, subcommand("predict")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Merge, subcommand("merge")]
    | Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Activations, subcommand("activations")]
    | Annotated[Families, subcommand("families")]
    | Annotated[Info, subcommand("info")]
)
