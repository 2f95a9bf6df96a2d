"""The output of `moejax activations`: the constants of an activation's label transforms and their usability."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from moejax.model.activations import (
    ActivationLike,
    ScalarFunction,
    activation_facts,
    activation_name,
    activation_names,
    get_activation,
)
from moejax.moments.label_transforms import ORDERS, TRANSFORM_KINDS, transform_on_host
from moejax.moments.orders import (
    LARGEST_SECOND_MOMENT,
    RELATIVE_NOISE_RANGE,
    choose_order,
    predicted_mse,
    why_unusable,
)
from moejax.sweep.plan.user_code import read_user_file, run_user_file

REFERENCE_DIM, REFERENCE_NUM_EXPERTS = 10, 3
"""The setting of the predicted mean squared error."""


def load_function(reference: str, kind: type | None = None) -> ScalarFunction:
    """The function, or value of another `kind`, that FILE.py:FUNCTION names.

    Raises:
        ValueError: the file or function does not exist, or the file cannot be run.
    """
    file, _, function = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{reference}: no file {file!r}; expected FILE.py:FUNCTION")
    name = f"moejax_function_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    module = run_user_file(read_user_file(path, reference), name, f"{reference}: running the file")
    fn = getattr(module, function, None)
    if not callable(fn) and (kind is None or not isinstance(fn, kind)):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(
            f"{reference}: no function {function!r} there; functions: {', '.join(names) or 'none'}"
        )
    return cast(ScalarFunction, fn)


def activation_row(activation: ActivationLike, noise_std: float) -> dict[str, Any]:
    """Constants of one activation at one noise level; None for a constant that does not exist.

    alpha, beta, gamma: of y^3 + alpha y^2 + beta y and y^2 + gamma y; c3, c2: their third and second Hermite coefficients.
    order2, order3, order4: E[l^2] at c_m = 1 of each kind. order: the order to use, with its reason. predicted_n_mse: n times the
    predicted mean squared error of one expert at that order, d = 10, k = 3 (docs/method.md).

    Raises:
        ValueError: noise_std is not a positive finite number, or the activation is not a finite scalar function.
    """
    fn = get_activation(activation)
    facts = activation_facts(fn)
    if not (np.isfinite(noise_std) and noise_std > 0):
        raise ValueError(f"noise_std: expected a positive finite number, got {noise_std!r}")
    choice = choose_order(fn, noise_std, dim=REFERENCE_DIM, num_experts=REFERENCE_NUM_EXPERTS)
    row: dict[str, Any] = {"name": activation_name(activation), "noise_std": noise_std}
    exists = {m: not facts.constant and not (facts.parity == "even" and m % 2 == 1) for m in ORDERS}
    third = _leading_ratio(fn, noise_std, 3) if exists[3] else (None, None, None)
    second = _leading_ratio(fn, noise_std, 2) if exists[2] else (None, None)
    row |= {"alpha": third[1], "beta": third[2], "gamma": second[1], "c2": second[0], "c3": third[0]}
    row |= {"order": choice.order, "reason": choice.reason}
    for m in ORDERS:
        row[f"order{m}"] = {
            kind: _second_moment(fn, noise_std, m, kind) if exists[m] else None for kind in TRANSFORM_KINDS
        }
        row[f"order{m}_unusable"] = why_unusable(fn, noise_std, m) or None
    row["predicted_n_mse"] = {
        kind: predicted_mse(
            fn, noise_std, choice.order, kind, dim=REFERENCE_DIM, num_experts=REFERENCE_NUM_EXPERTS
        )
        if choice.order
        else None
        for kind in TRANSFORM_KINDS
    }
    return row


def activation_rows(which: str | None, noise_std: float) -> list[dict[str, Any]]:
    """Rows of all registered activations, of a named one, or of a user's FILE.py:FUNCTION."""
    if which is None:
        return [activation_row(name, noise_std) for name in activation_names()]
    return [activation_row(load_function(which) if ":" in which else which, noise_std)]


NO_SIGNAL = 1e12
"""Value of E[l^2] at c_m = 1 from which c_m is zero up to rounding."""


def _leading_ratio(fn: ScalarFunction, noise_std: float, order: int) -> tuple[float | None, ...]:
    """(c_m of the polynomial with leading coefficient 1, then its next lower coefficients); None if c_m is zero."""
    transform = transform_on_host(fn, noise_std, order, "polynomial", REFERENCE_NUM_EXPERTS)
    leading = transform.coefficients[order]
    if not transform.second_moment < NO_SIGNAL:
        return (0.0, *(None for _ in range(order - 1)))
    return (
        float(1.0 / leading),
        *(float(transform.coefficients[r] / leading) for r in range(order - 1, 0, -1)),
    )


def _second_moment(fn: ScalarFunction, noise_std: float, order: int, kind: str) -> float | None:
    value = float(transform_on_host(fn, noise_std, order, kind, REFERENCE_NUM_EXPERTS).second_moment)
    return value if np.isfinite(value) else None


def print_activation_rows(rows: list[dict[str, Any]]) -> None:
    """Print the rows as tables: constants, second moments, and the order to use."""
    from rich import box
    from rich.table import Table

    from moejax.console import make_console

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else "0" if abs(value) < 1e-12 else f"{value:#.{digits}g}".rstrip(".")

    console = make_console()
    title = f"y^3 + alpha y^2 + beta y and y^2 + gamma y at noise_std {rows[0]['noise_std']:g}"
    constants = Table("activation", title=title, box=box.SIMPLE)
    second_moments = Table("activation", "order", title="E[l^2] at c_m = 1", box=box.SIMPLE)
    setting = f"d = {REFERENCE_DIM}, k = {REFERENCE_NUM_EXPERTS}"
    use = Table(
        "activation",
        "order",
        title=f"Order to decompose, and predicted n MSE of one expert ({setting})",
        box=box.SIMPLE,
    )
    for name in ("alpha", "beta", "gamma", "c_3", "c_2"):
        constants.add_column(name, justify="right")
    for table in (second_moments, use):
        for kind in TRANSFORM_KINDS:
            table.add_column(kind, justify="right", no_wrap=True)
    second_moments.add_column("usable")
    for row in rows:
        constants.add_row(
            row["name"], *(number(row[key], 5) for key in ("alpha", "beta", "gamma", "c3", "c2"))
        )
        for m in ORDERS:
            moments = row[f"order{m}"] or dict.fromkeys(TRANSFORM_KINDS)
            cells = [number(moments[kind]) for kind in TRANSFORM_KINDS]
            usable = "no" if row[f"order{m}_unusable"] else "yes"
            second_moments.add_row(row["name"] if m == ORDERS[0] else "", str(m), *cells, usable)
        mse = [row["predicted_n_mse"][kind] for kind in TRANSFORM_KINDS]
        use.add_row(
            row["name"],
            str(row["order"] or "none"),
            *("-" if value is None else f"{value:.0f}" for value in mse),
        )
    for table in (constants, second_moments, use):
        console.print(table)
    for row in rows:
        console.print(f"{row['name']}: {'' if row['order'] else 'no usable order: '}{row['reason']}")
    low, high = RELATIVE_NOISE_RANGE
    rule = f"Usable: E[l^2] of the least-norm transform at most {LARGEST_SECOND_MOMENT:g} at c_m = 1"
    console.print(f"{rule}, and noise_std from {low:g} to {high:g} standard deviations of g(Z).")
