"""An Optax transformation as a train step applies it.

Where Optax can't apply it, the error names the missing argument or the parameters.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lepton_jax.errors import RecipeError, of_a_library, pointing_at_user
from lepton_jax.step.optimizers.schedule import nodes
from lepton_jax.trees import by_path

WHERE = "Recipe.optimizer"
# parameter names in a message; assumption
LISTED = 12
# characters of a text of JAX's in a message; assumption
BRIEF = 400

# arguments of an update that some of Optax's ask for and a train step can't give
LACKING = {
    "value_fn": "a function of the parameters that gives the loss",
    "grad_fn": "a function of the parameters that gives the gradient",
    "obj_fn": "a function of the parameters that gives the loss",
    "grad": "the gradient once more, for a line search",
}

# states of optimizers whose updates also move weights of their own: see `scaled`
BOUND = (
    optax.contrib.ScheduleFreeState,
    optax.LookaheadState,
    optax.contrib.SAMState,
)


class Lookahead(NamedTuple):
    """State of an optimizer with `optax.lookahead` in it.

    Attributes:
      slow: the slow weights; a train step's parameters are the fast ones.
      inner: the optimizer's own state.
    """

    slow: Any
    inner: Any


class Transformation:
    """An Optax transformation with the other arguments that it needs.

    Args:
      given: an Optax transformation, or an object with its `init` and `update`, such as
        `optax.MultiSteps(...)`.

    Raises:
      RecipeError: it is neither.
    """

    def __init__(self, given: Any):
        is_optax = isinstance(given, optax.GradientTransformation)
        if is_transformation(given) and not is_optax:
            given = optax.GradientTransformationExtraArgs(given.init, given.update)
        if not isinstance(given, optax.GradientTransformation):
            raise RecipeError(
                f"optimizer is a {type(given).__name__}, not an Optax transformation",
                where=WHERE,
                remedy="give e.g. optimizer=optax.adamw, learning_rate=1e-3",
            )
        self.whole = optax.with_extra_args_support(given)

    def init(self, params: Any) -> Any:
        """Make the state before the first update.

        Raises:
          RecipeError: it can't be made for these parameters; their names are listed.
        """
        with fitting(params), _quiet():
            state = self.whole.init(params)
            if any(isinstance(node, optax.LookaheadState) for node in nodes(state)):
                both = optax.LookaheadParams(fast=params, slow=params)
                state = Lookahead(params, self.whole.init(both))
            for mask in _masks(self.whole.update):
                _check_mask(mask, params)

        # a state that is donated must not hold an array twice
        own = {id(leaf) for leaf in jax.tree.leaves(params)}
        return jax.tree.map(lambda x: jnp.copy(x) if id(x) in own else x, state)

    def update(
        self,
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        value: Any,
        factor: Any = None,
    ) -> tuple[Any, Any]:
        """Make one update.

        Args:
          gradients: gives the gradients, which are like params; called where they are
            used.
          state: what `init` or the update before gave.
          params: the parameters.
          value: the loss, for those that look at it.
          factor: of the updates, float32 scalar; None: 1.

        Returns:
          The parameters and the state after the update.

        Raises:
          RecipeError: it fails, or needs what a train step doesn't give it.
        """

        def apply(factor: Any) -> tuple[Any, Any]:
            return self._applied(gradients, state, params, value, factor)

        if factor is None:
            return apply(None)
        # a factor of 1 changes no number, but how XLA rounds those around it
        return jax.lax.cond(
            factor == 1,
            lambda: apply(None),
            lambda: apply(factor),
        )

    def _applied(
        self,
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        value: Any,
        factor: Any,
    ) -> tuple[Any, Any]:
        updates, after = self.updates(
            gradients(),
            state,
            params,
            value,
        )
        if factor is not None:
            updates = scaled(updates, factor, state)

        if isinstance(after, Lookahead):
            moved = optax.apply_updates(_both(params, state), updates)
            return moved.fast, after._replace(slow=moved.slow)
        return optax.apply_updates(params, updates), after

    def updates(
        self,
        gradients: Any,
        state: Any,
        params: Any,
        value: Any,
    ) -> tuple[Any, Any]:
        """Return the updates of the parameters, and the state after them.

        With `optax.lookahead` the updates are `optax.LookaheadParams`, and the slow
        weights in the state are still those before the update.
        """
        with fitting(params):
            if isinstance(state, Lookahead):
                both = _both(params, state)
                updates, inner = self._call(
                    gradients,
                    state.inner,
                    both,
                    value,
                )
                return updates, state._replace(inner=inner)
            return self._call(gradients, state, params, value)

    def _call(
        self,
        gradients: Any,
        state: Any,
        params: Any,
        value: Any,
    ) -> tuple[Any, Any]:
        try:
            return self.whole.update(gradients, state, params, value=value)
        except TypeError as error:
            # some, such as contrib.sam, take only the arguments that they use
            if "unexpected keyword argument 'value'" not in str(error):
                raise
        return self.whole.update(gradients, state, params)


def _both(params: Any, state: Lookahead) -> Any:
    return optax.LookaheadParams(fast=params, slow=state.slow)


def is_transformation(given: Any) -> bool:
    """Whether an object has the functions of an Optax transformation."""
    parts = [getattr(given, name, None) for name in ("init", "update")]
    return not isinstance(given, type) and all(callable(part) for part in parts)


def scaled(
    updates: Any,
    factor: Any,
    state: Any,
) -> Any:
    """Return updates times a factor.

    For most of Optax's optimizers this is the same as a scaled learning rate.

    Raises:
      RecipeError: it is not the same for this optimizer, which keeps other weights in
        step with the updates that it made.
    """
    bound = [node for node in nodes(state) if isinstance(node, BOUND)]
    if bound:
        kind = type(bound[0]).__name__.removesuffix("State")
        raise RecipeError(
            f"the learning rate of this optimizer ({kind}) can't be moved from outside:"
            " its updates also move weights of its own",
            where=WHERE,
            remedy=(
                "give it as a function of the learning rate, e.g. lambda rate: "
                "optax.contrib.schedule_free_sgd(rate), with Recipe.learning_rate"
            ),
        )
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)


class fitting(pointing_at_user):
    """Context in which a fault of an optimizer's code names the parameters.

    Args:
      params: the parameters.
    """

    def __init__(self, params: Any):
        super().__init__("the optimizer", where=WHERE, kind=RecipeError)
        self._params = params

    def __exit__(
        self,
        kind: Any,
        error: BaseException | None,
        trace: Any,
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        except RecipeError as reported:
            assert error is not None
            what, remedy = _explained(reported, error, self._params)
            raise RecipeError(what, where=reported.where, remedy=remedy) from error


def _explained(
    error: RecipeError, cause: BaseException, params: Any
) -> tuple[str, str]:
    """Return the fault behind an error of Optax's, and its remedy."""
    text = str(cause)
    lacking = [name for name in LACKING if re.search(rf"\b{name}\b", text)]
    if lacking and isinstance(cause, TypeError | ValueError):
        needed = " and ".join(f"{name} ({LACKING[name]})" for name in lacking)
        return (
            f"the optimizer's update needs {needed}; a train step gives gradients, "
            "parameters and the loss's value",
            "give an optimizer without a line search or second-order estimates, "
            "e.g. optimizer=optax.adamw, learning_rate=1e-3",
        )
    if "batch dimension" in text:
        return (
            "the optimizer needs the gradient of each sample; a train step gives the"
            " mean gradient of a batch",
            "leave out what clips or aggregates single samples' gradients "
            "(differentially_private_aggregate, dpsgd, per_example_*_norm_clip)",
        )
    if "no corresponding transformation" in text:
        unknown = _unknown_labels(text)
        return (
            f"the optimizer's labels of parameters name no transformation: {unknown}",
            "give each label a transformation, or change the labels of the "
            f"parameters, which are {named(params)}",
        )
    if "pytree" in text or isinstance(cause, KeyError | IndexError | AttributeError):
        return (
            f"the optimizer does not fit the parameters: {type(cause).__name__}:"
            f" {_brief(text)}",
            "let masks and labels be nested dicts of the parameters' names, or "
            f"functions of such a dict; the parameters are {named(params)}",
        )
    if isinstance(cause, jax.errors.ConcretizationTypeError):
        return (
            "the optimizer looks at values that are not known when the step is"
            f" compiled: {_brief(text.partition('.')[0])}",
            "let masks and labels go by the parameters' names, shapes or dtypes; "
            f"the parameters are {named(params)}",
        )
    return (
        error.what,
        "give an Optax transformation that needs gradients, parameters and the loss's"
        " value alone",
    )


