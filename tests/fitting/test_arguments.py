"""What `fit` and `MoERegressor` accept and refuse: every kind of array and option, with one line for what cannot be fitted."""

import datetime
import warnings
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import moejax
from moejax import MoERegressor
from moejax.checks import brief, require
from moejax.fitting import arguments
from moejax.fitting.arguments import checked_options, noise_levels, number_of_experts, prng_key, whole_number
from moejax.fitting.array_checks import NotNumbersError, as_numbers, checked_arrays
from moejax.methods.options import FitOptions

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2))
Y = X @ [1.0, -2.0] + 0.1 * RNG.normal(size=60)


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 420
    for word in words:
        assert word in message, message


# messages


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "3"),
        (np.float64(2.5), "2.5"),
        ("a\nb", r"'a\nb'"),
        (np.zeros((2, 2)), "[[0.0, 0.0], [0.0, 0.0]]"),
        (np.zeros((300, 2)), "ndarray of shape (300, 2)"),
        (jnp.zeros(300), "ArrayImpl of shape (300,)"),
        (pd.DataFrame({"a": range(100)}), "DataFrame of shape (100, 1)"),
        ([-(10**5000)], "[an integer of 16610 bits]"),
        ({"a": np.zeros(1000)}, "{'a': ndarray of shape (1000,)}"),
        (list(range(10**5)), "[0, 1, 2, 3, 4, 5, ...]"),
    ],
)
def test_a_value_is_shown_in_one_short_line(value, shown):
    assert brief(value) == shown


def test_whatever_is_shown_is_short():
    class Loud:
        def __repr__(self):
            return "loud\n" * 1000

    class Broken:
        def __repr__(self):
            raise RuntimeError

    for value in ("x" * 10**6, Loud(), Broken(), [[["x" * 1000] * 100] * 100], {1: {2: {3: {4: {}}}}}):
        assert len(brief(value)) <= 160
        assert "\n" not in brief(value)
    with pytest.raises(ValueError, match=r"^size: expected a small number, got ndarray of shape \(100,\)$"):
        require(False, "size", "a small number", np.zeros(100))


# arrays


class Convertible:
    def __array__(self, dtype=None, copy=None):
        return X


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (X.tolist(), X),
        (X.view(np.matrix), X),
        (np.ma.masked_array(X, mask=np.zeros_like(X, bool)), X),
        (X > 0, (X > 0).astype(float)),
        (X.astype(np.float16), X.astype(np.float16)),
        (jnp.asarray([[1.5, 2.0]], jnp.bfloat16), [[1.5, 2.0]]),
        (jnp.asarray(X), X),
        (X.astype(object), X),
        (X.astype(str), X),
        (np.asfortranarray(X)[::-2], X[::-2]),
        (Convertible(), X),
        (pd.DataFrame(X), X),
        (pd.DataFrame(X).astype("Float64"), X),
        (pd.DataFrame({"a": [True, False], "b": pd.Categorical([3, 1])}), [[1, 3], [0, 1]]),
        (pd.Series([1, 2], dtype="Int64"), [1, 2]),
        ([10**30, Fraction(1, 2)], [1e30, 0.5]),
        (range(3), [0, 1, 2]),
    ],
)
def test_numbers_of_many_forms(given, numbers):
    array = as_numbers(given, "x")
    assert type(array) is np.ndarray
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array, numbers)


def masked(values, place):
    mask = np.zeros(values.shape, bool)
    mask[place] = True
    return np.ma.masked_array(values, mask=mask)


def changed(values, place, value, dtype=float):
    values = values.astype(dtype)
    values[place] = value
    return values


