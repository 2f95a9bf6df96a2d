"""Do 95% intervals of experts, gates, noise and biases hold the truth in 95% of trials, for both kinds of covariance?

d = 10, k = 3, n = 10000, sigma = 0.1 shared and estimated, orthonormal experts, gates of norm 1 orthogonal to them, standard normal
inputs, float64; with intercepts, the biases of experts and gates are drawn from N(0, 0.3^2). Every trial draws a mixture and a
sample and fits it by `spectral_em`. The moments get the true sigma; all parameters are then estimated jointly.

It prints the coverage pooled within each block, +- its Monte Carlo standard error (from the trials, whose intervals are
dependent). A trial has failed if it ends at another optimum (recovery error 0.02 or more) or with a status other than ok; all
trials count.

    python benchmarks/coverage.py [--trials 1000] [--num-samples 10000] [--activations linear relu]
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from moejax.likelihood import COVARIANCE_KINDS, confidence_intervals, covariance, standard_errors
from moejax.methods import MethodConfig, Problem, get_method
from moejax.model import (
    SUCCESS_THRESHOLD,
    InstanceScales,
    activation_facts,
    align,
    get_activation,
    random_params,
    recovery_error,
    regauge,
    sample,
    standard_normal,
)
from moejax.moments import choose_order, host_transforms

DIM, NUM_EXPERTS, NOISE_STD, BIAS_STD = 10, 3, 0.1, 0.3
LEVEL = 0.95


def coverage_of_trial(key, scales, transforms, *, config, even, num_samples):
    """({kind: {block: share of its intervals that hold the truth ()}}, failed () bool)."""
    truth_key, bias_key, sample_key, method_key = jax.random.split(key, 4)
    fn, free = config.fn, {"noise": config.noise, "fit_intercept": config.fit_intercept}
    truth = random_params(truth_key, scales, DIM)
    if config.fit_intercept:
        biases = BIAS_STD * standard_normal(bias_key, (2, NUM_EXPERTS), scales.expert_norms.dtype)
        truth = regauge(truth._replace(expert_bias=biases[0], gating_bias=biases[1]))
    x, y, _ = sample(sample_key, truth, fn, num_samples)
    problem = Problem(x, y, jnp.ones(num_samples), scales.noise_std, transforms)
    fitted = get_method("spectral_em")(method_key, problem, config)
    aligned = align(truth, fitted.params, even)
    shares = {}
    for kind in COVARIANCE_KINDS:
        errors = standard_errors(covariance(aligned, x, y, fn, kind=kind, **free), aligned, **free)
        lower, upper = confidence_intervals(aligned, errors, LEVEL, **free)
        inside = jax.tree.map(lambda low, high, true: (low <= true) & (true <= high), lower, upper, truth)
        blocks = {"experts": inside.experts, "gates": inside.gating[:-1], "noise": inside.noise_std[:1]}
        if config.fit_intercept:
            blocks["biases"] = jnp.concatenate([inside.expert_bias, inside.gating_bias[:-1]])
        shares[kind] = {name: jnp.mean(held.astype(x.dtype)) for name, held in blocks.items()}
    wrong = recovery_error(truth.experts, fitted.params.experts, even) >= SUCCESS_THRESHOLD
    return shares, wrong | (fitted.status != 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--activations", nargs="*", default=["linear", "relu"])
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    scales = InstanceScales(
        *(jnp.asarray(v, float) for v in (NOISE_STD, 1.0, 90.0, 0.0)), jnp.ones(NUM_EXPERTS)
    )
    print(f"n = {options.num_samples}, {options.trials} trials, {LEVEL:.0%} intervals\n")
    print("| activation | intercepts | covariance | failed | experts | gates | noise | biases |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.activations:
        fn = get_activation(name)
        order = choose_order(fn, NOISE_STD, dim=DIM, num_experts=NUM_EXPERTS).order
        transforms = jax.tree.map(jnp.asarray, host_transforms(fn, NOISE_STD, order, "weighted", NUM_EXPERTS))
        for fit_intercept in (False, True):
            config = MethodConfig(
                fn=fn, num_experts=NUM_EXPERTS, order=order, noise="shared", fit_intercept=fit_intercept
            )
            even = activation_facts(fn).parity == "even"

            def run(keys, scales, transforms, config=config, even=even):
                def trial(key):
                    return coverage_of_trial(
                        key, scales, transforms, config=config, even=even, num_samples=options.num_samples
                    )

                return jax.lax.map(trial, keys)

            keys = jax.random.split(jax.random.key(5), options.trials)
            with jax.default_matmul_precision("highest"):
                shares, failed = jax.jit(run)(keys, scales, transforms)
            for kind, blocks in shares.items():
                cells = []
                for block in ("experts", "gates", "noise", "biases"):
                    if block not in blocks:
                        cells.append("-")
                        continue
                    values = np.asarray(blocks[block])
                    error = values.std(ddof=1) / np.sqrt(values.size)
                    cells.append(f"{100 * values.mean():.2f} ± {100 * error:.2f}%")
                with_intercepts = "yes" if fit_intercept else "no"
                print(
                    f"| {name} | {with_intercepts} | {kind} | {int(failed.sum())} | {' | '.join(cells)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
