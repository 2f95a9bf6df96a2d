"""`moejax fit`: reads a table from a file or by name, fits it, prints each expert, and has the results written to a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import jax
import numpy as np

import moejax
from moejax.checks import require
from moejax.cli.activations import load_function
from moejax.cli.families import load_family
from moejax.cli.fit_files import FILES, write_fit
from moejax.cli.fit_rows import fit_in_batches, reads_in_batches
from moejax.cli.fit_tables import print_fit
from moejax.cli.fit_units import UNIT_NAMES, data_units, standardised_units, summary_in_units
from moejax.cli.options import Fit
from moejax.console import make_console, make_notes
from moejax.files import folder_for_results
from moejax.fitting.arguments import whole_number
from moejax.fitting.categories import as_document
from moejax.fitting.datasets import load
from moejax.fitting.pipeline import fit
from moejax.fitting.result import FitResult
from moejax.fitting.selection import CRITERIA
from moejax.fitting.tables import Dataset, read_table
from moejax.methods.method import get_method
from moejax.methods.options import FitOptions
from moejax.model.activations import activation_names, get_activation
from moejax.model.family import Channel
from moejax.registry import nearest
from moejax.sweep.plan.plugins import run_plugins


def fit_command(command: Fit) -> dict[str, Any]:
    """Fit, print and save by the options of `moejax fit`; returns the content of fit.json.

    Raises:
        ValueError: about the data, an option or a name, in one line; OSError: the folder cannot be written.
    """
    out, quiet = command.out, command.common.quiet or command.common.json
    activation = command.activation
    whole_number(command.seed, "--seed", -(2**63), 2**63 - 1)
    run_plugins(command.plugin)  # before the names that it registers are looked up
    get_method(command.method)
    fn = load_function(activation) if ":" in activation else get_activation(activation)
    options = FitOptions(
        activation=activation if activation in activation_names() else fn,
        family=load_family(command.family) if ":" in command.family else command.family,
        noise=command.noise,
        objective=command.objective,
        average=command.average,
        ridge=parse_ridge(command.ridge),
        fit_intercept=command.fit_intercept,
        gate=command.gate,
        gate_inputs=_names(command.gate_inputs),
        expert_inputs=_names(command.expert_inputs),
        method=command.method,
        standardise=command.standardise,
        num_starts=command.num_starts,
        covariance=command.covariance,
        max_iterations=command.max_iterations,
    )
    num_experts = parse_num_experts(command.num_experts)
    in_batches = reads_in_batches(command)
    if command.skip_bad_rows and not in_batches:
        raise ValueError("--skip-bad-rows: goes with rows that are read in batches: a folder, or --stream")
    if command.offset is not None and in_batches:
        raise ValueError(f"--offset {command.offset}: does not go with rows that are read in batches")
    table = None if in_batches else _read(command)
    if table is not None:
        options = dataclasses.replace(
            options,
            gate_inputs=_columns_of(table, options.gate_inputs, "--gate-inputs"),
            expert_inputs=_columns_of(table, options.expert_inputs, "--expert-inputs"),
        )
    with contextlib.ExitStack() as held:
        scratch = None if out is None else held.enter_context(folder_for_results(out, "--out"))
        if table is None:
            table, result = fit_in_batches(command, num_experts, options)
        else:
            with make_notes(quiet=quiet).status(
                f"fitting {command.num_experts} experts by {command.method} ..."
            ):
                result = fit(
                    jax.random.key(command.seed),
                    table.x,
                    table.y,
                    num_experts=num_experts,
                    noise_std=command.noise_std,
                    offset=table.offset,
                    **vars(options),
                )
        named = {"input_names": list(table.input_names), "target_name": table.target_name}
        result = dataclasses.replace(result, diagnostics=result.diagnostics | named)
        predicted = result.predict(table.x, offset=table.offset)
        posterior = result.responsibilities(table.x, table.y, offset=table.offset)
        summary = _summary(command, table, result, options.channel, posterior, predicted)
        written: list[str] = []
        if scratch is not None:
            try:
                written = write_fit(scratch, summary, table, result, posterior, predicted)
            except OSError as error:
                raise OSError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    if out is not None:
        for name in {*FILES} - {*written}:
            (out / name).unlink(missing_ok=True)  # a file of an earlier fit
    if not quiet:
        print_fit(summary, table)
        if out is not None:
            make_console().print(f"written to {out}: {', '.join(written)}", soft_wrap=True)
    return summary


def _read(command: Fit) -> Dataset:
    """The table that the options name.

    Raises:
        ValueError: options contradict each other, or the data cannot be read.
    """
    data, dataset, target = command.data, command.dataset, command.target
    if (data is None) == (dataset is None):
        raise ValueError("DATA: expected either a file and --target COLUMN, or --dataset NAME")
    if data is not None and target is None:
        raise ValueError(f"--target: expected the column of {data} to explain")
    if data is not None and command.data_dir is not None:
        raise ValueError(f"--data-dir {command.data_dir}: goes with --dataset NAME, not with a file")
    if data is None and (command.separator is not None or command.decimal is not None):
        raise ValueError("--separator, --decimal: go with a file, not with --dataset NAME")
    if data is not None and target is not None:
        table = read_table(data, target, separator=command.separator, decimal=command.decimal)
    else:
        table = load(str(dataset), command.data_dir, target=target)
    if table.y.ndim > 1:
        raise ValueError(f"--target: {dataset} has several, expected one of {table.target_name}")
    if command.offset is None:
        return table
    try:
        return table.with_offset(command.offset)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def _names(text: str | None) -> tuple[str, ...] | None:
    """The names in a text such as "a,b"."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _columns_of(table: Dataset, names: Sequence[int | str] | None, option: str) -> list[int] | None:
    """The inputs of these names, by number; a category stands for all its indicators.

    Raises:
        ValueError: no such input.
    """
    if names is None:
        return None
    indicators = {category.column: category.indicator_names for category in table.categories}
    columns = []
    for name in names:
        for one in indicators.get(str(name), (name,)):
            if one not in table.input_names:
                raise ValueError(
                    f"{option}: unknown input {one!r}; {nearest(one, [*table.input_names, *indicators])}"
                )
            columns.append(table.input_names.index(str(one)))
    require(len(set(columns)) == len(columns) > 0, option, "each input once", ",".join(map(str, names)))
    return columns


