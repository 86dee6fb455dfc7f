"""Matching of a compiled step's collectives with those that a plan expects.

Collectives can't be matched one by one: XLA joins several, splits some, and makes one
kind of another. So bytes are matched. For example, a plan expects a reduce-scatter of
100 MB over "fsdp" at one line, and XLA runs an all-reduce over "fsdp" there, which
sends 200 MB. Half of it is explained by the reduce-scatter, and the rest is left over.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lepton_jax.planner.estimate.feeding import size
from lepton_jax.verify import hlo
from lepton_jax.verify.expected import Expected, ring
from lepton_jax.verify.hlo import CollectiveFound
from lepton_jax.verify.report import Absent, Row, Unexpected

# Share of the traffic planned over some axes that may come on top, or be missing,
# without a word (assumption).
SLACK = 0.25
# Share of a step's traffic below which a collective is not worth a word (assumption).
SMALL = 0.005
# Share of a collective's bytes below which what is left counts as explained
# (assumption).
REST = 0.1

# Each of these sends half of what an all-reduce sends.
HALVES = ("all-gather", "reduce-scatter")

Axes = tuple[str, ...]
# Seconds of a collective: its kind, its axes, and the bytes of the buffer.
Seconds = Callable[[str, Axes, float], float]
# Where, kind and axes of expected collectives.
Key = tuple[str, str, Axes]


@dataclass
class Match:
    """A collective of the compiled step, and how far the plan explains it.

    Attributes:
      collective: the collective.
      where: "file:line" of the user's code; empty if XLA doesn't tell.
      kind, axes: its kind and its mesh axes.
      sent: bytes that a ring for the same purpose would send.
      left: the part of them that nothing explains.
    """

    collective: CollectiveFound
    where: str
    kind: str
    axes: Axes
    sent: float
    left: float


class Comparison(NamedTuple):
    """Both sides by axes and kind, and what only one of them has."""

    rows: tuple[Row, ...]
    unexpected: tuple[Unexpected, ...]
    absent: tuple[Absent, ...]


def _same_place(match: Match, key: Key) -> bool:
    return key == (match.where, match.kind, match.axes)


def _same_line(match: Match, key: Key) -> bool:
    where, _, axes = key
    return (where, axes) == (match.where, match.axes)


def _same_kind(match: Match, key: Key) -> bool:
    _, kind, axes = key
    return (kind, axes) == (match.kind, match.axes)


def _same_axes(match: Match, key: Key) -> bool:
    return key[2] == match.axes


def _common_axes(match: Match, key: Key) -> bool:
    return not set(key[2]).isdisjoint(match.axes)


# The closest explanations come first. XLA joins several collectives under one line,
# hence `_same_kind`, and makes one kind of another, hence the last two.
EXPLANATIONS: tuple[Callable[[Match, Key], bool], ...] = (
    _same_place,
    _same_line,
    _same_kind,
    _same_axes,
    _common_axes,
)


def compare(
    moves: Sequence[Expected],
    collectives: Iterable[CollectiveFound],
    mesh: Mapping[str, int],
    seconds: Seconds | None = None,
) -> Comparison:
    """Compare what is planned and what was compiled, both ways.

    A collective is explained by moves at its source line over its axes; then by what is
    left of its kind over its axes; then by what is left over these axes, or over a part
    of them. The rest of either side is listed where it is more than `SLACK` of what is
    planned over the axes.

    Args:
      moves: the collectives of the plan.
      collectives: those of the compiled step.
      mesh: sizes of the mesh's axes.
      seconds: seconds of a collective, if the links are known.
    """
    matches = [_match(collective, mesh) for collective in collectives]
    matches = [match for match in matches if match.sent > 0]
    total = max(sum(match.sent for match in matches), 1.0)
    left = _explain(matches, moves)

    planned: dict[Axes, float] = defaultdict(float)
    for move in moves:
        planned[move.axes] += move.sent
    unexpected = [
        _unexpected(alike, planned, moves, total)
        for alike in _grouped(_unexplained(matches, planned))
    ]
    notable = [item for item in unexpected if item.excess > SMALL * total]
    notable.sort(key=lambda item: -item.excess)
    return Comparison(
        _rows(moves, matches, mesh, seconds),
        tuple(notable),
        _absent(left, planned, moves, matches),
    )


def _absent(
    left: Mapping[Key, float],
    planned: Mapping[Axes, float],
    moves: Sequence[Expected],
    matches: Iterable[Match],
) -> tuple[Absent, ...]:
    """List the planned collectives that nothing in the compiled step matches."""
    total = max(sum(planned.values()), 1.0)
    missing: dict[Axes, float] = defaultdict(float)
    for (_, _, axes), bytes_ in left.items():
        missing[axes] += bytes_
    alike: dict[Key, list[Expected]] = defaultdict(list)
    for move in moves:
        alike[move.where, move.kind, move.axes].append(move)
    found: dict[Axes, int] = defaultdict(int)
    for match in matches:
        found[match.axes] += match.collective.times

    items = []
    for key, rest in left.items():
        where, kind, axes = key
        sent = sum(move.sent for move in alike[key])
        is_notable = missing[axes] > SLACK * planned[axes] and rest > REST * sent
        if not is_notable or rest <= SMALL * total:
            continue
        over = " and ".join(axes)
        compiled = f"{found[axes]:,} run" if found[axes] else "nothing runs"
        item = Absent(
            where=where,
            kind=kind,
            axes=axes,
            count=sum(move.count for move in alike[key]),
            bytes=sent,
            missing=rest,
            share=rest / total,
            why=f"of {size(sent)} planned; {compiled} over {over} in all",
        )
        items.append(item)
    return tuple(sorted(items, key=lambda item: -item.missing))


def _match(
    collective: CollectiveFound,
    mesh: Mapping[str, int],
) -> Match:
    axes = collective.axes(mesh)
    axes = axes or hlo.axes_of(collective.groups, mesh, permute=True) or ()
    sent = collective.sent
    devices = math.prod(mesh[axis] for axis in axes)
    if collective.windowed and devices > 1:
        # There are n or n + 1 pieces, where a ring of n needs n - 1.
        sent *= (devices - 1) / (devices + 0.5)
    where = f"{collective.file}:{collective.line}" if collective.file else ""
    return Match(
        collective=collective,
        where=where,
        kind=collective.kind,
        axes=axes,
        sent=sent,
        left=sent,
    )


def _explain(
    matches: list[Match],
    moves: Iterable[Expected],
) -> dict[Key, float]:
    """Subtract planned bytes from what is left of each match, the closest first.

    Returns:
      The planned bytes that explain nothing.
    """
    left: dict[Key, float] = defaultdict(float)
    for move in moves:
        left[move.where, move.kind, move.axes] += move.sent

    for explains in EXPLANATIONS:
        for match in sorted(matches, key=lambda match: match.left):
            if not match.left:
                continue
            for key in left:
                if left[key] and explains(match, key):
                    used = min(match.left, left[key])
                    left[key] -= used
                    match.left -= used
    return left


def _unexplained(
    matches: list[Match],
    planned: Mapping[Axes, float],
) -> list[Match]:
    excess: dict[Axes, float] = defaultdict(float)
    for match in matches:
        excess[match.axes] += match.left
    return [
        match
        for match in matches
        if match.left > REST * match.sent
        and excess[match.axes] > SLACK * planned.get(match.axes, 0.0)
    ]


def _grouped(matches: Iterable[Match]) -> Iterable[list[Match]]:
    """Return matches of one line, kind and axes together."""
    groups: dict[tuple, list[Match]] = defaultdict(list)
    for match in matches:
        key = (
            match.where,
            match.kind,
            match.axes,
            match.collective.sliced,
        )
        groups[key].append(match)
    return groups.values()


def _unexpected(
    alike: list[Match],
    planned: Mapping[Axes, float],
    moves: Sequence[Expected],
    total: float,
) -> Unexpected:
    first = alike[0]
    sent = sum(match.sent for match in alike)
    return Unexpected(
        where=first.where,
        kind=first.kind,
        axes=first.axes,
        count=sum(match.collective.times for match in alike),
        bytes=sent,
        excess=sum(match.left for match in alike),
        share=sent / total,
        op_name=first.collective.op_name,
        why=_reason(first, sent, planned, moves),
    )


def _reason(
    match: Match,
    sent: float,
    planned: Mapping[Axes, float],
    moves: Sequence[Expected],
) -> str:
    """Return the difference from the plan in words."""
    over = " and ".join(match.axes)
    if not any(set(axes) & set(match.axes) for axes in planned):
        if over:
            return f"nothing is planned over {over}"
        return "its groups are no product of mesh axes"

    reduces = match.kind == "all-reduce"
    if reduces and match.collective.sliced:
        return (
            "each use takes a slice of it: a reduce-scatter, which XLA did not form,"
            " sends half"
        )

    same_axes = [move for move in moves if move.axes == match.axes]
    kinds: dict[str, float] = defaultdict(float)
    for move in same_axes:
        kinds[move.kind] += move.sent
    planned_halves = [kind for kind in HALVES if kinds[kind]]
    halves = " and ".join(planned_halves)
    if reduces and halves and kinds["all-reduce"] < sent / 2:
        return f"{halves} planned over {over} would send half"

    here = sum(move.sent for move in same_axes if move.where == match.where)
    if here:
        return f"{size(here)} are planned at this line over {over}"
    return f"nothing is planned at this line over {over}"


def _rows(
    moves: Iterable[Expected],
    matches: Iterable[Match],
    mesh: Mapping[str, int],
    seconds: Seconds | None,
) -> tuple[Row, ...]:
    planned: dict[tuple[Axes, str, bool], list[Expected]] = defaultdict(list)
    found: dict[tuple[Axes, str, bool], list[Match]] = defaultdict(list)
    for move in moves:
        planned[move.axes, move.kind, move.count > 1].append(move)
    for match in matches:
        inside = match.collective.times > 1
        found[match.axes, match.kind, inside].append(match)

    rows = [
        _row(key, planned[key], found[key], mesh, seconds)
        for key in dict.fromkeys((*planned, *found))
    ]
    weight: dict[Axes, float] = defaultdict(float)
    for row in rows:
        weight[row.axes] += row.found + row.planned

    def place(row: Row) -> tuple[float, Axes, float]:
        return -weight[row.axes], row.axes, -row.found - row.planned

    return tuple(sorted(rows, key=place))


def _row(
    key: tuple[Axes, str, bool],
    planned: Sequence[Expected],
    found: Sequence[Match],
    mesh: Mapping[str, int],
    seconds: Seconds | None,
) -> Row:
    axes, kind, inside = key
    lines: dict[str, float] = defaultdict(float)
    sent_planned: dict[int, float] = defaultdict(float)
    for move in planned:
        lines[move.where] += move.sent
        sent_planned[move.count] += move.sent
    sent_found: dict[int, float] = defaultdict(float)
    for match in found:
        sent_found[match.collective.times] += match.sent

    def joined(sent: Mapping[int, float]) -> float:
        """Return the seconds of collectives, those of equal runs joined to one."""
        if seconds is None or not axes:
            return 0.0
        permutes = kind == "collective-permute"
        whole = 1.0 if permutes else ring(kind, axes, 1.0, mesh)
        return sum(
            runs * seconds(kind, axes, bytes_ / runs / whole)
            for runs, bytes_ in sent.items()
        )

    return Row(
        axes=axes,
        kind=kind,
        planned=sum((move.sent for move in planned), 0.0),
        planned_count=sum(move.count for move in planned),
        found=sum((match.sent for match in found), 0.0),
        found_count=sum(match.collective.times for match in found),
        inside=inside,
        planned_seconds=joined(sent_planned),
        found_seconds=joined(sent_found),
        where=max(lines, key=lambda line: lines[line], default=""),
    )
