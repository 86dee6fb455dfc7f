"""Where an exported model first departs from the trainer's: its layers side by side.

The model's program is run again, equation by equation, and what its products, lookups
and reductions give becomes outputs of their own:

    h = relu(x @ w1 + b1)      -> "01 dot_general mlp.py:41 (MLP.__call__)"
    y = h @ w2 + b2            -> "02 dot_general mlp.py:44 (MLP.__call__)"

This program is exported to the same target, and the first layer in which both differ
by more than rounding is where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.ship.artifact.signature import ANY, Tensor
from lepton_jax.ship.export import inlined
from lepton_jax.ship.export.target import Source

# Operations whose results are a layer's.
LAYERS = (
    "dot_general",
    "conv_general_dilated",
    "gather",
    "scan",
    "while",
    "reduce_sum",
    "reduce_max",
    "reduce_window_sum",
    "reduce_window_max",
    "cumsum",
    "sort",
    "exp",
    "log",
    "tanh",
    "logistic",
    "erf",
    "rsqrt",
)
MOST = 60  # layers that are looked at; assumption: of more, some are left out evenly


def layers_of(source: Source, batch: int) -> Source:
    """Return a source whose outputs are the layers of another one, in their order.

    Args:
      source: a live one.
      batch: rows of a batch.
    """
    assert source.is_live, "a program alone does not show its layers"
    shapes = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for path, array in source.weights.items()
    }
    inputs = source.shapes(batch)
    names = _chosen(
        _names(
            source.run,
            shapes,
            inputs,
        )
    )
    wanted = set(names)

    def run(
        weights: Mapping[str, Any],
        inputs: Mapping[str, Any],
    ) -> dict[str, Any]:
        found = _layers(source.run, weights, inputs)
        return {name: leaf for name, leaf in found.items() if name in wanted}

    kinds = jax.eval_shape(run, shapes, inputs)
    outputs = tuple(
        Tensor(
            name,
            str(leaf.dtype),
            (ANY, *leaf.shape[1:]),
        )
        for name, leaf in ((name, kinds[name]) for name in names)
    )
    return replace(
        source,
        run=run,
        outputs=outputs,
        exported=None,
    )


def first_departure(
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    tolerance: float,
) -> str | None:
    """Return the first layer that differs by more than rounding, and by how much.

    Args:
      expected: the trainer's layers, by name.
      found: the target's.
      tolerance: of a difference, relative to the layer's largest value, or to 1.
    """
    for name, leaf in expected.items():
        difference = scaled_difference(leaf, found[name])
        if difference > tolerance:
            return f"{name}: {difference:.1e}"
    return None


def scaled_difference(
    expected: np.ndarray,
    found: np.ndarray,
) -> float:
    """Return the largest difference, relative to the largest value, or to 1.

    NaN equals NaN, and infinity itself; against a number they are infinitely far.
    """
    if np.shape(expected) != np.shape(found):
        return float("inf")
    flat = (
        np.reshape(
            expected,
            (1, -1),
        ),
        np.reshape(found, (1, -1)),
    )
    return float(row_differences(*flat).max(initial=0.0))


def row_differences(
    expected: np.ndarray,
    found: np.ndarray,
) -> np.ndarray:
    """Return each row's largest difference, relative to its largest value, or to 1.

    Args:
      expected: (rows, ...).
      found: of the same shape.
    """
    left = np.asarray(
        expected,
        np.float64,
    ).reshape(
        len(expected),
        -1,
    )
    right = np.asarray(
        found,
        np.float64,
    ).reshape(
        len(found),
        -1,
    )
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):  # infinity from infinity
        gaps = np.where(
            same,
            0.0,
            np.abs(left - right),
        )
    gaps = np.where(
        np.isnan(gaps),
        np.inf,
        gaps,
    )
    finite = np.where(
        np.isfinite(left),
        np.abs(left),
        0.0,
    )
    scales = np.maximum(
        1.0,
        finite.max(axis=1, initial=0.0),
    )
    return (
        gaps.max(
            axis=1,
            initial=0.0,
        )
        / scales
    )


# ---- internals ----


def _names(
    run: Callable[..., Any],
    weights: Any,
    inputs: Any,
) -> list[str]:
    """Return the names of all layers, in their order."""
    order: list[str] = []

    def traced(
        weights: Any,
        inputs: Any,
    ) -> dict[str, Any]:
        found = _layers(run, weights, inputs)
        order.extend(found)
        return found

    jax.eval_shape(traced, weights, inputs)
    return order


def _chosen(names: Sequence[str]) -> list[str]:
    step = -(-len(names) // MOST) or 1
    return list(names[::step])


def _layers(
    run: Callable[..., Any],
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a model, and return the results of its layers by name."""
    program = jax.make_jaxpr(run)(
        dict(weights),
        dict(inputs),
    )
    found: dict[str, Any] = {}

    def look(
        eqn: Any,
        callers: tuple,
        results: list[Any],
    ) -> None:
        if eqn.primitive.name not in LAYERS:
            return
        for leaf in results:
            if (
                jnp.issubdtype(
                    leaf.dtype,
                    jnp.floating,
                )
                and leaf.ndim
            ):
                line = inlined.place_of(eqn, callers)
                found[f"{len(found) + 1:02d} {eqn.primitive.name} {line}"] = leaf

    leaves = jax.tree.leaves((dict(weights), dict(inputs)))
    inlined.run(
        program,
        [jnp.asarray(leaf) for leaf in leaves],
        look,
    )
    return found
