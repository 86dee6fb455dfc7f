"""Optimizers for parts of the parameters, and parts that stay as they are.

A part is a pattern over the paths of parameters, as `trainer.trace` lists them. Each
parameter belongs to the first pattern that matches it. An example with two layers, of
which the first stays as it is:

>>> import jax.numpy as jnp
>>> parts = by_part({"first/*": "frozen"}, default=optax.sgd)
>>> params = {
...     "first": {"kernel": jnp.ones(2)},
...     "last": {"kernel": jnp.ones(2), "bias": jnp.ones(1)},
... }
>>> for row in parts.table(params):
...     print(row["pattern"], row["parameters"], row["entries"], row["frozen"])
first/* 1 2 True
default 2 3 False

Optax's own `optax.partition` does the work: the state of a part holds arrays for its
own parameters alone. Three things are added for frozen parts. The training loss does
not depend on them, so that nothing is computed backwards for their sake; they have no
state; and an update returns the very arrays that it was given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from lepton_jax.errors import RecipeError, nearest
from lepton_jax.step.optimizers.maker import defaults
from lepton_jax.step.optimizers.optimizer import Optimizer, unchanged
from lepton_jax.step.optimizers.switching import Switchable
from lepton_jax.step.optimizers.transformation import is_transformation
from lepton_jax.trees import by_path, matches, with_leaves

WHERE = "Recipe.optimizer, by_part"
FROZEN = "frozen"
DEFAULT = "default"
# parameter names in a message; assumption
LISTED = 6


class Part(NamedTuple):
    """One part of the parameters.

    Attributes:
      pattern: of the paths; None: all that no other part matches.
      label: its name in the optimizer's state, without "/".
      given: an Optax transformation, a function of the learning rate, or "frozen".
    """

    pattern: str | None
    label: str
    given: Any

    @property
    def is_frozen(self) -> bool:
        """Whether its parameters stay as they are."""
        return isinstance(self.given, str)

    @property
    def follows_rate(self) -> bool:
        """Whether it is a function of the learning rate."""
        return not self.is_frozen and not is_transformation(self.given)


def by_part(
    parts: Mapping[str, Any],
    default: Any = None,
) -> Parts:
    """Return an optimizer for `Recipe.optimizer` that treats parts differently.

    Parts that are functions of the learning rate are given `Recipe.learning_rate`, and
    policies and people move it for all of them alike. A finished transformation in such
    company keeps its own rate, which nothing moves. Where no part is a function, the
    knob `learning_rate` scales the updates of all.

    The knobs `weight_decay`, `b1`, `b2` and `momentum` exist where each function takes
    an argument of that name, with the same default.

    Args:
      parts: pattern to an Optax transformation, a function of the learning rate, or
        "frozen". A pattern is matched as in a shell against a parameter's whole path,
        such as "encoder/layers/0/kernel"; "*" also matches "/", and "**/" no folder at
        all. Where several match, the first one counts.
      default: the same for parameters that no pattern matches. None: there may be none.

    Raises:
      RecipeError: a value is none of these, or all parts are frozen. When the recipe is
        traced, also where a pattern has no parameter, or a parameter no pattern.

    Example:
      >>> optimizer = by_part(
      ...     {"embed/*": optax.adagrad(0.1), "*/bias": optax.sgd},
      ...     default=optax.adamw,
      ... )
      >>> [part.label for part in optimizer.parts]
      ['embed.*', '*.bias', 'default']
    """
    is_dict = isinstance(parts, Mapping)
    if not is_dict or not all(isinstance(pattern, str) for pattern in parts):
        raise RecipeError(
            f"the parts are {parts!r}",
            where=WHERE,
            remedy='give a dict of pattern to optimizer, e.g. {"encoder/*": "frozen"}',
        )
    made: list[Part] = []
    for pattern, given in parts.items():
        _check_given(pattern, given)
        made.append(Part(pattern, _label(pattern, made), given))
    if default is not None:
        _check_given(DEFAULT, default)
        made.append(Part(None, DEFAULT, default))
    if all(part.is_frozen for part in made):
        raise RecipeError(
            "every part is frozen" if made else "there are no parts",
            where=WHERE,
            remedy='give some part an optimizer, e.g. {"head/*": optax.adamw}',
        )
    return Parts(tuple(made))


class Parts:
    """Optimizers by part: see `by_part`.

    Args:
      parts: in their order; one without a pattern is the last.

    Attributes:
      parts: the same.
    """

    def __init__(self, parts: tuple[Part, ...]):
        self.parts = parts
        following = [part for part in parts if part.follows_rate]
        self.follows_rate = bool(following)
        self._options = _common([defaults(part.given) for part in following])

    @property
    def __signature__(self) -> inspect.Signature:
        """The rate, and the knobs that all functions among the parts have."""
        kinds = inspect.Parameter
        rate = kinds("rate", kinds.POSITIONAL_OR_KEYWORD)
        options = [
            kinds(name, kinds.KEYWORD_ONLY, default=value)
            for name, value in self._options.items()
        ]
        return inspect.Signature([rate, *options])

    def __call__(self, rate: Any, **options: Any) -> optax.GradientTransformation:
        """Return one Optax transformation for all parts.

        Args:
          rate: for the parts that are functions of it; a number or a schedule.
          **options: their arguments by name.
        """
        made = {}
        for part in self.parts:
            if part.is_frozen:
                made[part.label] = optax.set_to_zero()
            elif part.follows_rate:
                make = functools.partial(part.given, **options)
                made[part.label] = _as_optax(make(rate), part)
            else:
                made[part.label] = _as_optax(part.given, part)
        return optax.partition(made, self.labels)

    def labels(self, params: Any) -> Any:
        """Return the label of each parameter, in their tree.

        A policy tries an optimizer on parameters with names of its own: where one part
        alone is trained, they count as that one.

        Raises:
          RecipeError: a parameter is in no part.
        """
        owners = self._owners(params)
        trained, *others = [part for part in self.parts if not part.is_frozen]
        if not others and trained not in owners.values():
            owners = dict.fromkeys(owners, trained)
        orphans = [path for path, part in owners.items() if part is None]
        if orphans:
            raise RecipeError(
                f"no pattern matches {_listed(orphans)}",
                where=WHERE,
                remedy=(
                    "add a pattern, or give default=..., which may be an optimizer or"
                    ' "frozen"'
                ),
            )
        labels = [part.label for part in owners.values()]
        return with_leaves(params, labels)

    def check(self, params: Any) -> None:
        """Check that each pattern has parameters, and each parameter has a part.

        Raises:
          RecipeError: it is not so; the nearest path is named.
        """
        paths = list(by_path(params))
        owners = self._owners(params)
        for part in self.parts:
            if part.pattern is None or part in owners.values():
                continue
            found = [path for path in paths if matches(path, part.pattern)]
            if found:
                first = owners[found[0]]
                raise RecipeError(
                    f"the pattern {part.pattern!r} matches only what {first.pattern!r}"
                    " takes before it",
                    where=WHERE,
                    remedy="put the narrower pattern first; the first match counts",
                )
            raise RecipeError(
                f"the pattern {part.pattern!r} matches no parameter"
                f"{nearest(part.pattern, _folders(paths))}",
                where=WHERE,
                remedy=f"the parameters are {_listed(paths)}",
            )
        self.labels(params)
        if all(part.is_frozen for part in owners.values()):
            raise RecipeError(
                "every parameter is frozen",
                where=WHERE,
                remedy="leave some for an optimizer",
            )

    def frozen(self, params: Any) -> set[str]:
        """Return the paths of the parameters that stay as they are."""
        owners = self._owners(params).items()
        return {path for path, part in owners if part is not None and part.is_frozen}

    def table(self, params: Any) -> list[dict[str, Any]]:
        """Return a row for each part.

        Returns:
          Rows with "pattern", "parameters" (arrays), "entries", "frozen", and "left":
          how many parameters an earlier pattern took that this one matches, too.
        """
        leaves = by_path(params)
        owners = self._owners(params)
        rows = []
        for part in self.parts:
            own = [path for path, owner in owners.items() if owner == part]
            found = own
            if part.pattern is not None:
                found = [path for path in leaves if _is_of(path, part)]
            row = {
                "pattern": part.pattern or DEFAULT,
                "parameters": len(own),
                "entries": sum(leaves[path].size for path in own),
                "frozen": part.is_frozen,
                "left": len(found) - len(own),
            }
            rows.append(row)
        return rows

    def _owners(self, params: Any) -> dict[str, Any]:
        """Return the part of each parameter by its path; None: it has none."""
        owners: dict[str, Any] = {}
        for path in by_path(params):
            fitting = (part for part in self.parts if _is_of(path, part))
            owners[path] = next(fitting, None)
        return owners


# ---- what a train step asks ----


def parts_of(given: Any, params: Any) -> list[dict[str, Any]]:
    """Return the table of an optimizer's parts; empty where it has none."""
    return given.table(params) if isinstance(given, Parts) else []


