"""`lepton export RUN --to TARGET`: a trained model in the form that a runtime takes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lepton_jax.cli import settings, trained
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.ship import Artifact
from lepton_jax.ship.artifact.artifact import ROWS
from lepton_jax.ship.export import (
    LEPTON,
    Options,
    check,
    compare_opened,
    export,
    live_source,
    source_of,
    target_of,
)
from lepton_jax.ship.export.iree import DEVICES

DESCRIPTION = """\
Export a trained model, and replay held-out rows in the target's own runtime.

  lepton       the artifact: program, weights, preparation, rows; a folder, or one .zip
  stablehlo    a program of jax.export, for CPU, CUDA and TPU, of any batch size
  onnx         an ONNX file of any batch size
  litert       a LiteRT (TensorFlow Lite) file of one batch size
  iree         a module of one batch size for a --device
  savedmodel   a SavedModel of TensorFlow
  safetensors  the weights alone

RUN is the folder of a run or of a saved model, or an artifact. What was exported
expires, for JAX opens a program for six months: export again with the same command."""
MISTAKE = 2  # exit code
INTERRUPTED = 130  # exit code
NOT_EQUAL = 1  # exit code: the exported model departs from the trainer


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
      0; 1 if the exported model departs from the trainer; 2 for a mistake; 130 after
      Ctrl-C.
    """
    arguments = settings.typed(arguments)
    try:
        options = _parser().parse_args(arguments)
        summary = _export(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            settings.print_failure(error, ok=False)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(summary) if options.json else summary["text"])
    return 0 if summary["ok"] else NOT_EQUAL


# ---- internals ----


def _parser() -> settings.Parser:
    parser = settings.Parser(
        prog=settings.program("export"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run, a saved model, an artifact")
    parser.add_argument(
        "--to", default=LEPTON, metavar="TARGET", help="see above (default: lepton)"
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="PLACE",
        help="folder to write, or FILE.zip of an artifact (default: NAME.TARGET here)",
    )
    parser.add_argument("--name", help="of the model (default: the recipe's)")
    parser.add_argument(
        "--model-version", default="1", help="of the model (default: 1)"
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS, help=f"rows to replay (default: {ROWS})"
    )
    parser.add_argument(
        "--batch",
        default=None,
        help="rows of a batch, or 'any' (default: any where the target allows, else 1)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help=f"that IREE compiles for: {', '.join(DEVICES)} (default: cpu)",
    )
    parser.add_argument("--recipe", type=Path, help="where the run's recipe is now")
    parser.add_argument(
        "--step", type=int, help="of the checkpoint (default: the last)"
    )
    parser.add_argument(
        "--python", help="an interpreter that has the target's runtime (default: this)"
    )
    parser.add_argument(
        "--no-replay",
        action="store_true",
        help="write it without comparing it with the trainer",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _export(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says, and return what came of it."""
    asked = Options(
        _batch(options.batch),
        options.device,
    )
    if options.to != LEPTON:
        target = target_of(options.to)
        if _asks_for_any(options.batch) and not target.has_any_batch:
            raise SettingError(
                f"{target.name} has no dynamic batch: a file is for one batch size",
                where="command line, --batch",
                remedy="give a number, e.g. --batch 8; fewer rows are filled up",
            )
    artifact, source = _opened(options)
    place = Path(options.out or f"{artifact.manifest.name}.{options.to}")
    if options.to == LEPTON:
        opened = Artifact.open(artifact.save(place))
        parity = None if options.no_replay else compare_opened(opened)
        return _told(artifact, place, parity)
    check(target_of(options.to), source, asked)
    parity = export(
        artifact,
        options.to,
        place,
        source=source,
        options=asked,
        python=options.python,
        replays=not options.no_replay,
    )
    return _told(artifact, place, parity)


def _opened(options: argparse.Namespace) -> tuple[Artifact, Any]:
    """Return the artifact, and the source of exports."""
    if trained.is_artifact(Path(options.run)):
        artifact = Artifact.open(options.run)
        return artifact, source_of(artifact)
    trainer = trained.trainer_of(
        options.run,
        options.recipe,
        options.step,
    )
    artifact = Artifact.of(
        trainer,
        name=options.name,
        version=options.model_version,
        rows=options.rows,
    )
    artifact.manifest.recipe["run"] = str(Path(options.run).resolve())
    return artifact, live_source(artifact, trainer)


def _told(
    artifact: Artifact,
    place: Path,
    parity: Any,
) -> dict[str, Any]:
    """Return what a person, or a script, is told."""
    manifest = artifact.manifest
    lines = [f"{manifest.name} version {manifest.version} -> {place}"]
    lines += [f"  note: {note}" for note in manifest.notes]
    if parity is not None:
        lines.append(str(parity))
    lines.append(f"  {manifest.expiry()}")
    return {
        "ok": parity is None or parity.passes,
        "place": str(place),
        "name": manifest.name,
        "expires": manifest.made["expires"],
        "notes": list(manifest.notes),
        "parity": None if parity is None else parity.to_fields(),
        "text": "\n".join(lines),
    }


def _asks_for_any(text: str | None) -> bool:
    return text == "any"


def _batch(text: str | None) -> int | None:
    """Return the rows of a batch; None: as the target has it.

    Raises:
      SettingError: it is no number of rows.
    """
    if text is None or _asks_for_any(text):
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise SettingError(
        f"--batch is {text!r}",
        where="command line, --batch",
        remedy="give a number of rows from 1 on, or 'any'",
    )
