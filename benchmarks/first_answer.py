"""How long does the first fit of a process take, and the second one? `python benchmarks/first_answer.py`.

Each shape is fitted in a process of its own, without a cache of programs, three times by default or by "spectral_em", with three
keys. Printed are processor seconds (all threads), the programs compiled, and the seconds over those that the same process
takes to compile a reference program, so that machines compare. The reference is a Newton iteration on a logistic regression with
ten inputs. Aims: at most 6 seconds and 8 programs for the first fit; the second in at most twice the time of "spectral_em".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

SHAPES = {
    "linear, d = 10, k = 3, n = 20,000": ("linear", 10, 3, 20_000),
    "relu, d = 5, k = 2, n = 2,000": ("relu", 5, 2, 2_000),
    "tanh, d = 20, k = 5, n = 50,000": ("tanh", 20, 5, 50_000),
}
METHODS = ("multistart", "spectral_em")


def reference_seconds() -> float:
    """Processor seconds to compile the reference program."""
    import jax
    import jax.numpy as jnp

    def fit(x, y):
        def step(w, _):
            p = jax.nn.sigmoid(x @ w)
            information = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * jnp.eye(x.shape[1])
            return w + jnp.linalg.solve(information, x.T @ (y - p)), jnp.sum((y - p) ** 2)

        return jax.lax.scan(step, jnp.zeros(x.shape[1]), length=20)

    lowered = jax.jit(fit).lower(jnp.zeros((1000, 10)), jnp.zeros(1000))
    begin = time.process_time()
    lowered.compile()
    return time.process_time() - begin


def measure(activation: str, dim: int, num_experts: int, num_samples: int, method: str) -> dict[str, float]:
    """Processor seconds, seconds of wall time, programs and errors of three fits in this process."""
    import jax
    import numpy as np

    import moejax

    reference = reference_seconds()
    axes = np.eye(dim)
    gates = np.zeros((num_experts, dim))
    gates[:-1] = 2.0 * axes[num_experts : 2 * num_experts - 1]
    truth = moejax.make_params(axes[:num_experts], gates, 0.1)
    x, y, _ = moejax.sample(jax.random.key(0), truth, activation, num_samples)
    x, y = np.asarray(x), np.asarray(y)
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: programs.append(name) if name.endswith("backend_compile_duration") else None
    )
    row: dict[str, float] = {"reference": reference}
    for name, seed in (("first", 1), ("second", 2), ("third", 3)):
        programs.clear()
        processor, wall = time.process_time(), time.perf_counter()
        result = moejax.fit(
            jax.random.key(seed), x, y, num_experts=num_experts, activation=activation, method=method
        )
        row |= {
            name: time.process_time() - processor,
            f"{name} wall": time.perf_counter() - wall,
            f"{name} programs": len(programs),
            f"{name} error": float(moejax.recovery_error(truth.experts, result.params.experts)),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape:
        activation, *numbers = options.shape
        print(json.dumps(measure(activation, *map(int, numbers), options.method)))
        return
    columns = "shape | method | first, s | programs | over reference | second, s | third, s (wall) | programs"
    print(f"| {columns} | error E |\n|" + "---|" * 9)
    for name, shape in SHAPES.items():
        for method in METHODS:
            command = [sys.executable, __file__, "--method", method, "--shape", *map(str, shape)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"| {name} | {method} | {row['first']:.1f} | {row['first programs']} | "
                f"{row['first'] / row['reference']:.0f} | {row['second']:.2f} | {row['third']:.2f} "
                f"({row['third wall']:.2f}) | {row['third programs']} | {row['third error']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
