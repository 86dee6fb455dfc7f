"""Figures of many programs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
# Figures that depend on who predicts.
PREDICTED = ("median_error", "p90_error", "within_bound", "false_fits", "withheld")


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the aggregate figures of predicted and measured memory.

    Args:
      rows: what `measuring.measure` returns.

    Returns:
      programs, families: how many were tried.
      compared: of how many there are both accounts.
      not_planned, failed: for how many the planner found nothing that fits; how many
        raised, crashed or hung.
      late: how many XLA did not compile within the limit.
      refused: how many XLA refuses.
      median_error, p90_error: of abs(predicted / XLA's - 1).
      within_bound: share of the programs whose plan gives an upper bound and whose peak
        is at or below it; None: no plan gives one.
      false_fits: plans said to fit that XLA refuses, or that need more than there is.
      withheld: plans that fit, and are not said to.
      seconds: of computing: planning, probing, and compiling whole programs the first
        time.
      by_plan: where the probe predicts: errors, bound and verdicts of the plans' own
        predictions.
    """
    found = _figures(rows)
    if any("by plan" in row for row in rows):
        by_plan = _figures([{**row, **row.get("by plan", {})} for row in rows])
        found["by_plan"] = {key: by_plan[key] for key in PREDICTED}
    return found


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    errors = sorted(abs(row["error"]) for row in rows if "error" in row)
    bounded = [row["within"] for row in rows if "within" in row]
    verdicts = [row for row in rows if "fits" in row]
    outcomes = [row["outcome"] for row in rows]
    return {
        "programs": len(rows),
        "families": len({row["family"] for row in rows}),
        "compared": len(errors),
        "not_planned": outcomes.count("no plan"),
        "failed": outcomes.count("failed"),
        "late": outcomes.count("late"),
        "refused": outcomes.count("refused"),
        "median_error": statistics.median(errors) if errors else None,
        "p90_error": percentile(errors, 0.9),
        "within_bound": sum(bounded) / len(bounded) if bounded else None,
        "false_fits": sum(row["said"] and not row["fits"] for row in verdicts),
        "withheld": sum(row["fits"] and not row["said"] for row in verdicts),
        "seconds": {
            "planned": _total(rows, "planned"),
            "probed": _total(rows, "seconds"),
            "compiled": _total(rows, "compiling"),
        },
    }


def percentile(
    ordered: Sequence[float],
    share: float,
) -> float | None:
    """Return the least value that a share of sorted values is at or below.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    if not ordered:
        return None
    return ordered[
        max(
            0,
            math.ceil(share * len(ordered)) - 1,
        )
    ]


def by(
    rows: Iterable[Row],
    key: Callable[[Row], str],
) -> dict[str, list[Row]]:
    """Group rows."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def family(row: Row) -> str:
    """Return the family of a row."""
    return row["family"]


def platform(row: Row) -> str:
    """Return the chip's name in a row's topology."""
    return row.get("topology", "?").partition(":")[0]


def text(figures: Mapping[str, Any]) -> str:
    """Return aggregate figures as a sentence."""
    parts = [
        f"{figures['programs']} programs of {figures['families']} families",
        f"{figures['not_planned']} not planned",
        f"{figures['failed']} failed",
        f"{figures['late']} not compiled in time",
        f"{figures['refused']} refused by XLA",
    ]
    parts += _predicted(figures)
    if "by_plan" in figures:
        parts.append(f"without the probe: {'; '.join(_predicted(figures['by_plan']))}")
    return "; ".join(parts)


def _predicted(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures that depend on who predicts, in words."""
    parts = []
    if figures["median_error"] is not None:
        parts.append(
            f"median error {figures['median_error']:.1%}, 90th percentile"
            f" {figures['p90_error']:.1%}"
        )
    if figures["within_bound"] is not None:
        parts.append(f"{figures['within_bound']:.1%} within the bound")
    parts.append(f"{figures['false_fits']} said to fit but refused")
    parts.append(f"{figures['withheld']} fit but not said to")
    return parts


def _total(
    rows: Sequence[Row],
    key: str,
) -> float:
    return round(
        sum(row.get(key, 0.0) for row in rows),
        1,
    )
