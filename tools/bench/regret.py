"""How much worse the planner's plan is than the best there is.

`tools.bench planner-regret`, on 8 virtual CPU devices. For each model all assignments
are enumerated: every mesh of up to three axes, and on each axis every combination of
the model's named axes (those that a case names, and the batch) and of keeping the state
in parts. Two named axes share a mesh axis as the search lets them: samples only with
experts and rows of embeddings. Neither rematerialization nor micro-batches are
enumerated: all fits. Assignments that amount to the same are one: mesh axes that split
the same things merge, and their order makes no difference on the CPU's uniform links.

A candidate's train step is compiled, and scored by the planner's formula from what XLA
made of it: the seconds of dots in proportion to XLA's FLOP, those of the collectives in
the compiled module by the links of the plan's mesh, and memory traffic and optimizer
as predicted. Before it is compiled, a candidate has a lower bound: all but the
collectives. Where that alone is slower than the best compiled, it is not compiled
("bounded").

  regret    of the plan that the planner chose: its score divided by the least of all
            candidates, less one
  by bytes  the same with the bytes that XLA says its step accesses, in place of the
            predicted traffic; XLA counts a loop's body once, so this is rough for
            models with loops
  by time   its place among the compiled candidates, measured: in rounds, each candidate
            a few steps a round
  faster    share of all candidates that take less time; for the bounded ones, it is
            estimated from a sample that is compiled and timed

For a language model the rules that one would write by hand are candidates, too: FSDP,
Megatron, and both.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax.hardware import Topology, calibrate_cpu, join, lay, topology
from lepton_jax.planner import ahead, trace
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.cost import Estimate
from lepton_jax.planner.plans import Plan
from lepton_jax.planner.search.build import build
from lepton_jax.planner.search.descent import search
from lepton_jax.planner.search.pins import Pins
from lepton_jax.planner.search.problem import Problem
from lepton_jax.train.program import Program
from lepton_jax.verify import hlo
from tools.bench import options as checks

DEVICES = 8
SEED = 0
MOST_REGRET = 0.03  # the aim, by which models are counted in the last line
MOST_AXES = 3  # of a mesh
# Relative errors of floating-point sums, below which two scores count as equal.
ROUNDING = 1e-9
ROUNDING_OF_BOUND = 1e-6


@dataclass(frozen=True)
class Case:
    """A model to plan.

    Attributes:
      model: takes `rngs`.
      data: makes (inputs, targets) of a batch.
      splits: patterns of the named axes that are enumerated in addition to the batch.
      loss: as in `Recipe`.
      tensor: patterns of the named axes that Megatron's rule splits, if the rules by
        hand are compared.
    """

    model: Callable[..., Any]
    data: Callable[[], tuple[Any, np.ndarray]]
    splits: tuple[str, ...]
    loss: Callable[..., Any] = lepton.losses.cross_entropy
    tensor: tuple[str, ...] = ()


def images(
    samples: int,
    *shape: int,
    classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return noise in [0, 1), float32 (samples, *shape), and labels."""
    random = np.random.default_rng(SEED)
    pixels = random.random((samples, *shape), np.float32)
    return pixels, random.integers(0, classes, samples, np.int32)


