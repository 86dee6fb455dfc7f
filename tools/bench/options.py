"""Options that several commands have, and checks of what is given for them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import Any

from lepton_jax.errors import SettingError, nearest


def add_command(
    commands: Any,
    shared: argparse.ArgumentParser,
    name: str,
    description: str | None,
    help: str,
) -> argparse.ArgumentParser:
    """Add a command to the command line; return its parser."""
    return commands.add_parser(
        name,
        parents=[shared],
        allow_abbrev=False,
        description=description,
        help=help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_timing(
    parser: argparse.ArgumentParser, rounds: int, seconds: float | None = None
) -> None:
    """Add --rounds, and --seconds if it has a default."""
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        metavar="N",
        help="rounds a case (default: %(default)s)",
    )
    if seconds is not None:
        parser.add_argument(
            "--seconds",
            type=float,
            default=seconds,
            metavar="S",
            help="length of a slice (default: %(default)s)",
        )


def check_names(
    given: Iterable[str], known: Iterable[str], flag: str, what: str
) -> None:
    """Raise a SettingError for the first name that is not known."""
    known = list(known)
    for name in given:
        if name not in known:
            raise SettingError(
                f"there is no {what} {name!r}{nearest(name, known)}",
                where=flag,
                remedy=f"the {what}s are {', '.join(known)}",
            )


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise a SettingError for the first option that is given and not above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SettingError(
                f"--{name} is {value:g}",
                where="command line",
                remedy="give a number above 0",
            )


def check_at_least(options: argparse.Namespace, **least: int) -> None:
    """Raise a SettingError for the first option that is below its least value."""
    for name, lowest in least.items():
        value = getattr(options, name)
        if value < lowest:
            raise SettingError(
                f"--{name} is {value}",
                where="command line",
                remedy=f"give {lowest} or more",
            )
