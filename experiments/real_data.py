"""How well do mixtures of linear experts predict real data, beside black boxes?

Cross-validation, paired over folds. All choices are made inside the training part: the objective, the number of experts and the
ridges of moejax by BIC and evidence; the number of experts of the other mixture methods by BIC or, for a squared error, by a
held-out fifth; the outsiders have the defaults of their packages, or the settings below.
"""

import functools
import math
import time
import warnings

import jax
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import moejax
from moejax.fitting import datasets
from moejax.reproduce import COLOURS, Experiment, Number

TARGETS = {"stock_portfolio": "annual_return"}
NUMBERS = (1, 2, 4, 8)
"""Numbers of experts that the other mixture methods may have."""
INNER_FOLDS = 5
LEVEL = 0.9
"""Probability of the predictive intervals."""
OURS = ("moejax: one model", "moejax: average", "moejax: mixture")
ORDER = (
    "linear_regression",
    *OURS,
    "spectral_em",
    "joint_em",
    "gradient_nll",
    "gradient_mse",
    "gradient_boosting",
    "hist_gradient_boosting",
    "random_forest",
    "cubist_one",
    "cubist",
    "gaussian_process",
)
SLOPES = "slopes"
SLOPES_OF = "airfoil"
EXPERTS_SHOWN = 4
"""Experts of the fit whose slopes are shown: few enough to be read."""
GRID = 400
"""Points a side of the map of the gates."""


def compiles(cell):
    """Whether a cell compiles programs."""
    return cell["model"] in {
        "moejax",
        "mixture",
        "joint_em",
        "gradient_mse",
        "gradient_nll",
        "spectral_em",
        SLOPES,
    }


@functools.cache
def load(name):
    """The data set."""
    data = datasets.load(name)
    return data.with_target(TARGETS[name]) if name in TARGETS else data


def folds_of(n, cell):
    """(training rows, held-out rows) of every fold."""
    from sklearn.model_selection import RepeatedKFold

    splits = RepeatedKFold(n_splits=cell["folds"], n_repeats=cell["repeats"], random_state=cell["seed"])
    return list(splits.split(np.zeros(n)))


def measures(y, mean, log_density, low, high, scale):
    """Error and log-likelihood in standard deviations of the training labels, and coverage of the intervals."""
    return {
        "rmse": float(np.sqrt(np.mean((mean - y) ** 2))) / scale,
        "held_out_log_likelihood": float(np.mean(log_density)) + math.log(scale),
        "coverage": float(np.mean((low <= y) & (y <= high))),
    }


def measures_of(model, x, y, scale):
    """The measures of a moejax estimator."""
    low, high = model.predict_interval(x, LEVEL).T
    return measures(y, model.predict(x), model.score_samples(x, y), low, high, scale)


def ours(x, y, held_x, held_y, seed, cell):
    """The default fit, alone and averaged."""
    scale, started = y.std(), time.perf_counter()
    average = moejax.MoERegressor(average=cell["average"], random_state=seed).fit(x, y)
    facts = {
        "num_experts": average.num_experts_,
        "objective": average.objective_,
        "seconds": time.perf_counter() - started,
    }
    models = (OURS[0], average.alone()), (OURS[1], average)
    return [
        {"variant": variant, **measures_of(model, held_x, held_y, scale), **facts}
        for variant, model in models
    ]


def our_mixture(x, y, held_x, held_y, seed, cell):
    """The mixture by likelihood with the number of experts that has the least BIC."""
    started = time.perf_counter()
    # one growth of a mean, which is not used, and those of the mixture
    table = moejax.MoERegressor(num_starts=1, random_state=seed).fit(x, y).selection_
    mixtures = table[(table["objective"] == "likelihood") & table["bic"].notna()]
    k = int(mixtures.loc[mixtures["bic"].idxmin(), "num_experts"])
    mixture = moejax.MoERegressor(k, objective="likelihood", random_state=seed).fit(x, y)
    facts = {"num_experts": k, "objective": "likelihood", "seconds": time.perf_counter() - started}
    return [{"variant": OURS[2], **measures_of(mixture, held_x, held_y, y.std()), **facts}]


