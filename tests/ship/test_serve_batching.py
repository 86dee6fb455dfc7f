"""Requests in batches: the answers are those without, and faults stay with one."""

import asyncio
import time

import numpy as np
import pytest
import standins
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("orjson", reason="the extra 'serve'")

from lepton_jax.ship.serve import batcher as batching
from lepton_jax.ship.serve.batcher import Batcher, Limits, filled
from lepton_jax.ship.serve.ladder import Ladder
from lepton_jax.ship.serve.refusal import Refusal
from lepton_jax.ship.serve.warming import warm


@pytest.fixture(scope="module")
def network():
    """A network of JAX as an artifact: rows of 5 numbers to 3 and their largest."""
    import jax
    import jax.numpy as jnp

    draw = np.random.default_rng(0)
    first = draw.normal(size=(5, 32)).astype(np.float32)
    second = draw.normal(size=(32, 3)).astype(np.float32)

    @jax.jit
    def run(inputs):
        outputs = jnp.tanh(inputs @ first) @ second
        return {"outputs": outputs, "prediction": outputs.argmax(1)}

    return standins.Standin(
        lambda arrays: {name: np.asarray(a) for name, a in run(**arrays).items()},
        (standins.Tensor("inputs", "float32", (-1, 5)),),
        (
            standins.Tensor("outputs", "float32", (-1, 3)),
            standins.Tensor("prediction", "int32", (-1,)),
        ),
    )


def alone(artifact, inputs, sizes):
    """The outputs of rows that have compiled sizes to themselves."""
    parts = []
    for number, size in enumerate(sizes):
        rows = inputs[8 * number :][:8]
        outputs = artifact.compiled(size)({"inputs": filled([rows], size)})
        parts.append({name: array[: len(rows)] for name, array in outputs.items()})
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 19),  # rows
        st.integers(0, 3),  # priority
        st.integers(0, 3),  # turns of the loop before it is sent
    ),
    min_size=1,
    max_size=14,
)


