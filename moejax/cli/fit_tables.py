"""A fit as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moejax.console import make_console
from moejax.fitting.tables import Dataset

_ERRORS = ("coefficient_errors", "gating_errors")


def _number(value: float | None, form: str) -> str:
    """A number as text; a dash if it is not finite (None in the document)."""
    return "—" if value is None else f"{value:{form}}"


def _beside(value: float | None, noise_std: float | None) -> float | None:
    """The value, or zero if it is a rounding error compared with the noise."""
    rounding = value is not None and noise_std is not None and abs(value) < 1e-9 * noise_std
    return 0.0 if rounding else value


def _strongest(
    values: dict[str, float | None],
    errors: dict[str, float] | None,
    inputs: Sequence[int] | None = None,
    count: int = 3,
) -> str:
    """The largest coefficients as lines; those of `inputs` only, if these are given."""
    own = [item for place, item in enumerate(values.items()) if inputs is None or place in inputs]
    ranked = sorted(own, key=lambda item: -abs(item[1] or 0.0))[:count]
    if errors is None:
        return "\n".join(f"{name} {_number(value, '+.3g')}" for name, value in ranked)

    def error(name: str) -> str:
        return "±?" if errors[name] is None else f"±{errors[name]:.2g}"  # the data do not determine it

    return "\n".join(f"{name} {_number(value, '+.3g')}{error(name)}" for name, value in ranked)


def _print_selection(console: Console, selection: list[dict[str, Any]]) -> None:
    if "log_evidence" in selection[0]:
        _print_selection_with_means(console, selection)
        return
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


def _print_selection_with_means(console: Console, selection: list[dict[str, Any]]) -> None:
    """The table of means, which evidence compares, and of mixtures beside them."""
    both = any(row["objective"] == "likelihood" for row in selection)
    title = "Which density (less BIC), how many experts" if both else "How many experts (largest evidence)"
    out = Table(title=f"{title}; * chosen", box=box.SIMPLE, pad_edge=False)
    headings = ("objective", "experts", "log-likelihood", "parameters", "BIC", "log evidence")
    for name in headings:
        out.add_column(name, justify="left" if name == "objective" else "right")
    refused = []
    for row in selection:
        if row["log_likelihood"] is None:
            refused.append(row)
            continue
        effective = row.get("effective_parameters")
        out.add_row(
            row["objective"],
            f"{row['num_experts']}{'*' if row['chosen'] else ' '}",
            _number(row["log_likelihood"], ".1f"),
            _number(row["num_parameters"] if effective is None else effective + 1.0, ".1f"),
            _number(row["bic"], ".1f"),
            _number(row["log_evidence"], ".1f"),
        )
    console.print(out)
    for row in refused:
        console.print(f"{row['objective']}, {row['num_experts']} experts: {row['status']}")


def _print_objective(console: Console, summary: dict[str, Any]) -> None:
    """The density of the target, how it was chosen, and over how many models predictions are averaged."""
    found = summary["diagnostics"]
    if summary["objective"] == "mean":
        console.print(
            f"objective: mean, the target is normal about the mean of the experts; noise {_number(summary['noise_std'], '.4g')}"
        )
        shift = summary["log_likelihood"] - summary["in_units"]["data"]["log_likelihood"]
        ridges = " and ".join(f"{found[f'ridge_{part}']:.3g} on {part}" for part in ("experts", "gates"))
        console.print(
            f"effective parameters {found['effective_parameters'] + 1.0:.1f}, with the noise; ridges {ridges}; log evidence "
            f"{found['log_evidence'] + shift:.1f}"
        )
    elif summary["objective_choice"] is not None:
        console.print("objective: likelihood, the target is of one expert, which the gate chooses")
    if summary["objective_choice"] is not None:
        console.print(f"by BIC: {summary['objective_choice']}")
    if summary["num_members"] > 1:
        console.print(
            f"predictions, RMSE and R^2 are those of the average of {summary['num_members']} models; the tables show the best"
        )


def print_fit(summary: dict[str, Any], table: Dataset) -> None:
    """Print the summary of a fit: its likelihood, a row per expert, the criteria of selection, and the notes."""
    console = make_console()
    settings = summary["settings"]
    is_mean = summary["objective"] == "mean"
    of = summary["diagnostics"].get("family", "gaussian")
    of = "" if of == "gaussian" else f" of family {of}"
    offset = "" if table.offset_name is None else f"; offset: {table.offset_name}"
    units = "standardised units" if summary["units"] == "standardised" else "the data's units"
    console.print(
        f"{settings['num_experts']} {settings['activation']} experts{of} by {summary['diagnostics']['method']} on "
        f"{summary['num_samples']} samples of {summary['num_inputs']} inputs; target: {table.target_name}{offset}"
    )
    console.print(
        f"log-likelihood {_number(summary['log_likelihood'], '.3f')} nats "
        f"({_number(summary['log_likelihood_per_sample'], '.4f')} per sample, {units}), "
        f"RMSE {_number(summary['rmse'], '.4f')}, R^2 {_number(summary['r_squared'], '.4f')}"
    )
    console.print(f"status: {summary['status']}", style=None if summary["status"] == "ok" else "bold red")
    _print_objective(console, summary)
    numbers = Table("expert", title=f"What each expert does ({units})", box=box.SIMPLE)
    # the experts of a mean have one noise, and no labels of their own
    family = summary["diagnostics"].get("family", "gaussian")
    level = ("noise std" if family == "gaussian" else "dispersion",)
    level = level if summary["diagnostics"].get("has_dispersion", True) else ()
    for name in ("share", "bias") if is_mean else ("share", *level, "mean target", "bias"):
        numbers.add_column(name, justify="right")
    inputs = Table("expert", box=box.SIMPLE)  # a separate table: numbers are never cut to fit 80 columns
    where = "weighs more where" if is_mean else "chosen where"
    for name in ("strongest inputs ± standard error", f"{where} (gate, against the last)"):
        inputs.add_column(name, overflow="fold")
    for expert in summary["experts"]:
        noise = summary["noise_std"] if is_mean else expert["noise_std"]
        own = (_number(noise, ".4g"), _number(_beside(expert["mean_target"], noise), "+.4g"))
        numbers.add_row(
            str(expert["expert"]),
            _number(expert["share"], ".3f"),
            *(() if is_mean else own[1 - len(level) :]),
            _number(_beside(expert["bias"], noise), "+.4g"),
        )
        inputs.add_row(
            str(expert["expert"]),
            _strongest(expert["coefficients"], expert.get("coefficient_errors"), settings["expert_inputs"]),
            _strongest(expert["gating"], expert.get("gating_errors"), settings["gate_inputs"])
            if any(expert["gating"].values())
            else ("anywhere" if settings["gate"] == "constant" else "reference"),
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
