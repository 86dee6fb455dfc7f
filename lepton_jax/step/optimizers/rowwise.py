"""Optimizers for large embeddings, which update only the rows that a batch looks up.

`rowwise` marks an optimizer. It does not change what the optimizer computes: the mark
is a part of its state, where the planner finds it (see `planner.program.tables`). The
train step then hands the optimizer the touched rows alone, of parameters, gradients and
moments. What this means for a row that is not touched is the person's choice:

| | in a step that does not touch the row |
|---|---|
| SGD, Adagrad, `rowwise_adagrad` | nothing in either case: the same as without a mark |
| momentum, Adam and the like | the moments wait, and the row does not move |
| weight decay | the row does not decay |
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lepton_jax.errors import RecipeError, nearest
from lepton_jax.step.optimizers.schedule import nodes
from lepton_jax.step.optimizers.transformation import is_transformation
from lepton_jax.trees import path_of

# what is done where an embedding can't be updated by rows
OTHERWISE = ("error", "dense")


class Strict(NamedTuple):
    """In place of a parameter that is to be updated by rows, or else is an error."""


class Loose(NamedTuple):
    """In place of a parameter that is to be updated by rows, or else as a whole."""


class RowwiseState(NamedTuple):
    """State of an optimizer that is marked as row-wise.

    Attributes:
      inner: the optimizer's own state.
      marks: the parameters' tree with `Strict()` or `Loose()` in place of each array.
    """

    inner: Any
    marks: Any


class RowwiseAdagradState(NamedTuple):
    """Sums of the mean squared gradients: (rows,) for a parameter (rows, ...)."""

    sums: Any


def rowwise(
    optimizer: Any,
    otherwise: Literal["error", "dense"] = "error",
) -> Any:
    """Mark an optimizer as one that updates only the rows that a batch looks up.

    It holds for embeddings: parameters that the model uses only to look rows up.
    Other parameters under this optimizer are updated as ever. See docs/optimizers.md,
    "Large embeddings".

    Args:
      optimizer: an Optax transformation, or a function of the learning rate.
      otherwise: where an embedding can't be updated by rows, because the model also
        uses it in another way, say: "error", or "dense" for an update of the whole,
        with a note in the plan.

    Returns:
      The same as `optimizer`, marked.

    Raises:
      RecipeError: `optimizer` is neither, or `otherwise` is no such word.

    Example:
      >>> params = {"users": jnp.ones((4, 2)), "kernel": jnp.ones(2)}
      >>> marked(rowwise(optax.adam(0.1)).init(params))
      {'kernel': 'error', 'users': 'error'}
    """
    if otherwise not in OTHERWISE:
        raise RecipeError(
            f"otherwise is {otherwise!r}{nearest(str(otherwise), OTHERWISE)}",
            where="rowwise",
            remedy='set otherwise="error" or otherwise="dense"',
        )
    if is_transformation(optimizer):
        return _marked(optimizer, otherwise)
    if not callable(optimizer):
        raise RecipeError(
            f"the optimizer is a {type(optimizer).__name__}",
            where="rowwise",
            remedy="give an Optax transformation, or a function of the learning rate",
        )

    # `wraps` keeps the signature, which says what other knobs there are
    @functools.wraps(optimizer)
    def make(*args: Any, **options: Any) -> Any:
        return _marked(optimizer(*args, **options), otherwise)

    return make


def sparse_adam(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    otherwise: Literal["error", "dense"] = "error",
) -> optax.GradientTransformation:
    """Adam whose moments move only in the rows that a batch looks up.

    It is `rowwise(optax.adam(...))`, as PyTorch's SparseAdam and TensorFlow Addons'
    LazyAdam: the correction of the moments for their start counts all steps, and not
    those of a row.

    Args:
      learning_rate: a number or an Optax schedule.
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: added to the root of the second moments.
      otherwise: as in `rowwise`.
    """
    return rowwise(optax.adam(learning_rate, b1, b2, eps), otherwise)


def rowwise_adagrad(
    learning_rate: Any,
    initial: float = 0.0,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adagrad with one sum for each row: an embedding's state is a column.

    For a row's gradient g of d numbers, s += sum(g^2) / d, and the row moves by
    -learning_rate * g / (sqrt(s) + eps). This is FBGEMM's EXACT_ROWWISE_ADAGRAD, the
    usual choice for recommenders (Mudigere et al. 2022, "Software-Hardware Co-design
    for Fast and Scalable Training of Deep Learning Recommendation Models", section
    4.1). Any parameter has rows: its entries along dim 0.

    Args:
      learning_rate: a number or an Optax schedule.
      initial: the sums before the first step.
      eps: added to the root, so that nothing is divided by 0.
    """

    def init(params: Any) -> RowwiseAdagradState:
        def sums(x: Any) -> jax.Array:
            return jnp.full(x.shape[:1], initial, x.dtype)

        return RowwiseAdagradState(jax.tree.map(sums, params))

    def update(
        gradients: Any,
        state: RowwiseAdagradState,
        params: Any = None,
    ) -> Any:
        del params

        def added(
            sums: Any,
            g: Any,
        ) -> Any:
            return sums + jnp.square(g).mean(range(1, g.ndim))

        def scaled(
            sums: Any,
            g: Any,
        ) -> Any:
            columns = sums.reshape(sums.shape + (1,) * (g.ndim - sums.ndim))
            return g / (jnp.sqrt(columns) + eps)

        sums = jax.tree.map(added, state.sums, gradients)
        updates = jax.tree.map(scaled, sums, gradients)
        return updates, RowwiseAdagradState(sums)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )


def marked(state: Any) -> dict[str, str]:
    """Return the parameters under a row-wise optimizer: path to its `otherwise`."""
    found: dict[str, str] = {}
    for node in nodes(state):
        if isinstance(node, RowwiseState):
            found |= _marks_by_path(node.marks)
    return found


# ---- internals ----


def _marked(
    optimizer: Any,
    otherwise: str,
) -> optax.GradientTransformation:
    inner = optax.with_extra_args_support(optimizer)
    mark = Strict() if otherwise == "error" else Loose()

    def init(params: Any) -> RowwiseState:
        marks = jax.tree.map(lambda x: mark, params)
        return RowwiseState(inner.init(params), marks)

    def update(
        gradients: Any,
        state: RowwiseState,
        params: Any = None,
        **extra: Any,
    ) -> Any:
        updates, after = inner.update(
            gradients,
            state.inner,
            params,
            **extra,
        )
        return updates, RowwiseState(after, state.marks)

    return optax.GradientTransformationExtraArgs(init, update)


def _marks_by_path(marks: Any) -> dict[str, str]:
    def is_mark(x: Any) -> bool:
        return isinstance(x, Strict | Loose)

    leaves, _ = jax.tree_util.tree_flatten_with_path(marks, is_leaf=is_mark)
    words = {
        Strict: "error",
        Loose: "dense",
    }
    return {path_of(path): words[type(mark)] for path, mark in leaves}
