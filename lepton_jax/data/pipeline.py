"""Data sets put together from sources: filtered, mapped, mixed and packed.

Their position is exact, and holds on any number of hosts. A data set here is a
description that nothing changes; `open_stream` makes it a sequence of samples. All
hosts draw the same sequence and each reads the contents of its own devices' rows only.
So neither the number of hosts and devices nor the batch size decides which sample comes
when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lepton_jax.data.arrays import Pair
from lepton_jax.data.augmenting import AugmentStream
from lepton_jax.data.budget import Budget
from lepton_jax.data.columns import Columns, Decode
from lepton_jax.data.disk_cache import DiskCache
from lepton_jax.data.fitting import FitForm, FitStream
from lepton_jax.data.indexed import Indexed
from lepton_jax.data.memory import HeldGroups
from lepton_jax.data.mixing import proportions
from lepton_jax.data.packing import PackStream, RowForm
from lepton_jax.data.picture_files import Picture, PictureFiles, files_of_classes
from lepton_jax.data.rows import Function, Rows, described
from lepton_jax.data.shard_folder import Shards
from lepton_jax.data.shuffling import Order, key_of
from lepton_jax.data.sources import checked, reader
from lepton_jax.data.streams import (
    Draw,
    FilterStream,
    Hint,
    MapStream,
    MixStream,
    SourceStream,
    Stream,
    fields,
)
from lepton_jax.errors import DataError, of_a_library


@dataclass
class _Opening:
    """Settings that all sources share when they are opened.

    Attributes:
      seed: of the order.
      shuffle: whether it is random.
      held: what is in memory of samples on a disk.
      sources: how many there are.
      names: those of the sources that are open.
    """

    seed: int
    shuffle: bool
    held: HeldGroups
    sources: int
    names: set[str] = field(default_factory=set)


class Dataset:
    """An endless sequence of samples.

    `Source` and `mix` make one; its methods make others from it.
    """

    is_sequential = True  # read in order, as its position is more than a number
    is_packed = False
    is_augmented = False

    @property
    def parts(self) -> list[Dataset]:
        """The data sets that this one is made of."""
        return []

    @property
    def epoch_samples(self) -> int | None:
        """Samples of an epoch, if they lie on a disk and all are used; else None."""
        return None

    @property
    def budget(self) -> Budget:
        """Threads and memory that reading takes at most."""
        return self.parts[0].budget if self.parts else Budget.of_this_machine()

    @property
    def sources(self) -> int:
        """Number of sources."""
        return sum(part.sources for part in self.parts) if self.parts else 1

    def filter(
        self,
        predicate: Callable[..., Any],
        *,
        batched: bool = False,
    ) -> Dataset:
        """Keep only the samples for which `predicate` is true.

        Every host evaluates it, once for each sample of a source; its results stay in
        memory, a byte a sample. If Grain transforms samples at random, the predicate
        sees them as they are in epoch 0.

        Args:
          predicate: a pure function of a sample: its arguments are (inputs, targets),
            or (tokens) for a document.
          batched: give it up to 256 samples at once, along the arrays' leading dim
            (documents: in a list); it returns bool (samples,). Much faster.

        Raises:
          DataError: rows are packed already. Later, in reading: it fails, returns no
            booleans, or is true of no sample.
        """
        if self.is_packed:
            raise DataError(
                "packed rows can't be filtered",
                where="filter",
                remedy="filter the documents: .filter(...).pack(...)",
            )
        _refuse_augmented(self, "filter")
        return _Filter(self, _function(predicate, batched, "filter"))

    def map(
        self,
        function: Callable[..., Any],
        *,
        batched: bool = False,
    ) -> Dataset:
        """Replace each sample by what `function` returns.

        Args:
          function: a pure function, with the arguments of `filter`'s. It returns a pair
            of arrays (inputs, targets), or a document. Only the hosts that want a
            sample call it, unless it comes before a filter, or changes documents that
            are packed.
          batched: as in `filter`; it returns a pair of arrays with as many rows, or a
            list of documents.
        """
        return _Map(self, _function(function, batched, "map"))

    def augment(
        self,
        function: Callable[..., Any],
        *,
        batched: bool = False,
    ) -> Dataset:
        """Change each sample at random: in the same way whenever it is read.

        What is random depends on the recipe's seed and the sample's source, epoch and
        index: not on hosts, threads, the batch, or where a run was resumed.

        Args:
          function: of (random, inputs, targets), where `random` is a NumPy generator of
            this sample's own; it returns what `map`'s function does. Threads call it.
          batched: give it many samples at once, and in place of the generator their
            keys, uint64 (samples,), for `lepton_jax.data.uniform`. Much faster.
        """
        return _Augment(self, _function(function, batched, "augment"))

    def within(
        self,
        *,
        memory: int | None = None,
        workers: int | None = None,
    ) -> Dataset:
        """Set how much reading may take; how much it does take, it finds by itself.

        Args:
          memory: bytes of blocks that are read ahead, and of samples that are held;
            None: an eighth of the machine's, at most 4 GiB.
          workers: threads; None: one for each core.

        Raises:
          DataError: a number is below 1.
        """
        return _Within(self, self.budget.with_(memory, workers))

    def pack(
        self,
        length: int,
        *,
        end: int | None = None,
        segments: bool = False,
        fit: Literal["cut", "first", "best"] = "cut",
    ) -> Dataset:
        """Pack documents into rows of `length` tokens.

        A row has inputs and targets, int32 (length,) each; the targets are the inputs'
        next tokens. By default the documents are written one after the other and cut
        every `length` tokens, so each token is an input once and a target once, and
        nothing is padded. A row's last target is the first input of the next.

        A document may hold tokens that are read and not learned (see
        `lepton_jax.data.instruction`): their targets are -1, which
        `lepton_jax.losses.padded_cross_entropy` leaves out.

        With `fit`, documents stay whole, unless they are longer than a row, and the
        rest of a row is padding, whose targets are -1, too.

        Args:
          length: tokens of a row.
          end: a token written after each document, such as a tokenizer's end of text.
            With `fit` it is the last target of each and fills the inputs.
          segments: make the inputs a dict of int32 (length,): "tokens"; "segments", the
            number of the document in the row, from 1; and "positions" in the document,
            or in the part of it that the row begins with, from 0. Both are 0 for
            padding.
          fit: "cut", or the row that a document goes to: the "first" with room for it,
            or the "best", in which it leaves least.

        Raises:
          DataError: the length is below 2, or rows are packed already. Later, in
            reading: the samples are no documents.
        """
        if self.is_packed:
            raise DataError(
                "packed rows can't be packed again",
                where="pack",
                remedy="pack the documents once",
            )
        _refuse_augmented(self, "pack")
        length = _whole("length", length, least=2)
        if end is not None:
            end = _whole("end", end, least=0)
        if fit == "cut":
            return _Pack(self, length, end, bool(segments))
        if fit not in ("first", "best"):
            raise DataError(
                f"fit is {fit!r}",
                where="pack",
                remedy='give "cut", "first" or "best"',
            )
        return _Fit(self, FitForm(length, end, bool(segments), fit))

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Source(Dataset):
    """Samples of one origin.

    If the recipe shuffles, their order is a new one each epoch, by (seed, name, epoch).

    Attributes:
      data: a pair of arrays (inputs, targets), or an `Arrays`; a `grain.MapDataset` of
        pairs, or of documents; a list of documents (vectors of token ids), or a
        `Documents`; samples on a disk (`shards` and `pictures` make such sources).
      name: in the samples' identifiers and for the order. None: the names that mixtures
        give it, joined by "/", or "data".

    Raises:
      DataError: the data are of another kind, or empty; a document is empty or holds no
        integers.
    """

    data: Any
    name: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "data", checked(self.data))
        if self.name is not None:
            _name(self.name, "Source")

    def __repr__(self) -> str:
        name = f", name={self.name!r}" if self.name else ""
        return f"Source({self.data!r}{name})"

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        name = self.name or path or "data"
        if name in opening.names:
            raise DataError(
                f"there are two sources with the name {name!r}",
                where="Source",
                remedy=(
                    "give each a name of its own, or none: then it has the name that"
                    " mix gives it"
                ),
            )
        opening.names.add(name)

        return SourceStream(
            name,
            reader(self.data, name, opening.held),
            self._order(opening, name),
            key_of(opening.seed, f"{name}/augment"),
        )

    def _order(
        self,
        opening: _Opening,
        name: str,
    ) -> Any:
        order = opening.seed, name, opening.shuffle
        if isinstance(self.data, Indexed):
            return self.data.order(*order, opening.sources)
        return Order(len(self.data), *order)

    @property
    def epoch_samples(self) -> int | None:
        return len(self.data) if isinstance(self.data, Indexed) else None


@dataclass(frozen=True, eq=False, repr=False)
class _Filter(Dataset):
    dataset: Dataset
    function: Function

    @property
    def parts(self) -> list[Dataset]:
        return [self.dataset]

    def __repr__(self) -> str:
        return f"{self.dataset!r}.filter({self.function.name})"

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        return FilterStream(self.dataset._open(opening, path), self.function)


@dataclass(frozen=True, eq=False, repr=False)
class _Each(Dataset):
    """A data set with as many samples as another, one for each of its."""

    dataset: Dataset

    @property
    def parts(self) -> list[Dataset]:
        return [self.dataset]

    @property
    def is_packed(self) -> bool:  # type: ignore[override]
        return self.dataset.is_packed

    @property
    def is_augmented(self) -> bool:  # type: ignore[override]
        return self.dataset.is_augmented

    @property
    def epoch_samples(self) -> int | None:
        return self.dataset.epoch_samples

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        return self.dataset._open(opening, path)


@dataclass(frozen=True, eq=False, repr=False)
class _Within(_Each):
    limits: Budget

    def __repr__(self) -> str:
        limits = f"memory={self.limits.memory}, workers={self.limits.workers}"
        return f"{self.dataset!r}.within({limits})"

    @property
    def budget(self) -> Budget:
        return self.limits


@dataclass(frozen=True, eq=False, repr=False)
class _Augment(_Each):
    function: Function
    is_augmented = True

    def __repr__(self) -> str:
        return f"{self.dataset!r}.augment({self.function.name})"

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        return AugmentStream(self.dataset._open(opening, path), self.function)


@dataclass(frozen=True, eq=False, repr=False)
class _Map(_Each):
    function: Function

    def __repr__(self) -> str:
        return f"{self.dataset!r}.map({self.function.name})"

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        return MapStream(self.dataset._open(opening, path), self.function)


@dataclass(frozen=True, eq=False, repr=False)
class _Pack(Dataset):
    dataset: Dataset
    length: int
    end: int | None
    segments: bool
    is_packed = True

    @property
    def parts(self) -> list[Dataset]:
        return [self.dataset]

    def __repr__(self) -> str:
        end = "" if self.end is None else f", end={self.end}"
        segments = ", segments=True" if self.segments else ""
        return f"{self.dataset!r}.pack({self.length}{end}{segments})"

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        documents = self.dataset._open(opening, path)
        return PackStream(
            documents,
            RowForm(
                self.length,
                self.end,
                self.segments,
            ),
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Fit(Dataset):
    dataset: Dataset
    form: FitForm
    is_packed = True

    @property
    def parts(self) -> list[Dataset]:
        return [self.dataset]

    def __repr__(self) -> str:
        form = self.form
        end = "" if form.end is None else f", end={form.end}"
        segments = ", segments=True" if form.segments else ""
        return f"{self.dataset!r}.pack({form.length}{end}{segments}, fit={form.fit!r})"

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        return FitStream(self.dataset._open(opening, path), self.form)


@dataclass(frozen=True, eq=False, repr=False)
class _Mix(Dataset):
    datasets: Mapping[str, Dataset]
    weights: list[int]

    @property
    def parts(self) -> list[Dataset]:
        return list(self.datasets.values())

    @property
    def is_augmented(self) -> bool:  # type: ignore[override]
        return any(dataset.is_augmented for dataset in self.datasets.values())

    def __repr__(self) -> str:
        weights = dict(
            zip(
                self.datasets,
                self.weights,
                strict=True,
            )
        )
        return f"mix({dict(self.datasets)!r}, weights={weights})"

    @property
    def is_packed(self) -> bool:  # type: ignore[override]
        return any(dataset.is_packed for dataset in self.datasets.values())

    def _open(
        self,
        opening: _Opening,
        path: str,
    ) -> Stream:
        streams = {
            name: dataset._open(opening, f"{path}/{name}" if path else name)
            for name, dataset in self.datasets.items()
        }
        return MixStream(streams, self.weights)


def mix(
    datasets: Mapping[str, Dataset],
    *,
    weights: Mapping[str, float],
) -> Dataset:
    """Mix the samples of several data sets, which take turns in a fixed pattern.

    After any number of samples, each data set gave its share, within 1.

    Args:
      datasets: by name.
      weights: their proportions, by the same names. They are exact: a float stands for
        the decimal that it prints as. They count the samples that the data sets' own
        filters leave, and rows if the data sets are packed.

    Raises:
      DataError: the names differ, or a weight is no positive number. Later, in reading:
        samples differ in shape or dtype.
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise DataError(
            f"mix takes a dict of data sets, not {datasets!r}",
            where="mix",
            remedy='give {"name": Source(...), ...}',
        )
    for name, dataset in datasets.items():
        _name(name, "mix")
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"{name!r} is a {type(dataset).__name__}",
                where="mix",
                remedy="make it a Source(...)",
            )

    # so that the pattern does not depend on the order in which a dict was written
    names = sorted(datasets)
    return _Mix({name: datasets[name] for name in names}, proportions(names, weights))


