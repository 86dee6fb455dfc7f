"""Endless streams of samples; only their order is known until some are read.

A stream is asked twice: `peek` describes the samples that come next and leaves the
position where it is, and `advance` consumes some. So the samples that a filter or a
packer looked at ahead are never part of the position: that is the cursor of each
source, and the rest of the last document.

Say that a filter keeps even numbers, and that its source gives 3, 4, 5, 6, 7, ... The
filter's `peek(2)` peeks at the source's next five, keeps 4 and 6, and describes them;
the source still stands before 3. `advance(1)` consumes 4, and so 3 and 4 of the source,
which then stands before 5: that is the whole state, and a filter that is opened there
goes on with 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lepton_jax.data.indexed import IndexedReader, positions_in, spread_evenly
from lepton_jax.data.mixing import Pattern
from lepton_jax.data.rows import Function, Rows, described, lengths, merged
from lepton_jax.data.shuffling import Order, words
from lepton_jax.data.sources import Reader
from lepton_jax.data.windows import WindowOrder
from lepton_jax.errors import DataError

# Assumptions: large enough that NumPy's calls cost little, small enough to be quick.
READ_AT_ONCE = 256  # samples that are read together only to decide something by them
LOOKED_AT = 128  # samples at least that a filter looks at together
LOOKED_AHEAD = 4  # times as many as are wanted
FRUITLESS = 4096  # samples none of which is kept, after which all are looked at

DIGEST_SHOWN = 16  # digits of a content's digest in a position; assumption
INDEX_BITS = 40  # of the number that a sample's key is made of; its epoch comes above

# The key under which a test's results are remembered, and the test.
Test = tuple[Any, Callable[[Rows], np.ndarray]]


class Draw(Protocol):
    """Some samples of a stream, in order, unread."""

    def __len__(self) -> int: ...

    def take(self, which: Any) -> Draw:
        """Return those at the positions `which`: a slice or a vector of integers."""

    def read(self) -> Rows:
        """Read their contents; there must be at least one."""

    def identifiers(self) -> list[str]:
        """Return what identifies each sample."""

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        """Return the whole number, at least 0, that a function gives each sample.

        Args:
          key: under which the results are remembered, so that each sample is read once.
          function: a pure function of rows.

        Returns:
          integers or booleans (count,).
        """

    def keys(self) -> np.ndarray:
        """Return a random number for each sample by (seed, source, epoch, index).

        Returns:
          uint64 (count,).
        """

    def ranks(self) -> np.ndarray | None:
        """Return numbers from 0 to below 1 by which a batch's samples are arranged.

        Where samples lie on a disk, each host then reads a part of a batch that lies
        together or has its share of the bytes. None: the order is as good as any.
        """

    def padding(self) -> Padding:
        """Return how much of the samples is padding."""


class Padding(NamedTuple):
    """Tokens of padding, and tokens in all."""

    padded: int
    total: int


NO_PADDING = Padding(0, 0)


class Hint(NamedTuple):
    """Row groups that had better be read soon.

    Attributes:
      reader: of them.
      groups: their numbers.
      ranks: where their samples begin in the batches to come, as in `Draw.ranks`.
      width: the share of a batch that one group has.
    """

    reader: IndexedReader
    groups: np.ndarray
    ranks: np.ndarray
    width: float


class Stream(Protocol):
    """Samples in an endless order, at a position."""

    def peek(self, count: int) -> Draw:
        """Return the next `count` samples."""

    def advance(self, count: int) -> None:
        """Consume the next `count` samples, which must have been peeked at."""

    def state(self) -> Any:
        """Return the position, in plain data."""

    def restore(self, state: Any) -> None:
        """Go on where `state()` was."""

    def possible(self, tests: Sequence[Test]) -> bool:
        """Whether any sample passes all tests; looks at every sample, if need be."""

    def hints(self) -> list[Hint]:
        """Return what had better be read, since this was asked last."""


class SourceDraw:
    """Some samples of one source."""

    def __init__(
        self,
        source: SourceStream,
        epochs: np.ndarray,
        indices: np.ndarray,
    ):
        self.source = source
        self.epochs = epochs
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, which: Any) -> SourceDraw:
        return SourceDraw(
            self.source,
            self.epochs[which],
            self.indices[which],
        )

    def read(self) -> Rows:
        return self.source.reader.read(self.indices, self.epochs)

    def identifiers(self) -> list[str]:
        name = self.source.name
        places = zip(
            self.epochs.tolist(),
            self.indices.tolist(),
            strict=True,
        )
        return [f"{name}:{epoch}:{index}" for epoch, index in places]

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        known_lengths = self.source.reader.lengths
        if function is lengths and known_lengths is not None:
            return known_lengths[self.indices]
        return self.source.measured(key, function, self.indices)

    def keys(self) -> np.ndarray:
        numbers = (self.epochs << INDEX_BITS) + self.indices
        return words(self.source.key, numbers)

    def ranks(self) -> np.ndarray | None:
        return self.source.ranks(self.indices)

    def padding(self) -> Padding:
        return NO_PADDING


class SourceStream:
    """The samples of one source, epoch after epoch.

    Args:
      name: of the source.
      reader: of its samples.
      order: in which they come.
      key: of the source, that the keys of its samples are made of.
    """

    def __init__(
        self,
        name: str,
        reader: Reader,
        order: Order | WindowOrder,
        key: int,
    ):
        self.name = name
        self.reader = reader
        self.order = order
        self.key = key
        self.position = 0
        self._hinted = 0  # position up to which row groups were hinted at
        self._measured: dict[Any, np.ndarray] = {}

    def ranks(self, indices: np.ndarray) -> np.ndarray | None:
        """Return the ranks of some samples; see `Draw.ranks`."""
        if isinstance(self.order, WindowOrder):
            return positions_in(self.order.groups_of(indices))
        if isinstance(self.reader, IndexedReader) and self.order.shuffle:
            sizes = self.reader.data.sizes
            return None if sizes is None else spread_evenly(sizes[indices])
        return None

    def hints(self) -> list[Hint]:
        since = self._hinted
        self._hinted = self.position
        if not isinstance(self.order, WindowOrder) or since >= self.position:
            return []
        assert isinstance(self.reader, IndexedReader)
        upcoming = self.order.upcoming(since, self.position - since)
        return [Hint(self.reader, *upcoming, 1 / self.order.width)]

    def peek(self, count: int) -> SourceDraw:
        return SourceDraw(self, *self.order.at(self.position, count))

    def advance(self, count: int) -> None:
        self.position += count

    def state(self) -> dict[str, Any]:
        samples = len(self.reader)
        epoch, offset = divmod(self.position, samples)
        place = {"epoch": epoch, "offset": offset, "samples": samples}
        return place | self._content()

    def _content(self) -> dict[str, Any]:
        """Return what must be the same where samples on a disk are read again."""
        content: dict[str, Any] = {}
        if isinstance(self.reader, IndexedReader):
            content["content"] = self.reader.data.digest[:DIGEST_SHOWN]
        if isinstance(self.order, WindowOrder):
            content["window"] = self.order.width
        return content

    def restore(self, state: Any) -> None:
        content = self._content()
        names = {"epoch", "offset", "samples", *content}
        fields(state, names, f"source {self.name!r}")
        if state["samples"] != len(self.reader):
            raise DataError(
                f"the source {self.name!r} had {state['samples']} samples when its"
                f" position was saved, and has {len(self.reader)} now",
                where=f"source {self.name!r}",
                remedy="go on with the same data, or start a new run",
            )
        for name, value in content.items():
            if state[name] != value:
                raise DataError(
                    f"the {name} of {self.name!r} was {state[name]} when its position"
                    f" was saved, and is {value} now",
                    where=f"source {self.name!r}",
                    remedy=(
                        "go on with the same files and as many sources, or start a new"
                        " run"
                    ),
                )
        self.position = state["epoch"] * len(self.reader) + state["offset"]
        self._hinted = self.position

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
        indices: np.ndarray,
    ) -> np.ndarray:
        """Return the numbers that a function gives some samples, reading each once.

        They are those of epoch 0: if they were of the epoch in which a sample happened
        to be looked at first, its random transformations could change what a resumed
        run decides.
        """
        if key not in self._measured:
            # -1 is unknown; a byte is enough for a test
            self._measured[key] = np.full(
                len(self.reader),
                -1,
                np.int8,
            )
        known = self._measured[key]
        unknown = np.unique(indices[known[indices] < 0])
        for start in range(0, len(unknown), READ_AT_ONCE):
            chunk = unknown[start : start + READ_AT_ONCE]
            values = function(self.reader.read(chunk))
            if values.dtype != np.bool_ and known.dtype == np.int8:
                known = self._measured[key] = known.astype(np.int64)
            known[chunk] = values
        return known[indices]

    def possible(self, tests: Sequence[Test]) -> bool:
        samples = len(self.reader)
        for start in range(0, samples, READ_AT_ONCE):
            indices = np.arange(start, min(start + READ_AT_ONCE, samples))
            for key, test in tests:
                if len(indices):
                    indices = indices[self.measured(key, test, indices) > 0]
            if len(indices):
                return True
        return False


class MapDraw:
    """Some samples, to which a function is applied."""

    def __init__(self, draw: Draw, function: Function):
        self.draw = draw
        self.function = function

    def __len__(self) -> int:
        return len(self.draw)

    def take(self, which: Any) -> MapDraw:
        return MapDraw(self.draw.take(which), self.function)

    def read(self) -> Rows:
        return self.function.maps(self.draw.read())

    def identifiers(self) -> list[str]:
        return self.draw.identifiers()

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        return self.draw.measured(key, lambda rows: function(self.function.maps(rows)))

    def keys(self) -> np.ndarray:
        return self.draw.keys()

    def ranks(self) -> np.ndarray | None:
        return self.draw.ranks()

    def padding(self) -> Padding:
        return self.draw.padding()


class MapStream:
    """The samples of a stream, to which a function is applied."""

    def __init__(self, stream: Stream, function: Function):
        self.stream = stream
        self.function = function
        self.advance = stream.advance
        self.state = stream.state
        self.restore = stream.restore
        self.hints = stream.hints

    def peek(self, count: int) -> MapDraw:
        return MapDraw(self.stream.peek(count), self.function)

    def possible(self, tests: Sequence[Test]) -> bool:
        def after_mapping(test: Callable[..., Any]) -> Callable[..., Any]:
            return lambda rows: test(self.function.maps(rows))

        mapped = [(key, after_mapping(test)) for key, test in tests]
        return self.stream.possible(mapped)


class FilterStream:
    """The samples that pass a test."""

    def __init__(self, stream: Stream, function: Function):
        self.stream = stream
        self.function = function
        self.state = stream.state
        self.hints = stream.hints
        self._tried = 1
        self._passed = 1
        self._possible = False
        self._forget()

    def _forget(self) -> None:
        # counted from the stream's position: samples tested, and places of those passed
        self._seen = 0
        self._places = np.empty(0, np.int64)
        # those that had passed when more were last looked at, and how many are consumed
        self._draw = self.stream.peek(0)
        self._consumed = 0

    def peek(self, count: int) -> Draw:
        if len(self._places) < count:
            self._look(count)
        return self._draw.take(slice(self._consumed, self._consumed + count))

    def _look(self, count: int) -> None:
        """Find at least `count` samples that pass.

        It finds some more, since describing samples costs as much for a few as for
        many.
        """
        while len(self._places) < count:
            more = self._further(count)
            draw = self.stream.peek(self._seen + more)
            unseen = draw.take(slice(self._seen, None))
            passed = np.flatnonzero(unseen.measured(self, self.function.tests))

            self._places = np.concatenate([self._places, self._seen + passed])
            self._seen += more
            self._tried += more
            self._passed += len(passed)
            self._possible = self._possible or bool(len(passed))
            if not self._possible and self._tried > FRUITLESS:
                self._check_possible()

        self._draw = draw.take(self._places)
        self._consumed = 0

    def _further(self, count: int) -> int:
        """Return how many more samples to look at, so as to find `count`."""
        missing = LOOKED_AHEAD * count - len(self._places)
        expected = int(missing * self._tried / self._passed)
        # If none has passed, look at least twice as far each time, since the samples
        # before are described again.
        as_many_again = 0 if len(self._places) else self._seen
        return max(expected, LOOKED_AT, as_many_again)

    def _check_possible(self) -> None:
        self._possible = self.possible([])
        if not self._possible:
            raise DataError(
                f"{self.function.role} keeps no sample",
                where=self.function.where,
                remedy=(
                    "correct the condition: it must be true of some of the"
                    " samples that come to it"
                ),
            )

    def advance(self, count: int) -> None:
        if count:
            consumed = int(self._places[count - 1]) + 1
            self.stream.advance(consumed)
            self._seen -= consumed
            self._places = self._places[count:] - consumed
            self._consumed += count

    def restore(self, state: Any) -> None:
        self.stream.restore(state)
        self._forget()

    def possible(self, tests: Sequence[Test]) -> bool:
        return self.stream.possible([(self, self.function.tests), *tests])


class MixDraw:
    """Some samples of several streams.

    Args:
      parts: those of each stream.
      which: the stream of each sample, (count,).
      slots: the sample's place in its part, (count,).
    """

    def __init__(
        self,
        parts: Sequence[Draw],
        which: np.ndarray,
        slots: np.ndarray,
    ):
        self.parts = parts
        self.which = which
        self.slots = slots

    def __len__(self) -> int:
        return len(self.which)

    def take(self, which: Any) -> MixDraw:
        sources = self.which[which]
        slots = self.slots[which]
        parts = list(self.parts)
        renumbered = np.empty_like(slots)
        for i, places in enumerate(places_of(sources, len(parts))):
            parts[i] = self.parts[i].take(slots[places])
            renumbered[places] = np.arange(len(places))
        return MixDraw(parts, sources, renumbered)

    def read(self) -> Rows:
        # a part's places ascend, as its samples do: `take` and `peek` number them so
        rows = [(places, part.read()) for places, part in self._parts_in_use()]
        return merged(rows, len(self))

    def identifiers(self) -> list[str]:
        out = np.empty(len(self), object)
        for places, part in self._parts_in_use():
            out[places] = part.identifiers()
        return out.tolist()

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        out = np.empty(len(self), np.int64)
        for places, part in self._parts_in_use():
            out[places] = part.measured(key, function)
        return out

    def keys(self) -> np.ndarray:
        out = np.empty(len(self), np.uint64)
        for places, part in self._parts_in_use():
            out[places] = part.keys()
        return out

    def ranks(self) -> np.ndarray | None:
        out = np.empty(len(self))
        has_ranks = False
        for places, part in self._parts_in_use():
            ranks = part.ranks()
            has_ranks = has_ranks or ranks is not None
            out[places] = positions_in(np.zeros(len(part)) if ranks is None else ranks)
        return out if has_ranks else None

    def padding(self) -> Padding:
        counts = [part.padding() for _, part in self._parts_in_use()]
        return Padding(
            sum(count.padded for count in counts),
            sum(count.total for count in counts),
        )

    def _parts_in_use(self) -> list[tuple[np.ndarray, Draw]]:
        """Return the places of each part's samples with the part, if it has any."""
        places = places_of(self.which, len(self.parts))
        parts = zip(places, self.parts, strict=True)
        return [(places, part) for places, part in parts if len(places)]


