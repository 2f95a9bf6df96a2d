"""How fast does each method improve with the sample size, for counts, positive labels, proportions and heavy tails?"""

import numpy as np
import pandas as pd
import scipy.stats

from moejax.reproduce import Experiment, Number, estimates, line_figure

_TOLD = ("poisson", "binomial(10)", "gamma", "student_t(3)")
_PLAIN = str.maketrans("()", "__")


def summary(table):
    """Least squares of log error on log n over trials, for each family and method: slope and its standard error."""
    rows = []
    for (family, method), part in table[table["recovery_error"] > 0].groupby(
        ["family", "method"], sort=False
    ):
        fit = scipy.stats.linregress(np.log(part["num_samples"]), np.log(part["recovery_error"]))
        rows.append((family, method, fit.slope, fit.stderr, len(part)))
    return pd.DataFrame(rows, columns=["family", "method", "slope", "slope_se", "trials"])


def figure(table):
    return line_figure(
        estimates(table, ["family", "num_samples"]),
        "num_samples",
        columns="family",
        wrap=4,
        title="Recovery error against sample size for labels of each kind (d = 10, k = 3)",
    )


EXPERIMENT = Experiment(
    part="d. Labels of any kind",
    spec="sweeps/channels.toml",
    quick={
        "trials": 6,
        "family": ["poisson"],
        "noise_std": [1.0],
        "expert_bias": [0.0],
        "num_samples": [2000, 4000],
        "methods": ["spectral_em"],
    },
    numbers={
        f"{method}_{family.translate(_PLAIN)}": Number(
            f"family == '{family}' and method == '{method}'", "slope", "value", "summary.csv", "slope_se"
        )
        for method in ("spectral", "spectral_em")
        for family in _TOLD
    },
    shows=(
        "The slope of log error in log n is {spectral_poisson} (Poisson counts), {spectral_binomial_10_} (successes of "
        "ten), {spectral_gamma} (gamma) and {spectral_student_t_3_} (Student's t, three degrees of freedom) for moments "
        "alone and {spectral_em_poisson}, {spectral_em_binomial_10_}, {spectral_em_gamma} and {spectral_em_student_t_3_} "
        "for spectral_em, with norm, intercept and dispersion estimated from the labels: the rate 1/n is a slope of "
        "minus one, and a steeper slope means that the smallest samples are worse than their rate."
    ),
    shows_not=(
        "It does not show experts of different norms or intercepts, for which moments are a start only, nor labels of "
        "two or three values, which have no moments of this kind."
    ),
    figure=figure,
    summary=summary,
)
