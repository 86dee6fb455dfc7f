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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.trees import by_path, path_of

# Fields of ControllerState whose parts stand alone under their names.
BY_NAME = ("base", "knobs", "fed")
# Fields of ControllerState that are copies of the parameters, or () without them.
COPIES = ("accumulated", "average", "anchor")
REPLACEABLE = ("optimizer/", "controller/")
# Counts of updates at which two schedules are compared: three a decade, up to a
# million.
SCHEDULE_COUNTS = (
    0,
    *(m * 10**e for e in range(6) for m in (1, 2, 5)),
    10**6,
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
      controller are taken over as they are, whether they fit or not: whoever restores
      them compares their shapes.
    """
    found = Adoption()
    available = set(stored)
    elements = _elements(state)

    for prefix, names in elements.items():
        paths = [_joined(prefix, name) for name in names]
        found.sources |= {p: p for p in paths if not p.startswith(REPLACEABLE)}

    _adopt_optimizer(found, elements, available, fits)
    _adopt_controller(found, elements, available, fits, policies, stored_policies)
    _note_left(found, available)
    return found


def recipe_values(state: Any) -> dict[str, float]:
    """Numbers that a recipe puts into its first state, by path.

    They are the scalars of optimizer and controller before the first step: bases of
    knobs, injected hyperparameters, what a policy begins with. Training may move them;
    the checkpoint remembers what they were when the recipe gave them.

    Args:
      state: a `State` before its first step.
    """
    parts = {"optimizer": state.optimizer, "controller": state.controller}
    return named_recipe_values(by_path(parts))


def named_recipe_values(leaves: Mapping[str, Any]) -> dict[str, float]:
    """The same from leaves by path, of which only scalars count."""
    scalars = {
        path: leaf
        for path, leaf in leaves.items()
        if is_number(leaf) and not path.startswith("controller/fed/")
    }
    return {path: float(value) for path, value in jax.device_get(scalars).items()}


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a real scalar, and no random key."""
    extended = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    return jnp.shape(leaf) == () and not extended and not jnp.iscomplexobj(leaf)


def schedule_values(rate: Callable[[Any], Any]) -> list[float]:
    """Values of a schedule at some counts of updates: by them it is told from
    others.
    """
    counts = jnp.asarray(SCHEDULE_COUNTS, jnp.int32)
    values = jax.jit(lambda: [jnp.float32(rate(count)) for count in counts])()
    return [float(value) for value in jax.device_get(values)]


def changed_values(
    now: Mapping[str, float],
    then: Mapping[str, float] | None,
    saved: Mapping[str, float],
    kept: Sequence[str],
) -> dict[str, float]:
    """Numbers of a restored state that have to become what the recipe says now.

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
    """Names of leaves by the element that they belong to.

    An element is one NamedTuple or dataclass, such as optax.ScaleByAdamState: its parts
    mean something together only. A leaf belongs to the innermost one around it.
    """
    elements: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if leaf.size == 0:
            continue  # no checkpoint holds it
        depth = max(
            i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)
        )
        # the state itself is the outermost dataclass: its fields are elements
        depth = max(depth, 1) if len(path) > 1 else 0
        prefix = path_of(path[:depth])
        name = path_of(path[depth:])
        prefix = prefix if prefix else ""
        elements.setdefault(prefix, []).append(name)
    return elements


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _fields(paths: set[str], prefix: str) -> set[str]:
    """First parts of the paths below a prefix."""
    start = f"{prefix}/"
    return {
        path[len(start) :].split("/")[0] for path in paths if path.startswith(start)
    }


def _adopt_optimizer(
    found: Adoption,
    elements: dict[str, list[str]],
    available: set[str],
    fits: Fits,
) -> None:
    wanted = {
        _joined(prefix, name) for prefix, names in elements.items() for name in names
    }
    mine = {p: names for p, names in elements.items() if _is_optimizer(p)}
    moved = {}

    def whole(
        prefix: str,
        names: list[str],
        source: str,
    ) -> bool:
        alike = _fields(available, source) == _fields(wanted, prefix)
        return alike and all(
            _joined(source, name) in available
            and fits(_joined(prefix, name), _joined(source, name))
            for name in names
        )

    for prefix, names in mine.items():
        if whole(prefix, names, prefix):
            found.sources |= {_joined(prefix, n): _joined(prefix, n) for n in names}
        else:
            moved[prefix] = names

    # An element may stand elsewhere: a chain with one member more moves the others.
    taken = set(found.sources.values())
    for prefix, names in moved.items():
        places = {
            path[: -len(names[0]) - 1]
            for path in available - taken
            if path.startswith("optimizer/") and path.endswith(f"/{names[0]}")
        }
        places = {place for place in places if whole(prefix, names, place)}
        if len(places) == 1:
            place = places.pop()
            found.sources |= {_joined(prefix, n): _joined(place, n) for n in names}
            taken |= {_joined(place, n) for n in names}
        else:
            tops = dict.fromkeys(name.split("/")[0] for name in names)
            found.anew.append(f"{prefix} ({', '.join(tops)})")


def _is_optimizer(prefix: str) -> bool:
    return prefix == "optimizer" or prefix.startswith("optimizer/")


def _adopt_controller(
    found: Adoption,
    elements: dict[str, list[str]],
    available: set[str],
    fits: Fits,
    policies: Sequence[str],
    stored_policies: Sequence[str] | None,
) -> None:
    wanted = [
        _joined(prefix, name)
        for prefix, names in elements.items()
        for name in names
        if _joined(prefix, name).startswith("controller/")
    ]
    if not wanted:
        return
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in wanted:
        groups.setdefault(_group(path), []).append(path)
    same_policies = stored_policies is None or list(stored_policies) == list(policies)

    for (part, *rest), paths in groups.items():
        source = "/".join(["controller", part, *rest])
        if part == "policies" and stored_policies is not None:
            name = policies[int(rest[0])]
            if name not in stored_policies:
                found.anew.append(f"policy {name}")
                continue
            source = f"controller/policies/{list(stored_policies).index(name)}"
        if part == "contributions" and not same_policies:
            continue
        start = "/".join(["controller", part, *rest])
        sources = {path: source + path[len(start) :] for path in paths}
        stored = {p for p in available if p == source or p.startswith(f"{source}/")}
        whole = stored == set(sources.values())
        if whole and all(fits(path, place) for path, place in sources.items()):
            found.sources |= sources
        elif part in COPIES or part in ("signals", "policies"):
            found.anew.append(_described(part, rest, policies))
        elif part == "base":
            found.anew.append(f"knob {rest[0]}")


def _group(path: str) -> tuple[str, ...]:
    """The part of a controller's state that is taken over as a whole or not at all."""
    _, part, *rest = path.split("/")
    if part in (*BY_NAME, "signals", "policies"):
        return part, rest[0]
    return (part,)


def _described(
    part: str,
    rest: Sequence[str],
    policies: Sequence[str],
) -> str:
    if part == "policies":
        return f"policy {policies[int(rest[0])]}"
    if part == "signals":
        return f"signal {rest[0]}"
    return f"controller's {part}"


def _note_left(found: Adoption, available: set[str]) -> None:
    taken = set(found.sources.values())
    for path in sorted(available - taken):
        first, *rest = path.split("/")
        if first == "optimizer":
            found.left.append("/".join(["optimizer", *rest[:2]]))
        elif first == "controller" and rest[0] in ("base", "policies", *COPIES):
            found.left.append(
                "/".join(["controller", *rest[: 1 + (rest[0] == "base")]])
            )


def _same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))
