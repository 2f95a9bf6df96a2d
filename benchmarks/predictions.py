"""The default MoERegressor on a real data set: seconds of the first and of later fits, and its nested cross-validation.

    python benchmarks/predictions.py [--dataset airfoil] [--folds 5] [--average 4] [--fits 3]

The first fit of a process includes its compilation. Every choice of a fit is made inside the training part of its fold; errors and
log-likelihoods are in standard deviations of the training labels. A line is fitted beside it.
"""

import argparse
import time
import warnings

import numpy as np
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold

import moejax
from moejax.fitting import datasets

TARGETS = {"stock_portfolio": "annual_return"}


def timed(x, y, seed, **options):
    """A fit, and its wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    model = moejax.MoERegressor(random_state=seed, **options).fit(x, y)
    return model, time.perf_counter() - wall, time.process_time() - processor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="airfoil", choices=datasets.BUILT_IN)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--average", type=int, default=4)
    parser.add_argument("--fits", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    data = datasets.load(arguments.dataset, target=TARGETS.get(arguments.dataset))
    x, y = data.x, np.asarray(data.y, float)
    print(f"{arguments.dataset}: {x.shape[0]} rows, {x.shape[1]} inputs")
    print(f"imports and data: {time.process_time():.1f} s of the processor")
    for seed in range(arguments.fits):
        model, wall, processor = timed(x, y, seed)
        which = "first" if seed == 0 else "warm"
        print(
            f"{which} fit: {wall:.1f} s of wall time, {processor:.1f} of the processor; {model.num_experts_} experts"
        )
    print(
        "\n| fold | experts | objective | RMSE, one | RMSE, average | RMSE, line | log-likelihood, average | coverage of 90% |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    splits = KFold(arguments.folds, shuffle=True, random_state=0).split(x)
    for fold, (train, held) in enumerate(splits):
        scale = y[train].std()
        model, *_ = timed(x[train], y[train], fold, average=arguments.average)
        line = LinearRegression().fit(x[train], y[train])
        low, high = model.predict_interval(x[held], 0.9).T

        def error(fitted, held=held, scale=scale):
            return np.sqrt(np.mean((fitted.predict(x[held]) - y[held]) ** 2)) / scale

        row = (
            error(model.alone()),
            error(model),
            error(line),
            np.mean(model.score_samples(x[held], y[held])) + np.log(scale),
            np.mean((low <= y[held]) & (y[held] <= high)),
        )
        rows.append(row)
        values = " | ".join(f"{value:.3f}" for value in row)
        print(f"| {fold} | {model.num_experts_} | {model.objective_} | {values} |", flush=True)
    print("| mean | | | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0)) + " |")


if __name__ == "__main__":
    main()
