"""Offsets, such as logarithms of exposures: against scikit-learn and SciPy, a truth, numerical derivatives, labels less them."""

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.linear_model import PoissonRegressor

import moejax

POISSON = {"family": "poisson", "fit_intercept": True}
EXPERTS, BIASES = np.array([[0.5, -0.1], [-0.3, 0.1]]), np.array([-1.0, 1.0])
GATE = (2.0, -6.0)
"""Slope in the first input and bias of the first expert's gate."""


def counts(seed, n, *, experts=EXPERTS, biases=BIASES):
    """x (n, 2) in units of their own, y (n,) counts, and log exposures (n,) of exposures from 5 to 100."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2)) * [1.0, 5.0] + [3.0, 0.0]
    first = rng.uniform(size=n) < scipy.special.expit(GATE[0] * x[:, 0] + GATE[1])
    z = np.where(first, 0, len(experts) - 1)
    offset = np.log(5.0) + rng.uniform(0.0, np.log(20.0), n)
    return x, rng.poisson(np.exp(np.sum(x * experts[z], axis=1) + biases[z] + offset)), offset


def log_likelihood(params, x, y, offset):
    """() nats of a Poisson mixture, by SciPy."""
    means = np.exp(x @ params.experts.T + params.expert_bias + offset[:, None])
    gates = scipy.special.log_softmax(x @ params.gating.T + params.gating_bias, axis=1)
    return scipy.special.logsumexp(gates + scipy.stats.poisson.logpmf(y[:, None], means), axis=1).sum()


@pytest.mark.parametrize(("method", "rtol"), [("joint_em", 1e-5), ("multistart", 1e-3)])
def test_one_poisson_expert_is_the_regression_of_rates_weighted_by_exposure(method, rtol):
    x, y, offset = counts(0, 1000, experts=EXPERTS[:1], biases=BIASES[:1])
    exposure = np.exp(offset)
    other = PoissonRegressor(alpha=0.0, tol=1e-10, max_iter=1000).fit(x, y / exposure, sample_weight=exposure)
    result = moejax.fit(jax.random.key(0), x, y, num_experts=1, method=method, offset=offset, **POISSON)

    assert result.status == "ok"
    assert result.num_parameters == 3
    np.testing.assert_allclose(result.params.experts[0], other.coef_, rtol=rtol)
    np.testing.assert_allclose(result.params.expert_bias[0], other.intercept_, rtol=rtol)
    design = np.column_stack([x, np.ones(len(x))])
    information = design.T @ (design * result.predict(x, offset=offset)[:, None])
    errors = np.append(result.standard_errors.experts[0], result.standard_errors.expert_bias)
    np.testing.assert_allclose(errors, np.sqrt(np.diag(np.linalg.inv(information))), rtol=1e-4)


def test_a_sandwich_of_counts_with_exposures_is_the_closed_form():
    x, y, offset = counts(9, 500, experts=EXPERTS[:1], biases=BIASES[:1])
    how = {"num_experts": 1, "method": "joint_em", "covariance": "sandwich", **POISSON}
    result = moejax.fit(jax.random.key(0), x, y, offset=offset, **how)
    design, mean = np.column_stack([x, np.ones(len(x))]), result.predict(x, offset=offset)
    bread = np.linalg.inv(design.T @ (design * mean[:, None]))
    filling = design.T @ (design * ((y - mean) ** 2)[:, None])
    errors = np.append(result.standard_errors.experts[0], result.standard_errors.expert_bias)
    np.testing.assert_allclose(errors, np.sqrt(np.diag(bread @ filling @ bread)), rtol=1e-4)


@pytest.fixture(scope="module")
def two_experts():
    x, y, offset = counts(1, 2000)
    result = moejax.fit(jax.random.key(0), x, y, num_experts=2, offset=offset, **POISSON)
    return result, x, y, offset


def test_two_poisson_experts_are_found_within_their_standard_errors(two_experts):
    result, x, y, offset = two_experts
    assert result.status == "ok"
    assert result.num_parameters == 2 * 3 + 3
    order = np.argsort(-result.params.experts[:, 0])
    ours, errors = (
        jax.tree.map(lambda leaf: leaf[order], leaves) for leaves in (result.params, result.standard_errors)
    )
    assert np.all(np.abs(ours.experts - EXPERTS) < 4 * errors.experts)
    assert np.all(np.abs(ours.expert_bias - BIASES) < 4 * errors.expert_bias)
    assert errors.experts.max() < 0.02
    gate = ours.gating[0, 0] - ours.gating[1, 0]
    assert abs(gate - GATE[0]) < 4 * np.max(errors.gating[:, 0])
    assert abs(log_likelihood(result.params, x, y, offset) - result.log_likelihood) < 1e-6
    truth = ours._replace(
        experts=EXPERTS, expert_bias=BIASES, gating=np.array([[GATE[0], 0], [0, 0]]), gating_bias=[GATE[1], 0]
    )
    assert (
        0 < result.log_likelihood - log_likelihood(truth, x, y, offset) < 0.5 * scipy.stats.chi2.isf(1e-4, 9)
    )


def test_standard_errors_are_those_of_the_numerical_hessian(two_experts):
    result, x, y, offset = two_experts

    def value(free):
        a, w = free[:6].reshape(2, 3), np.stack([free[6:], np.zeros(3)])
        params = result.params._replace(
            experts=a[:, :2], expert_bias=a[:, 2], gating=w[:, :2], gating_bias=w[:, 2]
        )
        return log_likelihood(params, x, y, offset)

    def rows(params):
        experts = np.column_stack([params.experts, params.expert_bias])
        gates = np.column_stack([params.gating, params.gating_bias])
        return np.concatenate([experts.reshape(-1), gates[0]])

    at, errors = rows(result.params), rows(result.standard_errors)
    steps = np.diag(0.1 * errors)
    hessian = np.array(
        [
            [value(at + a + b) - value(at + a - b) - value(at - a + b) + value(at - a - b) for b in steps]
            for a in steps
        ]
    ) / np.outer(0.2 * errors, 0.2 * errors)
    np.testing.assert_allclose(errors, np.sqrt(np.diag(np.linalg.inv(-hessian))), rtol=2e-3)


def test_predictions_are_those_of_the_offset(two_experts, tmp_path):
    result, x, y, offset = two_experts
    result.save(tmp_path / "counts.fit")
    result = moejax.load_fit(tmp_path / "counts.fit")

    rates = result.predict(x, offset=0.0)
    np.testing.assert_allclose(result.predict(x, offset=offset), rates * np.exp(offset), rtol=1e-12)
    gates, means = result.gate_probabilities(x), result.predict_experts(x, offset=offset)
    np.testing.assert_allclose(result.predict(x, offset=offset), np.sum(gates * means, axis=1), rtol=1e-12)
    joint = gates * scipy.stats.poisson.pmf(y[:, None], means)
    np.testing.assert_allclose(result.log_density(x, y, offset=offset), np.log(joint.sum(axis=1)), rtol=1e-9)
    expected = joint / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.responsibilities(x, y, offset=offset), expected, atol=1e-12)
    low, high = result.predict_interval(x, 0.9, offset=offset).T
    assert 0.9 < np.mean((low <= y) & (y <= high)) < 0.97
    assert np.all(
        result.predict_std(x, offset=offset) > np.sqrt(result.predict(x, offset=offset)) * (1 - 1e-9)
    )
    for predict in (result.predict, result.predict_interval, result.predict_experts):
        with pytest.raises(ValueError, match=r"^offset: expected that of the rows of x, .*, got None$"):
            predict(x)
    assert result.gate_probabilities(x).shape == (len(x), 2)
    assert len(moejax.plot_calibration(result, x, y, offset=offset).axes) == 2
    with pytest.raises(ValueError, match="result: expected a fit without an offset"):
        moejax.plot_fit(result, x, y)


def linear(seed, n=500):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 2.0]
    z = (rng.uniform(size=n) < scipy.special.expit(2 * x[:, 0])).astype(int)
    slopes = np.array([[1.0, 0.3, 0.0], [-2.0, 0.1, 5.0]])
    return x, np.sum(x * slopes[z], axis=1) + z + 0.3 * rng.normal(size=n), 1e3 * rng.normal(size=n) + 1e4


GAUSSIAN = [
    {"method": "joint_em", "num_starts": 3},
    {"method": "multistart", "noise": "per_expert"},
    {"method": "multistart", "gate": "constant", "fit_intercept": False},
    {"method": "annealed_em", "gate_inputs": [0], "expert_inputs": [0, 1], "num_starts": 2},
]


@pytest.mark.parametrize("options", GAUSSIAN)
def test_linear_experts_with_an_offset_are_those_of_labels_less_it(options):
    x, y, offset = linear(2)
    how = {"num_experts": 2, "fit_intercept": True, "max_iterations": 1000} | options
    # the other fit has no moments either
    plain = moejax.fit(jax.random.key(0), x, y, offset=np.zeros(len(y)), **how)
    result = moejax.fit(jax.random.key(0), x, y + offset, offset=offset, **how)

    assert result.status == "ok"
    assert plain.diagnostics["has_offset"]
    np.testing.assert_allclose(result.log_likelihood, plain.log_likelihood, atol=1e-4)
    for one, other in zip(result.params, plain.params, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(result.standard_errors, plain.standard_errors, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    mean = result.predict(x, offset=offset)
    np.testing.assert_allclose(mean - offset, plain.predict(x, offset=0.0), atol=1e-3)
    assert result.num_parameters == plain.num_parameters
    np.testing.assert_allclose(
        result.diagnostics["expert_norms"], plain.diagnostics["expert_norms"], rtol=1e-3
    )


def test_an_offset_of_zero_changes_nothing():
    x, y, _ = linear(3)
    how = {"num_experts": 2, "fit_intercept": True, "method": "joint_em", "num_starts": 2}
    plain = moejax.fit(jax.random.key(0), x, y, **how)
    result = moejax.fit(jax.random.key(0), x, y, offset=0.0, **how)
    for one, other in zip(
        (*result.params, *result.standard_errors), (*plain.params, *plain.standard_errors), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    assert result.num_parameters == plain.num_parameters


def test_a_homogeneous_activation_has_the_offset_in_the_unit_of_its_labels():
    rng = np.random.default_rng(4)
    x, offset = rng.normal(size=(2000, 2)) * [2.0, 1.0], 100.0 * rng.normal(size=2000)
    y = np.maximum(100.0 * x @ [1.0, 0.5] + 50.0 + offset, 0.0) + 5.0 * rng.normal(size=2000)
    result = moejax.fit(
        jax.random.key(0), x, y, num_experts=1, activation="relu", fit_intercept=True, offset=offset
    )
    assert result.status == "ok"
    errors = result.standard_errors
    assert np.all(np.abs(result.params.experts[0] - [100.0, 50.0]) < 4 * errors.experts[0])
    assert np.all(np.abs(result.params.expert_bias - 50.0) < 4 * errors.expert_bias)
    assert np.all(np.abs(result.params.noise_std - 5.0) < 4 * errors.noise_std)
    own, _ = result.in_units(np.zeros(2), np.ones(2), 0.0, 10.0)
    np.testing.assert_allclose(own.experts, result.params.experts / 10.0)


@pytest.mark.parametrize("method", ["joint_em", "multistart"])
def test_large_and_varied_exposures_do_not_mislead_the_starts(method):
    x, y, offset = counts(5, 1000)
    how = {"num_experts": 2, "method": method, "num_starts": 4, **POISSON}
    near = moejax.fit(jax.random.key(0), x, y, offset=offset, **how)
    # the same model: exposures in another unit move the intercepts
    far = moejax.fit(jax.random.key(0), x, y, offset=offset - 7.0, **how)
    assert far.status == near.status == "ok"
    np.testing.assert_allclose(far.log_likelihood, near.log_likelihood, atol=1e-3)
    np.testing.assert_allclose(far.params.experts, near.params.experts, atol=1e-3)
    np.testing.assert_allclose(far.params.expert_bias, near.params.expert_bias + 7.0, atol=1e-3)


def test_rows_without_weight_may_have_any_offset_and_several_numbers_of_experts_are_compared():
    x, y, offset = counts(6, 400, experts=EXPERTS[:1], biases=BIASES[:1])
    weights = np.where(np.arange(400) % 10 == 0, 0.0, 1.0)
    with_gaps = np.where(weights > 0, offset, np.nan)
    how = {"method": "joint_em", **POISSON}
    result = moejax.fit(jax.random.key(0), x, y, num_experts=[1, 2], weights=weights, offset=with_gaps, **how)
    used = weights > 0
    other = moejax.fit(jax.random.key(0), x[used], y[used], num_experts=1, offset=offset[used], **how)
    assert len(result.params.noise_std) == 1
    assert result.selection["num_parameters"].tolist() == [3, 9]
    np.testing.assert_allclose(result.params.experts, other.params.experts, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": np.zeros(3)}, r"offset: expected shape \(50,\) to go with x, got \(3,\)"),
        ({"offset": np.append(np.zeros(49), np.inf)}, "offset: expected finite numbers, got inf in row 49$"),
        ({"offset": ["a"] * 50}, "offset: expected an array of numbers, got "),
        (
            {"offset": np.full(50, 1e300), "activation": "tanh"},
            r"offset: expected numbers of at most 1e\+151 .*, got 1e\+300 in row 0",
        ),
        (
            {"method": "spectral_em"},
            "method: expected 'annealed_em' or 'joint_em' or 'multistart' with an offset",
        ),
        (
            {"method": "gradient_nll"},
            "method: expected 'annealed_em' or 'joint_em' or 'multistart' with an offset",
        ),
        (
            {"method": "spectral_wide"},
            "method: expected 'annealed_em' or 'joint_em' or 'multistart' with an offset",
        ),
        ({"method": "joint_em", "start": "kmeans"}, "start: expected 'random' with an offset, got 'kmeans'"),
        ({"objective": "mean"}, "offset: expected None with objective 'mean'"),
        ({"y": np.zeros((50, 2))}, r"y: expected one output with an offset, got 'shape \(50, 2\)'"),
        ({"x": None, "y": None, "source": object()}, "offset: expected None with a source, got 'ndarray'"),
    ],
)
def test_bad_offsets_and_what_does_not_go_with_one_are_one_line(change, words):
    rng = np.random.default_rng(7)
    sample = {"x": rng.normal(size=(50, 2)), "y": rng.normal(size=50), "offset": np.zeros(50)} | change
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        moejax.fit(jax.random.key(0), num_experts=2, **sample)
    assert "\n" not in str(caught.value)


def test_an_offset_for_a_fit_without_one_is_refused():
    x, y, _ = linear(8, 100)
    result = moejax.fit(jax.random.key(0), x, y, num_experts=1, method="joint_em")
    with pytest.raises(ValueError, match=r"^offset: expected None, because the fit had none"):
        result.predict(x, offset=np.ones(100))
