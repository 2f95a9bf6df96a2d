"""`moejax fit`: a table from a file or by name, a fit, what each expert does, and the results in a folder."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

import moejax
from moejax.activation_table import load_function
from moejax.activations import ScalarFunction, activation_facts, get_activation
from moejax.arguments import whole_number
from moejax.console import make_console, make_notes
from moejax.datasets import Dataset, load, read_table
from moejax.em import NoiseModel
from moejax.files import folder_for_results
from moejax.fitting import FitResult, fit
from moejax.information import CovarianceKind
from moejax.label_units import is_linear
from moejax.methods import get_method
from moejax.model import predict, responsibilities
from moejax.selection import CRITERIA


def fit_command(
    *,
    data: Path | None,
    target: str | None,
    separator: str | None,
    decimal: str | None,
    dataset: str | None,
    data_dir: Path | None,
    num_experts: str,
    activation: str,
    method: str,
    noise: NoiseModel,
    noise_std: float | None,
    intercept: bool,
    standardise: bool,
    num_starts: int | None,
    covariance: CovarianceKind,
    max_iterations: int,
    seed: int,
    out: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """Fit, print and save; returns what fit.json holds.

    Raises:
        ValueError: the data, an option or a name, in one line; OSError: the folder cannot be written.
    """
    if (data is None) == (dataset is None):
        raise ValueError("DATA: expected either a file and --target COLUMN, or --dataset NAME")
    if data is not None and target is None:
        raise ValueError(f"--target: expected the column of {data} to explain")
    if data is not None and data_dir is not None:
        raise ValueError(f"--data-dir {data_dir}: goes with --dataset NAME, not with a file")
    if data is None and (separator is not None or decimal is not None):
        raise ValueError("--separator, --decimal: go with a file, not with --dataset NAME")
    whole_number(seed, "--seed", -(2**63), 2**63 - 1)
    get_method(method)
    fn = load_function(activation) if ":" in activation else get_activation(activation)
    table = (
        read_table(data, target, separator=separator, decimal=decimal)
        if data is not None and target is not None
        else load(str(dataset), data_dir, target=target)
    )
    if table.y.ndim > 1:
        raise ValueError(f"--target: {dataset} has several, expected one of {table.target_name}")
    with contextlib.ExitStack() as held:
        scratch = None if out is None else held.enter_context(folder_for_results(out, "--out"))
        with make_notes(quiet=quiet).status(f"fitting {num_experts} experts by {method} ..."):
            result = fit(
                jax.random.key(seed),
                table.x,
                table.y,
                num_experts=parse_num_experts(num_experts),
                activation=fn,
                noise_std=noise_std,
                noise=noise,
                fit_intercept=intercept,
                method=method,
                standardise=standardise,
                num_starts=num_starts,
                covariance=covariance,
                max_iterations=max_iterations,
            )
        with jax.enable_x64(True):  # inputs and biases may have offsets that cancel
            predicted = np.asarray(predict(result.params, table.x, fn))
            posterior = np.asarray(responsibilities(result.params, table.x, table.y, fn))
        in_units = {
            units.name: _in_units(table, result, posterior, predicted, units)
            for units in (data_units(table), standardised_units(table, fn, intercept))
        }
        shown = UNIT_NAMES[int(standardise)]
        summary = {
            **in_units[shown],
            "units": shown,
            "r_squared": float(1.0 - np.mean((predicted - table.y) ** 2) / np.var(table.y)),
            "num_samples": len(table.y),
            "num_inputs": table.x.shape[1],
            "status": result.status,
            "data_notes": list(table.notes),
            "in_units": in_units,
            "selection": None if result.selection is None else _selection(result, in_units[shown]),
            "diagnostics": result.diagnostics,
            "settings": result.settings
            | {
                "data": str(data) if data is not None else dataset,
                "target": table.target_name,
                "num_experts": len(result.params.noise_std),
                "num_experts_tried": num_experts,
                "activation": activation,
                "seed": seed,
                "data_dir": None if data_dir is None else str(data_dir),
                "moejax": moejax.__version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
            },
        }
        summary = _without_nan(summary)
        if scratch is not None:
            _save(scratch, summary, table, result, posterior, predicted)
    written = ["fit.json", "parameters.parquet", "samples.parquet", "convergence.png"]
    if result.selection is not None:
        written.append("selection.png")
    elif out is not None:
        (out / "selection.png").unlink(missing_ok=True)  # of an earlier fit
    if not quiet:
        _print(summary, table)
        if out is not None:
            make_console().print(f"written to {out}: {', '.join(written)}", soft_wrap=True)
    return summary


def _selection(result: FitResult, shown: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `FitResult.selection`, their likelihoods in the units that are shown."""
    assert result.selection is not None
    shift = shown["log_likelihood"] - result.log_likelihood
    criteria = {name: result.selection[name] - 2.0 * shift for name in CRITERIA}
    table = result.selection.assign(log_likelihood=result.selection["log_likelihood"] + shift, **criteria)
    return table.to_dict("records")


