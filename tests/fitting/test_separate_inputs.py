"""Gates that are constant or have inputs of their own: against EM in NumPy, R's flexmix, JAX's derivatives, other units."""

import dataclasses
import subprocess

import compiled_model
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
from test_flexmix import has_flexmix

import moejax
from moejax.methods.options import FitOptions

N, D = 400, 3
EXPERTS, BIASES = np.array([[1.0, 0.5, 0.0], [-1.0, 0.3, 0.0]]), np.array([0.3, -0.5])
QUICK = {"num_experts": 2, "method": "joint_em", "num_starts": 3, "max_iterations": 2000}


def made(seed, gate, noise_std=(0.3, 0.3), n=N):
    """x (n, D), not standard, and y (n,): experts of the first two inputs, gates of the last one, `gate` (slope, bias)."""
    rng = np.random.default_rng(seed)
    white = rng.normal(size=(n, D))
    z = (rng.uniform(size=n) > scipy.special.expit(gate[0] * white[:, 2] + gate[1])).astype(int)
    x = white * [1.0, 2.0, 0.5] + [0.0, 1.0, -3.0]
    y = np.sum(x * EXPERTS[z], axis=1) + BIASES[z] + np.asarray(noise_std)[z] * rng.normal(size=n)
    return x, y


def mixture_of_regressions(design, y, start, *, shared, steps=3000):
    """(coefficients (k, D), sigma (k,), shares (k,), log-likelihood) by EM, from coefficients `start`."""
    coefficients, k = np.array(start), len(start)
    sigma, shares = np.full(k, y.std()), np.full(k, 1.0 / k)
    for _ in range(steps):
        joint = np.log(shares) + scipy.stats.norm.logpdf(y[:, None], design @ coefficients.T, sigma)
        evidence = scipy.special.logsumexp(joint, axis=1)
        r = np.exp(joint - evidence[:, None])
        roots = np.sqrt(r)
        coefficients = np.stack(
            [np.linalg.lstsq(roots[:, i, None] * design, roots[:, i] * y, rcond=None)[0] for i in range(k)]
        )
        squares = np.sum(r * (y[:, None] - design @ coefficients.T) ** 2, axis=0)
        sigma = np.full(k, np.sqrt(squares.sum() / len(y))) if shared else np.sqrt(squares / r.sum(axis=0))
        shares = r.mean(axis=0)
    joint = np.log(shares) + scipy.stats.norm.logpdf(y[:, None], design @ coefficients.T, sigma)
    return coefficients, sigma, shares, float(scipy.special.logsumexp(joint, axis=1).sum())


@pytest.mark.parametrize(("noise", "fit_intercept"), [("shared", True), ("per_expert", False)])
def test_constant_gates_are_a_mixture_of_regressions(noise, fit_intercept):
    x, y = made(0, (0.0, -0.8), (0.3, 0.4))
    design = np.column_stack([x, np.ones(N)]) if fit_intercept else x
    truth = np.column_stack([EXPERTS, BIASES])[:, : design.shape[1]]
    coefficients, sigma, shares, theirs = mixture_of_regressions(design, y, truth, shared=noise == "shared")
    result = moejax.fit(
        jax.random.key(0),
        x,
        y,
        num_experts=2,
        method="spectral_em",
        gate="constant",
        noise=noise,
        fit_intercept=fit_intercept,
    )

    assert result.status == "ok"
    # the polish ends a little below the maximum, by as much as the result says
    assert abs(result.log_likelihood + result.diagnostics["nats_below_maximum"] - theirs) < 1e-6
    order = np.argsort(-result.params.experts[:, 0])
    ours = jax.tree.map(lambda leaf: leaf[order], result.params)
    errors = jax.tree.map(lambda leaf: leaf[order], result.standard_errors)
    assert np.all(np.abs(ours.experts - coefficients[:, :D]) < 0.02 * errors.experts)
    np.testing.assert_allclose(ours.noise_std, sigma, rtol=1e-3)
    np.testing.assert_allclose(scipy.special.softmax(ours.gating_bias), shares, atol=1e-3)
    assert not ours.gating.any()
    assert not errors.gating.any()
    if fit_intercept:
        np.testing.assert_allclose(ours.expert_bias, coefficients[:, D], atol=1e-3)
    else:
        assert not ours.expert_bias.any()
        assert not errors.expert_bias.any()
    # experts, one share, noise levels
    assert result.num_parameters == 2 * design.shape[1] + 1 + (1 if noise == "shared" else 2)


