"""Sources, filters, maps, mixtures and packing, however they are read.

They are compared with a model that goes sample by sample.
"""

import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.data import Arrays, Documents, Source, mix
from lepton_jax.data.mixing import Pattern, proportions
from lepton_jax.data.pipeline import open_stream, sample
from lepton_jax.data.shuffling import SORTED, Order
from lepton_jax.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def pairs(count, base=0):
    numbers = np.arange(
        base,
        base + count,
        dtype=np.int32,
    )
    return np.stack([numbers, -numbers], axis=1).astype(np.float32), numbers


def documents(lengths, base=0):
    ends = base + np.cumsum(lengths)
    return [
        np.arange(
            end - n,
            end,
            dtype=np.int32,
        )
        for end, n in zip(ends, lengths, strict=True)
    ]


class Model:
    """The samples that a data set should give, in order: (identifier, contents)."""

    @staticmethod
    def source(samples, name, seed, shuffle):
        for epoch in itertools.count():
            order = Order(len(samples), seed, name, shuffle).at(
                epoch * len(samples), len(samples)
            )[1]
            yield from ((f"{name}:{epoch}:{i}", samples[i]) for i in order.tolist())

    @staticmethod
    def mix(streams, weights):
        """Choose by the definition.

        Of the sources that are not ahead of their share, it is the one that must be
        served soonest.
        """
        taken = dict.fromkeys(streams, 0)
        total = sum(weights.values())
        for position in itertools.count():
            share = {n: Fraction(weights[n]) / total for n in streams}
            open_ = [n for n in sorted(streams) if int(taken[n] / share[n]) <= position]
            chosen = min(
                open_,
                key=lambda n: (-(-(taken[n] + 1) // share[n]), n),
            )
            taken[chosen] += 1
            yield next(streams[chosen])

    @staticmethod
    def pack(stream, length, end):
        tokens = (
            (name, i, token)
            for name, document in stream
            for i, token in enumerate(
                [*document.tolist()] + ([] if end is None else [end])
            )
        )
        row = list(itertools.islice(tokens, length))
        while True:
            following = list(itertools.islice(tokens, length))
            parts = []
            for name, group in itertools.groupby(row, key=lambda t: t[0]):
                places = [i for _, i, _ in group]
                parts.append(f"{name}[{places[0]}:{places[-1] + 1}]")
            values = [token for _, _, token in row]
            yield (
                "+".join(parts),
                (
                    np.array(values),
                    np.array([*values[1:], following[0][2]]),
                ),
            )
            row = following


KEPT = {
    "all": None,
    "thirds": lambda number: number % 3 != 1,
    "odd, in batches": lambda number: number % 2 == 1,
}
KINDS = st.sampled_from(list(KEPT))


def number(*one):
    """The number that samples are filtered by: the target, or the first token."""
    return int(one[1] if len(one) == 2 else one[0][0])


def filtered(dataset, kind):
    """Filter by a function that takes one sample, or many; nothing at all for "all"."""
    if kind == "thirds":
        return dataset.filter(lambda *one: KEPT[kind](number(*one)))
    return (
        dataset
        if kind == "all"
        else dataset.filter(
            lambda *rows: (
                np.array([x[0] % 2 == 1 for x in rows[0]])
                if len(rows) == 1
                else rows[1] % 2 == 1
            ),
            batched=True,
        )
    )


def passing(kind, contents):
    """The kind, if it leaves some of the contents; else "all"; and what it leaves."""
    left = [
        c
        for c in contents
        if kind == "all" or KEPT[kind](number(*(c if isinstance(c, tuple) else (c,))))
    ]
    return (kind, left) if left else ("all", list(contents))


def kept(stream, kind):
    return (
        stream
        if kind == "all"
        else (s for s in stream if passing(kind, [s[1]])[0] == kind)
    )


@st.composite
def made(draw):
    """A random data set, and the function of (seed, shuffle) that makes its model."""
    ragged = draw(st.booleans())
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    weights = {name: draw(st.sampled_from([1, 2, 5, 0.3])) for name in names}
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    sources = {}
    models = {}
    left = []
    for i, name in enumerate(names):
        if ragged:
            contents = documents(
                draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)), 1 + 1000 * i
            )
            data = (
                contents
                if draw(st.booleans())
                else Documents(np.concatenate(contents), [len(x) for x in contents])
            )
        else:
            inputs, targets = pairs(draw(st.integers(1, 12)), 1000 * i)
            data = (inputs, targets)
            contents = list(
                zip(
                    inputs,
                    targets,
                    strict=True,
                )
            )
        kind, some = passing(draw(KINDS), contents)
        left += some
        sources[name] = filtered(
            Source(data, name=name if draw(st.booleans()) else None), kind
        )
        models[name] = lambda seed, shuffle, c=contents, n=name, k=kind: kept(
            Model.source(c, n, seed, shuffle), k
        )
    kind = passing(draw(KINDS), left)[0]
    times = draw(st.integers(1, 2))
    dataset = filtered(mix(sources, weights=weights), kind)

    def model(*order):
        streams = {name: stream(*order) for name, stream in models.items()}
        return kept(Model.mix(streams, exact), kind)

    if ragged:
        length = draw(st.integers(2, 11))
        end = draw(st.sampled_from([None, 0]))
        batched = draw(st.booleans())
        if times == 2:
            dataset = dataset.map(
                (
                    (lambda rows: [np.repeat(x, 2) for x in rows])
                    if batched
                    else (lambda x: np.repeat(x, 2))
                ),
                batched=batched,
            )

        def packed(*order):
            repeated = ((name, np.repeat(x, times)) for name, x in model(*order))
            return Model.pack(repeated, length, end)

        return dataset.pack(length, end=end), packed
    if times == 2:
        dataset = dataset.map(
            lambda x, y: (x * 2, y),
            batched=draw(st.booleans()),
        )
    return dataset, lambda *order: (
        (name, (x * times, y)) for name, (x, y) in model(*order)
    )


