"""The turns of a pipeline: see `stages` for what it is.

>>> clock = Clock(Stages(count=2, parts=4, chunks=2))
>>> clock.stages.turns
9
>>> [(clock.part(u), clock.chunk(u)) for u in range(8)]
[(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lepton_jax.compat import ClosedJaxpr, Jaxpr, scan_counts
from lepton_jax.planner.rewrite.program import (
    NAMED_PARTS,
    Env,
    bind,
    called,
    operands_of,
    parts,
    run,
)
from lepton_jax.planner.rewrite.stage_moves import (
    as_parts,
    by_layer,
    by_stage,
    in_parts,
    in_rounds,
    pick,
    place,
    roll,
    whole,
)

# The name of a projection's result in a stage, by which rematerialization knows it:
# mapped over stages, a projection looks like any product with a batch dim.
PROJECTION = "stage_projection"

# calls whose insides are rematerialized
REMADE = ("checkpoint", "remat2")

# operations whose numbers depend on the place in their result
RANDOM = ("random_bits", "random_split", "rng_bit_generator")


@dataclass(frozen=True)
class Stages:
    """The pipeline of a stack of layers.

    Attributes:
      count: stages; 1: there is no pipeline.
      parts: micro-batches in flight, in which the samples pass through the stages.
      chunks: runs of layers of a stage.
      groups: runs of samples that have micro-batches of their own (`in_parts`).
    """

    count: int = 1
    parts: int = 1
    chunks: int = 1
    groups: int = 1

    @property
    def turns(self) -> int:
        """Turns in which all micro-batches pass through all stages."""
        return self.parts * self.chunks + self.count - 1

    @property
    def bubble(self) -> float:
        """Share of the stages' work that nobody reads."""
        return (self.count - 1) / self.turns


NO_STAGES = Stages()


class Stack(NamedTuple):
    """A scan over layers, as it is for a whole batch and for a micro-batch.

    Attributes:
      whole: the equation for the batch.
      part: that for a micro-batch.
      consts: for each constant of the loop, whether it holds samples.
      results: for each stacked result, whether it holds samples.
    """

    whole: Any
    part: Any
    consts: tuple[bool, ...]
    results: tuple[bool, ...]

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.whole.params["length"]


class Clock(NamedTuple):
    """The place of micro-batches in a pipeline.

    At turn t, stage s is t - s turns *behind* its first one. Micro-batches go around in
    groups: with chunks as many as there are stages, else all of them.
    """

    stages: Stages

    @property
    def group(self) -> int:
        """Micro-batches that go around together."""
        return self.stages.count if self.stages.chunks > 1 else self.stages.parts

    @property
    def _around(self) -> int:
        return self.group * self.stages.chunks

    def part(self, behind: Any) -> Any:
        """Return the micro-batch at a stage; any one in the bubble."""
        number = behind // self._around * self.group + behind % self.group
        return number % self.stages.parts

    def chunk(self, behind: Any) -> Any:
        """Return the chunk that a stage computes."""
        return behind % self._around // self.group

    def works(self, behind: Any) -> Any:
        """Return whether somebody reads what a stage computes."""
        return (behind >= 0) & (behind < self.stages.parts * self.stages.chunks)

    def behind(self) -> np.ndarray:
        """Return when micro-batches pass through chunks: (chunks, parts)."""
        chunk = np.arange(self.stages.chunks)[:, None]
        part = np.arange(self.stages.parts)
        before = part // self.group * self._around
        return before + chunk * self.group + part % self.group


# ---- random numbers of a layer ----


@dataclass(frozen=True)
class Draws:
    """Random numbers of a layer, one for each sample.

    Attributes:
      wholes: by the id of a micro-batch's equation, the one for the batch.
      can_be_taken_apart: whether a micro-batch can take its own from those of a batch.
    """

    wholes: dict[int, Any]
    can_be_taken_apart: bool


def draws(whole: Any, part: Any) -> Draws:
    """Find the random numbers of a stack's layer that differ with the samples.

    Args:
      whole: the scan for a batch.
      part: that for a micro-batch.
    """
    reached: dict[int, Any] = {}
    bodies = whole.params["jaxpr"].jaxpr, part.params["jaxpr"].jaxpr
    every = list(_differing(*bodies, inside=None))
    for eqn, other in _differing(*bodies, inside=(*REMADE, *NAMED_PARTS)):
        reached[id(other)] = eqn
    return Draws(reached, len(every) == len(reached))