def _unknown_labels(text: str) -> str:
    """Return Optax's lists of labels and of transformations, in one line."""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    listed = "; ".join(lines)
    return listed.replace("Transforms keys", "transformations")


def _brief(text: str) -> str:
    """Return JAX's account of two trees that differ, in one line."""
    words = " ".join(text.removeprefix("pytree structure error: ").split())
    return words if len(words) <= BRIEF else words[: BRIEF - 3] + "..."


def named(params: Any) -> str:
    """Return the parameters' names for a message; of many, the first ones."""
    names = list(by_path(params))
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _masks(
    function: Any,
    seen: set[int] | None = None,
) -> Iterator[Any]:
    """Yield the masks in an optimizer that are not within other masks or partitions.

    Optax keeps a mask in the closure of `optax.masked`, and nothing in a state says
    whether it matched: `add_decayed_weights` has none. So closures are looked through.
    """
    seen = set() if seen is None else seen
    if id(function) in seen:
        return
    seen.add(id(function))

    if isinstance(function, tuple | list):
        for part in function:
            yield from _masks(part, seen)
        return
    held = getattr(function, "__self__", None)
    if isinstance(held, optax.MultiSteps):
        yield from _masks(held.inner_opt, seen)

    code = getattr(function, "__code__", None)
    if code is None:
        return
    closed_over = _closed_over(function)
    name = getattr(function, "__qualname__", "")
    if name.startswith("masked.<locals>.update_fn") and of_a_library(code.co_filename):
        yield closed_over.get("mask")
    elif not name.startswith("partition.<locals>."):
        for value in closed_over.values():
            yield from _masks(value, seen)


def _closed_over(function: Any) -> dict[str, Any]:
    """Return the variables in a function's closure, by name."""
    cells = getattr(function, "__closure__", None) or ()
    pairs = zip(function.__code__.co_freevars, cells, strict=True)
    return {name: cell.cell_contents for name, cell in pairs if _filled(cell)}


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not assigned yet
        return False


def _check_mask(mask: Any, params: Any) -> None:
    """Check that some entry of a mask is true; False alone says so on purpose."""
    tree = mask(params) if callable(mask) else mask
    entries = jax.tree.leaves(tree)
    on_purpose = isinstance(tree, bool) or not entries
    if on_purpose or any(bool(entry) for entry in entries):
        return
    raise RecipeError(
        "a mask of the optimizer matches no parameter",
        where=_place(mask) or WHERE,
        remedy=(
            "let the mask be true for some of the parameters, which are"
            f" {named(params)}; or leave what is masked out"
        ),
    )


def _place(function: Any) -> str | None:
    """Return the file and line of a user's function."""
    code = getattr(function, "__code__", None)
    if code is None or of_a_library(code.co_filename):
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence `optax.lookahead`'s warning of the parameters with which it is tried."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
