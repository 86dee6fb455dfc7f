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
# Collectives on one side alone that the text lists, of each side.
SHOWN = 12

# Share of the predicted step by which the seconds of the planned and of the compiled
# collectives may differ over the same axes (assumption).
MOST_SHIFT = 0.05
# Where collectives on one side alone are more than this share of the traffic, already
# the next share of the step matters (assumptions).
MOST_TRAFFIC = 0.1
LEAST_SHIFT = 0.01


@dataclass(frozen=True)
class Row:
    """Traffic of one kind over the same mesh axes in one step.

    Attributes:
      axes: the mesh axes.
      kind: such as "all-reduce".
      planned, planned_count: bytes that a device sends and collectives, by the plan.
      found, found_count: the same of XLA's program, as rings.
      inside: whether they run in a loop, and so several times a step.
      planned_seconds, found_seconds: seconds of both if nothing ran next to them, those
        that run equally often joined to one; 0 for a chip that is not known.
      where: "file:line" with most of the planned bytes; empty if nothing is planned.
    """

    axes: tuple[str, ...]
    kind: str
    planned: float
    planned_count: int
    found: float
    found_count: int
    inside: bool = False
    planned_seconds: float = 0.0
    found_seconds: float = 0.0
    where: str = ""


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
class Absent:
    """Collectives that the plan expects and the compiled step doesn't have.

    Attributes:
      where: "file:line" of the user's code; empty if none is known.
      kind, axes: as in `Expected`.
      count: how many the plan expects in a step.
      bytes: bytes of all of them, sent by a device in one step.
      missing: the part of these bytes that the compiled step doesn't send.
      share: `missing` as a share of the planned traffic.
      why: the difference in words.
    """

    where: str
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    missing: float
    share: float
    why: str


@dataclass(frozen=True)
class Shift:
    """Seconds that the collectives over some axes take more or less than planned.

    Attributes:
      axes, inside: as in `Row`.
      planned_count, found_count: collectives of a step.
      planned, found: seconds of a step.
      share: the difference as a share of the predicted step; negative where XLA's take
        less.
      where: "file:line" with most of the planned bytes.
    """

    axes: tuple[str, ...]
    inside: bool
    planned_count: int
    found_count: int
    planned: float
    found: float
    share: float
    where: str


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
      absent: collectives of the plan that XLA doesn't run, the largest first.
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
    absent: tuple[Absent, ...] = ()

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
    def shifts(self) -> list[Shift]:
        """Differences in seconds by axes, in and out of loops, the largest first.

        They are empty for a plan without a predicted time.
        """
        step = self.plan.step_seconds
        rows_of: dict[tuple, list[Row]] = defaultdict(list)
        for row in self.rows:
            rows_of[row.axes, row.inside].append(row)
        shifts = []
        for (axes, inside), rows in rows_of.items() if step else ():
            planned = sum(row.planned_seconds for row in rows)
            found = sum(row.found_seconds for row in rows)
            shift = Shift(
                axes=axes,
                inside=inside,
                planned_count=sum(row.planned_count for row in rows),
                found_count=sum(row.found_count for row in rows),
                planned=planned,
                found=found,
                share=(found - planned) / step,
                where=max(rows, key=lambda row: row.planned).where,
            )
            shifts.append(shift)
        return sorted(shifts, key=lambda shift: -abs(shift.share))

    @property
    def agrees(self) -> bool:
        """Whether XLA communicates as planned, up to differences without weight.

        They have weight where over the same axes, in or out of loops, the seconds of
        communication differ by more than `MOST_SHIFT` of the predicted step; or by
        `LEAST_SHIFT` in all, if collectives that only one side has are more than
        `MOST_TRAFFIC` of the traffic.
        """
        shares = [abs(shift.share) for shift in self.shifts]
        alone = sum(item.share for item in self.unexpected)
        alone += sum(item.share for item in self.absent)
        if not shares:
            return alone <= MOST_TRAFFIC
        if max(shares) > MOST_SHIFT:
            return False
        return alone <= MOST_TRAFFIC or sum(shares) <= LEAST_SHIFT

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
            "absent": [asdict(item) for item in self.absent],
            "shifts": [asdict(item) for item in self.shifts],
            "agrees": self.agrees,
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
            *self._absent_lines(),
            *self._shift_lines(),
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
                f"{row.kind}, in loops" if row.inside else row.kind,
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

    def _absent_lines(self) -> list[str]:
        if not self.absent:
            return ["XLA runs all collectives of the plan"]
        share = sum(item.share for item in self.absent)
        lines = [
            f"planned, and not in XLA's program: {share:.0%} of the planned traffic"
        ]
        for item in self.absent[:SHOWN]:
            lines.append(
                f"  {item.share:5.1%}  {size(item.missing)}  {item.count} x {item.kind}"
                f" over {_over(item.axes)}  {item.where or 'no source line'}:"
                f" {item.why}"
            )
        rest = len(self.absent) - SHOWN
        if rest > 0:
            lines.append(f"  and {rest} smaller ones")
        return lines

    def _shift_lines(self) -> list[str]:
        lines = [
            _shift_line(shift)
            for shift in self.shifts
            if abs(shift.share) > LEAST_SHIFT
        ]
        verdict = "agree" if self.agrees else "DIFFER"
        lines.append(f"the plan and XLA's program {verdict} in their communication")
        return lines


def _shift_line(shift: Shift) -> str:
    place = "in loops" if shift.inside else "out of loops"
    planned = f"{shift.planned_count:,} collectives of {shift.planned * 1e3:.3g} ms"
    compiled = f"{shift.found_count:,} of {shift.found * 1e3:.3g} ms"
    where = shift.where or "no known line"
    return (
        f"{_over(shift.axes)}, {place}: {planned} planned, {compiled} compiled:"
        f" {shift.share:+.0%} of the step; most is planned at {where}"
    )


def _amount(name: str, number: float) -> str:
    return si(number) + "FLOP" if name == "flops" else size(number)


def _over(axes: tuple[str, ...]) -> str:
    return " + ".join(axes) or "no whole axes"
