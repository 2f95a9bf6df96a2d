"""The output of `moejax families`: what the labels of an output family tell, and whether moments can use them."""

from __future__ import annotations

from typing import Any

import numpy as np

from moejax.checks import require
from moejax.cli.activations import REFERENCE_DIM, REFERENCE_NUM_EXPERTS, load_function
from moejax.fitting.family_labels import support_in_words
from moejax.model.families import FamilyLike, family_names, get_family
from moejax.model.family import Family, Nuisances, is_gaussian
from moejax.model.family_checks import require_sound
from moejax.moments.family_transforms import family_transforms_on_host
from moejax.moments.label_transforms import ORDERS
from moejax.moments.orders import LARGEST_SECOND_MOMENT, choose_order, predicted_mse, why_unusable

SHOWN = {
    "student_t": "student_t(3)",
    "binomial": "binomial(10)",
    "ordinal": "ordinal(4,-1.5,0,1)",
}
"""Examples of the families that have numbers."""
DISPERSIONS = {"student_t": 0.3, "laplace": 0.2, "negative_binomial": 0.5, "gamma": 0.5, "lognormal": 0.3}
"""Dispersions at which families are shown if none is given; 0.25 for others."""


def load_family(reference: str) -> Family:
    """The family by a registered name, or of FILE.py:NAME, a `Family` or a function without arguments that makes one.

    Raises:
        ValueError: it does not exist, or it is no sound family.
    """
    if ":" not in reference:
        return get_family(reference)
    found: Any = load_function(reference, kind=Family)
    family = found if isinstance(found, Family) else found()
    require(isinstance(family, Family), reference, "a moejax.Family, or a function that makes one", family)
    require_sound(family)
    return family


def family_row(which: FamilyLike, norm: float, intercept: float, dispersion: float | None) -> dict[str, Any]:
    """Numbers of one family for experts of one norm and intercept; None for a transform that does not exist.

    signals: E[rho_r(Y)^2] / r!, r = 1..4, how much of He_r(Z) a label tells, at most 1. order2, order3, order4: E[l^2] at c_m = 1
    of the least-norm and of the weighted transform. order: the order to use, with its reason; predicted_n_mse: as in
    `activation_row`.

    Raises:
        ValueError: a norm or a dispersion that is not positive, or an unknown family.
    """
    family = get_family(which)
    require(np.isfinite(norm) and norm > 0, "--norm", "a positive number", norm)
    require(np.isfinite(intercept), "--intercept", "a finite number", intercept)
    good = dispersion is None or (np.isfinite(dispersion) and dispersion > 0)
    require(good, "--dispersion", "a positive number", dispersion)
    if not family.has_dispersion:
        s = 1.0
    else:
        s = DISPERSIONS.get(family.name.partition("(")[0], 0.25) if dispersion is None else dispersion
    at = Nuisances(float(norm), float(intercept), float(s))
    made = family_transforms_on_host(family, at, REFERENCE_NUM_EXPERTS)
    choice = choose_order(family, at, dim=REFERENCE_DIM, num_experts=REFERENCE_NUM_EXPERTS)
    row: dict[str, Any] = {
        "name": family.name,
        "labels": support_in_words(family),
        "norm": norm,
        "intercept": intercept,
        "dispersion": s if family.has_dispersion else None,
        "signals": made.signals.tolist(),
        "order": choice.order,
        "reason": choice.reason,
    }
    for m in ORDERS:
        row[f"order{m}"] = {
            kind: float(made.transforms[m, kind].second_moment)
            if (m, kind) in made.transforms and np.isfinite(made.transforms[m, kind].second_moment)
            else None
            for kind in ("least_norm", "weighted")
        }
        row[f"order{m}_unusable"] = why_unusable(family, at, m) or None
    row["predicted_n_mse"] = (
        predicted_mse(
            family, at, choice.order, "weighted", dim=REFERENCE_DIM, num_experts=REFERENCE_NUM_EXPERTS
        )
        if choice.order
        else None
    )
    return row


def family_rows(
    which: str | None, norm: float, intercept: float, dispersion: float | None
) -> list[dict[str, Any]]:
    """Rows of the registered families but the Gaussian, which `moejax activations` shows; or of one."""
    if which is not None:
        family = load_family(which)
        words = "another family than the Gaussian, whose transforms `moejax activations` shows"
        require(not is_gaussian(family), "NAME", words, which)
        return [family_row(family, norm, intercept, dispersion)]
    names = [SHOWN.get(name, name) for name in family_names() if name != "gaussian"]
    return [family_row(name, norm, intercept, dispersion) for name in names]


def print_family_rows(rows: list[dict[str, Any]]) -> None:
    """Print the rows as one table, and the reasons for the orders."""
    from rich import box
    from rich.table import Table

    from moejax.console import make_console

    def number(value: float | None, form: str = "#.4g") -> str:
        return "-" if value is None else f"{value:{form}}".rstrip(".")

    console = make_console()
    first = rows[0]
    title = f"Experts of norm {first['norm']:g}, intercept {first['intercept']:g}"
    table = Table("family", "dispersion", title=title, box=box.SIMPLE)
    for heading in ("signal 1", "signal 2", "signal 3", "E[l2^2]", "E[l3^2]", "order", "n MSE"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            number(row["dispersion"], "g"),
            *(f"{value:.4f}" for value in row["signals"][:3]),
            *(number(row[f"order{m}"]["least_norm"]) for m in (2, 3)),
            str(row["order"] or "none"),
            number(row["predicted_n_mse"], ".0f"),
        )
    console.print(table)
    for row in rows:
        found = "" if row["order"] else "no usable order: "
        console.print(f"{row['name']} ({row['labels']}): {found}{row['reason']}", soft_wrap=True)
    console.print(
        f"Usable: E[l^2] of the weighted transform at most {LARGEST_SECOND_MOMENT:g} at c_m = 1. Predicted n MSE of one "
        f"expert by weighted transforms, d = {REFERENCE_DIM}, k = {REFERENCE_NUM_EXPERTS}. Without an order, a family is still "
        "fitted by likelihood.",
        soft_wrap=True,
    )
