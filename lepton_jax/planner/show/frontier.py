"""Several topologies side by side: how long each takes, and what that costs.

The frontier are the topologies that no other one beats in both. With 2 h for $80,
3 h for $50 and 4 h for $60, the first two are on it: the third is slower and dearer
than the second.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.plans import Plan
from lepton_jax.planner.show.chart import chart
from lepton_jax.planner.show.html import table, wrapped
from lepton_jax.planner.show.points import (
    Point,
    letters,
    margin_of,
    price_of,
    step_of,
    time_of,
)
from lepton_jax.planner.show.rows import meshed
from lepton_jax.planner.show.scatter import scatter
from lepton_jax.planner.show.style import LIGHT
from lepton_jax.planner.show.text import WIDTH, grid
from lepton_jax.planner.show.words import HOUR, amount


@dataclass(frozen=True)
class Frontier:
    """Topologies compared: see `frontier`.

    Attributes:
      points: one a topology, in the order given.
      tokens: how many are consumed.
      unit: "tokens" or "samples".
    """

    points: tuple[Point, ...]
    tokens: float
    unit: str

    def __str__(self) -> str:
        marks = letters(self.points)
        titles = (
            "",
            "topology",
            "strategy",
            "time",
            "price",
            "a step",
            "memory free",
            "",
        )
        cells = [
            (
                mark,
                point.topology,
                point.name,
                time_of(point),
                price_of(point),
                step_of(point),
                margin_of(point),
                point.marks,
            )
            for mark, point in zip(marks, self.points, strict=True)
            if not point.problem
        ]
        lines = [f"{amount(self.tokens)} {self.unit}"]
        if cells:
            lines += grid(titles, cells, "<<<>>>><", flexible=(2,))
        for point in self.points:
            if point.problem:
                problem = f"{point.topology}: {point.problem}"
                lines += textwrap.wrap(problem, WIDTH, subsequent_indent="  ")
        drawn = chart(self.points, marks)
        if drawn:
            lines += ["", *drawn]
        return "\n".join(lines)

    def svg(self) -> str:
        """Return time against price as a drawing for a light page.

        Both are logarithmic, with the frontier as a line; it is empty if nothing fits.
        """
        pairs = LIGHT.split(";")
        colours = dict(pair.split(":") for pair in pairs)
        style = f".front text{{font:12.5px sans-serif;fill:{colours['--soft']}}}"
        drawing = re.sub(
            r"var\((--\w+)\)",
            lambda match: colours[match[1]],
            scatter(self.points),
        )
        return drawing.replace(">", f"><style>{style}</style>", 1)

    def _repr_html_(self) -> str:
        heads = (
            "topology",
            "strategy",
            "mesh",
            "time",
            "price",
            "a step",
            "memory free",
            "",
        )
        cells = [
            (
                escape(point.topology),
                escape(point.name),
                escape(point.mesh),
                time_of(point),
                price_of(point),
                step_of(point),
                margin_of(point),
                point.marks,
            )
            for point in self.points
            if not point.problem
        ]
        body = f"<h3>{amount(self.tokens)} {escape(self.unit)}: time and price</h3>"
        if cells:
            drawing = scatter(self.points)
            body += f"<figure style='margin-top:14px'>{drawing}</figure>"
        body += table("Topologies", heads, cells, "<<<>>>><")
        return wrapped(body + self._refused())

    def _refused(self) -> str:
        """Return the topologies on which nothing fits; empty if there are none."""
        items = ""
        for point in self.points:
            if point.problem:
                items += f"<dt>{escape(point.topology)}</dt>"
                items += f"<dd>{escape(point.problem)}</dd>"
        if not items:
            return ""
        return f'<h4>Where nothing fits</h4><dl class="said">{items}</dl>'


def frontier(
    plans: Sequence[tuple[Plan | PlanError, Topology]],
    tokens: float,
    tokens_per_step: float,
    unit: str = "tokens",
) -> Frontier:
    """Compare plans of one recipe on several topologies.

    Args:
      plans: each with its topology; an error stands for a topology on which there is no
        plan.
      tokens: how many are to be consumed; may be samples, as `unit` then says.
      tokens_per_step: of one optimizer step.
      unit: what is counted.

    Returns:
      The points in the order given. A topology without a list price has no price and is
      never on the frontier.
    """
    steps = tokens / tokens_per_step
    points = [_point(plan, topology, steps) for plan, topology in plans]
    return Frontier(tuple(_marked(points)), tokens, unit)


def _marked(points: Sequence[Point]) -> list[Point]:
    """Return the points with what stands out among them."""
    fitting = [p for p in points if not p.problem]
    timed = [p for p in fitting if p.seconds is not None]
    priced = [p for p in timed if p.price is not None]
    fastest = min((p.seconds or 0.0 for p in timed), default=None)
    cheapest = min((p.price or 0.0 for p in priced), default=None)

    marked = []
    for point in points:
        is_timed = any(point is other for other in timed)
        is_priced = any(point is other for other in priced)
        is_beaten = any(_beats(other, point) for other in priced)
        marked.append(
            replace(
                point,
                best=is_priced and not is_beaten,
                fastest=is_timed and point.seconds == fastest,
                cheapest=is_priced and point.price == cheapest,
            )
        )
    return marked


def _point(
    plan: Plan | PlanError,
    topology: Topology,
    steps: float,
) -> Point:
    if isinstance(plan, PlanError):
        return Point(
            topology.name,
            name="",
            mesh="",
            seconds=None,
            price=None,
            step_seconds=None,
            peak=0,
            memory=0,
            problem=f"{plan.what}; {plan.remedy}",
        )

    problem = ""
    if plan.peak > plan.memory:
        problem = f"needs {size(plan.peak)} of {size(plan.memory)} a device"
        if plan.notes:
            problem += f"; {plan.notes[0]}"
    step_seconds = plan.step_seconds if plan.seconds else None
    seconds = None if step_seconds is None else steps * step_seconds
    hourly = plan.price_per_hour
    if hourly is None:
        hourly = topology.price_per_hour
    price = None
    if hourly is not None and seconds is not None:
        price = hourly * seconds / HOUR
    return Point(
        topology.name,
        plan.name,
        meshed(plan),
        seconds,
        price,
        step_seconds,
        plan.peak,
        plan.memory,
        problem,
    )


def _beats(point: Point, other: Point) -> bool:
    """Whether a point is at least as good in both, and better in one."""
    mine = (point.seconds or 0.0, point.price or 0.0)
    theirs = (other.seconds or 0.0, other.price or 0.0)
    pairs = zip(mine, theirs, strict=True)
    return mine != theirs and all(a <= b for a, b in pairs)