@settings(max_examples=120, deadline=None)
@given(
    made(),
    st.integers(0, 2**32),
    st.booleans(),
    st.lists(
        st.integers(1, 30),
        min_size=1,
        max_size=5,
    ),
    st.lists(
        st.booleans(),
        min_size=5,
        max_size=5,
    ),
    st.integers(1, 4),
)
def test_however_it_is_read_it_is_the_model(
    dataset, seed, shuffle, counts, restarts, hosts
):
    dataset, model = dataset
    expected = list(itertools.islice(model(seed, shuffle), sum(counts)))
    streams = [open_stream(dataset, seed, shuffle) for _ in range(hosts)]
    at = 0
    for count, restart in zip(counts, restarts, strict=False):
        whole = expected[at : at + count]
        bounds = np.linspace(0, count, hosts + 1).astype(int)
        for stream, low, high in zip(streams, bounds[:-1], bounds[1:], strict=True):
            (inputs, targets), names = stream.take(count, np.arange(low, high))
            assert names == [name for name, _ in whole]
            assert len(inputs) == len(targets) == high - low
            for i in range(high - low):
                np.testing.assert_array_equal(inputs[i], whole[low + i][1][0])
                np.testing.assert_array_equal(targets[i], whole[low + i][1][1])
        at += count
        states = [stream.state() for stream in streams]
        assert all(state == states[0] for state in states)
        assert states[0]["samples"] == at
        if restart:  # with another number of hosts
            hosts = hosts % 4 + 1
            streams = [open_stream(dataset, seed, shuffle) for _ in range(hosts)]
            for stream in streams:
                stream.restore(json.loads(json.dumps(states[0])))


def three_sources():
    rng = np.random.default_rng(0)
    return (
        mix(
            {
                "wiki": (
                    Source(documents(rng.integers(1, 60, 90), 1)).filter(
                        lambda tokens: len(tokens) > 5
                    )
                ),
                "code": (
                    Source(documents(rng.integers(1, 200, 40), 10_000)).map(
                        lambda tokens: tokens[::2]
                    )
                ),
                "books": Source(documents(rng.integers(300, 900, 5), 20_000)),
            },
            weights={
                "wiki": 0.5,
                "code": 0.3,
                "books": 0.2,
            },
        )
        .filter(
            lambda rows: np.array([x[-1] % 7 > 0 for x in rows]),
            batched=True,
        )
        .pack(64, end=0, segments=True)
    )


