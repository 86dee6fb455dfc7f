"""The limits of the search: every number that somebody chose, in one place.

Each one says its unit and where it comes from. "Assumption" means that nobody has
measured it: a better value is welcome where a measurement shows one.
"""

from __future__ import annotations

from typing import NamedTuple

# ---- when a plan fits ----


class Surety(NamedTuple):
    """Bounds of the uncertain part of a predicted peak.

    Attributes:
      least: times its bytes that 97 % of programs hold at the least.
      most: times its bytes that 97 % of programs hold at the most.
      slack: bytes that come off the least and on top of the most.
    """

    least: float
    most: float
    slack: float


MIB = 2.0**20
# By platform, and whether the mesh splits the "samples" alone or "more". Rounded from
# `python -m tools.bench planner-bounds benchmarks/planner-tuning.json`: of its 105 TPU
# programs that split samples, 103 hold at most 1.4 times as much (the others, a model
# with relative positions and one with two tables, 1.7 and 1.9), and 98 % do if their
# family is left out. Of its 46 CPU programs all but one (tensor-parallel, 3.5) hold at
# most 1.44 times as much. For GPUs and for TPUs that split more (of 6 programs one
# holds 2.7 times as much) there are too few: assumption, a little more. "splash":
# programs with that attention, from `planner-memory --half tuning --long --early
# --programs 60`: 97 % hold 0.68 to 1.23 times as much, however they are split.
SURETY = {
    "tpu": {
        "samples": Surety(0.6, 1.4, 64 * MIB),
        "more": Surety(0.5, 1.6, 64 * MIB),
        "splash": Surety(0.65, 1.25, 64 * MIB),
    },
    "cpu": {
        "samples": Surety(0.85, 1.25, 4 * MIB),
        "more": Surety(0.8, 1.6, 4 * MIB),
    },
    "cuda": {
        "samples": Surety(0.5, 1.5, 64 * MIB),
        "more": Surety(0.5, 1.6, 64 * MIB),
    },
}
# Share of the limit from which on the light score of an assignment gets worse, because
# activations need room next to the state. Assumption.
CROWDED = 0.9
# Factor by which the light score grows with each share of the limit above `CROWDED`.
# Assumption: large enough that an assignment whose state does not fit never wins.
CROWDED_WEIGHT = 10
# Seconds (or bytes) that a state as large as the limit adds to the light score: of
# assignments with the same score the one with the smaller state wins. Assumption.
TIE_WEIGHT = 1e-9

# ---- when plans are as good as each other ----

# Share of the best score within which plans count as equally good, so that the simplest
# of them is taken. Assumption: finer than the predictions are.
ALIKE = 0.005
# Seconds of a step within which plans count as equally good. Assumption: about what
# dispatching a call costs the host.
ALIKE_SECONDS = 1e-4
# Share of the score below which two plans are said to be equal. Assumption: what
# rounding to three digits hides.
EQUAL = 5e-4
# Share of the score that a move of the descent has to gain. Assumption: above the
# rounding of the sums.
LEAST_GAIN = 1e-6
# Share of the peak that twice as many micro-batches have to free; below it they free
# little, because what they could free at the most halves each time. Assumption.
LITTLE = 0.01
# Factor of the least work of a step above which devices are idle, since they compute
# the same as others. Assumption.
IDLE_WORK = 1.5

# ---- how much is looked at ----

# Named axes that the descent turns, heaviest first, next to the batch and sequences.
# Assumption: later ones are too light to matter.
MOST_GROUPS = 10
# Mesh shapes that are searched. Assumption.
MOST_MESHES = 18
# Mesh shapes of two axes among them. Assumption.
MOST_PAIRS = 12
# Devices along the innermost of three mesh axes. Assumption: an inner axis lies inside
# a node or a ring of a torus.
MOST_INNER = 16
# Power of two of the devices along the innermost of three mesh axes: the shapes next to
# it are searched first. Assumption: four devices are a host of TPUs.
LIKELY_INNER_LOG2 = 2
# Assignments that get a rematerialization and micro-batches. Assumption.
FINALISTS = 8
# Turns up to which the descent tries two at a time, too. Assumption: their number grows
# with the square.
MOST_PAIRED = 20
# Devices up to which the descent looks for what no expert would write. Assumption.
SMALL_MESH = 16
# Leaner assignments that are tried in one piece where samples meet. Assumption.
MOST_WHOLE = 16

# ---- lists in plans and errors ----

# Plans that were not chosen and that a plan names. Assumption: what fits a screen.
RIVALS = 5
# Causes that the plan names for one kind of communication. Assumption: the same.
CAUSES = 3
# Flags of XLA that a plan's text names; its field has all. Assumption: the same.
NAMED_FLAGS = 2
# Share of the peak below which a kind of memory is not named where nothing fits.
# Assumption.
NAMED_SHARE = 0.02
# Named axes that a note about an idle mesh axis lists. Assumption.
LISTED_GROUPS = 4
# Parameters that the error about a pin without a match lists. Assumption.
LISTED_PARAMETERS = 12

# ---- advice where nothing fits ----

# Seconds of computing for each kind of change. Assumption: people who learn that
# nothing fits wait for advice about as long as for a plan.
ADVICE_SECONDS = 10.0
# Doublings of a topology that is too small. Assumption: 256 times the devices.
DOUBLINGS = 8
# Batch sizes that are guessed from the two around them, before halving. Assumption.
GUESSES = 4
# Assignments of the failed search that are tried on a smaller batch. Assumption.
SOLID = 4

# ---- rematerialization value by value ----

# Layouts for which it is looked at: the first ones. Assumption.
FINER_LAYOUTS = 3
# Times as many micro-batches as those of the best plan without it. Assumption.
FINER_PARTS = 4
# What it has to gain of a step's time; it makes a plan harder to read. Assumption.
FINER_GAIN = 0.01
# Where it proves to be too large, it is tried again in this share of the room, and how
# often. Assumption.
FINER_ROOM = 0.85
FINER_TRIES = 3
# Of a loop's turns, the share from which on it is worth two loops. Assumption.
FINER_TURNS = 1 / 16
# What is kept in the host's memory: how much of a step's time it has to gain beyond
# what fits on the devices, since no chip was there to measure it; the share of the time
# beside which it is copied that it may take; the share of the host's memory.
# Assumptions.
OFFLOAD_GAIN = 0.03
OFFLOAD_BESIDE = 0.9
OFFLOAD_MEMORY = 0.5
