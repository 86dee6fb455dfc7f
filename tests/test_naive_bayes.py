from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from lepton_jax import baselines
from lepton_jax.baselines import NotHere, Samples

GOOD = ["good film", "a good one", "good, good fun", "fun"]
BAD = ["bad film", "a bad one", "bad and dull", "dull"]


def samples(texts, targets, task="classes", classes=2) -> Samples:
    table = pl.DataFrame({"text": texts})
    inputs = np.zeros((len(texts), 3), np.int32)
    return Samples(
        inputs,
        np.asarray(targets),
        len(texts),
        task=task,
        classes=classes if task == "classes" else 0,
        read_raw=lambda rows=None: table,
    )


TRAIN = samples(GOOD + BAD, [1] * 4 + [0] * 4)
TEST = samples(["good", "dull film", "so good", "nothing known"], [1, 0, 1, 1])


def test_ratios_are_those_of_the_paper():
    counts = np.array([[3, 0], [1, 1], [0, 4]])
    p = np.array([1, 2, 5]) / 8  # of the second class
    q = np.array([4, 2, 1]) / 7
    expected = np.log(p / q)
    ratios = baselines.log_count_ratios(counts)
    np.testing.assert_allclose(ratios[:, 1], expected, rtol=1e-6)
    np.testing.assert_allclose(ratios[:, 0], -expected, rtol=1e-6)
    both = np.stack([counts, counts.sum(1, keepdims=True) - counts], axis=-1)
    np.testing.assert_array_equal(baselines.log_count_ratios(both), ratios)


@pytest.mark.parametrize("method", [baselines.naive_bayes, baselines.nb_svm])
def test_texts_are_told_apart_by_their_words(method):
    pytest.importorskip("sklearn", reason="needs the extra recipes")
    found = method(TRAIN, TEST)
    assert found.outputs.shape == (4, 2)
    assert found.outputs.argmax(1)[:3].tolist() == [1, 0, 1]
    assert "bigrams" in found.name


@pytest.mark.parametrize("method", [baselines.naive_bayes, baselines.nb_svm])
def test_several_labels_and_one_that_all_have(method):
    pytest.importorskip("sklearn", reason="needs the extra recipes")
    labels = np.array([[1, 1]] * 4 + [[0, 1]] * 4)
    train = samples(GOOD + BAD, labels, task="binary")
    test = samples(["good", "bad"], [[1, 1], [0, 1]], task="binary")
    outputs = method(train, test).outputs
    assert ((outputs > 0) == test.targets).all()


def test_words_of_a_script_without_spaces_are_its_characters():
    pytest.importorskip("sklearn", reason="needs the extra recipes")
    texts = [f"{mark}这部电影{mark}" for mark in "好很棒坏难差"]
    train = samples(texts, [1, 1, 1, 0, 0, 0])
    test = samples(["电影好", "电影坏"], [1, 0])
    outputs = baselines.naive_bayes(train, test).outputs
    assert outputs.argmax(1).tolist() == [1, 0]


def test_what_has_no_classes_or_no_texts_is_not_for_them():
    pytest.importorskip("sklearn", reason="needs the extra recipes")
    quantities = samples(GOOD, [1.0] * 4, task="quantities")
    with pytest.raises(NotHere, match="no classes"):
        baselines.naive_bayes(quantities, quantities)
    with pytest.raises(NotHere, match="no column 'review'"):
        baselines.nb_svm(TRAIN, TEST, text="review")
