"""The state of a checkpoint under a recipe that may differ from the one that wrote it.

A run is resumed, or a saved model is loaded, with a recipe that has another learning
rate, another optimizer or other policies. Parameters and variables have to fit. Of the
optimizer's and the controller's state, each element that fits is kept; the rest begins
anew. And a number that the recipe itself puts into the state, such as a base learning
rate, is the one that the recipe says now.

Example: AdamW's state is saved, and SGD with momentum is asked for:

    in the checkpoint           wanted                   what becomes of it
    params/a/kernel             params/a/kernel          kept
    optimizer/0/count                                    left in the checkpoint
    optimizer/0/mu/a/kernel                              left in the checkpoint
    optimizer/0/nu/a/kernel                              left in the checkpoint
                                optimizer/0/trace/...    begins anew
    controller/updates          controller/updates       kept
    controller/base/learning_rate                        as the recipe says now
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.errors import CheckpointError, nearest
from lepton_jax.trees import by_path, matches, path_of

# Fields of ControllerState whose parts stand alone under their names.
BY_NAME = ("base", "knobs", "fed")
# Fields of ControllerState that are copies of the parameters, or () without them.
COPIES = ("accumulated", "average", "kept", "anchor")
REPLACEABLE = ("optimizer/", "controller/")
WEIGHTS = ("params/", "variables/")
# where a controller keeps the averages of parameters and of variables
AVERAGES = {"params/": "controller/average/0/", "variables/": "controller/average/1/"}
# Counts of updates at which two schedules are compared: three a decade, up to a million
# (assumption: no two schedules that people use agree on all of these).
SCHEDULE_COUNTS = (
    *(0, 1, 2, 5),
    *(10, 20, 50),
    *(100, 200, 500),
    *(1_000, 2_000, 5_000),
    *(10_000, 20_000, 50_000),
    *(100_000, 200_000, 500_000),
    1_000_000,
)

Fits = Callable[[str, str], bool]


@dataclass
class Adoption:
    """The parts of a checkpoint that a state takes over.

    Attributes:
      sources: path in the wanted state to path in the checkpoint.
      anew: elements of the wanted state that begin anew, in words.
      left: elements of the checkpoint that nothing takes over, in words.
    """

    sources: dict[str, str] = field(default_factory=dict)
    anew: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = []
        if self.anew:
            parts.append(f"begins anew: {', '.join(dict.fromkeys(self.anew))}")
        if self.left:
            parts.append(f"left behind: {', '.join(dict.fromkeys(self.left))}")
        return "; ".join(parts)


def adopt(
    state: Any,
    stored: Sequence[str],
    fits: Fits,
    policies: Sequence[str],
    stored_policies: Sequence[str] | None,
) -> Adoption:
    """Decide where each leaf of a wanted state comes from.

    Args:
      state: the wanted `State`, of arrays or shapes.
      stored: paths of the checkpoint's leaves.
      fits: whether a wanted path (first) and a stored path have one shape and dtype.
      policies: names of the recipe's policies, in their order.
      stored_policies: names of the policies that the checkpoint was written with; None
        where that is not known.

    Returns:
      The sources of all leaves that are taken over. Leaves outside of optimizer and
      controller are taken over as they are, whether they fit or not: the restore
      compares their shapes.
    """
    match = _Match(state, stored, fits)
    match.adopt_params()
    match.adopt_optimizer()
    match.adopt_controller(policies, stored_policies)
    match.note_left()
    return match.adoption


class Fresh:
    """Patterns of parameters and variables that begin anew where a model is loaded.

    Args:
      patterns: as in a shell, of paths as `trainer.trace` lists them: "head/*".
    """

    def __init__(self, patterns: Iterable[str]):
        self.patterns = tuple(patterns)

    def __call__(self, path: str) -> bool:
        """Whether a leaf of a state begins anew: "params/head/kernel"."""
        return any(_matches_weight(path, pattern) for pattern in self.patterns)

    def check(self, wanted: Iterable[str], stored: Iterable[str]) -> None:
        """Check that each pattern matches something of the model or the checkpoint.

        Raises:
          CheckpointError: one does not; the nearest path is named.
        """
        paths = dict.fromkeys([*wanted, *stored])
        weights = [path for path in paths if path.startswith(WEIGHTS)]
        for pattern in self.patterns:
            if any(_matches_weight(path, pattern) for path in weights):
                continue
            names = [path.partition("/")[2] for path in weights]
            tops = [f"{name.partition('/')[0]}/*" for name in names if "/" in name]
            raise CheckpointError(
                f"fresh={pattern!r} matches nothing of the model"
                f"{nearest(pattern, dict.fromkeys([*tops, *names]))}",
                where="Trainer.load",
                remedy=f"name parameters of it: {', '.join(dict.fromkeys(tops))}",
            )


def adopt_weights(
    state: Any,
    stored: Sequence[str],
    fresh: Fresh,
) -> Adoption:
    """Take over parameters and variables alone, for a run that begins with them.

    Where the checkpoint has averages of them, which are what was evaluated and served,
    it is these.

    Args:
      state: the wanted `State`, of arrays or shapes.
      stored: paths of the checkpoint's leaves.
      fresh: those that begin anew.
    """
    adoption = Adoption()
    available = set(stored)
    for path, leaf in by_path(state).items():
        if not path.startswith(WEIGHTS) or leaf.size == 0:
            continue
        if fresh(path):
            adoption.anew.append(path.partition("/")[2])
            continue
        top = path.partition("/")[0] + "/"
        average = AVERAGES[top] + path.removeprefix(top)
        adoption.sources[path] = average if average in available else path
    for path in stored:
        if path.startswith(WEIGHTS) and fresh(path):
            adoption.left.append(path.partition("/")[2])
    return adoption


def recipe_values(state: Any) -> dict[str, float]:
    """Return the numbers that a recipe puts into its first state, by path.

    They are the scalars of optimizer and controller before the first step: bases of
    knobs, injected hyperparameters, what a policy begins with. Training may move them;
    the checkpoint remembers what they were when the recipe gave them.

    Args:
      state: a `State` before its first step.
    """
    parts = {"optimizer": state.optimizer, "controller": state.controller}
    return named_recipe_values(by_path(parts))


def named_recipe_values(leaves: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars among leaves, by path; see `recipe_values`."""
    scalars = {
        path: leaf
        for path, leaf in leaves.items()
        if is_number(leaf) and not path.startswith("controller/fed/")
    }
    on_host = jax.device_get(scalars)
    return {path: float(value) for path, value in on_host.items()}


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a real scalar, and no random key."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    return jnp.shape(leaf) == () and not jnp.iscomplexobj(leaf)


