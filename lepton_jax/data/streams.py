"""Endless streams of samples, of which only the order is known until some are read.

A stream is asked twice: `peek` describes the samples that come next, at no cost to its
position, and `advance` consumes some. So what a filter or a packer had to look at
beyond what was consumed is never part of the position: that is the cursor of each
source, and whatever is in hand of the last document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from lepton_jax.data.mixing import Pattern
from lepton_jax.data.rows import Function, Rows, described, lengths, merged
from lepton_jax.data.shuffling import Order
from lepton_jax.data.sources import Reader
from lepton_jax.errors import DataError

READ_AT_ONCE = 256  # samples that are read together only to decide something by them
LOOKED_AT = 128  # samples at least that a filter looks at together
LOOKED_AHEAD = 4  # times as many as are wanted
FRUITLESS = 4096  # samples none of which is kept, after which all are looked at

# a key under which its results are kept, and the test
Test = tuple[Any, Callable[[Rows], np.ndarray]]


class Draw(Protocol):
    """Some samples of a stream, in order, unread."""

    def __len__(self) -> int: ...

    def take(self, which: Any) -> Draw:
        """Those at the positions `which`: a slice or a vector of integers."""

    def read(self) -> Rows:
        """Their contents; there must be at least one."""

    def identifiers(self) -> list[str]: ...

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        """Whole numbers of at least 0 that a pure function gives the samples, (count,);
        kept under `key`, read once.
        """


class Stream(Protocol):
    def peek(self, count: int) -> Draw:
        """The next `count` samples."""

    def advance(self, count: int) -> None:
        """Consume the next `count` samples, which must have been peeked at."""

    def state(self) -> Any:
        """The position, in plain data."""

    def restore(self, state: Any) -> None:
        """Go on where `state()` was."""

    def possible(self, tests: Sequence[Test]) -> bool:
        """Whether any sample passes all tests; looks at every sample, if need be."""


class SourceDraw:
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
        return [
            f"{name}:{epoch}:{index}"
            for epoch, index in zip(
                self.epochs.tolist(),
                self.indices.tolist(),
                strict=True,
            )
        ]

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        known = self.source.reader.lengths
        return (
            self.source.measured(key, function, self.indices)
            if function is not lengths or known is None
            else known[self.indices]
        )


class SourceStream:
    """The samples of one source, epoch after epoch."""

    def __init__(
        self,
        name: str,
        reader: Reader,
        order: Order,
    ):
        self.name = name
        self.reader = reader
        self.order = order
        self.position = 0
        self._measured: dict[Any, np.ndarray] = {}

    def peek(self, count: int) -> SourceDraw:
        return SourceDraw(self, *self.order.at(self.position, count))

    def advance(self, count: int) -> None:
        self.position += count

    def state(self) -> dict[str, int]:
        epoch, offset = divmod(self.position, len(self.reader))
        return {
            "epoch": epoch,
            "offset": offset,
            "samples": len(self.reader),
        }

    def restore(self, state: Any) -> None:
        fields(state, {"epoch", "offset", "samples"}, f"source {self.name!r}")
        if state["samples"] != len(self.reader):
            raise DataError(
                f"the source {self.name!r} had {state['samples']} samples when its"
                f" position was saved, and has {len(self.reader)} now",
                where=f"source {self.name!r}",
                remedy="go on with the same data, or start a new run",
            )
        self.position = state["epoch"] * len(self.reader) + state["offset"]

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
        indices: np.ndarray,
    ) -> np.ndarray:
        # Decisions are made by a sample as it is in epoch 0: its random transformations
        # must not change which epoch's version was looked at first, and so what a
        # resumed run decides.
        if key not in self._measured:
            # enough for a test
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
        for start in range(0, len(self.reader), READ_AT_ONCE):
            indices = np.arange(start, min(start + READ_AT_ONCE, len(self.reader)))
            for key, test in tests:
                if len(indices):
                    indices = indices[self.measured(key, test, indices) > 0]
            if len(indices):
                return True
        return False


class MapDraw:
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


class MapStream:
    """Samples as a function makes them."""

    def __init__(self, stream: Stream, function: Function):
        self.stream = stream
        self.function = function
        self.advance = stream.advance
        self.state = stream.state
        self.restore = stream.restore

    def peek(self, count: int) -> MapDraw:
        return MapDraw(self.stream.peek(count), self.function)

    def possible(self, tests: Sequence[Test]) -> bool:
        def through(test: Callable[[Rows], np.ndarray]) -> Callable[[Rows], np.ndarray]:
            return lambda rows: test(self.function.maps(rows))

        return self.stream.possible([(key, through(test)) for key, test in tests])


class FilterStream:
    """The samples that pass a test."""

    def __init__(self, stream: Stream, function: Function):
        self.stream = stream
        self.function = function
        self.state = stream.state
        self._tried = 1
        self._passed = 1
        self._possible = False
        self._forget()

    def _forget(self) -> None:
        # beyond the stream's position: samples tested, those that passed
        self._seen = 0
        self._kept = np.empty(0, np.int64)
        # those that passed when it was last looked further, and are used
        self._draw = self.stream.peek(0)
        self._consumed = 0

    def peek(self, count: int) -> Draw:
        if len(self._kept) < count:
            self._look(count)
        return self._draw.take(slice(self._consumed, self._consumed + count))

    def _look(self, count: int) -> None:
        """Find at least `count` samples; some more, since describing them costs as much
        for a few.
        """
        while len(self._kept) < count:
            expected = (
                (LOOKED_AHEAD * count - len(self._kept)) * self._tried / self._passed
            )
            # at least twice as far each time, since the samples before are described
            # again
            more = max(
                int(expected),
                LOOKED_AT,
                self._seen if not len(self._kept) else 0,
            )
            draw = self.stream.peek(self._seen + more)
            passed = np.flatnonzero(
                draw.take(slice(self._seen, None)).measured(self, self.function.tests)
            )
            self._kept = np.concatenate([self._kept, self._seen + passed])
            self._seen = self._seen + more
            self._tried = self._tried + more
            self._passed = self._passed + len(passed)
            self._possible = self._possible or bool(len(passed))
            if not self._possible and self._tried > FRUITLESS:
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
        self._draw = draw.take(self._kept)
        self._consumed = 0

    def advance(self, count: int) -> None:
        if count:
            consumed = int(self._kept[count - 1]) + 1
            self.stream.advance(consumed)
            self._seen = self._seen - consumed
            self._kept = self._kept[count:] - consumed
            self._consumed += count

    def restore(self, state: Any) -> None:
        self.stream.restore(state)
        self._forget()

    def possible(self, tests: Sequence[Test]) -> bool:
        return self.stream.possible([(self, self.function.tests), *tests])


class MixDraw:
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
        places = places_of(self.which, len(self.parts))
        # a part's places ascend, as its samples do: `take` and `peek` number them so
        return merged(
            [
                (p, part.read())
                for p, part in zip(places, self.parts, strict=True)
                if len(p)
            ],
            len(self),
        )

    def identifiers(self) -> list[str]:
        out = np.empty(len(self), object)
        for places, part in zip(
            places_of(self.which, len(self.parts)),
            self.parts,
            strict=True,
        ):
            if len(places):
                out[places] = part.identifiers()
        return out.tolist()

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        out = np.empty(len(self), np.int64)
        for places, part in zip(
            places_of(self.which, len(self.parts)),
            self.parts,
            strict=True,
        ):
            if len(places):
                out[places] = part.measured(key, function)
        return out


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
        shapes = {
            name: described(stream.peek(1).read()) for name, stream in streams.items()
        }
        for name, shape in shapes.items():
            if shape != shapes[self.names[0]]:
                raise DataError(
                    f"samples of {self.names[0]!r} are {shapes[self.names[0]]}; those"
                    f" of {name!r} are {shape}",
                    where="mix",
                    remedy=(
                        "give all sources samples of one shape and dtype, e.g. with map"
                    ),
                )

    def peek(self, count: int) -> MixDraw:
        which = self.pattern.peek(count)
        slots = np.empty(count, np.int64)
        parts = []
        for stream, places in zip(
            self.streams,
            places_of(which, len(self.streams)),
            strict=True,
        ):
            parts.append(stream.peek(len(places)))
            slots[places] = np.arange(len(places))
        return MixDraw(parts, which, slots)

    def advance(self, count: int) -> None:
        for stream, consumed in zip(
            self.streams,
            self.pattern.advance(count),
            strict=True,
        ):
            stream.advance(consumed)

    def state(self) -> dict[str, Any]:
        return {
            "weights": dict(
                zip(
                    self.names,
                    self.pattern.weights,
                    strict=True,
                )
            ),
            "taken": dict(
                zip(
                    self.names,
                    self.pattern.taken,
                    strict=True,
                )
            ),
            "sources": {
                name: stream.state()
                for name, stream in zip(self.names, self.streams, strict=True)
            },
        }

    def restore(self, state: Any) -> None:
        fields(state, {"weights", "taken", "sources"}, "mixture")
        weights = dict(
            zip(
                self.names,
                self.pattern.weights,
                strict=True,
            )
        )
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


def places_of(which: np.ndarray, count: int) -> list[np.ndarray]:
    """Where each of 0 to count - 1 stands in `which`, ascending."""
    order = np.argsort(which, kind="stable")
    ends = np.cumsum(np.bincount(which, minlength=count)).tolist()
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def fields(
    state: Any,
    names: set[str],
    what: str,
) -> None:
    """Check that a saved position is one of this kind of stream."""
    if not isinstance(state, dict) or set(state) != names:
        found = (
            f"the fields {sorted(state)}"
            if isinstance(state, dict)
            else f"a {type(state).__name__}"
        )
        raise DataError(
            f"the saved position of the {what} has {found}, not {sorted(names)}",
            where=what,
            remedy=(
                "go on with the data set that the position was saved with, or start a"
                " new run"
            ),
        )
