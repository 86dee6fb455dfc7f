"""Factors of the bounds of a plan's predicted peak, from measured programs.

`tools.bench planner-bounds FILE ...` reads what `planner-memory --half tuning --json
FILE` (and `planner-memory --json FILE`) wrote, and prints `limits.SURETY`: for each
platform, and for plans that split the samples alone or more, or whose attention is a
kernel, how many times the uncertain bytes a program holds at the least and the most.

A program's factor is (XLA's peak - exact bytes -+ slack) / uncertain bytes. The bounds
are the 3rd and the 97th percentile of these, each widened so that programs of a family
that was left out lie within them in 97 of 100 cases: the widening is the least of steps
of 5 % of the distance from 1 for which that holds.

Four programs of two families, whose factors are 0.9 to 1.2:

    >>> factors = [Factors("a", 0.9, 0.9), Factors("a", 1.0, 1.0)]
    >>> factors += [Factors("b", 1.1, 1.1), Factors("b", 1.2, 1.2)]
    >>> least, most = between(factors, widening=1.0)
    >>> round(least, 2), round(most, 2)
    (0.9, 1.2)
    >>> least, most = between(factors, widening=1.5)
    >>> round(least, 2), round(most, 2)
    (0.85, 1.3)
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lepton_jax.errors import SettingError
from lepton_jax.hardware import topology
from lepton_jax.planner.search.bounds import EXACT
from lepton_jax.planner.search.limits import SURETY
from tools.bench import options as checks

# Share of programs that each bound has to hold for, as the plan promises.
COVERED = 0.97
# Step and end of the widening (assumption: finer than what 100 programs tell).
STEP = 0.05
MOST_WIDENING = 4.0
# Words of a strategy that splits more than the samples, for rows without `batch_axes`.
MORE = ("tensor parallel", "sequence parallel")

Group = tuple[str, str]


class Factors(NamedTuple):
    """Bytes that a program holds divided by the uncertain bytes that were predicted.

    Attributes:
      family: of models.
      least: the factor with the slack added to what it holds.
      most: the factor with the slack taken off.
    """

    family: str
    least: float
    most: float


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `planner-bounds` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "planner-bounds",
        __doc__,
        "factors of the bounds of a plan's peak, from rows of planner-memory",
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="what planner-memory wrote with --json",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print the factors by group, and how well they hold for families left out.

    Raises:
      SettingError: a file can't be read, or holds no rows.
    """
    groups = grouped(row for file in options.files for row in _rows(file))
    results = {}
    for (platform, kind), factors in sorted(groups.items()):
        result = calibrated(factors)
        results[f"{platform} {kind}"] = result
        print(
            f"{platform:5} {kind:8} {result['least']:.2f} to {result['most']:.2f}"
            f" ({len(factors)} programs of {result['families']} families, widened"
            f" {result['widening']:.2f} times; a family left out is below its upper"
            f" bound in {result['below']:.1%})"
        )
    return results


def grouped(rows: Iterable[Mapping[str, Any]]) -> dict[Group, list[Factors]]:
    """Return the factors of the rows with both accounts, by platform and kind."""
    groups: dict[Group, list[Factors]] = defaultdict(list)
    for row in rows:
        if row.get("xla") is None or "kinds" not in row:
            continue
        platform = topology(row["topology"]).platform
        kind = "more" if splits_more(row) else "samples"
        if row.get("attention") in SURETY[platform]:
            kind = row["attention"]
        slack = SURETY[platform][kind].slack
        held = row["kinds"]
        exact = sum(held.get(name, 0) for name in EXACT)
        uncertain = max(1, sum(held.values()) - exact)
        rest = row["xla"] - exact
        family = row.get("family") or row["model"]
        low = (rest + slack) / uncertain
        high = (rest - slack) / uncertain
        groups[platform, kind].append(Factors(family, low, high))
    return dict(groups)


def splits_more(row: Mapping[str, Any]) -> bool:
    """Whether a row's plan splits more than the samples."""
    if "batch_axes" in row:
        mesh = row["mesh"]
        return any(n > 1 and axis not in row["batch_axes"] for axis, n in mesh.items())
    return any(word in row["plan"] for word in MORE)


def calibrated(factors: Sequence[Factors]) -> dict[str, Any]:
    """Return the bounds of a group, widened until families left out lie within."""
    families = {f.family for f in factors}
    widening = 1.0
    below = left_out(factors, widening)
    while below < COVERED and widening < MOST_WIDENING and len(families) > 1:
        widening += STEP
        below = left_out(factors, widening)
    least, most = between(factors, widening)
    return {
        "least": least,
        "most": most,
        "widening": widening,
        "below": below,
        "programs": len(factors),
        "families": len(families),
    }


def left_out(factors: Sequence[Factors], widening: float) -> float:
    """Return the share of programs below the upper bound that other families give."""
    held = 0
    for family in {f.family for f in factors}:
        others = [f for f in factors if f.family != family]
        if others:
            _, most = between(others, widening)
            own = [f for f in factors if f.family == family]
            held += sum(f.most <= most for f in own)
    return held / len(factors)


def between(
    factors: Sequence[Factors],
    widening: float,
) -> tuple[float, float]:
    """Return the bounds that the factors give.

    The percentile is that of split conformal prediction: the ceil((n + 1) * 0.97)-th of
    n values, or the last (Vovk, Gammerman, Shafer 2005, Algorithmic Learning in a
    Random World).
    """
    count = len(factors)
    rank = min(count, math.ceil((count + 1) * COVERED))
    most = sorted(f.most for f in factors)[rank - 1]
    least = sorted((f.least for f in factors), reverse=True)[rank - 1]
    low = 1 - widening * max(0.0, 1 - least)
    high = 1 + widening * max(0.0, most - 1)
    return max(0.0, low), high


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        results = json.loads(file.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"the rows can't be read: {error}",
            where=file,
            remedy="name what planner-memory --json FILE wrote",
        ) from error
    return results["programs"] if isinstance(results, dict) else results
