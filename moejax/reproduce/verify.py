"""`moejax reproduce --verify`: runs a random tenth of the experiments and prints which numbers of their sentences hold."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from moejax.checks import NoResultError
from moejax.console import print_json
from moejax.environment import pinned_random_numbers
from moejax.files import write_whole
from moejax.reproduce.cell_functions import StudySpec
from moejax.reproduce.experiment import ExperimentFile, load_experiments
from moejax.reproduce.runner import RESULTS_FOLDER, RUNS_FOLDER, Session
from moejax.reproduce.verification import LIMIT, TableCheck, check_table, chosen, row_keys

if TYPE_CHECKING:
    from moejax.sweep.execution.location import Place

SHARE = 0.1
"""Share of a table that is remade: trials of every cell of a sweep, cells of a study."""


class NotReproducedError(NoResultError):
    """A number of a sentence differs from the committed one by more than its error."""


class _Sample(Session):
    """A session that runs a random part of every experiment, in run folders of its own."""

    def __init__(
        self,
        root: Path,
        experiments: Sequence[ExperimentFile],
        choice: int,
        quick: bool,
        place: Place,
        quiet: bool,
    ):
        from moejax.sweep.execution.provenance import made_by
        from moejax.sweep.plan.plan import set_chunk_size

        # other code, or another choice, has other folders; the same command again finds its rows
        made = hashlib.sha256(json.dumps(made_by(), sort_keys=True).encode()).hexdigest()[:8]
        self.runs_folder = root / RUNS_FOLDER / "verify" / f"{'quick-' if quick else ''}{choice}-{made}"
        self._choice = choice
        super().__init__(root, experiments, quick, None, None, place, False, quiet)
        for experiment in self.sweeps:
            trials = self.trials_of(experiment)
            for bucket in self.plans[experiment.name].buckets if trials is not None else ():
                set_chunk_size(bucket, len(bucket.cells) * len(trials or ()), **self.limits)

    def folder(self, experiment: ExperimentFile) -> Path:
        """The run folder."""
        return self.runs_folder / experiment.name

    def part_of(self, experiment: ExperimentFile, spec: StudySpec) -> StudySpec:
        """A random tenth of the cells of a study."""
        cells = chosen(self._choice, experiment.name, len(spec.cells), SHARE)
        return dataclasses.replace(spec, cells=tuple(spec.cells[index] for index in cells))

    def trials_of(self, experiment: ExperimentFile) -> frozenset[int] | None:
        """A random tenth of the trials of a sweep; all if it stops by precision."""
        spec = self.plans[experiment.name].spec
        if spec.precision is not None:
            return None
        return frozenset(chosen(self._choice, experiment.name, spec.trials, SHARE))


def verify(
    names: Sequence[str] = (),
    *,
    root: Path = Path(),
    quick: bool = False,
    seed: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
    quiet: bool = False,
    as_json: bool = False,
    own_process: Callable[[Place], None] | None = None,
) -> dict[str, Any]:
    """Remake a random tenth of the committed tables, and compare every number of the sentences; nothing committed changes.

    The caller chooses the rounding before JAX starts (`moejax.cli.rounding`).

    Args:
        names: names of experiments; empty for all.
        root: folder with experiments/, sweeps/ and results/; the remade rows go to runs/verify/ there.
        quick: a tenth of the small version of each.
        seed: of the choice of trials and cells; None: 0.
        out: folder of the committed results; None: ROOT/results.
        workers: number of processes; default: one per core, or one per GPU.
        quiet: no progress and no tables.
        as_json: print the result as JSON.
        own_process: see `moejax.sweep.execution.location.Place.prepare`.

    Raises:
        ValueError: a name, or an experiment without committed results. OSError: a folder or a store. NotReproducedError: a number
            differs by more than 2 standard errors. SystemExit: after Ctrl-C, SIGTERM or SIGHUP.
    """
    from moejax.sweep.execution.location import Place
    from moejax.sweep.execution.signals import stopped_by_signals

    place, root = Place(workers), Path(root)
    results = root / RESULTS_FOLDER if out is None else Path(out)
    experiments = load_experiments(root, names, quick=quick)
    committed = [
        experiment for experiment in experiments if (results / experiment.name / "table.csv").is_file()
    ]
    if names and len(committed) < len(experiments):
        (missing, *_) = [experiment.name for experiment in experiments if experiment not in committed]
        raise ValueError(
            f"{missing}: there is no {results / missing / 'table.csv'}; `moejax reproduce {missing}` makes it"
        )
    if not committed:
        raise ValueError(f"{results}: no committed table of any experiment; `moejax reproduce` makes them")
    with pinned_random_numbers():
        place.prepare(own_process)
        session = _Sample(root, committed, seed or 0, quick, place, quiet or as_json)
        with stopped_by_signals():
            checks = _checks(session, results)
    if not any(check.remade for check in checks[0]):
        names = ", ".join(check.name for check in checks[0])
        raise ValueError(f"--quick: no row of {names} is in the committed tables; verify without it")
    result = {
        "seed": seed or 0,
        "quick": quick,
        "xla_flags": checks[1],
        "experiments": [_plain(check) for check in checks[0]],
    }
    write_whole(
        session.runs_folder / "verify.json",
        lambda path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"),
    )
    _print_checks(session, checks[0])
    if as_json:
        print_json(result)
    _refuse_differing(checks[0])
    return result


def _checks(session: _Sample, results: Path) -> tuple[list[TableCheck], str]:
    """Run the chosen trials and cells, and compare each table as soon as its rows are there; and XLA's flags."""
    from moejax.sweep.execution.location import worker_settings

    checks: list[TableCheck] = []

    def compare(experiment: ExperimentFile, table: Any, cells: Sequence[Mapping[str, Any]] | None) -> None:
        scratch = session.folder(experiment) / "remade"
        checks.append(
            check_table(
                experiment, table, results / experiment.name, row_keys(cells), scratch, quick=session.quick
            )
        )

    session.notes.print(f"{session.num_programs} programs to compile on {session.place.description}")
    with contextlib.closing(
        session.place.start_workers(max(session.num_programs, 1), worker_settings())
    ) as workers:
        for group in session.groups():
            session.notes.print(", ".join(experiment.name for experiment in group), soft_wrap=True)
            session.run_group(group, workers)
            for experiment in group:
                compare(experiment, session.sweep_rows(experiment)[0], None)
        for experiment in session.studies:
            session.notes.print(experiment.name)
            table, _ = session.study_rows(experiment, workers)
            compare(experiment, table, session.study_specs[experiment.name].cells)
        return sorted(checks, key=lambda check: check.name), workers.xla_flags