def _differing(
    whole: Jaxpr,
    part: Jaxpr,
    inside: tuple[str, ...] | None,
) -> Iterator[tuple[Any, Any]]:
    """Yield the draws of a batch that a micro-batch has smaller.

    Args:
      whole: the program for a batch.
      part: for a micro-batch.
      inside: calls that are looked into; None: all.
    """
    for eqn, other in zip(whole.eqns, part.eqns, strict=False):
        name = eqn.primitive.name
        if name in RANDOM:
            pairs: Any = zip(eqn.outvars, other.outvars, strict=True)
            if any(a.aval.shape != b.aval.shape for a, b in pairs):
                yield eqn, other
        if inside is None or name in inside:
            for inner, smaller in zip(parts(eqn), parts(other), strict=False):
                yield from _differing(inner, smaller, inside)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class _Row:
    """A parameter of one layer, still among those of all layers of its stage.

    What is rematerialized takes it inside, so that the backward pass takes it again:
    kept, it would be there once for each turn.
    """

    layers: Any
    number: Any

    def taken(self) -> Any:
        """Return the parameter."""
        return jax.lax.dynamic_index_in_dim(self.layers, self.number, keepdims=False)

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        """Return its arrays."""
        return (self.layers, self.number), None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: tuple[Any, Any]) -> _Row:
        """Return it of its arrays."""
        return cls(*arrays)


class _Layer:
    """A layer of a stack, for a micro-batch at one stage."""

    def __init__(self, stack: Stack, stages: Stages, samples: int):
        self.program: ClosedJaxpr = stack.part.params["jaxpr"]
        self.stages = stages
        self.samples = samples
        self.first = sum(scan_counts(stack.part))
        self.wholes = draws(stack.whole, stack.part).wholes

    def run(self, part: Any, args: list[Any], number: Any) -> list[Any]:
        """Return what the layer computes.

        Args:
          part: number of the micro-batch.
          args: constants, activations and the layer's parameters.
          number: of the layer among those of the stage, if the parameters are theirs.
        """
        if number is not None:
            rows = [_Row(x, number) for x in args[self.first :]]
            args = [*args[: self.first], *rows]
        results = run(self.program, args, partial(self._rule, part))
        return [x.taken() if isinstance(x, _Row) else x for x in results]

    def _rule(self, part: Any, eqn: Any, env: Env) -> list[Any] | None:
        name = eqn.primitive.name
        operands = operands_of(eqn, env)
        rule = partial(self._rule, part)
        if name in NAMED_PARTS:
            return run(called(eqn), operands, rule)
        if name in REMADE:
            inside = ClosedJaxpr(eqn.params["jaxpr"], ())
            remade = jax.checkpoint(
                lambda *values: run(inside, values, rule),
                policy=eqn.params["policy"],
                prevent_cse=eqn.params["prevent_cse"],
            )
            return list(remade(*operands))
        operands = [x.taken() if isinstance(x, _Row) else x for x in operands]
        if id(eqn) in self.wholes:
            drawn = bind(self.wholes[id(eqn)], operands)
            shapes = [v.aval.shape for v in eqn.outvars]
            pairs = zip(drawn, shapes, strict=True)
            return [self._own(x, shape, part) for x, shape in pairs]
        if name == "dot_general" and not eqn.params["dimension_numbers"][1][0]:
            return [checkpoint_name(x, PROJECTION) for x in bind(eqn, operands)]
        return bind(eqn, operands)

    def _own(self, drawn: Any, shape: tuple[int, ...], part: Any) -> Any:
        """Return a micro-batch's part of what is drawn for the batch."""
        differing = [d for d, n in enumerate(shape) if n != drawn.shape[d]]
        for dim in differing:
            first = jnp.moveaxis(drawn, dim, 0)
            rows = (self.samples * self.stages.parts, -1)
            by_sample = first.reshape(*rows, *first.shape[1:])
            split = as_parts(by_sample, self.stages.parts, self.stages.groups)
            own = jax.lax.dynamic_index_in_dim(split, part, keepdims=False)
            own = own.reshape(shape[dim], *first.shape[1:])
            drawn = jnp.moveaxis(own, 0, dim)
        return drawn


# ---- the pipeline ----