def _summary(
    command: Fit,
    table: Dataset,
    result: FitResult,
    channel: Channel,
    posterior: np.ndarray,
    predicted: np.ndarray,
) -> dict[str, Any]:
    """The content of fit.json."""
    in_units = {
        units.name: summary_in_units(table, result, posterior, predicted, units)
        for units in (data_units(table), standardised_units(table, channel, command.fit_intercept))
    }
    shown = UNIT_NAMES[int(command.standardise)]
    summary = {
        **in_units[shown],
        "units": shown,
        "r_squared": float(1.0 - np.mean((predicted - table.y) ** 2) / np.var(table.y)),
        "objective": result.objective,
        "objective_choice": result.diagnostics.get("objective_choice"),
        "num_members": len(result.members),
        "num_samples": result.diagnostics.get("num_rows", len(table.y)),
        "num_inputs": table.x.shape[1],
        "status": result.status,
        "data_notes": list(table.notes),
        "categories": as_document(table.categories),
        "in_units": in_units,
        "selection": None if result.selection is None else _selection(result, in_units[shown]),
        "diagnostics": result.diagnostics,
        "settings": result.settings
        | {
            "data": str(command.data) if command.data is not None else command.dataset,
            "target": table.target_name,
            "offset": table.offset_name,
            "num_experts": len(result.params.noise_std),
            "num_experts_tried": command.num_experts,
            "activation": command.activation,
            "plugins": [str(path) for path in command.plugin],
            "seed": command.seed,
            "data_dir": None if command.data_dir is None else str(command.data_dir),
            "moejax": moejax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
        },
    }
    return _without_nan(summary)


def _selection(result: FitResult, shown: dict[str, Any]) -> list[dict[Hashable, Any]]:
    """The rows of `FitResult.selection`, with likelihoods in the displayed units."""
    assert result.selection is not None
    shift = shown["log_likelihood"] - result.log_likelihood
    values = {name: result.selection[name] - 2.0 * shift for name in CRITERIA}
    for name in ("log_likelihood", "log_evidence"):
        if name in result.selection:
            values[name] = result.selection[name] + shift
    table = result.selection.assign(**values)
    return table.to_dict("records")


def parse_num_experts(text: str) -> int | str | list[int]:
    """The argument of `fit` for "3", "2,3,4", "1-5" or "auto".

    Raises:
        ValueError: the text has another form.
    """
    if text == "auto":
        return text
    first, dash, last = text.partition("-")
    try:
        if dash:
            return list(range(int(first), int(last) + 1))
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f'--num-experts {text}: expected a number, several such as 2,3,4 or 1-5, or "auto"'
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def parse_ridge(text: str | None) -> float | Literal["evidence"] | None:
    """The argument `ridge` of `fit` for a number, "evidence" or None.

    Raises:
        ValueError: the text has another form.
    """
    if text is None or text == "evidence":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'--ridge {text}: expected a number >= 0 or "evidence"') from None


def _without_nan(value: Any) -> Any:
    """The document with None instead of numbers that are not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
