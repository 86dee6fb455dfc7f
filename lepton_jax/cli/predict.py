"""The `predict` command: an artifact's predictions of the rows in files.

lepton predict digits.lepton --data rows/*.csv --out predictions
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_jax.cli import settings
from lepton_jax.cli.prepare import _bytes
from lepton_jax.data.extras import needs
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.planner.show.words import plural

if TYPE_CHECKING:
    from lepton_jax.ship.scale.batch import Summary

DESCRIPTION = (
    "Predict the rows of files by an artifact: each row once, in shards of Parquet"
    " files with its file and number. A run that was interrupted, or that lost a"
    " machine, goes on where it was. A row that can't be predicted has the reason in"
    " place of a prediction."
)
MISTAKE = 2  # exit codes of a shell
INTERRUPTED = 130
REASONS_SHOWN = 3


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
    """Parse, predict, and say what came out.

    Raises:
      LeptonError: a mistake that the user can fix.
    """
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return
    options, _ = settings.parse(parser, arguments, [])
    _check(options)
    needs("polars", extra="data", purpose="lepton predict")
    # imported here, so that --help does not wait for JAX
    from lepton_jax.ship.scale import batch, engines

    request = batch.Request(
        artifact=str(Path(options.artifact).resolve()),
        data=tuple(str(Path(path).absolute()) for path in options.data),
        out=str(Path(options.out).absolute()),
        keep=_names(options.keep),
        outputs=options.outputs,
        piece_bytes=options.piece or batch.PIECE_BYTES,
    )
    engine: engines.Engine = engines.run_here
    if options.on == "ray":
        engine = engines.on_ray(
            options.address,
            options.cpus or 1,
            options.gpus or 0,
        )
    began = time.perf_counter()
    job = batch.plan(request)
    _work(job, engine(job))
    summary = batch.finish(job)
    if options.json:
        print(json.dumps(asdict(summary)))
    else:
        print(_in_words(summary, time.perf_counter() - began))


def _check(options: argparse.Namespace) -> None:
    """Raise SettingError for what is missing, or means nothing."""
    if options.artifact is None:
        raise SettingError(
            "no artifact is named",
            where="command line",
            remedy="name one: lepton predict digits.lepton --data FILES --out DIR",
        )
    for name, remedy in (("data", "--data FILES"), ("out", "--out DIR")):
        if not getattr(options, name):
            raise SettingError(
                f"--{name} is missing",
                where="command line",
                remedy=f"add {remedy}",
            )
    if options.on == "local":
        for name in ("address", "cpus", "gpus"):
            if getattr(options, name) is not None:
                raise SettingError(
                    f"--{name} is given without --on ray",
                    where=f"command line, --{name}",
                    remedy="add --on ray, or leave it out",
                )


def _work(job: Any, made: Any) -> None:
    """Go through the parts, and say on a terminal how far they are."""
    left = len(job.left())
    shown = sys.stderr.isatty()
    rows = 0
    for count, (_, of_part) in enumerate(made, 1):
        rows += of_part
        if shown:
            print(
                f"\r{count} of {left} parts, {rows:,} rows",
                end="",
                file=sys.stderr,
                flush=True,
            )
    if shown and left:
        print(file=sys.stderr)


def _in_words(summary: Summary, seconds: float) -> str:
    rows = plural(summary.rows, "row")
    parts = plural(summary.parts, "part")
    lines = [f"{rows} in {parts}, {seconds:.1f} s: {summary.folder}"]
    if summary.refused:
        lines.append(f"{summary.refused:,} rows have an error in place of a prediction")
        most = sorted(summary.reasons.items(), key=lambda each: -each[1])
        lines += [f"  {count:,}: {reason}" for reason, count in most[:REASONS_SHOWN]]
    return "\n".join(lines)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


# ---- the command line ----


def _parser() -> settings.Parser:
    program = settings.program("predict")
    parser = settings.Parser(
        prog=program,
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        usage=f"{program} ARTIFACT --data FILE ... --out DIR [options]",
    )
    parser.add_argument(
        "artifact",
        nargs="?",
        metavar="ARTIFACT",
        help="an artifact: a folder or a zip file, by `lepton export`",
    )
    add = parser.add_argument_group("options").add_argument
    add("-h", "--help", action="store_true", help="show this")
    add(
        "--data",
        nargs="+",
        metavar="FILE",
        help="files, globs or folders of raw rows, or .npy and .npz files of arrays",
    )
    add("--out", metavar="DIR", help="folder for the predictions")
    add(
        "--keep",
        metavar="COLUMN,...",
        help="columns of the data to copy next to the predictions",
    )
    add(
        "--outputs",
        action="store_true",
        help="write the model's own outputs, too",
    )
    add(
        "--piece",
        type=_bytes,
        metavar="SIZE",
        help="bytes of the data that a shard is made of (default: 16MB)",
    )
    add("--json", action="store_true", help="print the summary as a JSON object")
    _add_engine(add)
    return parser


def _add_engine(add: Callable[..., Any]) -> None:
    add(
        "--on",
        type=settings.reader(str, choices=("local", "ray")),
        default="local",
        metavar="local|ray",
        help="this process, or a Ray cluster (default: local)",
    )
    add(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster (default: a fresh one on this machine)",
    )
    add(
        "--cpus",
        type=settings.reader(int),
        metavar="N",
        help="cores of a task (default: 1)",
    )
    add(
        "--gpus",
        type=settings.reader(int),
        metavar="N",
        help="GPUs of a task (default: none)",
    )
