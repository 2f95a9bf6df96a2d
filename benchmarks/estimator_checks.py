"""scikit-learn's own checks of MoERegressor and MoEClassifier with their defaults: a line for each, and the number that passed."""

import sys
import warnings
from collections import Counter

from sklearn.utils.estimator_checks import check_estimator

from moejax import MoEClassifier, MoERegressor

ESTIMATORS = {"regressor": MoERegressor, "classifier": MoEClassifier}


def main() -> None:
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or ESTIMATORS:
        results = check_estimator(ESTIMATORS[name](), on_fail=None)
        print(name)
        for result in results:
            print(f"{result['check_name']:60s} {result['status']} {result['exception'] or ''}")
        print(dict(Counter(result["status"] for result in results)), flush=True)


if __name__ == "__main__":
    main()
