"""A model to explain: a trainer's, or an artifact, as a function of named arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.errors import DataError, ModelError
from lepton_jax.ship.artifact.signature import INPUTS, OUTPUTS
from lepton_jax.ship.artifact.tracing import traced
from lepton_jax.train.raw_inputs import are_raw, prepared_inputs

# Rows whose mean is the baseline of a table; assumption: more do not move it.
ROWS = 1000
PICTURE_DIMS = 3  # of an input with rows of pictures, at least

Named = Mapping[str, Any]


class Subject(NamedTuple):
    """A model to explain.

    Attributes:
      run: inputs by name to the model's outputs, (rows, ...), in JAX.
      ask: the same of NumPy arrays, compiled.
      shapes: dtype and shape of each input, by name; the first dim is the batch.
      known: rows of training, or stored ones, by name; {}: there are none.
      is_open: whether the program can be looked into; that of an artifact can't.
      prepare: raw rows to inputs by name; None: the model takes arrays alone.
      names: names of the columns of an input, by its name; of some.
    """

    run: Callable[[Named], jax.Array]
    ask: Callable[[Named], np.ndarray]
    shapes: dict[str, Any]
    known: dict[str, np.ndarray]
    is_open: bool
    prepare: Callable[[Any], dict[str, np.ndarray]] | None
    names: dict[str, tuple[str, ...]]

    def inputs_of(
        self,
        data: Any,
    ) -> dict[str, np.ndarray]:
        """Return rows as inputs by name.

        Args:
          data: an array, a dict of arrays by name, or raw rows.

        Raises:
          DataError: they are not the model's inputs.
        """
        names = list(self.shapes)
        if are_raw(data, names, self.prepare is not None):
            assert self.prepare is not None
            return self.prepare(data)
        if isinstance(data, Arrays):
            data = data.inputs
        given = data if isinstance(data, dict) else {INPUTS: data}
        if set(given) != set(names):
            raise DataError(
                f"the inputs are {', '.join(given)}, and the model's are"
                f" {', '.join(names)}",
                where="inputs",
                remedy="give the model's inputs by name, or its only one as an array",
            )
        rows = {name: self._checked(name, given[name]) for name in names}
        if not len(next(iter(rows.values()))):
            raise DataError(
                "there are no rows to explain",
                where="inputs",
                remedy="give at least one row",
            )
        return rows

    def _checked(
        self,
        name: str,
        given: Any,
    ) -> np.ndarray:
        array = np.asarray(given)
        wanted = self.shapes[name].shape[1:]
        if array.shape[1:] != tuple(wanted) or array.ndim == 0:
            raise DataError(
                f"{name} has shape {list(array.shape)}, and a row of it is"
                f" {list(wanted)}",
                where=name,
                remedy="give rows along the first dim, of the shape of training",
            )
        return array.astype(self.shapes[name].dtype)

    def outputs(
        self,
        inputs: Named,
    ) -> np.ndarray:
        """Return the model's outputs of rows."""
        return self.ask(inputs)

    def baseline(
        self,
        name: str,
    ) -> np.ndarray:
        """Return the row of an input that stands for nothing there.

        That is black for a picture, the mean of known rows for numbers, and 0 for whole
        numbers, which are ids: 0 is padding, or a value that was never seen.
        """
        shape = self.shapes[name]
        is_whole = not np.issubdtype(shape.dtype, np.floating)
        is_picture = len(shape.shape) >= PICTURE_DIMS
        if is_whole or is_picture or name not in self.known:
            return np.zeros(shape.shape[1:], shape.dtype)
        return self.known[name].mean(axis=0).astype(shape.dtype)


def subject_of(model: Any) -> Subject:
    """Return a trainer's model or an artifact as a subject.

    Args:
      model: a `Trainer` that has a model, or an `Artifact`.

    Raises:
      ModelError: it has no model, or several outputs.
    """
    if hasattr(model, "manifest"):
        return _of_artifact(model)
    if getattr(model, "program", None) is None:
        raise ModelError(
            "the trainer has no model yet",
            where="explain",
            remedy="call fit, load or resume first",
        )
    return _of_trainer(model)


