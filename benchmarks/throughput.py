"""Trials a second of a sweep, with one process and with two: `python benchmarks/throughput.py [--stages] [ACTIVATION ...]`.

Complete `spectral_em` trials (sample, moments, tensor power, gating EM, polish, metrics) at d=10, k=3, n=10^4, sigma=0.1, in
float32, through the command line. The steady state is from the end of each worker's first chunk, which compiles,
to the end of its last but one. Aim: 100 trials a second on two cores, 85% of it inside the compiled program.

With --stages, it prints the processor milliseconds of each stage of such a trial, the passes of stages that go over the data, and
the ratio of the whole trial to its first stage, in which it draws its sample. Each stage is a program of its own, which is given
the result of the stage before; the process has one thread and a worker's settings. A number is the mean over trials of the median
over repetitions. The stages add up to more than the whole trial, which transposes the sample only once. Aim: a ratio of 4 for
linear and of 7 for relu.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd

from moejax.environment import PRNG, use_single_thread
from moejax.methods import Problem, em_before_polish, finish, polish_from, zero_gates
from moejax.model.small_linear_algebra import eigh
from moejax.moments.cross_moments import second_moment, whitened_moment
from moejax.moments.spectral import spectral_estimate, transformed_labels
from moejax.moments.tensor_power import tensor_power_method
from moejax.sweep import load, load_timings, trial
from moejax.sweep.execution.worker import configure
from moejax.sweep.plan.chunks import WorkerSettings

SPEC = """
name = "throughput"
methods = ["spectral_em"]
trials = {trials}
activation = "{activation}"
dim = 10
num_experts = 3
num_samples = 10000
noise_std = 0.1
"""


def steady_state(timings: pd.DataFrame) -> tuple[float, float]:
    """(trials a second, share of the wall time inside the compiled program), added up over the processes."""
    chunks = timings.groupby(["chunk", "process"], as_index=False).agg(
        trials=("trial", "size"),
        started=("started", "first"),
        wall=("wall_seconds", "first"),
        execute=("execute_seconds", "first"),
    )
    rate = inside = window = 0.0
    for _, own in chunks.sort_values("started").groupby("process"):
        begin = own["started"].iloc[0] + own["wall"].iloc[0]
        inner = own.iloc[1:-1]
        span = (inner["started"] + inner["wall"]).max() - begin
        rate += inner["trials"].sum() / span
        inside += inner["execute"].sum()
        window += span
    return rate, inside / window


def start(
    folder: Path, activation: str, trials: int, workers: int, cache: Path
) -> tuple[subprocess.Popen, Path]:
    """Start one sweep; returns its process, and the folder of its rows."""
    spec = folder / f"{activation}-{workers}-{time.monotonic_ns()}.toml"
    spec.write_text(SPEC.format(activation=activation, trials=trials))
    out = spec.with_suffix("")
    command = [sys.executable, "-m", "moejax.cli", "sweep", str(spec), "--out", str(out)]
    command += ["--workers", str(workers), "--quiet"]
    environment = os.environ | {"MOEJAX_CACHE_DIR": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL), out


def sweep(*arguments: Any, side_by_side: int = 1) -> tuple[float, float]:
    """Run equal sweeps at the same time and print a line each; returns the sum of the rates, and the last's compile seconds."""
    total = compile_seconds = 0.0
    for process, out in [start(*arguments) for _ in range(side_by_side)]:
        if process.wait() != 0:
            raise SystemExit(f"the sweep of {out.name} ended with status {process.returncode}")
        table, timings = load(out), load_timings(out)
        rate, inside = steady_state(timings)
        total += rate
        compile_seconds = timings.groupby("chunk")["compile_seconds"].first().sum()
        good = (table["recovery_error"] < 1e-3).mean()
        _, activation, _, workers, _ = arguments
        print(
            f"{activation:10s} {workers} worker{'s' if workers > 1 else ' '}  {rate:6.1f} trials/s  "
            f"{100 * inside:3.0f}% inside the program  E < 1e-3 in {100 * good:.1f}% of {len(table)}  "
            f"compile {compile_seconds:.1f} s",
            flush=True,
        )
    return total, compile_seconds


NUM_TRIALS, NUM_REPEATS = 16, 25


