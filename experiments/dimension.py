"""How does the error grow with the dimension, at a fixed number of samples?"""

from moejax.reproduce import Experiment, Number, estimates, line_figure


def figure(table):
    n = int(table["num_samples"].iloc[0])
    return line_figure(
        estimates(table, ["activation", "dim"]),
        "dim",
        columns="activation",
        title=f"Recovery error against dimension (k = 3, n = {n}, σ = 0.1)",
    )


EXPERIMENT = Experiment(
    part="a. Does it recover the truth, and at which rate?",
    place=2,
    spec="sweeps/dimension.toml",
    quick={"trials": 10, "num_samples": 4000, "activation": ["linear"], "dim": [6, 10]},
    numbers={
        f"{method}_{dim}": Number(f"activation == 'relu' and dim == {dim} and method == '{method}'")
        for method in ("spectral", "spectral_em", "joint_em")
        for dim in (6, 40)
    },
    shows=(
        "For relu the median error goes from {spectral_6} at d = 6 to {spectral_40} at d = 40 for moments alone, from "
        "{spectral_em_6} to {spectral_em_40} for spectral_em and from {joint_em_6} to {joint_em_40} for joint EM from one"
        " random start."
    ),
    shows_not="It does not show samples that grow with d; the map of regimes does.",
    figure=figure,
)