def other_mixture(name, x, y, held_x, held_y, seed, cell):
    """A baseline with the number of experts that is best by BIC, or for gradient_mse on a held-out fifth."""
    started = time.perf_counter()
    rank = np.linalg.matrix_rank(x - x.mean(axis=0))
    numbers = [
        k for k in NUMBERS if (2 * k - 1) * (rank + 1) + 1 < len(y) and (k <= rank or name != "spectral_em")
    ]
    options = {
        "method": name,
        "random_state": seed,
        "num_starts": cell["num_starts"] if name == "joint_em" else None,
    }

    def fitted(k, rows=slice(None)):
        return moejax.MoERegressor(k, **options).fit(x[rows], y[rows])

    if name == "gradient_mse":
        shuffled = np.random.default_rng(seed).permutation(len(y))
        inner, outer = shuffled[len(y) // INNER_FOLDS :], shuffled[: len(y) // INNER_FOLDS]
        errors = [np.mean((fitted(k, inner).predict(x[outer]) - y[outer]) ** 2) for k in numbers]
        best = fitted(numbers[int(np.argmin(errors))])
    else:
        models = [fitted(k) for k in numbers]
        best = min(models, key=lambda model: model.bic(x, y))
    seconds = time.perf_counter() - started
    facts = {"num_experts": best.num_experts_, "objective": "likelihood", "seconds": seconds}
    return [{"variant": name, **measures_of(best, held_x, held_y, y.std()), **facts}]


def outsider_model(name, seed, dim):
    """A scikit-learn regressor."""
    from sklearn import ensemble, linear_model
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name.startswith("cubist"):
        try:
            from cubist import Cubist
        except ImportError as error:
            raise ValueError(
                f"model {name} needs the package cubist: pip install --group evidence"
            ) from error
        return Cubist() if name == "cubist_one" else Cubist(n_committees=20, neighbors=5)
    if name == "gaussian_process":
        kernel = ConstantKernel(1.0) * RBF(np.ones(dim)) + WhiteKernel(0.1)
        process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
        return make_pipeline(StandardScaler(), process)
    return {
        "linear_regression": linear_model.LinearRegression(),
        "gradient_boosting": ensemble.GradientBoostingRegressor(random_state=seed),
        "hist_gradient_boosting": ensemble.HistGradientBoostingRegressor(random_state=seed),
        "random_forest": ensemble.RandomForestRegressor(random_state=seed),
    }[name]


def outsider(name, x, y, held_x, held_y, seed, cell):
    """Normal errors, of the spread that inner cross-validation finds; the Gaussian process has its own."""
    from scipy.stats import norm
    from sklearn.model_selection import KFold, cross_val_predict

    started = time.perf_counter()
    names = [f"x{i + 1}" for i in range(x.shape[1])]
    x, held_x = (pd.DataFrame(a, columns=names) for a in (x, held_x))
    model = outsider_model(name, seed, x.shape[1])
    if name == "gaussian_process":
        mean, spread = model.fit(x, y).predict(held_x, return_std=True)
    else:
        inner = KFold(INNER_FOLDS, shuffle=True, random_state=seed)
        spread = np.std(y - cross_val_predict(model, x, y, cv=inner))
        mean = np.asarray(model.fit(x, y).predict(held_x)).ravel()
    law = norm(mean, spread)
    found = measures(held_y, mean, law.logpdf(held_y), *law.interval(LEVEL), y.std())
    return [{"variant": name, **found, "seconds": time.perf_counter() - started}]


def slopes_of(cell):
    """The slopes, their standard errors and the gates of a mean fit to a whole data set, per standard deviation of the inputs."""
    data = load(cell["dataset"])
    fitted = moejax.fit(
        jax.random.key(cell["seed"]),
        data.x,
        data.y,
        num_experts=EXPERTS_SHOWN,
        objective="mean",
        fit_intercept=True,
    )
    params, errors = fitted.in_units(data.x.mean(axis=0), data.x.std(axis=0), data.y.mean(), data.y.std())
    shares = np.asarray(fitted.diagnostics["effective_samples"]) / len(data.y)
    return pd.DataFrame(
        {
            "variant": SLOPES,
            "expert": expert + 1,
            "input": name,
            "slope": params.experts[expert, j],
            "slope_se": math.nan if errors is None else errors.experts[expert, j],
            "gate": params.gating[expert, j],
            "intercept": params.expert_bias[expert],
            "gate_intercept": params.gating_bias[expert],
            "share": shares[expert],
        }
        for expert in range(EXPERTS_SHOWN)
        for j, name in enumerate(data.input_names)
    )


MOEJAX = {"moejax": ours, "mixture": our_mixture}


def run_cell(cell):
    """A row per model of one fold; for the slopes a row per expert and input."""
    warnings.simplefilter("ignore")  # fits that do not converge are part of the comparison
    name = cell["model"]
    number = cell["split"]
    if name == SLOPES:
        wanted = cell["dataset"] == SLOPES_OF and number == 0
        return slopes_of(cell) if wanted else pd.DataFrame({"variant": []})
    data = load(cell["dataset"])
    x, y = data.x, np.asarray(data.y, float)
    splits = folds_of(len(y), cell)
    if number >= len(splits):
        return pd.DataFrame({"variant": []})
    train, held = splits[number]
    arguments = (x[train], y[train], x[held], y[held], cell["seed"] + number, cell)
    if name in MOEJAX:
        found = MOEJAX[name](*arguments)
    elif compiles(cell):
        found = other_mixture(name, *arguments)
    else:
        found = outsider(name, *arguments)
    place = {"repeat": number // cell["folds"], "fold": number % cell["folds"]}
    return pd.DataFrame([{**place, **row} for row in found])


def corrected_mean(values, folds):
    """Mean over folds and its standard error by Nadeau and Bengio 2003: training parts overlap."""
    error = math.sqrt((1 / len(values) + 1 / (folds - 1)) * np.var(values, ddof=1))
    return float(np.mean(values)), error


def summary(table):
    """Means over folds, and the paired differences from linear regression and boosting, with corrected standard errors."""
    rows = []
    table = table[table["variant"] != SLOPES]
    folds = int(table["folds"].iloc[0])
    for dataset, part in table.groupby("dataset", sort=False):
        line, boosting = (
            part[part["variant"] == variant].set_index(["repeat", "fold"])
            for variant in ("linear_regression", "hist_gradient_boosting")
        )
        for variant in ORDER:
            mine = part[part["variant"] == variant].set_index(["repeat", "fold"])
            if mine.empty:
                continue
            values = {"dataset": dataset, "variant": variant}
            for column in ("rmse", "held_out_log_likelihood", "coverage"):
                values[column], values[f"{column}_se"] = corrected_mean(mine[column], folds)
                gain = mine[column] - line[column].reindex(mine.index)
                values[f"{column}_gain"], values[f"{column}_gain_se"] = corrected_mean(gain, folds)
            less = mine["rmse"] - boosting["rmse"].reindex(mine.index)
            values["rmse_less_boosting"], values["rmse_less_boosting_se"] = corrected_mean(less, folds)
            values["median_num_experts"] = float(mine["num_experts"].median())
            values["share_of_mean"] = float((mine["objective"] == "mean").mean())
            values["seconds"] = float(mine["seconds"].mean())
            rows.append(values)
    return pd.DataFrame(rows)


def draw_errors(grid, values):
    """Error and log-likelihood of every method on every data set."""
    labels = {
        "rmse": "held-out RMSE ± s.e.\n(standard deviations of y)",
        "held_out_log_likelihood": "held-out log-likelihood ± s.e.\n(nats a row)",
    }
    names = list(dict.fromkeys(values["dataset"]))
    methods = [name for name in ORDER if name in set(values["variant"])]
    for j, name in enumerate(names):
        here = values[values["dataset"] == name].set_index("variant")
        for i, (column, label) in enumerate(labels.items()):
            axis = grid[i, j]
            for y, method in enumerate(methods):
                if method not in here.index:
                    continue
                row = here.loc[method]
                axis.errorbar(
                    row[column],
                    y,
                    xerr=row[f"{column}_se"],
                    fmt="D" if method in OURS else "o",
                    markersize=5,
                    capsize=2.5,
                    color=COLOURS[0] if method in OURS else "0.45",
                )
            if column == "held_out_log_likelihood":  # some densities are off by far
                middle = here[column].median()
                low = max(here[column].min() - 0.1, middle - 1.5)
                axis.set_xlim(low, here[column].max() + 0.15)
            axis.set_yticks(range(len(methods)), [method.replace("_", " ") for method in methods], fontsize=8)
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.invert_yaxis() if not axis.yaxis_inverted() else None
        grid[0, j].set_title(name.replace("_", " "), fontsize=10)


def draw_slopes(left, right, slopes):
    """The slopes of each expert, and the regions in which each has the largest share."""
    slopes = slopes.astype({"expert": int})
    inputs, experts = list(dict.fromkeys(slopes["input"])), sorted(set(slopes["expert"]))
    table = slopes.pivot(index="expert", columns="input", values="slope")[inputs]
    errors = slopes.pivot(index="expert", columns="input", values="slope_se")[inputs]
    shares = slopes.groupby("expert")["share"].first()
    reach = float(np.abs(table.to_numpy()).max())
    # slopes of small regions are steep: colours are linear up to one, logarithmic beyond
    left.imshow(table, cmap="RdBu_r", norm=SymLogNorm(1.0, vmin=-reach, vmax=reach), aspect="auto")
    for i, expert in enumerate(experts):
        for j, name in enumerate(inputs):
            value, error = table.loc[expert, name], errors.loc[expert, name]
            colour = "white" if abs(value) > 0.3 * reach else "black"
            text = f"{value:.2f}\n±{error:.2f}"
            left.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    left.set_xticks(range(len(inputs)), [name.replace("_", " ") for name in inputs], fontsize=7, rotation=20)
    left.set_yticks(
        range(len(experts)), [f"expert {e}: {100 * shares[e]:.0f}% of the rows" for e in experts], fontsize=8
    )
    left.set_title(
        f"{SLOPES_OF}: slopes of {len(experts)} experts ± s.e.\n(standard deviations of y per standard deviation)",
        fontsize=9,
    )
    gates = slopes.pivot(index="expert", columns="input", values="gate")[inputs]
    strength = gates.std(ddof=0).sort_values(ascending=False)
    first, second = strength.index[:2]
    side = np.linspace(-2.5, 2.5, GRID)
    x, y = np.meshgrid(side, side)
    biases = slopes.groupby("expert")["gate_intercept"].first()
    logits = np.stack([gates.loc[e, first] * x + gates.loc[e, second] * y + biases[e] for e in experts])
    largest = np.argmax(logits, axis=0)
    right.contourf(
        x, y, largest, levels=np.arange(len(experts) + 1) - 0.5, colors=COLOURS[: len(experts)], alpha=0.55
    )
    for i, expert in enumerate(experts):
        if (largest == i).any():
            right.text(
                x[largest == i].mean(), y[largest == i].mean(), f"expert {expert}", ha="center", fontsize=8
            )
    right.set_xlabel(f"{first.replace('_', ' ')} (standard deviations)", fontsize=8)
    right.set_ylabel(f"{second.replace('_', ' ')} (standard deviations)", fontsize=8)
    right.set_title("The expert with the largest gate, other inputs at their means", fontsize=9)


def figure(table):
    values = summary(table)
    names = list(dict.fromkeys(values["dataset"]))
    slopes = table[table["variant"] == SLOPES]
    rows = 2 if slopes.empty else 3
    figure = Figure(figsize=(max(7.0, 2.5 * len(names) + 1.5), 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(2, 1, height_ratios=[2, 1]) if rows == 3 else [figure]
    draw_errors(parts[0].subplots(2, len(names), squeeze=False, sharey=True), values)
    if rows == 3:
        draw_slopes(*parts[1].subplots(1, 2), slopes)
    repeats, folds = (int(table[name].iloc[0]) for name in ("repeats", "folds"))
    figure.suptitle(
        f"{repeats} × {folds}-fold cross-validation, every choice inside the training part; blue: this package",
        fontsize=11,
    )
    return figure


def number(dataset, variant, column="rmse"):
    """A number of summary.csv."""
    where = f"dataset == '{dataset}' and variant == '{variant}'"
    return Number(where, column, "value", "summary.csv", f"{column}_se")


EXPERIMENT = Experiment(
    part="e. Real data, against black boxes",
    spec="sweeps/real-data.toml",
    quick={
        "repeats": 1,
        "folds": 5,
        "average": 2,
        "num_starts": 2,
        "dataset": ["stock_portfolio"],
        "split": [0, 1, 2],
        "model": ["moejax", "mixture", "linear_regression", "gradient_boosting", "hist_gradient_boosting"],
    },
    numbers={
        "one": number("airfoil", OURS[0]),
        "average": number("airfoil", OURS[1]),
        "mixture": number("airfoil", OURS[2]),
        "hist": number("airfoil", "hist_gradient_boosting"),
        "process": number("airfoil", "gaussian_process"),
        "cubist": number("airfoil", "cubist"),
        "line": number("airfoil", "linear_regression"),
        "concrete_average": number("concrete", OURS[1]),
        "concrete_hist": number("concrete", "hist_gradient_boosting"),
        "concrete_cubist": number("concrete", "cubist"),
        "coverage": number("airfoil", OURS[1], "coverage"),
        "one_less": number("airfoil", OURS[0], "rmse_less_boosting"),
        "average_less": number("airfoil", OURS[1], "rmse_less_boosting"),
        "concrete_one_less": number("concrete", OURS[0], "rmse_less_boosting"),
        "concrete_less": number("concrete", OURS[1], "rmse_less_boosting"),
    },
    shows=(
        "On Airfoil the cross-validated error is {one} standard deviations of the target for one model with our defaults, "
        "{average} for the average of four, {mixture} for a mixture fitted by likelihood, {hist} for histogram gradient "
        "boosting, {process} for a Gaussian process, {cubist} for Cubist with twenty committees and {line} for a line; on "
        "Concrete the average has {concrete_average}, histogram gradient boosting {concrete_hist} and Cubist {concrete_cubist};"
        " paired over folds the error less that of histogram gradient boosting is {one_less} for one model and {average_less} "
        "for the average on Airfoil, {concrete_one_less} and {concrete_less} on Concrete; the average's intervals of ninety "
        "percent hold {coverage} of the held-out labels of Airfoil."
    ),
    shows_not=(
        "It does not show tuned outsiders: they have the defaults of their packages. Standard errors are corrected for the "
        "overlap of training parts, which is an approximation. Two cells ran side by side, and the first fold that a process "
        "fits compiles: the seconds in the table are no benchmark."
    ),
    program=("dataset", "model", "split"),
    figure=figure,
    summary=summary,
    run_cell=run_cell,
    compiles=compiles,
)
