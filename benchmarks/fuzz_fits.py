"""Kinds of `fuzz.py`: arrays and options for `moejax.fit` and `MoERegressor`.

Sound data are spoiled in a few ways at once: hostile numbers, constant and repeated columns and rows, weights of every size, and
containers that are not arrays. Shapes and methods are few, so that compiled programs serve many inputs. A fit with status "ok" must
hold finite numbers only, and its log-likelihood must be that of its parameters, summed here in NumPy.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.sparse
import scipy.special

import moejax
from moejax.checks import brief
from moejax.fitting.array_checks import NotNumbersError

NUM_ROWS, NUM_INPUTS = 40, 2
SIZES = (1e308, -1e308, 1e200, 1e30, 1e-30, 1e-200, 1e-320, 5e-324, 0.0, -0.0, 2.0**53, 1e16)
NOT_FINITE = (np.nan, np.inf, -np.inf)
_last = {"input": ""}


def last_input() -> str:
    """The last input, in words."""
    return _last["input"]


# spoiling arrays

Array = np.ndarray
Change = Callable[[np.random.Generator, Array], Any]


def _cells(values: tuple[float, ...]) -> Change:
    def change(rng: np.random.Generator, array: Array) -> Array:
        places = rng.integers(array.size, size=int(rng.integers(1, 4)))
        array.flat[places] = rng.choice(values, size=len(places))
        return array

    return change


def _scaled(rng: np.random.Generator, array: Array) -> Array:
    with np.errstate(all="ignore"):
        return array * 10.0 ** rng.uniform(-330, 308)


def _mildly_scaled(rng: np.random.Generator, array: Array) -> Array:
    return array * 10.0 ** rng.uniform(-12, 12)


def _shifted(rng: np.random.Generator, array: Array) -> Array:
    return array + 10.0 ** rng.uniform(-3, 20)


def _constant(rng: np.random.Generator, array: Array) -> Array:
    array[..., int(rng.integers(array.shape[-1])) if array.ndim == 2 else slice(None)] = rng.choice(SIZES)
    return array


def _nearly_constant(rng: np.random.Generator, array: Array) -> Array:
    return 1.0 + 10.0 ** rng.uniform(-18, -6) * array


def _repeated_rows(rng: np.random.Generator, array: Array) -> Array:
    return array[rng.integers(int(rng.integers(1, 6)), size=len(array))]


def _copied_column(rng: np.random.Generator, array: Array) -> Array:
    if array.ndim == 2:
        array[:, -1] = array[:, 0] * rng.choice([1.0, -2.0, 1.0 + 1e-14]) + rng.choice([0.0, 5.0])
    return array


def _whole(rng: np.random.Generator, array: Array) -> Array:
    return np.round(array * rng.choice([1.0, 3.0]))


def _binary(rng: np.random.Generator, array: Array) -> Array:
    return (array > 0) * 1.0


CHANGES: tuple[Change, ...] = (
    _cells(SIZES),
    _cells(NOT_FINITE),
    _scaled,
    _mildly_scaled,
    _shifted,
    _constant,
    _nearly_constant,
    _repeated_rows,
    _copied_column,
    _whole,
    _binary,
)


def _masked(rng: np.random.Generator, array: Array) -> Any:
    return np.ma.masked_array(array, mask=rng.random(array.shape) < rng.choice([0.0, 0.02]))


def _objects(rng: np.random.Generator, array: Array) -> Any:
    array = array.astype(object)
    strange = (None, pd.NA, pd.NaT, "x", "1.5", b"2", {}, [1], 1j, 10**400, -(10**309), True, Fraction(1, 3))
    strange += (
        Decimal("1e400"),
        datetime.date(2020, 1, 1),
        np.datetime64("2020"),
        np.complex64(1),
        np.ma.masked,
    )
    array.flat[int(rng.integers(array.size))] = strange[int(rng.integers(len(strange)))]
    return array


def _dates(rng: np.random.Generator, array: Array) -> Any:
    return np.arange(array.size).reshape(array.shape).astype(rng.choice(["M8[D]", "M8[ns]", "m8[s]"]))


def _frame(rng: np.random.Generator, array: Array) -> Any:
    kind = rng.choice(["float32", "float64", "Float64", "object", "string", "category", "str"])
    with np.errstate(all="ignore"):
        if array.ndim == 1:
            return pd.Series(array).astype(kind)
        return pd.DataFrame({f"x{i}": pd.Series(column).astype(kind) for i, column in enumerate(array.T)})


def _ragged(rng: np.random.Generator, array: Array) -> Any:
    rows = array.tolist()
    rows[int(rng.integers(len(rows)))] = [1.0] * int(rng.integers(4))
    return rows


def _other_type(rng: np.random.Generator, array: Array) -> Any:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = ["f2", "f4", "i1", "i8", "u8", "?", "O", "U8", "S8", "c16", "g"]
        return array.astype(rng.choice(kinds))


def _other_shape(rng: np.random.Generator, array: Array) -> Any:
    shapes = (array[:0], array[:1], array[:3], array.reshape(-1), array[..., None], array[None], array.T, 3.0)
    shapes += (array[:, :0] if array.ndim == 2 else array[:-1], np.broadcast_to(array, (2, *array.shape)))
    return shapes[int(rng.integers(len(shapes)))]


FORMS: tuple[Change, ...] = (
    _masked,
    _objects,
    _dates,
    _frame,
    _ragged,
    _other_type,
    _other_shape,
    lambda rng, array: array.tolist(),
    lambda rng, array: array.view(np.matrix) if array.ndim == 2 else array,
    lambda rng, array: scipy.sparse.csr_array(np.atleast_2d(array)),
    lambda rng, array: jnp.asarray(array, jnp.bfloat16),
    lambda rng, array: jnp.asarray(array, jnp.float32),
    lambda rng, array: {"a": array},
    lambda rng, array: set(array.flat),
    lambda rng, array: iter(array),
    lambda rng, array: None,
    lambda rng, array: "x",
    lambda rng, array: jax.random.split(jax.random.key(0), len(array)),
)


def _spoilt(rng: np.random.Generator, array: Array, changes: float, forms: float) -> Any:
    """The array after some of CHANGES and, with probability `forms`, in one of FORMS."""
    array = array.copy()
    for _ in range(int(rng.poisson(changes))):
        with np.errstate(all="ignore"):
            array = np.array(CHANGES[int(rng.integers(len(CHANGES)))](rng, array))
    return FORMS[int(rng.integers(len(FORMS)))](rng, array) if rng.random() < forms else array


def _sound_data(rng: np.random.Generator) -> tuple[Array, Array]:
    """(n, d) inputs and (n,) labels of two lines."""
    x = rng.normal(size=(NUM_ROWS, NUM_INPUTS))
    slopes = np.where(rng.random((NUM_ROWS, 1)) < 0.5, 1.0, -1.0)
    return x, (x * slopes) @ np.ones(NUM_INPUTS) + 0.2 * rng.normal(size=NUM_ROWS)


def _weights(rng: np.random.Generator) -> Any:
    if rng.random() < 0.6:
        return None
    choices = (
        np.ones(NUM_ROWS),
        np.where(rng.random(NUM_ROWS) < 0.3, 0.0, 1.0),
        rng.random(NUM_ROWS),
        10.0 ** rng.uniform(-300, 300, NUM_ROWS),
        np.full(NUM_ROWS, 10.0 ** rng.uniform(-320, 308)),
        (np.arange(NUM_ROWS) == 0) * 1.0,
        rng.integers(5, size=NUM_ROWS),
    )
    weights = choices[int(rng.integers(len(choices)))]
    return _spoilt(rng, np.asarray(weights, float), 0.2, 0.1)


# fits

FITS: tuple[dict[str, Any], ...] = (
    {"num_experts": 1, "fit_intercept": True},
    {"num_experts": 2, "fit_intercept": True},
    {"num_experts": 2, "fit_intercept": True, "noise": "per_expert"},
    {"num_experts": 2, "fit_intercept": False},
)
CHEAP = {"method": "joint_em", "max_iterations": 12, "num_starts": 2}


def fit_of_arrays(rng: np.random.Generator) -> str | None:
    """`moejax.fit` of spoilt arrays, in double precision or in single."""
    x, y = _sound_data(rng)
    x, y, weights = _spoilt(rng, x, 0.7, 0.25), _spoilt(rng, y, 0.7, 0.15), _weights(rng)
    options = FITS[int(rng.integers(len(FITS)))]
    double = bool(rng.random() < 0.8)
    _last["input"] = (
        f"x = {brief(x)}\ny = {brief(y)}\nweights = {brief(weights)}\n{options}, double precision: {double}"
    )
    with jax.enable_x64(double):
        try:
            fitted = moejax.fit(jax.random.key(0), x, y, weights=weights, **CHEAP, **options)
        except NotNumbersError as error:  # a TypeError too, which would otherwise be a fault
            raise ValueError(str(error)) from None
    if fitted.status != "ok":
        return None
    values = {"params": fitted.params, "log_likelihood": fitted.log_likelihood, "history": fitted.history}
    return _not_finite(values) or _another_likelihood(
        fitted.params, fitted.log_likelihood, x, y, weights, 1e-6 if double else 1e-3
    )


def fit_of_estimator(rng: np.random.Generator) -> str | None:
    """`MoERegressor` of spoilt arrays, and all its predictions for them and for other rows."""
    x, y = _sound_data(rng)
    x, y, weights = _spoilt(rng, x, 0.7, 0.2), _spoilt(rng, y, 0.7, 0.15), _weights(rng)
    new = _spoilt(rng, rng.normal(size=(8, NUM_INPUTS)), 0.5, 0.2)
    options = dict(FITS[int(rng.integers(len(FITS)))])
    _last["input"] = (
        f"X = {brief(x)}\ny = {brief(y)}\nweights = {brief(weights)}\nnew = {brief(new)}\n{options}"
    )
    cheap = CHEAP if options["num_experts"] > 1 else {}
    model = moejax.MoERegressor(random_state=0, **cheap, **options)
    try:
        model.fit(x, y, sample_weight=weights)
        outputs = {
            "predict": model.predict(x),
            "predict_std": model.predict_std(x),
            "gate_probabilities": model.gate_probabilities(x),
            "responsibilities": model.responsibilities(x, y),
            "score_samples": np.maximum(model.score_samples(x, y), -1e308),  # densities further off are -inf
            "score_samples without y": model.score_samples(x),
        }
        near = (
            np.abs(np.asarray(x, np.float64)).max(axis=1) < 1e280
        )  # a row without weight may be further off
        outputs = {name: values[near] for name, values in outputs.items()} | {"params": model.params_}
        silent = None
        if model.status_ == "ok":
            silent = _not_finite(outputs | {"log_likelihood_": model.log_likelihood_})
            silent = silent or _another_likelihood(model.params_, model.log_likelihood_, x, y, weights, 1e-6)
        model.predict(new)
        model.gate_probabilities(new)
    except NotNumbersError as error:
        raise ValueError(str(error)) from None
    return silent


def _not_finite(values: dict[str, Any]) -> str | None:
    for name, value in values.items():
        for leaf in jax.tree.leaves(value):
            if not np.isfinite(leaf).all():
                return f"status is ok and {name} holds {brief(np.asarray(leaf))}"
    return None


def _another_likelihood(
    params: moejax.MoEParams, reported: float, x: Any, y: Any, weights: Any, tolerance: float
) -> str | None:
    """The log-likelihood of linear experts in extended precision, for comparison with the reported one."""
    x, y = (np.asarray(values, np.float64).astype(np.longdouble) for values in (x, y))
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64) * np.ones(len(x))
    used = weights > 0
    x, y, weights = x[used], y[used], weights[used]
    if y.ndim != 1:
        return None
    counts = np.all(weights == np.round(weights)) and weights.max() * len(weights) <= 2.0**53
    if not counts:  # weights without a scale are scaled to their effective number
        weights = weights / weights.max()
        weights = weights * (weights.sum() / (weights**2).sum())
    experts, gating, noise_std, expert_bias, gating_bias = (
        np.asarray(leaf, np.longdouble) for leaf in params
    )
    residual = (y[:, None] - x @ experts.T - expert_bias) / noise_std
    gates = x @ gating.T + gating_bias
    gates = gates - scipy.special.logsumexp(gates.astype(float), axis=1, keepdims=True)
    joint = gates - 0.5 * residual**2 - np.log(noise_std) - 0.5 * np.log(2 * np.longdouble(np.pi))
    top = joint.max(axis=1, keepdims=True)
    rows = top[:, 0] + np.log(np.exp(joint - top).sum(axis=1))
    expected = float(weights @ rows)
    # the precision of means in double precision if inputs or labels are far from 0
    size = np.abs(x) @ np.abs(experts).T + np.abs(expert_bias) + np.abs(y)[:, None]
    rounding = (np.finfo(float).eps * size / noise_std * (1.0 + np.abs(residual))).max(axis=1)
    rounding = rounding + np.finfo(float).eps * (np.abs(x) @ np.abs(gating).T + np.abs(gating_bias)).max(
        axis=1
    )
    scale = float(weights @ (tolerance * (1.0 + np.abs(rows)) + 16.0 * rounding))
    if not abs(expected - reported) <= scale:
        return f"status is ok and log_likelihood is {reported}, but that of its parameters {expected}"
    return None


# options

HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        3.0,
        2.5,
        1e-3,
        -1e-3,
        np.nan,
        np.inf,
        -np.inf,
        1e308,
        5e-324,
        10**400,
        1j,
    ),
    *("", "x", "3", "auto", "shared", "linear", "relu", "joint_em", "[/x]", "a\nb", "x" * 10**5, b"3"),
    *([], (), {}, set(), [1, 2], [1.0, 0.5], ["a"], [[1], [2, 3]], range(10**30), {"a": 1}, slice(3)),
    *(
        np.float64(2),
        np.int8(2),
        np.bool_(True),
        np.array(2),
        np.array([1, 2]),
        np.zeros((2, 2)),
        np.zeros(10**6),
    ),
    *(jnp.asarray(2.0), jnp.ones(3), np.ma.masked, pd.NA, pd.NaT, Decimal(2), Fraction(5, 2)),
    *(datetime.date(2020, 1, 1), np.datetime64("2020"), object(), print, len, lambda t: t, jnp.log, jnp.sign),
    *(lambda t: {}["a"], lambda t: None, lambda *t: 1.0, ValueError, Exception("x")),
)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "num_experts": (1, 2, 2.0, [1, 2]),
    "activation": ("linear",),
    "noise": ("shared", "per_expert"),
    "noise_std": (None, 0.2),
    "fit_intercept": (True,),
    "method": ("joint_em",),
    "weights_are": (None, "counts", "reliability"),
    "standardise": (True, False),
    "order": (None, 3, 4.0),
    "num_starts": (2,),
    "max_iterations": (12, 12.0),
    "ridge": (1e-6,),
}
OF_FIT: dict[str, tuple[Any, ...]] = {
    "key": (jax.random.key(0), jax.random.PRNGKey(0)),
    "transform": ("weighted", "centred"),
    "num_restarts": (4,),
    "start": ("random",),
    "polish": (True,),
    "chunk_size": (None,),
    "num_residual_passes": (None,),
    "covariance": ("observed",),
    "log_density": (None,),
}
OF_ESTIMATOR: dict[str, tuple[Any, ...]] = {
    "transform_kind": ("weighted",),
    "precision": ("float64",),
    "random_state": (0, None),
}
COUNTS = ("max_iterations", "num_starts", "num_restarts", "num_residual_passes", "chunk_size", "num_experts")


def _drawn_options(rng: np.random.Generator, known: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Sound values; one or two are replaced by hostile ones."""
    options = {name: values[int(rng.integers(len(values)))] for name, values in known.items()}
    for name in rng.choice(sorted(known), size=int(rng.integers(1, 3)), replace=False):
        value = HOSTILE[int(rng.integers(len(HOSTILE)))]
        # a different sound number would only need another compilation
        if not (name in COUNTS and isinstance(value, int | float | np.number) and 0 < value < 1e6):
            options[str(name)] = value
    return options