DATES = np.arange(60).astype("M8[D]")
BAD_X = {
    "none": (None, ["got None"]),
    "scalar": (3.0, ["(n, d)", "shape ()"]),
    "dictionary": ({"a": X[:, 0]}, ["numbers", "dict"]),
    "set": ({1, 2}, ["numbers", "set"]),
    "text": ("x", ["numbers", "'x'"]),
    "generator": ((row for row in X), ["numbers", "generator"]),
    "one input": (X[:, 0], ["(n, d)", "(60,)", "x[:, None]"]),
    "cube": (X[:, :, None], ["(n, d)", "(60, 2, 1)"]),
    "ragged": ([[1.0, 2.0], [3.0]], ["numbers", "inhomogeneous"]),
    "no rows": (X[:0], ["at least", "got 0 sample(s)"]),
    "no columns": (X[:, :0], ["0 feature(s)", "(60, 0)"]),
    "sparse": (scipy.sparse.csr_array(X), ["dense", "sparse", ".toarray()"]),
    "masked": (masked(X, (3, 0)), ["masked", "got 1", "(3, 0)"]),
    "complex": (X + 0j, ["real numbers", "complex"]),
    "complex objects": (changed(X, (0, 0), np.complex64(1j), object), ["real numbers", "complex"]),
    "dates": (np.stack([DATES, DATES], axis=1), ["dates"]),
    "a date": (changed(X, (0, 0), datetime.date(2020, 1, 1), object), ["numbers", "datetime.date"]),
    "durations": ((DATES - DATES[0])[:, None], ["durations"]),
    "a column of dates": (pd.DataFrame({"a": X[:, 0], "b": DATES}), ["dates"]),
    "no text": (np.full((60, 2), "a"), ["numbers", "'a'"]),
    "categories": (pd.DataFrame({"a": pd.Categorical(["u", "v"] * 30)}), ["numbers", "'u'"]),
    "nan": (changed(X, (4, 1), np.nan), ["finite", "nan", "(4, 1)"]),
    "infinity": (changed(X, (4, 1), -np.inf), ["finite", "-inf", "(4, 1)"]),
    "None among numbers": (changed(X, (4, 1), None, object), ["finite", "nan", "(4, 1)"]),
    "NA among numbers": (changed(X, (4, 1), pd.NA, object), ["finite", "nan", "(4, 1)"]),
    "nullable": (pd.DataFrame(X).astype("Float64").mask(X > 2.0), ["finite", "nan"]),
    "integer too large": (changed(X, (0, 0), 10**400, object), ["finite", "too large"]),
    "number too large": (changed(X, (0, 0), np.longdouble("1e4000"), np.longdouble), ["finite", "inf"]),
    "signalling NaN": (changed(X, (0, 0), Decimal("sNaN"), object), ["numbers", "InvalidOperation"]),
    "dictionary among numbers": (changed(X, (0, 0), {"a": 1}, object), ["numbers", "dict"]),
    "records": (np.zeros(60, [("a", float)]), ["numbers", "'a'"]),
    "keys": (jax.random.split(jax.random.key(0), 60), ["numbers", "key"]),
}


@pytest.mark.parametrize("kind", BAD_X)
def test_inputs_that_no_door_accepts(kind):
    x, words = BAD_X[kind]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        moejax.fit(jax.random.key(0), x, Y, num_experts=1, method="joint_em")
    one_line(error, "x: ", *words)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MoERegressor(1).fit(x, Y)
    one_line(error, "X: ", *[word for word in words if word != "x[:, None]"])


BAD_Y = {
    "short": (Y[:-1], ["(60,)", "(59,)"]),
    "masked": (masked(Y, 3), ["masked", "(3,)"]),
    "complex": (Y + 0j, ["complex"]),
    "dates": (DATES, ["dates"]),
    "durations": (pd.Series(DATES - DATES[0]), ["durations"]),
    "text": (["a"] * 60, ["numbers", "'a'"]),
    "infinity": (changed(Y, 7, np.inf), ["finite", "inf", "(7,)"]),
    "sparse": (scipy.sparse.csr_array(Y[:, None]), ["dense", "sparse"]),
    "scalar": (1.0, ["(60,)", "()"]),
    "no outputs": (np.zeros((60, 0)), ["(60,)", "(60, 0)"]),
    "cube": (np.zeros((60, 2, 2)), ["(60,)", "(60, 2, 2)"]),
}


@pytest.mark.parametrize("kind", BAD_Y)
def test_targets_that_no_door_accepts(kind):
    y, words = BAD_Y[kind]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        moejax.fit(jax.random.key(0), X, y, num_experts=1, method="joint_em")
    one_line(error, "y: ", *words)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MoERegressor(1).fit(X, y)
    one_line(error, "y: ", *words)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.ones(3), ["(60,)", "(3,)"]),
        (np.ones((60, 1)), ["(60,)", "(60, 1)"]),
        (-np.ones(60), ["non-negative", "-1.0"]),
        (np.zeros(60), ["not all zero"]),
        (changed(np.ones(60), 2, np.nan), ["finite", "nan", "(2,)"]),
        (np.full(60, 1e308), ["finite sum", "inf"]),
        (masked(np.ones(60), 5), ["masked", "(5,)"]),
        ("a", ["numbers", "'a'"]),
        (scipy.sparse.csr_array(np.ones((1, 60))), ["dense"]),
    ],
)
def test_weights_that_no_door_accepts(weights, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        moejax.fit(jax.random.key(0), X, Y, weights=weights, num_experts=1, method="joint_em")
    one_line(error, "weights: ", *words)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MoERegressor(1).fit(X, Y, sample_weight=weights)
    one_line(error, "sample_weight: ", *words)


def test_what_is_accepted_is_the_same_fit():
    expected = MoERegressor(1).fit(X, Y).coef_
    for x in (
        X.view(np.matrix),
        np.ma.masked_array(X),
        jnp.asarray(X),
        X.tolist(),
        pd.DataFrame(X).astype("Float64"),
    ):
        np.testing.assert_allclose(MoERegressor(1).fit(x, Y).coef_, expected, rtol=1e-12)
    np.testing.assert_allclose(MoERegressor(1).fit(X, Y, sample_weight=2.0).coef_, expected, rtol=1e-12)
    binary = MoERegressor(1).fit(X, Y > 0).coef_
    np.testing.assert_allclose(binary, MoERegressor(1).fit(X, (Y > 0) * 1.0).coef_, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-320, 1e-309])
