"""Statistics that add up."""

from __future__ import annotations

import itertools
import math

import numpy as np
import polars as pl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lepton_jax.data.prepare.statistics import BINS, add, statistics

# this file's own formula for bins rounds a number near the smallest, next to 1e16, to 0
NUMBERS = st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-250)
LISTS = st.lists(st.one_of(NUMBERS, st.none(), st.just(math.nan)), max_size=60)


def whole(values: list, cuts: list[int], kind=pl.Float64) -> dict:
    """Statistics of values that are divided into pieces."""
    bounds = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    pieces = [
        pl.DataFrame({"x": values[low:high]}, schema={"x": kind})
        for low, high in itertools.pairwise(bounds)
    ]
    return add([statistics(piece)["x"] for piece in pieces])


@settings(max_examples=150, deadline=None)
@example([0.0, 1e30, -1e30, 5e-324], [1])
@example([7.0, 7.0], [1])
@given(LISTS, st.lists(st.integers(0, 60), max_size=4))
def test_pieces_add_up_to_the_statistics_of_numpy(values, cuts):
    found = whole(values, cuts)
    used = np.array([x for x in values if x is not None and not math.isnan(x)])
    assert found["count"] == len(values)
    assert found["missing"] == values.count(None)
    if not len(used):
        assert "mean" not in found
        return
    scale = max(abs(used).max(), 1e-300)
    assert abs(found["mean"] - used.mean()) <= 1e-9 * scale
    assert abs(found["std"] - used.std()) <= 1e-9 * scale
    assert (found["min"], found["max"]) == (used.min(), used.max())

    histogram = found["histogram"]
    assert sum(histogram["rows"]) == len(used)
    assert len(histogram["rows"]) <= BINS
    bins = np.floor(used / histogram["width"]) - histogram["edge"] / histogram["width"]
    counts = np.bincount(bins.astype(int), minlength=len(histogram["rows"]))
    assert histogram["rows"] == counts.tolist()


# Many equal values, so that pieces of one value are among them.
FEW = st.lists(st.sampled_from([None, 0.0, 1.0, 1.001, -3.0, 1e-300, 1e30]), max_size=9)


@settings(max_examples=100, deadline=None)
@example([None, 0.0, 1.0], [2])
@example([1.0, 1.001], [1])
@example([0.0, 5e-324], [1])
@given(st.one_of(LISTS, FEW), st.lists(st.integers(0, 60), max_size=4))
def test_a_histogram_does_not_depend_on_the_pieces(values, cuts):
    assert whole(values, cuts).get("histogram") == whole(values, []).get("histogram")


@settings(deadline=None)
@given(st.lists(st.integers(-(2**40), 2**40), min_size=1))
def test_whole_numbers_have_bins_of_whole_width(values):
    assert whole(values, [3], pl.Int64)["histogram"]["width"] >= 1


def test_frequent_values_are_counted_and_free_text_is_measured():
    jobs = ["clerk"] * 5 + ["boss"] * 2 + [None]
    found = whole(jobs, [3], pl.String)
    assert found["top"] == [["clerk", 5], ["boss", 2]]
    texts = [f"text {number}" for number in range(3000)]
    assert whole(texts, [1500], pl.String)["top"] is None
    assert whole(texts, [1500], pl.String)["max"] == len("text 2999")