def _print_checks(session: _Sample, checks: Sequence[TableCheck]) -> None:
    for check in checks:
        if not check.remade:
            session.tables.print(
                f"{check.name}: none of {check.unmatched:,} remade rows is in the committed table: --quick has other settings",
                soft_wrap=True,
            )
            continue
        relative = (
            ""
            if math.isnan(check.relative_difference)
            else f"; median relative difference {check.relative_difference:.1e}"
        )
        largest = (
            ""
            if math.isnan(check.largest_cell_shift)
            else f", largest shift of a mean {check.largest_cell_shift:.1f} standard errors"
        )
        session.tables.print(
            f"{check.name}: {check.remade:,} of {check.rows:,} rows remade{relative}; {check.cells:,} cells{largest}",
            soft_wrap=True,
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("number", "committed", "rows", "shift", "errors", "verdict"):
        table.add_column(
            name, justify="right" if name in ("rows", "shift", "errors") else "left", no_wrap=True
        )
    for check in checks:
        for number in check.numbers:
            shift = "" if math.isnan(number.shift) else f"{number.shift:+.1e}" if number.shift else "0"
            errors = "" if math.isnan(number.errors) else f"{number.errors:.2f}"
            table.add_row(
                f"{check.name} {number.name}", number.text, f"{number.rows:,}", shift, errors, number.verdict
            )
    session.tables.print(table)


def _refuse_differing(checks: Sequence[TableCheck]) -> None:
    differing = [(check.name, number) for check in checks for number in check.differing]
    if not differing:
        return
    words = [
        f"{name} {number.name} ({number.text}) by {number.shift:+.2g}"
        + ("" if math.isnan(number.errors) else f", {number.errors:.1f} standard errors")
        for name, number in differing
    ]
    count = sum(len(check.numbers) for check in checks)
    raise NotReproducedError(
        f"{len(differing)} of {count} numbers differ by more than {LIMIT:g} standard errors: {'; '.join(words)}"
    )


def _plain(check: TableCheck) -> dict[str, Any]:
    """A check with null in the place of NaN, which JSON cannot represent."""

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = {name: finite(value) for name, value in dataclasses.asdict(check).items() if name != "numbers"}
    numbers = [
        {name: finite(value) for name, value in dataclasses.asdict(number).items()}
        for number in check.numbers
    ]
    return content | {"numbers": numbers}
