"""SavedModel and LiteRT, both by way of jax2tf."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lepton_jax.ship.export.lowering import operations
from lepton_jax.ship.export.rules import FOR_LITERT
from lepton_jax.ship.export.target import (
    Options,
    Source,
    Target,
    failed,
    word,
    write_signature,
)
from lepton_jax.ship.extras import needs

EXTRA = "tflite"
SAVED = "model"  # folder of a SavedModel
# TensorFlow 2.21 reads StableHLO up to 1.13.7, and JAX 0.11 and later write newer
# dynamic shapes, which it refuses (seen with jax 0.12.0).
FIRST_WITHOUT_DYNAMIC = (0, 11)


class SavedModel(Target):
    """A SavedModel of TensorFlow, for servers and for its own converters."""

    name = "savedmodel"
    runtime = "TensorFlow"
    extra = EXTRA
    modules = ("tensorflow", "jax.experimental.jax2tf")

    @property
    def has_any_batch(self) -> bool:  # type: ignore[override]
        """Whether TensorFlow reads the dynamic shapes that this JAX writes."""
        return _jax_version() < FIRST_WITHOUT_DYNAMIC

    def write(
        self,
        source: Source,
        folder: Path,
        options: Options,
    ) -> None:
        """See `Target.write`."""
        batch = self.batch_of(source, options)
        with _one_error(self.name):
            _save(
                source,
                folder / SAVED,
                batch,
                source.closed(),
            )
        write_signature(self.name, source, folder, batch)


class LiteRT(Target):
    """A LiteRT (TensorFlow Lite) file of one batch size, for phones and boards."""

    name = "litert"
    runtime = "LiteRT"
    extra = EXTRA
    modules = ("tensorflow", "jax.experimental.jax2tf", "ai_edge_litert.interpreter")
    has_any_batch = False

    def refusals(
        self,
        source: Source,
        options: Options,
    ) -> list[str]:
        """See `Target.refusals`."""
        reasons = super().refusals(source, options)
        if source.draws:
            reasons.append(
                "it draws random numbers, which JAX makes of unsigned integers, and"
                " TensorFlow Lite multiplies none"
            )
        if not source.is_live:
            reasons.append(
                "some operations have to be replaced for LiteRT in the model's own"
                " code, and an artifact holds none: export the run"
            )
        return reasons

    def write(
        self,
        source: Source,
        folder: Path,
        options: Options,
    ) -> None:
        """See `Target.write`."""
        tf = _tensorflow("--to litert")
        batch = self.batch_of(source, options)
        assert batch is not None
        shapes = list(source.shapes(batch).values())
        with tempfile.TemporaryDirectory() as place, _one_error(self.name):
            _save(
                source,
                Path(place),
                batch,
                operations(source, shapes, FOR_LITERT),
            )
            converter = tf.lite.TFLiteConverter.from_saved_model(place)
            content = converter.convert()
        (folder / "model.tflite").write_bytes(content)
        write_signature(self.name, source, folder, batch)


# ---- internals ----


class _one_error:
    """Context in which TensorFlow's errors become one of Lepton's."""

    def __init__(self, target: str):
        self.target = target

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: Any,
        error: BaseException | None,
        trace: Any,
    ) -> None:
        if isinstance(error, Exception):
            raise failed(self.target, error) from error


def _tensorflow(purpose: str) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return needs("tensorflow", extra=EXTRA, purpose=purpose)


def _save(
    source: Source,
    place: Path,
    batch: int | None,
    function: Callable[..., Any],
) -> None:
    """Write a model as a SavedModel with a signature `serving_default`."""
    tf = _tensorflow("a SavedModel")
    jax2tf = needs("jax.experimental.jax2tf", extra=EXTRA, purpose="a SavedModel")
    shapes = None
    if batch is None:
        shapes = [
            f"(batch, {', '.join('_' * (len(t.shape) - 1))})" for t in source.inputs
        ]
    convert = jax2tf.convert(
        function,
        polymorphic_shapes=shapes,
        with_gradient=False,
        native_serialization_platforms=["cpu"],
    )
    module = tf.Module()
    module.run = tf.function(
        _by_name(source, convert),
        autograph=False,
        input_signature=_specs(tf, source, batch),
    )
    concrete = module.run.get_concrete_function()
    tf.saved_model.save(
        module,
        str(place),
        signatures={"serving_default": concrete},
    )


def _by_name(
    source: Source,
    convert: Callable[..., Any],
) -> Callable[..., Any]:
    names = [word(tensor.name) for tensor in source.outputs]

    def run(*inputs: Any) -> dict[str, Any]:
        return dict(
            zip(
                names,
                convert(*inputs),
                strict=True,
            )
        )

    return run


def _specs(
    tf: Any,
    source: Source,
    batch: int | None,
) -> list[Any]:
    return [
        tf.TensorSpec(
            (batch, *tensor.shape[1:]),
            tf.dtypes.as_dtype(tensor.dtype),
            name=word(tensor.name),
        )
        for tensor in source.inputs
    ]


def _jax_version() -> tuple[int, int]:
    major, minor, *_ = jax.__version_info__
    return int(major), int(minor)
