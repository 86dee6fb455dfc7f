"""The tensors of a folder, read slice by slice from its safetensors files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lepton_jax.data import extras
from lepton_jax.errors import CheckpointError, nearest

EXTRA = "hub"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Types of tensors that float32 holds without loss, by safetensors' names.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MOST_NAMED = 5  # tensors that a message names


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor, as the header of a file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The tensors of a folder.

    Files are opened when something of them is read, and mapped into memory: what is
    read of a file are the pages that a slice lies on. It is a context that closes them.

    Args:
      folder: with `model.safetensors`, or an index and the files that it names.

    Attributes:
      tensors: what the headers say, by name.
      bytes_read: bytes of all slices so far.

    Raises:
      CheckpointError: there is no such file, or one is damaged, or the index names
        other tensors than the files hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes_read = 0
        self._library = extras.needs(
            "safetensors",
            extra=EXTRA,
            purpose="reading a model's folder",
            kind=CheckpointError,
        )
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        index = folder / INDEX
        if index.is_file():
            self._read_indexed(index)
        else:
            self._read_headers(_single(folder))

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open = {}

    def read(
        self,
        name: str,
        index: tuple[slice, ...],
    ) -> np.ndarray:
        """Return a slice of a tensor, of the file's own dtype."""
        tensor = self.tensors[name]
        part = self._file(tensor.file).get_slice(name)
        values = part[index] if index else part[:]
        self.bytes_read += values.nbytes
        return values

    def _read_indexed(self, index: Path) -> None:
        named = _weight_map(index)
        for file in sorted(set(named.values())):
            if Path(file).name != file:
                raise CheckpointError(
                    f"the index names {file!r}, which is not in the folder",
                    where=index,
                    remedy="download the folder again",
                )
            self._read_headers(self.folder / file)
        for name, file in named.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(
                    f"the index says that {file} holds {name}, but it does not"
                    f"{nearest(name, self.tensors)}",
                    where=index,
                    remedy="download the folder again, or write the index anew",
                )
        if surplus := [name for name in self.tensors if name not in named]:
            raise CheckpointError(
                f"the files hold {listed(surplus)}, which the index does not name",
                where=index,
                remedy="download the folder again, or write the index anew",
            )

    def _read_headers(self, path: Path) -> None:
        file = self._file(path)
        for name in file.keys():  # noqa: SIM118, it is no dict
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            if name in self.tensors:
                raise CheckpointError(
                    f"{name} is in two files: {self.tensors[name].file.name} and"
                    f" {path.name}",
                    where=self.folder,
                    remedy="download the folder again",
                )
            self.tensors[name] = Tensor(path, shape, part.get_dtype())

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                opened = self._library.safe_open(path, framework="numpy")
                self._open[path] = opened.__enter__()
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"there is no file {path.name}",
                    where=path.parent,
                    remedy="download the folder again: a file of weights is missing",
                ) from error
            except (OSError, self._library.SafetensorError) as error:
                raise CheckpointError(
                    f"the file can't be read: {error}",
                    where=path,
                    remedy="download it again: it is cut off, or no safetensors file",
                ) from error
        return self._open[path]


def listed(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    shown = ", ".join(names[:MOST_NAMED])
    more = len(names) - MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


# ---- internals ----


def _single(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(files) == 1:
        return files[0]
    if any((folder / name).is_file() for name in PICKLED):
        raise CheckpointError(
            "the weights are pickled (pytorch_model.bin), which can run code",
            where=folder,
            remedy="take the model's safetensors files, or convert it in a place of"
            " its own: model.save_pretrained(folder)",
        )
    raise CheckpointError(
        f"there is no {SINGLE}, nor {INDEX}",
        where=folder,
        remedy="name the folder of a model as Hugging Face has it",
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        named = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the index can't be read: {error}",
            where=index,
            remedy="download it again",
        ) from error
