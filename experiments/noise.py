"""How does the error of each method depend on the noise level? All noise levels of a method and an activation share one program."""

from moejax.reproduce import Experiment, Number, estimates, line_figure

_LINEAR = "activation == 'linear'"


def figure(table):
    summary = estimates(table, ["activation", "noise_std"])
    n = int(table["num_samples"].iloc[0])
    return line_figure(
        summary,
        "noise_std",
        columns="activation",
        title=f"Recovery error against noise (d = 10, k = 3, n = {n})",
    )


EXPERIMENT = Experiment(
    part="a. Does it recover the truth, and at which rate?",
    place=3,
    spec="sweeps/noise.toml",
    quick={"trials": 10, "num_samples": 4000, "activation": ["linear"], "noise_std": [0.1, 0.4]},
    numbers={
        "moments_low": Number(f"{_LINEAR} and noise_std == 0.03 and method == 'spectral'"),
        "moments_high": Number(f"{_LINEAR} and noise_std == 0.8 and method == 'spectral'"),
        "polished_low": Number(f"{_LINEAR} and noise_std == 0.03 and method == 'spectral_em'"),
        "polished_high": Number(f"{_LINEAR} and noise_std == 0.8 and method == 'spectral_em'"),
    },
    shows=(
        "From σ = 0.03 to 0.8 the median error of the linear model goes from {polished_low} to {polished_high} for "
        "spectral_em, but only from {moments_low} to {moments_high} for moments alone, whose error comes from the other "
        "experts' labels."
    ),
    shows_not="It does not show unknown noise: σ is known to every method here.",
    figure=figure,
)
