"""Fits that are written to a file and read again, with every number to its last digit; and files that are none."""

import copy
import dataclasses
import pickle
import zipfile

import jax
import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

import moejax
from moejax.fitting.result import FitResult


def data(outputs=()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2))
    sign = np.where(rng.random(200) < 0.5, 1.0, -1.0)
    y = sign * x[:, 0] + 0.2 * rng.normal(size=200)
    return (x, np.column_stack([y, x[:, 1] + 0.1 * rng.normal(size=200)])) if outputs else (x, y)


def assert_same(one, other):
    """The same values of the same kinds, arrays to the last digit."""
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    elif isinstance(one, np.ndarray | jax.Array):
        assert isinstance(other, np.ndarray)
        assert other.dtype == one.dtype
        np.testing.assert_array_equal(other, one)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple | list):
        assert type(one) is type(other)
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    elif isinstance(one, float) and np.isnan(one):
        assert np.isnan(other)
    else:
        assert one == other


KINDS = {
    "search": {"method": "multistart", "num_starts": 4},
    "noises": {"method": "joint_em", "noise": "per_expert", "fit_intercept": True},
    "outputs": {"method": "joint_em"},
    "selection": {"method": "spectral_em", "num_experts": [1, 2, 500]},
    "wide": {"method": "spectral_wide"},
    "source": {"method": "joint_em"},
    "inputs": {"method": "joint_em", "gate_inputs": [1], "expert_inputs": [0], "fit_intercept": True},
    "constant": {"method": "joint_em", "gate": "constant"},
    "averaged": {"method": "multistart", "num_starts": 8, "average": 2, "num_experts": 3},
    "mean": {"objective": "mean", "num_starts": 3, "average": 2, "fit_intercept": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_comes_back_to_the_last_digit(kind, tmp_path):
    x, y = data(outputs=kind == "outputs")
    if kind in (
        "averaged",
        "mean",
    ):  # signs whose share depends on the inputs in no simple way: several optima
        x = np.column_stack([x, np.sin(7.0 * x)])
    options = {"num_experts": 2, "max_iterations": 30} | KINDS[kind]
    arrays = {"source": moejax.ArraySource(x, y)} if kind == "source" else {"x": x, "y": y}
    result = moejax.fit(jax.random.key(0), **arrays, **options)
    file = tmp_path / "fit"
    result.save(file)
    result.save(file)  # its own file is replaced
    again = moejax.load_fit(file)
    for field in dataclasses.fields(FitResult):
        assert_same(getattr(result, field.name), getattr(again, field.name))
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]
    if kind != "wide":
        d = result.params.experts.shape[-1]
        at = (np.zeros(d), np.arange(2.0, 2.0 + d), 0.0, 1.0 if kind == "mean" else 2.0)
        if kind != "outputs":
            assert_same(result.in_units(*at), again.in_units(*at))
    assert repr(again.summary()) == repr(result.summary())
    np.testing.assert_array_equal(again.predict(x), result.predict(x))
    np.testing.assert_array_equal(again.predict_std(x), result.predict_std(x))
    assert len(again.members) == (2 if kind in ("averaged", "mean") else 1)


def small():
    x, y = data()
    return moejax.fit(jax.random.key(0), x, y, num_experts=1, method="joint_em", activation="linear")


def test_what_is_no_whole_file_of_a_fit_is_refused_in_one_line(tmp_path):
    file, result = tmp_path / "fit", small()
    result.save(file)
    whole = file.read_bytes()
    for damaged in (whole[:-40], whole[: len(whole) // 2], b"", b"text", whole[:200] + b"?" + whole[201:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^path: expected a whole file of FitResult.save, got .*fit$"):
            moejax.load_fit(file)
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"whole file of FitResult.save"):
        moejax.load_fit(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        moejax.load_fit(tmp_path / "none")
    file.write_bytes(whole)
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["fit.json"] = content["fit.json"].replace(b'"version": 1', b'"version": 7')
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    with pytest.raises(ValueError, match=r"^path: expected a saved fit of version 1, got .*version 7"):
        moejax.load_fit(file)


def test_a_file_of_something_else_is_not_replaced(tmp_path):
    file, result = tmp_path / "notes.txt", small()
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"^path: expected a new file, or one of a saved fit"):
        result.save(file)
    assert file.read_text() == "mine"
    with pytest.raises(ValueError, match=r"^path: expected a new file"):
        result.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        result.save(tmp_path / "no" / "folder")


def softened(t):
    return t + 0.0


def test_an_activation_without_a_registered_name_is_given_again(tmp_path):
    x, y = data()
    options = {"num_experts": 1, "method": "joint_em", "max_iterations": 5}
    result = moejax.fit(jax.random.key(0), x, y, activation=softened, **options)
    result.save(tmp_path / "fit")
    with pytest.raises(
        ValueError, match=r"^activation: expected 'softened', the fit's, .* load_fit\(path, act"
    ):
        moejax.load_fit(tmp_path / "fit")
    again = moejax.load_fit(tmp_path / "fit", activation=softened)
    assert_same(again.params, result.params)
    small().save(tmp_path / "linear")
    with pytest.raises(ValueError, match=r"^activation: expected the function 'linear' of the fit"):
        moejax.load_fit(tmp_path / "linear", activation="relu")
    assert moejax.load_fit(tmp_path / "linear", activation=softened).settings["activation"] == "softened"


@pytest.mark.slow
def test_an_estimator_survives_pickle_joblib_and_clone(tmp_path):
    x, y = data()
    model = moejax.MoERegressor(2, method="joint_em", max_iterations=20, random_state=0)
    fresh = clone(model)
    assert fresh.get_params() == model.get_params()
    model.fit(x, y)
    joblib.dump(model, tmp_path / "model")
    for again in (pickle.loads(pickle.dumps(model)), joblib.load(tmp_path / "model"), copy.deepcopy(model)):
        assert_same(again.params_, model.params_)
        np.testing.assert_array_equal(again.predict(x), model.predict(x))
        np.testing.assert_array_equal(again.responsibilities(x, y), model.responsibilities(x, y))
        assert again.status_ == model.status_
    assert not hasattr(clone(model), "params_")
