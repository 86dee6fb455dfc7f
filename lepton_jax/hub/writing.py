"""A model written as a folder that transformers and vLLM open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from lepton_jax import adapt
from lepton_jax.data import extras
from lepton_jax.errors import CheckpointError, ModelError, SettingError
from lepton_jax.hosts import agreement
from lepton_jax.hub import names
from lepton_jax.hub.families import Family, difference, family_for
from lepton_jax.hub.folder import HubFolder, open_folder
from lepton_jax.hub.origin import CONFIG, TENSORS, Origin, writing
from lepton_jax.hub.shapes import shape_of
from lepton_jax.hub.shards import EXTRA, INDEX, SINGLE
from lepton_jax.models import DecoderShape
from lepton_jax.trees import by_path

if TYPE_CHECKING:
    from lepton_jax.trainer import Trainer

NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Bytes of a file, as transformers had it until 2025 (max_shard_size).
SHARD_BYTES = 5_000_000_000
# Tokens of the longest text, where nothing says it (assumption).
CONTEXT = 2048


def save(
    source: Trainer | nnx.Module,
    folder: str | Path,
    *,
    like: HubFolder | str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model as a folder that transformers and vLLM open.

    Args:
      source: a trainer, whose weights to serve with are written; or a `DecoderLM` or
        a `TransformerLM`. Adapters are added to the kernels.
      folder: to be made, or empty.
      like: the folder that the model came from: its configuration, names and dtypes
        are kept, and its tokenizer, chat template and licence are copied untouched.
        None: a configuration is written, of the first family that can hold the shape.
      dtype: of all tensors: "float32", "bfloat16" or "float16"; None: as in `like`, or
        else float32.
      shard_bytes: most bytes of a file, where it has more than one tensor.

    Returns:
      The folder.

    Raises:
      ModelError: no family can hold the model, or it is another than that of `like`.
      CheckpointError: the folder can't be written.
      SettingError: there is no such dtype.
    """
    if dtype is not None and dtype not in NUMPY:
        raise SettingError(
            f"dtype is {dtype!r}",
            where="hub.save",
            remedy=f"one of {', '.join(NUMPY)}",
        )
    folder = Path(folder)
    origin = _origin(like)
    module, context = _module(source)
    shape = shape_of(module)
    params = by_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    plan = _Written(shape, params, origin, dtype)
    config = _config(plan, origin, context, dtype)

    fresh = folder.with_name(folder.name + ".new")
    agreement.first(lambda: _begin(folder, fresh))
    try:
        plan.write(fresh, shard_bytes)
        agreement.first(lambda: _finish(folder, fresh, config, origin))
    except BaseException:
        if agreement.host() == 0:
            shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


# ---- internals ----


