"""Fits by the mean: invariances, standard errors against JAX and direct formulas, criteria by hand, choices, refusals."""

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import moejax
from moejax.likelihood.padded import INTERCEPT_PRECISION

N, D, NOISE = 250, 2, 0.1
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
OPTIONS = {"objective": "mean", "fit_intercept": True, "num_starts": 2}
"""All fits of this file have about as many rows, so that they share their programs."""


def truth(x):
    return np.abs(x[:, 0]) + 0.5 * x[:, 1]


Y = truth(X) + NOISE * RNG.normal(size=N)


def fit(x, y, num_experts=2, seed=0, **options):
    return moejax.fit(jax.random.key(seed), x, y, num_experts=num_experts, **(OPTIONS | options))


def f_of(params, x):
    gates = scipy.special.softmax(x @ params.gating.T + params.gating_bias, axis=1)
    return np.sum(gates * (x @ params.experts.T + params.expert_bias), axis=1)


@pytest.fixture(scope="module")
def fitted():
    return fit(X, Y)


def test_a_function_plus_noise_is_found_with_its_noise_and_likelihood(fitted):
    assert fitted.objective == "mean"
    assert fitted.status == "ok"
    new = np.random.default_rng(1).normal(size=(1000, D))
    assert np.sqrt(np.mean((f_of(fitted.params, new) - truth(new)) ** 2)) < 0.5 * NOISE
    s = fitted.params.noise_std
    assert s[0] == s[1] == pytest.approx(NOISE, rel=0.15)
    value = scipy.stats.norm.logpdf(Y, f_of(fitted.params, X), s[0]).sum()
    assert fitted.log_likelihood == pytest.approx(value, abs=1e-8)
    gamma = fitted.diagnostics["effective_parameters"]
    rss = np.sum((Y - f_of(fitted.params, X)) ** 2)
    assert s[0] ** 2 == pytest.approx(rss / (N - gamma), rel=1e-2)
    assert 3 < gamma <= 9
    np.testing.assert_allclose(fitted.params.gating[-1], 0.0)
    # shares in the mean, the largest first
    shares = np.array(fitted.diagnostics["mixing_weights"])
    assert shares[0] >= shares[1]
    assert fitted.settings["objective"] == "mean"
    assert fitted.settings["ridge"] == "evidence"
    assert fitted.diagnostics["method"] == "mean_fit"


def test_units_of_inputs_and_labels_do_not_matter(fitted):
    """Powers of two are exact; other units change the rounding, and with it where the climbs end."""
    first = X * [3.0, 0.5] + [1.0, -2.0]  # not standard normal: these inputs are whitened
    one, exact = fit(first, Y), fit(first * [2.0**-7, 2.0**5], 8.0 * Y)
    predicted = f_of(one.params, first)
    np.testing.assert_allclose(
        f_of(exact.params, first * [2.0**-7, 2.0**5]) / 8.0, predicted, atol=1e-9, rtol=1e-9
    )
    assert exact.log_likelihood == pytest.approx(one.log_likelihood - N * np.log(8.0), abs=1e-6)
    shifted = first * [0.03, 7.0] + [100.0, -3.0]
    other = fit(shifted, 5.0 * Y - 70.0)
    np.testing.assert_allclose((f_of(other.params, shifted) + 70.0) / 5.0, predicted, atol=0.05 * NOISE)
    np.testing.assert_allclose(
        other.standard_errors.noise_std / 5.0, one.standard_errors.noise_std, rtol=1e-3
    )
    # inputs that are standard normal are taken as they are
    np.testing.assert_allclose(f_of(fitted.params, X), predicted, atol=0.1 * NOISE)


def test_weights_that_are_counts_are_repeated_rows():
    x, y = X[:125], Y[:125]
    repeats = np.random.default_rng(2).integers(0, 4, size=125)
    rows = np.arange(125).repeat(repeats)
    assert 180 < len(rows) < 256
    padding = np.full(len(rows) - 125, np.nan)  # the same number of rows; what has no weight is not looked at
    weighted = fit(
        np.concatenate([x, np.column_stack([padding] * D)]),
        np.concatenate([y, padding]),
        weights=np.concatenate([repeats, np.zeros(len(padding))]),
    )
    repeated = fit(x[rows], y[rows])
    np.testing.assert_allclose(f_of(weighted.params, x), f_of(repeated.params, x), atol=0.05 * NOISE)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, abs=0.05)
    gammas = [r.diagnostics["effective_parameters"] for r in (weighted, repeated)]
    assert gammas[0] == pytest.approx(gammas[1], rel=1e-2)


