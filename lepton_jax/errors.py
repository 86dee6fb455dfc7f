"""Errors made for people: what is wrong, where, and what to do about it.

A person's mistake raises a `LeptonError`; the command line prints it and exits with code 2, without a traceback.
A broken invariant of the library itself is an `assert`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LeptonError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
      what: the fault, in one sentence, with the values that show it.
      where: the place: file and line, column and row, parameter path, step.
      remedy: what to do now.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str):
        self.what, self.where, self.remedy = what, None if where is None else str(where), remedy
        place = f"\n  where:  {self.where}" if self.where else ""
        super().__init__(f"{what}{place}\n  remedy: {remedy}")


class RecipeError(LeptonError):
    """A recipe file, or a field of a Recipe, that can't be used."""


class SettingError(LeptonError):
    """A setting on the command line that is unknown, ill-typed or out of range."""


class DataError(LeptonError):
    """Data that can't be read, or doesn't fit what the recipe asks of it."""


class ModelError(LeptonError):
    """A module that can't be built, traced or applied to the batch."""


class PlanError(LeptonError):
    """A plan that is impossible on the devices at hand."""


class CheckpointError(LeptonError):
    """A checkpoint that can't be written, read, or restored into this model."""


class DivergedError(LeptonError):
    """A loss that is no longer a finite number."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` if a known name is near, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
