"""The `prepare` tool: from raw files to shards of samples.

python tools/prepare.py SPEC.py --out DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.cli import settings
from lepton_jax.data.extras import needs
from lepton_jax.errors import (
    LeptonError,
    RecipeError,
    SettingError,
    pointing_at_user,
)

DESCRIPTION = (
    "Prepare raw files: read them, run the steps of a specification, and write shards,"
    " a manifest that says all that was done, and a quarantine of the rows that were"
    " dropped or changed. A run that was interrupted goes on where it was; one over"
    " sources of which some have changed does only what they need."
)
FUNCTION = "preparation"
# exit codes of a shell: a mistake of the user's; Ctrl-C
MISTAKE = 2
INTERRUPTED = 130

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", re.IGNORECASE)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit code: 0; 2 for an error of the user's; 130 after Ctrl-C.
    """
    arguments = settings.typed(arguments)
    try:
        _run(arguments)
        return 0
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> None:
    """Parse, prepare, and say what came out.

    Raises:
      LeptonError: a mistake that the user can fix.
    """
    needs("polars", extra="data", purpose="lepton prepare")
    file = _specification(arguments)
    parser = _parser()
    function = (
        None
        if file is None
        else settings.load(
            Path(file),
            FUNCTION,
        )
    )
    own: list[str] = []
    if function is not None:
        own += inspect.signature(function).parameters
        parser.description = settings.story(function) or DESCRIPTION
        settings.add(parser, function)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return

    options, given = settings.parse(parser, arguments, own)
    if function is None:
        raise SettingError(
            "no specification is named",
            where="command line",
            remedy="name a Python file with a function `preparation`",
        )
    if options.out is None:
        raise SettingError(
            "there is no folder to write to",
            where="command line",
            remedy="add --out DIR",
        )
    _prepare(function, given, options)


def _specification(arguments: Sequence[str]) -> str | None:
    """Return the specification's file: the first argument that is one."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    files = (
        word
        for word in arguments
        if word.endswith(
            ".py",
        )
        and word[0] != "-"
    )
    return next(files, None)


def _prepare(
    function: Callable[..., Any],
    given: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    # imported here, so that --help does not wait for Polars
    from lepton_jax.cli.preparing import Bar, summary
    from lepton_jax.data.prepare import (
        Preparation,
        prepare,
        read_profile,
        write_preparation_report,
    )
    from lepton_jax.data.prepare.explain import explain, in_words

    place = settings.place(function)
    with pointing_at_user(
        "the preparation",
        "fix the specification or its settings",
        where=place,
        kind=RecipeError,
    ):
        preparation = function(**given)
    if not isinstance(preparation, Preparation):
        raise RecipeError(
            f"preparation() returned a {type(preparation).__name__}",
            where=place,
            remedy="return a lepton_jax.data.prepare.Preparation",
        )
    if options.memory is not None:
        preparation = dataclasses.replace(preparation, memory=options.memory)
    began = time.perf_counter()
    with Bar(sys.stderr) as bar:
        prepared = prepare(
            preparation,
            options.out,
            engine=options.engine,
            address=options.address,
            workers=options.workers,
            report=bar,
        )
    if options.explain is not None:
        happenings = explain(preparation, prepared, options.explain)
        print(in_words(happenings, prepared.folder))
        return
    print(summary(prepared))
    if options.report or options.reference is not None:
        reference = options.reference
        page = write_preparation_report(
            prepared,
            preparation,
            seconds=time.perf_counter() - began,
            engine=options.engine,
            reference=None if reference is None else read_profile(reference),
        )
        print(f"report: {page}")


# ---- the command line ----


def _parser() -> settings.Parser:
    program = settings.program("prepare")
    parser = settings.Parser(
        prog=program,
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{program} SPEC.py --out DIR [--setting value ...] [options]",
    )
    parser.add_argument(
        "specification",
        nargs="?",
        metavar="SPEC.py",
        help="a Python file with a function `preparation`; its settings become options",
    )
    add = parser.add_argument_group("options").add_argument
    add(
        "-h",
        "--help",
        action="store_true",
        help="show this, and the specification's settings if one is named",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the shards, the manifest and the quarantine",
    )
    add(
        "--explain",
        metavar="SOURCE:ROW",
        help=(
            "prepare what is not yet done, and show what each step did to one row, such"
            " as people:17; rows are counted from 0"
        ),
    )
    add(
        "--report",
        action="store_true",
        help="write report.html: a page with all that was read, done and found",
    )
    add(
        "--reference",
        type=Path,
        metavar="DIR",
        help=(
            "report how far the training rows have moved from those of an earlier"
            " preparation with a report"
        ),
    )
    _add_engine(add)
    return parser


def _add_engine(add: Callable[..., Any]) -> None:
    add(
        "--engine",
        type=settings.reader(str, choices=("local", "ray")),
        default="local",
        metavar="local|ray",
        help="threads of this process, or a Ray cluster (default: local)",
    )
    add(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster (default: a fresh one on this machine)",
    )
    add(
        "--workers",
        type=settings.reader(int),
        metavar="N",
        help="pieces at once (default: as many as processors)",
    )
    add(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help=(
            "memory that the pieces under way may take, such as 2GB (default: the"
            " specification's)"
        ),
    )


def _bytes(text: str) -> int:
    """Return the bytes of a size such as 2GB or 500 MB."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 2GB or 500MB")
    number, unit = match.groups()
    unit = unit.upper()
    if unit and not unit.endswith("B"):
        unit += "B"
    return int(float(number) * UNITS.get(unit, 1))