SCRIPT = """
suppressMessages(library(flexmix))
data <- read.csv("data.csv")
model <- flexmix(y ~ x1 + x2 + x3, data = data, k = 2, cluster = data$z, model = FLXMRglm(),
    control = list(iter.max = 5000, tolerance = 1e-13, minprior = 0))
write.table(rbind(parameters(model), prior(model)), "parameters.txt", row.names = FALSE, col.names = FALSE)
cat(format(as.numeric(logLik(model)), digits = 15))
"""


@pytest.mark.slow
def test_constant_gates_are_those_of_flexmix(tmp_path):
    if not has_flexmix():
        pytest.skip("R with the package flexmix is not installed")
    x, y = made(0, (0.0, -0.8), (0.3, 0.4))
    nearest = 1 + np.argmin(np.abs(y[:, None] - x @ EXPERTS.T - BIASES), axis=1)
    columns = np.column_stack([x, y, nearest])
    np.savetxt(tmp_path / "data.csv", columns, delimiter=",", header="x1,x2,x3,y,z", comments="", fmt="%.17g")
    (tmp_path / "fit.R").write_text(SCRIPT)
    done = subprocess.run(["Rscript", "fit.R"], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    table = np.loadtxt(tmp_path / "parameters.txt")  # bias, coefficients, sigma, share
    table = table[:, np.argsort(-table[1])]
    options = {"gate": "constant", "noise": "per_expert", "fit_intercept": True, "method": "spectral_em"}
    ours = moejax.fit(jax.random.key(0), x, y, num_experts=2, **options)
    order = np.argsort(-ours.params.experts[:, 0])
    log_shares, none = np.log(table[5]), np.zeros((2, D))
    params = moejax.MoEParams(table[1:4].T, none, table[4], table[0], log_shares - log_shares[-1])
    theirs = float(done.stdout)
    assert abs(float(compiled_model.log_likelihood(params, x, y, "linear")) - theirs) < 1e-6
    # its sigma divides by the degrees of freedom, and is not at the maximum
    assert -1e-6 < ours.log_likelihood - theirs < 0.05
    np.testing.assert_allclose(ours.params.experts[order], table[1:4].T, atol=2e-3)
    np.testing.assert_allclose(ours.params.noise_std[order], table[4], rtol=0.02)
    np.testing.assert_allclose(scipy.special.softmax(ours.params.gating_bias)[order], table[5], atol=2e-3)


OTHER = {"expert_inputs": [0, 1], "gate_inputs": [1, 2], "fit_intercept": True}


@pytest.fixture(scope="module")
def data():
    return made(1, (2.0, 0.5))


@pytest.fixture(scope="module")
def fitted(data):
    return moejax.fit(jax.random.key(1), *data, num_experts=2, method="spectral_em", **OTHER)


def free_of(params):
    """The free parameters of OTHER: experts, gate and their biases, log sigma."""
    return np.concatenate(
        [
            params.experts[:, [0, 1]].ravel(),
            params.expert_bias,
            params.gating[0, [1, 2]],
            params.gating_bias[:1],
            np.log(params.noise_std[:1]),
        ]
    )


def params_at(free):
    zero = jnp.zeros(2)
    gate = jnp.stack([jnp.zeros(()), free[6], free[7]])
    return moejax.MoEParams(
        jnp.concatenate([free[:4].reshape(2, 2), zero[:, None]], axis=1),
        jnp.stack([gate, jnp.zeros(3)]),
        jnp.exp(free[9]) * jnp.ones(2),
        free[4:6],
        jnp.stack([free[8], jnp.zeros(())]),
    )


@jax.jit
def slope_and_information(free, x, y):
    def value(free):
        return moejax.log_likelihood(params_at(free), x, y, "linear")

    return jax.grad(value)(free), -jax.hessian(value)(free)


def test_maximum_and_errors_are_those_of_the_free_parameters(data, fitted):
    slope, information = jax.device_get(slope_and_information(free_of(fitted.params), *data))
    covariance = np.linalg.inv(information)
    assert fitted.status == "ok"
    # in units of standard errors, a nat below the maximum at most by half the square
    assert np.all(np.abs(slope) * np.sqrt(np.diag(covariance)) < 0.02)
    errors = fitted.standard_errors
    given = free_of(errors._replace(noise_std=np.exp(errors.noise_std / fitted.params.noise_std)))
    np.testing.assert_allclose(given, np.sqrt(np.diag(covariance)), rtol=1e-6)
    for leaves in (fitted.params, errors):
        assert not leaves.experts[:, 2].any()
        assert not leaves.gating[:, 0].any()
        assert not leaves.gating[1].any()
    assert fitted.num_parameters == 2 * 3 + 3 + 1 == len(slope)
    assert fitted.diagnostics["gate_angle_degrees"] > 60  # the gate's first input is one of the experts'
    low, high = fitted.intervals()
    factor = np.sqrt(low.noise_std * high.noise_std) / fitted.params.noise_std
    # one sigma for six expert coefficients: biases included, of two inputs
    np.testing.assert_allclose(
        np.log(factor), 6 * (errors.noise_std / fitted.params.noise_std) ** 2, rtol=1e-6
    )


def test_units_of_the_inputs_do_not_matter(data, fitted):
    x, y = data
    shift, scale = np.array([3.0, -1e3, 7.0]), np.array([1e-4, 50.0, 2.0])
    other = moejax.fit(
        jax.random.key(1), (x - shift) / scale, 5.0 * y + 2.0, num_experts=2, method="spectral_em", **OTHER
    )
    assert abs(other.log_likelihood - (fitted.log_likelihood - N * np.log(5.0))) < 1e-3
    unit = 5.0 * fitted.standard_errors.experts * scale
    assert np.all(np.abs(other.params.experts - 5.0 * fitted.params.experts * scale) <= 0.02 * unit)
    ratio = other.standard_errors.gating[:1, 1:] / (fitted.standard_errors.gating * scale)[:1, 1:]
    np.testing.assert_allclose(ratio, 1.0, rtol=1e-2)


def test_columns_by_name_and_the_set_of_all_columns(data, fitted):
    x, y = data
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    named = OTHER | {"expert_inputs": ["b", "a"], "gate_inputs": ("c", 1)}
    result = moejax.fit(jax.random.key(1), frame, y, num_experts=2, method="spectral_em", **named)
    assert all(np.array_equal(*leaves) for leaves in zip(result.params, fitted.params, strict=True))
    assert result.settings["expert_inputs"] == (0, 1)
    assert result.settings["gate_inputs"] == (1, 2)

    default, all_columns = (
        moejax.fit(jax.random.key(0), x, y, gate_inputs=columns, expert_inputs=columns, **QUICK)
        for columns in (None, [0, 1, 2])
    )
    assert default.log_likelihood == all_columns.log_likelihood
    assert all(np.array_equal(*leaves) for leaves in zip(default.params, all_columns.params, strict=True))


def test_the_same_columns_for_both_are_a_fit_without_the_others(data):
    x, y = data
    options = QUICK | {"fit_intercept": True}
    part = moejax.fit(jax.random.key(0), x, y, gate_inputs=[0, 1], expert_inputs=[0, 1], **options)
    alone = moejax.fit(jax.random.key(0), x[:, :2], y, **options)
    assert abs(part.log_likelihood - alone.log_likelihood) < 1e-6
    np.testing.assert_allclose(part.params.experts[:, :2], alone.params.experts, atol=1e-6)
    np.testing.assert_allclose(part.standard_errors.experts[:, :2], alone.standard_errors.experts, rtol=1e-5)
    assert part.num_parameters == alone.num_parameters


def test_bic_counts_free_parameters_and_fewer_rows_suffice(data):
    x, y = data
    options = {"method": "joint_em", "max_iterations": 300, "gate": "constant", "fit_intercept": True}
    result = moejax.fit(jax.random.key(0), x, y, **(options | {"num_experts": [1, 2]}))
    assert result.selection is not None
    # experts of four coefficients, k - 1 shares, one noise
    assert result.selection["num_parameters"].tolist() == [5, 10]
    few = slice(11)
    assert moejax.fit(jax.random.key(0), x[few], y[few], num_experts=2, **options).num_parameters == 10
    with pytest.raises(ValueError, match=r"x: expected at least 14 rows"):
        moejax.fit(jax.random.key(0), x[few], y[few], num_experts=2, **(options | {"gate": "softmax"}))


def test_moments_are_exact_for_gates_of_independent_inputs():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40_000, 3))
    z = (rng.uniform(size=len(x)) > scipy.special.expit(3.0 * x[:, 2])).astype(int)
    experts = np.array([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0]])
    y = np.sum(x * experts[z], axis=1) + 0.1 * rng.normal(size=len(x))
    result = moejax.fit(
        jax.random.key(0), x, y, num_experts=2, method="spectral", expert_inputs=[0, 1], gate_inputs=[2]
    )
    assert float(compiled_model.recovery_error(experts, result.params.experts)) < 0.02
    assert not result.params.experts[:, 2].any()