def test_hosts_and_devices_come_and_go_within_one_run():
    batch = 24
    steps = 12
    (inputs, targets), names = open_stream(three_sources(), 3, True).take(
        batch * 4 * steps
    )
    state = None
    step = 0
    for hosts, devices in ((4, 8), (3, 6), (2, 4), (4, 8)):
        # a device has consecutive rows, a host consecutive devices
        rows_of = np.arange(batch).reshape(devices, -1)
        streams = [open_stream(three_sources(), 3, True) for _ in range(hosts)]
        for stream in streams:
            stream.restore(json.loads(json.dumps(state)))
        for _ in range(steps):
            here = slice(step * batch, (step + 1) * batch)
            for host, stream in enumerate(streams):
                wanted = rows_of.reshape(hosts, -1)[host]
                rows, trace = stream.take(batch, wanted)
                assert trace == names[here]
                np.testing.assert_array_equal(rows[1], targets[here][wanted])
                for name, x in rows[0].items():
                    np.testing.assert_array_equal(x, inputs[name][here][wanted])
            step += 1
        state = streams[0].state()
        for stream in streams:
            stream.take(5 * batch, [])  # what was read ahead, and is lost with the host
    assert set(re.findall(r"(\w+):", " ".join(names))) >= {"wiki", "code", "books"}
    assert len(json.dumps(state)) < 600


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        st.integers(1, 300),
        st.integers(SORTED - 1, SORTED + 300),
        st.integers(70_000, 200_000),
    ),
    st.integers(0, 2**63),
    st.integers(0, 10**6),
    st.data(),
)
def test_every_epoch_is_a_permutation_and_any_stretch_of_it_is_computed_alone(
    samples, seed, epoch, data
):
    order = Order(samples, seed, "a", True)
    epochs, whole = order.at(epoch * samples, samples)
    assert (epochs == epoch).all()
    assert (np.bincount(whole, minlength=samples) == 1).all()
    start = data.draw(st.integers(0, samples - 1))
    stop = data.draw(st.integers(start, min(samples, start + 5000)))
    alone = Order(samples, seed, "a", True).at(epoch * samples + start, stop - start)[1]
    np.testing.assert_array_equal(alone, whole[start:stop])


def test_orders_differ_by_seed_name_and_epoch():
    for samples in (1000, 100_000):
        one = Order(samples, 0, "a", True).at(0, 2 * samples)[1]
        others = [
            one[samples:],
            Order(samples, 1, "a", True).at(0, samples)[1],
            Order(samples, 0, "b", True).at(0, samples)[1],
        ]
        for other in others:  # of two random permutations, about one place agrees
            assert (one[:samples] == other).sum() < 10
        assert (
            abs(np.corrcoef(one[:samples], np.arange(samples))[0, 1]) < 5 / samples**0.5
        )
        assert (
            abs(np.corrcoef(one[: samples - 1], one[1:samples])[0, 1])
            < 5 / samples**0.5
        )


def test_small_orders_are_all_equally_likely():
    orders = Order(4, 0, "a", True).at(0, 4 * 24_000)[1].reshape(-1, 4)
    counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    # chi-squared of 23 degrees, p = 0.001
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7


def test_orders_are_the_same_in_years_to_come():
    """A change here would shuffle the data of a resumed run anew.

    The run may go on under other versions of Python and NumPy.
    """
    small = [6, 8, 1, 5, 0, 7, 4, 9, 3, 2, 6, 5, 0, 3, 4, 8, 9, 1, 2, 7]
    assert Order(10, 0, "wiki", True).at(0, 20)[1].tolist() == small
    assert Order(10**6, 0, "wiki", True).at(10**6, 6)[1].tolist() == [
        273545,
        155151,
        166967,
        757496,
        665784,
        844350,
    ]


