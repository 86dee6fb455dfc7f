"""A target of an export: what it can't take, and how a model is written for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from lepton_jax.errors import ModelError
from lepton_jax.ship.artifact.artifact import Artifact
from lepton_jax.ship.artifact.signature import Tensor
from lepton_jax.ship.artifact.tracing import Traced

SIGNATURE = "signature.json"
DEFAULT_BATCH = (
    1  # of a target with a fixed batch; assumption: a device asks one by one
)
WORD = re.compile(r"\W")
FOLDERS = re.compile(r"(?:/[\w.+-]+)+/(?=[\w.-]+\.py\b)")  # before the name of a file


@dataclass(frozen=True)
class Options:
    """Options of an export.

    Attributes:
      batch: rows of a batch; None: any number.
      device: that a target compiles for: "cpu" (this one), "aarch64", "vulkan".
    """

    batch: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
      run: (weights, inputs) to outputs, all by name.
      weights: by path.
      inputs: signature.
      outputs: signature.
      exported: the program; None: it has to be made of `run`.
      is_live: whether JAX can trace into `run`: the model's code is at hand.
      meeting: the reason why a prediction depends on its batch; None: it does not.
      batch_size: of the recipe.
      draws: whether it depends on its place in a batch of that size alone.
      name: of the model.
    """

    run: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    weights: dict[str, np.ndarray]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    exported: export.Exported | None
    is_live: bool
    meeting: str | None
    batch_size: int
    draws: bool
    name: str

    def shapes(
        self,
        batch: int,
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a batch, by name."""
        return {
            tensor.name: jax.ShapeDtypeStruct(
                (batch, *tensor.shape[1:]),
                tensor.dtype,
            )
            for tensor in self.inputs
        }

    def closed(self) -> Callable[..., tuple[Any, ...]]:
        """Return the model as a function of its inputs, in their order, to outputs.

        The weights are constants of it.
        """
        # as JAX's own arrays: a model may add to one in place
        weights = {path: jnp.asarray(x) for path, x in self.weights.items()}

        def run(*arrays: Any) -> tuple[Any, ...]:
            names = [tensor.name for tensor in self.inputs]
            outputs = self.run(
                weights,
                dict(zip(names, arrays, strict=True)),
            )
            return tuple(outputs[tensor.name] for tensor in self.outputs)

        return run


def source_of(
    artifact: Artifact,
    model: Traced | None = None,
) -> Source:
    """Return the source of an export.

    Args:
      artifact: of the model.
      model: what `artifact.tracing.traced` returned for its trainer; None: the code is
        not at hand.
    """
    exported = artifact.exported
    return Source(
        run=exported.call if model is None else model.run,
        weights=artifact.weights if model is None else model.weights,
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        exported=exported,
        is_live=model is not None,
        meeting=artifact.manifest.meeting,
        batch_size=artifact.manifest.batch_size,
        draws=artifact.manifest.draws,
        name=artifact.manifest.name,
    )


class Target:
    """A target.

    Attributes:
      name: as `--to` has it.
      runtime: what runs it, for people.
      extra: of Lepton that makes it; None: nothing more is needed.
      modules: that have to be there to make it.
      has_any_batch: whether one file serves every batch size.
      is_program: whether it predicts; else it holds weights alone.
    """

    name = ""
    runtime = ""
    extra: str | None = None
    modules: tuple[str, ...] = ()
    has_any_batch = True
    is_program = True

    def refusals(
        self,
        source: Source,
        options: Options,
    ) -> list[str]:
        """Return the reasons why a model can't be exported, before work starts."""
        reasons = []
        fixed = self.batch_of(source, options)
        is_alike = source.draws and fixed == source.batch_size
        depends = source.meeting is not None and not is_alike
        if depends and fixed is not None and self.is_program:
            reasons.append(
                f"a prediction depends on its batch ({source.meeting}), so that one of"
                f" {fixed} rows that is filled up would be another"
                f"{self._alike(source)}"
            )
        return reasons

    def batch_of(
        self,
        source: Source,
        options: Options,
    ) -> int | None:
        """Return the batch size of what is written; None: any."""
        if options.batch is not None or self.has_any_batch:
            return options.batch
        return DEFAULT_BATCH

    def write(
        self,
        source: Source,
        folder: Path,
        options: Options,
    ) -> None:
        """Write a model into a folder, with `signature.json`.

        Raises:
          ModelError: the target's own converter fails.
        """
        raise NotImplementedError

    def _alike(self, source: Source) -> str:
        return f"; --batch {source.batch_size} can be" if source.draws else ""


def write_signature(
    target: str,
    source: Source,
    folder: Path,
    batch: int | None,
    words: bool = True,
    aliases: Mapping[str, str] | None = None,
    **more: Any,
) -> None:
    """Write the names, dtypes and shapes of a model's arrays.

    Args:
      target: its name.
      source: the model.
      folder: of the export.
      batch: rows of a batch; None: any.
      words: whether the target has names that are identifiers alone.
      aliases: by the name of an output, the target's name of it, where that is another.
      **more: further facts.
    """
    content: dict[str, Any] = {
        "target": target,
        "name": source.name,
        "batch": batch,
        "at_once": None if source.meeting is None else source.batch_size,
        **more,
        "inputs": _entries(source.inputs, batch, words),
        "outputs": _entries(source.outputs, batch, words),
    }
    for entry in content["outputs"]:
        entry["as"] = (aliases or {}).get(entry["name"], entry["as"])
    (folder / SIGNATURE).write_text(
        json.dumps(
            content,
            indent=1,
        )
        + "\n"
    )


def word(name: str) -> str:
    """Return a name as an identifier, which some targets want.

    >>> word("outputs.rating")
    'outputs_rating'
    """
    return WORD.sub("_", name)


def failed(target: str, error: BaseException) -> ModelError:
    """Return the error of a converter that could not take a model."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    message = FOLDERS.sub("", lines[0]) if lines else type(error).__name__
    return ModelError(
        f"{target} can't take the model: {type(error).__name__}: {message}",
        where=f"lepton export --to {target}",
        remedy="export it to stablehlo, which takes every model; docs/ship.md says what"
        " each target can't do",
    )


def _entries(
    tensors: tuple[Tensor, ...],
    batch: int | None,
    words: bool,
) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "as": word(tensor.name) if words else tensor.name,
            "dtype": tensor.dtype,
            "shape": [-1 if batch is None else batch, *tensor.shape[1:]],
        }
        for tensor in tensors
    ]
