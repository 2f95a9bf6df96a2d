"""How large are the errors if the inputs are not standard normal?"""

from moejax.reproduce import Experiment, Number, estimates, line_figure


def figure(table):
    n = int(table["num_samples"].iloc[0])
    return line_figure(
        estimates(table, ["activation", "input_distribution"]),
        "input_distribution",
        columns="activation",
        title=f"Recovery error by the inputs' distribution (d = 10, k = 3, n = {n}, σ = 0.1)",
    )


EXPERIMENT = Experiment(
    part="f. What are the assumptions worth?",
    place=1,
    spec="sweeps/input-distribution.toml",
    quick={
        "trials": 10,
        "num_samples": 4000,
        "activation": ["linear"],
        "input_distribution": ["standard_normal", "uniform"],
    },
    numbers={
        f"{method}_{inputs}": Number(
            f"activation == 'linear' and input_distribution == '{inputs}' and method == '{method}'"
        )
        for method in ("spectral", "spectral_em")
        for inputs in ("standard_normal", "rademacher", "correlated_normal")
    },
    shows=(
        "For linear experts the median error of moments alone is {spectral_standard_normal} with standard normal inputs, "
        "{spectral_rademacher} with Rademacher and {spectral_correlated_normal} with correlated normal ones; spectral_em "
        "has {spectral_em_standard_normal}, {spectral_em_rademacher} and {spectral_em_correlated_normal}."
    ),
    shows_not=(
        "It does not show whitened inputs: a trial gives every method the inputs as they are drawn, while `fit` whitens "
        "them."
    ),
    figure=figure,
)
