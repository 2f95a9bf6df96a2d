"""Does a default fit ever hang? New processes with two threads, one after another, make many default fits of random problems.

Two batched LAPACK calls at once can take both threads of XLA's pool on a CPU with two cores and wait for each other for ever; this
made fits hang sometimes. Every process draws its problems from its own seed: k = 2 to 4 experts of d = 3 inputs, with
intercepts, n = 300, linear with shared noise or tanh with a noise for each. A fit that takes longer than the limit is a hang: its
process is ended, and its stack is printed. The processes share a folder of compiled programs, so that only the first of a kind
compiles.

It prints the numbers of fits, of hangs and of fits whose parameters are not finite, and the times of all fits, compilation
included.

    python benchmarks/stress.py [--processes 20] [--fits 20] [--limit 120]
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

NUM_SAMPLES = 300
KINDS = [(k, *kind) for k in (2, 3, 4) for kind in (("linear", "shared"), ("tanh", "per_expert"))]


def fits_of_one_process(seed: int, count: int, limit: float, cache: str) -> None:
    """Print a line for every fit: its seconds, and whether its parameters are finite."""
    import jax

    import moejax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    rng = np.random.default_rng(seed)
    for index in range(count):
        k, activation, noise = KINDS[int(rng.integers(len(KINDS)))]
        x = rng.normal(size=(NUM_SAMPLES, 3))
        experts, gates = rng.normal(size=(2, k, 3))
        first = np.argmax(x @ gates.T + rng.gumbel(size=(NUM_SAMPLES, k)), axis=1)
        means = np.sum(x * experts[first], axis=1)
        y = (np.tanh(means) if activation == "tanh" else means) + 0.2 * rng.normal(size=NUM_SAMPLES)
        faulthandler.dump_traceback_later(limit, exit=True)
        begin = time.perf_counter()
        fitted = moejax.fit(
            jax.random.key(index), x, y, num_experts=k, activation=activation, noise=noise, fit_intercept=True
        )
        seconds = time.perf_counter() - begin
        faulthandler.cancel_dump_traceback_later()
        finite = all(np.isfinite(leaf).all() for leaf in fitted.params)
        print(f"{seconds} {int(finite)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--fits", type=int, default=20)
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds for a fit, its compilation included"
    )
    parser.add_argument("--seed", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--cache", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is not None:
        fits_of_one_process(options.seed, options.fits, options.limit, options.cache)
        return
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        sys.exit("expected two processors: with one thread nothing can wait for another")
    seconds, made, hangs, infinite = [], 0, 0, 0
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(options.processes):
            command = [sys.executable, __file__, "--seed", str(seed), "--cache", cache]
            command += ["--fits", str(options.fits), "--limit", str(options.limit)]
            done = subprocess.run(
                command,
                env=environment,
                check=False,
                capture_output=True,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cpus),
            )
            lines = [line.split() for line in done.stdout.splitlines()]
            made += len(lines)
            seconds += [float(taken) for taken, _ in lines]
            infinite += sum(finite == "0" for _, finite in lines)
            if len(lines) < options.fits:
                hung = "Timeout" in done.stderr
                hangs += hung
                print(
                    f"process {seed}: {'hung' if hung else 'ended'} in fit {len(lines) + 1}\n{done.stderr}",
                    flush=True,
                )
            print(
                f"process {seed}: {len(lines)} fits, {sum(float(taken) for taken, _ in lines):.0f} s",
                flush=True,
            )
    planned = options.processes * options.fits
    typical = np.percentile(seconds, [50, 90, 100]) if seconds else np.full(3, np.nan)
    print(
        f"{options.processes} processes, {made} of {planned} fits made, {hangs} hung, {infinite} with parameters not finite; "
        f"seconds of a fit: median {typical[0]:.2f}, 90% {typical[1]:.2f}, longest {typical[2]:.1f} (limit {options.limit:g}); "
        f"{time.perf_counter() - begin:.0f} s in all"
    )
    sys.exit(0 if made == planned and not infinite else 1)


if __name__ == "__main__":
    main()
