"""How much worse is the estimate if an assumption is wrong: norms, shares, angles, number of experts, activation, noise?"""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.reproduce import COLOURS, MARKERS, Experiment, Number, estimates

_CASES = {
    "none": (
        "all hold",
        "expert_norms != '[0.7, 1.0, 1.4]' and gating_bias == 0 and expert_correlation == 0 and {same}",
    ),
    "norms": ("norms\n0.7, 1, 1.4", "expert_norms == '[0.7, 1.0, 1.4]'"),
    "shares": ("gate intercepts\n2, 1, 0", "gating_bias > 0"),
    "cosine_3": ("experts at\ncosine 0.3", "expert_correlation == 0.3"),
    "cosine_6": ("experts at\ncosine 0.6", "expert_correlation == 0.6"),
    "number": ("4 experts fitted,\n3 are true", "fit_num_experts == 4"),
    "activation": ("softplus fitted,\nrelu is true", "fit_activation == 'softplus'"),
    "noise": ("noise\nunknown", "noise_knowledge == 'estimated'"),
}
_SAME = "fit_num_experts != 4 and fit_activation != 'softplus' and noise_knowledge == 'known'"
METHODS = ("spectral", "spectral_em", "joint_em")


def _rows(case):
    return _CASES[case][1].format(same=_SAME)


def figure(table):
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    cases = [case for case in _CASES if len(table.query(_rows(case)))]
    for number, method in enumerate(METHODS):
        places, middles, errors = [], [], []
        for place, case in enumerate(cases):
            rows = table.query(_rows(case))
            rows = rows[rows["method"] == method]
            if len(rows):
                found = estimates(rows.assign(case=case), ["case"]).iloc[0]
                places.append(place + (number - 1) * 0.2)
                middles.append(found["median"])
                errors.append(found["median_mcse"])
        axis.errorbar(
            places,
            middles,
            yerr=errors,
            linestyle="none",
            marker=MARKERS[number],
            color=COLOURS[number],
            capsize=2.5,
            label=method,
        )
    axis.axhline(0.02, color="#888888", linewidth=0.8, linestyle=":")
    axis.text(len(cases) - 0.5, 0.022, "success below", fontsize=8, color="#666666", ha="right")
    axis.set_yscale("log")
    axis.set_xticks(range(len(cases)), [_CASES[case][0] for case in cases], fontsize=8)
    axis.set_ylabel("recovery error, median ± MCSE")
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, ncols=3, loc="upper left")
    axis.margins(y=0.2)
    d, k, n = (int(table[name].iloc[0]) for name in ("dim", "num_experts", "num_samples"))
    axis.set_title(f"One assumption wrong at a time (relu, d = {d}, k = {k}, n = {n}, σ = 0.1)", fontsize=10)
    return figure


EXPERIMENT = Experiment(
    part="f. What are the assumptions worth?",
    place=2,
    spec="sweeps/assumptions.toml",
    quick={
        "trials": 4,
        "num_samples": 4000,
        "activation": ["linear"],
        "methods": ["spectral_em"],
        "expert_norms": [[1.0, 1.0, 1.0]],
        "gating_bias": [0.0],
        "fit_intercept": [False],
        "expert_correlation": [0.0],
        "fit_num_experts": ["default"],
        "fit_activation": ["default"],
        "noise_knowledge": ["known"],
    },
    numbers={
        f"{short}_{case}": Number(f"{_rows(case)} and method == '{method}'")
        for case in _CASES
        if case != "cosine_3"
        for short, method in (("moments", "spectral"), ("ours", "spectral_em"), ("em", "joint_em"))
    },
    shows=(
        "For three relu experts the median error is {moments_none} for moments alone and {ours_none} for spectral_em if "
        "all assumptions hold; {moments_norms} and {ours_norms} with norms from 0.7 to 1.4; {moments_shares} and "
        "{ours_shares} with unequal shares of the experts; {moments_cosine_6} and {ours_cosine_6} with experts at a cosine "
        "of 0.6; {moments_number} and {ours_number} with a fourth expert fitted; {moments_activation} and {ours_activation} "
        "if softplus is fitted; {moments_noise} and {ours_noise} with unknown noise; joint EM from one random start has "
        "{em_none}, {em_norms}, {em_shares}, {em_cosine_6}, {em_number}, {em_activation} and {em_noise}."
    ),
    shows_not=(
        "It does not show two assumptions broken at once; unequal shares break none, but leave few samples to the rarest "
        "expert; gates and inputs have figures of their own."
    ),
    figure=figure,
)
