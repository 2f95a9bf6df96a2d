"""Linear experts with a noise level each, against R's flexmix (Gruen and Leisch 2008), where R has it."""

import shutil
import subprocess

import compiled_model
import jax
import numpy as np
import pytest

import moejax

N, DIM, NUM_EXPERTS = 10_000, 3, 2
SCRIPT = """
suppressMessages(library(flexmix))
data <- read.csv("data.csv")
set.seed(1)
model <- flexmix(y ~ x1 + x2 + x3, data = data, k = 2, cluster = data$z, model = FLXMRglm(),
    concomitant = FLXPmultinom(~ x1 + x2 + x3), control = list(iter.max = 2000, tolerance = 1e-12, minprior = 0))
write.table(rbind(parameters(model), parameters(model, which = "concomitant")), "parameters.txt",
    row.names = FALSE, col.names = FALSE)
cat(format(as.numeric(logLik(model)), digits = 15))
"""


def has_flexmix() -> bool:
    if shutil.which("Rscript") is None:
        return False
    found = subprocess.run(["Rscript", "-e", "library(flexmix)"], check=False, capture_output=True)
    return found.returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("whole_search")
def test_likelihood_and_maximum_are_those_of_flexmix(tmp_path):
    if not has_flexmix():
        pytest.skip("R with the package flexmix is not installed")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, DIM))
    experts, biases, noise = np.array([[1.0, 0.5, 0.0], [-0.5, 1.0, 0.3]]), np.array([0.2, -0.4]), [0.2, 0.4]
    z = (rng.uniform(size=N) > 1.0 / (1.0 + np.exp(-(x @ [1.0, -1.0, 0.5] + 0.3)))).astype(int)
    y = np.sum(x * experts[z], axis=1) + biases[z] + np.asarray(noise)[z] * rng.normal(size=N)
    columns = np.column_stack([x, y, z + 1])
    np.savetxt(tmp_path / "data.csv", columns, delimiter=",", header="x1,x2,x3,y,z", comments="", fmt="%.17g")
    (tmp_path / "fit.R").write_text(SCRIPT)
    done = subprocess.run(["Rscript", "fit.R"], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    theirs = float(done.stdout)
    table = np.loadtxt(
        tmp_path / "parameters.txt"
    )  # bias, coefficients, sigma, bias and coefficients of gates
    params = moejax.MoEParams(table[1:4].T, table[6:9].T, table[4], table[0], table[5])
    with jax.enable_x64(True):
        assert abs(float(compiled_model.log_likelihood(params, x, y, "linear")) - theirs) < 1e-6 * N**0.5
        options = {"num_experts": NUM_EXPERTS, "noise": "per_expert", "fit_intercept": True}
        ours = moejax.fit(jax.random.key(0), x, y, method="spectral_em", **options)
    assert abs(ours.log_likelihood - theirs) < 0.05