def chosen(
    outputs: Any,
    target: Any,
) -> jax.Array:
    """Return of each row the output that is explained, (rows,).

    Args:
      outputs: (rows, ...).
      target: of each row, its number among the row's outputs.
    """
    flat = outputs.reshape(outputs.shape[0], -1)
    picked = jnp.take_along_axis(flat, jnp.asarray(target)[:, None], axis=1)
    return picked[:, 0]


def targets_of(
    outputs: np.ndarray,
    target: Any,
) -> np.ndarray:
    """Return which output of each row is explained.

    Args:
      outputs: (rows, ...).
      target: a number for all rows, one for each, or None: the largest.

    Raises:
      DataError: there is no such output.
    """
    flat = outputs.reshape(len(outputs), -1)
    if target is None:
        return flat.argmax(axis=1)
    numbers = np.broadcast_to(np.asarray(target, np.int64), (len(flat),))
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < flat.shape[1]:
        raise DataError(
            f"output {target!r} is to be explained, and a row has {flat.shape[1]}",
            where="target",
            remedy=f"give a number from 0 to {flat.shape[1] - 1}",
        )
    return numbers


# ---- internals ----


def _only(outputs: Mapping[str, Any]) -> Any:
    if OUTPUTS not in outputs:
        names = ", ".join(name for name in outputs if name.startswith(OUTPUTS))
        raise ModelError(
            f"the model has several outputs: {names}",
            where="explain",
            remedy="wrap the model in one that returns the output to explain",
        )
    return outputs[OUTPUTS]


def _of_trainer(trainer: Any) -> Subject:
    model = traced(trainer)
    weights = jax.device_put(model.weights)

    def run(inputs: Named) -> jax.Array:
        return _only(model.run(weights, inputs))

    preparation = trainer.preparation
    known: dict[str, np.ndarray] = {}
    train = trainer.recipe.train
    if isinstance(train, Arrays):
        rows, _ = train.take(np.arange(min(ROWS, len(train))))
        known = rows if isinstance(rows, dict) else {INPUTS: rows}

    def prepare(data: Any) -> dict[str, np.ndarray]:
        made = prepared_inputs(preparation, data)
        return made if isinstance(made, dict) else {INPUTS: made}

    compiled = jax.jit(run)
    return Subject(
        run,
        lambda inputs: np.asarray(compiled(dict(inputs))),
        dict(model.inputs),
        known,
        True,
        None if preparation is None else prepare,
        _names(preparation, model.inputs),
    )


def _of_artifact(artifact: Any) -> Subject:
    weights = jax.device_put(dict(artifact.weights))

    def run(inputs: Named) -> jax.Array:
        return _only(artifact.exported.call(weights, dict(inputs)))

    shapes = {
        tensor.name: jax.ShapeDtypeStruct((1, *tensor.shape[1:]), tensor.dtype)
        for tensor in artifact.inputs
    }
    stored = getattr(artifact.stored, "inputs", None) or {}
    return Subject(
        run,
        lambda inputs: _only(artifact.run(dict(inputs))),
        shapes,
        {name: np.asarray(array) for name, array in stored.items()},
        False,
        artifact.prepare if artifact.serving is not None else None,
        _names(artifact.serving, shapes),
    )


def _names(
    serving: Any,
    shapes: Mapping[str, Any],
) -> dict[str, tuple[str, ...]]:
    """Return the names of the columns that lie side by side in an input."""
    columns = getattr(serving, "inputs", None)
    if columns is None:
        return {}
    by_input = columns if isinstance(columns, Mapping) else {INPUTS: columns}
    names = {}
    for name, own in by_input.items():
        listed = (own,) if isinstance(own, str) else tuple(map(str, own))
        shape: tuple[int, ...] = getattr(shapes.get(name), "shape", ())
        if len(shape) == 2 and len(listed) == shape[1]:
            names[name] = listed
    return names