def test_labels_whose_noise_is_no_number_are_refused(size):
    with pytest.raises(
        ValueError, match=r"^x, y: expected units in which the coefficients and the noise are"
    ):
        MoERegressor(1).fit(X, size * np.round(5 * Y))


def test_parameters_that_overflow_in_the_units_of_the_data_are_refused():
    with pytest.raises(ValueError, match=r"^x, y: expected units in which"):
        MoERegressor(1).fit(1e-4 * X, 1e307 * Y)


def test_a_row_whose_weight_vanishes_beside_the_others_is_not_looked_at():
    weights = np.where(np.arange(60) < 3, 1e-300, np.random.default_rng(0).random(60) * 1e280)
    x, y = 1e-3 * X, Y.copy()
    x[:3], y[:3] = 1e308, -1e308
    spoilt, plain = (
        MoERegressor(1).fit(inputs, labels, sample_weight=part)
        for inputs, labels, part in ((x, y, weights), (x[3:], y[3:], weights[3:]))
    )
    np.testing.assert_allclose(spoilt.coef_, plain.coef_, rtol=1e-12)


def test_arrays_come_back_in_double_precision():
    x, y, weights = checked_arrays(X.astype(np.float32), np.stack([Y, Y], axis=1), 2)
    assert {x.dtype, y.dtype, weights.dtype} == {np.dtype(np.float64)}
    assert x.shape == (60, 2)
    assert y.shape == (60, 2)
    np.testing.assert_array_equal(weights, np.full(60, 2.0))


def test_entries_that_are_no_numbers_are_a_type_error_too():
    with pytest.raises(TypeError, match=r"argument must be .* string.* number"):
        as_numbers([{"a": 1}], "x")
    assert issubclass(NotNumbersError, ValueError)


def test_a_fitted_estimator_checks_its_arrays_too():
    model = MoERegressor(1).fit(pd.DataFrame(X, columns=["a", "b"]), Y)
    for x in (scipy.sparse.csr_array(X), masked(X, (0, 0)), X + 0j):
        with pytest.raises(ValueError, match=r"^X: expected"):
            model.predict(x)
    for method in (model.score_samples, model.responsibilities, model.bic, model.aic):
        for y in (changed(Y, 3, np.nan), masked(Y, 3), ["a"] * 60):
            with pytest.raises(ValueError, match=r"^y: expected"):
                method(pd.DataFrame(X, columns=["a", "b"]), y)
    with pytest.raises(ValueError, match=r"^X: Feature names"):
        MoERegressor(1).fit(pd.DataFrame(X, columns=["a", 1]), Y)


# options

