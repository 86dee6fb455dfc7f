"""A folder as Hugging Face has it: configuration, tensors, files of the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lepton_jax import adapt
from lepton_jax.data import extras
from lepton_jax.errors import CheckpointError, ModelError
from lepton_jax.hub import names, reading
from lepton_jax.hub.families import Family, difference, family_of
from lepton_jax.hub.origin import CONFIG, Origin, read_json
from lepton_jax.hub.shapes import parameter_shapes, shape_of
from lepton_jax.hub.shards import DTYPES, Shards, listed
from lepton_jax.models import DecoderLM, DecoderShape
from lepton_jax.trees import by_path, matches, with_leaves

if TYPE_CHECKING:
    from lepton_jax.trainer import Trainer

TOKENIZER = "tokenizer.json"
PIECES = "tokenizer.model"
# Rows of the embedding and the head that are compared at once.
ROWS_AT_ONCE = 4096


class HubFolder:
    """A model in a folder, checked and ready to be read.

    `lepton_jax.hub.open` makes it.

    Attributes:
      path: the folder.
      config: content of config.json.
      family: the model's family.
      shape: what the model computes.
      tensors: shapes and dtypes by name, as the files have them.
      notes: what a person may want to know, a sentence each.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        family: Family,
        shape: DecoderShape,
        tied: bool | None = None,
    ):
        self.path = path
        self.config = dict(config)
        self.family = family
        self.shape = shape
        self.notes: list[str] = []
        self._scheme = names.SCHEMES[family.scheme]
        with Shards(path) as shards:
            self.tensors = shards.tensors
            self.base = self._base_of(shards)
            self.shape = self._with_head(shards, shape, tied)
            self._check()
        self._note_training()

    @property
    def model(self) -> Callable[..., DecoderLM]:
        """The factory for `Recipe.model`: it takes `rngs`."""
        return partial(DecoderLM, self.shape)

    @property
    def origin(self) -> Origin:
        """The part of the folder that an export keeps."""
        dtypes = {name: DTYPES[part.dtype] for name, part in self.tensors.items()}
        return Origin(
            self.path,
            self.config,
            self.family,
            self.shape,
            self.base,
            dtypes,
        )

    @property
    def dtype(self) -> str:
        """The name of the dtype that most tensors have."""
        dtypes = [tensor.dtype for tensor in self.tensors.values()]
        return DTYPES[max(set(dtypes), key=dtypes.count)]

    def load_into(self, trainer: Trainer) -> Trainer:
        """Let a trainer begin with the folder's weights, at step 0.

        Each device reads the part of each tensor that the plan gives it. Optimizer and
        policies begin anew.

        Args:
          trainer: whose recipe has `model` as its model, with adapters on it or not
            (`lepton_jax.adapt`), or a `TransformerLM` of the same shape.

        Returns:
          The trainer.

        Raises:
          ModelError: its model is another.
          CheckpointError: a file can't be read.
        """
        # Where no data say otherwise: a row of as many tokens as there may be.
        tokens = jax.ShapeDtypeStruct((1, self._context()), jnp.int32)

        def read(wanted: dict[str, Any]) -> dict[str, jax.Array]:
            self._check_model(trainer)
            return self.weights(wanted)

        return trainer.begin_with(read, (tokens, tokens))

    def weights(self, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Return parameters by path, on their devices.

        Args:
          wanted: shapes by path, with dtype and sharding; those of adapters, which
            no folder has, are left out.

        Raises:
          ModelError: they are not this model's.
          CheckpointError: a file can't be read.
        """
        wanted = {
            path: leaf
            for path, leaf in wanted.items()
            if not matches(path, adapt.PATTERN)
        }
        found = self._sources_of(wanted)
        with Shards(self.path) as shards:
            return reading.read(shards, wanted, found)

    def module(self, dtype: Any = jnp.float32) -> DecoderLM:
        """Return the model with its weights on one device, to call without Lepton.

        Args:
          dtype: of the weights, and of what is computed.
        """
        module = nnx.eval_shape(lambda: self.model(rngs=nnx.Rngs(0)))
        graph, params = nnx.split(module)
        sharding = SingleDeviceSharding(jax.local_devices()[0])

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

        pure = jax.tree.map(shape, nnx.to_pure_dict(params))
        arrays = self.weights(by_path(pure))
        leaves = [arrays[path] for path in by_path(pure)]
        filled = with_leaves(pure, leaves)
        nnx.replace_by_pure_dict(params, filled)
        module = nnx.merge(graph, params)
        for _, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Embed):
                node.dtype = dtype  # which it has from when it was made
        return module

    def tokenizer(self) -> Any:
        """Return the folder's tokenizer, of its own library.

        Returns:
          A `tokenizers.Tokenizer` of tokenizer.json, or else a
          `sentencepiece.SentencePieceProcessor` of tokenizer.model.

        Raises:
          DataError: the library is not installed.
          CheckpointError: the folder has none, or it can't be read.
        """
        purpose = "reading the tokenizer"
        try:
            if (self.path / TOKENIZER).is_file():
                library = extras.needs("tokenizers", extra="text", purpose=purpose)
                return library.Tokenizer.from_file(str(self.path / TOKENIZER))
            if (self.path / PIECES).is_file():
                library = extras.needs("sentencepiece", extra="text", purpose=purpose)
                content = (self.path / PIECES).read_bytes()
                return library.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the tokenizer can't be read: {error}",
                where=self.path,
                remedy="download it again",
            ) from error
        raise CheckpointError(
            f"there is no {TOKENIZER}, nor {PIECES}",
            where=self.path,
            remedy="put the file of the tokenizer there",
        )

    def __str__(self) -> str:
        count = sum(int(np.prod(tensor.shape)) for tensor in self.tensors.values())
        shape = self.shape
        lines = [
            f"{self.path.name}: {self.family.name}, {count:,} parameters in"
            f" {self.dtype}",
            f"  {shape.layers} layers of {shape.dim}, {shape.heads} heads of"
            f" {shape.head_size} ({shape.groups} of keys and values),"
            f" {shape.vocab:,} tokens",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    # ---- internals ----

    def _base_of(self, shards: Shards) -> str:
        """Return what stands before the tensors' names, which some files lack."""
        base = self._scheme.base
        has_base = any(name.startswith(base) for name in shards.tensors)
        return base if has_base else ""

    def _with_head(
        self,
        shards: Shards,
        shape: DecoderShape,
        tied: bool | None,
    ) -> DecoderShape:
        """Return the shape with its head tied, or not, as the tensors are.

        Raises:
          CheckpointError: the flag and the tensors say different things, and nobody
            says which it is.
        """
        embedding = f"{self.base}{self._scheme.outside['embed']}.weight"
        flag = "tie_word_embeddings"
        has_head = names.LM_HEAD in shards.tensors
        is_tied = shape.tied if tied is None else tied
        if not is_tied and not has_head:
            raise CheckpointError(
                f"{flag} is false, but there is no {names.LM_HEAD}",
                where=self.path,
                remedy=f"if {embedding} is the head, say tied=True (--tied yes); else a"
                " file is missing",
            )
        if is_tied and has_head:
            is_same = _same(shards, embedding, names.LM_HEAD)
            if not is_same and tied is None:
                raise CheckpointError(
                    f"{flag} is true, but {names.LM_HEAD} differs from {embedding}",
                    where=self.path,
                    remedy=f"say which is the head: {names.LM_HEAD} with tied=False"
                    f" (--tied no), {embedding} with tied=True (--tied yes)",
                )
            what = "the same as" if is_same else "not read, but"
            self.notes.append(f"{names.LM_HEAD} is {what} {embedding}")
        return dataclasses.replace(shape, tied=is_tied)

    def _check(self) -> None:
        """Compare the tensors with those of the shape.

        Raises:
          CheckpointError: some are missing, or too many, or of another shape, or of a
            dtype that float32 does not hold.
        """
        expected = self._expected()
        known = dict.fromkeys(expected)
        if self.shape.tied:
            known[names.LM_HEAD] = None
        surplus = [
            name
            for name in self.tensors
            if name not in known and not self._scheme.buffers.fullmatch(name)
        ]
        missing = [name for name in expected if name not in self.tensors]
        for found, fault in (
            (missing, "these tensors are missing"),
            (surplus, f"these tensors are none of {self.family.name}'s"),
        ):
            if found:
                raise CheckpointError(
                    f"{fault}: {listed(found)}",
                    where=self.path,
                    remedy="compare config.json with the files: a bias, a norm or a"
                    " head is said in one alone, or a file is missing",
                )
        for name, size in expected.items():
            self._check_tensor(name, size)
        self.tensors = {
            name: self.tensors[name] for name in known if name in self.tensors
        }

    def _check_tensor(self, name: str, size: tuple[int, ...]) -> None:
        tensor = self.tensors[name]
        if tensor.shape != size:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)}, but config.json makes it"
                f" {list(size)}",
                where=tensor.file,
                remedy="correct config.json, or download the folder again",
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{name} is of type {tensor.dtype}",
                where=tensor.file,
                remedy=f"give the model in one of {', '.join(DTYPES.values())}",
            )

    def _expected(self) -> dict[str, tuple[int, ...]]:
        params = parameter_shapes(self.shape)
        found = names.sources(params, self.shape, self._scheme, self.base)
        return names.tensor_shapes(params, found)

    def _sources_of(self, wanted: Mapping[str, Any]) -> dict[str, names.Source]:
        """Return where parameters come from, all of which must be this model's."""
        try:
            found = names.sources(wanted, self.shape, self._scheme, self.base)
            sizes = names.tensor_shapes(wanted, found)
        except (KeyError, IndexError):
            sizes = {}
        expected = self._expected()
        if sizes != expected:
            wrong = [name for name in expected if sizes.get(name) != expected[name]]
            raise ModelError(
                "the trainer's model is another than the folder's"
                + (f": {listed(wrong)}" if sizes else ""),
                where=self.path,
                remedy="make it with the folder's: Recipe(model=folder.model, ...)",
            )
        return found

    def _check_model(self, trainer: Trainer) -> None:
        """Check that a trainer's model computes what the folder's does.

        Raises:
          ModelError: it does not, whatever the sizes of its parameters.
        """
        assert trainer.program is not None
        traced = trainer.program.trace
        state = traced.state
        module = traced.functional.whole(state.params, state.variables)
        if differs := difference(shape_of(module), self.shape):
            raise ModelError(
                f"the trainer's model is another than the folder's: {differs}",
                where=self.path,
                remedy="make it with the folder's: Recipe(model=folder.model, ...)",
            )

    def _context(self) -> int:
        key = "n_positions" if self.shape.positions else "max_position_embeddings"
        longest = self.config.get(key)
        return min(longest, MOST_TOKENS) if isinstance(longest, int) else MOST_TOKENS

    def _note_training(self) -> None:
        dropped = [
            f"{name} {self.config[name]}" for name in DROPOUTS if self.config.get(name)
        ]
        if dropped:
            self.notes.append(
                f"{', '.join(dropped)} was for training; this trains without dropout"
            )
        rotary = self.shape.rotary
        if rotary is not None and rotary.kind == "dynamic":
            self.notes.append(
                f"theta grows with texts of more than {rotary.original} tokens; with a"
                " cache, keys keep the angles that they were written with"
            )


DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
# Tokens of a row by which a model without data is traced (assumption).
MOST_TOKENS = 128


def open_folder(
    folder: str | Path,
    *,
    tied: bool | None = None,
    ignore: Sequence[str] = (),
    loop: Literal["unrolled", "scan"] = "unrolled",
) -> HubFolder:
    """Open a folder as Hugging Face has it, and check that all of it is understood.

    It reads configuration and headers, and of the weights nothing yet.

    Args:
      folder: with config.json and safetensors files.
      tied: whether the token embedding is the head; None: as the configuration says.
      ignore: keys of the configuration to pass over.
      loop: over the layers, see `models.DecoderShape`.

    Returns:
      The folder: `.model` is for `Recipe.model`, `.load_into(trainer)` reads the
      weights onto the planned mesh.

    Raises:
      ModelError: a key of the configuration, or a value, is not understood.
      CheckpointError: a file is missing or damaged, or tensors don't fit it.
    """
    path = Path(folder)
    config = read_json(path / CONFIG)
    family = family_of(config, path / CONFIG)
    shape = family.shape_of(config, path / CONFIG, tuple(ignore))
    try:
        shape = dataclasses.replace(shape, loop=loop)
    except ValueError as error:
        raise ModelError(
            str(error), where="hub.open, loop", remedy='leave loop="unrolled"'
        ) from error
    return HubFolder(path, config, family, shape, tied)


# ---- internals ----


def _same(shards: Shards, left: str, right: str) -> bool:
    """Whether two tensors are the same, compared some rows at a time."""
    sides = [shards.tensors.get(left), shards.tensors.get(right)]
    if None in sides or sides[0].shape != sides[1].shape:  # type: ignore[union-attr]
        return False
    rows = sides[0].shape[0]  # type: ignore[union-attr]
    for start in range(0, rows, ROWS_AT_ONCE):
        index = (slice(start, min(start + ROWS_AT_ONCE, rows)),)
        if not np.array_equal(shards.read(left, index), shards.read(right, index)):
            return False
    return True
