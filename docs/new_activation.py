"""A new activation, from its definition to its sample-size figure.

    python docs/new_activation.py [--quick] [--out FOLDER]

The activation is one function; registering it is one line. This file is also its own plugin: the workers of the sweep run it to
learn the name, as `moejax sweep SPEC.toml --plugin docs/new_activation.py` would. To try your own, change `soft_threshold`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp

import moejax

NAME = "soft_threshold"


def soft_threshold(t):
    """sign(t) max(|t| - 1/2, 0): it has two kinks, and is flat between them."""
    return jnp.sign(t) * jnp.maximum(jnp.abs(t) - 0.5, 0.0)


moejax.register_activation(NAME, soft_threshold)

SPEC = {
    "name": "new-activation",
    "methods": ["spectral", "spectral_em"],
    "trials": 40,
    "pad_samples_to": [32768],
    "activation": NAME,
    "dim": 10,
    "num_experts": 3,
    "noise_std": 0.1,
    "grid": {"num_samples": [1000, 2000, 4000, 8000, 16000, 32000]},
}
QUICK = {"trials": 10, "num_samples": [2400, 4000], "pad_samples_to": [4096]}


def main() -> None:
    """Run the sweep, and draw the figure of its errors."""
    from moejax.cli.activations import activation_rows, print_activation_rows
    from moejax.sweep.report.figures import line_figure
    from moejax.sweep.report.summary import estimates

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/new-activation"))
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()

    # 1. Which label transforms it has, which order of tensor to decompose, and what each costs
    print_activation_rows(activation_rows(NAME, 0.1))

    # 2. The sweep; the same command again resumes it
    table = moejax.sweep.run(
        SPEC,
        out=options.out,
        overrides=QUICK if options.quick else {},
        plugins=[__file__],
        workers=options.workers,
        quiet=False,
    )

    # 3. The figure
    figure = line_figure(
        estimates(table, ["num_samples"]),
        "num_samples",
        title=f"Recovery error of {NAME} (d = 10, k = 3, σ = 0.1)",
    )
    figure.savefig(options.out / "sample_size.png", dpi=150)
    print(f"written: {options.out / 'sample_size.png'}")


if __name__ == "__main__":
    main()
