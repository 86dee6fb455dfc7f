"""The command line: `lepton COMMAND`, of which `lepton --help` lists all.

Each command has a module of its own with a `main(arguments)` that returns the exit
code. `tools/launch.py`, `tools/plan.py`, `tools/control.py` and `tools/prepare.py` are
doors to the same functions.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any

from lepton_jax.errors import nearest

COMMANDS = {
    "launch": "train a recipe, here or on many hosts",
    "plan": "show what a step would cost, on hardware that need not be there",
    "prepare": "make samples of raw files",
    "predict": "predict the rows of files, here or on a Ray cluster",
    "generate": "write text with a trained language model",
    "export": "write a trained model for a runtime, and compare the two",
    "hub": "take models from Hugging Face folders, or write one",
    "serve": "answer requests with trained models, over HTTP",
    "shrink": "make a trained model smaller, and keep its metric",
    "explain": "show in a run's report what speaks for its predictions",
    "control": "ask a run that is under way for something",
}
# exit codes
MISTAKE = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit code.

    Returns:
      What the command returns; 2 for a mistake; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(_usage(), file=sys.stderr)
        return MISTAKE

    name, *rest = words
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        error = f"error: there is no command {name!r}{nearest(name, COMMANDS)}"
        print(f"{_usage()}\n\n{error}", file=sys.stderr)
        return MISTAKE

    command = _loaded(f"lepton_jax.cli.{name}")
    try:
        return command.main(rest)
    except KeyboardInterrupt:  # before the command was ready for it
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _loaded(module: str) -> types.ModuleType:
    """Import a module; on Ctrl-C the process ends at once.

    Libraries that are loaded by half may swallow a KeyboardInterrupt, or crash an
    interpreter that cleans up after one.
    """

    def leave(*_: Any) -> None:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    # a process in the background may ignore the signal, and a thread can't decide
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_usual and is_main):
        return importlib.import_module(module)
    signal.signal(signal.SIGINT, leave)
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _usage() -> str:
    commands = "\n".join(f"  {name:<9}{text}" for name, text in COMMANDS.items())
    return f"""usage: lepton COMMAND ...

{commands}

lepton COMMAND --help lists the options of a command."""
