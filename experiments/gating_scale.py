"""How large are the errors if the gates are steep, or not orthogonal to the experts?"""

from moejax.reproduce import Experiment, Number, estimates, line_figure

_STEEP = "activation == 'linear' and gating_norm == 4"


def figure(table):
    n = int(table["num_samples"].iloc[0])
    return line_figure(
        estimates(table, ["activation", "gating_angle", "gating_norm"]),
        "gating_norm",
        columns="gating_angle",
        rows="activation",
        title=f"Recovery error against the gates' norm and angle (d = 10, k = 3, n = {n}, σ = 0.1)",
    )


EXPERIMENT = Experiment(
    part="f. What are the assumptions worth?",
    spec="sweeps/gating-scale.toml",
    quick={
        "trials": 10,
        "num_samples": 4000,
        "activation": ["linear"],
        "gating_angle": [90.0, 0.0],
        "gating_norm": [1.0, 4.0],
    },
    numbers={
        "orthogonal": Number(f"{_STEEP} and gating_angle == 90 and method == 'spectral'"),
        "aligned": Number(f"{_STEEP} and gating_angle == 0 and method == 'spectral'"),
        "residual": Number(f"{_STEEP} and gating_angle == 0 and method == 'spectral_residual'"),
        "polished": Number(f"{_STEEP} and gating_angle == 0 and method == 'spectral_em'"),
        "random": Number(f"{_STEEP} and gating_angle == 0 and method == 'joint_em'"),
    },
    shows=(
        "For linear experts and gates of norm 4 the median error of moments alone is {orthogonal} where the gates are "
        "orthogonal to the experts and {aligned} where they lie in their span; there residual passes have {residual}, "
        "spectral_em {polished} and joint EM from one random start {random}."
    ),
    shows_not=(
        "It does not show larger samples; in theory they lower the variance of the moments, and not their bias."
    ),
    figure=figure,
)
