"""Loss and metrics as a program of their own: (outputs, targets) -> numbers.

It is part of an artifact, so that whoever has changed a model (another runtime, fewer
bits) can measure it on held-out rows without the code of the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from lepton_jax import losses
from lepton_jax.compat import without_paths
from lepton_jax.errors import first_line
from lepton_jax.planner.program.evaluation import outputs_of
from lepton_jax.ship.artifact.signature import OUTPUTS, named
from lepton_jax.ship.artifact.tracing import BATCH, PLATFORMS, Traced

TARGETS = "targets"
LOSS = "loss"


def exported_metrics(
    trainer: Any,
    model: Traced,
    rows: int,
) -> tuple[export.Exported | None, str | None]:
    """Return the program of a recipe's loss and metrics.

    It is for any number of rows, or, where a metric allows no other, for as many as
    are stored.

    Args:
      trainer: one that has a model.
      model: what `traced` returned.
      rows: with their targets that are stored.

    Returns:
      The program, or None and the reason why there is none.
    """
    trace = trainer.program.trace
    lost = [
        name
        for name in named(
            outputs_of(trace, trace.inputs),
            OUTPUTS,
        )
        if name not in model.dims
    ]
    if lost:
        return None, f"no metrics are measured: they need {', '.join(lost)}"
    measure = _Measure(trainer, model)
    (any_size,) = export.symbolic_shape(BATCH)
    reason = "there are no targets"
    for extent in (any_size, rows):
        if not rows:
            continue
        shapes = measure.shapes(extent)
        try:
            with without_paths():
                made = export.export(
                    jax.jit(measure),
                    platforms=PLATFORMS,
                )
                return made(*shapes), None
        except Exception as error:  # a metric of the user's, with a symbolic extent
            reason = first_line(error)
    return None, f"no metrics are measured: {reason}"


def measured(
    program: export.Exported,
    outputs: Mapping[str, Any],
    targets: Mapping[str, Any],
) -> dict[str, float]:
    """Return loss and metrics.

    Args:
      program: of the metrics.
      outputs: of a model, by the names of its signature.
      targets: of the same rows, by name.
    """
    given = {
        name: jnp.asarray(leaf)
        for name, leaf in outputs.items()
        if name.partition(".")[0] == OUTPUTS
    }
    expected = {name: jnp.asarray(leaf) for name, leaf in targets.items()}
    values = jax.jit(program.call)(
        given,
        expected,
    )
    return {name: float(np.asarray(value)) for name, value in values.items()}


# ---- internals ----


class _Measure:
    """The function that is exported."""

    def __init__(self, trainer: Any, model: Traced):
        program = trainer.program
        self._recipe = trainer.recipe
        self._whole = tuple(program.evaluation.whole)
        self._dims = model.dims
        self._outputs = outputs_of(
            program.trace,
            program.trace.inputs,
        )
        self._targets = program.trace.targets

    def shapes(
        self,
        extent: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the shapes of outputs and targets of a number of rows."""
        outputs = {
            name: _rows(
                leaf,
                self._dims[name],
                extent,
            )
            for name, leaf in named(
                self._outputs,
                OUTPUTS,
            ).items()
        }
        targets = {
            name: _rows(leaf, 0, extent)
            for name, leaf in named(
                self._targets,
                TARGETS,
            ).items()
        }
        return outputs, targets

    def __call__(
        self,
        outputs: Mapping[str, Any],
        targets: Mapping[str, Any],
    ) -> dict[str, Any]:
        recipe = self._recipe
        moved = [
            jnp.moveaxis(
                outputs[name],
                0,
                self._dims[name],
            )
            for name in named(self._outputs, OUTPUTS)
        ]
        given = jax.tree.unflatten(
            jax.tree.structure(self._outputs),
            moved,
        )
        wanted = [
            targets[name]
            for name in named(
                self._targets,
                TARGETS,
            )
        ]
        expected = jax.tree.unflatten(
            jax.tree.structure(self._targets),
            wanted,
        )
        sums = losses.measure(
            recipe,
            given,
            expected,
            without=self._whole,
        )
        values = {
            name: losses.finish(
                recipe,
                name,
                losses.mean(*pair),
            )
            for name, pair in sums.items()
        }
        for name in self._whole:
            function, _ = losses.sums_of(recipe.metrics[name])
            values[name] = losses.finish(
                recipe,
                name,
                function(given, expected),
            )
        return values


def _rows(
    leaf: Any,
    dim: int,
    extent: Any,
) -> jax.ShapeDtypeStruct:
    """Return the shape of a leaf with its rows first."""
    others = [size for place, size in enumerate(leaf.shape) if place != dim]
    return jax.ShapeDtypeStruct(
        (extent, *others),
        leaf.dtype,
    )
