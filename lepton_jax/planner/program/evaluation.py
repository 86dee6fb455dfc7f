"""Evaluation and prediction of a data set in batches, prepared before they run.

Both take batches of one size, and the last one is seldom full. Where no sample can tell
what else is in its batch, it is filled up with rows that are masked afterwards, so that
one compiled program fits all batches. Where samples meet (see `interaction`), it runs
at its own size, which costs one more compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax import losses
from lepton_jax.errors import DataError, ModelError, pointing_at_user
from lepton_jax.planner.program.interaction import (
    is_mean_of_samples,
    where_they_meet,
)
from lepton_jax.planner.program.trace import Trace
from lepton_jax.step.module import forward
from lepton_jax.trees import by_path, is_inexact, nbytes, with_leaves

# Bytes of outputs and targets that a metric of the whole test set may gather on a host.
# Assumption: a host has 16 GiB, and joining the batches holds them twice.
MOST_GATHERED = 4 * 2**30

GIB = 2**30

# for each leaf, the dims whose extent follows the batch's
Dims = list[tuple[int, ...]]


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
        """Find out which metrics are means of samples."""
        self.trace = trace
        self.recipe = trace.recipe
        metrics = self.recipe.metrics
        scalars = [name for name in metrics if self._is_scalar(name)]
        self.whole = tuple(name for name in scalars if not self._is_mean(name))
        self._scalars = [name for name in scalars if name not in self.whole]
        if self._is_scalar("loss"):
            self._scalars.append("loss")

        self._jitted = {}
        for name in self.whole:
            function, _ = losses.sums_of(metrics[name])
            self._jitted[name] = jax.jit(function)

    @cached_property
    def meeting(self) -> str | None:
        """The reason why the last batch runs at its own size; None: it is filled up."""
        if self._scalars:
            return f"{self._scalars[0]} is one number of a batch"

        def measured(
            params: Any,
            variables: Any,
            inputs: Any,
            targets: Any,
        ) -> Any:
            outputs = evaluated(self.trace, params, variables, inputs)
            values = []
            for name in ("loss", *self.recipe.metrics):
                if name not in self.whole:
                    values.append(self._values(name, outputs, targets))
            return outputs, values

        state = self.trace.state
        fixed = (state.params, state.variables)
        batch = (self.trace.inputs, self.trace.targets)
        with pointing_at_user("evaluating"):
            return where_they_meet(measured, fixed, batch)

    @cached_property
    def dims(self) -> Dims:
        """Dims of each leaf of the outputs that hold the batch."""
        few, many = _outputs_of_two_sizes(self.trace)
        return batch_dims(few, many, self.recipe.batch_size)

    @cached_property
    def sums(self) -> Any:
        """Weighted sums of no sample: {name: (0, 0)}, float32."""
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

        trace = self.trace
        shapes = jax.eval_shape(
            measure,
            trace.outputs,
            trace.targets,
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
        self._check_memory(samples)
        if samples > self.recipe.batch_size:
            self._check_dims()

    def _check_memory(self, samples: int) -> None:
        batches = -(-samples // self.recipe.batch_size)
        trace = self.trace
        arrays = jax.tree.leaves((trace.outputs, trace.targets))
        size = batches * sum(map(nbytes, arrays))
        if size > MOST_GATHERED:
            raise DataError(
                f"the metric {self.whole[0]!r} is no mean over samples, so it takes"
                f" the outputs and targets of all {samples} samples at once:"
                f" {size / GIB:.1f} GiB; at most {MOST_GATHERED / GIB:.0f} GiB are"
                " gathered",
                where="test data",
                remedy=(
                    "evaluate on fewer samples, or make the metric one of sums over "
                    "samples: lepton_jax.metrics.Metric(values, finish)"
                ),
            )

    def _check_dims(self) -> None:
        name = self.whole[0]
        outputs = by_path(self.trace.outputs)
        pairs = zip(
            outputs.items(),
            self.dims,
            strict=True,
        )
        for (path, leaf), dims in pairs:
            if len(dims) != 1:
                raise ModelError(
                    f"the metric {name!r} is no mean over samples, and the output"
                    f" {path or 'of the model'} {_shape(leaf)} can't be"
                    f" joined from several batches: {_why_not_one(dims)}",
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
        """Return outputs and targets of a batch on the host, without its filling.

        Args:
          part: outputs and targets of a batch.
          rows: the number of its samples that are real.
        """
        outputs, targets = jax.tree.map(np.asarray, part)
        size = len(jax.tree.leaves(targets)[0])
        if rows == size:
            return outputs, targets

        cut = []
        pairs = zip(
            jax.tree.leaves(outputs),
            self.dims,
            strict=True,
        )
        for leaf, dims in pairs:
            if dims:
                dim = dims[0]
                rows_of_a_sample = leaf.shape[dim] // size
                leaf = _first(leaf, dim, rows_of_a_sample * rows)
            cut.append(leaf)
        outputs = with_leaves(outputs, cut)
        targets = jax.tree.map(lambda leaf: leaf[:rows], targets)
        return outputs, targets

    def of_whole(
        self,
        parts: Sequence[tuple[Any, Any]],
    ) -> dict[str, float]:
        """Apply the metrics of the whole test set.

        Args:
          parts: (outputs, targets) of each of its batches.
        """
        outputs, targets = self._join(parts)
        values = {}
        for name in self.whole:
            with pointing_at_user(f"the metric {name!r} of the whole test set"):
                sums = self._jitted[name](outputs, targets)
                values[name] = float(
                    losses.finish(
                        self.recipe,
                        name,
                        sums,
                    )
                )
        return values

    def _join(
        self,
        parts: Sequence[tuple[Any, Any]],
    ) -> tuple[Any, Any]:
        """Join outputs and targets of several batches."""
        pieces = [jax.tree.leaves(outputs) for outputs, _ in parts]
        leaves = []
        pairs = zip(*pieces, self.dims, strict=True)
        for *alike, dims in pairs:
            if len(alike) == 1:
                leaves.append(alike[0])
            else:
                leaves.append(np.concatenate(alike, axis=dims[0]))
        tree = jax.tree.structure(self.trace.outputs)
        outputs = jax.tree.unflatten(tree, leaves)

        all_targets = [targets for _, targets in parts]
        targets = jax.tree.map(lambda *alike: np.concatenate(alike), *all_targets)
        return outputs, targets

    def _values(
        self,
        name: str,
        outputs: Any,
        targets: Any,
    ) -> Any:
        """Return the values of the loss or of a metric, before they are summed."""
        if name == "loss":
            return losses.values(self.recipe.loss, outputs, targets, False)
        function, several = losses.sums_of(self.recipe.metrics[name])
        return losses.values(function, outputs, targets, several)

    def _is_scalar(self, name: str) -> bool:
        trace = self.trace
        values = partial(self._values, name)
        shapes = jax.eval_shape(values, trace.outputs, trace.targets)
        leaves = jax.tree.leaves(shapes)
        return len(leaves) == 1 and leaves[0].shape == ()

    def _is_mean(self, name: str) -> bool:
        """Whether a scalar metric is the mean of one value for each sample."""
        few, many = _outputs_of_two_sizes(self.trace)
        if many is None:
            return False
        targets = self.trace.targets
        more = _of_rows(targets, 2 * self.recipe.batch_size)
        batches = [(few, targets), (many, more)]
        try:
            return is_mean_of_samples(partial(self._values, name), batches)
        except ModelError:  # a metric of batches of one size: nothing is claimed
            return False


class Prediction:
    """Predictions of many inputs, put together from batches.

    Args:
      trace: of the recipe.
      decode: the model's outputs to predictions.

    Attributes:
      used: for each leaf of the outputs, whether the predictions depend on it.
      outputs: the dims of each leaf of the outputs that hold the batch.
      dims: the same of each leaf of the predictions.
      hides: whether a prediction is not floating-point, so that it can't show a NaN.
    """

    def __init__(
        self,
        trace: Trace,
        decode: Callable[[Any], Any],
    ):
        """Find the batch in outputs and predictions."""
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

        dtypes = [leaf.dtype for leaf in jax.tree.leaves(shapes)]
        self.hides = not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
        self.used = _used(decode, few) if self.hides else []

    @cached_property
    def meeting(self) -> str | None:
        """The place where samples of a batch meet; None: the last one is filled up."""

        def predict(
            params: Any,
            variables: Any,
            inputs: Any,
        ) -> Any:
            outputs = evaluated(self.trace, params, variables, inputs)
            return self._decode(outputs)

        state = self.trace.state
        fixed = (state.params, state.variables)
        with pointing_at_user("predicting"):
            return where_they_meet(predict, fixed, (self.trace.inputs,))

    def check(self, samples: int) -> None:
        """Check that predictions of a number of inputs can be joined from batches.

        Raises:
          ModelError: they take several, and a leaf has not exactly one dim for them.
        """
        size = self.trace.recipe.batch_size
        if samples <= size:
            return
        pairs = zip(
            self._paths.items(),
            self.dims,
            strict=True,
        )
        for (path, leaf), dims in pairs:
            if self._can_join(leaf, dims):
                continue
            raise ModelError(
                f"the prediction {path or 'of the model'} {_shape(leaf)} can't be"
                f" joined from the batches of {size} that {samples} inputs make:"
                f" {_why_not_one(dims)}",
                where="Trainer.predict",
                remedy=(
                    "choose what has one dim for the samples: predict(inputs, "
                    "decode=lambda outputs: outputs[...]); or give at most "
                    f"{size} inputs at once"
                ),
            )

    def _can_join(
        self,
        leaf: Any,
        dims: tuple[int, ...],
    ) -> bool:
        """Whether the rows of each sample lie together along one dim of a leaf."""
        if len(dims) != 1:
            return False
        # where samples meet, nobody knows in which order 2 * 16 rows stand
        several_rows = leaf.shape[dims[0]] != self.trace.recipe.batch_size
        return not (several_rows and self.meeting is not None)

    def joined(
        self,
        parts: Sequence[Any],
        rows: Sequence[int],
    ) -> Any:
        """Join the predictions of all batches.

        Args:
          parts: the predictions of each batch.
          rows: the number of samples in each that are real, the first ones.
        """
        pieces = [jax.tree.leaves(part) for part in parts]
        leaves = []
        for number, shape in enumerate(self._paths.values()):
            alike = [np.asarray(piece[number]) for piece in pieces]
            dims = self.dims[number]
            if len(dims) == 1:
                leaves.append(
                    self._joined_leaf(
                        alike,
                        rows,
                        dims[0],
                        shape,
                    )
                )
            else:
                leaves.append(alike[0])
        return with_leaves(parts[0], leaves)

    def _joined_leaf(
        self,
        pieces: list[np.ndarray],
        rows: Sequence[int],
        dim: int,
        shape: Any,
    ) -> np.ndarray:
        rows_of_a_sample = shape.shape[dim] // self.trace.recipe.batch_size
        real = []
        for piece, count in zip(pieces, rows, strict=True):
            real.append(_first(piece, dim, count * rows_of_a_sample))
        return np.concatenate(real, axis=dim)


def evaluated(
    trace: Trace,
    params: Any,
    variables: Any,
    inputs: Any,
) -> Any:
    """Return the model's outputs outside of training."""
    outputs, _ = forward(
        trace.recipe,
        trace.functional,
        params,
        variables,
        inputs,
        None,
        False,
    )
    return outputs


