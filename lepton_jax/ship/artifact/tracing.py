"""A trained model as one StableHLO program: (weights, inputs) -> outputs.

    weights {"params/out/kernel": f32[64, 10], ...}     by path, those that are used
    inputs  {"inputs": f32[batch, 64]}                  by the model's arguments
      -> {"outputs": f32[batch, 10], "prediction": i32[batch]}

The batch is symbolic: one program serves all sizes, and is specialized for each when
it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.interpreters import partial_eval

from lepton_jax import losses
from lepton_jax.compat import whole_axes, without_paths
from lepton_jax.controller import select_weights
from lepton_jax.errors import ModelError, first_line
from lepton_jax.planner import evaluated
from lepton_jax.planner.program.evaluation import outputs_of
from lepton_jax.ship.artifact.signature import (
    ANY,
    OUTPUTS,
    PREDICTION,
    Tensor,
    named,
    named_inputs,
)
from lepton_jax.step.arguments import draws
from lepton_jax.trees import by_path

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "batch"  # name of the symbolic extent
DRAWS = "the model draws random numbers for each place in a batch"
# Batch sizes of a model that can't be lowered for any; assumption: a request alone, a
# few at once, many.
FIXED = (1, 8, 64)

Arrays = Mapping[str, Any]


class Traced(NamedTuple):
    """A model as a function of named arrays, before it is exported.

    Attributes:
      run: (weights, inputs) to outputs, all by name.
      weights: that `run` takes, as NumPy arrays.
      inputs: shapes of a batch, by name.
      outputs: signature of what `run` returns.
      dims: of each of these the place of its rows in what the model itself returns.
      left_out: reasons why leaves of the outputs are not returned.
      meeting: the reason why a row's outputs depend on its batch; None: they do not.
      draws: whether it draws random numbers for each place in a batch.
    """

    run: Callable[[Arrays, Arrays], dict[str, Any]]
    weights: dict[str, np.ndarray]
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: tuple[Tensor, ...]
    dims: dict[str, int]
    left_out: tuple[str, ...]
    meeting: str | None
    draws: bool


class Programs(NamedTuple):
    """A model's programs.

    Attributes:
      by_size: by the rows of a batch; -1: any.
      platforms: that they are for.
      notes: what could not be had, and why.
    """

    by_size: dict[int, export.Exported]
    platforms: tuple[str, ...]
    notes: tuple[str, ...]


def traced(trainer: Any) -> Traced:
    """Return a trainer's model as a function of named arrays.

    Args:
      trainer: one that has trained, loaded or opened a model.

    Raises:
      ModelError: no output has a dim for the samples.
    """
    model = _Model(trainer)
    shapes = _shapes(model.weights)
    used = _used(model, shapes)
    weights = {path: _on_host(model.weights[path]) for path in used}
    kept, left_out = _with_rows(trainer)
    if not kept:
        raise ModelError(
            f"the model has no output with a dim for its samples: {left_out[0]}",
            where="Recipe.model",
            remedy="return outputs whose first dim is the batch",
        )

    def run(
        weights: Arrays,
        inputs: Arrays,
    ) -> dict[str, Any]:
        outputs = model(weights, inputs)
        return {
            name: jnp.moveaxis(
                outputs[name],
                dim,
                0,
            )
            for name, dim in kept.items()
        }

    batch = jax.eval_shape(
        run,
        {path: shapes[path] for path in used},
        model.inputs,
    )
    outputs = tuple(
        Tensor(
            name,
            str(leaf.dtype),
            (ANY, *leaf.shape[1:]),
        )
        for name, leaf in batch.items()
    )
    program = jax.make_jaxpr(run)(weights, model.inputs)
    is_random = draws(program.jaxpr) > 0
    meeting = trainer.program.prediction().meeting
    return Traced(
        run,
        weights,
        model.inputs,
        outputs,
        kept,
        tuple(left_out),
        meeting or (DRAWS if is_random else None),
        is_random,
    )


def exported(
    model: Traced,
    size: int | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> export.Exported:
    """Return a model's program.

    Args:
      model: what `traced` returned.
      size: of a batch; None: any.
      platforms: that it is to run on.
    """
    extent: Any = size
    if size is None:
        (extent,) = export.symbolic_shape(BATCH)
    inputs = {
        name: jax.ShapeDtypeStruct(
            (extent, *shape.shape[1:]),
            shape.dtype,
        )
        for name, shape in model.inputs.items()
    }
    weights = _shapes(model.weights)
    with without_paths():
        return export.export(
            jax.jit(model.run),
            platforms=platforms,
        )(
            weights,
            inputs,
        )


def programs_of(model: Traced, batch_size: int) -> Programs:
    """Return a model's program for any batch size, or else for some of them.

    Likewise it is for all platforms, or else for those that it can be lowered for.

    Args:
      model: what `traced` returned.
      batch_size: of the recipe.

    Raises:
      ModelError: it can't be lowered for the recipe's own batch size.
    """
    try:
        return Programs(
            {ANY: exported(model)},
            PLATFORMS,
            (),
        )
    except Exception as error:  # the model's code, with a symbolic extent
        reason = _first_line(error)
    platforms, notes = _platforms(model, batch_size)
    if platforms != PLATFORMS:
        try:
            program = exported(model, None, platforms)
        except Exception as error:  # the same
            reason = _first_line(error)
        else:
            return Programs(
                {ANY: program},
                platforms,
                tuple(notes),
            )
    sizes = sorted({*FIXED, batch_size})
    notes.append(f"it has programs of the batch sizes {sizes} alone: {reason}")
    programs = {
        size: exported(
            model,
            size,
            platforms,
        )
        for size in sizes
    }
    return Programs(programs, platforms, tuple(notes))


def signature_of(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the signature of a program's inputs.

    Args:
      inputs: shapes of a batch, by name.
    """
    return tuple(
        Tensor(
            name,
            str(leaf.dtype),
            (ANY, *leaf.shape[1:]),
        )
        for name, leaf in inputs.items()
    )