class MixStream:
    """Several streams, taking turns by a `Pattern`."""

    def __init__(
        self,
        streams: dict[str, Stream],
        weights: Sequence[int],
    ):
        self.names = list(streams)
        self.streams = list(streams.values())
        self.pattern = Pattern(weights)
        firsts = {name: stream.peek(1) for name, stream in streams.items()}
        shapes = {name: described(draw.read()) for name, draw in firsts.items()}
        first = self.names[0]
        for name, shape in shapes.items():
            if shape != shapes[first]:
                raise DataError(
                    f"samples of {first!r} are {shapes[first]}; those of {name!r} are"
                    f" {shape}",
                    where="mix",
                    remedy=(
                        "give all sources samples of one shape and dtype, e.g. with map"
                    ),
                )

    def peek(self, count: int) -> MixDraw:
        which = self.pattern.peek(count)
        slots = np.empty(count, np.int64)
        parts = []
        places_by_stream = places_of(which, len(self.streams))
        for stream, places in zip(self.streams, places_by_stream, strict=True):
            parts.append(stream.peek(len(places)))
            slots[places] = np.arange(len(places))
        return MixDraw(parts, which, slots)

    def advance(self, count: int) -> None:
        counts = self.pattern.advance(count)
        for stream, consumed in zip(self.streams, counts, strict=True):
            stream.advance(consumed)

    def state(self) -> dict[str, Any]:
        positions = [stream.state() for stream in self.streams]
        return {
            "weights": self._by_name(self.pattern.weights),
            "taken": self._by_name(self.pattern.taken),
            "sources": self._by_name(positions),
        }

    def restore(self, state: Any) -> None:
        fields(state, {"weights", "taken", "sources"}, "mixture")
        weights = self._by_name(self.pattern.weights)
        if state["weights"] != weights:
            raise DataError(
                f"the mixture's weights were {state['weights']} when its position was"
                f" saved, and are {weights} now",
                where="mix",
                remedy="go on with the same sources and weights, or start a new run",
            )
        for name, stream in zip(self.names, self.streams, strict=True):
            stream.restore(state["sources"][name])
        self.pattern.restore([state["taken"][name] for name in self.names])

    def possible(self, tests: Sequence[Test]) -> bool:
        return any(stream.possible(tests) for stream in self.streams)

    def hints(self) -> list[Hint]:
        return [hint for stream in self.streams for hint in stream.hints()]

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, values, strict=True))


def places_of(which: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the places of each of 0 to count - 1 in `which`, ascending.

    >>> [places.tolist() for places in places_of(np.array([0, 2, 0]), 3)]
    [[0, 2], [], [1]]
    """
    order = np.argsort(which, kind="stable")
    counts = np.bincount(which, minlength=count)
    return np.split(order, np.cumsum(counts)[:-1])


def fields(
    state: Any,
    names: set[str],
    what: str,
) -> None:
    """Check that a saved position is one of this kind of stream.

    Args:
      state: the saved position.
      names: the fields that it must have.
      what: the stream, for messages.

    Raises:
      DataError: the fields are others.
    """
    if not isinstance(state, dict) or set(state) != names:
        has = f"a {type(state).__name__}"
        if isinstance(state, dict):
            has = f"the fields {sorted(state)}"
        raise DataError(
            f"the saved position of the {what} has {has}, not {sorted(names)}",
            where=what,
            remedy=(
                "go on with the data set that the position was saved with, or start a"
                " new run"
            ),
        )
