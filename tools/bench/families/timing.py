"""Predict a step's time and FLOP, compile the step, and run it on virtual CPUs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import PlanError
from lepton_jax.hardware import Chip, calibrate_cpu
from lepton_jax.planner import ahead
from lepton_jax.train.program import Program
from lepton_jax.verify import hlo
from tools.bench.families import figures
from tools.bench.families.programs import Drawn, draw_timed

SEED = 0
ROUNDS = 5  # their median counts
WARM_UP = 3  # calls before those that are timed: the first ones touch new memory
CLOSE = 0.03  # relative error of FLOP that counts as right: the claim's bar


@dataclass
class Runner:
    """A compiled train step with its arguments on the devices.

    Attributes:
      step, state: of the program.
      block: the batches of a call.
      bounds: which of them it takes; () if there is one.
    """

    step: Any
    state: Any
    block: Any
    bounds: tuple[int, ...] = ()

    def run(self, calls: int) -> float:
        """Run calls of one or several steps, as training does; return the seconds."""
        record = None
        began = time.perf_counter()
        for _ in range(calls):
            self.state, record = self.step(
                self.state,
                self.block,
                *self.bounds,
                None,
            )
        jax.block_until_ready((self.state, record))
        return time.perf_counter() - began


def measure(
    family: str,
    number: int,
    steps: int,
    chip: Chip | None,
) -> dict[str, Any]:
    """Plan, compile and run a program.

    Args:
      family: of the program.
      number: of the program in its family.
      steps: how many are timed in each round, or as many more as fill the last call.
      chip: figures of this machine; None: the catalogue's.

    Returns:
      A row for `figures.time_summary`.
    """
    drawn = draw_timed(family, number)
    case = drawn.case
    row: dict[str, Any] = {
        "family": family,
        "number": number,
        "topology": drawn.topology,
        "batch_size": case.batch_size,
    }
    chips = None if chip is None else {"cpu": chip}
    where = lepton.topology(drawn.topology, chips)
    traced = lepton.trace(
        case.recipe(),
        case.inputs,
        case.targets,
    )
    try:
        plan = lepton.plan(traced, where, **case.fixed)
    except PlanError as error:
        return row | {"outcome": "no plan", "why": str(error)}

    plan = replace(plan, data="streamed")
    mesh = ahead.mesh_devices(
        where,
        plan.mesh,
        ahead.devices_for(where),
    )
    program = Program(traced, plan, mesh)
    executable, _ = ahead.compile_for(program.lower())
    row |= {
        "plan": plan.name,
        "mesh": dict(plan.mesh),
        "predicted_ms": plan.step_seconds * 1e3,
        "kinds": dict(plan.seconds),
    }
    row |= flop(traced, plan, executable)
    a_call = plan.steps_per_call
    runner = Runner(
        executable,
        program.init(SEED),
        arguments(drawn, traced, program),
        (0, a_call) if a_call > 1 else (),
    )
    runner.run(WARM_UP)
    calls = math.ceil(steps / a_call)
    timed = calls * a_call
    ms = [1e3 * runner.run(calls) / timed for _ in range(ROUNDS)]
    return row | {
        "outcome": "compared",
        "ms": statistics.median(ms),
        "rounds": ms,
        "ratio": row["predicted_ms"] / statistics.median(ms),
    }


def flop(
    traced: lepton.Trace,
    plan: lepton.Plan,
    executable: Any,
) -> dict[str, float]:
    """Return a plan's FLOP on a device, those of the compiled step, and the error.

    XLA's cost analysis counts a loop's body once, and elementwise operations as well.
    So the matmuls and convolutions of XLA's own program are counted, with the turns of
    its loops. The analysis is kept next to them.
    """
    module = hlo.read(executable.as_text() or "")
    analysis = executable.cost_analysis() or {}
    found = {
        "flops": plan.flops,
        "trace_flops": traced.flops,
        "xla_flops": module.dot_flops,
        "xla_analysis": float(analysis.get("flops", 0.0)),
        "unknown_loops": len(module.unknown_loops),
    }
    if module.dot_flops:
        found["flop_error"] = plan.flops / module.dot_flops - 1
    return found


def arguments(
    drawn: Drawn,
    traced: lepton.Trace,
    program: Program,
) -> Any:
    """Return the batches of a call on the devices.

    They are normal numbers, and ids below the case's `ids`.
    """
    several = program.plan.steps_per_call
    steps = (several,) if several > 1 else ()
    random = np.random.default_rng(SEED)

    def values(leaf: Any) -> np.ndarray:
        shape = (*steps, *leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return random.standard_normal(
                shape,
                np.float32,
            ).astype(leaf.dtype)
        return random.integers(
            0,
            drawn.case.ids,
            shape,
        ).astype(leaf.dtype)

    batch = jax.tree.map(
        values,
        (traced.inputs, traced.targets),
    )
    return jax.device_put(batch, program.block_sharding)


def calibrated() -> Chip:
    """Return the figures of this machine, measured now."""
    return calibrate_cpu()


# ---- figures ----


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the aggregate figures of predicted and measured time, and of FLOP.

    Returns:
      programs, families, compared, not_planned, failed: how many.
      tau: Kendall's, of predicted and measured milliseconds.
      median_ratio: of predicted to measured time.
      median_flop_error, worst_flop_error: of the families, each with the mean of its
        programs' errors without a sign.
      flop_families: number of families whose error is known, and of those within 3 %.
    """
    compared = [row for row in rows if row["outcome"] == "compared"]
    outcomes = [row["outcome"] for row in rows]
    errors = sorted(flop_errors(compared).values())
    predicted = [row["predicted_ms"] for row in compared]
    measured = [row["ms"] for row in compared]
    return {
        "programs": len(rows),
        "families": len({row["family"] for row in rows}),
        "compared": len(compared),
        "not_planned": outcomes.count("no plan"),
        "failed": outcomes.count("failed"),
        "tau": kendall_tau(predicted, measured),
        "median_ratio": _median([row["ratio"] for row in compared]),
        "median_ms": _median(measured),
        "median_flop_error": _median(errors),
        "worst_flop_error": errors[-1] if errors else None,
        "flop_families": [len(errors), sum(e <= CLOSE for e in errors)],
    }


def flop_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean relative error, without a sign, of each family's FLOP."""
    known = [row for row in rows if "flop_error" in row]
    return {
        name: statistics.mean(abs(row["flop_error"]) for row in group)
        for name, group in figures.by(known, figures.family).items()
    }


def kendall_tau(
    first: Sequence[float],
    second: Sequence[float],
) -> float | None:
    """Return Kendall's tau-b of two rankings; None: they say nothing.

    >>> kendall_tau([1, 2, 3, 4], [1, 2, 4, 3])
    0.6666666666666667
    """
    x = np.sign(np.subtract.outer(first, first))
    y = np.sign(np.subtract.outer(second, second))
    norm = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / norm) if norm else None


def text(found: Mapping[str, Any]) -> str:
    """Return aggregate figures as a sentence."""
    known, close = found["flop_families"]
    parts = [
        f"{found['programs']} programs of {found['families']} families",
        f"{found['not_planned']} not planned",
        f"{found['failed']} failed",
    ]
    if found["tau"] is not None:
        parts.append(f"Kendall's tau {found['tau']:.3f}")
        parts.append(f"predicted to measured {found['median_ratio']:.2f} (median)")
    if known:
        parts.append(
            f"FLOP: median error {found['median_flop_error']:.1%}, worst family"
            f" {found['worst_flop_error']:.1%}, {close} of {known} within 3 %"
        )
    return "; ".join(parts)


def line(row: Mapping[str, Any]) -> str:
    """Return the line of a program of the tuning half."""
    name = f"{row['family']}:{row['number']}"
    head = f"{name:17} {row.get('topology', '?'):6}"
    if row["outcome"] != "compared":
        return f"{head} {row['outcome']}: {row['why'].splitlines()[0][:120]}"
    mesh = "x".join(
        map(
            str,
            row["mesh"].values(),
        )
    )
    flops = f"{row['flops'] / 1e9:8.3f} GFLOP"
    if "flop_error" in row:
        flops += f", {row['flop_error']:+6.1%} of XLA's"
    loops = f" ({row['unknown_loops']} unknown loops)" if row["unknown_loops"] else ""
    return (
        f"{head} {row['plan'][:24] + ' ' + mesh:28} predicted"
        f" {row['predicted_ms']:8.2f} ms, measured {row['ms']:8.2f} ms, ratio"
        f" {row['ratio']:5.2f}; {flops}{loops}"
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