def outputs_of(trace: Trace, inputs: Any) -> Any:
    """Return the shapes of the outputs outside of training."""
    state = trace.state
    run = partial(evaluated, trace)
    return jax.eval_shape(run, state.params, state.variables, inputs)


def batch_dims(
    few: Any,
    many: Any,
    size: int,
) -> Dims:
    """Find the dims of each leaf whose extent follows the batch size.

    Args:
      few: shapes for a batch.
      many: the same for a batch of another size. None: it is not known, and the first
        dim of the extent `size` is taken.
      size: the size of the first batch.
    """
    dims: Dims = []
    if many is None:
        for leaf in jax.tree.leaves(few):
            alike = [dim for dim, extent in enumerate(leaf.shape) if extent == size]
            dims.append(tuple(alike[:1]))
        return dims

    small_leaves = jax.tree.leaves(few)
    large_leaves = jax.tree.leaves(many)
    for small, large in zip(small_leaves, large_leaves, strict=True):
        differing = []
        extents = zip(small.shape, large.shape, strict=True)
        for dim, (before, after) in enumerate(extents):
            if before != after:
                differing.append(dim)
        dims.append(tuple(differing))
    return dims


def nan_rows(
    leaves: Sequence[Any],
    dims: Dims,
    rows: int,
) -> Any:
    """Return which samples hold a NaN in any of some leaves.

    Args:
      leaves: arrays of a batch.
      dims: the dims of each that hold the batch; a NaN in a leaf without any belongs
        to all samples.
      rows: the size of the batch.

    Returns:
      bool (rows,).
    """
    has_nan = jnp.zeros(rows, jnp.bool_)
    for leaf, own_dims in zip(leaves, dims, strict=True):
        if not is_inexact(leaf):
            continue
        is_nan = jnp.isnan(leaf)
        if own_dims:
            by_sample = jnp.moveaxis(is_nan, own_dims[0], 0)
            has_nan |= by_sample.reshape(rows, -1).any(axis=1)
        else:
            has_nan |= is_nan.any()
    return has_nan