BAD_OPTIONS = {
    "fit_intercept": ["no", None, 2, 1.0, np.array([True, False])],
    "num_starts": [0, -1, 2.5, "3", True, np.inf, np.nan, 10**400, 10**7, [2], {}, 1j],
    "max_iterations": [0, 1.5, "3", None, True, np.inf, -np.inf, 10**400, np.array([3, 4])],
    "order": [2, 5, 3.5, "3", True, [3, 4], 10**400],
    "ridge": [-1.0, np.nan, np.inf, "0", "proof", True, 10**400, [1e-6], 1j],
    "objective": ["mode", None, 1, ["mean"]],
    "average": [0, -1, 1.5, "2", True, 10**400, 101, None, [2]],
    "noise": ["each", None, 1, ["shared"], np.array(["shared", "shared"])],
    "method": ["spektral", None, 3, ["joint_em"], "x" * 10**4],
    "activation": ["rellu", None, 3, ["relu"], {"relu": 1}],
    "num_experts": [0, -1, 2.5, None, "3", "x" * 10**4, True, {2: 1}, np.inf, np.nan, 1j],
    "noise_std": [0.0, -1.0, np.nan, np.inf, "0.1", True, [0.1, 0.2], 10**400, {}, [], 1j],
}
OF_FIT = {
    "ridge": ["evidence"],  # which is of a mean fit, and the estimator's default may be one
    "key": [
        0,
        None,
        "x",
        np.random.default_rng(0),
        np.zeros(2),
        jax.random.split(jax.random.key(0)),
        np.uint32(1),
    ],
    "num_experts": [
        (),
        [2.5],
        ["2"],
        [0, 1],
        [[1], [2, 3]],
        range(10**12),
        range(10**30),
        "many",
        np.ones((2, 2)),
    ],
    "num_restarts": [0, 2.5, "3", None, True, 10**400],
    "chunk_size": [0, -3, 2.5, "3", True, np.inf, 2**40],
    "num_residual_passes": [-1, 2.5, "3", True],
    "polish": ["no", None, 2],
    "transform": ["best", 3],
    "start": ["pca", None],
    "covariance": ["hc3", None],
    "log_density": ["nope", 3, [], lambda x: x, lambda x: "a", lambda x: {}["a"]],
}
OF_ESTIMATOR = {
    "standardise": ["no", None, 2],
    "transform_kind": ["best", 3],
    "precision": ["float16", 64],
    "random_state": ["x", -1, 10**400, np.random.default_rng(0), np.zeros(10**4), 2.5],
}


def cases(*tables):
    # without an object's address, which differs from process to process: pytest-xdist compares the names
    return [
        pytest.param(name, value, id=f"{name}-{brief(value).split(' at 0x')[0][:24]}")
        for table in tables
        for name, values in table.items()
        for value in values
    ]


@pytest.mark.parametrize(("name", "value"), cases(BAD_OPTIONS, OF_FIT))
def test_options_that_fit_refuses(name, value):
    options = {"key": jax.random.key(0), "num_experts": 1, "method": "joint_em", "fit_intercept": True}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        moejax.fit(x=X, y=Y, **(options | {name: value}))
    one_line(error, name)


@pytest.mark.parametrize(("name", "value"), cases(BAD_OPTIONS, OF_ESTIMATOR))
def test_options_that_the_estimator_refuses(name, value):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        MoERegressor(**({"num_experts": 1} | {name: value})).fit(X, Y)
    one_line(error, name)


@pytest.mark.parametrize("value", [3, 3.0, np.int8(3), np.float32(3), np.array(3), jnp.asarray(3.0)])
def test_whole_numbers_of_many_types(value):
    assert type(whole_number(value, "n")) is int
    assert whole_number(value, "n") == number_of_experts(value) == 3
    expected = FitOptions(order=3, max_iterations=3, ridge=1e-6)
    assert checked_options(FitOptions(order=value, max_iterations=value)) == expected


def test_numbers_of_experts():
    assert number_of_experts("auto") == "auto"
    for several in (range(1, 4), [3, 1, 2, 2], (1.0, 2, 3), np.arange(1, 4), jnp.arange(1, 4)):
        assert number_of_experts(several) == (1, 2, 3)
    for several in (range(1, 4), "auto"):
        with pytest.raises(ValueError, match=r"^num_experts: expected a whole number, got"):
            number_of_experts(several, several=False)


def test_noise_levels():
    assert noise_levels(None, ()) is None
    assert noise_levels(np.float32(0.5), ()) == 0.5
    np.testing.assert_array_equal(noise_levels([1, 2.0], (2,)), [1.0, 2.0])
    assert noise_levels(3, (2,)) == 3.0
    for value in ([1.0, 2.0, 3.0], [1.0, -2.0], [[1.0], [2.0]], [True, 1.0]):
        with pytest.raises(ValueError, match=r"^noise_std: expected a positive .* one for each of 2 outputs"):
            noise_levels(value, (2,))


def test_keys_of_both_kinds():
    for key in (jax.random.key(3), jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))):
        assert prng_key(key) is key


def test_every_option_of_both_doors_has_a_check():
    import inspect

    apart = {"key", "x", "y", "weights", "num_experts", "noise_std", "self", "random_state"}
    apart |= {"source", "checkpoint"}  # checked in test_streaming
    apart |= {"offset"}  # checked in test_offset
    for door in (moejax.fit, MoERegressor.__init__):
        assert set(inspect.signature(door).parameters) - apart <= set(arguments.CHECKS)


def test_checks_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_numbers(np.array(["1e400", "2"]), "x")
        as_numbers(np.full(3, np.longdouble("1e4000")), "x")
