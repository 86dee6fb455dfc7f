"""`lepton explain RUN`: what speaks for a model's predictions, in the run's report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lepton_jax.cli import settings, trained
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.ship.explain import write_explanations
from lepton_jax.ship.explain.pictures import ROWS

DESCRIPTION = """\
Explain predictions of test rows, and write them into report.html of the run.

Pictures get a map of what speaks for and against their prediction (integrated
gradients), with the training pictures that the model takes for alike. Tables get the
importance of each column, and the largest shares of some rows."""
MISTAKE = 2  # exit code
INTERRUPTED = 130  # exit code


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
      0; 2 for a mistake; 130 after Ctrl-C.
    """
    arguments = settings.typed(arguments)
    try:
        page = _explain(_parser().parse_args(arguments))
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the report is as it was", file=sys.stderr)
        return INTERRUPTED
    print(f"report: {page}")
    return 0


# ---- internals ----


def _parser() -> settings.Parser:
    parser = settings.Parser(
        prog=settings.program("explain"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run")
    add(
        "--rows",
        type=settings.reader(int),
        default=ROWS,
        metavar="N",
        help=f"test rows to show, the first ones (default: {ROWS})",
    )
    add("--recipe", type=Path, help="where the run's recipe is now")
    add("--step", type=int, help="of the checkpoint (default: the last)")
    return parser


def _explain(options: argparse.Namespace) -> Path:
    """Explain, write the report, and return its path."""
    if options.rows < 1:
        raise SettingError(
            f"--rows is {options.rows}",
            where="command line, --rows",
            remedy="give at least 1",
        )
    trainer = trained.trainer_of(options.run, options.recipe, options.step)
    return write_explanations(trainer, options.run, options.rows)
