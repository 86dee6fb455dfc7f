"""`lepton shrink RUN --to int8`: the cheapest model that keeps the metric."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lepton_jax.cli import settings, trained
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.ship import Artifact
from lepton_jax.ship.artifact.artifact import ROWS as STORED
from lepton_jax.ship.shrink.measuring import ROWS
from lepton_jax.ship.shrink.search import EPOCHS, Frontier, search

DESCRIPTION = """\
Make a trained model smaller, and write the smallest that keeps its metric.

  int8       weights of 8 bits, with and without arithmetic in whole numbers
  int4       weights of 4 bits, in groups; as few in 8 bits as the metric asks for
  pruned     fewer channels, each model trained a little
  smallest   all of these
  2:4        says what it would save

RUN is the folder of a run or of a saved model. The models that were tried are shown
with bytes of weights, milliseconds of a batch, and the metric on test rows by which
they were chosen and on others."""
MISTAKE = 2  # exit code
INTERRUPTED = 130  # exit code
NONE_KEEPS = 1  # exit code: no smaller model keeps the metric


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
      0; 1 if no smaller model keeps the metric; 2 for a mistake; 130 after Ctrl-C.
    """
    arguments = settings.typed(arguments)
    try:
        options = _parser().parse_args(arguments)
        frontier, place = _shrink(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            settings.print_failure(error, ok=False)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return INTERRUPTED
    print(_told(frontier, place, options.json))
    return NONE_KEEPS if frontier.chosen is None else 0


# ---- internals ----


def _parser() -> settings.Parser:
    parser = settings.Parser(
        prog=settings.program("shrink"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, or a saved model")
    add("--to", default="int8", metavar="TARGET", help="see above (default: int8)")
    add(
        "--keep",
        type=settings.reader(float),
        default=0.995,
        metavar="SHARE",
        help="share of the metric to keep (default: 0.995)",
    )
    add("--metric", help="its name (default: the recipe's best, or first)")
    add(
        "-o",
        "--out",
        metavar="PLACE",
        help="folder, or FILE.zip, of the artifact (default: NAME.TARGET.lepton here)",
    )
    add(
        "--batch",
        type=settings.reader(int),
        default=ROWS,
        metavar="ROWS",
        help=f"rows of the batch that is timed (default: {ROWS})",
    )
    add(
        "--epochs",
        type=settings.reader(float),
        default=EPOCHS,
        metavar="N",
        help=f"passes over the data after channels are cut (default: {EPOCHS:g})",
    )
    add("--name", help="of the model (default: the recipe's)")
    add("--recipe", type=Path, help="where the run's recipe is now")
    add("--step", type=int, help="of the checkpoint (default: the last)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _shrink(options: argparse.Namespace) -> tuple[Frontier, Path | None]:
    """Search, and write the artifact of what was found."""
    if options.batch < 1 or options.epochs < 0:
        raise SettingError(
            f"--batch is {options.batch}, --epochs {options.epochs:g}",
            where="command line",
            remedy="give at least one row, and no less than 0 epochs",
        )
    trainer = trained.trainer_of(options.run, options.recipe, options.step)
    frontier = search(
        trainer,
        options.to,
        keep=options.keep,
        metric=options.metric,
        rows=options.batch,
        epochs=options.epochs,
        report=_say,
    )
    if frontier.chosen is None:
        return frontier, None
    artifact = Artifact.of(frontier.trainer, name=options.name, rows=STORED)
    artifact.manifest.recipe["run"] = str(Path(options.run).resolve())
    artifact.manifest.recipe["shrunk"] = frontier.to_fields()
    name = f"{artifact.manifest.name}.{options.to.replace(':', '-')}.lepton"
    return frontier, artifact.save(Path(options.out or name))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _told(frontier: Frontier, place: Path | None, as_json: bool) -> str:
    """Return what a person, or a script, is told."""
    if as_json:
        fields: dict[str, Any] = frontier.to_fields()
        fields |= {"ok": place is not None, "place": place and str(place)}
        return json.dumps(fields)
    return str(frontier) if place is None else f"{frontier}\n-> {place}"