def schedule_values(rate: Callable[[Any], Any]) -> list[float]:
    """Return the values of a schedule at some counts of updates.

    They tell it from other schedules.
    """
    counts = jnp.asarray(SCHEDULE_COUNTS, jnp.int32)

    @jax.jit
    def values() -> list[Any]:
        return [jnp.float32(rate(count)) for count in counts]

    on_host = jax.device_get(values())
    return [float(value) for value in on_host]


def changed_values(
    now: Mapping[str, float],
    then: Mapping[str, float] | None,
    saved: Mapping[str, float],
    kept: Sequence[str],
) -> dict[str, float]:
    """Return the numbers of a restored state that have to become the recipe's.

    Args:
      now: `recipe_values` of the recipe.
      then: `recipe_values` of the recipe that the checkpoint was written with; None for
        a checkpoint that does not tell.
      saved: the numbers in the restored state.
      kept: paths of numbers that a person set while the run went on, and that stay
        where the recipe says the same as before.

    Returns:
      Path to number. A value that training has moved stays as it is, as long as the
      recipe says the same as before.
    """
    changes = {}
    for path, value in now.items():
        if path not in saved or _same(saved[path], value):
            continue
        if then is None:
            # an older checkpoint: only what training never moves can be compared
            fixed = path.startswith("controller/base/") or "/hyperparams/" in path
            if fixed and path not in kept:
                changes[path] = value
        elif path not in then or not _same(then[path], value):
            changes[path] = value
    return changes


# ---- internals ----


def _elements(state: Any) -> dict[str, list[str]]:
    """Return the names of leaves by the element that they belong to.

    An element is one NamedTuple or dataclass, such as optax.ScaleByAdamState: its parts
    mean something together only. A leaf belongs to the innermost one around it.
    """
    elements: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if leaf.size == 0:
            continue  # no checkpoint holds it
        attributes = [
            depth
            for depth, key in enumerate(path)
            if isinstance(key, jax.tree_util.GetAttrKey)
        ]
        # The state itself is the outermost dataclass: its fields are elements.
        depth = max(attributes[-1], 1) if len(path) > 1 else 0
        prefix = path_of(path[:depth]) or ""
        elements.setdefault(prefix, []).append(path_of(path[depth:]))
    return elements


def _matches_weight(path: str, pattern: str) -> bool:
    top, _, name = path.partition("/")
    return f"{top}/" in WEIGHTS and matches(name, pattern)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _fields(
    paths: Iterable[str],
    prefix: str,
) -> set[str]:
    """Return the first parts of the paths below a prefix."""
    start = f"{prefix}/"
    below = [path.removeprefix(start) for path in paths if path.startswith(start)]
    return {path.split("/")[0] for path in below}


