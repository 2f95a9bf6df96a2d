"""scikit-learn's own checks of MoERegressor with its default method: a line for each, and the number that passed."""

import warnings
from collections import Counter

from sklearn.utils.estimator_checks import check_estimator

from moejax import MoERegressor


def main() -> None:
    warnings.simplefilter("ignore")
    results = check_estimator(MoERegressor(), on_fail=None)
    for result in results:
        print(f"{result['check_name']:60s} {result['status']} {result['exception'] or ''}")
    print(dict(Counter(result["status"] for result in results)))


if __name__ == "__main__":
    main()