def check_parts(given: Any, params: Any) -> None:
    """Check that the parts of a recipe's optimizer fit the model's parameters.

    Raises:
      RecipeError: see `Parts.check`.
    """
    for parts in _parts_in(given):
        parts.check(params)


def frozen_of(given: Any, params: Any) -> set[str]:
    """Return the paths of parameters that a recipe's optimizer never moves."""
    if isinstance(given, Parts):
        return given.frozen(params)
    if isinstance(given, Switchable):
        each = [frozen_of(make, params) for make in given.makers]
        return set.intersection(*each)
    return set()


def without_frozen(given: Any, params: Any) -> Any:
    """Return parameters of which the frozen ones are constants for a gradient."""
    frozen = frozen_of(given, params)
    if not frozen:
        return params
    leaves = [
        jax.lax.stop_gradient(leaf) if path in frozen else leaf
        for path, leaf in by_path(params).items()
    ]
    return with_leaves(params, leaves)


def holding(optimizer: Optimizer, given: Any) -> Optimizer:
    """Return an optimizer whose updates leave frozen parameters alone, to the bit.

    Args:
      optimizer: made of `given`.
      given: the recipe's.
    """
    if not _parts_in(given):
        return optimizer

    def update(
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        knobs: Mapping[str, Any],
        value: Any,
        finish: Callable[[Any, Any], Any] = unchanged,
    ) -> Any:
        frozen = frozen_of(given, params)

        def held(before: Any, after: Any) -> Any:
            own = by_path(before)
            leaves = [
                own[path] if path in frozen else leaf
                for path, leaf in by_path(after).items()
            ]
            kept = with_leaves(after, leaves)
            return finish(before, kept)

        return optimizer.update(
            gradients,
            state,
            params,
            knobs,
            value,
            held,
        )

    return optimizer._replace(update=update)


