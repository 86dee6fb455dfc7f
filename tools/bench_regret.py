"""`bench.py planner-regret`: how much worse the planner's plan is than the best there
is, on 8 virtual CPU devices.

For each model all assignments are enumerated: every mesh of up to three axes, and on
each axis every combination of the model's named axes (those that a case names, and the
batch) and of keeping the state in parts. Two named axes share a mesh axis as the search
lets them: samples only with experts and rows of embeddings. Neither rematerialization
nor micro-batches are enumerated: all fits. Assignments that come to the same are one:
mesh axes that split the same things merge, and their order makes no difference on the
CPU's uniform links.

A candidate's train step is compiled, and scored by the planner's formula from what XLA
made of it: the seconds of dots in proportion to XLA's FLOP, those of the collectives in
the compiled module by the links of the plan's mesh, and memory traffic and optimizer as
predicted. What XLA's step can't be faster than (all but the collectives) bounds a
candidate before it is compiled: where that alone is slower than the best compiled, it
is not compiled ("bounded").

  regret    of the plan that the planner chose: its score over the least of all candidates, less one
  by bytes  the same with the bytes that XLA says its step accesses, in place of the predicted traffic; XLA counts a loop's
            body once, so this is rough for models with loops
  by time   its place among the compiled candidates, measured: in rounds, each candidate a few steps a round
  faster    share of all candidates that take less time; for the bounded ones, a sample of which is compiled and timed, by it

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
from lepton_jax.errors import SettingError, nearest
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

DEVICES = 8
SEED = 0
MOST_REGRET = 0.03


@dataclass(frozen=True)
class Case:
    """A model to plan: `data` makes (inputs, targets) of a batch; `splits` match the
    named axes that are enumerated beside the batch; `tensor` match those that
    Megatron's rule splits, if the rules by hand are compared.
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
    random = np.random.default_rng(SEED)
    return random.random((samples, *shape), np.float32), random.integers(
        0, classes, samples, np.int32
    )


