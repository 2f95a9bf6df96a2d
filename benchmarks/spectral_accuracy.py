"""How accurate are the moments alone? Rates in n, and n MSE by kind of transform, with and without polar refinement.

d = 10, k = 3, sigma known, orthogonal experts, gates of norm 1 orthogonal to them, float64.

    python benchmarks/spectral_accuracy.py rates     slope of log median E in log n, n = 1e4 to 1e6, 20 seeds
    python benchmarks/spectral_accuracy.py mse       n MSE at n = 1e5, 40 trials, and the median E
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from moejax.model import (
    InstanceScales,
    activation_facts,
    get_activation,
    match_experts,
    random_params,
    recovery_error,
    sample,
)
from moejax.moments import TRANSFORM_KINDS, choose_order, host_transforms, predicted_mse, spectral_estimate

DIM, NUM_EXPERTS = 10, 3
CHUNK_SIZE = 65_536


def errors(
    name: str,
    noise_std: float,
    num_samples: int,
    num_trials: int,
    kinds: tuple[str, ...],
    order: int,
    polar: tuple[int, ...],
):
    """{(kind, polar iterations): (E (t,), n times the mean squared expert error (t,))}, all on the same samples."""
    fn = get_activation(name)
    even = activation_facts(fn).parity == "even"
    scales = InstanceScales(
        *(jnp.asarray(v, float) for v in (noise_std, 1.0, 90.0, 0.0)), jnp.ones(NUM_EXPERTS)
    )
    transforms = [
        jax.tree.map(jnp.asarray, host_transforms(fn, noise_std, order, kind, NUM_EXPERTS)) for kind in kinds
    ]
    transforms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *transforms)

    def run(key):
        truth_key, sample_key, power_key = jax.random.split(key, 3)
        truth = random_params(truth_key, scales, DIM)
        x, y, _ = sample(sample_key, truth, fn, num_samples)

        def one(transform, polar_iterations):
            estimate = spectral_estimate(
                power_key,
                x,
                y,
                transform,
                num_experts=NUM_EXPERTS,
                order=order,
                num_polar_iterations=polar_iterations,
                chunk_size=CHUNK_SIZE,
            )
            matched = estimate.experts[match_experts(truth.experts, estimate.experts, even)]
            if even:
                matched = jnp.sign(jnp.sum(matched * truth.experts, axis=1))[:, None] * matched
            squared = jnp.sum((matched - truth.experts) ** 2, axis=1).mean()
            return recovery_error(truth.experts, estimate.experts, even), num_samples * squared

        return [jax.lax.map(lambda t, p=p: one(t, p), transforms) for p in polar]

    keys = jax.random.split(jax.random.key(7), num_trials)
    results = jax.jit(lambda k: jax.lax.map(run, k))(keys)
    return {
        (kind, p): tuple(np.asarray(values[:, i]) for values in result)
        for p, result in zip(polar, results, strict=True)
        for i, kind in enumerate(kinds)
    }


def rates() -> None:
    print("| activation | order | median E at n = 1e4 | 1e5 | 1e6 | slope | bootstrap standard error |")
    print("|---|---|---|---|---|---|---|")
    sizes = (10_000, 100_000, 1_000_000)
    rng = np.random.default_rng(0)
    for name in ("linear", "relu", "sigmoid", "tanh"):
        order = choose_order(get_activation(name), 0.1, dim=DIM, num_experts=NUM_EXPERTS).order
        samples = [errors(name, 0.1, n, 20, ("weighted",), order, (8,))["weighted", 8][0] for n in sizes]
        slope = np.polyfit(np.log(sizes), np.log([np.median(e) for e in samples]), 1)[0]
        again = [[np.median(rng.choice(e, e.size)) for e in samples] for _ in range(500)]
        spread = np.std([np.polyfit(np.log(sizes), np.log(medians), 1)[0] for medians in again])
        cells = " | ".join(f"{np.median(e):.2e}" for e in samples)
        print(f"| {name} | {order} | {cells} | {slope:.3f} | {spread:.3f} |", flush=True)


def mse() -> None:
    polar = (0, 8)
    print(
        "n MSE (mean over 40 trials, with its standard error) at n = 1e5: power method / with polar refinement; predicted; and"
    )
    print(
        "the median E of the weighted kind with polar refinement over that of the plain polynomial power method.\n"
    )
    header = " | ".join(TRANSFORM_KINDS)
    print(f"| activation | sigma | order | {header} | predicted weighted | median E ratio |")
    print("|---|---|---|" + "---|" * len(TRANSFORM_KINDS) + "---|---|")
    settings = [(a, 0.1, 3) for a in ("linear", "relu", "sigmoid", "tanh", "gelu", "softplus", "silu")]
    settings += [
        ("gelu", 0.1, 4),
        ("abs", 0.1, 4),
        ("square", 0.1, 4),
        ("cos", 0.1, 4),
        ("relu", 0.5, 3),
        ("linear", 0.5, 3),
    ]
    for name, noise_std, order in settings:
        result = errors(name, noise_std, 100_000, 40, TRANSFORM_KINDS, order, polar)
        cells = []
        for kind in TRANSFORM_KINDS:
            texts = [
                f"{result[kind, p][1].mean():.0f} ± {result[kind, p][1].std(ddof=1) / 40**0.5:.0f}"
                for p in polar
            ]
            cells.append(" / ".join(texts))
        ratio = np.median(result["weighted", 8][0]) / np.median(result["polynomial", 0][0])
        predicted = predicted_mse(
            get_activation(name), noise_std, order, "weighted", dim=DIM, num_experts=NUM_EXPERTS
        )
        print(
            f"| {name} | {noise_std} | {order} | {' | '.join(cells)} | {predicted:.0f} | {ratio:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rates", "mse"))
    chosen = parser.parse_args().what
    jax.config.update("jax_enable_x64", True)
    rates() if chosen == "rates" else mse()