def options_of_fit(rng: np.random.Generator) -> str | None:
    """Options of `moejax.fit`, one or two of them hostile."""
    options = _drawn_options(rng, OPTIONS | OF_FIT)
    _last["input"] = "\n".join(f"{name} = {brief(value)}" for name, value in options.items())
    x, y = _sound_data(np.random.default_rng(0))
    with jax.enable_x64(True):
        fitted = moejax.fit(options.pop("key"), x, y, **options)
    if fitted.status != "ok":
        return None
    return _not_finite({"params": fitted.params, "log_likelihood": fitted.log_likelihood})


def options_of_estimator(rng: np.random.Generator) -> str | None:
    """Options of `MoERegressor`, one or two of them hostile."""
    options = _drawn_options(rng, OPTIONS | OF_ESTIMATOR)
    _last["input"] = "\n".join(f"{name} = {brief(value)}" for name, value in options.items())
    x, y = _sound_data(np.random.default_rng(0))
    model = moejax.MoERegressor(**options).fit(x, y)
    return (
        _not_finite({"params": model.params_, "predict": model.predict(x)}) if model.status_ == "ok" else None
    )


KINDS: dict[str, Callable[[np.random.Generator], str | None]] = {
    "fit_arrays": fit_of_arrays,
    "fit_options": options_of_fit,
    "estimator_arrays": fit_of_estimator,
    "estimator_options": options_of_estimator,
}
