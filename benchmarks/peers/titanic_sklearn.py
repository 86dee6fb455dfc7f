"""Titanic with scikit-learn: folds grouped by ticket.

    python benchmarks/peers/titanic_sklearn.py titanic.csv

The columns are those that a passenger has before the ship sails, without the name and
the ticket; who shares a ticket is in one fold. Each model has the defaults of
scikit-learn; the figure is the share of all rows that are right when their fold is held
out, the median of three draws of the folds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

FOLDS = 10
DRAWS = (0, 1, 2)
NUMBERS = ["Pclass", "Age", "SibSp", "Parch", "Fare"]
CATEGORIES = ["Sex", "Embarked"]


def main() -> None:
    """Evaluate each model and print one line of JSON for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    table = pd.read_csv(parser.parse_args().file)
    y = table["Survived"].to_numpy()
    for name, model in _models().items():
        start = time.perf_counter()
        scores = []
        for draw in DRAWS:
            folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=draw)
            given = cross_val_predict(
                model,
                table[NUMBERS + CATEGORIES],
                y,
                groups=table["Ticket"],
                cv=folds,
            )
            scores.append(float((given == y).mean()))
        record = {
            "model": name,
            "accuracy": statistics.median(scores),
            "scores": scores,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(json.dumps(record), flush=True)


def _models() -> dict:
    return {
        "logistic regression": _with_columns(LogisticRegression(max_iter=1000)),
        "random forest": _with_columns(RandomForestClassifier(random_state=0)),
        "gradient boosting": _with_columns(
            HistGradientBoostingClassifier(random_state=0)
        ),
    }


def _with_columns(model):
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    categories = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    columns = make_column_transformer(
        (numbers, NUMBERS),
        (categories, CATEGORIES),
    )
    return make_pipeline(columns, model)


if __name__ == "__main__":
    main()
