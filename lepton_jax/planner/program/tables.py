"""The embeddings of a recipe that are updated by rows.

Two kinds are. Those under an optimizer that a person has marked (`optimizers.rowwise`)
always are, so that what a run computes does not depend on sizes. Large ones are where
that changes nothing, because the optimizer leaves rows without a gradient as they are.

What stands against it is never passed over: of a marked embedding it is an error, or a
note of the plan where the mark says so; of a large one it is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax

from lepton_jax.augment import step_key
from lepton_jax.compat import ClosedJaxpr
from lepton_jax.controller import Controller
from lepton_jax.errors import RecipeError
from lepton_jax.step import optimizers
from lepton_jax.step.embeddings import (
    Table,
    Tables,
    Use,
    Verdict,
    followed,
    looked_up,
    slots_for,
    tried,
    uses,
)
from lepton_jax.step.state import State
from lepton_jax.trees import by_path, nbytes

# bytes from which on an embedding is updated by rows though nobody asked; assumption
LARGE = 2**24
# rows by slots from which on it is; assumption
SPARSE = 4
# parameter names in a message; assumption
LISTED = 4
# rows and slots are numbered in int32
MOST = 2**31 - 1

# signals that are measured on all entries of the parameters
OF_ALL = ("parameter_norm", "parameter_rms", "update_worth")


class Found(NamedTuple):
    """What the program of a training loss says of a table.

    Attributes:
      use: how the loss uses it.
      lookups: ids that a batch looks up.
      depends: what its ids depend on in a way that can't be followed, in words; or "".
    """

    use: Use
    lookups: int
    depends: str


def find_tables(
    controller: Controller,
    state: State,
    loss: Callable,
    batch: tuple[Any, Any],
    forward: ClosedJaxpr,
) -> Tables:
    """Return the embeddings of a recipe that are updated by rows.

    Args:
      controller: the recipe and its policies.
      state: shapes of the state.
      loss: the training loss of one micro-batch, see `training_loss.whole_loss`.
      batch: shapes of inputs and targets.
      forward: a program of the parameters, among others, that looks up what the loss
        does. It spares tracing the loss where no table is large.

    Raises:
      RecipeError: an embedding that is marked can't be; or a row-wise optimizer has no
        embedding.
    """
    params = by_path(state.params)
    marks = optimizers.marked(state.optimizer)
    by_use = zip(
        params,
        uses(forward.jaxpr, len(params)),
        strict=True,
    )
    large = [
        path
        for path, use in by_use
        if use.lookups
        and nbytes(params[path]) >= LARGE
        and _is_sparse(params[path], use.ids)
    ]
    candidates = list(dict.fromkeys([*marks, *large]))
    if not candidates:
        return Tables()

    knobs = controller.forward_knobs(state.controller)
    make = partial(
        step_key,
        controller.recipe.preprocess,
        part=0,
    )
    key = jax.eval_shape(lambda key: make(key, key), state.key)
    args = (state.variables, key, *batch, knobs)
    found = _looked_through(
        controller,
        loss,
        state,
        args,
        candidates,
    )
    if marks and not any(found[path].use.lookups for path in marks):
        raise RecipeError(
            "the optimizer is row-wise, but the model looks no rows up in its"
            f" parameters: {', '.join(list(marks)[:LISTED])}",
            where="Recipe.optimizer",
            remedy="leave lepton.optimizers.rowwise out, or give it the embeddings",
        )
    wanted = [
        path
        for path in candidates
        if found[path].use.lookups
        and (path in marks or _is_sparse(params[path], found[path].lookups))
    ]
    return _judged(
        controller,
        state,
        marks,
        wanted,
        found,
    )


# ---- internals ----


def _is_sparse(
    leaf: Any,
    lookups: int,
) -> bool:
    return leaf.shape[0] >= SPARSE * slots_for(lookups, leaf.shape[0])


def _judged(
    controller: Controller,
    state: State,
    marks: dict[str, str],
    wanted: list[str],
    found: dict[str, Found],
) -> Tables:
    """Return those of some embeddings that can be updated by rows."""
    params = by_path(state.params)
    against = {
        path: _against(
            controller,
            state,
            path,
            found[path],
        )
        for path in wanted
    }
    able = [path for path in wanted if not against[path]]
    verdicts = tried(
        controller.optimizer,
        state.params,
        state.optimizer,
        able,
    )
    tables = {}
    hints: list[str] = []
    refused: list[str] = []
    for path in wanted:
        size = params[path].shape[0]
        slots = slots_for(found[path].lookups, size)
        verdict = verdicts.get(path)
        why = against[path]
        if verdict is Verdict.UNFIT:
            why = "the optimizer's update of a row depends on other rows"
        if not why and (path in marks or verdict is Verdict.EXACT):
            tables[path] = Table(
                path,
                size,
                slots,
                verdict is Verdict.LAZY,
            )
        elif path in marks and marks[path] == "error":
            raise _refused(path, why)
        else:
            notes = refused if path in marks else hints
            notes.append(_note(path, size, slots, why))
    return Tables(tables, tuple(hints), tuple(refused))


def _refused(
    path: str,
    why: str,
) -> RecipeError:
    return RecipeError(
        f"the embedding {path} can't be updated by rows: {why}",
        where="Recipe.optimizer",
        remedy=(
            "change that, or give lepton.optimizers.rowwise(..., otherwise='dense') to"
            " update the whole embedding in each step"
        ),
    )


def _note(
    path: str,
    size: int,
    slots: int,
    why: str,
) -> str:
    text = (
        f"{path}: each step updates all {size:,} rows, of which it looks up"
        f" {min(slots, size):,} at the most"
    )
    if why:
        return f"{text}, because {why}"
    return f"{text}; lepton.optimizers.rowwise would update these alone"


def _against(
    controller: Controller,
    state: State,
    path: str,
    found: Found,
) -> str:
    """Return what stands against updating an embedding by rows; "" if nothing does."""
    size = by_path(state.params)[path].shape[0]
    if found.use.others:
        return found.use.others[0]
    if found.depends:
        return found.depends
    if size + slots_for(found.lookups, size) > MOST:
        return f"its rows can't be numbered up to {MOST:,}"
    if isinstance(controller.recipe.optimizer, optimizers.Switchable):
        return "an optimizer that takes over begins anew, in all of its rows"
    params = by_path(state.params)
    for copy, leaf in by_path({"controller": state.controller}).items():
        if leaf.ndim and followed(copy, params) == path:
            return (
                f"a policy keeps an array for all of its rows ({copy}):"
                f" {_policies(controller)}"
            )
    for name in controller.signals.watched:
        if name.partition("/")[0] in OF_ALL:
            return f"a policy watches {name}, which is measured on all of its rows"
    return ""


def _policies(controller: Controller) -> str:
    return ", ".join(policy.name for policy in controller.policies)


def _looked_through(
    controller: Controller,
    loss: Callable,
    state: State,
    args: tuple,
    candidates: Iterable[str],
) -> dict[str, Found]:
    """Return how the training loss uses some parameters."""
    program = jax.make_jaxpr(loss)(state.params, *args).jaxpr
    params = by_path(state.params)
    by_use = dict(
        zip(
            params,
            uses(program, len(params)),
            strict=True,
        )
    )

    found = {}
    for path in candidates:
        use = by_use[path]
        lookups = 0
        depends = ""
        if use.lookups and not use.others:
            table = Table(
                path,
                params[path].shape[0],
                0,
                lazy=False,
            )
            only = Tables({path: table})
            ids, _, used = looked_up(loss, only, state.params, args)
            lookups = sum(result.aval.size for result in ids.jaxpr.outvars)
            depends = _dependence(
                controller,
                program,
                state,
                used,
            )
        found[path] = Found(use, lookups, depends)
    return found


def _dependence(
    controller: Controller,
    program: Any,
    state: State,
    used: list[bool],
) -> str:
    """Return what ids depend on that can't be known before the step; "" if nothing.

    Args:
      controller: the recipe.
      program: the jaxpr of the training loss.
      state: shapes of the state.
      used: whether the ids depend on each input of the program.
    """
    params = len(jax.tree.leaves(state.params))
    names = list(by_path(state.variables))
    if any(used[:params]):
        return "the ids that are looked up depend on the parameters"
    if controller.recipe.micro_batches == 1:
        return ""
    before = program.invars[params : params + len(names)]
    after = program.outvars[len(program.outvars) - len(names) :]
    pairs = zip(
        names,
        before,
        after,
        used[params:],
        strict=False,
    )
    for name, old, new, needed in pairs:
        if needed and old is not new:
            return (
                f"the ids that are looked up depend on the variable {name}, which each"
                " micro-batch changes (micro_batches=1 in the recipe allows it)"
            )
    return ""
