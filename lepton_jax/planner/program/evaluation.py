"""The passage of a data set through evaluation and prediction, found before it runs.

Both take batches of one size, and the last one is seldom full. It is filled up with
rows that are masked afterwards, so that one compiled program fits all batches, where no
sample can tell what else is in its batch. Where samples meet (`interaction`), it runs
at its own size, which costs one more compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax import losses
from lepton_jax.errors import DataError, ModelError, pointing_at_user
from lepton_jax.planner.program.interaction import (
    is_mean_of_samples,
    where_samples_meet,
    where_they_meet,
)
from lepton_jax.planner.program.trace import Trace
from lepton_jax.step.module import forward
from lepton_jax.trees import by_path, nbytes

# Bytes of outputs and targets that a metric of the whole test set may gather on a host.
# Assumption: a host has 16 GiB, and joining the batches holds them twice.
MOST_GATHERED = 4 * 2**30

Dims = list[tuple[int, ...]]  # of each leaf: the dims whose extent follows the batch's


class Evaluation:
    """The loss and the metrics of a test set, put together from its batches.

    A loss or metric with one value per sample is averaged over the samples. A scalar
    loss is averaged over batches, by their rows. A scalar metric that is a mean of
    samples is too; another one, such as an area under a curve, is applied once to the
    outputs and targets of the whole test set.

    Attributes:
      whole: names of the metrics that are applied to the whole test set.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self.recipe = trace.recipe
        scalars = [name for name in self.recipe.metrics if self._is_scalar(name)]
        self.whole = tuple(name for name in scalars if not self._is_mean(name))
        self._scalars = [name for name in scalars if name not in self.whole]
        if self._is_scalar("loss"):
            self._scalars.append("loss")
        metrics = {
            name: losses.sums_of(self.recipe.metrics[name]) for name in self.whole
        }
        self._jitted = {
            name: jax.jit(function) for name, (function, _) in metrics.items()
        }

    @cached_property
    def meeting(self) -> str | None:
        """Why the last batch runs at its own size; None: it is filled up."""
        if self._scalars:
            return f"{self._scalars[0]} is one number of a batch"

        def measured(
            params: Any,
            variables: Any,
            inputs: Any,
            targets: Any,
        ) -> Any:
            outputs = evaluated(self.trace, params, variables, inputs)
            names = ["loss", *self.recipe.metrics]
            each = [n for n in names if n not in self.whole]
            return outputs, [self._values(name, outputs, targets) for name in each]

        state = self.trace.state
        batch = (self.trace.inputs, self.trace.targets)
        with pointing_at_user("evaluating"):
            return where_they_meet(
                measured,
                (state.params, state.variables),
                batch,
            )

    @cached_property
    def dims(self) -> Dims:
        """The dims of each leaf of the outputs that hold the batch."""
        few, many = _outputs_of_two_sizes(self.trace)
        return batch_dims(few, many, self.recipe.batch_size)

    @cached_property
    def sums(self) -> Any:
        """Zeros of the sums over a batch, float32: {name: (sum, weight)}."""
        valid = jax.ShapeDtypeStruct((self.recipe.batch_size,), jnp.bool_)

        def measure(
            outputs: Any,
            targets: Any,
            valid: Any,
        ) -> Any:
            return losses.measure(
                self.recipe,
                outputs,
                targets,
                valid,
                self.whole,
            )

        shapes = jax.eval_shape(
            measure,
            self.trace.outputs,
            self.trace.targets,
            valid,
        )
        return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)

    def check(self, samples: int) -> None:
        """Check that what metrics of the whole test set gather fits into memory.

        Raises:
          DataError: it does not.
          ModelError: an output that such a metric uses has no dim for the samples.
        """
        if not self.whole:
            return
        name = self.whole[0]
        rows = -(-samples // self.recipe.batch_size)
        arrays = jax.tree.leaves((self.trace.outputs, self.trace.targets))
        size = rows * sum(nbytes(x) for x in arrays)
        if size > MOST_GATHERED:
            raise DataError(
                f"the metric {name!r} is no mean over samples, so it takes the outputs"
                f" and targets of all {samples} samples at once: {size / 2**30:.1f}"
                f" GiB; at most {MOST_GATHERED / 2**30:.0f} GiB are gathered",
                where="test data",
                remedy=(
                    "evaluate on fewer samples, or make the metric one of sums over "
                    "samples: lepton_jax.metrics.Metric(values, finish)"
                ),
            )
        if samples > self.recipe.batch_size:
            paths = by_path(self.trace.outputs)
            for path, dims in zip(paths, self.dims, strict=True):
                if len(dims) != 1:
                    raise ModelError(
                        f"the metric {name!r} is no mean over samples, and the output"
                        f" {path or 'of the model'} {_shape(paths[path])} can't be"
                        f" joined from several batches: {_counted(dims)}",
                        where=f"Recipe.metrics[{name!r}]",
                        remedy=(
                            "return one value per sample from the metric, or leave "
                            "that output out of the model's"
                        ),
                    )

    def real(
        self,
        part: tuple[Any, Any],
        rows: int,
    ) -> tuple[Any, Any]:
        """Outputs and targets of a batch on the host, without its filling."""
        outputs, targets = jax.tree.map(np.asarray, part)
        size = len(jax.tree.leaves(targets)[0])
        if rows == size:
            return outputs, targets
        leaves = jax.tree.leaves(outputs)
        cut = [
            _first(x, dims[0], x.shape[dims[0]] // size * rows) if dims else x
            for x, dims in zip(leaves, self.dims, strict=True)
        ]
        outputs = jax.tree.unflatten(jax.tree.structure(outputs), cut)
        return outputs, jax.tree.map(lambda x: x[:rows], targets)

    def of_whole(self, parts: Sequence[tuple[Any, Any]]) -> dict[str, float]:
        """Apply the metrics of the whole test set to (outputs, targets) of its
        batches.
        """
        tree = jax.tree.structure(self.trace.outputs)
        pieces = [jax.tree.leaves(outputs) for outputs, _ in parts]
        leaves = [
            piece[0] if len(piece) == 1 else np.concatenate(piece, axis=dims[0])
            for *piece, dims in zip(*pieces, self.dims, strict=True)
        ]
        outputs = jax.tree.unflatten(tree, leaves)
        joined = [targets for _, targets in parts]
        targets = jax.tree.map(lambda *leaves: np.concatenate(leaves), *joined)

        found = {}
        for name in self.whole:
            with pointing_at_user(f"the metric {name!r} of the whole test set"):
                value = self._jitted[name](outputs, targets)
                found[name] = float(
                    losses.finish(
                        self.recipe,
                        name,
                        value,
                    )
                )
        return found

    def _values(
        self,
        name: str,
        outputs: Any,
        targets: Any,
    ) -> Any:
        function = self.recipe.loss
        several = False
        if name != "loss":
            function, several = losses.sums_of(self.recipe.metrics[name])
        return losses.values(function, outputs, targets, several)

    def _is_scalar(self, name: str) -> bool:
        shapes = jax.eval_shape(
            lambda *batch: self._values(name, *batch),
            self.trace.outputs,
            self.trace.targets,
        )
        leaves = jax.tree.leaves(shapes)
        return len(leaves) == 1 and leaves[0].shape == ()

    def _is_mean(self, name: str) -> bool:
        """Whether a scalar metric is the mean of one value for each sample."""
        few, many = _outputs_of_two_sizes(self.trace)
        more = _of_rows(self.trace.targets, 2 * self.recipe.batch_size)
        if many is None:
            return False

        def value(outputs: Any, targets: Any) -> Any:
            return self._values(name, outputs, targets)

        try:
            return is_mean_of_samples(value, [(few, self.trace.targets), (many, more)])
        except ModelError:  # a metric of batches of one size: nothing is claimed
            return False


class Prediction:
    """Predictions of many inputs, put together from batches.

    Args:
      trace: of the recipe.
      decode: the model's outputs to predictions.

    Attributes:
      used: which leaves of the outputs the predictions depend on.
      outputs: the dims of each leaf of the outputs that hold the batch.
      hides: whether a prediction is not floating-point, so that it can't show a NaN.
    """

    def __init__(
        self,
        trace: Trace,
        decode: Callable[[Any], Any],
    ):
        self.trace = trace
        self._decode = decode
        size = trace.recipe.batch_size
        few, many = _outputs_of_two_sizes(trace)
        self.outputs = batch_dims(few, many, size)

        with pointing_at_user("predicting"):
            shapes = jax.eval_shape(decode, few)
        try:
            more = None if many is None else jax.eval_shape(decode, many)
        except Exception:  # it decodes batches of one size
            more = None
        self.dims = batch_dims(shapes, more, size)
        self._paths = by_path(shapes)

        leaves = jax.tree.leaves(shapes)
        self.hides = not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)
        self.used = _used(decode, few) if self.hides else []

    @cached_property
    def meeting(self) -> str | None:
        """Where samples of a batch meet; None: the last batch is filled up."""

        def predict(
            params: Any,
            variables: Any,
            inputs: Any,
        ) -> Any:
            return self._decode(
                evaluated(
                    self.trace,
                    params,
                    variables,
                    inputs,
                )
            )

        state = self.trace.state
        fixed = (state.params, state.variables)
        with pointing_at_user("predicting"):
            program = jax.make_jaxpr(predict)(*fixed, self.trace.inputs)
        first = len(jax.tree.leaves(fixed))
        count = len(jax.tree.leaves(self.trace.inputs))
        return where_samples_meet(program, range(first, first + count))

    def check(self, samples: int) -> None:
        """Check that predictions of so many inputs can be joined from batches.

        Raises:
          ModelError: they take several, and a leaf has not exactly one dim for them.
        """
        size = self.trace.recipe.batch_size
        if samples <= size:
            return
        for (path, leaf), dims in zip(self._paths.items(), self.dims, strict=True):
            # where samples meet, nobody knows in which order 2 * 16 rows stand
            mixed = len(dims) == 1 and leaf.shape[dims[0]] != size
            if len(dims) == 1 and not (mixed and self.meeting is not None):
                continue
            raise ModelError(
                f"the prediction {path or 'of the model'} {_shape(leaf)} can't be"
                f" joined from the batches of {size} that {samples} inputs make:"
                f" {_counted(dims)}",
                where="Trainer.predict",
                remedy=(
                    "choose what has one dim for the samples: predict(inputs, "
                    "decode=lambda outputs: outputs[...]); or give at most "
                    f"{size} inputs at once"
                ),
            )

    def joined(
        self,
        parts: Sequence[Any],
        rows: Sequence[int],
    ) -> Any:
        """Predictions of all batches, of which the first `rows` samples are real."""
        size = self.trace.recipe.batch_size
        tree = jax.tree.structure(parts[0])
        pieces = [jax.tree.leaves(part) for part in parts]
        shapes = self._paths.values()
        found = []
        for number, (shape, dims) in enumerate(zip(shapes, self.dims, strict=True)):
            leaves = [np.asarray(piece[number]) for piece in pieces]
            if len(dims) == 1:
                dim = dims[0]
                each = shape.shape[dim] // size  # rows of a sample
                cut = [
                    _first(x, dim, n * each) for x, n in zip(leaves, rows, strict=True)
                ]
                found.append(np.concatenate(cut, axis=dim))
            else:
                found.append(leaves[0])
        return jax.tree.unflatten(tree, found)


def evaluated(
    trace: Trace,
    params: Any,
    variables: Any,
    inputs: Any,
) -> Any:
    """The model's outputs outside of training."""
    run = (
        trace.recipe,
        trace.functional,
        params,
        variables,
        inputs,
        None,
        False,
    )
    return forward(*run)[0]


def outputs_of(trace: Trace, inputs: Any) -> Any:
    """Shapes of the outputs outside of training."""
    state = trace.state

    def run(
        params: Any,
        variables: Any,
        inputs: Any,
    ) -> Any:
        return evaluated(trace, params, variables, inputs)

    return jax.eval_shape(
        run,
        state.params,
        state.variables,
        inputs,
    )


def batch_dims(
    few: Any,
    many: Any,
    size: int,
) -> Dims:
    """Find the dims of each leaf whose extent follows the batch size.

    Args:
      few: shapes for a batch of `size`.
      many: the same for a batch of another size. None: it is not known, and the first
        dim of the extent `size` is taken.
    """
    if many is None:
        leaves = jax.tree.leaves(few)
        alike = [[d for d, n in enumerate(x.shape) if n == size] for x in leaves]
        return [tuple(dims[:1]) for dims in alike]

    found = []
    for small, large in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        extents = enumerate(
            zip(
                small.shape,
                large.shape,
                strict=True,
            )
        )
        found.append(tuple(d for d, (a, b) in extents if a != b))
    return found


def nan_rows(
    leaves: Sequence[Any],
    dims: Dims,
    rows: int,
) -> Any:
    """Which samples hold a NaN in any of some leaves: bool (rows,)."""
    found = jnp.zeros(rows, jnp.bool_)
    for leaf, own in zip(leaves, dims, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        if not own:  # it belongs to all
            found |= jnp.isnan(leaf).any()
            continue
        by_sample = jnp.moveaxis(jnp.isnan(leaf), own[0], 0).reshape(rows, -1)
        found |= by_sample.any(axis=1)
    return found


# ---- internals ----


def _of_rows(batch: Any, rows: int) -> Any:
    def resized(x: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)

    return jax.tree.map(resized, batch)


def _outputs_of_two_sizes(trace: Trace) -> tuple[Any, Any]:
    """Shapes of the outputs for a batch and for one of twice its size, if it has
    any.
    """
    size = trace.recipe.batch_size
    with pointing_at_user("evaluating"):
        few = outputs_of(trace, trace.inputs)
    try:
        return few, outputs_of(trace, _of_rows(trace.inputs, 2 * size))
    except Exception:  # a model of one batch size
        return few, None


def _used(decode: Callable[[Any], Any], outputs: Any) -> list[bool]:
    """Which leaves of the outputs a function of them depends on."""
    program = jax.make_jaxpr(decode)(outputs).jaxpr
    needed = {id(v) for v in program.outvars}
    for eqn in reversed(program.eqns):
        if any(id(v) in needed for v in eqn.outvars):
            needed.update(id(v) for v in eqn.invars)
    return [id(v) in needed for v in program.invars]


def _first(
    x: np.ndarray,
    dim: int,
    count: int,
) -> np.ndarray:
    return x[(slice(None),) * dim + (slice(count),)]


def _shape(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _counted(dims: tuple[int, ...]) -> str:
    if not dims:
        return "it has no dim for the samples"
    if len(dims) > 1:
        return f"dims {' and '.join(map(str, dims))} both follow the number of samples"
    return "the rows of a sample may not lie together"
