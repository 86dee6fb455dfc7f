"""Documents fitted into rows, and samples that are augmented."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax import losses
from lepton_jax.data import Source, instruction, masked, mix, open_feed, uniform
from lepton_jax.data.fitting import TOGETHER, plan_rows
from lepton_jax.data.pipeline import open_stream
from lepton_jax.errors import DataError

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def documents(count, seed=0, mean=8):
    """Documents of distinct tokens, so that a row says whose it holds."""
    sizes = np.random.default_rng(seed).geometric(1 / mean, count)
    return [1000 * i + np.arange(1, size + 1) for i, size in enumerate(sizes)]


@given(
    st.lists(st.integers(0, 40), max_size=60),
    st.integers(2, 16),
    st.sampled_from(["first", "best"]),
)
@settings(max_examples=100, deadline=None)
def test_each_input_of_a_document_is_in_one_row(sizes, length, fit):
    rows = plan_rows(sizes, length, fit)
    pieces = sorted(piece for row in rows for piece in row)
    expected = [
        (document, start, min(start + length, size))
        for document, size in enumerate(sizes)
        for start in range(0, size, length)
    ]
    assert pieces == expected
    for row in rows:
        assert 0 < sum(stop - start for _, start, stop in row) <= length
    # no two rows could be one
    used = sorted(sum(stop - start for _, start, stop in row) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > length


def test_fit_says_which_row_is_taken():
    sizes = [6, 5, 3, 2]
    first = [[p.document for p in row] for row in plan_rows(sizes, 9, "first")]
    best = [[p.document for p in row] for row in plan_rows(sizes, 9, "best")]
    assert first == best == [[0, 2], [1, 3]]
    sizes = [5, 6, 4, 3, 1]  # 3 goes to the first row with room, or to the fullest
    assert plan_rows([7, 8, 2], 10, "best") == [
        [(0, 0, 7)],
        [(1, 0, 8), (2, 0, 2)],
    ]
    assert plan_rows([8, 7, 2, 1], 10, "first")[0] == [(0, 0, 8), (2, 0, 2)]


@pytest.mark.parametrize("fit", ["first", "best"])
@pytest.mark.parametrize("end", [None, 9])
def test_rows_hold_documents_with_their_next_tokens(fit, end):
    given = documents(40)
    rows = Source(given).pack(16, end=end, segments=True, fit=fit)
    stream = open_stream(rows)
    (inputs, targets), names = stream.take(12)
    for row in range(12):
        for number, name in enumerate(names[row].split("+"), 1):
            place, _, cut = name.partition("[")
            tokens = given[int(place.split(":")[2])]
            start, stop = map(int, cut[:-1].split(":"))
            here = inputs["segments"][row] == number
            following = np.append(tokens, 9)
            assert inputs["tokens"][row, here].tolist() == tokens[start:stop].tolist()
            assert (
                targets[row, here].tolist() == following[start + 1 : stop + 1].tolist()
            )
            assert inputs["positions"][row, here].tolist() == list(range(stop - start))
        padding = inputs["segments"][row] == 0
        assert (targets[row, padding] == -1).all()
        assert (inputs["tokens"][row, padding] == (end or 0)).all()


def test_a_position_of_fitted_rows_goes_on_in_the_middle_of_a_plan():
    rows = Source(documents(5000)).pack(32, fit="best")
    stream = open_stream(rows, shuffle=True)
    expected = [stream.take(50) for _ in range(30)]
    assert len(expected) * 50 * 32 > TOGETHER * 8

    stream = open_stream(rows, shuffle=True)
    for (inputs, targets), names in expected:
        fresh = open_stream(rows, shuffle=True)
        fresh.restore(json.loads(json.dumps(stream.state())))
        (again, targets_again), names_again = fresh.take(50)
        assert names_again == names
        np.testing.assert_array_equal(again, inputs)
        np.testing.assert_array_equal(targets_again, targets)
        stream.take(50)


def test_padding_is_little_and_the_feed_says_how_much():
    rows = Source(documents(4000, mean=60)).pack(256, end=0, fit="best")
    feed = open_feed(rows, batch_size=32, steps=1, sharding=DEVICE, blocks=10)
    padded = 0
    for _, targets in feed:
        padded += int((np.asarray(targets) == -1).sum())
    share = feed.measured()["padding"]
    feed.close()
    assert share == pytest.approx(padded / (10 * 32 * 256))
    assert share < 0.01


def test_the_loss_leaves_padding_out():
    outputs = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 8)), jnp.float32)
    targets = jnp.array([[1, 2, -1, -1], [3, -1, -1, -1]])
    total, weight = losses.weighted_sum(losses.padded_cross_entropy, outputs, targets)
    each = losses.cross_entropy(outputs, jnp.maximum(targets, 0))
    assert weight == 3
    np.testing.assert_allclose(total, each[0, :2].sum() + each[1, 0], rtol=1e-6)


def test_documents_of_one_token_have_nothing_to_predict():
    with pytest.raises(DataError, match="nothing to predict"):
        open_stream(Source([[1], [2]]).pack(4, fit="first")).take(1)


# ---- augmentation ----


def pairs(count):
    return np.zeros((count, 3), np.float32), np.arange(count)


def jitter(random, x, y):
    return x + random.random(3, np.float32), y


def jitter_rows(keys, x, y):
    return x + uniform(keys, 3), y


@pytest.mark.parametrize("function, batched", [(jitter, False), (jitter_rows, True)])
def test_a_sample_is_changed_in_the_same_way_on_any_host_and_after_a_resume(
    function, batched
):
    sources = {"a": Source(pairs(20)), "b": Source(pairs(30))}
    dataset = mix(sources, weights={"a": 1, "b": 2}).augment(function, batched=batched)
    stream = open_stream(dataset, seed=3, shuffle=True)
    (whole, _), names = stream.take(48)
    assert len(np.unique(whole)) > 100

    for host in range(4):
        wanted = np.arange(12) + 12 * host
        part = open_stream(dataset, seed=3, shuffle=True).take(48, wanted)[0][0]
        np.testing.assert_array_equal(part, whole[wanted])

    other = open_stream(dataset, seed=4, shuffle=True).take(48)[0][0]
    assert not np.array_equal(other, whole)
    state = json.loads(json.dumps(stream.state()))
    resumed = open_stream(dataset, seed=3, shuffle=True)
    resumed.restore(state)
    (after, _), later_names = resumed.take(48)
    np.testing.assert_array_equal(after, stream.take(48)[0][0])
    # the next epoch changes a sample in another way
    twice = {
        name.replace(":1:", ":0:"): row
        for name, row in zip(later_names, after, strict=True)
    }
    same = [name for name in names if name in twice and name not in later_names]
    assert same
    assert all(
        not np.array_equal(twice[name], whole[names.index(name)]) for name in same
    )


def test_random_numbers_of_keys_are_uniform_and_their_own():
    numbers = uniform(np.arange(4000, dtype=np.uint64), 8)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.06
    np.testing.assert_array_equal(uniform(np.array([7], np.uint64), 8)[0], numbers[7])


@pytest.mark.parametrize("where", ["filter", "pack"])
def test_what_is_augmented_is_not_filtered_or_packed(where):
    dataset = Source(documents(5)).augment(lambda random, tokens: tokens)
    call = {"filter": lambda: dataset.filter(len), "pack": lambda: dataset.pack(4)}
    with pytest.raises(DataError, match="augment last"):
        call[where]()


@pytest.mark.parametrize("fit", ["cut", "first", "best"])
def test_masked_tokens_are_inputs_and_never_targets(fit):
    documents = [instruction([1, 0], [3, 4, 5]), np.array([6, 7, 8]), masked([9, 2])]
    rows = Source(documents).pack(8, end=10, fit=fit)
    stream = open_stream(rows, seed=0, shuffle=False)
    plain = open_stream(
        Source([[1, 0, 3, 4, 5], [6, 7, 8], [9, 2]]).pack(8, end=10, fit=fit),
        seed=0,
        shuffle=False,
    )
    (inputs, targets), _ = stream.take(4)
    (plain_inputs, plain_targets), _ = plain.take(4)
    np.testing.assert_array_equal(inputs, plain_inputs)
    # these tokens stand in the prompts alone
    read_only = np.isin(plain_targets, [1, 0, 9, 2])
    assert read_only.any()
    np.testing.assert_array_equal(targets, np.where(read_only, -1, plain_targets))
