"""Other programs that fit mixtures of linear experts, on the same data, one after another: `python benchmarks/peers.py [DATA ...]`.

DATA: planted (d = 10, k = 3, n = 20,000, noise .3), small (d = 5, k = 2, n = 1,000), airfoil, concrete (k = 3; they need
MOEJAX_DATA_DIR or a download). Every expert has its own noise, as in R's flexmix, and gates have intercepts. Programs, where
installed:

- moejax: multistart (the default) and spectral_em, in a fresh process (with compilation) and again in that process, other keys;
- flexmix (R; Gruen and Leisch 2008): stepFlexmix with FLXMRglm and FLXPmultinom, 1 and 10 random starts, tolerance 1e-10;
- cgmm (PyPI): MixtureOfExpertsRegressor, 1 and 10 starts, tol 1e-8, gating_penalty 1e-6 (its default is 1e-2);
- scikit-learn: GaussianMixture on (x, y) with full covariances, 10 starts: its conditional density is a mixture of lines too, but
  the gates are those of Gaussian classes, which is a different model;
- NumPy: plain EM, weighted least squares and up to 5 Newton steps of softmax regression a pass, 1 and 10 random starts.

All may make 2,000 passes. Each runs on one thread (moejax too). Printed are seconds, their ratio to moejax' default fit when it is
warm, the log-likelihood of y given x, its difference from the best of the table, and the error E of the planted experts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "MOEJAX_CACHE_DIR": "",
}
SEEDS = 5
LONGEST = 120.0
"""Seconds of a peer after which no other key is tried."""


class Data(NamedTuple):
    """A sample, and the planted experts if there are any."""

    x: np.ndarray
    y: np.ndarray
    num_experts: int
    experts: np.ndarray | None


class Fitted(NamedTuple):
    """The end of a peer's fit."""

    seconds: float
    log_likelihood: float
    experts: np.ndarray | None


def planted(n: int, d: int, k: int, noise: float, seed: int = 0) -> Data:
    """Orthonormal experts, gates of norm 2 orthogonal to them."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(d, d)))[0].T
    x = random.normal(size=(n, d))
    logits = np.column_stack([x @ (2.0 * basis[k : 2 * k - 1]).T, np.zeros(n)])
    z = np.argmax(logits + random.gumbel(size=logits.shape), axis=1)
    return Data(x, np.sum(x * basis[z], axis=1) + noise * random.normal(size=n), k, basis[:k])


def data_of(name: str) -> Data:
    """The data by name, standardised."""
    if name == "planted":
        return planted(20_000, 10, 3, 0.3)
    if name == "small":
        return planted(1_000, 5, 2, 0.3)
    from moejax.fitting.datasets import load

    table = load(name)
    y = np.asarray(table.y, float)
    return Data((table.x - table.x.mean(0)) / table.x.std(0), (y - y.mean()) / y.std(), 3, None)


def conditional_log_likelihood(
    data: Data,
    experts: np.ndarray,
    biases: np.ndarray,
    noise: np.ndarray,
    gates: np.ndarray,
    gate_biases: np.ndarray,
) -> float:
    """The log-likelihood of y given x at some parameters, with scipy alone: every peer is judged by it."""
    log_prior = scipy.special.log_softmax(data.x @ gates.T + gate_biases, axis=1)
    densities = scipy.stats.norm.logpdf(data.y[:, None], data.x @ experts.T + biases, noise)
    return float(scipy.special.logsumexp(log_prior + densities, axis=1).sum())


OURS = """
import json, sys, time
import numpy as np
started = time.perf_counter()
import jax
jax.config.update("jax_enable_x64", True)
import moejax
with np.load(sys.argv[1]) as data:
    x, y = data["x"], data["y"]
method, k, seeds = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for seed in range(seeds):
    begun = time.perf_counter() if seed else started
    result = moejax.fit(jax.random.key(seed), x, y, num_experts=k, method=method, noise="per_expert", fit_intercept=True)
    print(json.dumps([time.perf_counter() - begun, result.log_likelihood, result.params.experts.tolist()]), flush=True)
"""


def ours(data: Data, method: str, folder: Path) -> list[Fitted]:
    """Fits in one fresh process, without a cache of programs: the first compiles."""
    np.savez(folder / "data.npz", x=data.x, y=data.y)
    command = [
        sys.executable,
        "-c",
        OURS,
        str(folder / "data.npz"),
        method,
        str(data.num_experts),
        str(SEEDS),
    ]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, check=True, capture_output=True, text=True)
    fits = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return [Fitted(seconds, value, np.asarray(experts)) for seconds, value, experts in fits]


FLEXMIX = """
suppressMessages(library(flexmix))
data <- read.csv("data.csv")
set.seed(SEED)
inputs <- setdiff(names(data), "y")
formula <- as.formula(paste("y ~", paste(inputs, collapse = " + ")))
gates <- as.formula(paste("~", paste(inputs, collapse = " + ")))
begun <- proc.time()[["elapsed"]]
model <- stepFlexmix(formula, data = data, k = EXPERTS, nrep = STARTS, verbose = FALSE, model = FLXMRglm(),
    concomitant = FLXPmultinom(gates), control = list(iter.max = 2000, tolerance = 1e-10, minprior = 0))