@given(REQUESTS, st.booleans(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_batched_answers_are_the_unbatched_ones_to_the_bit(
    network, requests, quick, seed
):
    draw = np.random.default_rng(seed)
    rows = [draw.normal(size=(r, 5)).astype(np.float32) for r, _, _ in requests]

    async def ask(batcher, inputs, priority, turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        return await batcher.submit({"inputs": inputs}, len(inputs), priority)

    async def run():
        programs = {size: network.compiled(size) for size in network.sizes}
        seconds = {size: (1e-6 if quick else 1e-2) * size for size in programs}
        batcher = Batcher(programs, Ladder(seconds))
        asked = [
            ask(batcher, inputs, priority, turns)
            for inputs, (_, priority, turns) in zip(rows, requests, strict=True)
        ]
        answers = await asyncio.gather(*asked)
        assert batcher.is_idle
        batcher.close()
        return answers

    for inputs, done in zip(rows, asyncio.run(run()), strict=True):
        expected = alone(network, inputs, done.sizes)
        for name, array in done.outputs.items():
            np.testing.assert_array_equal(array, expected[name])


def batcher_of(artifact, seconds=1e-6, **limits):
    ready = warm(artifact)
    ladder = Ladder({size: seconds * size for size in ready.programs})
    return Batcher(ready.programs, ladder, Limits(**limits))


def rows_of(*values):
    return {"inputs": np.array(values, np.float32)[:, None] + np.zeros(3, np.float32)}


@pytest.mark.parametrize("seconds", [1e-6, 1e-2], ids=["quick", "in a thread"])
def test_a_poisoned_request_fails_alone(seconds):
    async def run():
        batcher = batcher_of(standins.poisoned(), seconds)
        asked = [batcher.submit(rows_of(v), 1) for v in (1, 13, 2, 13, 3)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        batcher.close()
        return answers

    one, bad, two, worse, three = asyncio.run(run())
    for refusal in (bad, worse):
        assert isinstance(refusal, Refusal) and refusal.status == 500
        assert "thirteen" in refusal.message
    for value, done in ((1, one), (2, two), (3, three)):
        np.testing.assert_array_equal(done.outputs["outputs"], [[2 * value] * 3])


def test_requests_that_come_together_run_together():
    artifact = standins.linear()
    calls = []
    quick = artifact.function

    def function(arrays):
        calls.append(len(arrays["inputs"]))
        return quick(arrays)

    artifact.function = function

    async def run():
        batcher = batcher_of(artifact)
        calls.clear()
        await asyncio.gather(*(batcher.submit(rows_of(i), 1) for i in range(7)))

    asyncio.run(run())
    # of 1, 2, 4 and 8 rows at these times nothing is to be filled up
    assert calls == [4, 2, 1]


def slow(seconds=0.05):
    artifact = standins.linear()
    quick = artifact.function

    def function(arrays):
        time.sleep(seconds)
        return quick(arrays)

    artifact.function = function
    artifact.sizes = (1,)
    return artifact


def test_the_urgent_run_before_those_that_came_first():
    async def run():
        batcher = batcher_of(slow(0.01), 1e-2)
        order = []

        async def ask(name, priority):
            await batcher.submit(rows_of(1), 1, priority)
            order.append(name)

        first = asyncio.ensure_future(ask("running", 2))
        await asyncio.sleep(0.005)
        later = [ask("last", 3), ask("usual", 0), ask("urgent", 1), ask("odd", 9)]
        await asyncio.gather(first, *later)
        return order

    assert asyncio.run(run()) == ["running", "urgent", "usual", "odd", "last"]


def test_a_full_queue_says_when_to_come_back_and_the_urgent_take_a_place():
    async def run():
        batcher = batcher_of(slow(), 0.05, waiting=3)
        first = asyncio.ensure_future(batcher.submit(rows_of(0), 1))
        await asyncio.sleep(0.01)
        waiting = [
            asyncio.ensure_future(batcher.submit(rows_of(i), 1, 2 + (i == 2)))
            for i in range(3)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as caught:
            await batcher.submit(rows_of(9), 1, 3)
        urgent = await batcher.submit(rows_of(7), 1, 1)
        answers = await asyncio.gather(first, *waiting, return_exceptions=True)
        return caught.value, urgent, answers

    full, urgent, answers = asyncio.run(run())
    assert full.status == 503 and full.retry_after >= 1
    assert urgent.outputs["outputs"][0, 0] == 14
    assert answers[3].status == 503 and "urgent" in answers[3].message
    assert not any(isinstance(answer, Exception) for answer in answers[:3])


def test_a_request_that_waits_too_long_is_told_so_at_once():
    async def run():
        batcher = batcher_of(slow(0.2), 0.2)
        first = asyncio.ensure_future(batcher.submit(rows_of(0), 1))
        await asyncio.sleep(0.01)
        began = time.perf_counter()
        with pytest.raises(Refusal) as caught:
            await batcher.submit(rows_of(1), 1, timeout=0.02)
        waited = time.perf_counter() - began
        await first
        assert batcher.is_idle
        return caught.value, waited

    refusal, waited = asyncio.run(run())
    assert refusal.status == 504 and waited < 0.15


def test_a_request_whose_client_has_gone_is_not_computed():
    artifact = slow()
    calls = []
    quick = artifact.function
    artifact.function = lambda arrays: calls.append(arrays) or quick(arrays)

    async def run():
        batcher = batcher_of(artifact, 0.05)
        calls.clear()
        first = asyncio.ensure_future(batcher.submit(rows_of(0), 1))
        await asyncio.sleep(0.01)
        gone = batcher.submit(rows_of(1), 1, is_gone=lambda: True)
        answers = await asyncio.gather(first, gone, return_exceptions=True)
        assert batcher.is_idle
        return answers

    _, gone = asyncio.run(run())
    assert isinstance(gone, asyncio.CancelledError) and len(calls) == 1


def test_collecting_waits_for_company_but_not_beyond_its_time():
    artifact = standins.linear()
    calls = []
    quick = artifact.function

    def function(arrays):
        calls.append(len(arrays["inputs"]))
        return quick(arrays)

    artifact.function = function

    async def run():
        ready = warm(artifact)
        ladder = Ladder(dict.fromkeys(ready.programs, 1e-6))
        batcher = Batcher(ready.programs, ladder, Limits(collect=0.1))
        calls.clear()
        first = asyncio.ensure_future(batcher.submit(rows_of(0), 1))
        await asyncio.sleep(0.005)
        await asyncio.gather(first, batcher.submit(rows_of(1), 1))
        # nobody waits once the best batch is full
        began = time.perf_counter()
        await asyncio.gather(*(batcher.submit(rows_of(i), 1) for i in range(8)))
        assert time.perf_counter() - began < 0.08

    asyncio.run(run())
    assert calls == [2, 8]


def test_clients_that_come_back_together_run_together():
    artifact = standins.linear()
    calls = []
    quick = artifact.function

    def function(arrays):
        calls.append(len(arrays["inputs"]))
        time.sleep(0.2)
        return quick(arrays)

    async def client(batcher, pause):
        for _ in range(3):
            await batcher.submit(rows_of(1), 1)
            await asyncio.sleep(pause)

    async def run():
        ready = warm(artifact)
        artifact.function = function
        batcher = Batcher(ready.programs, Ladder(dict.fromkeys(ready.programs, 0.2)))
        clients = [client(batcher, 1e-4 * number) for number in range(4)]
        await asyncio.gather(*clients)

    asyncio.run(run())
    # without a moment's wait they would be 4, 1, 4, 1, ...
    assert calls == [4, 4, 4]


def test_where_rows_meet_no_two_requests_share_a_batch():
    artifact = standins.linear()
    calls = []
    quick = artifact.function
    artifact.function = lambda a: calls.append(len(a["inputs"])) or quick(a)

    async def run():
        ready = warm(artifact)
        ladder = Ladder(dict.fromkeys(ready.programs, 1e-6))
        batcher = Batcher(ready.programs, ladder, together=False)
        calls.clear()
        await asyncio.gather(*(batcher.submit(rows_of(i), 1) for i in range(4)))

    asyncio.run(run())
    assert calls == [1, 1, 1, 1]


@given(
    st.dictionaries(st.integers(1, 32), st.floats(1e-5, 1.0), min_size=1, max_size=5),
    st.integers(1, 100),
)
def test_the_ladder_runs_all_rows_in_the_least_time(seconds, rows):
    ladder = Ladder(seconds)

    def simulate(rows):
        total = 0.0
        while rows > 0:
            size = ladder.first(rows)
            total += ladder.seconds[size]
            rows -= size
        return total

    assert simulate(rows) == pytest.approx(ladder.total(rows))
    if rows <= ladder.largest:
        assert ladder.total(rows) <= ladder.seconds[ladder.around(rows)] + 1e-12


def test_filling_repeats_the_last_row_and_copies_nothing_that_fits():
    whole = np.arange(6.0).reshape(2, 3)
    assert filled([whole], 2) is whole
    np.testing.assert_array_equal(filled([whole, whole[:1]], 4), whole[[0, 1, 0, 0]])
    assert batching.QUICK < 0.01
