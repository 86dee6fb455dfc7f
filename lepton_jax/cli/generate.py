"""The `generate` command: text from a trained language model.

lepton generate runs/lm-... --prompt "def "
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.cli import settings
from lepton_jax.data.extras import needs
from lepton_jax.errors import LeptonError, SettingError

DESCRIPTION = (
    "Generate text with the language model of a run or a saved model, and show it as it"
    " comes. Without --temperature each token is the most probable one."
)
MISTAKE = 2  # exit codes of a shell
INTERRUPTED = 130
TOKENS = 200
TOKENIZER = "tokenizer.json"  # as Hugging Face folders name it
PIECES = "tokenizer.model"
SUFFIX = ".json"  # of a file that the library tokenizers wrote


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
        print(file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> None:
    """Parse, generate, and print.

    Raises:
      LeptonError: a mistake that the user can fix.
    """
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return
    options = parser.parse_args(arguments)
    prompts = _prompts(options)
    # imported here, so that --help does not wait for JAX
    from lepton_jax.cli import trained
    from lepton_jax.generation import generate

    trainer = trained.trainer_of(
        options.run,
        options.recipe,
        options.step,
        options.devices,
    )
    file = options.tokenizer or _kept(options.run)
    made = {
        "tokens": options.tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "stop": tuple(options.stop or ()),
        "seed": options.seed,
        "tokenizer": _tokenizer(file),
    }
    if options.json:
        for prompt, row in zip(
            prompts, generate(trainer, prompts, **made), strict=True
        ):
            print(json.dumps(_plain(prompt, row)))
        return
    # one prompt after the other: what is shown grows at its end alone
    for prompt in prompts:
        _show(prompt)
        for piece in generate(trainer, [prompt], stream=True, **made):
            _show(piece.text or ([] if file else piece.tokens.tolist()))
        print()


def _plain(prompt: Any, row: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": row.text,
        "tokens": row.tokens.tolist(),
        "reason": row.reason,
    }


def _show(part: Any) -> None:
    """Print a piece of text, or token ids."""
    text = part if isinstance(part, str) else "".join(f"{token} " for token in part)
    print(text, end="", flush=True)


def _prompts(options: argparse.Namespace) -> list[Any]:
    """Return the prompts: texts, or lists of token ids.

    Raises:
      SettingError: there is none, or one is no token ids.
    """
    if options.run is None:
        raise SettingError(
            "no run is named",
            where="command line",
            remedy='name one: lepton generate RUN --prompt "..."',
        )
    prompts = [*(options.prompt or ()), *map(_ids, options.prompt_tokens or ())]
    if not prompts:
        raise SettingError(
            "there is no prompt",
            where="command line",
            remedy='add --prompt "...", or --prompt-tokens 1,2,3',
        )
    return prompts


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise SettingError(
            f"{text!r} is no list of token ids",
            where="command line, --prompt-tokens",
            remedy="write e.g. --prompt-tokens 1,2,3",
        ) from None


def _kept(run: Path) -> Path | None:
    """Return the tokenizer's file that `lepton hub import` left next to a model."""
    files = [Path(run) / "hub" / name for name in (TOKENIZER, PIECES)]
    return next((file for file in files if file.is_file()), None)


def _tokenizer(path: Path | None) -> Any:
    """Return the tokenizer in a file; None: none is given.

    Raises:
      LeptonError: it can't be read, or the library that reads it is not installed.
    """
    if path is None:
        return None
    name = "tokenizers" if path.suffix == SUFFIX else "sentencepiece"
    library: Any = needs(name, extra="text", purpose="--tokenizer")
    try:
        if path.suffix == SUFFIX:
            return library.Tokenizer.from_file(str(path))
        return library.SentencePieceProcessor(model_proto=path.read_bytes())
    except Exception as error:  # tokenizers raises bare Exceptions
        raise SettingError(
            f"the tokenizer can't be read: {error}",
            where=path,
            remedy="name a tokenizer.json, or a SentencePiece .model file",
        ) from error


# ---- the command line ----


def _parser() -> settings.Parser:
    program = settings.program("generate")
    parser = settings.Parser(
        prog=program,
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        usage=f'{program} RUN --prompt "..." [options]',
    )
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="folder of a run, or of a saved model",
    )
    add = parser.add_argument_group("options").add_argument
    add("-h", "--help", action="store_true", help="show this")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what the text begins with; may be given several times",
    )
    add(
        "--prompt-tokens",
        action="append",
        metavar="ID,...",
        help="the same as token ids",
    )
    add(
        "--tokens",
        type=settings.reader(int),
        default=TOKENS,
        metavar="N",
        help=f"to generate, at most (default: {TOKENS})",
    )
    _add_sampling(add)
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a tokenizer.json, or a SentencePiece model (default: that of the imported"
        " folder, or as the run's text was prepared, if by characters)",
    )
    add("--recipe", type=Path, metavar="FILE", help="where the run's recipe is now")
    add(
        "--step",
        type=settings.reader(int),
        metavar="N",
        help="of the checkpoint (default: the last)",
    )
    add(
        "--devices",
        type=settings.reader(int),
        default=1,
        metavar="N",
        help="of this machine, over which the model is planned (default: 1)",
    )
    add("--json", action="store_true", help="print a JSON object for each prompt")
    return parser


def _add_sampling(add: Callable[..., Any]) -> None:
    number = settings.reader(float)
    add(
        "--temperature",
        type=number,
        default=0.0,
        metavar="T",
        help="the logits are divided by it (default: 0, the most probable token)",
    )
    add(
        "--top-k",
        type=settings.reader(int),
        metavar="N",
        help="draw from the N most probable tokens",
    )
    add(
        "--top-p",
        type=number,
        metavar="SHARE",
        help="draw from the fewest tokens that together reach this share",
    )
    add(
        "--min-p",
        type=number,
        metavar="SHARE",
        help="draw from tokens with this share of the greatest probability",
    )
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    add(
        "--seed",
        type=settings.reader(int),
        default=0,
        metavar="N",
        help="of the draws (default: 0)",
    )


__all__: Sequence[str] = ["main"]