# ---- internals ----


def _of_rows(batch: Any, rows: int) -> Any:
    """Return the shapes of a batch of another size."""

    def resized(x: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)

    return jax.tree.map(resized, batch)


def _outputs_of_two_sizes(
    trace: Trace,
) -> tuple[Any, Any]:
    """Return the shapes of the outputs for a batch and for one of twice its size.

    The second ones are None if the model takes batches of one size only.
    """
    size = trace.recipe.batch_size
    with pointing_at_user("evaluating"):
        few = outputs_of(trace, trace.inputs)
    try:
        return few, outputs_of(trace, _of_rows(trace.inputs, 2 * size))
    except Exception:  # a model of one batch size
        return few, None


def _used(
    decode: Callable[[Any], Any],
    outputs: Any,
) -> list[bool]:
    """Return for each leaf of the outputs whether a function depends on it."""
    program = jax.make_jaxpr(decode)(outputs).jaxpr
    needed = {id(variable) for variable in program.outvars}
    for eqn in reversed(program.eqns):
        if any(id(variable) in needed for variable in eqn.outvars):
            needed.update(id(variable) for variable in eqn.invars)
    return [id(variable) in needed for variable in program.invars]


def _first(
    x: np.ndarray,
    dim: int,
    count: int,
) -> np.ndarray:
    """Return the first elements of an array along a dim."""
    before = (slice(None),) * dim
    return x[(*before, slice(count))]


def _shape(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _why_not_one(
    dims: tuple[int, ...],
) -> str:
    """Explain why a leaf with these batch dims can't be joined along one dim."""
    if not dims:
        return "it has no dim for the samples"
    if len(dims) > 1:
        return f"dims {' and '.join(map(str, dims))} both follow the number of samples"
    return "the rows of a sample may not lie together"