def tokens(
    samples: int,
    length: int,
    vocab: int,
    classes: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return random text, and the same one token later, or a class for each text."""
    random = np.random.default_rng(SEED)
    text = random.integers(0, vocab, (samples, length + 1), np.int32)
    inputs = text[:, :-1].copy()
    if classes:
        return inputs, random.integers(0, classes, samples, np.int32)
    return inputs, text[:, 1:].copy()


def ratings(
    samples: int, users: int, items: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return random pairs of users and items, and a rating of each."""
    random = np.random.default_rng(SEED)
    pairs = {
        "user": random.integers(0, users, samples, np.int32),
        "item": random.integers(0, items, samples, np.int32),
    }
    return pairs, random.normal(size=samples).astype(np.float32)


LM: dict[str, Any] = {
    "dim": 256,
    "layers": 2,
    "heads": 8,
    "hidden": 768,
}
BLOCKS = ("blocks/*/attention/*", "blocks/*/feed_forward/*", "embed.0", "head.1")
CASES = {
    "mlp": Case(
        partial(lepton.models.MLP, (256, 1024, 768, 15)),
        partial(images, 512, 256, classes=15),
        ("layers/*",),
    ),
    "cnn": Case(
        partial(
            lepton.models.CNN,
            15,
            size=(16, 16, 4),
            batch_norm=True,
        ),
        partial(
            images,
            128,
            16,
            16,
            4,
            classes=15,
        ),
        ("norms/*", "dense/bias.0"),
    ),
    "lm": Case(
        partial(lepton.models.TransformerLM, 2048, **LM),
        partial(tokens, 16, 64, 2048),
        BLOCKS,
        tensor=BLOCKS,
    ),
    "moe": Case(
        partial(
            lepton.models.MoELM,
            512,
            dim=128,
            layers=2,
            heads=8,
            hidden=256,
            experts=8,
        ),
        partial(tokens, 16, 64, 512),
        ("blocks/*/attention/*", "blocks/*/feed_forward/up.[02]"),
    ),
    "two-tower": Case(
        partial(
            lepton.models.TwoTower,
            65_536,
            16_384,
            dim=64,
        ),
        partial(ratings, 1024, 65_536, 16_384),
        ("users.?", "items.?"),
        lambda scores, targets: (scores - targets) ** 2,
    ),
    "lstm": Case(
        partial(
            lepton.models.LSTM,
            4096,
            15,
            dim=128,
            hidden=256,
        ),
        partial(tokens, 64, 16, 4096, 15),
        ("out.0", "inputs.0"),
    ),
}


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `planner-regret` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "planner-regret",
        __doc__,
        "the planner's plans against all others, compiled and timed on 8 virtual CPU"
        " devices",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=160,
        metavar="N",
        help=(
            "candidates compiled a model at the most, the best predicted first"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=24,
        metavar="N",
        help=(
            "of the bounded candidates that are compiled and timed all the same"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="of timing; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        metavar="N",
        help="timed a round (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep the results of each model there, and read them back",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this CPU first, in place of the catalogue's figures",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the models asked for, and print what comes out for each as it ends.

    Raises:
      SettingError: no such model, or a count that can't be.
      PlanError: there are no 8 virtual devices, and it is too late to make them.
    """
    checks.check_at_least(
        options,
        limit=1,
        sample=0,
        rounds=0,
        steps=1,
    )
    checks.check_names(options.models, CASES, "--models", "model")
    virtual_devices()
    where = topology(f"cpu:{DEVICES}")
    ahead.devices_for(where)
    chip = '"cpu" of the catalogue'
    if options.calibrate:
        where = topology(f"cpu:{DEVICES}", {"cpu": calibrate_cpu()})
        chip = "this CPU, calibrated"
    print(f"the chip is {chip}")
    print(HEADER, flush=True)

    known = {}
    if options.cache is not None and options.cache.exists():
        known = json.loads(options.cache.read_text())
    results = []
    for name in dict.fromkeys(options.models):
        key = (
            f"{name} {options.limit} {options.sample} {options.rounds} {options.steps}"
            f" {options.calibrate} {jax.__version__}"
        )
        if key not in known:
            known[key] = {"model": name, **measure(CASES[name], where, options)}
            if options.cache is not None:
                options.cache.write_text(json.dumps(known))
        results.append(known[key])
        print(_lines(known[key]), flush=True)
    print(_summary(results))
    return results


def virtual_devices() -> None:
    """Ask JAX for the virtual devices, unless a variable says how many there are."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    except RuntimeError:
        return  # JAX was used before: `devices_for` will say if they are too few


# ---- the space ----


def space(
    problem: Problem,
    splits: Sequence[str],
) -> tuple[int, dict[Any, Assignment]]:
    """Enumerate the assignments.

    Returns:
      How many there are, and those that differ, by `signature`.
    """
    names = problem.names("none")
    roles = _roles(problem, splits)
    total = 0
    distinct: dict[Any, Assignment] = {}
    for sizes in _factorings(problem.topology.devices):
        for taken in itertools.product(roles, repeat=len(sizes)):
            assignment = _assignment(sizes, taken, len(names.groups))
            counts = [assignment.counts[mask] for mask in assignment.masks]
            divides = all(
                group.divisor % count == 0
                for group, count in zip(names.groups, counts, strict=True)
            )
            if divides:
                total += 1
                distinct.setdefault(signature(problem, assignment), assignment)
    return total, distinct


# What a mesh axis does: the numbers of the groups that it splits, and whether the state
# is kept in parts over it.
Role = tuple[frozenset[int], bool]


def _roles(
    problem: Problem,
    splits: Sequence[str],
) -> list[Role]:
    """Return all that one mesh axis may do."""
    names = problem.names("none")
    batch = names.batch
    shared = problem.shared(names)
    groups = [
        k
        for k, group in enumerate(names.groups)
        if k != batch and any(fnmatch(group.name, pattern) for pattern in splits)
    ]

    roles: list[Role] = []
    for count in range(len(groups) + 1):
        for some in itertools.combinations(groups, count):
            variants = [frozenset(some)]
            if batch is not None and set(some) <= shared:
                variants.append(frozenset((batch, *some)))
            for split in variants:
                roles += [(split, False), (split, True)]
    return roles


def _assignment(
    sizes: tuple[int, ...], roles: Sequence[Role], groups: int
) -> Assignment:
    """Return the assignment in which each mesh axis has a role."""
    masks = [0] * groups
    keep = 0
    for axis, (split, kept) in enumerate(roles):
        bit = 1 << axis
        for group in split:
            masks[group] |= bit
        if kept:
            keep |= bit
    return Assignment(sizes, tuple(masks), keep)


def _factorings(
    n: int,
    most: int = MOST_AXES,
) -> list[tuple[int, ...]]:
    """Return `n` as products of at most `most` factors above 1, in falling order.

    >>> _factorings(8)
    [(8,), (4, 2), (2, 2, 2)]
    """

    def products(
        n: int,
        largest: int,
        most: int,
    ) -> Iterator[tuple[int, ...]]:
        if n == 1:
            yield ()
        if most == 0:
            return
        for factor in range(min(n, largest), 1, -1):
            if n % factor == 0:
                for rest in products(n // factor, factor, most - 1):
                    yield (factor, *rest)

    return list(products(n, n, most))


def signature(problem: Problem, a: Assignment) -> Any:
    """Return what an assignment amounts to; equal ones have equal signatures.

    It has, for each mesh axis, its size and what it splits: which named axes, and which
    dims of the state as it is kept. Axes that split the same are one, and their order
    does not count.
    """
    names = problem.names("none")
    stored: list[int] = []
    for spec in names.storage(a.masks, a.keep, a.counts):
        stored += spec
    masks = [*a.masks, *stored]

    axes: dict[tuple, int] = {}
    for bit, size in enumerate(a.sizes):
        if size > 1:
            role = tuple(k for k, mask in enumerate(masks) if mask >> bit & 1)
            axes[role] = axes.get(role, 1) * size
    return tuple(sorted((size, role) for role, size in axes.items()))


def by_rules(
    problem: Problem,
    tensor: Sequence[str],
) -> dict[str, Assignment]:
    """Return what experts write by hand for a language model, by name."""
    names = problem.names("none")
    devices = problem.topology.devices
    batch = names.batch
    assert batch is not None

    def rule(
        sizes: tuple[int, ...],
        over_batch: int,
        over_tensor: int,
    ) -> Assignment:
        masks = []
        for group in names.groups:
            split = any(fnmatch(group.name, pattern) for pattern in tensor)
            masks.append(over_tensor if split else 0)
        masks[batch] = over_batch
        return Assignment(sizes, tuple(masks), over_batch)

    rules = {
        "FSDP": rule((devices,), 1, 0),
        "Megatron": rule((devices,), 0, 1),
    }
    for ways in (2, 4):
        name = f"FSDP {devices // ways} x Megatron {ways}"
        rules[name] = rule((devices // ways, ways), 1, 2)
    return rules


# ---- one candidate ----


@dataclass
class Candidate:
    """A compiled candidate.

    Attributes:
      name, mesh: of the plan.
      predicted: seconds by kind, as predicted.
      xla: seconds by kind, with XLA's FLOP and collectives.
      flops: of a device, (predicted, by XLA).
      bytes_accessed: by a step, as XLA says.
      by_bytes: seconds of a step with these bytes as its memory traffic.
      peak: bytes of a device, (predicted, by XLA).
      moves: collectives by kind and mesh axes, as [count, bytes, seconds].
      predicted_moves: the same as predicted.
      compile_seconds: how long XLA took.
      splits: named axis to the mesh axes that split it.
      fits: whether the peak is within the device's memory.
      ms: milliseconds of a step in each round.
    """

    name: str
    mesh: dict[str, int]
    predicted: dict[str, float]
    xla: dict[str, float]
    flops: tuple[float, float]
    bytes_accessed: float
    by_bytes: float
    peak: tuple[float, float]
    moves: dict[str, list[float]]
    predicted_moves: dict[str, list[float]]
    compile_seconds: float
    splits: dict[str, list[str]]
    fits: bool = True
    ms: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Seconds of a step by the planner's formula, with XLA's figures."""
        return sum(self.xla.values())

    @property
    def time(self) -> float:
        """Measured milliseconds of a step; NaN where nothing was timed."""
        return statistics.median(self.ms) if self.ms else float("nan")


def bound(estimate: Estimate, real: float) -> float:
    """Return the seconds that the step takes at the least, by the formula.

    Args:
      estimate: of the step.
      real: XLA's share of the FLOP that the estimate counts.
    """
    return (
        estimate.total
        - estimate.seconds["communication"]
        - (1 - real) * estimate.seconds["matmul"]
    )


def compiled(
    problem: Problem, a: Assignment, estimate: Estimate
) -> tuple[Candidate, Step]:
    """Compile the train step of an assignment, and score it."""
    where = problem.topology
    plan = _plan_of(problem, a, estimate)
    program = Program(
        problem.trace,
        plan,
        ahead.mesh_devices(where, plan.mesh, ahead.devices_for(where)),
    )
    began = time.perf_counter()
    executable, memory = ahead.compile_for(program.lower())
    compile_seconds = time.perf_counter() - began

    module = hlo.read(executable.as_text() or "")
    moves = collectives(module, plan, where)
    share_of_flops = module.dot_flops / max(estimate.flops, 1.0)
    xla = {
        **estimate.seconds,
        "matmul": estimate.seconds["matmul"] * share_of_flops,
        "communication": sum(seconds for _, _, seconds in moves.values()),
    }
    analysis = executable.cost_analysis() or {}
    accessed = float(analysis.get("bytes accessed", float("nan")))
    chip = where.device
    by_bytes = (
        module.dot_flops / (chip.peak("float32") * chip.matmul_fraction)
        + xla["communication"]
        + accessed / (chip.bandwidth * chip.memory_fraction)
    )
    candidate = Candidate(
        name=plan.name,
        mesh=plan.mesh,
        predicted=dict(estimate.seconds),
        xla=xla,
        flops=(estimate.flops, module.dot_flops),
        bytes_accessed=accessed,
        by_bytes=by_bytes,
        peak=(plan.peak, memory.peak),
        moves=moves,
        predicted_moves={
            f"{c.kind} over {' and '.join(c.axes)}": [c.count, c.bytes, c.seconds]
            for c in plan.collectives
        },
        compile_seconds=compile_seconds,
        splits={axis.name: list(axis.mesh) for axis in plan.axes if axis.mesh},
        fits=memory.peak <= where.device.memory,
    )
    return candidate, Step(program, executable)


def _plan_of(
    problem: Problem,
    a: Assignment,
    estimate: Estimate,
) -> Plan:
    """Return the plan of an assignment, one step a call, without resident data."""
    plan = build(
        problem.trace,
        problem.topology,
        problem.names("none"),
        a,
        estimate=problem.cost("none").estimate(a, causes=True),
        held=problem.memory("none").predict(a),
    )
    return replace(plan, steps_per_call=1, data="streamed")


def collectives(
    module: hlo.Compiled, plan: Plan, where: Topology
) -> dict[str, list[float]]:
    """Return the collectives of a compiled step, by kind and mesh axes.

    Returns:
      [count, bytes, seconds on the links of the plan's mesh] of each.
    """
    links = lay(plan.mesh, where)
    sums: dict[str, list[float]] = {}
    for c in module.collectives:
        if all(len(group) == 1 for group in c.groups):
            continue  # nothing is moved
        axes = (
            c.axes(plan.mesh)
            or hlo.axes_of(c.groups, plan.mesh, permute=True)
            or tuple(plan.mesh)
        )
        kind = "all-to-all" if c.kind == "ragged-all-to-all" else c.kind
        link = join([links[axis] for axis in axes])
        entry = sums.setdefault(f"{c.kind} over {' and '.join(axes)}", [0, 0.0, 0.0])
        entry[0] += c.times
        entry[1] += c.bytes * c.times
        entry[2] += link.seconds(kind, c.bytes) * c.times
    return sums


class Step:
    """A compiled train step to be timed."""

    def __init__(self, program: Program, executable: Any):
        self.program = program
        self.executable = executable

    def ms(
        self,
        state: Any,
        batch: Any,
        steps: int,
    ) -> float:
        """Return milliseconds a step, after one that is not timed.

        Args:
          state: on the host, without its key.
          batch: on the host.
          steps: how many are timed.
        """
        state = replace(state, key=jax.random.key(SEED))
        state, block = jax.device_put(
            (state, batch), (self.program.state_sharding, self.program.block_sharding)
        )
        state, _ = jax.block_until_ready(self.executable(state, block, None))
        began = time.perf_counter()
        for _ in range(steps):
            state, record = self.executable(state, block, None)
        jax.block_until_ready((state, record))
        return (time.perf_counter() - began) / steps * 1e3


# ---- one model ----


def measure(
    case: Case,
    where: Topology,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Enumerate, compile, score and time; return a summary and every candidate."""
    batch = case.data()
    recipe = lepton.Recipe(
        model=case.model,
        loss=case.loss,
        optimizer=optax.adamw(1e-3),
        batch_size=len(batch[1]),
        seed=SEED,
    )
    problem = Problem(trace(recipe, *batch), where, "time", Pins())
    best = search(problem)[0].assignment
    assert best.remat == "none" and best.micro_batches == 1, (
        "models here fit as they are"
    )

    total, distinct = space(problem, case.splits)
    chosen = signature(problem, best)
    inside = chosen in distinct
    distinct[chosen] = best
    named = {chosen: "chosen"}
    if case.tensor:
        _add_rules(problem, case.tensor, distinct, named)
    estimates = _estimates(problem, distinct)

    state, real = alone(problem)
    candidates, runs, bounded = compile_all(
        problem, distinct, estimates, named, real, options.limit, options.sample
    )
    pairs = [(candidates[key], runs[key]) for key in candidates]
    timed(
        state,
        batch,
        pairs,
        options.rounds,
        options.steps,
    )
    below_bound = sum(
        candidate.score < bound(estimates[key], real) * (1 - ROUNDING_OF_BOUND)
        for key, candidate in candidates.items()
    )
    return {
        "assignments": total,
        "distinct": len(distinct),
        "bounded": len(bounded),
        "compiled": len(candidates),
        "drawn": len(bounded & candidates.keys()),
        "cut": len(distinct) - len(bounded | candidates.keys()),
        "chosen_inside": inside,
        **_judged(candidates, chosen),
        **_placed(candidates, chosen, bounded, len(distinct)),
        "timed": bool(options.rounds),
        "below_bound": below_bound,
        "rules": {
            name: _shown(candidates[key])
            for key, name in named.items()
            if name != "chosen"
        },
        "candidates": [
            {**_shown(candidates[key]), "bounded": key in bounded}
            for key in sorted(candidates, key=lambda key: candidates[key].score)
        ],
    }


def _add_rules(
    problem: Problem,
    tensor: Sequence[str],
    distinct: dict[Any, Assignment],
    named: dict[Any, str],
) -> None:
    """Add the rules by hand to the candidates, and their names."""
    for rule, assignment in by_rules(problem, tensor).items():
        key = signature(problem, assignment)
        named[key] = f"{named[key]}, {rule}" if key in named else rule
        distinct.setdefault(key, assignment)


def _estimates(
    problem: Problem, distinct: Mapping[Any, Assignment]
) -> dict[Any, Estimate]:
    """Return the planner's estimate of each candidate."""
    cost = problem.cost("none")
    # in the order of meshes, since the cost remembers what it knows of one mesh
    by_mesh = sorted(distinct.items(), key=lambda item: item[1].sizes)
    return {key: cost.estimate(assignment) for key, assignment in by_mesh}


def _judged(
    candidates: Mapping[Any, Candidate],
    chosen: Any,
) -> dict[str, Any]:
    """Return the regrets of the chosen candidate, by XLA's figures."""
    own = candidates[chosen]
    fitting = [candidate for candidate in candidates.values() if candidate.fits]
    best = min(fitting, key=lambda candidate: candidate.score)
    least_by_bytes = min(candidate.by_bytes for candidate in fitting)
    return {
        "regret": own.score / best.score - 1,
        "fits": own.fits,
        "regret_by_bytes": own.by_bytes / least_by_bytes - 1,
        "chosen": _shown(own),
        "best": _shown(best),
    }


def _placed(
    candidates: Mapping[Any, Candidate],
    chosen: Any,
    bounded: set[Any],
    distinct: int,
) -> dict[str, Any]:
    """Return the place of the chosen candidate by measured time.

    The compiled candidates are those that are not bounded, and a sample of the bounded
    ones, from which the number of faster bounded ones is estimated.
    """
    own = candidates[chosen].time
    faster = [key for key, candidate in candidates.items() if candidate.time < own]
    sampled = len(bounded & candidates.keys())
    faster_in_sample = sum(key in bounded for key in faster)
    faster_in_bounded = len(bounded) * faster_in_sample / max(1, sampled)
    beaten = len(faster) - faster_in_sample + faster_in_bounded
    fastest = min(candidates.values(), key=lambda candidate: candidate.time)
    return {
        "place": len(faster) + 1,
        "faster": beaten / distinct,
        "fastest": _shown(fastest),
        "median_ms": statistics.median(c.time for c in candidates.values()),
    }


def compile_all(
    problem: Problem,
    distinct: Mapping[Any, Assignment],
    estimates: Mapping[Any, Estimate],
    named: Mapping[Any, str],
    real: float,
    limit: int,
    sample: int,
) -> tuple[dict[Any, Candidate], dict[Any, Step], set[Any]]:
    """Compile candidates, the named ones first, then the best predicted first.

    Args:
      problem: of the model.
      distinct: candidates, by signature.
      estimates: of these, by signature.
      named: signatures that are compiled in any case.
      real: XLA's share of the FLOP that the estimates count.
      limit: how many are compiled at the most.
      sample: how many of the bounded ones are compiled all the same.

    Returns:
      The compiled ones, their steps, and the signatures of the bounded ones.
    """
    candidates: dict[Any, Candidate] = {}
    runs: dict[Any, Step] = {}
    bounded = []
    least = float("inf")

    def add(key: Any) -> None:
        candidates[key], runs[key] = compiled(problem, distinct[key], estimates[key])

    order = sorted(distinct, key=lambda key: (key not in named, estimates[key].total))
    for key in order:
        if key not in named and bound(estimates[key], real) > least:
            bounded.append(key)
        elif key in named or len(candidates) < limit:
            add(key)
            if candidates[key].fits:
                least = min(least, candidates[key].score)

    for i in np.random.default_rng(SEED).permutation(len(bounded))[:sample]:
        add(bounded[i])
    return candidates, runs, set(bounded)


def timed(
    state: Any,
    batch: Any,
    pairs: Sequence[tuple[Candidate, Step]],
    rounds: int,
    steps: int,
) -> None:
    """Fill in milliseconds: in each round each candidate once.

    The order is one of chance, so that none is always disturbed.
    """
    order = list(range(len(pairs)))
    random = np.random.default_rng(SEED)
    for _ in range(rounds):
        random.shuffle(order)
        for i in order:
            candidate, step = pairs[i]
            gc.collect()
            candidate.ms.append(step.ms(state, batch, steps))


def alone(problem: Problem) -> tuple[Any, float]:
    """Compile the step for one device.

    Returns:
      The first state, as arrays of the host without its key; and XLA's FLOP of the step
      divided by those predicted.
    """
    where = replace(problem.topology, shape=(1,))
    single = Problem(problem.trace, where, "time", Pins())
    names = single.names("none")
    assignment = Assignment((1,), (0,) * len(names.groups), 0)
    plan = build(problem.trace, where, names, assignment)
    plan = replace(plan, steps_per_call=1, data="streamed")
    program = Program(problem.trace, plan, ahead.devices_for(where))

    text = program.lower().compile().as_text() or ""
    predicted = single.cost("none").estimate(assignment).flops
    state = replace(program.init(SEED), key=None)
    return jax.tree.map(np.asarray, state), hlo.read(text).dot_flops / predicted


def _shown(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as plain data."""
    return {
        **asdict(candidate),
        "score": candidate.score,
        "median_ms": candidate.time,
    }


# ---- the table ----

HEADER = (
    f"{'model':10}  {'space':>6} {'distinct':>8} {'bounded':>7} {'compiled':>8} "
    f" {'regret':>7} {'by bytes':>8}  {'by time':>8} {'faster':>6}  {'chosen ms':>9}"
    f" {'best ms':>8} {'median':>8}  plan"
)


def _lines(r: dict[str, Any]) -> str:
    """Return the lines of a model's result."""
    place = f"{r['place']}/{r['compiled']}" if r["timed"] else "-"
    faster = f"{r['faster']:.1%}" if r["timed"] else "-"
    head = (
        f"{r['model']:10}  {r['assignments']:6} {r['distinct']:8} {r['bounded']:7}"
        f" {r['compiled']:8}  {r['regret']:7.2%} {r['regret_by_bytes']:8.1%} "
        f" {place:>8} {faster:>6}  {r['chosen']['median_ms']:9.4g}"
        f" {r['fastest']['median_ms']:8.4g} {r['median_ms']:8.4g}  "
    )
    notes = [f"chosen: {_plan(r['chosen'])}"]
    if r["regret"] > 0:
        notes.append(f"best by XLA: {_plan(r['best'])}")
    if r["timed"]:
        notes.append(f"fastest: {_plan(r['fastest'])}")
    if r["cut"]:
        notes.append(f"{r['cut']} candidates not compiled: --limit")
    for name, rule in r["rules"].items():
        score = rule["score"] / r["chosen"]["score"] - 1
        ms = rule["median_ms"] / r["chosen"]["median_ms"] - 1
        by_time = f", {ms:+.1%} by time" if r["timed"] else ""
        notes.append(f"{name}: {score:+.1%} by XLA{by_time}")

    pad = " " * len(head)
    first, *others = notes
    return "\n".join([head + first, *(pad + note for note in others)])


def _plan(candidate: dict[str, Any]) -> str:
    mesh = " ".join(f"{name}={size}" for name, size in candidate["mesh"].items())
    predicted = sum(candidate["predicted"].values())
    return (
        f"{candidate['name']} ({mesh}), predicted {predicted * 1e3:.4g} ms, by XLA"
        f" {candidate['score'] * 1e3:.4g} ms"
    )


def _summary(results: Sequence[dict[str, Any]]) -> str:
    """Return the last lines: what holds of all models."""
    worst = max(results, key=lambda r: r["regret"])
    good = sum(r["regret"] <= MOST_REGRET for r in results)
    lines = [
        f"greatest regret {worst['regret']:.2%} ({worst['model']}); at most"
        f" {MOST_REGRET:.0%} in {good} of {len(results)} models"
    ]
    if all(r["timed"] for r in results):
        half = [r["model"] for r in results if r["faster"] > 0.5]
        lines.append(
            f"in the worse half of the space by time: {', '.join(half) or 'none'}"
        )
    short = [r["model"] for r in results if r["cut"]]
    if short:
        lines.append(f"not exhaustive, by --limit: {', '.join(short)}")
    below = sum(r["below_bound"] for r in results)
    if below:
        lines.append(f"{below} candidates are faster by XLA than their bound")
    lines += [_rules_that_win(r) for r in results if r["rules"]]
    return "\n".join(lines)


def _rules_that_win(r: dict[str, Any]) -> str:
    least = r["chosen"]["score"] * (1 - ROUNDING)
    names = [name for name, rule in r["rules"].items() if rule["score"] < least]
    return (
        f"{r['model']}: rules by hand that beat the plan by XLA's figures:"
        f" {', '.join(names) or 'none'}"
    )