def parse_num_experts(text: str) -> int | str | list[int]:
    """ "3", "2,3,4", "1-5" or "auto", as `fit` takes it.

    Raises:
        ValueError: another form.
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


def _without_nan(value: Any) -> Any:
    """The same document with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


UNIT_NAMES = ("data", "standardised")


class Units(NamedTuple):
    """Units in which a fit is shown: inputs (x - input_mean) / input_std, target (y - target_mean) / target_std."""

    name: str
    input_mean: np.ndarray
    input_std: np.ndarray
    target_mean: float
    target_std: float


def data_units(table: Dataset) -> Units:
    """The units of the data as they are."""
    d = table.x.shape[1]
    return Units(UNIT_NAMES[0], np.zeros(d), np.ones(d), 0.0, 1.0)


def standardised_units(table: Dataset, fn: ScalarFunction, intercept: bool) -> Units:
    """Standard deviations, about the mean where that leaves the model what it is.

    Inputs have a mean taken away where there are intercepts. A target has a unit where g is homogeneous, and a mean taken away
    where it is also linear with intercepts; the target of any other g stays as it is.
    """
    spread = table.x.std(axis=0)
    scaled = activation_facts(fn).homogeneous
    return Units(
        UNIT_NAMES[1],
        table.x.mean(axis=0) if intercept else np.zeros(table.x.shape[1]),
        np.where(spread > 0, spread, 1.0),
        float(table.y.mean()) if intercept and is_linear(fn) else 0.0,
        float(table.y.std()) if scaled else 1.0,
    )


def _in_units(
    table: Dataset, result: FitResult, posterior: np.ndarray, predicted: np.ndarray, units: Units
) -> dict[str, Any]:
    """Likelihood, error and experts in some units."""
    _, *scaling = units
    params, errors = result.in_units(*scaling)
    y = (table.y - units.target_mean) / units.target_std
    value = result.log_likelihood + len(y) * math.log(units.target_std)
    effective = posterior.sum(axis=0)

    def by_input(row: np.ndarray) -> dict[str, float]:
        return dict(zip(table.input_names, row.tolist(), strict=True))

    experts = []
    for i in range(params.experts.shape[0]):
        experts.append(
            {
                "expert": i + 1,
                "share": float(effective[i] / effective.sum()),
                "effective_samples": float(effective[i]),
                "noise_std": float(params.noise_std[i]),
                "bias": float(params.expert_bias[i]),
                "mean_target": float(posterior[:, i] @ y / effective[i]),
                "coefficients": by_input(params.experts[i]),
                "gating": by_input(params.gating[i]),
                "gating_bias": float(params.gating_bias[i]),
            }
        )
        if errors is not None:
            experts[-1] |= {
                "coefficient_errors": by_input(errors.experts[i]),
                "gating_errors": by_input(errors.gating[i]),
                "noise_std_error": float(errors.noise_std[i]),
                "bias_error": float(errors.expert_bias[i]),
                "gating_bias_error": float(errors.gating_bias[i]),
            }
    return {
        "log_likelihood": value,
        "log_likelihood_per_sample": value / len(y),
        "rmse": float(np.sqrt(np.mean((predicted - table.y) ** 2))) / units.target_std,
        "experts": experts,
        "scaling": {
            name: np.asarray(number).tolist() for name, number in units._asdict().items() if name != "name"
        },
    }


_ERRORS = ("coefficient_errors", "gating_errors")


def _number(value: float | None, form: str) -> str:
    """A number as it is printed; a dash for one that is not finite, which the document has as None."""
    return "—" if value is None else f"{value:{form}}"


def _beside(value: float | None, noise_std: float | None) -> float | None:
    """The value, or zero where it is rounding beside the noise."""
    rounding = value is not None and noise_std is not None and abs(value) < 1e-9 * noise_std
    return 0.0 if rounding else value


def _strongest(values: dict[str, float | None], errors: dict[str, float] | None, count: int = 3) -> str:
    ranked = sorted(values.items(), key=lambda item: -abs(item[1] or 0.0))[:count]
    if errors is None:
        return "\n".join(f"{name} {_number(value, '+.3g')}" for name, value in ranked)

    def error(name: str) -> str:
        return "±?" if errors[name] is None else f"±{errors[name]:.2g}"  # the data leave it undetermined

    return "\n".join(f"{name} {_number(value, '+.3g')}{error(name)}" for name, value in ranked)


def _print_selection(console: Console, selection: list[dict[str, Any]]) -> None:
    out = Table(title="How many experts (less is better; * least BIC)", box=box.SIMPLE, pad_edge=False)
    for name in ("experts", "log-likelihood", "parameters", "AIC", "BIC", "ICL", "T2 eigengap"):
        out.add_column(name, justify="right")
    for row in selection:
        parameters = row["num_parameters"]
        out.add_row(
            f"{row['num_experts']}{'*' if row['chosen'] else ' '}",
            _number(row["log_likelihood"], ".1f"),
            _number(parameters, ".0f"),
            *(_number(row[name], ".1f") for name in ("aic", "bic", "icl")),
            _number(row["t2_eigengap"], ".3f"),
        )
    console.print(out)
    for row in selection:
        if row["status"] != "ok":
            console.print(f"{row['num_experts']} experts: {row['status']}")


