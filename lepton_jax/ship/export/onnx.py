"""ONNX, by jax2onnx, which traces the model's own code.

It replaces Flax's modules by rules of its own while it traces them, and knows neither
all of them nor all that they do (state, streams of random numbers). So it is given the
model's operations alone.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lepton_jax.ship.export import inlined
from lepton_jax.ship.export.lowering import operations, traced
from lepton_jax.ship.export.rules import FOR_ONNX
from lepton_jax.ship.export.target import (
    Options,
    Source,
    Target,
    failed,
    word,
    write_signature,
)
from lepton_jax.ship.extras import needs

FILE = "model.onnx"
# Loggers that warn of examples that are not installed, and of shapes that are computed.
TALKATIVE = ("jax2onnx", "onnx_ir")
BATCH = "B"  # ONNX's name of the dynamic dim
TRACED = 2  # rows of the batch that is looked through; assumption: as any other
MOST_NAMED = 3  # operations that a message names
RANDOM = ("random_", "threefry", "rng_")  # beginnings of what draws random numbers


class ONNX(Target):
    """An ONNX file for every batch size."""

    name = "onnx"
    runtime = "ONNX Runtime"
    extra = "onnx"
    modules = ("onnx", "onnxruntime", "jax2onnx")

    def refusals(
        self,
        source: Source,
        options: Options,
    ) -> list[str]:
        """See `Target.refusals`."""
        reasons = super().refusals(source, options)
        if not source.is_live:
            return [
                *reasons,
                "ONNX is made of the model's own code, and an artifact holds none:"
                " export the run",
            ]
        unknown = _unknown(source)
        if unknown:
            reasons.append(
                "jax2onnx has no rule for"
                f" {', '.join(unknown[:MOST_NAMED])}"
                f"{' and more' if len(unknown) > MOST_NAMED else ''}"
            )
        return reasons

    def write(
        self,
        source: Source,
        folder: Path,
        options: Options,
    ) -> None:
        """See `Target.write`."""
        library = needs("jax2onnx", extra="onnx", purpose="--to onnx")
        batch = self.batch_of(source, options)
        inputs = _inputs(source, batch)
        whole = source
        source, aliases = _without_twins(whole)
        _hush()
        try:
            library.to_onnx(
                operations(source, inputs, FOR_ONNX),
                inputs=inputs,
                model_name=word(source.name),
                return_mode="file",
                output_path=str(folder / FILE),
                input_names=[word(tensor.name) for tensor in source.inputs],
                output_names=[word(tensor.name) for tensor in source.outputs],
            )
        except Exception as error:  # jax2onnx raises what comes
            raise failed(self.name, error) from error
        write_signature(self.name, whole, folder, batch, aliases=aliases)


# ---- internals ----


def _hush() -> None:
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _inputs(
    source: Source,
    batch: int | None,
) -> list[Any]:
    if batch is not None:
        return list(source.shapes(batch).values())
    (extent,) = jax.export.symbolic_shape(BATCH)
    return [
        jax.ShapeDtypeStruct(
            (extent, *tensor.shape[1:]),
            tensor.dtype,
        )
        for tensor in source.inputs
    ]


def _without_twins(source: Source) -> tuple[Source, dict[str, str]]:
    """Return a source without outputs that are others again, and their names.

    A value has one name in ONNX, and a model whose outputs are its predictions has two
    for it.
    """
    program = traced(source, list(source.shapes(TRACED).values()))
    first: dict[int, str] = {}
    aliases = {}
    kept = []
    pairs = zip(source.outputs, program.jaxpr.outvars, strict=True)
    for tensor, variable in pairs:
        name = first.setdefault(id(variable), word(tensor.name))
        aliases[tensor.name] = name
        if name == word(tensor.name):
            kept.append(tensor)
    return replace(source, outputs=tuple(kept)), aliases


def _unknown(source: Source) -> list[str]:
    """Return the operations that jax2onnx has no rule for, with their lines."""
    system = needs("jax2onnx.plugins.plugin_system", extra="onnx", purpose="--to onnx")
    _hush()
    system.import_all_plugins()
    program = traced(source, list(source.shapes(TRACED).values()))
    found: dict[str, str] = {}
    for eqn, callers in inlined.equations(program):
        name = eqn.primitive.name
        is_known = name in FOR_ONNX or name in system.PLUGIN_REGISTRY
        # ONNX draws other random numbers than JAX
        if not is_known or name.startswith(RANDOM):
            found.setdefault(
                name,
                inlined.place_of(eqn, callers),
            )
    return [f"{name} ({line})" for name, line in found.items()]