class _Match:
    """The elements of a wanted state, and the leaves of a checkpoint for them.

    Args:
      state: the wanted one.
      stored: paths of the checkpoint's leaves.
      fits: whether a wanted and a stored path have one shape and dtype.

    Attributes:
      adoption: the decisions so far.
    """

    def __init__(
        self,
        state: Any,
        stored: Sequence[str],
        fits: Fits,
    ):
        self.adoption = Adoption()
        self._available = set(stored)
        self._fits = fits
        self._elements = _elements(state)
        self._wanted = [
            _joined(prefix, name)
            for prefix, names in self._elements.items()
            for name in names
        ]

    def adopt_params(self) -> None:
        """Take over everything outside of optimizer and controller."""
        for path in self._wanted:
            if not path.startswith(REPLACEABLE):
                self.adoption.sources[path] = path

    def adopt_optimizer(self) -> None:
        """Take over each element of the optimizer that is there as a whole."""
        moved = {}
        for prefix, names in self._elements.items():
            if not _is_optimizer(prefix):
                continue
            if self._is_whole(prefix, names, prefix):
                self._adopt_element(prefix, names, prefix)
            else:
                moved[prefix] = names

        # An element may stand elsewhere: a chain with one member more moves the others.
        for prefix, names in moved.items():
            places = self._places(prefix, names)
            if len(places) == 1:
                self._adopt_element(prefix, names, places.pop())
            else:
                tops = dict.fromkeys(name.split("/")[0] for name in names)
                self.adoption.anew.append(f"{prefix} ({', '.join(tops)})")

    def _adopt_element(
        self,
        prefix: str,
        names: Sequence[str],
        source: str,
    ) -> None:
        for name in names:
            self.adoption.sources[_joined(prefix, name)] = _joined(source, name)

    def _is_whole(
        self,
        prefix: str,
        names: Sequence[str],
        source: str,
    ) -> bool:
        """Whether an element stands in the checkpoint at `source`, and fits."""
        stored_fields = _fields(self._available, source)
        if stored_fields != _fields(self._wanted, prefix):
            return False
        for name in names:
            stored = _joined(source, name)
            if stored not in self._available:
                return False
            wanted = _joined(prefix, name)
            if not self._fits(wanted, stored):
                return False
        return True

    def _places(
        self,
        prefix: str,
        names: Sequence[str],
    ) -> set[str]:
        """Places of the checkpoint at which an element stands that nothing took yet."""
        end = f"/{names[0]}"
        taken = set(self.adoption.sources.values())
        free = self._available - taken
        places = {
            path.removesuffix(end)
            for path in free
            if path.startswith("optimizer/") and path.endswith(end)
        }
        return {place for place in places if self._is_whole(prefix, names, place)}

    def adopt_controller(
        self,
        policies: Sequence[str],
        stored_policies: Sequence[str] | None,
    ) -> None:
        """Take over each part of the controller that is there as a whole.

        A policy is found by its name, wherever it stood among the others.

        Args:
          policies: names of the recipe's, in their order.
          stored_policies: names of the checkpoint's; None: not known.
        """
        groups: dict[tuple[str, ...], list[str]] = {}
        for path in self._wanted:
            if path.startswith("controller/"):
                groups.setdefault(_group(path), []).append(path)

        are_other = stored_policies is not None and [*stored_policies] != [*policies]
        for (part, *rest), paths in groups.items():
            source = "/".join(["controller", part, *rest])
            if part == "policies" and stored_policies is not None:
                name = policies[int(rest[0])]
                if name not in stored_policies:
                    self.adoption.anew.append(f"policy {name}")
                    continue
                source = f"controller/policies/{[*stored_policies].index(name)}"
            if part == "contributions" and are_other:
                continue
            start = "/".join(["controller", part, *rest])
            sources = {path: source + path.removeprefix(start) for path in paths}
            if self._is_whole_group(source, sources):
                self.adoption.sources |= sources
            elif part in (*COPIES, "signals", "policies", "base"):
                words = _part_in_words(part, rest, policies)
                self.adoption.anew.append(words)

    def _is_whole_group(
        self,
        source: str,
        sources: Mapping[str, str],
    ) -> bool:
        stored = {
            path
            for path in self._available
            if path == source or path.startswith(f"{source}/")
        }
        if stored != set(sources.values()):
            return False
        return all(self._fits(path, place) for path, place in sources.items())

    def note_left(self) -> None:
        """Note the elements of the checkpoint that nothing takes over."""
        taken = set(self.adoption.sources.values())
        for path in sorted(self._available - taken):
            top, *rest = path.split("/")
            if top == "optimizer":
                self.adoption.left.append("/".join(["optimizer", *rest[:2]]))
            elif top == "controller" and rest[0] in ("base", "policies", *COPIES):
                shown = rest[:2] if rest[0] == "base" else rest[:1]
                self.adoption.left.append("/".join(["controller", *shown]))


def _is_optimizer(prefix: str) -> bool:
    return prefix == "optimizer" or prefix.startswith("optimizer/")


def _group(path: str) -> tuple[str, ...]:
    """Return the part of a controller's state that is taken over whole or not at all.

    >>> _group("controller/base/learning_rate")
    ('base', 'learning_rate')
    >>> _group("controller/anchor/params/a/kernel")
    ('anchor',)
    """
    _, part, *rest = path.split("/")
    if part in (*BY_NAME, "signals", "policies"):
        return part, rest[0]
    return (part,)


def _part_in_words(
    part: str,
    rest: Sequence[str],
    policies: Sequence[str],
) -> str:
    if part == "policies":
        return f"policy {policies[int(rest[0])]}"
    if part == "signals":
        return f"signal {rest[0]}"
    if part == "base":
        return f"knob {rest[0]}"
    return f"controller's {part}"


def _same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))