class Pipeline:
    """A stack of layers as a scan over turns.

    Args:
      stack: the layers.
      stages: the pipeline, which divides them.
    """

    def __init__(self, stack: Stack, stages: Stages):
        """Make a pipeline."""
        self.stack = stack
        self.stages = stages
        self.clock = Clock(stages)
        self.consts, self.carried = scan_counts(stack.whole)
        first = stack.part.invars[self.consts]
        self.samples = first.aval.shape[0]
        self.layer = _Layer(stack, stages, self.samples)

    def rule(self, eqn: Any, env: Env) -> list[Any] | None:
        """Return the results of the stack, None for another equation."""
        if eqn is not self.stack.whole:
            return None
        return self._run(operands_of(eqn, env))

    def _run(self, operands: list[Any]) -> list[Any]:
        consts = operands[: self.consts]
        sliced = self.consts + self.carried
        entering = list(operands[self.consts : sliced])
        for x, holds_samples in zip(consts, self.stack.consts, strict=True):
            if holds_samples:
                entering.append(x)
        split = [self._split(x) for x in entering]
        layers = [self._by_stage(x) for x in operands[sliced:]]

        # In the bubble, stages compute with samples that are there: at zero, for
        # instance, a square root has no slope.
        held = [self._everywhere(x[0]) for x in split]
        fed = [self._fed(x) for x in split]
        turns = jnp.arange(self.stages.turns)
        turn = partial(self._turn, consts, layers)
        first = (held, self._no_sums())
        (_, sums), (left, kept) = jax.lax.scan(turn, first, (fed, turns))

        means = iter([self._mean(x) for x in sums])
        stacked = iter([self._in_turn(x) for x in kept])
        results = [self._joined(x) for x in left]
        for own in self.stack.results:
            results.append(next(stacked) if own else next(means))
        return results

    # ---- a turn ----

    def _turn(
        self,
        consts: list[Any],
        layers: list[Any],
        state: tuple[list[Any], list[Any]],
        inputs: tuple[list[Any], Any],
    ) -> tuple[Any, Any]:
        held, sums = state
        fed, turn = inputs
        entering = zip(held, fed, strict=True)
        held = [self._handed_on(x, new, turn) for x, new in entering]
        activations = held[: self.carried]
        moving = held[self.carried :]
        behind = turn - jnp.arange(self.stages.count)
        mapped = self._mapped(consts, moving, self.clock.part(behind))
        rows: Any = layers
        if self.stages.chunks > 1:
            mapped = self._of_chunk(mapped, layers, self.clock.chunk(behind))
            rows = jnp.arange(self._rounds)
        activations, results = jax.lax.scan(mapped, activations, rows)
        left = [pick(x, self.stages.count - 1) for x in activations]

        kept, sums = self._noted(results, sums, behind)
        return ([*activations, *moving], sums), (left, kept)

    def _noted(
        self,
        results: list[Any],
        sums: list[Any],
        behind: Any,
    ) -> tuple[list[Any], list[Any]]:
        """Return the layers' results that hold samples, and the sums of the others."""
        kept = []
        more = []
        for x, holds in zip(results, self.stack.results, strict=True):
            if holds:
                kept.append(x)
            else:
                more.append(self._read(x, behind))
        added = zip(sums, more, strict=True)
        return kept, [total + x for total, x in added]

    def _mapped(self, consts: list[Any], moving: list[Any], part: Any) -> Any:
        """Return the layer for all stages at once, as a scan takes it."""
        rest = iter(moving)
        holds = self.stack.consts
        pairs = zip(consts, holds, strict=True)
        constants = [next(rest) if own else x for x, own in pairs]
        places = [0 if own else None for own in holds]

        def layer(
            activations: list[Any],
            row: list[Any],
            number: Any = None,
        ) -> tuple[list[Any], list[Any]]:
            stage_dim = 0 if number is None else 1
            axes = [*places, *(0 for _ in activations), *(stage_dim for _ in row)]
            args = [*constants, *activations, *row]
            number_axis = None if number is None else 0
            at_a_stage = jax.vmap(self.layer.run, in_axes=(0, axes, number_axis))
            results = at_a_stage(part, args, number)
            return results[: self.carried], results[self.carried :]

        return layer

    def _handed_on(self, held: Any, new: Any, turn: Any) -> Any:
        """Return what each stage holds as a turn begins."""
        entering = place(new, 0, self.stages.count)
        if self.stages.chunks == 1:
            rolled = roll(held, 1)
            return rolled | entering if held.dtype == bool else rolled + entering
        stage = jax.lax.broadcasted_iota(jnp.int32, held.shape, 0)
        enters = (stage == 0) & (self.clock.chunk(turn) == 0)
        return jnp.where(enters, entering, roll(held, 1, wraps=True))

    @property
    def _rounds(self) -> int:
        """Layers of a chunk."""
        return self.stack.layers // self.stages.count // self.stages.chunks

    def _of_chunk(self, mapped: Any, layers: list[Any], chunk: Any) -> Any:
        """Return the layer as a scan over the layers of a chunk takes it."""

        def layer(activations: list[Any], number: Any) -> Any:
            return mapped(activations, layers, chunk * self._rounds + number)

        return layer

    def _read(self, results: Any, behind: Any) -> Any:
        """Return results of layers in the place of their chunk, zeros in a bubble."""
        chunks = jnp.arange(self.stages.chunks)[:, None]
        reads = (self.clock.chunk(behind) == chunks) & self.clock.works(behind)
        trailing = [1] * (results.ndim - 2)
        reads = reads.reshape(self.stages.chunks, 1, -1, *trailing)
        return jnp.where(reads, results[None], jnp.zeros_like(results[None]))

    # ---- samples ----

    def _split(self, x: Any) -> Any:
        """Return (micro-batches, samples, ...) of (samples, ...)."""
        return in_parts(x, self.stages.parts, self.stages.groups)

    def _joined(self, left: Any) -> Any:
        """Return (samples, ...) of what leaves at each turn."""
        last = self.stages.count - 1
        if self.stages.chunks == 1:
            x = left[last:]
        else:
            x = left[self.clock.behind()[-1] + last]
        return whole(x, self.stages.groups)

    def _fed(self, x: Any) -> Any:
        """Return what enters at each turn, of (micro-batches, ...)."""
        if self.stages.chunks > 1:
            return x[self.clock.part(np.arange(self.stages.turns))]
        again = -(-self.stages.turns // self.stages.parts) - 1
        unread = [jax.lax.stop_gradient(x)] * again
        return jnp.concatenate([x, *unread])[: self.stages.turns]

    def _everywhere(self, x: Any) -> Any:
        return jax.lax.stop_gradient(jnp.broadcast_to(x, (self.stages.count, *x.shape)))

    # ---- layers ----

    def _by_stage(self, x: Any) -> Any:
        """Return (rounds, stages, ...) of (layers, ...)."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return in_rounds(x, self.stages.count, self.stages.chunks)
        return by_stage(x, self.stages.count, self.stages.chunks)

    def _mean(self, sums: Any) -> Any:
        """Return (layers, ...): the mean over micro-batches.

        Args:
          sums: (chunks, layers of one, stages, ...).
        """
        total = by_layer(sums.reshape(-1, *sums.shape[2:]), self.stages.chunks)
        return total if self.stages.parts == 1 else total / self.stages.parts

    def _no_sums(self) -> list[Any]:
        sums = []
        results = self.stack.part.outvars[self.carried :]
        for variable, own in zip(results, self.stack.results, strict=True):
            if own:
                continue
            shape = (self.stages.chunks, self._rounds, self.stages.count)
            sums.append(
                jnp.zeros((*shape, *variable.aval.shape[1:]), variable.aval.dtype)
            )
        return sums

    def _in_turn(self, kept: Any) -> Any:
        """Return (layers, samples, ...) of results that hold samples.

        Args:
          kept: (turns, layers of a chunk, stages, samples of a micro-batch, ...).
        """
        by_stages = []
        for stage in range(self.stages.count):
            turns = self.clock.behind() + stage
            by_stages.append(kept[turns, :, stage])
        # (chunks, parts, layers of one, stages, samples, ...)
        x = jnp.stack(by_stages, 3)
        x = x.swapaxes(1, 2)
        x = x.reshape(-1, *x.shape[2:])
        # (parts, samples, rounds, stages, ...)
        x = whole(jnp.moveaxis(x, (0, 2), (2, 3)), self.stages.groups)
        return by_layer(jnp.moveaxis(x, 0, 2), self.stages.chunks)
