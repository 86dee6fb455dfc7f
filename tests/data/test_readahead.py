"""Blocks that threads read ahead: their order, their memory, their number."""

import threading
import time

import pytest

from lepton_jax.data.budget import Budget
from lepton_jax.data.readahead import Readahead, Tuning
from lepton_jax.errors import DataError


def numbers(count, work):
    """A `decide` that gives jobs returning 0, 1, 2, ..."""
    remaining = iter(range(count))

    def decide():
        number = next(remaining)
        return lambda: work(number)

    return decide


def test_blocks_come_in_order_whichever_thread_is_quicker():
    def work(number):
        time.sleep(0.002 * (number % 3))
        return number

    ahead = Readahead(numbers(60, work), Budget(100, 4), 1)
    ahead.tuning.workers = 4
    ahead.tuning.ahead = 8
    ahead._start_threads()
    assert list(ahead) == list(range(60))
    ahead.close()
    assert not ahead._threads


def test_no_more_is_read_than_the_budget_holds():
    made = []
    ahead = Readahead(numbers(100, made.append), Budget(50, 8), 10)
    for taken in range(1, 20):
        next(ahead)
        time.sleep(0.005)
        assert len(made) <= taken + ahead.tuning.ahead
        assert ahead.tuning.bytes <= 50
    ahead.close()


def test_an_error_comes_where_its_block_would_have_come():
    def work(number):
        if number == 3:
            raise DataError("broken", remedy="fix it")
        return number

    ahead = Readahead(numbers(10, work), Budget(100, 2), 1)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="broken"):
        next(ahead)


def test_closing_ends_the_threads_also_while_they_read():
    release = threading.Event()
    ahead = Readahead(numbers(10, lambda n: release.wait(5)), Budget(100, 2), 1)
    threads = list(ahead._threads)
    threading.Timer(0.05, release.set).start()
    ahead.close()
    assert not any(thread.is_alive() for thread in threads)


def simulated(tuning, gain, seconds=30.0):
    """Waits half of the time until a number of threads read, each of which gains."""
    now = 0.0
    while now < seconds:
        rate = 20 * min(tuning.workers, gain)
        now += 1 / rate
        tuning.given(now, 0.5 / rate)
    return tuning


def test_threads_are_added_while_each_brings_more_and_it_waits():
    many = simulated(Tuning(Budget(10_000, 8), 100), gain=8)
    assert many.workers == 8 and many.ahead == 64

    of_two = simulated(Tuning(Budget(10_000, 8), 100), gain=2)
    assert of_two.workers == 2  # the third was taken back

    bound = simulated(Tuning(Budget(350, 8), 100), gain=8)
    assert bound.bytes <= 350 and bound.workers <= 3


def test_nothing_grows_without_a_wait():
    tuning = Tuning(Budget(10_000, 8), 100)
    for block in range(1000):
        assert not tuning.given(block * 0.01, 0.00005)
    assert tuning.workers == 1 and tuning.ahead == 2


def test_a_budget_is_checked():
    with pytest.raises(DataError, match="memory is 0"):
        Budget(1, 1).with_(memory=0, workers=None)
    assert Budget(5, 2).with_(memory=None, workers=3) == Budget(5, 3)
