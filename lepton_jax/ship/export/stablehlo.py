"""StableHLO: a program of `jax.export`, with its weights next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax import export

from lepton_jax.compat import without_paths
from lepton_jax.ship.artifact.tensors import write_tensors
from lepton_jax.ship.artifact.tracing import PLATFORMS
from lepton_jax.ship.export.target import (
    Options,
    Source,
    Target,
    write_signature,
)

STORED_AS_THEY_ARE = "fiub"  # NumPy's kinds that other readers of safetensors know


class StableHLO(Target):
    """One file for CPU, CUDA and TPU, and for every batch size."""

    name = "stablehlo"
    runtime = "JAX"
    extra = "ship"
    modules = ("safetensors", "flatbuffers")

    def refusals(
        self,
        source: Source,
        options: Options,
    ) -> list[str]:
        """See `Target.refusals`."""
        reasons = super().refusals(source, options)
        packed = odd_weights(source)
        if packed:
            reasons.append(
                f"{packed[0]} is {source.weights[packed[0]].dtype}, which safetensors"
                " can't hold for other readers; --to lepton can"
            )
        return reasons

    def write(
        self,
        source: Source,
        folder: Path,
        options: Options,
    ) -> None:
        """See `Target.write`."""
        program = source.exported
        if program is None or options.batch is not None:
            program = _exported(source, options.batch)
        (folder / "program.stablehlo").write_bytes(bytes(program.serialize()))
        write_tensors(folder / "weights.safetensors", source.weights)
        write_signature(
            self.name,
            source,
            folder,
            options.batch,
            words=False,
        )


class Safetensors(Target):
    """The weights alone."""

    name = "safetensors"
    runtime = "any reader of safetensors"
    extra = "ship"
    modules = ("safetensors",)
    is_program = False

    def refusals(
        self,
        source: Source,
        options: Options,
    ) -> list[str]:
        """See `Target.refusals`."""
        packed = odd_weights(source)
        if not packed:
            return []
        kind = source.weights[packed[0]].dtype
        return [f"{packed[0]} is {kind}, which safetensors can't hold"]

    def write(
        self,
        source: Source,
        folder: Path,
        options: Options,
    ) -> None:
        """See `Target.write`."""
        write_tensors(folder / "weights.safetensors", source.weights)
        write_signature(self.name, source, folder, None)


def odd_weights(source: Source) -> list[str]:
    """Return the weights of types that safetensors stores as bytes alone."""
    return [
        path
        for path, array in source.weights.items()
        if array.dtype.kind not in STORED_AS_THEY_ARE
    ]


def _exported(
    source: Source,
    batch: int | None,
) -> export.Exported:
    extent: Any = batch
    if batch is None:
        (extent,) = export.symbolic_shape("batch")
    inputs = {
        tensor.name: jax.ShapeDtypeStruct(
            (extent, *tensor.shape[1:]),
            tensor.dtype,
        )
        for tensor in source.inputs
    }
    weights = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for path, array in source.weights.items()
    }
    with without_paths():
        return export.export(
            jax.jit(source.run),
            platforms=PLATFORMS,
        )(
            weights,
            inputs,
        )