WEIGHTS = st.lists(
    st.one_of(
        st.integers(1, 9),
        st.integers(1, 10**9),
        st.floats(1e-3, 1e3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(
    WEIGHTS,
    st.integers(1, 1500),
    st.data(),
)
def test_proportions_hold_at_every_prefix_within_one(weights, count, data):
    names = [f"s{i}" for i in range(len(weights))]
    whole = proportions(
        names,
        dict(
            zip(
                names,
                weights,
                strict=True,
            )
        ),
    )
    exact = [Fraction(str(weight)) for weight in weights]
    assert [Fraction(w, sum(whole)) for w in whole] == [w / sum(exact) for w in exact]
    pattern = Pattern(whole)
    cut = data.draw(st.integers(0, count))
    taken = pattern.advance(cut)
    resumed = Pattern(whole)
    resumed.restore(pattern.taken)
    choices = np.concatenate([Pattern(whole).peek(cut), resumed.peek(count - cut)])
    np.testing.assert_array_equal(choices, Pattern(whole).peek(count))
    np.testing.assert_array_equal(pattern.peek(count - cut), choices[cut:])
    assert taken == np.bincount(choices[:cut], minlength=len(whole)).tolist()
    for i, weight in enumerate(whole):
        given_ = np.cumsum(choices == i)
        for t in range(1, count + 1):
            assert abs(int(given_[t - 1]) * sum(whole) - weight * t) < sum(whole)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.integers(1, 300),
        min_size=1,
        max_size=20,
    ),
    st.integers(2, 50),
    st.booleans(),
    st.booleans(),
)
def test_packed_rows_are_the_token_stream(sizes, length, with_end, shuffle):
    contents = documents(sizes, 1)
    end = 0 if with_end else None
    total = sum(sizes) + len(sizes) * with_end
    rows = -(-2 * total // length)
    (inputs, targets), names = open_stream(
        Source(contents).pack(
            length,
            end=end,
            segments=True,
        ),
        5,
        shuffle,
    ).take(rows)
    order = Order(len(sizes), 5, "data", shuffle).at(0, 2 * len(sizes))[1]
    tokens = np.concatenate([np.append(contents[i], [0] * with_end) for i in order])
    flat = inputs["tokens"].reshape(-1)
    np.testing.assert_array_equal(flat[: len(tokens)], tokens)
    np.testing.assert_array_equal(targets.reshape(-1)[: len(tokens) - 1], tokens[1:])
    np.testing.assert_array_equal(targets[:-1, -1], inputs["tokens"][1:, 0])
    for row, name in enumerate(names):
        parts = re.findall(r"data:\d+:(\d+)\[(\d+):(\d+)\]", name)
        spans = [(int(i), int(start), int(stop)) for i, start, stop in parts]
        made = [
            np.append(contents[i], [0] * with_end)[start:stop]
            for i, start, stop in spans
        ]
        np.testing.assert_array_equal(inputs["tokens"][row], np.concatenate(made))
        widths = [stop - start for _, start, stop in spans]
        np.testing.assert_array_equal(
            inputs["segments"][row], np.repeat(np.arange(1, len(spans) + 1), widths)
        )
        np.testing.assert_array_equal(
            inputs["positions"][row], np.concatenate([np.arange(n) for n in widths])
        )


class Recording(Arrays):
    """Counts how often each sample is read."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(
            self,
            "reads",
            np.zeros(len(self), int),
        )

    def take(self, indices, empty=None):
        np.add.at(self.reads, indices, 1)
        return super().take(indices, empty)


def test_a_host_reads_its_own_rows_only():
    data = Recording(*pairs(1000))
    stream = open_stream(
        mix(
            {"a": Source(data), "b": Source(pairs(10))},
            weights={"a": 3, "b": 1},
        ),
        0,
        True,
    )
    data.reads[:] = 0
    names = stream.take(400, np.arange(100, 200))[1]
    assert data.reads.sum() == 75
    assert sum(name.startswith("a:") for name in names) == 300
    assert sorted(np.flatnonzero(data.reads)) == sorted(
        int(n.split(":")[2]) for n in names[100:200] if n[0] == "a"
    )
    assert stream.take(40, [])[0][0].shape == (0, 2)


def test_a_filter_asks_once_a_sample_and_a_resumed_one_does_not_start_over():
    data = Recording(*pairs(10_000))
    dataset = Source(data).filter(
        lambda x, y: y % 2 == 0,
        batched=True,
    )
    stream = open_stream(dataset, 0, True)
    stream.take(12_500, [])
    # the first sample is read for its shapes
    assert data.reads[1:].max() <= 2
    assert data.reads.sum() <= 10_001
    state = stream.state()
    assert state["position"]["epoch"] == 2
    resumed = open_stream(dataset, 0, True)
    data.reads[:] = 0
    resumed.restore(state)
    assert resumed.take(100, [])[1] == stream.take(100, [])[1]
    assert data.reads.sum() < 2000


@pytest.mark.parametrize("samples", [1000, SORTED + 5])
def test_a_stream_goes_back_to_an_earlier_position(samples):
    stream = open_stream(
        Source(pairs(samples)),
        0,
        True,
    )
    stream.take(samples - 300, [])
    state = json.dumps(stream.state())
    names = [stream.take(5000, [])[1] for _ in range(3)]
    stream.restore(json.loads(state))
    assert [stream.take(5000, [])[1] for _ in range(3)] == names


def test_a_used_up_document_is_not_part_of_the_position():
    stream = open_stream(Source(documents([6, 4, 9])).pack(5))
    stream.take(2, [])
    assert stream.state()["position"] == {
        "used": 0,
        "documents": {
            "epoch": 0,
            "offset": 2,
            "samples": 3,
        },
    }


def test_what_a_filter_looked_at_too_far_is_not_part_of_the_position():
    both = mix(
        {"a": Source(pairs(500)), "b": Source(pairs(300))},
        weights={"a": 1, "b": 1},
    )
    rare = both.filter(lambda x, y: bool(y % 50 == 7))
    assert open_stream(rare, 0, True).state()["position"]["taken"] == {"a": 0, "b": 0}
    stream = open_stream(rare, 0, True)
    names = [name for count in (1, 2, 1, 9) for name in stream.take(count, [])[1]]
    kept = [
        name
        for name in open_stream(both, 0, True).take(3000, [])[1]
        if int(name.split(":")[2]) % 50 == 7
    ]
    assert names == kept[:13]


def test_grain_sources_keep_their_random_transformations_by_epoch():
    data = (
        grain.MapDataset.source([(np.float32(i), i) for i in range(20)])
        .seed(4)
        .random_map(
            lambda pair, rng: (np.array([pair[0], rng.random()], np.float32), pair[1])
        )
    )
    dataset = Source(data, name="noisy").filter(lambda x, y: bool(y != 3))
    (inputs, targets), names = open_stream(dataset, 1, True).take(57)
    assert sorted(targets[:19]) == [i for i in range(20) if i != 3]
    assert len(set(inputs[:, 1])) == 57  # a draw of its own in each of three epochs
    stream = open_stream(dataset, 1, True)
    stream.take(25, [])
    resumed = open_stream(dataset, 1, True)
    resumed.restore(stream.state())
    rows, again = resumed.take(32)
    assert again == names[25:]
    assert (rows[0] == inputs[25:]).all()


def test_a_filter_of_random_transformations_decides_the_same_from_any_epoch():
    data = (
        grain.MapDataset.source(list(range(1000)))
        .seed(4)
        .random_map(
            lambda i, rng: (np.array([i, rng.random()], np.float32), np.int32(i))
        )
    )
    dataset = Source(data).filter(lambda x, y: bool(x[1] < 0.5))
    stream = open_stream(dataset, 1, True)
    for _ in range(7):
        stream.take(100, [])
    resumed = open_stream(dataset, 1, True)
    resumed.restore(stream.state())
    assert stream.state()["position"]["epoch"] == 1
    assert resumed.take(400, [])[1] == stream.take(400, [])[1]


def test_grain_documents_are_packed_like_lists():
    contents = documents([5, 9, 2, 30])
    listed = open_stream(Source(contents).pack(8), 2, True).take(20)
    read = open_stream(Source(grain.MapDataset.source(contents)).pack(8), 2, True).take(
        20
    )
    assert listed[1] == read[1]
    np.testing.assert_array_equal(listed[0], read[0])


def test_mixtures_nest_and_name_their_sources_by_their_path():
    inner = mix(
        {"x": Source(pairs(3)), "y": Source(pairs(4), name="own")},
        weights={"x": 1, "y": 1},
    )
    names = open_stream(
        mix(
            {"in": inner, "out": Source(pairs(2))},
            weights={"in": 2, "out": 1},
        )
    ).take(6, [])[1]
    assert sorted(names) == [
        "in/x:0:0",
        "in/x:0:1",
        "out:0:0",
        "out:0:1",
        "own:0:0",
        "own:0:1",
    ]


def test_rows_packed_by_source_mix_and_map():
    dataset = mix(
        {
            "a": Source(documents([50, 70])).pack(8),
            "b": Source(documents([99], 500)).pack(8),
        },
        weights={"a": 1, "b": 1},
    ).map(
        lambda x, y: (x, y * (y != 3)),
        batched=True,
    )
    (inputs, targets), names = open_stream(dataset).take(4)
    assert names == ["a:0:0[0:8]", "b:0:0[0:8]", "a:0:0[8:16]", "b:0:0[8:16]"]
    assert targets[0].tolist() == [1, 2, 0, 4, 5, 6, 7, 8]
    assert inputs[1, 0] == 500


def test_a_sample_is_the_first_and_moves_nothing():
    dataset = mix(
        {"a": Source(pairs(5)), "b": Source(pairs(9))},
        weights={"a": 1, "b": 2},
    )
    inputs, targets = sample(dataset)
    assert inputs.shape == (1, 2)
    assert targets.shape == (1,)
    assert dataset.is_sequential is True
    assert dataset.epoch_samples is None
    stream = open_stream(dataset)
    first = stream.take(3)[1]
    stream.restore({})
    assert stream.take(3)[1] == first
    stream.restore(None)
    assert stream.take(3)[1] == first


A = Source(pairs(5))
B = Source(pairs(4))
WORDS = Source(documents([3, 4]))
MISTAKES = {
    "no such source; did you mean": lambda: mix(
        {"wiki": A, "b": B},
        weights={"wikki": 1, "b": 2},
    ),
    "no weight for the source 'b'": lambda: mix({"a": A, "b": B}, weights={"a": 1}),
    "the weight of 'a' is 0": lambda: mix(
        {"a": A},
        weights={"a": 0},
    ),
    "the weight of 'a' is nan": lambda: mix(
        {"a": A},
        weights={"a": float("nan")},
    ),
    "the weight of 'a' is '1'": lambda: mix(
        {"a": A},
        weights={"a": "1"},
    ),
    "the weights are a list": lambda: mix({"a": A}, weights=[1]),
    "mix takes a dict": lambda: mix({}, weights={}),
    "'a' is a tuple": lambda: mix(
        {"a": pairs(4)},
        weights={"a": 1},
    ),
    "'a:b' is no name": lambda: Source(pairs(4), name="a:b"),
    "two sources with the name 'x'": lambda: open_stream(
        mix(
            {"a": Source(pairs(4), "x"), "b": Source(pairs(4), "x")},
            weights={"a": 1, "b": 1},
        )
    ),
    (
        "samples of 'a' are inputs float32[2], targets int32[]; those of 'b' are inputs"
        " float32[3]"
    ): lambda: open_stream(
        mix(
            {
                "a": A,
                "b": Source((np.zeros((4, 3), np.float32), np.zeros(4, np.int32))),
            },
            weights={"a": 1, "b": 1},
        )
    ),
    "those of 'b' are documents": lambda: open_stream(
        mix(
            {"a": A, "b": WORDS},
            weights={"a": 1, "b": 1},
        )
    ),
    "the samples are documents": lambda: open_stream(WORDS),
    "there are no documents to pack": lambda: open_stream(A.pack(4)),
    "length is 1": lambda: WORDS.pack(1),
    "length is 2.5": lambda: WORDS.pack(2.5),
    "length is None": lambda: WORDS.pack(None),
    "end is -1": lambda: WORDS.pack(4, end=-1),
    "packed rows can't be filtered": (
        lambda: WORDS.pack(4).map(lambda x, y: (x, y)).filter(bool)
    ),
    "can't be packed again": (
        lambda: mix({"a": WORDS.pack(4)}, weights={"a": 1}).pack(4)
    ),
    "document 1 has the shape (0,)": lambda: Source([[1, 2], []]),
    "document 0 has the shape (5, 2)": lambda: Source(list(pairs(5))),
    "document 0 has dtype float32": lambda: Source([[1.5]]),
    "the list of documents is empty": lambda: Source([]),
    "the lengths add up to 4": lambda: Documents([1, 2, 3], [2, 2]),
    "the lengths are int64[2], from 0": lambda: Documents([1, 2, 3], [3, 0]),
    "can only be iterated": lambda: Source(
        grain.MapDataset.source([1]).to_iter_dataset()
    ),
    "has no end": lambda: Source(grain.MapDataset.source([1]).repeat()),
    "element 0 of the Grain data set is a int": lambda: open_stream(
        Source(grain.MapDataset.source([1, 2]))
    ),
    "stacking the samples": (
        lambda: open_stream(
            Source(grain.MapDataset.source([(np.zeros(2), 0), (np.zeros(3), 1)]))
        ).take(2)
    ),
    "keeps no sample": lambda: open_stream(
        mix(
            {"a": A.filter(lambda x, y: bool(y > 9)), "b": B},
            weights={"a": 1, "b": 1},
        )
    ),
    "the filter function keeps no sample": lambda: open_stream(
        mix(
            {
                "a": A.map(lambda x, y: (x, y * 0)),
                "b": B.filter(lambda x, y: bool(y != 0)),
            },
            weights={"a": 1, "b": 1},
        ).filter(lambda x, y: bool(y == 0 and x[0] > 10))
    ),
    "returned np.int32(0)": lambda: open_stream(A.filter(lambda x, y: y)),
    "returned bool[1]": lambda: open_stream(
        A.filter(
            lambda x, y: np.array([True]),
            batched=True,
        )
    ),
    "the filter function failed: KeyError": lambda: open_stream(
        A.filter(lambda x, y: {}["a"])
    ),
    "filter was given 3": lambda: A.filter(3),
    "the map function returned a pair for one sample and a int": lambda: open_stream(
        A.map(lambda x, y: (x, y) if y < 2 else 3).filter(lambda x, y: True)
    ),
    "made 1 samples of 5": (
        lambda: open_stream(A.map(lambda x, y: (x[:1], y[:1]), batched=True)).take(5)
    ),
    "the first sample is inputs float32[2]": (
        lambda: open_stream(
            A.map(
                lambda x, y: (x[:, : 1 + (len(y) == 1)], y),
                batched=True,
            )
        ).take(5)
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(DataError) as caught:
        MISTAKES[message]()
    assert message in str(caught.value)
    assert caught.value.remedy
    assert caught.value.where


def test_a_data_set_shows_itself():
    def short(x, y):
        return True

    assert (
        repr(
            mix(
                {"a": A.filter(short), "b": Source(pairs(4), "own")},
                weights={"a": 2, "b": 0.5},
            )
        )
        == "mix({'a': Source(Arrays(inputs float32[5, 2], targets"
        " int32[5])).filter(short), 'b': Source(Arrays(inputs float32[4, 2], targets"
        " int32[4]), name='own')}, weights={'a': 4, 'b': 1})"
    )
    assert (
        repr(WORDS.map(lambda x: x).pack(4, end=0))
        == "Source(Documents(2 of 7 int32 tokens)).map(function).pack(4, end=0)"
    )


def changed(dataset, message, **order):
    state = open_stream(
        mix(
            {"a": A, "b": B},
            weights={"a": 1, "b": 2},
        ),
        0,
        True,
    ).state()
    with pytest.raises(DataError, match=re.escape(message)):
        open_stream(dataset, **{"seed": 0, "shuffle": True} | order).restore(
            json.loads(json.dumps(state))
        )


def test_a_position_of_another_data_set_is_refused():
    same = mix(
        {"b": B, "a": A},
        weights={"b": 4, "a": 2},
    )
    changed(same, "saved with seed 0, and seed is 1 now", seed=1)
    changed(same, "saved with shuffle True", shuffle=False)
    changed(
        mix({"a": A, "b": B}, weights={"a": 1, "b": 3}), "weights were {'a': 1, 'b': 2}"
    )
    changed(
        mix({"a": A, "c": B}, weights={"a": 1, "c": 2}), "weights were {'a': 1, 'b': 2}"
    )
    changed(
        mix(
            {"a": A, "b": Source(pairs(6))},
            weights={"a": 1, "b": 2},
        ),
        "'b' had 4 samples",
    )
    changed(A, "has the fields ['sources', 'taken', 'weights']")
    stream = open_stream(
        mix(
            {"a": A, "b": B},
            weights={"a": 1, "b": 2},
        ),
        0,
        True,
    )
    stream.take(7, [])
    other = open_stream(same, 0, True)  # the same in another order of writing
    other.restore(stream.state())
    assert other.take(9, [])[1] == stream.take(9, [])[1]


def test_documents_that_change_their_length_are_caught():
    class Growing:
        def __init__(self):
            self.reads = 0

        def __call__(self, rows):
            self.reads += 1
            return [np.arange(4 + (self.reads > 3)) for _ in rows]

    stream = open_stream(
        Source(documents([4] * 9)).map(Growing(), batched=True).pack(8)
    )
    with pytest.raises(DataError, match="had 4 when it was measured"):
        stream.take(4)