def by_jax(result):
    """(J (n, P), the Hessian of the penalty) in the units of the data, for (experts, gates less the last, biases), by JAX."""
    own = result.models[0]
    matrix, mean = own.units.inputs.matrix, own.units.inputs.mean
    scale = float(own.units.labels.scale)
    shift = float(own.units.labels.shift)
    ridge = [result.diagnostics[name] for name in ("ridge_experts", "ridge_gates")]

    def unpacked(flat):
        experts, gates = flat[: 2 * (D + 1)].reshape(2, D + 1), flat[2 * (D + 1) :].reshape(1, D + 1)
        return experts, jnp.concatenate([gates, jnp.zeros((1, D + 1))])

    def f(flat, x):
        experts, gates = unpacked(flat)
        design = jnp.concatenate([x, jnp.ones((x.shape[0], 1))], axis=1)
        return jnp.sum(jax.nn.softmax(design @ gates.T, axis=1) * (design @ experts.T), axis=1)

    def white(rows):
        """Rows (k, d + 1) of predictors of x as those of z = (x - mean) matrix."""
        slopes = rows[:, :D] @ jnp.linalg.inv(matrix).T
        return jnp.concatenate([slopes, (rows[:, :D] @ mean + rows[:, D])[:, None]], axis=1)

    def penalty(flat):
        experts, gates = map(white, unpacked(flat))
        experts = experts.at[:, D].add(-shift) / scale
        gates = gates - gates.mean(axis=0, keepdims=True)
        slopes = ridge[0] * jnp.sum(experts[:, :D] ** 2) + INTERCEPT_PRECISION * jnp.sum(experts[:, D] ** 2)
        return 0.5 * (slopes + ridge[1] * jnp.sum(gates**2))

    p = result.params
    flat = jnp.asarray(
        np.concatenate(
            [
                np.column_stack([p.experts, p.expert_bias]).ravel(),
                np.column_stack([p.gating, p.gating_bias])[:1].ravel(),
            ]
        )
    )
    run = jax.jit(
        lambda flat: (
            jax.jacfwd(f)(flat, jnp.asarray(X)),
            jax.hessian(penalty)(flat),
            f(flat, jnp.asarray(X)),
        )
    )
    return tuple(np.asarray(part) for part in run(flat))


def errors_of(result):
    se = result.standard_errors
    experts, gates = (
        np.column_stack(pair) for pair in ((se.experts, se.expert_bias), (se.gating, se.gating_bias))
    )
    return np.concatenate([experts.ravel(), gates[:1].ravel()])


def test_standard_errors_are_those_of_the_gauss_newton_matrix(fitted):
    jacobian, prior, f = by_jax(fitted)
    np.testing.assert_allclose(f, f_of(fitted.params, X), atol=1e-10)
    s = fitted.params.noise_std[0]
    covariance = np.linalg.inv(jacobian.T @ jacobian / s**2 + prior)
    np.testing.assert_allclose(errors_of(fitted), np.sqrt(np.diag(covariance)), rtol=1e-6)
    gamma = fitted.diagnostics["effective_parameters"]
    assert fitted.standard_errors.noise_std[0] == pytest.approx(s / np.sqrt(2 * (N - gamma)), rel=1e-6)
    # gamma is the trace of the matrix that maps labels to fitted values
    hat = np.trace(covariance @ (jacobian.T @ jacobian)) / s**2
    assert gamma == pytest.approx(hat, abs=0.05)  # it counts the intercepts whole, whose prior is weak


def test_the_sandwich_is_its_formula(fitted):
    robust = fit(X, Y, covariance="sandwich")
    np.testing.assert_array_equal(robust.params.experts, fitted.params.experts)
    jacobian, prior, f = by_jax(robust)
    s = robust.params.noise_std[0]
    bread = np.linalg.inv(jacobian.T @ jacobian / s**2 + prior)
    scores = jacobian * ((Y - f) / s**2)[:, None]
    expected = np.sqrt(np.diag(bread @ scores.T @ scores @ bread))
    np.testing.assert_allclose(errors_of(robust), expected, rtol=1e-6)


def test_the_table_of_evidence_and_bic_by_hand():
    result = fit(X, Y, [1, 2, 3])
    table = result.selection.set_index("num_experts")
    assert list(table.index) == [1, 2, 3]
    assert (table["objective"] == "mean").all()
    assert table["log_evidence"].idxmax() == table.index[table["chosen"]][0]
    expected = -2 * table["log_likelihood"] + (table["effective_parameters"] + 1) * np.log(N)
    np.testing.assert_allclose(table["bic"], expected)
    np.testing.assert_array_equal(table["num_parameters"], [(2 * k - 1) * (D + 1) + 1 for k in (1, 2, 3)])
    k = result.params.experts.shape[0]
    assert k in (2, 3)
    # the growths are in single precision, and end less exactly
    assert table.loc[k, "log_likelihood"] == pytest.approx(result.log_likelihood, abs=2.0)
    one = np.linalg.lstsq(np.column_stack([X, np.ones(N)]), Y, rcond=None)
    expected = -0.5 * N * (np.log(2 * np.pi * one[1][0] / N) + 1)
    assert table.loc[1, "log_likelihood"] == pytest.approx(expected, abs=1.0)
    assert table.loc[1, "effective_parameters"] == pytest.approx(3.0, abs=0.2)


def test_a_line_is_fitted_by_one_expert():
    rng = np.random.default_rng(7)
    y = X @ [1.0, -2.0] + 3.0 + 0.5 * rng.normal(size=N)
    result = fit(X, y, [1, 2, 3])
    assert result.params.experts.shape == (1, D)
    expected = np.linalg.lstsq(np.column_stack([X, np.ones(N)]), y, rcond=None)[0]
    np.testing.assert_allclose(result.params.experts[0], expected[:2], atol=0.02)
    np.testing.assert_allclose(result.params.expert_bias[0], expected[2], atol=0.02)