seconds <- proc.time()[["elapsed"]] - begun
write.table(parameters(model), "experts.txt", row.names = FALSE, col.names = FALSE)
write.table(parameters(model, which = "concomitant"), "gates.txt", row.names = FALSE, col.names = FALSE)
cat(seconds)
"""


def has_flexmix() -> bool:
    """True if R and its package are installed."""
    if shutil.which("Rscript") is None:
        return False
    return (
        subprocess.run(["Rscript", "-e", "library(flexmix)"], check=False, capture_output=True).returncode
        == 0
    )


def flexmix(data: Data, starts: int, seed: int, folder: Path) -> Fitted:
    """R's flexmix; seconds without the start of R and the reading of the file."""
    names = ",".join([*(f"x{j + 1}" for j in range(data.x.shape[1])), "y"])
    table = np.column_stack([data.x, data.y])
    np.savetxt(folder / "data.csv", table, delimiter=",", header=names, comments="", fmt="%.17g")
    script = FLEXMIX.replace("SEED", str(seed)).replace("EXPERTS", str(data.num_experts))
    (folder / "fit.R").write_text(script.replace("STARTS", str(starts)))
    done = subprocess.run(
        ["Rscript", "fit.R"],
        check=True,
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | ONE_THREAD,
    )
    experts, gates = (np.loadtxt(folder / name, ndmin=2) for name in ("experts.txt", "gates.txt"))
    biases, slopes, noise = experts[0], experts[1:-1].T, experts[-1]
    value = conditional_log_likelihood(data, slopes, biases, noise, gates[1:].T, gates[0])
    return Fitted(float(done.stdout.split()[-1]), value, slopes)


def cgmm(data: Data, starts: int, seed: int, folder: Path) -> Fitted:
    """The mixture of experts of cgmm."""
    del folder
    from cgmm import MixtureOfExpertsRegressor

    model = MixtureOfExpertsRegressor(
        data.num_experts, n_init=starts, max_iter=2000, tol=1e-8, gating_penalty=1e-6, random_state=seed
    )
    begun = time.perf_counter()
    model.fit(data.x, data.y)
    seconds = time.perf_counter() - begun
    value = float(np.sum(model.log_prob(data.x, data.y)))
    slopes = getattr(model, "A_", None)
    return Fitted(seconds, value, None if slopes is None else np.asarray(slopes)[:, 0, :])


def gaussian_mixture(data: Data, starts: int, seed: int, folder: Path) -> Fitted:
    """scikit-learn's GaussianMixture on (x, y)."""
    del folder
    from sklearn.mixture import GaussianMixture

    together = np.column_stack([data.x, data.y])
    begun = time.perf_counter()
    model = GaussianMixture(data.num_experts, n_init=starts, max_iter=2000, tol=1e-6, random_state=seed)
    model.fit(together)
    seconds = time.perf_counter() - begun
    marginal = GaussianMixture(data.num_experts)
    d = data.x.shape[1]
    marginal.weights_, marginal.means_ = model.weights_, model.means_[:, :d]
    marginal.covariances_ = model.covariances_[:, :d, :d]
    marginal.precisions_cholesky_ = np.stack(
        [np.linalg.cholesky(np.linalg.inv(covariance)) for covariance in marginal.covariances_]
    )
    value = float(model.score_samples(together).sum() - marginal.score_samples(data.x).sum())
    slopes = np.stack([np.linalg.solve(c[:d, :d], c[:d, d]) for c in model.covariances_])
    return Fitted(seconds, value, slopes)


def plain_em(data: Data, starts: int, seed: int, folder: Path) -> Fitted:
    """The best of some random starts of `one_em`."""
    del folder
    random = np.random.default_rng(seed)
    begun = time.perf_counter()
    best = max((one_em(data, random) for _ in range(starts)), key=lambda fit: fit[0])
    return Fitted(time.perf_counter() - begun, conditional_log_likelihood(data, *best[1:]), best[1])


