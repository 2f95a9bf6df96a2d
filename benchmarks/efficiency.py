"""Is `spectral_em` efficient? The benchmark divides its mean squared error by the Cramer-Rao bound, for every built-in activation.

d = 10, k = 3, sigma = 0.1 (known, unless --noise shared), orthonormal experts, gates of norm 1 orthogonal to them, standard
normal inputs, float64. Every trial draws a mixture and a sample; the bound is that of the mixture at those inputs, for exactly
the fitted parameters. A trial gives ratios, each of mean 1 for an efficient estimate. The ratio of a block is its squared error
over the trace of the bound's block; the overall ratio is error' I error / P with I the Fisher information of all P parameters. It
prints the mean over the trials, and its 95% interval.

A trial has failed if it ends at another optimum (recovery error 0.02 or more) or with a status other than ok; the ratios include
failed trials.

    python benchmarks/efficiency.py [--trials 400] [--num-samples 20000] [--noise known|shared] [--activations ...]
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from moejax.likelihood import cramer_rao_bound, fisher_information, free_parameters, parameter_blocks
from moejax.methods import MethodConfig, Problem, get_method
from moejax.model import (
    SUCCESS_THRESHOLD,
    InstanceScales,
    activation_facts,
    activation_names,
    align,
    get_activation,
    random_params,
    recovery_error,
    sample,
)
from moejax.moments import choose_order, host_transforms

DIM, NUM_EXPERTS, NOISE_STD = 10, 3, 0.1
NUM_NODES = 25
"""Nodes of the rule over y; the bound then has an error of 1e-4."""


def ratios_of_trial(key, scales, transforms, *, config, even, num_samples, blocks):
    """({block or "overall": ratio ()}, failed () bool)."""
    truth_key, sample_key, method_key = jax.random.split(key, 3)
    fn, free = config.fn, {"noise": config.noise, "fit_intercept": False}
    truth = random_params(truth_key, scales, DIM)
    x, y, _ = sample(sample_key, truth, fn, num_samples)
    problem = Problem(x, y, jnp.ones(num_samples), scales.noise_std, transforms)
    fitted = get_method("spectral_em")(method_key, problem, config)
    aligned = align(truth, fitted.params, even)
    error = free_parameters(aligned, **free) - free_parameters(truth, **free)
    information = fisher_information(truth, x, fn, num_nodes=NUM_NODES, **free)
    bound = jnp.diag(cramer_rao_bound(information).matrix)
    ratios = {name: jnp.sum(error[at] ** 2) / jnp.sum(bound[at]) for name, at in blocks.items()}
    ratios["overall"] = error @ information @ error / error.size
    wrong = recovery_error(truth.experts, fitted.params.experts, even) >= SUCCESS_THRESHOLD
    return ratios, wrong | (fitted.status != 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--noise", choices=("known", "shared"), default="known")
    parser.add_argument("--activations", nargs="*", default=activation_names())
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    scales = InstanceScales(
        *(jnp.asarray(v, float) for v in (NOISE_STD, 1.0, 90.0, 0.0)), jnp.ones(NUM_EXPERTS)
    )
    blocks = parameter_blocks(NUM_EXPERTS, DIM, noise=options.noise, fit_intercept=False)
    blocks = {name: at for name, at in blocks.items() if at.size}
    names = [*blocks, "overall"]
    print(f"n = {options.num_samples}, {options.trials} trials, noise {options.noise}\n")
    print(f"| activation | order | failed | {' | '.join(names)} |")
    print("|---|---|---|" + "---|" * len(names))
    for name in options.activations:
        fn = get_activation(name)
        order = choose_order(fn, NOISE_STD, dim=DIM, num_experts=NUM_EXPERTS).order
        if order is None:
            print(f"| {name} | none | - |{' - |' * len(names)}")
            continue
        transforms = jax.tree.map(jnp.asarray, host_transforms(fn, NOISE_STD, order, "weighted", NUM_EXPERTS))
        config = MethodConfig(fn=fn, num_experts=NUM_EXPERTS, order=order, noise=options.noise)
        even = activation_facts(fn).parity == "even"

        def run(keys, scales, transforms, config=config, even=even):
            def trial(key):
                return ratios_of_trial(
                    key,
                    scales,
                    transforms,
                    config=config,
                    even=even,
                    num_samples=options.num_samples,
                    blocks=blocks,
                )

            return jax.lax.map(trial, keys)

        keys = jax.random.split(jax.random.key(4), options.trials)
        with jax.default_matmul_precision("highest"):
            ratios, failed = jax.jit(run)(keys, scales, transforms)
        cells = []
        for block in names:
            values = np.asarray(ratios[block])
            half = 1.96 * values.std(ddof=1) / np.sqrt(values.size)
            cells.append(f"{values.mean():.3f} ({values.mean() - half:.3f} to {values.mean() + half:.3f})")
        print(f"| {name} | {order} | {int(failed.sum())} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