class Samples:
    """A data set's samples from a position on; only one thread may use it at a time."""

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        shuffle: bool,
    ):
        self._order = {"seed": int(seed), "shuffle": bool(shuffle)}
        self.held = HeldGroups(dataset.budget.memory // 2)
        opening = _Opening(
            int(seed),
            bool(shuffle),
            self.held,
            dataset.sources,
        )
        self._stream = dataset._open(opening, "")
        self._position = 0

        first = self._stream.peek(1).read()
        if isinstance(first, list):
            raise DataError(
                "the samples are documents, not pairs (inputs, targets) of one shape",
                where=repr(dataset),
                remedy=(
                    "call .pack(length), or map them to pairs; a pair of arrays is a"
                    " tuple, not a list"
                ),
            )
        self._first: Pair = first
        self.sample_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
        self._beginning = self._stream.state()

    def take(
        self,
        count: int,
        wanted: Any = None,
    ) -> tuple[Pair, list[str]]:
        """Consume `count` samples, and read some.

        Args:
          count: how many to consume.
          wanted: which of them to read: ascending integers from 0 to count - 1. None:
            all.

        Returns:
          (rows, identifiers): the wanted samples, a pair of arrays or dicts of them
          with len(wanted) rows each; and identifiers of all `count` samples. These are
          "source:epoch:index". A packed row has those of its documents with the tokens
          that they give its inputs, "source:epoch:index[start:stop]", joined by "+".

        Raises:
          DataError: the samples differ from the first one in shape or dtype.
        """
        draw = self._arranged(count)
        rows = self.read(draw, wanted, self._position)
        self._consume(count)
        return rows, draw.identifiers()

    def draw(self, count: int) -> Draw:
        """Consume `count` samples without reading them; see `read`."""
        draw = self._arranged(count)
        self._consume(count)
        return draw

    def read(
        self,
        draw: Draw,
        wanted: Any,
        position: int,
    ) -> Pair:
        """Read samples that were drawn. Several threads may do so at once.

        Args:
          draw: of `draw`.
          wanted: which of them, as in `take`.
          position: samples that were consumed before them, for messages.

        Raises:
          DataError: as `take`.
        """
        which = np.arange(len(draw)) if wanted is None else np.asarray(wanted, np.int64)
        rows = draw.take(which).read() if len(which) else self._no_rows()
        assert isinstance(rows, tuple)

        expected = described(self._first)
        if described(rows) != expected:
            raise DataError(
                f"the first sample is {expected}; samples after {position} are"
                f" {described(rows)}",
                where="data set",
                remedy="give all samples one shape and dtype",
            )
        return rows

    def hints(self) -> list[Hint]:
        """Return row groups that had better be read soon, for the threads that read."""
        return self._stream.hints()

    def skip(self, count: int) -> None:
        """Consume samples of a data set that has epochs, without looking at them."""
        self._consume(count)

    def _arranged(self, count: int) -> Draw:
        draw = self._stream.peek(count)
        ranks = draw.ranks()
        if ranks is None:
            return draw
        return draw.take(np.argsort(ranks, kind="stable"))

    def _consume(self, count: int) -> None:
        self._stream.advance(count)
        self._position += count

    def state(self) -> dict[str, Any]:
        """Return the position of the next sample to be consumed.

        It is plain data that survives JSON, and holds on any number of hosts.
        """
        return {
            **self._order,
            "samples": self._position,
            "position": self._stream.state(),
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on where `state()` was.

        Args:
          state: the position; {} or None: the beginning.

        Raises:
          DataError: the position was saved with another seed, other sources or weights,
            or other sizes of the sources.
        """
        if not state:
            state = {
                **self._order,
                "samples": 0,
                "position": self._beginning,
            }
        fields(state, {"seed", "shuffle", "samples", "position"}, "data set")

        for name, value in self._order.items():
            if state[name] != value:
                raise DataError(
                    f"the position was saved with {name} {state[name]}, and {name} is"
                    f" {value} now",
                    where=f"Recipe.{name}",
                    remedy=f"go on with {name}={state[name]}, or start a new run",
                )
        self._stream.restore(state["position"])
        self._position = state["samples"]

    def _no_rows(self) -> Rows:
        def none(x: np.ndarray) -> np.ndarray:
            return np.empty((0, *x.shape[1:]), x.dtype)

        return jax.tree.map(none, self._first)


def open_stream(
    dataset: Dataset,
    seed: int = 0,
    shuffle: bool = False,
) -> Samples:
    """Open a data set's samples at the beginning; one is read, for its shapes.

    Raises:
      DataError: the samples are documents of different lengths, those of a mixture's
        parts differ in shape, two sources have one name, or a filter keeps nothing.
    """
    return Samples(dataset, seed, shuffle)


def shards(
    folder: Any,
    split: str | None = None,
    *,
    inputs: Columns | None = None,
    target: Columns | None = None,
    decode: Mapping[str, Decode] | None = None,
    cache: DiskCache | None = None,
    name: str | None = None,
) -> Source:
    """Open a folder of prepared shards, Parquet or ArrayRecord.

    If the recipe shuffles, row groups are put in a random order and the samples of some
    groups are mixed, so that each group is read once an epoch (`data/windows.py`).

    Args:
      folder: the shards, or what preparation gave for them. Without the manifest that
        preparation writes, a split is the files in its folder, or those whose names
        begin with it.
      split: "train", "test", ...; None: all.
      inputs: the columns of a sample's inputs: a name; a list of names, whose numbers
        stand side by side in one array; or a dict of either, by the model's arguments.
        None: those of the manifest, or all columns but the target's.
      target: the same of its targets; None: that of the manifest, or the inputs are
        documents, to be packed.
      decode: by column, a function from a cell's bytes to an array, such as `Picture`.
      cache: where files are copied to when they are first read.
      name: in the samples' identifiers, as in `Source`.

    Raises:
      DataError: there are no such shards or columns, or PyArrow is not installed.
    """
    folder = Path(getattr(folder, "folder", folder))
    data = Shards(folder, split, inputs, target, decode or {}, cache)
    return Source(data, name)


def pictures(
    folder: str | Path,
    height: int,
    width: int,
    *,
    channels: Literal[1, 3, 4] = 3,
    fit: Literal["stretch", "crop"] = "stretch",
    classes: list[str] | None = None,
    name: str | None = None,
) -> Source:
    """Open a folder of pictures that has a folder for each class.

    Samples are (pixels uint8 (height, width, channels), number of the class int32).
    Threads decode the files when they are read.

    Args:
      folder: the classes' folders.
      height: of the pixels.
      width: of the pixels.
      channels: 1 (grey), 3 or 4 (with opacity).
      fit: "stretch", or "crop" around the middle to the aspect ratio.
      classes: the folders' names, in the order of their numbers; None: all, sorted.
      name: in the samples' identifiers, as in `Source`.

    Raises:
      DataError: there are no pictures, or Pillow is not installed.
    """
    files, labels, _ = files_of_classes(Path(folder), classes)
    decode = Picture(height, width, channels, fit)
    data = PictureFiles(files, labels, decode, f"pictures({str(folder)!r})")
    return Source(data, name)


def sample(dataset: Dataset) -> Pair:
    """Return the first sample in the data's own order, batch dim first.

    It is for taking shapes from; no position moves.
    """
    return open_stream(dataset)._first


def _refuse_augmented(
    dataset: Dataset,
    where: str,
) -> None:
    if dataset.is_augmented:
        raise DataError(
            f"what is augmented can't go through {where}: chance would choose",
            where=where,
            remedy=f"augment last: .{where}(...).augment(...)",
        )


def _function(
    function: Any,
    batched: bool,
    kind: str,
) -> Function:
    """Check a person's function, and find its name and place for messages."""
    if not callable(function):
        raise DataError(
            f"{kind} was given {function!r}, which can't be called",
            where=kind,
            remedy="give a function of (inputs, targets), or of a document's tokens",
        )

    name = getattr(function, "__name__", type(function).__name__)
    where = name
    code = getattr(function, "__code__", None)
    if code is not None and not of_a_library(code.co_filename):
        where = f"{code.co_filename}:{code.co_firstlineno}"
    if name == "<lambda>":
        name = "function"
    return Function(function, batched, kind, name, where)


def _whole(
    name: str,
    value: Any,
    least: int,
) -> int:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if is_whole and least <= value < 2**31:
        return int(value)
    raise DataError(
        f"{name} is {value!r}",
        where="pack",
        remedy=f"give a whole number of at least {least}",
    )


def _name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not name or set(name) & set(":+[] \t\n"):
        raise DataError(
            f"{name!r} is no name for a source",
            where=where,
            remedy="name it by a string without spaces, colons, pluses and brackets",
        )