def one_em(data: Data, random: np.random.Generator) -> tuple[float, Any, Any, Any, Any, Any]:
    """EM from experts uniform on the unit sphere, zero gates: log-likelihood, experts, biases, noise, gates, their biases."""
    n, d = data.x.shape
    k = data.num_experts
    design = np.column_stack([data.x, np.ones(n)])
    experts = random.normal(size=(k, d))
    rows = np.column_stack([experts / np.linalg.norm(experts, axis=1, keepdims=True), np.zeros(k)])
    gates, noise, before = np.zeros((k, d + 1)), np.full(k, data.y.std()), -np.inf
    value = before
    for _ in range(2000):
        log_prior = scipy.special.log_softmax(design @ gates.T, axis=1)
        error = data.y[:, None] - design @ rows.T
        joint = log_prior - 0.5 * (error / noise) ** 2 - np.log(noise) - 0.5 * np.log(2 * np.pi)
        evidence = scipy.special.logsumexp(joint, axis=1)
        value = float(evidence.sum())
        if not value - before > 1e-8 * abs(value):
            break
        before, r = value, np.exp(joint - evidence[:, None])
        for i in range(k):
            weighted = design * r[:, i : i + 1]
            rows[i] = np.linalg.lstsq(
                weighted.T @ design + 1e-10 * np.eye(d + 1), weighted.T @ data.y, rcond=None
            )[0]
        error = data.y[:, None] - design @ rows.T
        noise = np.maximum(np.sqrt(np.sum(r * error**2, axis=0) / r.sum(axis=0)), 1e-6)
        for _ in range(5):
            p = scipy.special.softmax(design @ gates.T, axis=1)
            gradient = ((r - p)[:, :-1].T @ design).reshape(-1)
            hessian = np.zeros(((k - 1), d + 1, (k - 1), d + 1))
            for i in range(k - 1):
                for j in range(k - 1):
                    hessian[i, :, j] = (design * (p[:, i] * ((i == j) - p[:, j]))[:, None]).T @ design
            size = (k - 1) * (d + 1)
            step = np.linalg.solve(hessian.reshape(size, size) + 1e-6 * np.eye(size), gradient)
            gates[:-1] += step.reshape(k - 1, d + 1)
            if gradient @ step < 1e-6:
                break
    return value, rows[:, :d], rows[:, d], noise, gates[:, :d], gates[:, d]


PEERS: tuple[tuple[str, Callable[..., Fitted], int], ...] = (
    ("flexmix, 1 start", flexmix, 1),
    ("flexmix, 10 starts", flexmix, 10),
    ("cgmm, 1 start", cgmm, 1),
    ("cgmm, 10 starts", cgmm, 10),
    ("GaussianMixture, 10 starts", gaussian_mixture, 10),
    ("NumPy EM, 1 start", plain_em, 1),
    ("NumPy EM, 10 starts", plain_em, 10),
)


def installed(peer: Callable[..., Fitted]) -> bool:
    """True if what a peer needs is there."""
    if peer is flexmix:
        return has_flexmix()
    return peer is not cgmm or importlib.util.find_spec("cgmm") is not None


def rows_of(data: Data, folder: Path) -> list[tuple[str, list[Fitted]]]:
    """(name, fits of several keys) of every program that is installed."""
    found: list[tuple[str, list[Fitted]]] = []
    for method in ("multistart", "spectral_em"):
        first, *later = ours(data, method, folder)
        found += [(f"moejax {method}, again", later), (f"moejax {method}, first", [first])]
    before: Callable[..., Fitted] | None = None
    for name, peer, starts in PEERS:
        if not installed(peer):
            print(f"{name}: not installed", flush=True)
            continue
        expected = starts * np.median([fit.seconds for fit in found[-1][1]]) if starts > 1 else 0.0
        if peer is before and expected > LONGEST:
            print(f"{name}: not run, {expected:.0f} s a key", flush=True)
            continue
        before, fits = peer, []
        for seed in range(SEEDS):
            if sum(fit.seconds for fit in fits) < LONGEST:
                fits.append(peer(data, starts, seed, folder))
        found.append((name, fits))
    return found


def main() -> None:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="*", default=["planted", "small", "airfoil", "concrete"])
    for name in parser.parse_args().data:
        data = data_of(name)
        n, d = data.x.shape
        print(f"\n{name}: n = {n}, d = {d}, k = {data.num_experts}; medians over {SEEDS} keys\n")
        with tempfile.TemporaryDirectory() as scratch:
            found = rows_of(data, Path(scratch))
        unit = np.median([fit.seconds for fit in found[0][1]])
        best = max(fit.log_likelihood for _, fits in found for fit in fits)
        columns = "program | keys | seconds | over the default fit, warm | log-likelihood | below the best: median | least | most"
        print(f"| {columns} |" + (" error E |" if data.experts is not None else ""))
        print("|" + "---|" * (8 + (data.experts is not None)))
        for program, fits in found:
            seconds = float(np.median([fit.seconds for fit in fits]))
            gaps = np.array([best - fit.log_likelihood for fit in fits])
            line = (
                f"| {program} | {len(fits)} | {seconds:.2f} | {seconds / unit:.1f} | {best - np.median(gaps):.2f} "
                f"| {np.median(gaps):.2f} | {gaps.min():.2f} | {gaps.max():.2f} |"
            )
            if data.experts is not None:
                line += f" {_error(data.experts, fits)} |"
            print(line, flush=True)


def _error(experts: np.ndarray, fits: list[Fitted]) -> str:
    from moejax import recovery_error

    errors = [float(recovery_error(experts, fit.experts)) for fit in fits if fit.experts is not None]
    return f"{np.median(errors):.1e}" if errors else ""


if __name__ == "__main__":
    os.environ.update({name: value for name, value in ONE_THREAD.items() if name not in os.environ})
    main()
