"""Logistic regression and boosting of scikit-learn on Criteo's sample, by folds.

    python benchmarks/peers/criteo_sklearn.py train.tiny.csv

Numbers are taken as the mirrored logarithm and standardized, with a mark where one is
missing; categories that fewer than five rows have share a column. The penalty is chosen
within each training part.
"""

from __future__ import annotations

import argparse
import csv

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import OneHotEncoder

FOLDS = 5
SEEDS = (0, 1, 2)
STRENGTHS = (0.01, 0.03, 0.1, 0.3)
LEAST = 5  # rows that have a category


def read(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers (rows, 13), categories (rows, 26) and clicks."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [[float(row[f"I{i}"] or "nan") for i in range(1, 14)] for row in rows]
    categories = [[row[f"C{i}"] for i in range(1, 27)] for row in rows]
    clicks = [int(row["Label"]) for row in rows]
    return np.array(numbers), np.array(categories), np.array(clicks)


def features(
    numbers: np.ndarray, categories: np.ndarray, train: np.ndarray
) -> np.ndarray:
    """Return all rows' features, fitted on the training rows."""
    logs = np.sign(numbers) * np.log1p(np.abs(numbers))
    mean = np.nanmean(logs[train], axis=0)
    spread = np.nanstd(logs[train], axis=0) + 1e-9
    scaled = np.nan_to_num((logs - mean) / spread)
    encoder = OneHotEncoder(
        handle_unknown="infrequent_if_exist",
        min_frequency=LEAST,
        sparse_output=False,
    )
    encoder.fit(categories[train])
    return np.concatenate(
        [scaled, np.isnan(logs), encoder.transform(categories)], axis=1
    )


def main() -> None:
    """Print the mean AUC and log loss over all folds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clicks")
    options = parser.parse_args()
    numbers, categories, clicks = read(options.clicks)
    results: dict[str, list] = {}
    for seed in SEEDS:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        for train, test in folds.split(numbers, clicks):
            inputs = features(numbers, categories, train)
            models = {
                "logistic regression": LogisticRegressionCV(
                    Cs=STRENGTHS, cv=4, scoring="neg_log_loss", max_iter=300
                ),
                "boosting": HistGradientBoostingClassifier(
                    learning_rate=0.05, max_iter=100, max_leaf_nodes=8
                ),
            }
            for name, model in models.items():
                model.fit(inputs[train], clicks[train])
                chance = model.predict_proba(inputs[test])[:, 1]
                auc = roc_auc_score(clicks[test], chance)
                results.setdefault(name, []).append(
                    (auc, log_loss(clicks[test], chance))
                )
    for name, values in results.items():
        auc, loss = np.mean(values, axis=0)
        print(f"{name}: AUC {auc:.4f}, log loss {loss:.4f}")


if __name__ == "__main__":
    main()
