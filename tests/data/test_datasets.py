"""The four kinds of data set that a person can give, behind one face."""

import doctest
import importlib

import grain
import jax
import numpy as np
import pytest

from lepton_jax.data import Arrays, Feed, Source, epoch_samples, open_feed, settled
from lepton_jax.errors import DataError

BATCH_SIZE = 4
SAMPLES = 10
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])

INPUTS = np.arange(SAMPLES, dtype=np.float32)[:, None]
TARGETS = np.arange(SAMPLES, dtype=np.int32)
MAP_DATASET = grain.MapDataset.source(list(zip(INPUTS, TARGETS, strict=True)))
KINDS = {
    "a pair": (INPUTS, TARGETS),
    "arrays": Arrays(INPUTS, TARGETS),
    "a MapDataset": MAP_DATASET,
    "an IterDataset": MAP_DATASET.repeat().to_iter_dataset(),
    "a Dataset": Source((INPUTS, TARGETS)),
}


def opened(kind, position=0, blocks=5):
    return open_feed(
        KINDS[kind],
        batch_size=BATCH_SIZE,
        steps=1,
        sharding=DEVICE,
        position=position,
        blocks=blocks,
    )


def targets(feed, blocks):
    return [np.asarray(next(feed)[1]).tolist() for _ in range(blocks)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_fed_in_its_own_order(kind):
    feed = opened(kind)
    first = targets(feed, 3)
    feed.close()

    assert isinstance(feed, Feed)
    assert first == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_on_at_its_position(kind):
    feed = opened(kind)
    targets(feed, 2)
    position = feed.state(unused=0)
    feed.close()

    resumed = opened(kind, position)
    rest = targets(resumed, 2)
    resumed.close()

    assert position["samples"] == 2 * BATCH_SIZE
    assert rest == [[8, 9, 0, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("a pair", ["0:8", "0:9", "1:0", "1:1"]),
        ("a MapDataset", ["8", "9", "10", "11"]),
        ("an IterDataset", ["8", "9", "10", "11"]),
        ("a Dataset", ["data:0:8", "data:0:9", "data:1:0", "data:1:1"]),
    ],
)
def test_the_samples_of_a_batch_have_names(kind, names):
    feed = opened(kind)
    targets(feed, 3)
    feed.close()

    assert feed.names(3 * BATCH_SIZE) == names


@pytest.mark.parametrize("steps", [1, 3])
def test_resident_samples_are_fed_as_indices(steps):
    feed = open_feed(
        KINDS["arrays"],
        batch_size=BATCH_SIZE,
        steps=steps,
        sharding=DEVICE,
        blocks=2,
        resident=True,
    )
    indices = np.concatenate([np.asarray(next(feed)).reshape(-1) for _ in range(2)])
    feed.close()

    expected = np.arange(2 * steps * BATCH_SIZE) % SAMPLES
    np.testing.assert_array_equal(indices, expected)


def test_data_that_are_settled_stay_the_same_object():
    for kind in ("arrays", "a MapDataset", "an IterDataset", "a Dataset"):
        assert settled(KINDS[kind]) is KINDS[kind]

    assert isinstance(settled(KINDS["a pair"]), Arrays)
    with pytest.raises(DataError, match="not a pair of inputs and targets"):
        settled("a path")


def test_only_data_that_end_have_epochs():
    samples = {kind: epoch_samples(data) for kind, data in KINDS.items()}

    assert samples == {
        "a pair": SAMPLES,
        "arrays": SAMPLES,
        "a MapDataset": SAMPLES,
        "an IterDataset": None,
        "a Dataset": None,
    }


@pytest.mark.parametrize(
    "name",
    [
        "data.arrays",
        "data.columns",
        "data.fitting",
        "data.indexed",
        "data.memory",
        "data.mixing",
        "data.notation",
        "data.readahead",
        "data.shuffling",
        "data.streams",
        "monitor.chart",
    ],
)
def test_the_examples_in_docstrings_hold(name):
    module = importlib.import_module(f"lepton_jax.{name}")

    results = doctest.testmod(module)

    assert results.attempted > 0
    assert results.failed == 0