def decoder_of(recipe: Any) -> Callable[[Any], Any]:
    """Return what makes predictions of a recipe's outputs."""
    return recipe.decode or losses.decoder(recipe.loss)


# ---- internals ----


def _platforms(
    model: Traced,
    size: int,
) -> tuple[tuple[str, ...], list[str]]:
    """Return the platforms that a model can be lowered for, and why not for others.

    Raises:
      ModelError: it can be lowered for none.
    """
    known = []
    notes = []
    for platform in PLATFORMS:
        try:
            exported(model, size, (platform,))
        except Exception as error:  # an operation that this platform lacks
            notes.append(f"it has no program for {platform}: {_first_line(error)}")
        else:
            known.append(platform)
    if not known:
        raise ModelError(
            f"the model can't be exported: {'; '.join(notes)}",
            where="Recipe.model",
            remedy="leave out what the message names outside of training",
        )
    return tuple(known), notes


def _first_line(error: BaseException) -> str:
    message = first_line(error)
    return f"{type(error).__name__}: {message}"


class _Model:
    """A trainer's model as a function of weights by path and inputs by name."""

    def __init__(self, trainer: Any):
        program = trainer.program
        self._traced = program.trace
        self.decode = decoder_of(trainer.recipe)
        params, variables = select_weights(trainer.state, trainer.recipe)
        tree = {"params": params, "variables": variables}
        self.weights = by_path(tree)
        self.structure = jax.tree.structure(tree)
        self.input_structure = jax.tree.structure(self._traced.inputs)
        self.inputs = named_inputs(self._traced.inputs)

    def __call__(
        self,
        weights: Arrays,
        inputs: Arrays,
    ) -> dict[str, Any]:
        leaves = [
            _as_weight(
                weights.get(path),
                like,
            )
            for path, like in self.weights.items()
        ]
        tree = jax.tree.unflatten(self.structure, leaves)
        given = jax.tree.unflatten(
            self.input_structure,
            [inputs[name] for name in self.inputs],
        )
        outputs = evaluated(
            self._traced,
            tree["params"],
            tree["variables"],
            given,
        )
        decoded = whole_axes(self.decode)(outputs)
        return named(outputs, OUTPUTS) | named(decoded, PREDICTION)


def _used(
    model: _Model,
    shapes: Arrays,
) -> list[str]:
    """Return the paths of the weights that the outputs depend on.

    Keys and counts of dropout are among those that they do not.
    """
    program = jax.make_jaxpr(model)(
        shapes,
        model.inputs,
    ).jaxpr
    wanted = [True] * len(program.outvars)
    _, is_used = partial_eval.dce_jaxpr(program, wanted)
    paths = sorted(shapes)  # the order in which JAX flattens a dict
    pairs = zip(paths, is_used, strict=False)  # the inputs come after them
    used = {path for path, is_read in pairs if is_read}
    return [path for path in shapes if path in used]


def _with_rows(trainer: Any) -> tuple[dict[str, int], list[str]]:
    """Return the outputs that have one dim for samples, with it, and why others not."""
    program = trainer.program
    prediction = program.prediction()
    batch = outputs_of(program.trace, program.trace.inputs)
    decoded = jax.eval_shape(
        decoder_of(trainer.recipe),
        batch,
    )
    parts = (
        (named(batch, OUTPUTS), prediction.outputs),
        (named(decoded, PREDICTION), prediction.dims),
    )
    size = program.recipe.batch_size
    kept: dict[str, int] = {}
    left_out: list[str] = []
    for leaves, all_dims in parts:
        for (name, leaf), dims in zip(
            leaves.items(),
            all_dims,
            strict=True,
        ):
            if len(dims) == 1 and leaf.shape[dims[0]] == size:
                kept[name] = dims[0]
            else:
                left_out.append(
                    f"{name} {leaf.dtype}{list(leaf.shape)} is left out: it has not"
                    f" one row for each of {size} samples"
                )
    return kept, left_out


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(
        leaf.dtype,
        jax.dtypes.prng_key,
    )


def _as_weight(given: Any, like: Any) -> Any:
    """Return a weight as the model has it; None is one that it does not use."""
    if not _is_key(like):
        return (
            jnp.zeros(
                like.shape,
                like.dtype,
            )
            if given is None
            else given
        )
    if given is None:
        data = jax.eval_shape(jax.random.key_data, like)
        given = jnp.zeros(data.shape, data.dtype)
    return jax.random.wrap_key_data(
        given,
        impl=jax.random.key_impl(like),
    )


def _on_host(leaf: Any) -> np.ndarray:
    """Return a weight as a NumPy array; of a random key it is the key's data."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _shapes(weights: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of weights, those of keys as data."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return {path: shape(leaf) for path, leaf in weights.items()}