@pytest.mark.slow
def test_a_search_keeps_other_coefficients_at_zero():
    """A sample of noise has many optima: the search makes random starts and children."""
    x = np.random.default_rng(5).normal(size=(80, D))
    y = np.random.default_rng(6).standard_t(3, size=80)
    result = moejax.fit(
        jax.random.key(0), x, y, num_experts=3, expert_inputs=[0], gate_inputs=[2], fit_intercept=True
    )
    assert result.diagnostics["num_starts"] > 60  # more than the independent ones
    assert not result.params.experts[:, 1:].any()
    assert not result.params.gating[:, :2].any()
    assert result.params.gating[:2, 2].all()


def test_several_outputs_with_constant_gates(data):
    x, y = data
    both = np.column_stack([y, y**2])
    result = moejax.fit(jax.random.key(0), x, both, gate="constant", fit_intercept=True, **QUICK)
    assert result.status == "ok"
    assert result.params.experts.shape == (2, 2, D)
    assert not result.params.gating.any()
    assert result.num_parameters == 2 * 2 * (D + 1) + 1 + 2
    # at a maximum the shares are the means of the responsibilities
    mean = np.asarray(compiled_model.responsibilities(result.params, x, both, "linear")).mean(axis=0)
    np.testing.assert_allclose(scipy.special.softmax(result.params.gating_bias), mean, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate": "hard"}, r"gate: expected 'softmax' or 'constant', got 'hard'"),
        ({"gate": "constant", "gate_inputs": [0]}, r'gate_inputs: expected None with gate="constant"'),
        ({"gate_inputs": []}, r"gate_inputs: expected column numbers .* got \[\]"),
        ({"gate_inputs": [3]}, r"gate_inputs: expected column numbers from 0 to 2, got 3"),
        ({"gate_inputs": [-1]}, r"gate_inputs: expected .* got -1"),
        ({"gate_inputs": [True]}, r"gate_inputs: expected .* got True"),
        ({"gate_inputs": "a"}, r"gate_inputs: expected .* got 'a'"),
        ({"gate_inputs": [[0], [1, 2]]}, r"gate_inputs: expected .* got \[0\]"),
        ({"gate_inputs": np.eye(2)}, r"gate_inputs: expected column numbers"),
        ({"expert_inputs": [0, 0]}, r"expert_inputs: expected each column once, got \[0, 0\]"),
        (
            {"expert_inputs": ["a"]},
            r"expert_inputs: expected column numbers, because x has no names, got 'a'",
        ),
        (
            {"gate": "constant", "method": "gradient_nll"},
            r"method: expected .*'multistart'.* got 'gradient_nll'",
        ),
        ({"gate_inputs": [0], "method": "spectral_wide"}, r"method: expected .* got 'spectral_wide'"),
        (
            {"expert_inputs": [0], "log_density": lambda x: -0.5 * x @ x},
            r"log_density: expected None with expert_inputs",
        ),
    ],
)
def test_refusals_name_the_option(options, words):
    x, y = made(0, (0.0, 0.0), n=60)
    with pytest.raises(ValueError, match=words) as raised:
        moejax.fit(jax.random.key(0), x, y, num_experts=2, **options)
    assert "\n" not in str(raised.value)


