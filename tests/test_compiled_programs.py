"""No program holds a batched LAPACK call, with which jaxlib may stop for ever (see `moejax.model.small_linear_algebra`).

The calls are read in the lowered text: XLA's CPU compiler adds no call of LAPACK and does not batch one, which
`test_the_lowered_text_shows_the_calls_that_are_compiled` checks.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.fitting import estimation as fitting
from moejax.fitting import label_units
from moejax.fitting.streaming.sums import Wanted, batch_program
from moejax.fitting.uncertainty import uncertainty
from moejax.methods import MethodConfig, Problem, get_method, lookup_method, method_names, zero_gates
from moejax.model.activations import get_activation
from moejax.model.families import get_family
from moejax.model.family import Nuisances
from moejax.moments.label_transforms import LabelTransform
from moejax.moments.marginal import estimate_nuisances
from moejax.moments.spectral import SpectralTransforms, host_transforms, traced_transforms
from moejax.sweep import trial
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings
from moejax.sweep.trial.trial import _run_trials

FN = get_activation("tanh")
N, D, K = 64, 8, 3
"""With intercepts, systems of 9 and 18 rows: small ones, and some above what is solved side by side."""
MADE_OF_OTHERS = {"spectral", "gradient_mse", "multistart"}
SIDE_BY_SIDE = [name for name in method_names() if name not in MADE_OF_OTHERS]
"""Those whose linear algebra is not all in another of them: tracing takes time."""


def lapack_calls(text):
    """(name, largest rank of an operand) of each LAPACK call in a lowered program."""
    lines = re.findall(r"custom_call @(lapack_\w+)\(.*\} : \((.*)\) -> ", text)
    return [(name, max(t.count("x") for t in re.findall(r"tensor<([^>]*)>", types))) for name, types in lines]


def batched(lowered):
    text = lowered.as_text()
    assert "callback" not in text  # a program that calls the host does not run on a TPU, and stops a GPU
    calls = lapack_calls(text)
    assert len(calls) == text.count("custom_call @lapack_")
    return sorted({name for name, rank in calls if rank > 2})


@functools.cache
def transforms(order):
    return jax.tree.map(jnp.asarray, host_transforms(FN, 0.1, order, "weighted", K))


def problem(method, num_outputs=1):
    order = lookup_method(method).order or 3
    shape = (N,) if num_outputs == 1 else (N, num_outputs)
    x, y = jnp.ones((N, D)), jnp.ones(shape)
    given = transforms(order) if num_outputs == 1 else None
    third = given.high if lookup_method(method).moments == "third" else None
    return Problem(x, y, jnp.ones(N), jnp.full(shape[1:], 0.1), given, third=third)


def config(method):
    order = lookup_method(method).order or 3
    return MethodConfig(fn=FN, num_experts=K, order=order, fit_intercept=True, num_starts=16)


@pytest.mark.parametrize("method", method_names())
def test_a_fit_has_no_batched_calls(method):
    """A method in stages is traced as a whole here."""
    whole = fitting._compiled.lower(jax.random.key(0), problem(method), config(method), get_method(method))
    assert batched(whole) == []


def test_a_fit_of_several_outputs_has_no_batched_calls():
    several, of = problem("joint_em", 2), config("joint_em")
    assert batched(fitting._compiled.lower(jax.random.key(0), several, of, get_method("joint_em"))) == []


@pytest.mark.parametrize("method", SIDE_BY_SIDE)
def test_fits_side_by_side_have_no_batched_calls(method):
    side_by_side = jax.vmap(lambda key, given: get_method(method)(key, given, config(method)))
    given = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), problem(method))
    assert batched(jax.jit(side_by_side).lower(jax.random.split(jax.random.key(0)), given)) == []


def test_trials_side_by_side_have_no_batched_calls():
    """As a sweep runs them with --vmap-width 2: instance, sample, label transforms and metrics are the same for all methods."""
    data = DataSettings(activation="tanh", dim=D, num_experts=K, num_samples=N)
    spec, traced = trial.prepare(data, AlgorithmSettings(method="spectral", noise_knowledge="estimated"), N)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 2), traced)
    assert batched(_run_trials.lower(np.zeros((2, 2), np.uint32), stacked, spec, vmap_width=2)) == []


@pytest.mark.parametrize("kind", ["polynomial", "least_norm"])
def test_label_transforms_side_by_side_have_no_batched_calls(kind):
    def build(noise_std):
        return traced_transforms(FN, noise_std, 3, kind, K)

    assert batched(jax.jit(jax.vmap(build)).lower(jnp.asarray([0.1, 0.2]))) == []


def test_the_other_programs_of_a_fit_and_of_the_estimator_have_no_batched_calls():
    given, of = problem("multistart"), config("multistart")
    params = zero_gates(jnp.ones((K, D)), jnp.asarray(0.1))
    assert batched(uncertainty.lower(params, given, "observed", of)) == []
    assert batched(uncertainty.lower(params, given, "sandwich", of)) == []
    assert batched(fitting.evaluate.lower(params, given, FN)) == []
    assert batched(label_units._estimated.lower(given.y, given.weights, FN)) == []
    assert batched(label_units._estimated_ratio.lower(given.y, given.weights, FN, 0.5)) == []


def test_the_sums_over_a_batch_have_no_batched_calls():
    wanted = Wanted("relu", "shared", fit_intercept=True, averaged=True, score_products=True)
    shared = (zero_gates(jnp.ones((K, D)), jnp.asarray(0.1)), jnp.asarray(0.1))
    program = batch_program(wanted, tuple(jax.local_devices()))
    assert batched(program.lower(shared, jnp.ones((N, D)), jnp.ones(N), jnp.ones(N))) == []


def test_a_call_of_the_host_would_be_found():
    with pytest.raises(AssertionError):
        batched(jax.jit(lambda x: jax.pure_callback(np.sin, x, x)).lower(jnp.ones(())))


def test_the_lowered_text_shows_the_calls_that_are_compiled():
    def calls(matrices, right):
        one = jnp.linalg.cholesky(matrices[0])
        return one, jnp.linalg.eigh(matrices), jnp.linalg.solve(matrices, right[:, :, None])

    lowered = jax.jit(calls).lower(jnp.stack([jnp.eye(3)] * 2), jnp.ones((2, 3)))
    found = lapack_calls(lowered.as_text())
    assert ("lapack_dpotrf_ffi", 2) in found
    assert batched(lowered) == ["lapack_dgetrf_ffi", "lapack_dsyevd_ffi", "lapack_dtrsm_ffi"]
    compiled = re.findall(r'custom_call_target="(lapack_\w+)"', lowered.compile().as_text())
    assert sorted(compiled) == sorted(name for name, _ in found)


@pytest.mark.parametrize("name", ["poisson", "student_t(3)", "laplace", "negative_binomial"])
def test_fits_of_other_families_have_no_batched_calls(name):
    family, given = get_family(name), problem("spectral_em")
    one, knots = jnp.ones(()), jnp.linspace(0.0, 3.0, 8)
    of = dataclasses.replace(config("spectral_em"), fn=family)
    own = LabelTransform(one, one, knots, knots[:4], one, one, knots)
    given = given._replace(transforms=SpectralTransforms(own, own, None), nuisances=Nuisances(one, one, one))
    assert batched(fitting._compiled.lower(jax.random.key(0), given, of, get_method("spectral_em"))) == []
    estimated = jax.jit(jax.vmap(lambda y, w: estimate_nuisances(y, w, family=family)))
    assert batched(estimated.lower(jnp.ones((2, N)), jnp.ones((2, N)))) == []