def _print(summary: dict[str, Any], table: Dataset) -> None:
    console = make_console()
    settings = summary["settings"]
    units = "standardised units" if summary["units"] == "standardised" else "the data's units"
    console.print(
        f"{settings['num_experts']} {settings['activation']} experts by {settings['method']} on "
        f"{summary['num_samples']} samples of {summary['num_inputs']} inputs; target: {table.target_name}"
    )
    console.print(
        f"log-likelihood {_number(summary['log_likelihood'], '.3f')} nats "
        f"({_number(summary['log_likelihood_per_sample'], '.4f')} per sample, {units}), "
        f"RMSE {_number(summary['rmse'], '.4f')}, R^2 {_number(summary['r_squared'], '.4f')}"
    )
    console.print(f"status: {summary['status']}", style=None if summary["status"] == "ok" else "bold red")
    numbers = Table("expert", title=f"What each expert does ({units})", box=box.SIMPLE)
    for name in ("share", "noise std", "mean target", "bias"):
        numbers.add_column(name, justify="right")
    inputs = Table("expert", box=box.SIMPLE)  # a table of its own: numbers are never cut to fit 80 columns
    for name in ("strongest inputs ± standard error", "chosen where (gate, against the last)"):
        inputs.add_column(name, overflow="fold")
    for expert in summary["experts"]:
        numbers.add_row(
            str(expert["expert"]),
            _number(expert["share"], ".3f"),
            _number(expert["noise_std"], ".4g"),
            _number(_beside(expert["mean_target"], expert["noise_std"]), "+.4g"),
            _number(_beside(expert["bias"], expert["noise_std"]), "+.4g"),
        )
        inputs.add_row(
            str(expert["expert"]),
            _strongest(expert["coefficients"], expert.get("coefficient_errors")),
            _strongest(expert["gating"], expert.get("gating_errors"))
            if any(expert["gating"].values())
            else "reference",
        )
    console.print(numbers)
    console.print(inputs)
    if any(None in expert.get(key, {}).values() for expert in summary["experts"] for key in _ERRORS):
        console.print("±?: the data leave this parameter undetermined")
    if summary["selection"] is not None:
        _print_selection(console, summary["selection"])
    names = list(summary["experts"][0]["coefficients"])
    for columns in summary["diagnostics"]["collinear_inputs"]:
        console.print("dependent inputs: " + ", ".join(names[column] for column in columns))
    for note in summary["data_notes"] + summary["diagnostics"]["notes"]:
        console.print(f"note: {note}")


def _parameter_rows(experts: list[dict[str, Any]], names: Sequence[str]) -> pd.DataFrame:
    """A row for every expert and input, the intercept last, of one block of experts."""
    rows = [
        {
            "expert": e["expert"],
            "input": name,
            "coefficient": e["coefficients"][name],
            "coefficient_error": e.get("coefficient_errors", {}).get(name),
            "gating": e["gating"][name],
            "gating_error": e.get("gating_errors", {}).get(name),
        }
        for e in experts
        for name in names
    ]
    rows += [
        {
            "expert": e["expert"],
            "input": "(intercept)",
            "coefficient": e["bias"],
            "coefficient_error": e.get("bias_error"),
            "gating": e["gating_bias"],
            "gating_error": e.get("gating_bias_error"),
        }
        for e in experts
    ]
    return pd.DataFrame(rows)


def _save(
    out: Path,
    summary: dict[str, Any],
    table: Dataset,
    result: FitResult,
    posterior: np.ndarray,
    predicted: np.ndarray,
) -> None:
    from moejax.plotting import convergence_figure, own_style, selection_figure

    in_data, standardised = (
        _parameter_rows(summary["in_units"][name]["experts"], table.input_names) for name in UNIT_NAMES
    )
    numbers = standardised.drop(columns=["expert", "input"]).add_prefix("standardised_")
    in_data.join(numbers).to_parquet(out / "parameters.parquet", index=False)
    samples = pd.DataFrame({"target": table.y, "predicted": predicted})
    for i in range(posterior.shape[1]):
        samples[f"responsibility_{i + 1}"] = posterior[:, i]
    samples.to_parquet(out / "samples.parquet", index=False)
    scaling = summary["in_units"][summary["units"]]["scaling"]
    y, mean = ((a - scaling["target_mean"]) / scaling["target_std"] for a in (table.y, predicted))
    units = "standard deviations" if scaling["target_std"] != 1.0 else "the data's units"
    with own_style():
        convergence_figure(result.history, y, mean, posterior.argmax(axis=1), units, out / "convergence.png")
        if result.selection is not None:
            selection_figure(result.selection, out / "selection.png")
    shift = summary["in_units"][summary["units"]]["log_likelihood"] - result.log_likelihood
    document = summary | {"history": (result.history + shift).tolist()}
    (out / "fit.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
