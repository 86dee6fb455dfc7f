"""Options and output that the judged commands share."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.errors import SettingError
from tools.bench import options as checks
from tools.bench.families import programs
from tools.bench.families.split import HALVES, half

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser, count: int) -> None:
    """Add the options that choose programs.

    Args:
      parser: of the command.
      count: programs, unless --programs says otherwise.
    """
    parser.add_argument(
        "--half",
        choices=HALVES,
        help="tuning: a line for each program; judging: aggregate figures alone",
    )
    parser.add_argument(
        "--programs",
        type=int,
        default=count,
        metavar="N",
        help="programs, each family as often as the others (default: %(default)s)",
    )
    parser.add_argument(
        "--families",
        nargs="+",
        metavar="NAME",
        help="of the tuning half, with a number for a single program: vit:3",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep what was measured there, by digest, for the next time",
    )
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="do not append a judged run to the history",
    )


def chosen(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the names of the programs that the options ask for.

    Raises:
      SettingError: a family is not of this half, or the number is no count.
    """
    checks.check_at_least(options, programs=1)
    if options.half == "judging":
        return _for_judging(options)
    if options.families is None:
        return programs.names(half("tuning"), options.programs)

    given = [text.partition(":") for text in options.families]
    asked = [name for name, _, _ in given]
    checks.check_names(asked, half("tuning"), "--families", "family to tune on")
    single = [(name, int(number)) for name, _, number in given if number]
    every = [name for name, _, number in given if not number]
    return single + (programs.names(every, options.programs) if every else [])


def _for_judging(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the names of all families' programs, in an order that tells nothing."""
    if options.families is not None:
        raise SettingError(
            "figures of single families of the judging half are not told",
            where="--families",
            remedy="leave it out, or name families with --half tuning",
        )
    names = programs.names(half("judging"), options.programs)
    random.Random(options.programs).shuffle(names)
    return names


def judging(options: argparse.Namespace) -> bool:
    """Whether only aggregate figures may be told."""
    return options.half == "judging"


def collect(
    options: argparse.Namespace,
    measured: Iterable[Row],
    total: int,
    line: Callable[[Row], str],
) -> list[Row]:
    """Collect rows as they are measured, and tell of them what may be told.

    Args:
      options: of the command.
      measured: the rows.
      total: how many there will be.
      line: what is printed of a row for tuning. Of one that judges only its count is.
    """
    rows = []
    for row in measured:
        rows.append(row)
        if judging(options):
            print(f"{len(rows)} of {total}", file=sys.stderr, flush=True)
        else:
            print(line(row), flush=True)
    return rows


def unnamed(rows: Sequence[Row]) -> list[float]:
    """Return the sorted errors of rows, without their names."""
    return sorted(row["error"] for row in rows if "error" in row)
