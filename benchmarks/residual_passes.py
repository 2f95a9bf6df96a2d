"""How do residual passes change the error of the moment estimate, without any polish?

d = 10, k = 3, sigma = 0.1, orthogonal experts, float64; medians (largest in brackets) of E, the recovery error, over instances.

    python benchmarks/residual_passes.py errors      n = 1e6, gates of norm 2 not orthogonal to the experts, passes 0 to 5
    python benchmarks/residual_passes.py variance    n = 1e5, gates of norm 1 orthogonal: n MSE, where plain moments are consistent
    python benchmarks/residual_passes.py noise       n = 1e5: the noise held at the known level in gating EM, or estimated there
    python benchmarks/residual_passes.py kinds       n = 1e5: the kinds of label transforms
    python benchmarks/residual_passes.py inputs      n = 1e6: inputs that are not normal, normal and true score tensors
    python benchmarks/residual_passes.py settings    n = 1e6: other activations, orders, gates of norm 4, unknown noise

Gates: "in span" lie in the experts' span, "45" at 45 degrees to it, "generic" are uniform on the sphere of R^d.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.methods.residual_passes import residual_estimate
from moejax.model import (
    InstanceScales,
    activation_facts,
    get_activation,
    get_input_distribution,
    get_log_density,
    match_experts,
    random_params,
    recovery_error,
    sample_labels,
    unit_rows,
)
from moejax.moments import estimate_noise_std, host_transforms, traced_transforms

DIM, NUM_EXPERTS = 10, 3
CHUNK_SIZE = 65_536
ANGLES = {"in span": 0.0, "45": 45.0, "orthogonal": 90.0, "generic": 90.0}


def trials(
    name: str,
    num_samples: int,
    num_trials: int,
    gates: str,
    *,
    norm: float = 2.0,
    noise_std: float = 0.1,
    order: int = 3,
    kind: str = "weighted",
    num_passes: int = 3,
    noise: str = "shared",
    noise_known: bool = True,
    inputs: str = "standard_normal",
    true_scores: bool = False,
) -> tuple[np.ndarray, ...]:
    """E (t, passes + 1), n MSE (t, passes + 1), the pass kept (t,)."""
    fn = get_activation(name)
    even = activation_facts(fn).parity == "even"
    values = (noise_std, norm, ANGLES[gates], 0.0)
    scales = InstanceScales(*(jnp.asarray(v, float) for v in values), jnp.ones(NUM_EXPERTS))
    transforms = jax.tree.map(jnp.asarray, host_transforms(fn, noise_std, order, kind, NUM_EXPERTS))
    sampler = get_input_distribution(inputs)
    log_density = get_log_density(inputs) if true_scores else None

    def run(key, transforms):
        keys = jax.random.split(key, 5)
        truth = random_params(keys[0], scales, DIM)
        if gates == "generic":
            directions = unit_rows(jax.random.normal(keys[1], truth.gating.shape))
            truth = truth._replace(gating=norm * directions.at[-1].set(0.0))
        x = sampler(keys[2], num_samples, DIM, jnp.float64)
        y, _ = sample_labels(keys[3], truth, fn, x)
        weights = jnp.ones(num_samples)
        sigma = scales.noise_std
        if not noise_known:
            sigma = estimate_noise_std(y, weights, fn=fn)
            transforms = traced_transforms(fn, sigma, order, kind, NUM_EXPERTS)
        found = residual_estimate(
            keys[4],
            x,
            y,
            transforms,
            weights,
            sigma,
            fn=fn,
            num_experts=NUM_EXPERTS,
            order=order,
            num_passes=num_passes,
            noise=noise,
            chunk_size=CHUNK_SIZE,
            log_density=log_density,
        )

        def errors(experts):
            matched = experts[match_experts(truth.experts, experts, even)]
            if even:
                matched = jnp.sign(jnp.sum(matched * truth.experts, axis=1))[:, None] * matched
            squared = jnp.sum((matched - truth.experts) ** 2, axis=1).mean()
            return recovery_error(truth.experts, experts, even), num_samples * squared

        return *jax.lax.map(errors, found.experts), found.best_pass

    keys = jax.random.split(jax.random.key(11), num_trials)
    results = jax.jit(lambda keys, transforms: jax.lax.map(lambda key: run(key, transforms), keys))
    return tuple(np.asarray(a) for a in results(keys, transforms))


def medians(errors: np.ndarray) -> str:
    return " | ".join(f"{np.median(e):.1e} ({e.max():.0e})" for e in errors.T)


def table(first: str, num_passes: int) -> None:
    print(f"| {first} | " + " | ".join(f"pass {p}" for p in range(num_passes + 1)) + " | kept |")
    print("|---" * (first.count("|") + num_passes + 3) + "|")


def row(label: str, result: tuple[np.ndarray, ...]) -> None:
    kept = result[0][np.arange(len(result[2])), result[2]]
    print(f"| {label} | {medians(result[0])} | {np.median(kept):.1e} |", flush=True)


def errors(num_trials: int) -> None:
    table("activation | gates", 5)
    for name in ("relu", "linear"):
        for gates in ("generic", "45"):
            row(f"{name} | {gates}", trials(name, 1_000_000, num_trials, gates, num_passes=5))


def variance(num_trials: int) -> None:
    num_trials *= 3
    print(f"n MSE, mean over {num_trials} instances with its standard error\n")
    print("| activation | pass 0 | pass 1 | pass 2 | pass 3 |")
    print("|---|---|---|---|---|")
    for name in ("linear", "relu", "tanh", "sigmoid"):
        mse = trials(name, 100_000, num_trials, "orthogonal", norm=1.0)[1]
        cells = [f"{m.mean():.0f} ± {m.std(ddof=1) / num_trials**0.5:.0f}" for m in mse.T]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def noise(num_trials: int) -> None:
    table("activation | sigma | noise in gating EM", 3)
    for name, noise_std in (("linear", 0.1), ("relu", 0.1), ("linear", 0.02), ("relu", 0.02)):
        for model, label in (("known", "known"), ("shared", "estimated")):
            result = trials(name, 100_000, num_trials, "generic", noise_std=noise_std, noise=model)
            row(f"{name} | {noise_std} | {label}", result)


def kinds(num_trials: int) -> None:
    table("activation | transforms", 6)
    for name in ("linear", "relu"):
        for kind in ("weighted", "least_norm", "centred", "polynomial"):
            result = trials(name, 100_000, num_trials, "generic", kind=kind, num_passes=6)
            row(f"{name} | {kind}", result)


def inputs(num_trials: int) -> None:
    table("activation | inputs | score tensors", 5)
    for name in ("linear", "relu"):
        for distribution, true_scores in (
            ("student_t", False),
            ("student_t", True),
            ("gaussian_mixture", False),
            ("gaussian_mixture", True),
            ("uniform", False),
            ("rademacher", False),
        ):
            result = trials(
                name,
                1_000_000,
                num_trials,
                "generic",
                inputs=distribution,
                true_scores=true_scores,
                num_passes=5,
            )
            row(f"{name} | {distribution} | {'of the density' if true_scores else 'normal'}", result)


def settings(num_trials: int) -> None:
    table("activation | order | gates | norm | noise", 3)
    run = functools.partial(trials, num_samples=1_000_000, num_trials=num_trials)
    for name, order, gates, norm, known in (
        ("tanh", 3, "generic", 2.0, True),
        ("sigmoid", 3, "generic", 2.0, True),
        ("abs", 4, "generic", 2.0, True),
        ("softplus", 4, "generic", 2.0, True),
        ("linear", 3, "in span", 2.0, True),
        ("relu", 3, "in span", 2.0, True),
        ("linear", 3, "generic", 4.0, True),
        ("relu", 3, "generic", 4.0, True),
        ("linear", 3, "generic", 2.0, False),
        ("relu", 3, "generic", 2.0, False),
    ):
        result = run(name, gates=gates, norm=norm, order=order, noise_known=known)
        row(f"{name} | {order} | {gates} | {norm:g} | {'known' if known else 'estimated'}", result)


if __name__ == "__main__":
    studies = {f.__name__: f for f in (errors, variance, noise, kinds, inputs, settings)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=tuple(studies))
    parser.add_argument("--trials", type=int, default=12)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    studies[options.what](options.trials)