def test_other_refusals():
    x, y = made(0, (0.0, 0.0), n=60)
    frame = pd.DataFrame(x, columns=["mass", "size", "age"])
    with pytest.raises(ValueError, match=r"gate_inputs: unknown column 'sizes'; did you mean size\?"):
        moejax.fit(jax.random.key(0), frame, y, num_experts=2, gate_inputs=["sizes"])
    twice = frame.rename(columns={"mass": "age"})
    with pytest.raises(ValueError, match=r"gate_inputs: expected names that occur once .* got 'age'"):
        moejax.fit(jax.random.key(0), twice, y, num_experts=2, gate_inputs=["age"])
    constant = np.column_stack([x, np.ones(60)])
    with pytest.raises(ValueError, match=r"gate_inputs: expected a column that varies"):
        moejax.fit(jax.random.key(0), constant, y, num_experts=2, gate_inputs=[3], fit_intercept=True)
    with pytest.raises(ValueError, match=r"gate: expected 'softmax' with a source, for now, got 'constant'"):
        moejax.fit(jax.random.key(0), source=moejax.ArraySource(x, y), num_experts=2, gate="constant")


def test_options_by_default_are_those_of_today():
    names = {"gate": "softmax", "gate_inputs": None, "expert_inputs": None}
    assert {name: getattr(FitOptions(), name) for name in names} == names
    assert dataclasses.replace(FitOptions(), **names) == FitOptions()
