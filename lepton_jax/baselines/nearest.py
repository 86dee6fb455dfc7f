"""The nearest training rows, by the distance of scaled inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lepton_jax.baselines.baseline import Baseline, Samples
from lepton_jax.baselines.fitting import chosen, fitting, hits, nearness
from lepton_jax.baselines.logistic import outputs_of

NEIGHBOURS = (1, 3, 5, 10, 20, 50)  # counts to choose from
# Distances that are computed, times features: some 20 s of one core. Assumption: more
# training rows change the answer little.
MOST_PRODUCTS = 3e11
MOST_TO_CHOOSE = 5000  # training rows by which the count is chosen; assumption
LEAST_ROWS = 1000  # of training, however many test rows there are
BLOCK = 1000  # test rows at once, so that their distances fit into memory

Answer = Callable[[np.ndarray], np.ndarray]


def nearest(train: Samples, test: Samples) -> Baseline:
    """Answer with the classes, or the mean, of the nearest training rows.

    How many is chosen on held-out rows. Numbers are standardized, categories get a
    column for each frequent value, pixels are scaled to 0 to 1; the distance is
    Euclidean (Cover and Hart, IEEE Transactions on Information Theory 13, 1967).

    Args:
      train: classes, yes or no, or quantities, one a row.
      test: rows to answer for.

    Raises:
      NotHere: the targets are none of these, or there are too many features.
      ImportError: scikit-learn is not installed.
    """
    import sklearn  # noqa: F401  before the work, if it is missing

    def most(features: int) -> int:
        return max(
            LEAST_ROWS,
            int(MOST_PRODUCTS / (features * len(test))),
        )

    data = fitting(train, test, most)
    counts = [count for count in NEIGHBOURS if count <= len(data.inputs) // 2] or [1]
    if train.task == "quantities":
        count = chosen(counts, _mean, nearness, data, MOST_TO_CHOOSE)
        outputs = _mean(
            count,
            data.inputs,
            data.targets,
        )(data.test)
        outputs = outputs.reshape(
            len(test),
            *test.targets.shape[1:],
        )
    else:
        count = chosen(counts, _shares, hits, data, MOST_TO_CHOOSE)
        shares = _shares(
            count,
            data.inputs,
            data.targets,
        )(data.test)
        outputs = outputs_of(shares, train, test)
    fitted = f"{count} of them, among {data.said}"
    return Baseline(
        "nearest neighbours",
        fitted,
        outputs,
    )


def _shares(count: int, inputs: np.ndarray, targets: np.ndarray) -> Answer:
    """Answer with the share of each class among the neighbours."""
    classes = max(
        2,
        int(targets.max()) + 1,
    )
    votes = np.eye(
        classes,
        dtype=np.float32,
    )[targets.astype(int)]
    neighbours = _neighbours(count, inputs)
    return lambda rows: votes[neighbours(rows)].mean(axis=1)


def _mean(count: int, inputs: np.ndarray, targets: np.ndarray) -> Answer:
    """Answer with the mean of the neighbours' targets."""
    neighbours = _neighbours(count, inputs)
    return lambda rows: targets[neighbours(rows)].mean(axis=1)


def _neighbours(count: int, inputs: np.ndarray) -> Answer:
    """Return a function of rows to the numbers of their neighbours, (rows, count)."""
    from sklearn.neighbors import NearestNeighbors

    # brute force: trees are slower from some twenty columns on
    model = NearestNeighbors(
        n_neighbors=count,
        algorithm="brute",
    ).fit(inputs)

    def found(rows: np.ndarray) -> np.ndarray:
        blocks = [
            rows[i : i + BLOCK]
            for i in range(
                0,
                len(rows),
                BLOCK,
            )
        ]
        parts = [
            model.kneighbors(
                block,
                return_distance=False,
            )
            for block in blocks
        ]
        return np.concatenate(parts)

    return found
