"""iALS and ItemKNN of the library implicit, tuned, on MovieLens: all items, last out.

    python benchmarks/peers/movielens_implicit.py ratings.csv --seeds 0,1,2

The split is that of `recipes/recommender.py --feedback implicit`: of each user's
ratings, in the order of their times and with ties in an order drawn from the seed, the
last one is held out. Settings are chosen on the one before the last, by NDCG@10, with
another seed, and without the last one in training. Items that a user has rated are not
ranked again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from typing import Any

import implicit
import numpy as np
from scipy import sparse

FIRST = 10  # ranks that count
CHOOSING_SEED = 7

# The ranges are those around which Rendle et al. 2022, "Revisiting the Performance of
# iALS on Item Recommendation Benchmarks", and Dacrema et al. 2019 find the best ones.
FACTORS = (16, 32, 64)
WEIGHTS = (1.0, 3.0, 10.0, 30.0)  # of what was observed; of what was not: 1
REGULARIZATION = (0.3, 3.0, 30.0)
NEIGHBOURS = (20, 50, 200, 1000)


def read(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes of users and items, sorted by name, and the times."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    user = np.unique([row["userId"] for row in rows], return_inverse=True)[1]
    item = np.unique([row["movieId"] for row in rows], return_inverse=True)[1]
    time = np.array([float(row["timestamp"]) for row in rows])
    return user, item, time


def split(ratings: Any, seed: int, back: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return the training matrix, and users and items held out.

    Args:
      ratings: from `read`.
      seed: of the order of ties.
      back: 0 for the last item of each user, 1 for the one before.
    """
    user, item, time = ratings
    tie = np.random.default_rng(seed).random(len(user))
    order = np.lexsort((tie, time, user))
    counts = np.bincount(user)
    ends = np.repeat(np.cumsum(counts), counts)
    place = ends - 1 - np.arange(len(user))
    train = order[place > back]
    test = order[place == back]
    ones = np.ones(len(train), np.float32)
    shape = (user.max() + 1, item.max() + 1)
    matrix = sparse.csr_matrix((ones, (user[train], item[train])), shape=shape)
    return matrix, user[test], item[test]


def measured(model: Any, parts: Any) -> tuple[float, float]:
    """Return HR@10 and NDCG@10 of a fitted model."""
    matrix, users, items = parts
    ranked, _ = model.recommend(users, matrix[users], N=FIRST)
    hits = ranked == items[:, None]
    gains = hits / np.log2(np.arange(FIRST) + 2)
    return hits.any(1).mean(), gains.sum(1).mean()


def als(factors: int, weight: float, regularization: float) -> Any:
    """Return iALS."""
    return implicit.als.AlternatingLeastSquares(
        factors=factors,
        alpha=weight,
        regularization=regularization,
        iterations=15,
        random_state=0,
        num_threads=1,
        calculate_training_loss=False,
    )


def knn(neighbours: int) -> Any:
    """Return ItemKNN by cosine."""
    return implicit.nearest_neighbours.CosineRecommender(K=neighbours, num_threads=1)


def chosen(make: Any, grid: Any, parts: Any) -> Any:
    """Return the settings with the best NDCG@10."""
    best = (-1.0, None)
    for settings in grid:
        model = make(*settings)
        model.fit(parts[0], show_progress=False)
        best = max(best, (measured(model, parts)[1], settings))
    return best[1]


def main() -> None:
    """Choose, fit for each seed, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ratings")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    ratings = read(options.ratings)
    choosing = split(ratings, CHOOSING_SEED, 1)
    methods = {
        "iALS": (als, itertools.product(FACTORS, WEIGHTS, REGULARIZATION)),
        "ItemKNN": (knn, itertools.product(NEIGHBOURS)),
    }
    for name, (make, grid) in methods.items():
        settings = chosen(make, grid, choosing)
        results = []
        for seed in map(int, options.seeds.split(",")):
            parts = split(ratings, seed, 0)
            model = make(*settings)
            model.fit(parts[0], show_progress=False)
            results.append(measured(model, parts))
        hits, gains = np.median(results, axis=0)
        print(f"{name} {settings}: HR@10 {hits:.4f}, NDCG@10 {gains:.4f}", flush=True)


if __name__ == "__main__":
    main()
