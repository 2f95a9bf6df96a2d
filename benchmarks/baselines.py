"""Every method on the same instances: success rate, errors, passes over the data, seconds.

float32, known noise, gates of norm 1 orthogonal to the experts, the trials of `moejax.sweep.trial`. A pass reads every
sample once, for gradient descent and for EM (whose pass also makes Gram matrices, and costs more). The passes of pilots, moments
and all starts are counted.

    python benchmarks/baselines.py [--trials 20] [--methods joint_em gradient_nll ..] [--num-starts 1] [--settings 0 1 2]
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from moejax.methods import STARTS, method_names
from moejax.model import SUCCESS_THRESHOLD
from moejax.sweep.trial.prepare import prepare
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings
from moejax.sweep.trial.trial import run_trials

SETTINGS = (
    DataSettings(activation="linear", dim=10, num_experts=3, num_samples=10_000, noise_std=0.1),
    DataSettings(activation="tanh", dim=10, num_experts=3, num_samples=10_000, noise_std=0.1),
    DataSettings(activation="tanh", dim=20, num_experts=6, num_samples=20_000, noise_std=0.05),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--num-starts", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=method_names(), default=method_names())
    parser.add_argument("--settings", nargs="*", type=int, default=range(len(SETTINGS)))
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), options.trials)
    print(
        f"| setting | method | E < {SUCCESS_THRESHOLD:g} | median E | median gating error | mean passes | seconds a trial |"
    )
    print("|---|---|---|---|---|---|---|")
    for data in (SETTINGS[index] for index in options.settings):
        for method in options.methods:
            for start in STARTS if method == "joint_em" else STARTS[:1]:
                algorithm = AlgorithmSettings(method=method, start=start, num_starts=options.num_starts)
                spec, hyperparameters = prepare(data, algorithm)
                hyperparameters = jax.tree.map(
                    lambda leaf: np.stack([leaf] * options.trials), hyperparameters
                )
                jax.block_until_ready(run_trials(keys, hyperparameters, spec))  # compiles
                started = time.perf_counter()
                result = jax.block_until_ready(run_trials(keys, hyperparameters, spec))
                seconds = (time.perf_counter() - started) / options.trials
                error = np.asarray(result.recovery_error)
                name = f"{method} ({start})" if method == "joint_em" else method
                print(
                    f"| {data.activation}, d={data.dim}, k={data.num_experts}, n={data.num_samples}, "
                    f"σ={data.noise_std:g} | {name} | {np.mean(error < SUCCESS_THRESHOLD):.2f} "
                    f"| {np.median(error):.1e} | {np.median(result.gating_error):.3f} "
                    f"| {np.mean(result.num_iterations):.0f} | {seconds:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
