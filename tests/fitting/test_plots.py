"""Plots of a fit show the numbers of the fit: lines, shares, counts and intervals are read back from the figures."""

import jax
import numpy as np
import pytest
from scipy import stats

import moejax
from moejax.pictures import save_picture


def data(d=1, n=400):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * 3.0 + 2.0
    y = np.where(rng.random(n) < 1 / (1 + np.exp(-3 * x[:, 0])), x[:, 0], -x[:, 0]) + 0.3 * rng.normal(size=n)
    return x, y


OPTIONS = {"num_experts": 2, "method": "joint_em", "fit_intercept": True, "max_iterations": 30}


@pytest.fixture(scope="module")
def one():
    x, y = data()
    return x, y, moejax.fit(jax.random.key(0), x, y, **OPTIONS)


@pytest.fixture(scope="module")
def two():
    x, y = data(2)
    return x, y, moejax.fit(jax.random.key(0), x, y, **OPTIONS)


def test_one_input_shows_lines_of_the_opacity_of_the_gates(one):
    x, y, result = one
    figure = moejax.plot_fit(result, x, y, feature_names=["height"], target_name="weight")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("height", "weight")
    *lines, band = sorted(
        axes.collections, key=lambda c: hasattr(c, "get_data") or "Fill" in type(c).__name__
    )
    assert len(lines) == 2
    for i, line in enumerate(lines):
        segments = np.array(line.get_segments())
        middle = segments.mean(axis=1)
        np.testing.assert_allclose(middle[:, 1], result.predict_experts(middle[:, :1])[:, i], rtol=1e-9)
        gates = result.gate_probabilities(middle[:, :1])[:, i]
        np.testing.assert_allclose(line.get_colors()[:, 3], gates, atol=0.02)
    heights = band.get_paths()[0].vertices[:, 1]
    low, high = result.predict_interval(np.linspace(x.min(), x.max(), 400)[:, None], 0.9).T
    assert heights.min() == pytest.approx(low.min())
    assert heights.max() == pytest.approx(high.max())


def test_two_inputs_show_every_point_once_at_its_expert(two):
    x, y, result = two
    figure = moejax.plot_fit(result, x, y)
    left = figure.axes[0]
    owner = result.responsibilities(x, y).argmax(axis=1)
    for i, line in enumerate(left.lines):
        np.testing.assert_array_equal(line.get_xydata(), x[owner == i])
    assert left.get_xlabel() == "x1"


def test_two_values_of_an_input_have_a_panel_each(two):
    x, y, _ = two
    x = np.column_stack([x[:, 1] > 2.0, x[:, 0]]).astype(float)
    result = moejax.fit(jax.random.key(0), x, y, **OPTIONS)
    figure = moejax.plot_fit(result, x, y, feature_names=["treated", "height"])
    assert [axes.get_title() for axes in figure.axes] == ["treated: 0", "treated: 1"]
    grid = figure.axes[1].lines[-1].get_xydata()
    rows = np.column_stack([np.ones(len(grid)), grid[:, 0]])
    np.testing.assert_allclose(grid[:, 1], result.predict(rows))
    low, high = figure.axes[0].get_ylim()
    assert low < y.min() < y.max() < high


def test_responsibilities_fill_the_left_panel_and_are_counted_on_the_right(two):
    x, y, result = two
    left, right = moejax.plot_responsibilities(result, x, y).axes
    shares = result.responsibilities(x, y)
    heights = [patch.get_data().values - patch.get_data().baseline for patch in left.patches]
    np.testing.assert_allclose(np.sum(heights, axis=1) / len(y), shares.mean(axis=0))
    assert sum(patch.get_height() for patch in right.patches) == len(y)


def test_calibration_counts_the_labels_and_their_intervals(two):
    x, y, result = two
    left, right = moejax.plot_calibration(result, x, y).axes
    counts = left.patches[-1].get_data().values
    assert counts.mean() == pytest.approx(1.0)
    observed = right.lines[-1].get_xydata()
    for level, share in observed[[100, 180]]:
        low, high = result.predict_interval(x, level).T
        assert share == pytest.approx(np.mean((y >= low) & (y <= high)), abs=1.5 / len(y))
    band = right.collections[0].get_paths()[0].vertices
    low, high = stats.binom.interval(0.95, len(y), 0.5)
    at_half = band[np.isclose(band[:, 0], 0.5), 1]
    assert (at_half.min(), at_half.max()) == pytest.approx((low / len(y), high / len(y)))


def test_coefficients_have_the_ends_of_their_intervals(two):
    x, _, result = two
    figure = moejax.plot_coefficients(result, input_std=x.std(axis=0), level=0.9)
    low, high = result.intervals(0.9)
    experts, gates = figure.axes
    for i, container in enumerate(experts.containers):
        points, _, (bars,) = container.lines
        np.testing.assert_allclose(points.get_xdata(), result.params.experts[i] * x.std(axis=0))
        ends = np.array(bars.get_segments())[:, :, 0]
        np.testing.assert_allclose(ends[:, 0], low.experts[i] * x.std(axis=0), rtol=1e-9)
        np.testing.assert_allclose(ends[:, 1], high.experts[i] * x.std(axis=0), rtol=1e-9)
    assert len(gates.containers) == 1


def test_what_cannot_be_plotted_is_one_line(two, tmp_path):
    x, y, result = two
    for call, words in [
        (lambda: moejax.plot_fit(result, x[:, :1], y), r"^x: expected 2 columns"),
        (lambda: moejax.plot_fit(result, x, y[:-1]), r"^y: expected shape"),
        (lambda: moejax.plot_fit(result, x, y, feature_names=["a"]), r"^feature_names: expected 2 names"),
        (lambda: moejax.plot_coefficients(result, input_std=[1.0]), r"^input_std: expected 2 numbers"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    wide = moejax.fit(
        jax.random.key(0), np.column_stack([x, y]), y, num_experts=1, noise_std=1.0, method="joint_em"
    )
    with pytest.raises(ValueError, match=r"^x: expected one or two inputs"):
        moejax.plot_fit(wide, np.column_stack([x, y]), y)
    several = moejax.fit(jax.random.key(0), x, np.column_stack([y, -y]), **OPTIONS)
    with pytest.raises(ValueError, match=r"^result: expected a fit of one output"):
        moejax.plot_coefficients(several)
    save_picture(moejax.plot_responsibilities(several, x, np.column_stack([y, -y])), tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
