"""`moejax fit`: a table from a file or by name, a fit, what each expert does, and the results in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

import moejax
from moejax.activation_table import load_function
from moejax.activations import get_activation
from moejax.datasets import Dataset, load, read_table
from moejax.em import NoiseModel
from moejax.fitting import FitResult, fit
from moejax.information import CovarianceKind
from moejax.methods import get_method
from moejax.model import predict, responsibilities


def fit_command(
    *,
    data: Path | None,
    target: str | None,
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
    get_method(method)
    fn = load_function(activation) if ":" in activation else get_activation(activation)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; expected a folder")
    table = (
        read_table(data, target)
        if data is not None and target is not None
        else load(str(dataset), data_dir, target=target)
    )
    if table.y.ndim > 1:
        raise ValueError(f"--target: {dataset} has several, expected one of {table.target_name}")
    scaling = _scaling(table, standardise)
    x, y = (
        (table.x - scaling["input_mean"]) / scaling["input_std"],
        (table.y - scaling["target_mean"]) / scaling["target_std"],
    )
    with Console(stderr=True, quiet=quiet).status(f"fitting {num_experts} experts by {method} ..."):
        result = fit(
            jax.random.key(seed),
            x,
            y,
            num_experts=parse_num_experts(num_experts),
            activation=fn,
            noise_std=noise_std,
            noise=noise,
            fit_intercept=intercept,
            method=method,
            num_starts=num_starts,
            covariance=covariance,
            max_iterations=max_iterations,
        )
    predicted = np.asarray(predict(result.params, x, fn))
    posterior = np.asarray(responsibilities(result.params, x, y, fn))
    summary = _summary(table, result, posterior, y, predicted, scaling)
    summary["settings"] = {
        "data": str(data) if data is not None else dataset,
        "target": table.target_name,
        "num_experts": len(result.params.noise_std),
        "activation": activation,
        "method": method,
        "noise": noise,
        "noise_std": noise_std,
        "fit_intercept": intercept,
        "standardise": standardise,
        "seed": seed,
        "precision": str(jax.numpy.result_type(float)),
        "moejax": moejax.__version__,
        "jax": jax.__version__,
    }
    summary = _without_nan(summary)
    if not quiet:
        _print(summary, table)
    if out is not None:
        _save(out, summary, table, result, posterior, predicted, y)
        if not quiet:
            Console().print(
                f"written to {out}: fit.json, parameters.parquet, samples.parquet, convergence.png"
                + (", selection.png" if result.selection is not None else "")
            )
    return summary


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


def _scaling(table: Dataset, standardise: bool) -> dict[str, Any]:
    if not standardise:
        d = table.x.shape[1]
        return {"input_mean": np.zeros(d), "input_std": np.ones(d), "target_mean": 0.0, "target_std": 1.0}
    return {
        "input_mean": table.x.mean(axis=0),
        "input_std": table.x.std(axis=0),
        "target_mean": float(table.y.mean()),
        "target_std": float(table.y.std()),
    }


def _summary(
    table: Dataset,
    result: FitResult,
    posterior: np.ndarray,
    y: np.ndarray,
    predicted: np.ndarray,
    scaling: dict[str, Any],
) -> dict[str, Any]:
    params = jax.tree.map(np.asarray, result.params)
    errors = None if result.standard_errors is None else jax.tree.map(np.asarray, result.standard_errors)
    effective = posterior.sum(axis=0)
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
                "coefficients": dict(zip(table.input_names, params.experts[i].tolist(), strict=True)),
                "gating": dict(zip(table.input_names, params.gating[i].tolist(), strict=True)),
                "gating_bias": float(params.gating_bias[i]),
            }
        )
        if errors is not None:
            experts[-1] |= {
                "coefficient_errors": dict(zip(table.input_names, errors.experts[i].tolist(), strict=True)),
                "gating_errors": dict(zip(table.input_names, errors.gating[i].tolist(), strict=True)),
                "noise_std_error": float(errors.noise_std[i]),
                "bias_error": float(errors.expert_bias[i]),
                "gating_bias_error": float(errors.gating_bias[i]),
            }
    return {
        "log_likelihood": result.log_likelihood,
        "log_likelihood_per_sample": result.log_likelihood / len(y),
        "rmse": float(np.sqrt(np.mean((predicted - y) ** 2))),
        "r_squared": float(1.0 - np.mean((predicted - y) ** 2) / np.var(y)),
        "num_samples": len(y),
        "num_inputs": table.x.shape[1],
        "status": result.status,
        "experts": experts,
        "scaling": {name: np.asarray(value).tolist() for name, value in scaling.items()},
        "selection": None if result.selection is None else result.selection.to_dict("records"),
        "diagnostics": result.diagnostics,
    }


_ERRORS = ("coefficient_errors", "gating_errors")


def _strongest(values: dict[str, float], errors: dict[str, float] | None, count: int = 3) -> str:
    ranked = sorted(values.items(), key=lambda item: -abs(item[1]))[:count]
    if errors is None:
        return "\n".join(f"{name} {value:+.2f}" for name, value in ranked)

    def error(name: str) -> str:
        return "±?" if errors[name] is None else f"±{errors[name]:.2f}"  # the data leave it undetermined

    return "\n".join(f"{name} {value:+.2f}{error(name)}" for name, value in ranked)


def _print_selection(console: Console, selection: list[dict[str, Any]]) -> None:
    out = Table(title="How many experts (less is better; * least BIC)", box=box.SIMPLE)
    for name in ("experts", "log-likelihood", "parameters", "AIC", "BIC", "ICL", "T2 eigengap"):
        out.add_column(name, justify="right")
    for row in selection:
        gap = "—" if row["t2_eigengap"] is None else f"{row['t2_eigengap']:.3f}"
        out.add_row(
            f"{row['num_experts']}{'*' if row['chosen'] else ' '}",
            f"{row['log_likelihood']:.1f}",
            str(row["num_parameters"]),
            *(f"{row[name]:.1f}" for name in ("aic", "bic", "icl")),
            gap,
        )
    console.print(out)


def _print(summary: dict[str, Any], table: Dataset) -> None:
    console = Console()
    settings = summary["settings"]
    units = "standardised units" if settings["standardise"] else "the data's units"
    console.print(
        f"{settings['num_experts']} {settings['activation']} experts by {settings['method']} on "
        f"{summary['num_samples']} samples of {summary['num_inputs']} inputs; target: {table.target_name}"
    )
    console.print(
        f"log-likelihood {summary['log_likelihood']:.3f} nats ({summary['log_likelihood_per_sample']:.4f} per sample, {units}), "
        f"RMSE {summary['rmse']:.4f}, R^2 {summary['r_squared']:.4f}"
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
            f"{expert['share']:.3f}",
            f"{expert['noise_std']:.4f}",
            f"{expert['mean_target']:+.3f}",
            f"{expert['bias']:+.3f}",
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
    for note in summary["diagnostics"]["notes"]:
        console.print(f"note: {note}")


def _save(
    out: Path,
    summary: dict[str, Any],
    table: Dataset,
    result: FitResult,
    posterior: np.ndarray,
    predicted: np.ndarray,
    y: np.ndarray,
) -> None:
    from moejax.plotting import convergence_figure, selection_figure

    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "expert": e["expert"],
            "input": name,
            "coefficient": e["coefficients"][name],
            "coefficient_error": e.get("coefficient_errors", {}).get(name),
            "gating": e["gating"][name],
            "gating_error": e.get("gating_errors", {}).get(name),
        }
        for e in summary["experts"]
        for name in table.input_names
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
        for e in summary["experts"]
    ]
    pd.DataFrame(rows).to_parquet(out / "parameters.parquet", index=False)
    samples = pd.DataFrame({"target": y, "predicted": predicted})
    for i in range(posterior.shape[1]):
        samples[f"responsibility_{i + 1}"] = posterior[:, i]
    samples.to_parquet(out / "samples.parquet", index=False)
    units = "standard deviations" if summary["settings"]["standardise"] else "the data's units"
    convergence_figure(result.history, y, predicted, posterior.argmax(axis=1), units, out / "convergence.png")
    if result.selection is None:
        (out / "selection.png").unlink(missing_ok=True)  # of an earlier fit
    else:
        selection_figure(result.selection, out / "selection.png")
    document = summary | {"history": result.history.tolist()}
    (out / "fit.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
