"""Experts with noises of their own, where the likelihood has no bound: the choice of k against fits by hand."""

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

import moejax
from moejax.likelihood.collapse import label_step, noise_floor, resolution

N = 400
OPTIONS = {"noise": "per_expert", "fit_intercept": True, "method": "joint_em", "num_starts": 4}


def inputs():
    rng = np.random.default_rng(0)
    return rng.uniform(-2.0, 2.0, size=N), rng


def fitted(x, y, **options):
    with jax.enable_x64(True):
        return moejax.fit(jax.random.key(0), x[:, None], y, **OPTIONS | options)


def least_squares(x, y):
    """Intercept, slope and root mean square residual, and the standard errors of the first two."""
    design = np.column_stack([np.ones_like(x), x])
    coefficients, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    sigma = np.sqrt(squares[0] / len(y))
    return *coefficients, sigma, sigma * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))


def logistic_log_likelihood(x, chosen):
    """The largest log-likelihood of P(chosen | x) = 1 / (1 + exp(-(w x + c)))."""
    sign = np.where(chosen, 1.0, -1.0)
    return -scipy.optimize.minimize(
        lambda w: np.logaddexp(0.0, -sign * (w[0] * x + w[1])).sum(), np.zeros(2)
    ).fun


@pytest.mark.slow
@pytest.mark.parametrize(("value", "share"), [(1.5, 0.15), (0.0, 0.3)], ids=["repeated", "zeros"])
def test_a_value_that_many_rows_share_is_an_expert_whose_likelihood_has_a_bound(value, share):
    x, rng = inputs()
    repeated = rng.random(N) < share
    y = np.where(repeated, value, 1.0 + 2.0 * x + 0.3 * rng.normal(size=N))
    result = fitted(x, y, num_experts="auto")
    assert result.status == "ok"
    assert result.params.experts.shape == (2, 1)
    (atom,) = (index - 1 for index in result.diagnostics["exact_experts"])
    line = 1 - atom
    assert any("exactly" in note for note in result.diagnostics["notes"])
    # the rows off the atom have their own least squares
    bias, slope, sigma, errors = least_squares(x[~repeated], y[~repeated])
    assert abs(result.params.expert_bias[line] - bias) < 0.2 * errors[0]
    assert abs(result.params.experts[line, 0] - slope) < 0.2 * errors[1]
    assert result.params.noise_std[line] == pytest.approx(sigma, rel=0.01)
    assert result.params.expert_bias[atom] == pytest.approx(value, abs=1e-4)
    assert result.params.experts[atom, 0] == pytest.approx(0.0, abs=1e-4)
    # the likelihood by hand: which rows are the atom, the line's density, and the atom's, whose noise is at the floor
    floor = float(result.params.noise_std[atom])
    assert floor >= 0.999 * noise_floor(result.params.noise_std, 0.0, float(N))
    by_hand = logistic_log_likelihood(x, repeated)
    by_hand += scipy.stats.norm.logpdf(y[~repeated], bias + slope * x[~repeated], sigma).sum()
    by_hand -= repeated.sum() * np.log(floor * np.sqrt(2 * np.pi))
    assert abs(result.log_likelihood - by_hand) < 0.01 * repeated.sum()
    # the atom has no error of its noise; the line's is that of a regression
    assert result.standard_errors.noise_std[atom] == 0.0
    assert result.standard_errors.expert_bias[line] == pytest.approx(errors[0], rel=0.05)
    # a further expert is worth its parameters in no fit, though all have the atom and its noise
    table = result.selection.set_index("num_experts")
    assert table.loc[2, "bic"] == table.loc[table["status"] == "ok", "bic"].min()


@pytest.mark.slow
def test_lines_without_noise_are_chosen_and_said_to_be_exact():
    x, rng = inputs()
    y = np.where(rng.random(N) < 0.5, 1.0 + 2.0 * x, 3.0 - x)
    result = fitted(x, y, num_experts="auto")
    assert result.status == "ok"
    assert sorted(result.params.experts[:, 0]) == pytest.approx([-1.0, 2.0], abs=1e-12)
    assert sorted(result.params.expert_bias) == pytest.approx([1.0, 3.0], abs=1e-12)
    assert result.diagnostics["exact_experts"] == [1, 2]
    assert np.isfinite(result.log_likelihood)
    assert np.all((result.params.noise_std > 0) & (result.params.noise_std < 1e-12))


