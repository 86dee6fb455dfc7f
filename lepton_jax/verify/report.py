"""The comparison of a plan with XLA's program: its figures, its text, its record."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from lepton_jax.planner import Plan, ahead
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.show.text import grid, meshed, si

# Kinds of a plan's bytes that exist before a step.
ARGUMENTS = ("params", "optimizer", "variables", "batch", "data")
# Unexpected collectives that the text lists.
SHOWN = 12


@dataclass(frozen=True)
class Row:
    """Traffic of one kind over the same mesh axes in one step.

    Attributes:
      axes: the mesh axes.
      kind: such as "all-reduce".
      planned, planned_count: bytes that a device sends and collectives, by the plan.
      found, found_count: the same of XLA's program, as rings.
    """

    axes: tuple[str, ...]
    kind: str
    planned: float
    planned_count: int
    found: float
    found_count: int


@dataclass(frozen=True)
class Unexpected:
    """Collectives of the compiled step that the plan doesn't explain.

    Attributes:
      where: "file:line" of the user's code; empty if XLA doesn't tell.
      kind, axes: as in `CollectiveFound`; no axes if the groups are no product of them.
      count: how many a step runs.
      bytes: bytes of all of them, sent by a device in one step.
      excess: the part of these bytes that the plan doesn't explain.
      share: `bytes` as a share of the step's traffic.
      op_name: JAX's name stack.
      why: the difference from the plan, in words.
    """

    where: str
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    excess: float
    share: float
    op_name: str
    why: str


@dataclass(frozen=True)
class Verification:
    """A plan's prediction of its train step and XLA's program, on one device.

    Attributes:
      plan: the plan that was compiled.
      memory: XLA's account; None if it refuses the program.
      memory_error: why it refuses.
      flops: FLOPs of the matmuls and convolutions of a step, loops multiplied out.
      rows: traffic by axes and kind, the largest first.
      unexpected: collectives that the plan doesn't explain, the largest first.
      seconds: seconds that compiling took.
      notes: limits of these figures.
    """

    plan: Plan
    memory: ahead.Memory | None
    memory_error: ahead.TooLarge | None
    flops: float
    rows: tuple[Row, ...]
    unexpected: tuple[Unexpected, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float | None:
        """Bytes by XLA's account; for a refused program, by its message if it says."""
        if self.memory is None:
            return self.memory_error.needed if self.memory_error else None
        return self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether XLA's peak fits the memory that the plan was made for."""
        return self.memory is not None and self.memory.peak <= self.plan.memory

    @property
    def predicted(self) -> dict[str, float]:
        """The plan's figures under XLA's names; empty for a plan without any."""
        held = self.plan.bytes_per_device
        figures: dict[str, float] = {}
        if held:
            arguments = sum(held.get(kind, 0) for kind in ARGUMENTS)
            figures["arguments"] = arguments
            figures["temporaries"] = self.plan.peak - arguments
            figures["peak"] = self.plan.peak
        if self.plan.flops:
            figures["flops"] = self.plan.flops
        return figures

    @property
    def found(self) -> dict[str, float]:
        """XLA's figures; empty for a program that it refuses."""
        memory = self.memory
        if memory is None:
            return {}
        return {
            "arguments": memory.arguments,
            "temporaries": memory.peak - memory.arguments,
            "peak": memory.peak,
            "flops": self.flops,
        }

    @property
    def totals(self) -> list[tuple[tuple[str, ...], float, float]]:
        """(axes, bytes planned, bytes found) of axes with several kinds."""
        rows_over: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in self.rows:
            rows_over[row.axes].append(row)

        totals = []
        for axes, rows in rows_over.items():
            if len(rows) > 1:
                planned = sum(row.planned for row in rows)
                found = sum(row.found for row in rows)
                totals.append((axes, planned, found))
        return totals

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the plan as plain data."""
        return {
            "plan": self.plan.name,
            "mesh": self.plan.mesh,
            "topology": self.plan.topology,
            "fits": self.fits,
            "limit": self.plan.memory,
            "predicted": self.predicted,
            "xla": self.found,
            "memory_error": self.memory_error and self.memory_error.what,
            "peak": self.peak,
            "traffic": [asdict(row) for row in self.rows],
            "unexpected": [asdict(item) for item in self.unexpected],
            "compile_seconds": self.seconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        plan = self.plan
        plural = "es" if plan.micro_batches > 1 else ""
        title = (
            f"{plan.name}, mesh {meshed(plan)}, remat {plan.remat},"
            f" {plan.micro_batches} micro-batch{plural}:"
            f" compiled for {plan.topology} in {self.seconds:.0f} s"
        )
        if self.memory_error is not None:
            return f"{title}\nit does not fit: {self.memory_error.what}"

        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines = [
            title,
            "",
            *self._figure_lines(),
            f"{verdict} in {size(plan.memory)}",
            *self._traffic_lines(),
            "",
            *self._unexpected_lines(),
            *(f"! {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _figure_lines(self) -> list[str]:
        predicted = self.predicted
        cells = []
        for name, found in self.found.items():
            expected = predicted.get(name)
            shown = "-" if expected is None else _amount(name, expected)
            error = f"{found / expected - 1:+.1%}" if expected else "-"
            cells.append(
                [
                    name,
                    shown,
                    _amount(name, found),
                    error,
                ]
            )
        heads = ("a device", "predicted", "XLA", "off by")
        return list(grid(heads, cells, "<>>>"))

    def _traffic_lines(self) -> list[str]:
        if not self.rows:
            return []
        cells = [
            [
                _over(row.axes),
                row.kind,
                f"{row.planned_count:,}",
                size(row.planned),
                f"{row.found_count:,}",
                size(row.found),
            ]
            for row in self.rows
        ]
        for axes, planned, found in self.totals:
            title = f"{' + '.join(axes)}, all kinds"
            cells.append(
                [
                    title,
                    "",
                    "",
                    size(planned),
                    "",
                    size(found),
                ]
            )
        heads = (
            "collectives of a step, over",
            "",
            "planned",
            "sent",
            "XLA's",
            "sent",
        )
        return ["", *grid(heads, cells, "<<>>>>")]

    def _unexpected_lines(self) -> list[str]:
        if not self.unexpected:
            return ["the plan explains all collectives"]
        share = sum(item.share for item in self.unexpected)
        lines = [f"not explained by the plan: {share:.0%} of the traffic"]
        for item in self.unexpected[:SHOWN]:
            where = item.where or item.op_name or "no source line"
            lines.append(
                f"  {item.share:5.1%}  {size(item.bytes)}  {item.count} x {item.kind}"
                f" over {_over(item.axes)}  {where}: {item.why}"
            )
        rest = len(self.unexpected) - SHOWN
        if rest > 0:
            lines.append(f"  and {rest} smaller ones")
        return lines


def _amount(name: str, number: float) -> str:
    return si(number) + "FLOP" if name == "flops" else size(number)


def _over(axes: tuple[str, ...]) -> str:
    return " + ".join(axes) or "no whole axes"
