"""Folders of prepared shards as a source of samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.data.arrays import Arrays, aligned_empty
from lepton_jax.data.columns import (
    Columns,
    Decode,
    Leaf,
    Leaves,
    Ragged,
    nested,
)
from lepton_jax.data.disk_cache import DiskCache
from lepton_jax.data.indexed import Groups, Indexed
from lepton_jax.data.memory import HeldGroups
from lepton_jax.data.rows import Rows
from lepton_jax.data.shard_files import SUFFIXES, open_shard
from lepton_jax.errors import DataError, nearest, pointing_at_user

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Listed:
    """A shard as its folder lists it.

    Attributes:
      path: of the file.
      digest: of its content; without a manifest, of its name, size and time.
    """

    path: Path
    digest: str


class Shards(Indexed):
    """Samples in the files of a folder.

    Args:
      folder: of the files, with a manifest or without.
      split: "train", "test", ...; None: all.
      inputs: the columns of a sample's inputs: one, several that stand side by side in
        one array, or either by the model's argument. None: all but the target's.
      target: the same of its targets; None: the inputs are documents.
      decode: functions from a cell's bytes to an array, by column.
      cache: where files are copied to when they are first read.

    Raises:
      DataError: there are no such files, or a column is not there.
    """

    def __init__(
        self,
        folder: Path,
        split: str | None,
        inputs: Columns | None,
        target: Columns | None,
        decode: Mapping[str, Decode],
        cache: DiskCache | None,
    ):
        self.folder = folder
        self.split = split
        self._cache = cache
        manifest = read_manifest(folder)
        self._listed = listed_in(folder, split, manifest)
        self._files = [
            open_shard(shard.path, is_packed=manifest is not None)
            for shard in self._listed
        ]
        first = self._files[0]
        for file in self._files:
            if file.names != first.names:
                raise DataError(
                    f"the columns are {', '.join(file.names)}, and those of"
                    f" {first.path.name} are {', '.join(first.names)}",
                    where=file.path,
                    remedy="prepare the files of a folder together, with one schema",
                )

        where = str(folder)
        if manifest is not None and inputs is None and target is None:
            inputs = manifest.get("inputs")
            target = manifest.get("target")
        self.leaves = Leaves.of(inputs, target, decode, first.names, where)
        digests = "".join(shard.digest for shard in self._listed)
        self.digest = hashlib.sha256(digests.encode()).hexdigest()
        self._place_groups()

    def _place_groups(self) -> None:
        """Number the row groups of all files, in the order of their samples."""
        self._places: list[tuple[int, int]] = []
        sizes: list[int] = []
        for number, file in enumerate(self._files):
            self._places += [(number, group) for group in range(len(file.sizes))]
            sizes += file.sizes
        if not sum(sizes):
            raise DataError(
                "there is no row",
                where=self.folder,
                remedy="look into the quarantine table for the reason",
            )
        total = sum(file.bytes for file in self._files)
        filled = [i for i, size in enumerate(sizes) if size]
        self._places = [self._places[i] for i in filled]
        self.groups: Groups = Groups(np.array(sizes)[filled], total)
        self._ends = np.cumsum(self.groups.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        split = f", {self.split!r}" if self.split else ""
        return f"shards({str(self.folder)!r}{split})"

    def read(
        self,
        indices: np.ndarray,
        held: HeldGroups,
    ) -> Rows:
        groups = np.searchsorted(self._ends, indices, "right")
        rows = indices - (self._ends[groups] - self.groups.sizes[groups])
        order = np.argsort(groups, kind="stable")
        borders = np.flatnonzero(np.diff(groups[order])) + 1
        parts = [
            (places, self._group(int(groups[places[0]]), held), rows[places])
            for places in np.split(order, borders)
        ]
        return self._sample_rows(parts, len(indices))

    def hold(
        self,
        group: int,
        held: HeldGroups,
    ) -> None:
        self._group(group, held)

    def _group(
        self,
        group: int,
        held: HeldGroups,
    ) -> dict[str, Leaf]:
        return held.get((self.digest, self._key, group), partial(self._load, group))

    @property
    def _key(self) -> tuple:
        """What two views of the same files must share to share a row group."""
        return tuple(self.leaves.columns.items())

    def _load(self, group: int) -> tuple[dict[str, Leaf], int]:
        number, inner = self._places[group]
        file = self._files[number]
        columns = self.leaves.names

        def read(path: Path) -> Mapping[str, Leaf]:
            return file.read(path, inner, columns)

        try:
            table = self._through_cache(self._listed[number], read)
        except FileNotFoundError as error:
            raise DataError(
                "the shard is gone",
                where=file.path,
                remedy="restore the file, or prepare the data again",
            ) from error
        leaves = self.leaves.make(table, f"{file.path}, row group {inner}")
        return leaves, sum(leaf.nbytes for leaf in leaves.values())

    def _through_cache(
        self,
        shard: Listed,
        read: Callable[[Path], Mapping[str, Leaf]],
    ) -> Mapping[str, Leaf]:
        if self._cache is None:
            return read(shard.path)
        return self._cache.copied(shard.path, shard.digest, read)

    def _sample_rows(
        self,
        parts: Sequence[tuple[np.ndarray, dict[str, Leaf], np.ndarray]],
        count: int,
    ) -> Rows:
        """Put samples together.

        Args:
          parts: (places of samples, leaves of their group, their rows in it).
          count: samples of all parts.
        """
        leaves: dict[str, Any] = {}
        for path in self.leaves.columns:
            cells = [(places, group[path], rows) for places, group, rows in parts]
            if isinstance(cells[0][1], Ragged):
                leaves[path] = self._decoded(path, cells, count)
            else:
                leaves[path] = _gathered(cells, count)

        inputs, targets = nested(leaves)
        if isinstance(inputs, list) and self.leaves.of_documents:
            return inputs
        if targets is None:
            raise DataError(
                "samples have inputs, but no targets",
                where=self.folder,
                remedy='say which column is to be predicted: target="..."',
            )
        pairs = Arrays(inputs, targets)
        return pairs.inputs, pairs.targets

    def _decoded(
        self,
        path: str,
        cells: Sequence[tuple[np.ndarray, Any, np.ndarray]],
        count: int,
    ) -> Any:
        """Decode cells of different lengths; those of documents stay as they are."""
        decode = self.leaves.decoder(path)
        out: list[Any] = [None] * count
        for places, leaf, rows in cells:
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                out[place] = leaf[row]
        if decode is None:
            return out if self.leaves.of_documents else self._stacked(path, out)

        with pointing_at_user(
            f"decoding {self.leaves.columns[path]!r}",
            "fix decode={...}, or clean the column in the preparation",
            where=self.folder,
            kind=DataError,
        ):
            return np.stack([decode(cell.tobytes()) for cell in out])

    def _stacked(
        self,
        path: str,
        cells: list[np.ndarray],
    ) -> np.ndarray:
        """Return lists of one length as rows."""
        lengths = {len(cell) for cell in cells}
        if len(lengths) == 1 and cells[0].dtype != np.uint8:
            return np.stack(cells)
        columns = self.leaves.columns[path]
        names = columns if isinstance(columns, str) else columns[0]
        what = "bytes or text"
        if cells[0].dtype != np.uint8:
            what = f"lists of {min(lengths)} to {max(lengths)} numbers"
        raise DataError(
            f"the cells of {names!r} are {what}",
            where=self.folder,
            remedy=(
                "give a function of bytes, decode={"
                f"{names!r}: ...}}, or encode the column in the preparation; documents"
                " to be packed have no target"
            ),
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest that preparation wrote; None: there is none.

    Raises:
      DataError: there is no such folder, or the manifest can't be read.
    """
    if not folder.is_dir():
        raise DataError(
            "there is no such folder",
            where=folder,
            remedy="name the folder that `lepton prepare SPEC --out FOLDER` wrote",
        )
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        for entry in manifest["shards"]:
            _ = entry["split"], entry["path"], entry["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the manifest can't be read: {type(error).__name__}: {error}",
            where=file,
            remedy="prepare the data again",
        ) from error
    return manifest


