"""Roles of a mesh's axes, by their names.

A person who writes `mesh={"fsdp": 8, "tensor": 4}` means something by it. Some names
are words of the field, and an axis so called does what the word says; other names, such
as "x", leave it to the search. A number at the end does not count: "tensor2" is a
"tensor".

    data       splits the samples; the state is not kept in parts over it
    fsdp       splits the samples, and the state is kept in parts over it
    tensor     splits a dim of parameters that is neither samples, experts nor sequence
    expert     splits the experts; the samples may be split along it, too
    sequence   splits a later dim of the inputs
    stage      splits the layers of a stack; the samples may be split along it, too
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lepton_jax.planner.assignment import Assignment, expert_groups
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search.limits import LISTED_GROUPS
from lepton_jax.planner.search.masks import divides, has
from lepton_jax.planner.search.pins import Pins

# the word of the field that each name of an axis stands for
WORDS = {
    "data": "data",
    "batch": "data",
    "dp": "data",
    "fsdp": "fsdp",
    "zero": "fsdp",
    "tensor": "tensor",
    "model": "tensor",
    "tp": "tensor",
    "mp": "tensor",
    "expert": "expert",
    "ep": "expert",
    "sequence": "sequence",
    "seq": "sequence",
    "context": "sequence",
    "sp": "sequence",
    "cp": "sequence",
    "stage": "stage",
    "pipeline": "stage",
    "pipe": "stage",
    "pp": "stage",
}
# what an axis splits, by its word
SPLITS = {
    "data": "samples",
    "fsdp": "samples",
    "tensor": "a dim of parameters that is neither samples, experts nor sequence",
    "expert": "experts",
    "sequence": "a later dim of the inputs",
    "stage": "the layers of a stack, as stages of a pipeline",
}


class Roles:
    """Roles that the axes of a pinned mesh may have, and must.

    Args:
      names: named axes of the model.
      pins: with the mesh's axes; what they pin goes before what the names say.

    Attributes:
      notes: axes that can't do what they are called after, and why.
    """

    def __init__(self, names: Names, pins: Pins):
        self.names = names
        self.notes: list[str] = []
        self._pins = pins
        self._words = [_word(axis) for axis in pins.axes]
        self._named = any(self._words)
        if not self._named:
            return

        every = (1 << len(self._words)) - 1
        # mesh axes that may split each group
        self._may = [every] * len(names.groups)
        # mesh axes over which the state may, and must, be kept in parts
        self._may_keep = every
        self._must_keep = 0
        # mesh axis to groups, one of which it must split
        self._must: dict[int, list[int]] = {}

        splitters = self._splitters()
        sample_parts = 1
        for bit, word in enumerate(self._words):
            size = pins.meshes[0][bit]
            if word is None or size == 1:
                continue
            parts = size * sample_parts if _samples(word) else size
            able = self._able(splitters[word], parts)
            self._restrict(
                bit,
                word,
                splitters[word] if able else [],
            )
            if able:
                self._must[bit] = able
                if _samples(word):
                    sample_parts *= size
            elif not self._stored(bit):
                self.notes.append(self._idle(bit, word, size))

    def _restrict(
        self,
        bit: int,
        word: str,
        groups: list[int],
    ) -> None:
        """Leave an axis what its word says: to split these groups, and to keep state.

        Args:
          bit: number of the mesh axis.
          word: what it is called after.
          groups: what it must split one of; empty: it can't do what its word says.
        """
        free = set(groups)
        if groups:
            free |= self._additional(word)
        pinned = self._pins.groups
        for k, group in enumerate(self.names.groups):
            if k not in free and group.name not in pinned:
                self._may[k] &= ~(1 << bit)

        if word == "data" or not groups:
            self._may_keep &= ~(1 << bit)
        elif word == "fsdp":
            self._must_keep |= 1 << bit

    def allowed(self, assignment: Assignment) -> bool:
        """Whether each axis does what it is called after."""
        if not self._named:
            return True

        keep = assignment.keep
        if keep & ~self._may_keep or self._must_keep & ~keep:
            return False
        pairs = zip(assignment.masks, self._may, strict=True)
        if any(mask & ~may for mask, may in pairs):
            return False
        return not any(self._missing(assignment))

    def starts(self, assignment: Assignment) -> Iterator[Assignment]:
        """Yield the assignment changed to what is allowed, in each of the ways.

        Where an axis must split one of several groups, each of them is tried by itself.
        """
        if not self._named:
            yield assignment
            return

        pairs = zip(assignment.masks, self._may, strict=True)
        masks = tuple(mask & may for mask, may in pairs)
        keep = assignment.keep & self._may_keep | self._must_keep
        pending = [replace(assignment, masks=masks, keep=keep)]
        while pending:
            candidate = pending.pop()
            bit = next(self._missing(candidate), None)
            if bit is None:
                yield self._pins.force(candidate, self.names)
            else:
                pending += self._splits(candidate, bit)

    def _splits(
        self,
        assignment: Assignment,
        bit: int,
    ) -> Iterator[Assignment]:
        """Yield the assignment with each group that the axis must split one of."""
        for k in self._must[bit]:
            masks = list(assignment.masks)
            masks[k] |= 1 << bit
            count = assignment.counts[masks[k]]
            if divides(self.names, k, count):
                yield replace(assignment, masks=tuple(masks))

    def _missing(self, assignment: Assignment) -> Iterator[int]:
        """Yield the axes that split none of the groups that they must split one of."""
        pinned = self._pins.groups.values()
        for axis, groups in self._must.items():
            masks = [assignment.masks[k] for k in groups]
            masks += pinned
            if not any(has(mask, axis) for mask in masks):
                yield axis

    def _stored(self, axis: int) -> bool:
        """Whether a pin keeps something in parts over an axis."""
        specs = self._pins.storage.values()
        masks = itertools.chain.from_iterable(specs)
        return any(has(mask, axis) for mask in masks)

    # ---- what each word stands for in this model ----

    def _splitters(self) -> dict[str, list[int]]:
        """Return for each word the groups that its axis must split one of."""
        names = self.names
        batch = [] if names.batch is None else [names.batch]
        experts = sorted(expert_groups(names))
        later = self._later()
        stages = sorted(names.stages)
        others = {*batch, *experts, *later, *stages}
        every = range(len(names.groups))
        params = [k for k in every if self._of_parameters(k)]
        return {
            "data": batch,
            "fsdp": batch,
            "tensor": [k for k in params if k not in others],
            "expert": experts,
            "sequence": later,
            "stage": stages,
        }

    def _additional(self, word: str) -> set[int]:
        """Return the groups that an axis may split in addition to those."""
        if _samples(word):
            return set(self.names.rows)
        if word in ("expert", "stage") and self.names.batch is not None:
            return {self.names.batch}
        return set()

    def _later(self) -> list[int]:
        """Return later dims of the inputs: those that no parameter has, else of tokens.

        A learned table of positions has the dim of the sequence, but so has the first
        kernel the features of a sample: only whole numbers stand for tokens.
        """
        names = self.names
        of_inputs = []
        of_tokens = []
        for k, group in enumerate(names.groups):
            if k == names.batch:
                continue
            later_dims = [i for i, dim in group.members if dim]
            inputs = [i for i in later_dims if not _parameter(names, i)]
            if inputs and not self._of_parameters(k):
                of_inputs.append(k)
            elif any(_whole_numbers(names, i) for i in inputs):
                of_tokens.append(k)
        return of_inputs or of_tokens

    def _of_parameters(self, k: int) -> bool:
        members = self.names.groups[k].members
        return any(_parameter(self.names, i) for i, _ in members)

    def _able(
        self,
        groups: list[int],
        parts: int,
    ) -> list[int]:
        """Return those of the groups that can be split into `parts`."""
        return [k for k in groups if divides(self.names, k, parts)]

    def _idle(
        self,
        bit: int,
        word: str,
        size: int,
    ) -> str:
        """Return the note that an axis is idle, and why."""
        listed = []
        for k in self._splitters()[word][:LISTED_GROUPS]:
            group = self.names.groups[k]
            listed.append(f"{group.name} ({group.divisor})")
        if listed:
            why = f"{', '.join(listed)} can't be split over {size} devices"
        else:
            why = "the model has none"
        return (
            f"the mesh axis {self._pins.axes[bit]!r} is idle: by its name it splits"
            f" {SPLITS[word]}, and {why}; a name that is no such word, e.g. 'x', leaves"
            " it to the search what the axis does"
        )


def _word(axis: str) -> str | None:
    """Return the word that a mesh axis is called after; None: its name is no word."""
    word = axis.rstrip(string.digits).lower()
    return WORDS.get(word)


def stage_axes(mesh: Mapping[str, int]) -> list[str]:
    """Return the axes of a mesh that are called after stages of a pipeline."""
    return [axis for axis in mesh if _word(axis) == "stage"]


def sequence_axes(mesh: Mapping[str, int]) -> list[str]:
    """Return the axes of a mesh that split a sequence, by their names."""
    return [axis for axis in mesh if _word(axis) == "sequence" and mesh[axis] > 1]


def sample_axes(mesh: Mapping[str, int]) -> list[str]:
    """Return the axes of a mesh that are called after samples."""
    return [axis for axis in mesh if _samples(_word(axis) or "")]


def _samples(word: str) -> bool:
    return word in ("data", "fsdp")


def _parameter(names: Names, index: int) -> bool:
    return names.paths[index].startswith("params")


def _whole_numbers(names: Names, index: int) -> bool:
    value = names.graph.main.inputs[index]
    return str(value.dtype).startswith(("int", "uint"))