class _Written:
    """The tensors to write.

    Attributes:
      family: whose names they have.
      shape: of the model.
      sizes: shapes by name, in the order in which they are written.
      dtypes: by name.
    """

    def __init__(
        self,
        shape: DecoderShape,
        params: Mapping[str, Any],
        origin: Origin | None,
        dtype: str | None,
    ):
        self.shape = shape
        self.params = params
        self.family = _family(shape, origin)
        scheme = names.SCHEMES[self.family.scheme]
        base = None if origin is None else origin.base
        self._sources = names.sources(params, shape, scheme, base)
        self.sizes = names.tensor_shapes(params, self._sources)
        self._embedding = self._sources[names.EMBEDDING].pieces[0].tensor
        has_copy = origin is not None and names.LM_HEAD in origin.dtypes
        self._copies_head = shape.tied and has_copy
        if self._copies_head:
            self.sizes[names.LM_HEAD] = self.sizes[self._embedding]
        self.dtypes = {name: self._dtype(name, origin, dtype) for name in self.sizes}
        self._makers = self._pieces_by_tensor()

    def write(self, folder: Path, shard_bytes: int) -> None:
        """Write all tensors, a file after the other; host 0 writes."""
        library = extras.needs(
            "safetensors.numpy",
            extra=EXTRA,
            purpose="writing a model's folder",
            kind=CheckpointError,
        )
        shards = list(self._shards(shard_bytes))
        index: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = SINGLE
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: self._tensor(name) for name in shard}
            index |= dict.fromkeys(shard, file)

            def put(tensors: Any = tensors, file: str = file) -> None:
                content = {"format": "pt"}
                with writing(folder):
                    library.save_file(tensors, folder / file, metadata=content)

            agreement.first(put)
        if len(shards) > 1:
            agreement.first(lambda: self._write_index(folder, index))

    def _write_index(self, folder: Path, index: Mapping[str, str]) -> None:
        content = {
            "metadata": {"total_size": sum(map(self._bytes, self.sizes))},
            "weight_map": dict(sorted(index.items())),
        }
        with writing(folder):
            (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")

    def _shards(self, most: int) -> Iterator[list[str]]:
        """Yield the names of each file's tensors."""
        shard: list[str] = []
        size = 0
        for name in self.sizes:
            if shard and size + self._bytes(name) > most:
                yield shard
                shard = []
                size = 0
            shard.append(name)
            size += self._bytes(name)
        yield shard

    def _bytes(self, name: str) -> int:
        return int(np.prod(self.sizes[name])) * NUMPY[self.dtypes[name]].itemsize

    def _dtype(self, name: str, origin: Origin | None, dtype: str | None) -> str:
        if dtype is not None:
            return dtype
        return "float32" if origin is None else origin.dtypes[name]

    def _pieces_by_tensor(self) -> dict[str, list[tuple[str, int | None, names.Piece]]]:
        """Return for each tensor (path, place in a stack, piece)."""
        makers: dict[str, list[tuple[str, int | None, names.Piece]]] = {}
        for path, source in self._sources.items():
            for place, piece in enumerate(source.pieces):
                at = place if source.stacked else None
                makers.setdefault(piece.tensor, []).append((path, at, piece))
        return makers

    def _tensor(self, name: str) -> np.ndarray:
        """Return a tensor as it is written, on each host."""
        is_copy = name == names.LM_HEAD and self._copies_head
        made = self._makers[self._embedding if is_copy else name]
        parts: dict[int, np.ndarray] = {}
        for path, place, piece in made:
            leaf = self.params[path]
            values = _on_host(leaf if place is None else leaf[place])
            parts[piece.third or 0] = values.T if piece.transposed else values
        ordered = [parts[third] for third in sorted(parts)]
        whole = ordered[0] if len(ordered) == 1 else np.concatenate(ordered, axis=-1)
        return _rounded(name, np.ascontiguousarray(whole), self.dtypes[name])


def _rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values in a dtype.

    Raises:
      CheckpointError: some are too large for it.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(NUMPY[dtype])
    if np.isinf(rounded.astype(np.float32)).sum() > np.isinf(values).sum():
        raise CheckpointError(
            f"{name} has values of up to {np.abs(values).max():.3g}, too large for"
            f" {dtype}",
            where="lepton_jax.hub.save, dtype",
            remedy='say dtype="bfloat16" (--dtype bfloat16)',
        )
    return rounded


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _origin(like: HubFolder | str | Path | None) -> Origin | None:
    if like is None:
        return None
    if isinstance(like, HubFolder):
        return like.origin
    has_weights = not (Path(like) / TENSORS).is_file()
    return open_folder(like).origin if has_weights else Origin.read(Path(like))


def _module(source: Any) -> tuple[Any, int]:
    """Return a trainer's module, or the module, and the length of its texts."""
    if isinstance(source, nnx.Module):
        return _merged(source), CONTEXT
    module = _merged(source.module())
    inputs = jax.tree.leaves(source.trace.inputs)
    lengths = [leaf.shape[1] for leaf in inputs if len(leaf.shape) > 1]
    return module, max(lengths, default=CONTEXT)


def _merged(module: Any) -> Any:
    """Return a module whose adapters, if it has any, are added to its kernels."""
    nodes = (node for _, node in nnx.iter_graph(module))
    has_adapters = any(isinstance(node, adapt.LoRALinear) for node in nodes)
    return adapt.merge(module) if has_adapters else module


def _family(shape: DecoderShape, origin: Origin | None) -> Family:
    """Return the family to write.

    Raises:
      ModelError: the model is another than that of the folder which it shall be like.
    """
    if origin is None:
        return family_for(shape)
    if differs := difference(shape, origin.shape):
        raise ModelError(
            f"the model is another than that of {origin.path.name}: {differs}",
            where=origin.path,
            remedy="name the folder that the model came from, or none",
        )
    return origin.family


def _config(
    plan: _Written,
    origin: Origin | None,
    context: int,
    dtype: str | None,
) -> dict[str, Any]:
    if origin is None:
        config = plan.family.config_of(plan.shape, context)
        return {**config, "torch_dtype": dtype or "float32"}
    config = dict(origin.config)
    said = config.get("tie_word_embeddings")
    if plan.shape.tied != (plan.family.tied if said is None else said):
        config["tie_word_embeddings"] = plan.shape.tied
    if dtype is not None:
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = dtype
    return config


def _begin(folder: Path, fresh: Path) -> None:
    """Make a folder next to the place.

    Raises:
      CheckpointError: something is there, or it can't be made.
    """
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                "the folder is not empty",
                where=folder,
                remedy="name another folder",
            )
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)


def _finish(
    folder: Path,
    fresh: Path,
    config: Mapping[str, Any],
    origin: Origin | None,
) -> None:
    """Write the configuration, copy what goes along, and put the folder in place."""
    with writing(folder):
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if origin is not None:
            origin.copy_companions(fresh)
        if folder.exists():
            folder.rmdir()
        fresh.rename(folder)
