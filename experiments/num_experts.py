"""At how many experts do random starts begin to miss some of them?"""

from moejax.reproduce import Experiment, Number, estimates, line_figure


def figure(table):
    n, d = int(table["num_samples"].iloc[0]), int(table["dim"].iloc[0])
    return line_figure(
        estimates(table, ["activation", "num_experts"]),
        "num_experts",
        columns="activation",
        quantity="success_rate",
        title=f"Success against the number of experts (d = {d}, n = {n}, σ = 0.1)",
    )


EXPERIMENT = Experiment(
    part="b. Where do random starts fail, and where do they not?",
    place=3,
    spec="sweeps/num-experts.toml",
    quick={"trials": 10, "dim": 10, "num_samples": 4000, "activation": ["linear"], "num_experts": [2, 3]},
    numbers={
        f"{method}_{activation}": Number(
            f"activation == '{activation}' and num_experts == 8 and method == '{method}'",
            statistic="success_rate",
        )
        for method in ("spectral", "spectral_em", "joint_em")
        for activation in ("linear", "tanh")
    },
    shows=(
        "With k = 8 experts in d = 20 dimensions the shares of successful trials are {joint_em_linear} (linear) and "
        "{joint_em_tanh} (tanh) for joint EM from one random start, {spectral_em_linear} and {spectral_em_tanh} for "
        "spectral_em, and {spectral_linear} and {spectral_tanh} for moments alone."
    ),
    shows_not=(
        "It does not show the effect of more random starts, nor of more than the hundred passes that each method has "
        "here; the experiment restarts does."
    ),
    figure=figure,
)