def tokens(
    samples: int,
    length: int,
    vocab: int,
    classes: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Random text, and the same one token later, or a class for each text."""
    random = np.random.default_rng(SEED)
    text = random.integers(
        0,
        vocab,
        (samples, length + 1),
        np.int32,
    )
    return text[:, :-1].copy(), (
        random.integers(0, classes, samples, np.int32)
        if classes
        else text[:, 1:].copy()
    )


def ratings(
    samples: int, users: int, items: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(SEED)
    pairs = {
        name: random.integers(
            0,
            n,
            samples,
            np.int32,
        )
        for name, n in (("user", users), ("item", items))
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


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `planner-regret` to the subcommands."""
    parser = commands.add_parser(
        "planner-regret",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help=(
            "the planner's plans against all others, compiled and timed on 8 virtual"
            " CPU devices"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    for name, least in (("limit", 1), ("sample", 0), ("rounds", 0), ("steps", 1)):
        if getattr(options, name) < least:
            raise SettingError(
                f"--{name} is {getattr(options, name)}",
                where="command line",
                remedy=f"give {least} or more",
            )
    for name in options.models:
        if name not in CASES:
            raise SettingError(
                f"there is no model {name!r}{nearest(name, CASES)}",
                where="--models",
                remedy=f"the models are {', '.join(CASES)}",
            )
    virtual_devices()
    where = topology(f"cpu:{DEVICES}")
    ahead.devices_for(where)
    if options.calibrate:
        where = topology(f"cpu:{DEVICES}", {"cpu": calibrate_cpu()})
    known = (
        json.loads(options.cache.read_text())
        if options.cache is not None and options.cache.exists()
        else {}
    )
    results = []
    print(
        "the chip is"
        f" {'this CPU, calibrated' if options.calibrate else chr(34) + 'cpu' + chr(34) + ' of the catalogue'}"
    )
    print(HEADER, flush=True)
    for name in dict.fromkeys(options.models):
        key = (
            f"{name} {options.limit} {options.sample} {options.rounds} {options.steps}"
            f" {options.calibrate} {jax.__version__}"
        )
        if key not in known:
            known[key] = {
                "model": name,
                **measure(
                    CASES[name],
                    where,
                    options,
                ),
            }
            if options.cache is not None:
                options.cache.write_text(json.dumps(known))
        results.append(known[key])
        print(_lines(known[key]), flush=True)
    print(_summary(results))
    return results


def virtual_devices() -> None:
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    except RuntimeError:  # JAX was used before: what is there will be looked at
        return


# ---- the space ----


def space(problem: Problem, splits: Sequence[str]) -> tuple[int, dict[Any, Assignment]]:
    """How many assignments there are, and those that differ, by `signature`."""
    names = problem.names("none")
    groups = [
        k
        for k, g in enumerate(names.groups)
        if k != names.batch and any(fnmatch(g.name, p) for p in splits)
    ]
    shared = problem.shared(names)
    roles = []
    for count in range(len(groups) + 1):
        for some in itertools.combinations(groups, count):
            alone = (
                [some]
                if names.batch is None or not set(some) <= shared
                else [some, (names.batch, *some)]
            )
            roles += [(frozenset(split), keep) for split in alone for keep in (0, 1)]
    total = 0
    distinct: dict[Any, Assignment] = {}
    for sizes in _factorings(problem.topology.devices):
        for taken in itertools.product(roles, repeat=len(sizes)):
            masks = tuple(
                sum(1 << i for i, (split, _) in enumerate(taken) if k in split)
                for k in range(len(names.groups))
            )
            a = Assignment(
                sizes,
                masks,
                sum(keep << i for i, (_, keep) in enumerate(taken)),
            )
            if all(
                g.divisor % a.counts[m] == 0
                for g, m in zip(names.groups, masks, strict=True)
            ):
                total += 1
                distinct.setdefault(signature(problem, a), a)
    return total, distinct


def _factorings(n: int, most: int = 3) -> list[tuple[int, ...]]:
    """`n` as products of at most `most` factors above 1, in falling order."""

    def go(
        n: int,
        largest: int,
        most: int,
    ) -> Iterator[tuple[int, ...]]:
        if n == 1:
            yield ()
        for k in range(min(n, largest), 1, -1) if most else ():
            if n % k == 0:
                yield from ((k, *rest) for rest in go(n // k, k, most - 1))

    return list(go(n, n, most))


def signature(problem: Problem, a: Assignment) -> Any:
    """What an assignment comes to: for each mesh axis what it splits of named axes and
    of what the state keeps; axes with the same are one, and their order is of no
    account.
    """
    names = problem.names("none")
    stored = tuple(m for spec in names.storage(a.masks, a.keep, a.counts) for m in spec)
    axes: dict[tuple, int] = {}
    for bit, size in enumerate(a.sizes):
        if size > 1:
            role = tuple(k for k, m in enumerate((*a.masks, *stored)) if m >> bit & 1)
            axes[role] = axes.get(role, 1) * size
    return tuple(sorted((size, role) for role, size in axes.items()))


def by_rules(problem: Problem, tensor: Sequence[str]) -> dict[str, Assignment]:
    """What experts write by hand for a language model."""
    names = problem.names("none")
    n = problem.topology.devices
    assert names.batch is not None

    def rule(
        sizes: tuple[int, ...],
        batch: int,
        split: int,
    ) -> Assignment:
        masks = [
            split if any(fnmatch(g.name, p) for p in tensor) else 0
            for g in names.groups
        ]
        masks[names.batch] = batch  # type: ignore[index]
        return Assignment(sizes, tuple(masks), batch)

    return {
        "FSDP": rule((n,), 1, 0),
        "Megatron": rule((n,), 0, 1),
        **{f"FSDP {n // k} x Megatron {k}": rule((n // k, k), 1, 2) for k in (2, 4)},
    }


# ---- one candidate ----


@dataclass
class Found:
    """A compiled candidate: seconds by kind as predicted, and with XLA's FLOP and
    collectives; FLOP and peak bytes of a device, as predicted and by XLA; seconds by
    the bytes accessed; the collectives by kind and mesh axes as [count, bytes,
    seconds]; milliseconds of a step in each round.
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
        return sum(self.xla.values())

    @property
    def time(self) -> float:
        return statistics.median(self.ms) if self.ms else float("nan")


def bound(estimate: Estimate, real: float) -> float:
    """Seconds that the step takes at the least by the formula; `real` is XLA's share of
    the FLOP counted.
    """
    return (
        estimate.total
        - estimate.seconds["communication"]
        - (1 - real) * estimate.seconds["matmul"]
    )


def compiled(
    problem: Problem,
    a: Assignment,
    estimate: Estimate,
) -> tuple[Found, Step]:
    names = problem.names("none")
    where = problem.topology
    made = build(
        problem.trace,
        where,
        names,
        a,
        estimate=problem.cost("none").estimate(a, causes=True),
        held=problem.memory("none").predict(a),
    )
    plan = replace(made, steps_per_call=1, data="streamed")
    program = Program(
        problem.trace,
        plan,
        ahead.mesh_devices(
            where,
            plan.mesh,
            ahead.devices_for(where),
        ),
    )
    began = time.perf_counter()
    executable, memory = ahead.compile_for(program.lower())
    seconds = time.perf_counter() - began
    module = hlo.read(executable.as_text() or "")
    moves = collectives(module, plan, where)
    xla = {
        **estimate.seconds,
        "matmul": (
            estimate.seconds["matmul"] * module.dot_flops / max(estimate.flops, 1.0)
        ),
        "communication": sum(m[2] for m in moves.values()),
    }
    touched = float(
        (executable.cost_analysis() or {}).get("bytes accessed", float("nan"))
    )
    chip = where.device
    by_bytes = (
        module.dot_flops / (chip.peak("float32") * chip.matmul_fraction)
        + xla["communication"]
        + touched / (chip.bandwidth * chip.memory_fraction)
    )
    planned = {
        f"{c.kind} over {' and '.join(c.axes)}": [c.count, c.bytes, c.seconds]
        for c in plan.collectives
    }
    found = Found(
        plan.name,
        plan.mesh,
        dict(estimate.seconds),
        xla,
        (estimate.flops, module.dot_flops),
        touched,
        by_bytes,
        (plan.peak, memory.peak),
        moves,
        planned,
        seconds,
        {axis.name: list(axis.mesh) for axis in plan.axes if axis.mesh},
        memory.peak <= where.device.memory,
    )
    return found, Step(program, executable)


def collectives(
    module: hlo.Compiled, plan: Plan, where: Topology
) -> dict[str, list[float]]:
    """Collectives of a compiled step by kind and mesh axes: [count, bytes, seconds on
    the links of the plan's mesh].
    """
    links = lay(plan.mesh, where)
    sums: dict[str, list[float]] = {}
    for c in module.collectives:
        axes = (
            c.axes(plan.mesh)
            or hlo.axes_of(c.groups, plan.mesh, permute=True)
            or tuple(plan.mesh)
        )
        if all(len(group) == 1 for group in c.groups):
            continue
        entry = sums.setdefault(f"{c.kind} over {' and '.join(axes)}", [0, 0.0, 0.0])
        kind = "all-to-all" if c.kind == "ragged-all-to-all" else c.kind
        entry[0] += c.times
        entry[1] += c.bytes * c.times
        entry[2] += (
            join([links[axis] for axis in axes]).seconds(kind, c.bytes) * c.times
        )
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
        """Milliseconds a step, after one that is not timed; `state` and `batch` are the
        host's; the state has no key.
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
    """Enumerate, compile, score and time; a summary and every candidate."""
    batch = case.data()
    recipe = lepton.Recipe(
        model=case.model,
        loss=case.loss,
        optimizer=optax.adamw(1e-3),
        batch_size=len(batch[1]),
        seed=SEED,
    )
    problem = Problem(
        trace(recipe, *batch),
        where,
        "time",
        Pins(),
    )
    best = search(problem)[0].assignment
    assert best.remat == "none" and best.micro_batches == 1, (
        "models here fit as they are"
    )
    total, distinct = space(problem, case.splits)
    chosen = signature(problem, best)
    named = {chosen: "chosen"}
    inside = chosen in distinct
    distinct[chosen] = best
    for rule, a in by_rules(problem, case.tensor).items() if case.tensor else ():
        key = signature(problem, a)
        named[key] = f"{named[key]}, {rule}" if key in named else rule
        distinct.setdefault(key, a)
    estimates = {}
    # the cost remembers what it knows of one mesh
    for key, a in sorted(distinct.items(), key=lambda x: x[1].sizes):
        estimates[key] = problem.cost("none").estimate(a)
    state, real = alone(problem)
    found, runs, bounded = compile_all(
        problem,
        distinct,
        estimates,
        named,
        real,
        options.limit,
        options.sample,
    )
    timed(
        state,
        batch,
        [(found[key], runs[key]) for key in found],
        options.rounds,
        options.steps,
    )
    fitting = {key: f for key, f in found.items() if f.fits}
    least = min(f.score for f in fitting.values())
    faster = [key for key in found if found[key].time < found[chosen].time]
    drawn = bounded & found.keys()
    # of the bounded ones, by the sample
    share = sum(key in bounded for key in faster) / max(1, len(drawn))
    beaten = sum(key not in bounded for key in faster) + len(bounded) * share
    order = sorted(found.values(), key=lambda f: f.time)
    ranked = sorted(found, key=lambda key: found[key].score)
    return {
        "assignments": total,
        "distinct": len(distinct),
        "bounded": len(bounded),
        "compiled": len(found),
        "drawn": len(drawn),
        "cut": len(distinct) - len(bounded | found.keys()),
        "chosen_inside": inside,
        "regret": found[chosen].score / least - 1,
        "fits": found[chosen].fits,
        "regret_by_bytes": (
            found[chosen].by_bytes / min(f.by_bytes for f in fitting.values()) - 1
        ),
        "place": len(faster) + 1,
        "faster": beaten / len(distinct),
        "timed": bool(options.rounds),
        "chosen": _shown(found[chosen]),
        "best": _shown(
            min(
                fitting.values(),
                key=lambda f: f.score,
            )
        ),
        "fastest": _shown(order[0]),
        "below_bound": sum(
            found[key].score < bound(estimates[key], real) * (1 - 1e-6) for key in found
        ),
        "median_ms": statistics.median(f.time for f in order),
        "rules": {
            name: _shown(found[key]) for key, name in named.items() if name != "chosen"
        },
        "candidates": [
            {**_shown(found[key]), "bounded": key in bounded} for key in ranked
        ],
    }


def compile_all(
    problem: Problem,
    distinct: Mapping[Any, Assignment],
    estimates: Mapping[Any, Estimate],
    named: Mapping[Any, str],
    real: float,
    limit: int,
    sample: int,
) -> tuple[dict[Any, Found], dict[Any, Step], set[Any]]:
    """Compiled candidates, the best predicted first, and a sample of those that are
    bounded by then; the bounded ones.
    """
    found: dict[Any, Found] = {}
    runs: dict[Any, Step] = {}
    least = float("inf")
    bounded = []
    for key in sorted(
        distinct,
        key=lambda key: (key not in named, estimates[key].total),
    ):
        if key not in named and bound(estimates[key], real) > least:
            bounded.append(key)
        elif key in named or len(found) < limit:
            found[key], runs[key] = compiled(
                problem,
                distinct[key],
                estimates[key],
            )
            least = min(least, found[key].score if found[key].fits else least)
    for i in np.random.default_rng(SEED).permutation(len(bounded))[:sample]:
        found[bounded[i]], runs[bounded[i]] = compiled(
            problem,
            distinct[bounded[i]],
            estimates[bounded[i]],
        )
    return found, runs, set(bounded)


def timed(
    state: Any,
    batch: Any,
    pairs: Sequence[tuple[Found, Step]],
    rounds: int,
    steps: int,
) -> None:
    """Fill in milliseconds: in each round each candidate once, in an order of chance,
    so that none is always disturbed.
    """
    order = list(range(len(pairs)))
    random = np.random.default_rng(SEED)
    for _ in range(rounds):
        random.shuffle(order)
        for i in order:
            gc.collect()
            pairs[i][0].ms.append(pairs[i][1].ms(state, batch, steps))


def alone(problem: Problem) -> tuple[Any, float]:
    """The first state, as arrays of the host without its key; and XLA's FLOP of a step
    on one device over those predicted.
    """
    where = replace(problem.topology, shape=(1,))
    single = Problem(
        problem.trace,
        where,
        "time",
        Pins(),
    )
    a = Assignment(
        (1,),
        (0,) * len(single.names("none").groups),
        0,
    )
    plan = replace(
        build(
            problem.trace,
            where,
            single.names("none"),
            a,
        ),
        steps_per_call=1,
        data="streamed",
    )
    program = Program(
        problem.trace,
        plan,
        ahead.devices_for(where),
    )
    flops = hlo.read(program.lower().compile().as_text() or "").dot_flops
    state = jax.tree.map(
        np.asarray,
        replace(
            program.init(SEED),
            key=None,
        ),
    )
    return state, flops / single.cost("none").estimate(a).flops


def _shown(f: Found) -> dict[str, Any]:
    return {
        **asdict(f),
        "score": f.score,
        "median_ms": f.time,
    }


# ---- the table ----

HEADER = (
    f"{'model':10}  {'space':>6} {'distinct':>8} {'bounded':>7} {'compiled':>8} "
    f" {'regret':>7} {'by bytes':>8}  {'by time':>8} {'faster':>6}  {'chosen ms':>9}"
    f" {'best ms':>8} {'median':>8}  plan"
)


def _lines(r: dict[str, Any]) -> str:
    place, faster = (
        (f"{r['place']}/{r['compiled']}", f"{r['faster']:.1%}")
        if r["timed"]
        else ("-", "-")
    )
    lines = [
        f"{r['model']:10}  {r['assignments']:6} {r['distinct']:8} {r['bounded']:7}"
        f" {r['compiled']:8}  {r['regret']:7.2%} {r['regret_by_bytes']:8.1%} "
        f" {place:>8} {faster:>6}  {r['chosen']['median_ms']:9.4g}"
        f" {r['fastest']['median_ms']:8.4g} {r['median_ms']:8.4g}  chosen:"
        f" {_plan(r['chosen'])}"
    ]
    pad = " " * lines[0].index("chosen:")
    lines += [f"{pad}best by XLA: {_plan(r['best'])}"] if r["regret"] > 0 else []
    lines += [f"{pad}fastest: {_plan(r['fastest'])}"] if r["timed"] else []
    lines += [f"{pad}{r['cut']} candidates not compiled: --limit"] if r["cut"] else []
    for name, rule in r["rules"].items():
        score, ms = (rule[key] / r["chosen"][key] - 1 for key in ("score", "median_ms"))
        lines.append(
            f"{pad}{name}: {score:+.1%} by XLA"
            + (f", {ms:+.1%} by time" if r["timed"] else "")
        )
    return "\n".join(lines)


def _plan(found: dict[str, Any]) -> str:
    mesh = " ".join(f"{name}={size}" for name, size in found["mesh"].items())
    predicted = sum(found["predicted"].values())
    return (
        f"{found['name']} ({mesh}), predicted {predicted * 1e3:.4g} ms, by XLA"
        f" {found['score'] * 1e3:.4g} ms"
    )


def _summary(results: Sequence[dict[str, Any]]) -> str:
    worst = max(results, key=lambda r: r["regret"])
    lines = [
        f"greatest regret {worst['regret']:.2%} ({worst['model']}); at most"
        f" {MOST_REGRET:.0%} in {sum(r['regret'] <= MOST_REGRET for r in results)} of"
        f" {len(results)} models"
    ]
    if all(r["timed"] for r in results):
        half = [r["model"] for r in results if r["faster"] > 0.5]
        lines.append(
            f"in the worse half of the space by time: {', '.join(half) or 'none'}"
        )
    if short := [r["model"] for r in results if r["cut"]]:
        lines.append(f"not exhaustive, by --limit: {', '.join(short)}")
    if below := sum(r["below_bound"] for r in results):
        lines.append(f"{below} candidates are faster by XLA than their bound")
    for r in results:
        worse = [
            n
            for n, rule in r["rules"].items()
            if rule["score"] < r["chosen"]["score"] * (1 - 1e-9)
        ]
        if r["rules"]:
            lines.append(
                f"{r['model']}: rules by hand that beat the plan by XLA's figures:"
                f" {', '.join(worse) or 'none'}"
            )
    return "\n".join(lines)