def program_of(stage: Callable[..., Any]) -> Callable[..., Any]:
    """The stage as a compiled program, with the products of a trial."""

    def at_highest_precision(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return stage(*arguments)

    return jax.jit(at_highest_precision)


def timed(program: Callable[..., Any], calls: list[tuple[Any, ...]]) -> tuple[float, list[Any]]:
    """Processor milliseconds of a call (mean over the calls of the median over repetitions), and the results."""
    results = [jax.block_until_ready(program(*arguments)) for arguments in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(NUM_REPEATS):
        for arguments, its_seconds in zip(calls, seconds, strict=True):
            begin = time.process_time()
            jax.block_until_ready(program(*arguments))
            its_seconds.append(time.process_time() - begin)
    return 1e3 * statistics.mean(map(statistics.median, seconds)), results


def stages_of_trial(activation: str) -> Iterator[tuple[str, float, float | None]]:
    """(stage, processor milliseconds, mean passes over the data or None) of every stage, then of the whole trial."""
    data = trial.DataSettings(activation=activation, dim=10, num_experts=3, num_samples=10_000, noise_std=0.1)
    spec, hyperparameters = trial.prepare(data, trial.AlgorithmSettings(method="spectral_em"))
    hyperparameters = jax.tree.map(jnp.asarray, hyperparameters)
    _, config = trial.posed(
        trial.draw_trial(jax.random.key(0, impl=PRNG), hyperparameters, spec=spec), hyperparameters, spec=spec
    )
    k, order = config.num_experts, config.order
    sizes = {"num_experts": k, "order": order}
    keys = jax.random.split(jax.random.key(1, impl=PRNG), NUM_TRIALS)

    def moments(problem: Problem, labels: Any) -> jax.Array:
        values, vectors = eigh(second_moment(problem.x, labels.second, problem.weights))
        whitening = vectors[:, -k:] / jnp.sqrt(jnp.maximum(values[-k:], 1e-3))[None]
        return whitened_moment(problem.x, labels.high, whitening, problem.weights, order=order)

    def start(key: jax.Array, problem: Problem) -> Any:
        x, y, weights, noise_std, transforms, _ = problem
        estimate = spectral_estimate(key, x, y, transforms, weights, **sizes)
        return zero_gates(estimate.experts, noise_std)

    def metrics(drawn: Any, problem: Problem, run: Any) -> Any:
        fitted = finish(run.params, run.history, run.num_steps, run.converged, problem, None)
        return trial.measured(drawn, fitted, hyperparameters, spec=spec)

    def passes(runs: list[Any]) -> float:
        return statistics.mean(int(run.num_steps) for run in runs)

    draw = program_of(lambda key: trial.draw_trial(key, hyperparameters, spec=spec))
    milliseconds, drawn = timed(draw, [(key,) for key in keys])
    yield "sampling", milliseconds, None
    problems = [trial.posed(one, hyperparameters, spec=spec)[0] for one in drawn]
    transform = program_of(lambda problem: transformed_labels(problem.transforms, problem.y))
    milliseconds, labels = timed(transform, [(problem,) for problem in problems])
    yield "transforms", milliseconds, None
    milliseconds, tensors = timed(program_of(moments), list(zip(problems, labels, strict=True)))
    yield "moments", milliseconds, 2
    milliseconds, _ = timed(program_of(tensor_power_method), list(zip(keys, tensors, strict=True)))
    yield "power", milliseconds, None
    starts = [
        program_of(start)(one.method_key, problem) for one, problem in zip(drawn, problems, strict=True)
    ]
    climb = program_of(lambda params, problem: em_before_polish(params, problem, config))
    milliseconds, runs = timed(climb, list(zip(starts, problems, strict=True)))
    yield "EM", milliseconds, passes(runs)
    polish = program_of(lambda run, problem: polish_from(run.params, problem, config))
    milliseconds, runs = timed(polish, list(zip(runs, problems, strict=True)))
    yield "polish", milliseconds, passes(runs)
    milliseconds, _ = timed(program_of(metrics), list(zip(drawn, problems, runs, strict=True)))
    yield "metrics", milliseconds, None
    whole = program_of(lambda key: trial.run_trial(key, hyperparameters, spec=spec))
    milliseconds, results = timed(whole, [(key,) for key in keys])
    yield "whole trial", milliseconds, statistics.mean(int(result.num_iterations) for result in results)


def print_stages(activation: str) -> None:
    """Print the table of stages of one activation."""
    drawing = whole = 0.0
    print(f"\n| {activation} | ms | passes |\n|---|---|---|")
    for name, whole, passes in stages_of_trial(activation):
        drawing = drawing or whole
        print(f"| {name} | {whole:.2f} | {'' if passes is None else f'{passes:.1f}'} |", flush=True)
    print(f"| whole trial / sampling | {whole / drawing:.1f} | |", flush=True)


def main() -> None:
    """Time sweeps, or the stages of a trial."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("activations", nargs="*", default=["linear", "tanh", "relu"])
    parser.add_argument("--stages", action="store_true", help="time the stages of a trial instead")
    options = parser.parse_args()
    if options.stages:
        use_single_thread()
        configure(WorkerSettings(enable_x64=False, compilation_cache_dir=None))
    for activation in options.activations:
        if options.stages:
            print_stages(activation)
        else:
            print_sweeps(activation)


def print_sweeps(activation: str) -> None:
    """Time one worker with a cold cache, one with a warm one, two workers, then two independent sweeps."""
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "cache"
        _, cold = sweep(folder, activation, 1000, 1, cache)
        one, warm = sweep(folder, activation, 1000, 1, cache)
        two, _ = sweep(folder, activation, 2000, 2, cache)
        apart, _ = sweep(folder, activation, 1000, 1, cache, side_by_side=2)
        print(
            f"{activation:10s} two workers / one: {two / one:.2f}x; two sweeps side by side / one (the machine's own limit): "
            f"{apart / one:.2f}x; compile {cold:.1f} s cold, {warm:.1f} s from the cache"
        )


if __name__ == "__main__":
    main()