@pytest.mark.slow
def test_auto_takes_the_mean_of_a_function_and_says_by_how_much():
    x, y = X, np.sin(2 * X[:, 0]) + X[:, 1] + 0.1 * np.random.default_rng(3).normal(size=N)
    result = fit(x, y, [1, 2, 3], objective="auto")
    assert result.objective == "mean"
    table = result.selection
    evidence = table["log_evidence"].max()
    difference = evidence + 0.5 * table.loc[table["objective"] == "likelihood", "bic"].min()
    assert difference > 0
    words = result.diagnostics["objective_choice"]
    assert words.startswith("mean, k = ")
    assert f"its evidence is {difference:.1f} nats above -BIC / 2 of the mixture" in words
    likelihood = table[table["objective"] == "likelihood"]
    expected = -2 * likelihood["log_likelihood"] + likelihood["num_parameters"] * np.log(N)
    np.testing.assert_allclose(likelihood["bic"], expected)
    assert table.loc[table["chosen"], "objective"].tolist() == ["mean"]
    assert result.settings["objective"] == "auto"


@pytest.mark.slow
def test_auto_takes_the_mixture_of_two_lines_that_overlap():
    rng = np.random.default_rng(4)
    y = np.where(rng.uniform(size=N) < 0.5, 1.0, -1.0) * X[:, 0] + 0.05 * rng.normal(size=N)
    result = fit(X, y, [1, 2], objective="auto")
    assert result.objective == "likelihood"
    assert result.diagnostics["objective_choice"].startswith("likelihood, k = 2: -BIC / 2 is ")
    np.testing.assert_allclose(sorted(result.params.experts[:, 0]), [-1, 1], atol=0.05)
    table = result.selection
    assert table.loc[table["chosen"], "objective"].tolist() == ["likelihood"]
    grown = table[(table["objective"] == "likelihood") & (table["num_experts"] == 2)]["log_likelihood"].item()
    # the growth's mixture, with its weak ridge and in single precision, is nearly that of the whole search
    assert result.log_likelihood - 3.0 < grown < result.log_likelihood + 0.1
    value = compiled_model.log_likelihood(
        jax.tree.map(jnp.asarray, moejax.MoEParams(*result.params)), jnp.asarray(X), jnp.asarray(y), "linear"
    )
    assert result.log_likelihood == pytest.approx(float(value), abs=1e-6)


def test_a_fixed_ridge_is_kept():
    result = fit(X, Y, ridge=3.0)
    assert result.diagnostics["ridge_experts"] == result.diagnostics["ridge_gates"] == 3.0
    assert result.settings["ridge"] == 3.0
    jacobian, prior, _ = by_jax(result)
    covariance = np.linalg.inv(jacobian.T @ jacobian / result.params.noise_std[0] ** 2 + prior)
    np.testing.assert_allclose(errors_of(result), np.sqrt(np.diag(covariance)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("y", {"y": np.column_stack([Y, Y])}),
        ("noise_std", {"noise_std": 0.1}),
        ("noise", {"noise": "per_expert"}),
        ("gate", {"gate": "constant"}),
        ("gate_inputs", {"gate_inputs": [0]}),
        ("expert_inputs", {"expert_inputs": [1]}),
        ("log_density", {"log_density": lambda x: -0.5 * jnp.sum(x**2)}),
        ("method", {"method": "joint_em"}),
        ("objective", {"source": moejax.ArraySource(X, Y), "x": None, "y": None}),
        ("num_starts", {"average": 3}),
        ("ridge", {"objective": "likelihood", "ridge": "evidence"}),
        ("x", {"num_experts": 60}),
    ],
)
def test_what_has_no_meaning_for_a_mean_is_refused_in_one_line(name, given):
    arguments = {"x": X, "y": Y, "num_experts": 2} | OPTIONS | given
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        moejax.fit(jax.random.key(0), **arguments)
    words = str(caught.value)
    assert "\n" not in words
    assert words.startswith(f"{name}: expected")


@pytest.mark.slow
def test_twelve_experts_are_never_chosen_for_sixty_rows():
    x = np.random.default_rng(5).uniform(-2, 2, size=(60, 1))
    y = np.sin(3 * x[:, 0]) + 0.2 * np.random.default_rng(6).normal(size=60)
    result = fit(x, y, "auto")
    table = result.selection.set_index("num_experts")
    assert len(table) == 12
    assert 2 <= result.params.experts.shape[0] < 12
    made = table["status"] == "ok"
    assert (table.loc[made, "effective_parameters"] <= 30).all()
    assert not made[12] or table.loc[12, "log_evidence"] < table["log_evidence"].max()
    grid = np.linspace(-1.8, 1.8, 50)
    assert np.sqrt(np.mean((f_of(result.params, grid[:, None]) - np.sin(3 * grid)) ** 2)) < 0.2