def listed_in(
    folder: Path,
    split: str | None,
    manifest: Mapping[str, Any] | None,
) -> list[Listed]:
    """Return the shards of a folder, in the order of its manifest, or of their names.

    Without a manifest, the files of a split are those in the folder of its name, or
    those whose names begin with it.

    Raises:
      DataError: there are none.
    """
    if manifest is not None:
        return _of_manifest(folder, split, manifest)
    files = [file for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}")]
    if split is not None:
        files = [file for file in files if _is_of(file.relative_to(folder), split)]
    if not files:
        of_split = f" of the split {split!r}" if split else ""
        raise DataError(
            f"there are no shards{of_split}: no {' or '.join(SUFFIXES)}",
            where=folder,
            remedy="name a folder of shards, or another split",
        )
    return [Listed(file, _stamp(file)) for file in sorted(files)]


def _is_of(
    file: Path,
    split: str,
) -> bool:
    return file.parts[0] == split or file.name.startswith(f"{split}-")


def _of_manifest(
    folder: Path,
    split: str | None,
    manifest: Mapping[str, Any],
) -> list[Listed]:
    entries = manifest["shards"]
    chosen = [
        Listed(folder / entry["path"], entry["sha256"])
        for entry in entries
        if split is None or entry["split"] == split
    ]
    if not chosen:
        splits = sorted({entry["split"] for entry in entries})
        raise DataError(
            f"there is no split {split!r}{nearest(str(split), splits)}",
            where=folder / MANIFEST,
            remedy=f"the splits are {', '.join(splits) or 'none: prepare again'}",
        )
    return chosen


def _stamp(file: Path) -> str:
    """Return what tells a file from another version of it without reading it."""
    status = file.stat()
    text = f"{file.name} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()


def _gathered(
    cells: Sequence[tuple[np.ndarray, Any, np.ndarray]],
    count: int,
) -> np.ndarray:
    first = cells[0][1]
    out = aligned_empty((count, *first.shape[1:]), first.dtype)
    for places, leaf, rows in cells:
        out[places] = leaf[rows]
    return out
