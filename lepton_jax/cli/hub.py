"""`lepton hub import | export`: models from and to Hugging Face folders."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import optax

from lepton_jax import hub, losses
from lepton_jax.cli import settings, trained
from lepton_jax.errors import CheckpointError, LeptonError
from lepton_jax.hub.origin import TENSORS
from lepton_jax.hub.writing import NUMPY
from lepton_jax.trainer import Trainer

DESCRIPTION = """\
Take a model from a Hugging Face folder, or write one that transformers and vLLM open.

  lepton hub import FOLDER             check that all of it is understood
  lepton hub import FOLDER -o MODEL    make a saved model of it: Trainer.open(MODEL)
  lepton hub export RUN -o FOLDER      write a run or a saved model

Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3 (text) and GPT-2. Nothing is looked up in a
network."""
MISTAKE = 2  # exit code
INTERRUPTED = 130  # exit code
# Folder in a saved model for what an export needs of the folder that it came from.
ORIGIN = "hub"
TIED = {"yes": True, "no": False}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake, 130."""
    arguments = settings.typed(arguments)
    try:
        options = _parser().parse_args(arguments)
        told = options.do(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            settings.print_failure(error, ok=False)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(told) if options.json else told["text"])
    return 0


# ---- internals ----


def _parser() -> settings.Parser:
    parser = settings.Parser(
        prog=settings.program("hub"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="import | export")
    commands.required = True
    _add_import(commands.add_parser("import", help="read a folder"))
    _add_export(commands.add_parser("export", help="write a folder"))
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_import)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("-o", "--out", type=Path, metavar="MODEL")
    parser.add_argument(
        "--tied", choices=TIED, help="whether the token embedding is the head"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="to plan it for (default: all)"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="to pass over"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(do=_export)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, a saved model")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", required=True)
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="that the model came from: its configuration, tokenizer and dtypes are"
        " kept",
    )
    parser.add_argument("--dtype", choices=NUMPY, help="of the tensors")
    parser.add_argument("--recipe", type=Path, help="where the run's recipe is now")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: last)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _import(options: argparse.Namespace) -> dict[str, Any]:
    """Check a folder, and make a saved model of it."""
    folder = hub.open(
        options.folder,
        tied=TIED.get(options.tied),
        ignore=options.ignore,
    )
    lines = [str(folder)]
    if options.out is not None:
        trainer = Trainer(
            model=folder.model,
            loss=losses.cross_entropy,
            optimizer=optax.identity(),
            batch_size=1,
            devices=options.devices,
            name=folder.path.name,
        )
        folder.load_into(trainer).save(options.out)
        folder.origin.keep(options.out / ORIGIN, tuple(options.ignore))
        lines.append(f"-> {options.out}")
    return {
        "ok": True,
        "family": folder.family.name,
        "dtype": folder.dtype,
        "notes": folder.notes,
        "place": None if options.out is None else str(options.out),
        "text": "\n".join(lines),
    }


def _export(options: argparse.Namespace) -> dict[str, Any]:
    """Write a run or a saved model."""
    if trained.is_artifact(options.run):
        raise CheckpointError(
            "an artifact holds a program, not a model's parameters by name",
            where=options.run,
            remedy="name the run, or the saved model, that it was made of",
        )
    trainer = trained.trainer_of(options.run, options.recipe, options.step)
    like = options.like
    if like is None and (options.run / ORIGIN / TENSORS).is_file():
        like = options.run / ORIGIN
    place = hub.save(trainer, options.out, like=like, dtype=options.dtype)
    written = hub.open(place)
    return {
        "ok": True,
        "family": written.family.name,
        "dtype": written.dtype,
        "place": str(place),
        "text": f"{written}\n-> {place}",
    }
