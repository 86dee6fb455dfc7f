"""Readers of option values: from the text on a command line to a typed value."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lepton_jax.errors import nearest

# how an error calls a value of the type
ARTICLES = {int: "a whole number", float: "a number"}


def reader(
    kind: type,
    optional: bool = False,
    choices: tuple | None = None,
) -> Callable[[str], Any]:
    """Return a function that reads one option's text, for argparse's `type=`.

    Args:
      kind: type of the value.
      optional: whether the text "none" means None.
      choices: the values that are allowed; None: all of the type.

    Returns:
      A function from text to value. It raises argparse.ArgumentTypeError, which says
      what is wrong with the text.
    """

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None

        for choice in choices or ():
            if text == str(choice):
                return choice

        try:
            value = kind(text)
        except ValueError:
            expected = ARTICLES.get(kind, kind.__name__)
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None

        if choices and value not in choices:
            names = [str(choice) for choice in choices]
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(names)}{nearest(text, names)}"
            )
        return value

    return read
