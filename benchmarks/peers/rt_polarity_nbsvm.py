"""rt-polarity with scikit-learn: NB-SVM on words and pairs, over ten folds.

    python benchmarks/peers/rt_polarity_nbsvm.py ARCHIVE

ARCHIVE is sentence_polarity.zip. The folds are those of

    python tools/launch.py recipes/text_classifier.py --data ARCHIVE --folds 10

Next to it stand naive Bayes, and logistic regression on the recipe's own features:
words, pairs of words and runs of three to five characters, scaled in the same way. The
penalty of the latter was chosen on the folds of another seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from _rt_polarity import FOLDS, WORD, folds_of, sentences
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

PENALTY = 1.0  # C of the SVM; Wang & Manning 2012, section 2.3
SHARE = 0.25  # of the SVM's weights, the rest is naive Bayes; the same
LOGISTIC = 0.1  # C of the logistic regression


def main() -> None:
    """Fit and test on each fold, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--split-seed", type=int, default=0)
    asked = parser.parse_args()

    start = time.perf_counter()
    texts, labels = sentences(asked.archive)
    fold_of = folds_of(labels, asked.split_seed)
    hits = {name: np.zeros(len(labels), bool) for name in METHODS}
    for fold in range(FOLDS):
        train = fold_of != fold
        test = ~train
        for name, method in METHODS.items():
            scores = method(texts[train], labels[train], texts[test])
            hits[name][test] = (scores > 0) == labels[test]
    print(
        json.dumps(
            {
                "folds": FOLDS,
                "split_seed": asked.split_seed,
                "accuracy": {name: each.mean() for name, each in hits.items()},
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


def naive_bayes(texts: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the scores of texts by log-count ratios of words and pairs."""
    bags, others = _words(texts, test)
    return others @ _ratios(bags, labels)


def nb_svm(texts: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the scores of texts by NB-SVM."""
    bags, others = _words(texts, test)
    scale = sp.diags(_ratios(bags, labels))
    machine = LinearSVC(C=PENALTY, random_state=0).fit(bags @ scale, labels)
    weights = machine.coef_[0]
    mixed = (1 - SHARE) * np.abs(weights).mean() + SHARE * weights
    return (others @ scale) @ mixed + machine.intercept_[0]


def logistic(texts: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the scores of texts by logistic regression on words and characters."""
    bags, others = _words(texts, test)
    counter = CountVectorizer(analyzer="char_wb", ngram_range=(3, 5), binary=True)
    bags = sp.hstack([bags, counter.fit_transform(texts)]).tocsr()
    others = sp.hstack([others, counter.transform(test)]).tocsr()
    scale = sp.diags(_ratios(bags, labels))
    model = LogisticRegression(C=LOGISTIC, solver="liblinear")
    return model.fit(bags @ scale, labels).decision_function(others @ scale)


METHODS = {
    "naive Bayes": naive_bayes,
    "NB-SVM": nb_svm,
    "logistic regression with characters": logistic,
}


def _words(texts: np.ndarray, test: np.ndarray) -> tuple:
    counter = CountVectorizer(token_pattern=WORD, ngram_range=(1, 2), binary=True)
    return counter.fit_transform(texts), counter.transform(test)


def _ratios(bags: sp.csr_matrix, labels: np.ndarray) -> np.ndarray:
    p = 1 + np.asarray(bags[labels == 1].sum(0)).ravel()
    q = 1 + np.asarray(bags[labels == 0].sum(0)).ravel()
    return np.log((p / p.sum()) / (q / q.sum()))


if __name__ == "__main__":
    main()
