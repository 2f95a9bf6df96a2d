"""What does a second, fourth, .. random start buy, and what does it cost, where one often fails?"""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moejax.claims import Number
from moejax.sweep.figures import COLOURS, MARKERS
from moejax.sweep.summary import estimates

SPEC = "sweeps/restarts.toml"
QUICK = {
    "trials": 10,
    "dim": 10,
    "num_experts": 3,
    "num_samples": 4000,
    "num_starts": [1, 2],
    "methods": ["joint_em", "spectral_em"],
}
SECONDS = True

_RANDOM = "method == 'joint_em' and num_starts == {}"
_OURS = "method == 'spectral_em'"
NUMBERS = {
    "one": Number(_RANDOM.format(1), statistic="success_rate"),
    "best": Number(_RANDOM.format(8), statistic="success_rate"),
    "ours": Number(_OURS, statistic="success_rate"),
    "one_seconds": Number(_RANDOM.format(1), "seconds", "mean"),
    "best_seconds": Number(_RANDOM.format(8), "seconds", "mean"),
    "ours_seconds": Number(_OURS, "seconds", "mean"),
}
SHOWS = (
    "For eight tanh experts in d = 20 dimensions joint EM succeeds in {one} of the trials from one random start "
    "({one_seconds} s of one core) and in {best} as the best of 8 ({best_seconds} s); spectral_em succeeds in {ours} "
    "({ours_seconds} s)."
)
SHOWS_NOT = "It does not show an easy instance, where one random start is enough; seconds are those of the manifest's processor."


def figure(table):
    success = estimates(table, ["num_starts"])
    seconds = estimates(table, ["num_starts"], "seconds")
    k, d, n = (int(table[name].iloc[0]) for name in ("num_experts", "dim", "num_samples"))
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, method in enumerate(dict.fromkeys(table["method"])):
        cost, share = seconds[seconds["method"] == method], success[success["method"] == method]
        axis.errorbar(
            cost["mean"],
            share["success_rate"],
            xerr=cost["mean_mcse"].fillna(0),
            yerr=share["success_rate_mcse"],
            color=COLOURS[number],
            marker=MARKERS[number],
            capsize=2.5,
            linewidth=1.4,
            label=method,
        )
        if len(cost) > 1:
            for x, y, starts in zip(cost["mean"], share["success_rate"], share["num_starts"], strict=True):
                axis.annotate(
                    f"R = {starts}", (x, y), xytext=(5, -11), textcoords="offset points", fontsize=8
                )
    axis.set_xscale("log")
    axis.set_ylim(-0.04, 1.04)
    axis.set_xlabel("compute time of a trial (seconds of one core) ± MCSE")
    axis.set_ylabel("success rate (error < 0.02) ± MCSE")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False)
    axis.set_title(
        f"Best of R random starts, and one spectral start (tanh, d = {d}, k = {k}, n = {n})", fontsize=10
    )
    return figure
