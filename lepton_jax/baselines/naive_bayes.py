"""Naive Bayes with log-count ratios, and its NB-SVM, on words and pairs of words.

Both are those of Wang & Manning 2012, "Baselines and Bigrams: Simple, Good Sentiment
and Topic Classification", section 2: which words and pairs of words a text has, not how
often. The ratio of an n-gram for a class is

    r = log((p / |p|) / (q / |q|)),  p = 1 + texts of the class that have it
                                     q = 1 + other texts that have it

Naive Bayes adds the ratios of a text's n-grams; NB-SVM trains a linear SVM on texts
whose n-grams are scaled by them. Several classes, or several labels a text, are each
told from the rest.
"""

from __future__ import annotations

import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples

SMOOTHING = 1.0  # added to each count (Wang & Manning, section 2.1)
PENALTY = 1.0  # C of the SVM (section 2.3)
SHARE_OF_SVM = 0.25  # beta, the rest is naive Bayes (section 2.3)
# Words as `WordTokens(apart=True)` has them, in Python's regular expressions: a
# character of a script without spaces stands alone. Ranges: Thai and Lao, Tibetan,
# Burmese, Khmer, kana, Han (Unicode 15, Blocks.txt).
UNSPACED = (
    r"\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
    r"\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]"
ORDERS = (1, 2)  # single words and pairs


def log_count_ratios(
    counts: np.ndarray,
    smoothing: float = SMOOTHING,
) -> np.ndarray:
    """Return the log-count ratio of each n-gram for each class against the rest.

    Args:
      counts: how many texts of each class have the n-gram, (n-grams, classes), or how
        many have it with and without each label, (n-grams, labels, 2).
      smoothing: added to each count.

    Returns:
      float32 (n-grams, classes).
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim == 3:
        inside = counts[..., 0]
        outside = counts[..., 1]
    else:
        inside = counts
        outside = counts.sum(axis=1, keepdims=True) - counts
    p = inside + smoothing
    q = outside + smoothing
    ratios = np.log(p / p.sum(axis=0)) - np.log(q / q.sum(axis=0))
    return ratios.astype(np.float32)


def naive_bayes(
    train: Samples,
    test: Samples,
    text: str = "text",
) -> Baseline:
    """Return what naive Bayes says of each test row.

    Args:
      train: classes, or targets 0 and 1; the raw rows have the texts.
      test: rows to answer for.
      text: name of the column of texts.

    Raises:
      NotHere: the targets are no classes, or there are no texts.
      ImportError: scikit-learn is not installed.
    """
    bags = _Bags(train, test, text)
    scores = [
        np.asarray(bags.test @ ratios) + bags.prior(number)
        for number, ratios in enumerate(bags.ratios.T)
    ]
    fitted = f"log-count ratios of {bags.described}"
    return Baseline("naive Bayes with bigrams", fitted, bags.outputs(scores))


def nb_svm(
    train: Samples,
    test: Samples,
    text: str = "text",
) -> Baseline:
    """Return what NB-SVM says of each test row: scikit-learn's LinearSVC.

    Args:
      train: classes, or targets 0 and 1; the raw rows have the texts.
      test: rows to answer for.
      text: name of the column of texts.

    Raises:
      NotHere: the targets are no classes, or there are no texts.
      ImportError: scikit-learn is not installed.
    """
    from sklearn.svm import LinearSVC

    bags = _Bags(train, test, text)
    scores = []
    for number, ratios in enumerate(bags.ratios.T):
        labels = bags.labels[:, number]
        if labels.all() or not labels.any():
            scores.append(np.full(len(test), bags.prior(number)))
            continue
        machine = LinearSVC(C=PENALTY, random_state=0)
        machine.fit(bags.train.multiply(ratios).tocsr(), labels)
        weights = machine.coef_[0]
        even = np.abs(weights).mean()
        mixed = (1 - SHARE_OF_SVM) * even + SHARE_OF_SVM * weights
        score = bags.test @ (ratios * mixed).astype(np.float64)
        scores.append(score + machine.intercept_[0])
    fitted = (
        f"a linear SVM (C = {PENALTY:g}, {SHARE_OF_SVM:.0%} of it) on the scaled"
        f" {bags.described}"
    )
    return Baseline("NB-SVM with bigrams", fitted, bags.outputs(scores))


# ---- internals ----


class _Bags:
    """Texts as sparse rows of which words and pairs of words they have.

    Args:
      train: rows to learn from.
      test: rows to answer for.
      text: name of the column of texts.
    """

    def __init__(self, train: Samples, test: Samples, text: str):
        from sklearn.feature_extraction.text import CountVectorizer

        if train.task not in ("classes", "binary"):
            raise NotHere("the targets are no classes")
        self.is_binary = train.task == "binary"
        self.shape = np.shape(test.targets)
        self.labels = _labels(train)
        bags = CountVectorizer(
            token_pattern=WORD,
            ngram_range=ORDERS,
            binary=True,
        )
        self.train = bags.fit_transform(_texts(train, text)).astype(np.float64)
        self.test = bags.transform(_texts(test, text)).astype(np.float64)
        inside = self.train.T @ self.labels.astype(np.float64)
        outside = self.train.T @ (~self.labels).astype(np.float64)
        self.ratios = log_count_ratios(np.stack([inside, outside], axis=-1))
        self.described = f"{self.train.shape[1]:,} words and pairs of words"

    def prior(self, number: int) -> float:
        """Return the log-odds of a class among the training rows."""
        count = self.labels[:, number].sum() + SMOOTHING
        rest = len(self.labels) - count + 2 * SMOOTHING
        return float(np.log(count / rest))

    def outputs(self, scores: list[np.ndarray]) -> np.ndarray:
        """Return the scores of each class in the form of the model's outputs."""
        logits = np.stack(scores, axis=-1).astype(np.float32)
        return logits.reshape(self.shape) if self.is_binary else logits


def _labels(samples: Samples) -> np.ndarray:
    """Return whether each row has each class or label, (rows, classes)."""
    if samples.task == "binary":
        rows = np.asarray(samples.targets).reshape(len(samples), -1)
        return rows > 0.5
    return np.asarray(samples.targets)[:, None] == np.arange(samples.classes)


def _texts(samples: Samples, text: str) -> list[str]:
    table = samples.raw()
    if text not in table.columns:
        raise NotHere(f"the raw rows have no column {text!r}")
    return [value or "" for value in table[text].to_list()]
