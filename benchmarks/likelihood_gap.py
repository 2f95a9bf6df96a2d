"""Does `spectral_em` reach the likelihood that a polish from the truth reaches, for every built-in activation?

d = 10, k = 3, sigma = 0.1 (known), orthogonal experts, gates of norm 1 orthogonal to them, n = 20000, float64. For each
activation it prints the number of seeds that end within 0.01 nat (summed over the sample) of, or above, the polish from the truth.

    python benchmarks/likelihood_gap.py [--seeds 20] [--num-samples 20000]
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from moejax.likelihood.polish import polish
from moejax.methods import MethodConfig, Problem, get_method
from moejax.model import (
    InstanceScales,
    activation_facts,
    activation_names,
    get_activation,
    random_params,
    recovery_error,
    sample,
)
from moejax.moments import choose_order, host_transforms

DIM, NUM_EXPERTS, NOISE_STD = 10, 3, 0.1
TOLERANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--activations", nargs="*", default=activation_names())
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    scales = InstanceScales(
        *(jnp.asarray(v, float) for v in (NOISE_STD, 1.0, 90.0, 0.0)), jnp.ones(NUM_EXPERTS)
    )
    print(
        "| activation | order | within 0.01 nat | largest gap (nats) | median E, spectral | median E, spectral_em | median passes |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.activations:
        fn = get_activation(name)
        even = activation_facts(fn).parity == "even"
        order = choose_order(fn, NOISE_STD, dim=DIM, num_experts=NUM_EXPERTS).order
        transforms = jax.tree.map(jnp.asarray, host_transforms(fn, NOISE_STD, order, "weighted", NUM_EXPERTS))
        config = MethodConfig(fn=fn, num_experts=NUM_EXPERTS, order=order, noise="known")

        def run(key, fn=fn, even=even, transforms=transforms, config=config):
            truth_key, sample_key, method_key = jax.random.split(key, 3)
            truth = random_params(truth_key, scales, DIM)
            x, y, _ = sample(sample_key, truth, fn, options.num_samples)
            weights = jnp.ones(options.num_samples)
            fitted = get_method("spectral_em")(
                method_key, Problem(x, y, weights, scales.noise_std, transforms), config
            )
            best = polish(truth, x, y, weights, fn=fn, num_steps=100, noise="known", ridge=config.ridge)
            reached = polish(
                fitted.params, x, y, weights, fn=fn, num_steps=1, noise="known", ridge=config.ridge
            )
            return (
                best.log_likelihood - reached.log_likelihood,
                recovery_error(truth.experts, fitted.spectral.experts, even),
                recovery_error(truth.experts, fitted.params.experts, even),
                fitted.num_iterations,
            )

        keys = jax.random.split(jax.random.key(1), options.seeds)
        gap, spectral, polished, passes = (
            np.asarray(a) for a in jax.jit(lambda k, run=run: jax.lax.map(run, k))(keys)
        )
        reached = int((gap <= TOLERANCE).sum())
        print(
            f"| {name} | {order} | {reached} of {options.seeds} | {gap.max():.1e} | {np.median(spectral):.1e} "
            f"| {np.median(polished):.1e} | {np.median(passes):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
