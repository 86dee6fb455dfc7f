"""The problem: what an assignment of mesh axes to named axes is worth.

A problem is a traced recipe on a topology with an objective. It answers two questions,
one cheap and one exact:

* `lightly`: how good is this assignment, without rematerialization and in one piece?
  It costs well below a millisecond and drives the descent.
* `candidate`: what do time and peak memory come to, and does it fit? It simulates the
  buffers of the whole gradient.

What both need (the graph, its named axes, its buffers) depends only on the policy of
rematerialization and is computed once for each.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment, expert_groups
from lepton_jax.planner.estimate.cost import Cost, Estimate, optimizer_bytes
from lepton_jax.planner.estimate.feeding import residence, slow_loops, steps_per_call
from lepton_jax.planner.estimate.memory import Sizes, Timeline, predict
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.program.micro_batches import MicroBatches
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.search.bounds import Bounds, bounds, surety_of
from lepton_jax.planner.search.limits import (
    CROWDED,
    CROWDED_WEIGHT,
    TIE_WEIGHT,
)
from lepton_jax.planner.search.masks import reordered, split_length
from lepton_jax.planner.search.pins import Pins
from lepton_jax.planner.search.roles import Roles
from lepton_jax.planner.xla import flags


class Scored(NamedTuple):
    """An assignment with its light score: the lower, the better."""

    score: float
    assignment: Assignment


@dataclass(frozen=True)
class Candidate:
    """An assignment with its prediction.

    Attributes:
      assignment: its masks are in the order of its own policy's groups.
      estimate: time by kind, and communication.
      peak: bytes that a device holds at the most, as predicted.
      bytes: the same by kind.
      bounds: bytes between which the peak lies, see `search.bounds`.
      fits: whether the upper bound is within the device's memory.
      may_fit: whether the predicted peak is.
      score: what the objective minimizes: seconds of a step, or bytes.
    """

    assignment: Assignment
    estimate: Estimate
    peak: int
    bytes: dict[str, int]
    bounds: Bounds
    fits: bool
    may_fit: bool
    score: float


class Memory:
    """Memory of assignments under one rematerialization policy.

    Attributes:
      state_bytes: for each parameter its own bytes and those of its optimizer state.
    """

    def __init__(
        self,
        trace: Trace,
        names: Names,
        topology: Topology,
        sizes: Sizes,
    ):
        self.trace = trace
        self.names = names
        self.topology = topology
        self.sizes = sizes
        self.state_bytes = optimizer_bytes(trace, names)
        self._timeline = Timeline(names.graph, topology.platform)
        self._straight = slow_loops(trace, topology)
        self._steps_per_call, _ = steps_per_call(trace, topology)
        self._data, _ = residence(trace, topology)

    def predict(self, assignment: Assignment) -> dict[str, int]:
        """Return the bytes by kind that a device holds at the peak of a step."""
        # micro-batches in straight code: XLA keeps what each of them needs at once
        if self._straight:
            assignment = replace(assignment, micro_batches=1)

        held, *_ = predict(
            self.trace,
            self.names,
            assignment,
            self.topology,
            timeline=self._timeline,
            sizes=self.sizes,
            steps_per_call=self._steps_per_call,
            data=self._data,
        )
        return held

    def state(self, assignment: Assignment) -> float:
        """Return the bytes of parameters, their gradients and optimizer state."""
        counts = assignment.counts
        masks = list(assignment.masks)
        specs = self.names.storage(masks, assignment.keep, counts)

        total = 0.0
        for spec, pair in zip(specs, self.state_bytes, strict=True):
            own, optimizer = pair
            axes = 0
            for mask in spec:
                axes |= mask
            total += (2 * own + optimizer) / counts[axes]
        return total


@dataclass
class Problem:
    """A traced recipe on a topology, and what is to be best.

    Attributes:
      objective: one of `plans.OBJECTIVES`.
      pins: what the user fixed.
      patience: the clock of the search.
    """

    trace: Trace
    topology: Topology
    objective: str
    pins: Pins
    patience: Patience = field(default_factory=lambda: Patience("planning"))
    # the best without a pipeline, where a pipeline was found to be better
    unstaged: Candidate | None = None
    # caches; those with a string as key are by rematerialization policy
    _scores: dict[Assignment, float] = field(default_factory=dict)
    _names: dict[str, Names] = field(default_factory=dict)
    _sizes: dict[str, Sizes] = field(default_factory=dict)
    _costs: dict[str, Cost] = field(default_factory=dict)
    _memories: dict[str, Memory] = field(default_factory=dict)
    _shared: set[int] | None = None
    _roles: Roles | None = None
    _batches: MicroBatches | None = None
    _flops: float | None = None

    # ---- what a policy of rematerialization makes of the program ----

    def names(self, remat: str) -> Names:
        """Return the named axes of the gradient."""
        if remat not in self._names:
            before = self.patience.detail
            self.patience.detail = f"tracing the gradient, remat {remat}"
            self._names[remat] = Names(
                self.trace.gradient(remat),
                self.trace.arguments,
                self.pins.storage,
            )
            self.patience.detail = before
        return self._names[remat]

    def sizes(self, remat: str) -> Sizes:
        """Return the bytes of the gradient's values."""
        if remat not in self._sizes:
            names = self.names(remat)
            self._sizes[remat] = Sizes(names.graph, names)
        return self._sizes[remat]

    def cost(self, remat: str) -> Cost:
        """Return the model of a step's time."""
        if remat not in self._costs:
            self._costs[remat] = Cost(
                self.trace,
                self.names(remat),
                self.topology,
                self.sizes(remat),
                self.flags,
            )
        return self._costs[remat]

    @property
    def flags(self) -> dict[str, Any]:
        """XLA's flags: those that are pinned, or are good for the backend."""
        if self.pins.flags is not None:
            return dict(self.pins.flags)
        topology = self.topology
        return flags.chosen(topology.platform, topology.devices, os.environ)

    def memory(self, remat: str) -> Memory:
        """Return the model of a device's memory."""
        if remat not in self._memories:
            self._memories[remat] = Memory(
                self.trace,
                self.names(remat),
                self.topology,
                self.sizes(remat),
            )
        return self._memories[remat]

    # ---- what the model allows ----

    def shared(self, names: Names) -> set[int]:
        """Return the groups that may share a mesh axis with the samples.

        These are experts, rows that are looked up, and stages.
        """
        if self._shared is None:
            self._shared = expert_groups(names) | names.rows | names.stages
        return self._shared

    @property
    def roles(self) -> Roles:
        """Roles that the names of a pinned mesh's axes allow."""
        if self._roles is None:
            self._roles = Roles(self.names("none"), self.pins)
        return self._roles

    @property
    def batches(self) -> MicroBatches:
        """Changes that micro-batches would make to the model."""
        if self._batches is None:
            self.patience.detail = "looking where samples meet"
            self._batches = MicroBatches(self.trace)
        return self._batches

    @property
    def whole(self) -> bool:
        """Whether a batch should stay in one piece, since nobody asked for several."""
        return self.pins.micro_batches is None and self.batches.change

    @property
    def limit(self) -> float:
        """Bytes of a device, within which a plan's upper bound has to be."""
        return self.topology.device.memory

    def _bounds(self, held: dict[str, int], assignment: Assignment) -> Bounds:
        names = self.names(assignment.remat)
        platform = self.topology.platform
        attention = self.trace.forms.attention
        return bounds(held, surety_of(platform, names, assignment, attention))

    # ---- what an assignment is worth ----

    def lightly(self, assignment: Assignment) -> Scored:
        """Return the assignment with its light score.

        The score is the time of a step (or the bytes of the state), made worse by how
        much of the state would not fit.
        """
        ways = self.ways(assignment)
        return min(map(self._scored, ways), key=lambda scored: scored.score)

    def ways(self, assignment: Assignment) -> list[Assignment]:
        """Return an assignment in all ways that attention may meet its sequence.

        Where the sequence is whole, or attention is no kernel, it is the only one.
        """
        names = self.names("none")
        if not split_length(names, assignment):
            return [replace(assignment, ring=False)]
        pinned = self.pins.context
        rings = (False, True) if pinned is None else (pinned == "ring",)
        return [replace(assignment, ring=ring) for ring in rings]

    def _scored(self, assignment: Assignment) -> Scored:
        if assignment not in self._scores:
            self._scores[assignment] = self._light_score(assignment)
        return Scored(self._scores[assignment], assignment)

    def _light_score(self, assignment: Assignment) -> float:
        seconds = self.cost("none").estimate(assignment).total
        held = self.memory("none").state(assignment)
        score = held if self.objective == "memory" else seconds

        crowding = max(0.0, held / self.limit - CROWDED)
        tie_break = TIE_WEIGHT * held / self.limit
        return score * (1 + CROWDED_WEIGHT * crowding) + tie_break

    def least_flops(self, assignment: Assignment) -> float:
        """Return the FLOPs of a step on one device that does all of it."""
        if self._flops is None:
            no_masks = (0,) * len(assignment.masks)
            alone = replace(assignment, masks=no_masks, keep=0)
            estimate = self.cost("none").estimate(alone)
            self._flops = estimate.flops
        return self._flops

    def candidate(self, assignment: Assignment) -> Candidate:
        """Return both predictions of an assignment.

        Args:
          assignment: its masks are in the order of the groups of the policy "none".
        """
        assignment = self.translated(assignment)
        estimate = self.cost(assignment.remat).estimate(assignment)
        held = self.memory(assignment.remat).predict(assignment)
        peak = sum(held.values())
        between = self._bounds(held, assignment)
        score = float(peak) if self.objective == "memory" else estimate.total
        return Candidate(
            assignment,
            estimate,
            peak,
            held,
            between,
            fits=between.most <= self.limit,
            may_fit=peak <= self.limit,
            score=score,
        )

    def bound(self, assignment: Assignment, surely: bool = True) -> int:
        """Return the upper bound of the bytes that a device holds at the most.

        Args:
          assignment: its masks are in the order of the groups of the policy "none".
          surely: False: return the predicted bytes instead.
        """
        assignment = self.translated(assignment)
        held = self.memory(assignment.remat).predict(assignment)
        return self._bounds(held, assignment).most if surely else sum(held.values())

    # ---- groups under another policy ----

    def translated(self, assignment: Assignment) -> Assignment:
        """Return masks of the policy "none" in the order of the assignment's own."""
        return self._reordered(assignment, "none", assignment.remat)

    def untranslated(self, assignment: Assignment) -> Assignment:
        """Return masks of the assignment's own policy in the order of "none"."""
        return self._reordered(assignment, assignment.remat, "none")

    def _reordered(
        self,
        assignment: Assignment,
        old: str,
        new: str,
    ) -> Assignment:
        if old == new:
            return assignment
        masks = reordered(
            assignment,
            self.names(old),
            self.names(new),
        )
        return replace(assignment, masks=tuple(masks))

    # ---- neighbours of the problem ----

    def without_pins(
        self,
        topology: Topology,
        limit: float | None,
    ) -> Problem:
        """Return the problem without pins, maybe on another topology.

        What depends on neither is shared.

        Args:
          topology: where to look.
          limit: seconds of computing on a clock of its own; None: no limit.
        """
        patience = Patience("planning", limit)
        free = Problem(
            self.trace,
            topology,
            self.objective,
            Pins(),
            patience,
        )
        if not self.pins.storage:
            free._names = self._names
            free._sizes = self._sizes
        return free

    def on_trace(self, trace: Trace) -> Problem:
        """Return the same problem for another trace, with a clock of its own."""
        patience = Patience("planning", self.patience.limit)
        return Problem(
            trace,
            self.topology,
            self.objective,
            self.pins,
            patience,
        )