@pytest.mark.slow
def test_two_noises_are_those_of_the_unconstrained_maximum():
    x, rng = inputs()
    first = rng.random(N) < 0.5
    noise = np.where(first, 0.1, 0.4) * rng.normal(size=N)
    y = np.where(first, 1.0 + 2.0 * x, -1.0 - x) + noise
    chosen = fitted(x, y, num_experts="auto")
    assert chosen.status == "ok"
    assert chosen.params.experts.shape == (2, 1)
    result = fitted(x, y, num_experts=2, method="multistart")
    assert result.diagnostics["exact_experts"] == []
    params, errors = result.params, result.standard_errors

    def flat(params, noise):
        gates = [params.gating[0], params.gating_bias[:1]]
        return np.concatenate([params.experts[:, 0], params.expert_bias, noise, *gates])

    def loss(theta):
        logit = theta[6] * x + theta[7]
        log_gate = -np.logaddexp(0.0, -logit), -np.logaddexp(0.0, logit)
        terms = [
            log_gate[i] + scipy.stats.norm.logpdf(y, theta[i] * x + theta[2 + i], np.exp(theta[4 + i]))
            for i in range(2)
        ]
        return -np.logaddexp(*terms).sum()

    ours, scale = flat(params, np.log(params.noise_std)), flat(errors, errors.noise_std / params.noise_std)
    # in units of the standard errors
    best = scipy.optimize.minimize(lambda step: loss(ours + scale * step), np.full(8, 0.3), method="BFGS")
    assert np.all(np.abs(best.x) < 0.01)
    assert result.log_likelihood == pytest.approx(-best.fun, abs=1e-4)


@pytest.mark.slow
def test_rounded_labels_make_no_expert_for_each_of_their_values():
    x, rng = inputs()
    y = np.round(1.0 + 2.0 * x + 0.4 * rng.normal(size=N))
    result = fitted(x, y, num_experts=[1, 2, 3])
    assert result.status == "ok"
    assert len(result.params.noise_std) == 1
    *_, sigma, _ = least_squares(x, y)
    assert float(result.params.noise_std[0]) == pytest.approx(sigma, rel=1e-6)
    # at the floor of labels that are whole numbers, log-densities are log-probabilities: none is positive
    assert (result.selection["log_likelihood"] < 0).all()


@pytest.mark.slow
def test_each_of_several_outputs_has_its_own_floor():
    x, rng = inputs()
    first = rng.random(N) < 0.4
    y = np.column_stack(
        [
            np.where(first, 0.5, 1.0 + 2.0 * x + 0.3 * rng.normal(size=N)),
            np.where(first, -x, x) + 0.2 * rng.normal(size=N),
        ]
    )
    result = fitted(x, y, num_experts=2)
    assert result.status == "ok"
    (atom,) = (index - 1 for index in result.diagnostics["exact_experts"])
    other = 1 - atom
    assert result.params.noise_std[atom, 1] == pytest.approx(0.2, rel=0.2)
    assert result.params.noise_std[other, 0] == pytest.approx(0.3, rel=0.2)
    assert result.params.noise_std[atom, 0] == pytest.approx(
        result.params.noise_std[other, 0] / np.sqrt(2) / N, rel=0.01
    )


@pytest.mark.slow
def test_rows_of_a_source_have_the_same_floor():
    x, rng = inputs()
    x, repeated = np.tile(x, 5), rng.random(5 * N) < 0.3
    y = np.where(repeated, 0.0, 1.0 + 2.0 * x + 0.3 * rng.normal(size=5 * N))
    one = fitted(x, y, num_experts=2)
    with jax.enable_x64(True):
        source = moejax.ArraySource(x[:, None], y)
        other = moejax.fit(jax.random.key(1), source=source, num_experts=2, **OPTIONS)
    assert other.status == "ok"
    assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-2)
    np.testing.assert_allclose(np.sort(other.params.noise_std), np.sort(one.params.noise_std), rtol=1e-4)
    np.testing.assert_allclose(
        np.sort(other.standard_errors.noise_std), np.sort(one.standard_errors.noise_std), rtol=1e-3
    )


@pytest.mark.parametrize(
    ("labels", "step"),
    [
        (np.array([0.0, 1.0, 1.0]), 1.0),
        (0.1 * np.array([3.0, 17.0, -4.0, 8.0]), 0.1),  # gaps of 7, 5 and 9 steps
        (np.array([2.0, 2.0]), 0.0),
        (np.random.default_rng(0).normal(size=50), 0.0),
        (1e6 + np.arange(50) % 2 + 0.01 * np.random.default_rng(0).normal(size=50), 0.0),  # two clusters
        (1e7 + np.array([0.0, 6.0, 13.0]), 1.0),
        ((np.round(np.random.default_rng(1).normal(size=200), 2) - 0.123) / 7.7, 0.01 / 7.7),
    ],
)
def test_the_step_of_rounded_labels(labels, step):
    assert label_step(labels) == pytest.approx(step, rel=1e-9)
    assert resolution(labels[:, None]) == pytest.approx(step / np.sqrt(2 * np.pi), rel=1e-9)


@pytest.mark.slow
def test_gradient_descent_keeps_the_floor():
    x, rng = inputs()
    y = np.where(rng.random(N) < 0.3, 0.0, 1.0 + 2.0 * x + 0.3 * rng.normal(size=N))
    result = fitted(x, y, num_experts=2, method="gradient_nll", max_iterations=300)
    assert result.params.noise_std.min() > 0.8 * result.diagnostics["noise_floor"]