# ---- internals ----


def _parts_in(given: Any) -> list[Parts]:
    makers = given.makers if isinstance(given, Switchable) else (given,)
    return [make for make in makers if isinstance(make, Parts)]


def _check_given(pattern: str, given: Any) -> None:
    if isinstance(given, str) and given != FROZEN:
        raise RecipeError(
            f"the part {pattern!r} is {given!r}{nearest(given, [FROZEN])}",
            where=WHERE,
            remedy='give an optimizer, or "frozen"',
        )
    if isinstance(given, str) or is_transformation(given) or callable(given):
        return
    raise RecipeError(
        f"the part {pattern!r} is a {type(given).__name__}",
        where=WHERE,
        remedy=(
            "give an Optax transformation such as optax.sgd(0.1), a function of the"
            ' learning rate such as optax.adamw, or "frozen"'
        ),
    )


def _as_optax(made: Any, part: Part) -> optax.GradientTransformation:
    """Return what a part gave as Optax's own type."""
    if isinstance(made, optax.GradientTransformation):
        return made
    if is_transformation(made):
        return optax.GradientTransformationExtraArgs(made.init, made.update)
    raise RecipeError(
        f"the part {part.label!r} returned a {type(made).__name__}, not an Optax"
        " transformation",
        where=WHERE,
        remedy="give a function of the learning rate, e.g. optax.adamw",
    )


def _label(pattern: str, others: list[Part]) -> str:
    """Return a name without "/", which divides paths; no other part has it."""
    label = pattern.replace("/", ".")
    taken = {part.label for part in others} | {DEFAULT}
    while label in taken:
        label += "'"
    return label


def _is_of(path: str, part: Part) -> bool:
    return part.pattern is None or matches(path, part.pattern)


def _folders(paths: list[str]) -> list[str]:
    """Return patterns that would match something: the paths, and "folder/*" of each."""
    folders = {f"{path.rpartition('/')[0]}/*" for path in paths if "/" in path}
    tops = {f"{path.partition('/')[0]}/*" for path in paths if "/" in path}
    return [*sorted(folders | tops), *paths]


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(paths[:LISTED]) + more


def _common(each: list[dict[str, float]]) -> dict[str, float]:
    """Return the entries that all of some dicts have alike."""
    if not each:
        return {}
    first, *others = each
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }
