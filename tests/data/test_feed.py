"""The order of samples.

It is exact under every batch size, block size, position and number of devices.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.compat import make_mesh
from lepton_jax.data import Arrays, open_feed
from lepton_jax.data.arrays import ArraysByPosition, Buffers

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def identifiers(feed):
    return np.concatenate([np.asarray(block[1]).reshape(-1) for block in feed])


def numbered(count):
    return Arrays(
        np.arange(count, dtype=np.float32)[:, None], np.arange(count, dtype=np.int32)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(0, 200),
    st.integers(1, 120),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_positions_alone_decide_the_samples(samples, start, count, seed, shuffle):
    stream = ArraysByPosition(numbered(samples), seed, shuffle)
    whole = stream.indices(0, start + count)
    np.testing.assert_array_equal(
        ArraysByPosition(numbered(samples), seed, shuffle).indices(
            start, start + count
        ),
        whole[start:],
    )
    np.testing.assert_array_equal(stream.rows(start, start + count)[1], whole[start:])
    for epoch in range((start + count) // samples):
        assert sorted(whole[epoch * samples : (epoch + 1) * samples]) == list(
            range(samples)
        )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 60),
    st.booleans(),
)
def test_blocks_cut_the_stream_without_gap_or_overlap(
    samples, batch, steps, blocks, start, resident
):
    data = numbered(samples)
    feed = open_feed(
        data,
        batch_size=batch,
        steps=steps,
        sharding=ONE,
        seed=1,
        shuffle=True,
        position=start,
        blocks=blocks,
        resident=resident,
    )
    indices = [np.asarray(b if resident else b[1]).reshape(-1) for b in feed]
    found = np.concatenate(indices)
    expected = ArraysByPosition(data, 1, True).indices(
        start, start + blocks * batch * steps
    )
    np.testing.assert_array_equal(found[: len(expected)], expected)
    # resident indices are read some steps ahead
    assert len(found) - len(expected) < 64 * batch


def test_state_says_where_to_go_on():
    def feed_from(position):
        return open_feed(
            numbered(30),
            batch_size=4,
            steps=3,
            sharding=ONE,
            seed=2,
            shuffle=True,
            position=position,
            blocks=6,
        )

    first = feed_from(0)
    blocks = [next(first) for _ in range(2)]
    # of the second block's three batches, two are consumed
    position = first.state(unused=4)
    first.close()
    consumed = identifiers(blocks)[:20]
    rest = identifiers(feed_from(position))

    assert position["samples"] == 20
    np.testing.assert_array_equal(
        np.concatenate([consumed, rest])[:60],
        ArraysByPosition(numbered(30), 2, True).indices(0, 60),
    )


def test_seeds_and_epochs_give_other_orders():
    one, other = (
        ArraysByPosition(numbered(100), seed, True).indices(0, 200) for seed in (0, 1)
    )
    assert (one[:100] != one[100:]).any()
    assert (one != other).any()


def test_a_buffer_is_not_used_again_while_a_block_lives():
    data = Arrays(
        np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32),
        np.arange(512, dtype=np.int32),
    )
    feed = open_feed(
        data,
        batch_size=64,
        steps=1,
        sharding=ONE,
        shuffle=True,
        blocks=64,
    )
    held = list(feed)
    for inputs, targets in held:
        np.testing.assert_array_equal(inputs, data.inputs[np.asarray(targets)])


def test_a_buffer_is_used_again_once_nobody_holds_it():
    buffers = Buffers()
    first = buffers.empty((1000,), np.float32)
    address = first.ctypes.data
    view = first[10:20]
    assert buffers.empty((1000,), np.float32).ctypes.data != address
    del first
    assert buffers.empty((1000,), np.float32).ctypes.data != address, (
        "a view still refers to it"
    )
    del view
    assert address in {buffers.empty((1000,), np.float32).ctypes.data}


def test_blocks_are_sharded_over_the_batch_dim():
    mesh = make_mesh({"data": 8}, jax.devices())
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, "data")
    )
    feed = open_feed(
        numbered(64),
        batch_size=16,
        steps=2,
        sharding=sharding,
        blocks=2,
    )
    inputs, _ = next(feed)
    assert inputs.shape == (2, 16, 1)
    assert inputs.addressable_shards[3].data.shape == (
        2,
        2,
        1,
    )
    feed.close()


def test_an_error_in_reading_reaches_the_loop():
    class Breaks(Arrays):
        def take(self, indices, empty=None):
            if 25 in indices:
                raise OSError("the disk is gone")
            return super().take(indices, empty)

    data = Breaks(np.zeros((30, 1), np.float32), np.zeros(30, np.int32))
    with pytest.raises(Exception, match="the disk is gone"):
        list(open_feed(data, batch_size=5, steps=1, sharding=ONE, blocks=6))
