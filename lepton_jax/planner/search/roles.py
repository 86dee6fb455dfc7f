"""Roles of a mesh's axes, by their names.

A person who writes `mesh={"fsdp": 8, "tensor": 4}` means something by it. Some names
are words of the field, and an axis so called does what the word says; other names, such
as "x", leave it to the search. A number at the end does not count: "tensor2" is a
"tensor".

    data       splits the samples; the state is not kept in parts over it
    fsdp       splits the samples, and the state is kept in parts over it
    tensor     splits a dim of parameters that is neither samples, experts nor sequence
    expert     splits the experts; the samples may lie along it, too
    sequence   splits a later dim of the inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lepton_jax.planner.assignment import Assignment, expert_groups
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search.pins import Pins

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
}
SPLITS = {
    "data": "samples",
    "fsdp": "samples",
    "tensor": "a dim of parameters that is neither samples, experts nor sequence",
    "expert": "experts",
    "sequence": "a later dim of the inputs",
}


class Roles:
    """Roles that the axes of a pinned mesh may have, and must.

    Args:
      names: of the model.
      pins: with the mesh's axes; what they pin goes before what the names say.

    Attributes:
      notes: axes that can't do what they are called after, and why.
    """

    def __init__(self, names: Names, pins: Pins):
        self.names = names
        self.notes: list[str] = []
        self._pins = pins
        self._words = [WORDS.get(a.rstrip("0123456789").lower()) for a in pins.axes]
        self._named = any(self._words)
        if not self._named:
            return

        every = (1 << len(self._words)) - 1
        splitters = self._splitters()
        self._may = [every] * len(names.groups)  # mesh axes of each group
        self._keeps = every
        self._kept = 0  # mesh axes over which the state must be kept in parts
        # mesh axis to groups, one of which has it
        self._must: dict[int, list[int]] = {}

        count = 1
        for bit, word in enumerate(self._words):
            size = pins.meshes[0][bit]
            if word is None or size == 1:
                continue
            able = self._able(splitters[word], size * (count if _samples(word) else 1))
            free = set(splitters[word]) | self._beside(word) if able else set()
            for k, group in enumerate(names.groups):
                if k not in free and group.name not in pins.groups:
                    self._may[k] &= ~(1 << bit)
            if able:
                self._must[bit] = able
                count *= size if _samples(word) else 1
            elif not self._stored(bit):
                self.notes.append(self._idle(bit, word, size))
            if word == "data" or not able:
                self._keeps &= ~(1 << bit)
            elif word == "fsdp":
                self._kept |= 1 << bit

    def allowed(self, assignment: Assignment) -> bool:
        """Whether each axis does what it is called after."""
        if not self._named:
            return True
        keep = assignment.keep
        if keep & ~self._keeps or self._kept & ~keep:
            return False
        pairs = zip(
            assignment.masks,
            self._may,
            strict=True,
        )
        if any(mask & ~may for mask, may in pairs if mask):
            return False
        return not any(self._missing(assignment))

    def starts(self, assignment: Assignment) -> Iterator[Assignment]:
        """The assignment changed to what is allowed, in each of the ways there are.

        Of what an axis must split, each group is tried by itself.
        """
        if not self._named:
            yield assignment
            return
        masks = tuple(
            mask & may for mask, may in zip(assignment.masks, self._may, strict=True)
        )
        keep = assignment.keep & self._keeps | self._kept
        pending = [
            replace(
                assignment,
                masks=masks,
                keep=keep,
            )
        ]
        while pending:
            one = pending.pop()
            bit = next(self._missing(one), None)
            if bit is None:
                yield self._pins.force(one, self.names)
                continue
            for k in self._must[bit]:
                more = list(one.masks)
                more[k] |= 1 << bit
                if self.names.groups[k].divisor % one.counts[more[k]] == 0:
                    pending.append(replace(one, masks=tuple(more)))

    def _missing(self, assignment: Assignment) -> Iterator[int]:
        """Axes that split nothing of what they must split one of."""
        for bit, groups in self._must.items():
            has = any(assignment.masks[k] >> bit & 1 for k in groups)
            pinned = any(mask >> bit & 1 for mask in self._pins.groups.values())
            if not has and not pinned:
                yield bit

    def _stored(self, bit: int) -> bool:
        """Whether a pin keeps something in parts over an axis."""
        masks = [mask for spec in self._pins.storage.values() for mask in spec]
        return any(mask >> bit & 1 for mask in masks)

    def _splitters(self) -> dict[str, list[int]]:
        """For each word, the groups that its axis must split one of."""
        names = self.names
        batch = [] if names.batch is None else [names.batch]
        experts = sorted(expert_groups(names))
        later = self._later()
        others = {*batch, *experts, *later}
        rest = [k for k in range(len(names.groups)) if k not in others]
        params = [k for k in rest if self._of_parameters(k)]
        return {
            "data": batch,
            "fsdp": batch,
            "tensor": params,
            "expert": experts,
            "sequence": later,
        }

    def _beside(self, word: str) -> set[int]:
        """Groups that an axis may split in addition to those."""
        batch = set() if self.names.batch is None else {self.names.batch}
        return {"data": self.names.rows, "fsdp": self.names.rows, "expert": batch}.get(
            word, set()
        )

    def _later(self) -> list[int]:
        """Later dims of the inputs: those that no parameter has, else those of tokens.

        A learned table of positions has the dim of the sequence, but so has the first
        kernel the features of a sample: only whole numbers stand for tokens.
        """
        names = self.names
        found = []
        tokens = []
        for k, group in enumerate(names.groups):
            if k == names.batch:
                continue
            inputs = [i for i, d in group.members if d and not _parameter(names, i)]
            if inputs and not self._of_parameters(k):
                found.append(k)
            elif any(_whole_numbers(names, i) for i in inputs):
                tokens.append(k)
        return found or tokens

    def _of_parameters(self, k: int) -> bool:
        return any(_parameter(self.names, i) for i, _ in self.names.groups[k].members)

    def _able(
        self,
        groups: list[int],
        size: int,
    ) -> list[int]:
        return [k for k in groups if self.names.groups[k].divisor % size == 0]

    def _idle(
        self,
        bit: int,
        word: str,
        size: int,
    ) -> str:
        axis = self._pins.axes[bit]
        groups = self._splitters()[word]
        has = ", ".join(
            f"{self.names.groups[k].name} ({self.names.groups[k].divisor})"
            for k in groups[:4]
        )
        why = (
            f"{has} can't be split over {size} devices" if has else "the model has none"
        )
        return (
            f"the mesh axis {axis!r} is idle: by its name it splits {SPLITS[word]}, and"
            f" {why}; a name that is no such word, e.g. 'x', leaves it to the search"
            " what the axis does"
        )


def _samples(word: str) -> bool:
    return word in ("data", "fsdp")


def _parameter(names: Names, index: int) -> bool:
    return names.paths[index].startswith("params")


def _whole_numbers(names: Names, index: int) -> bool:
    return str(names.graph.main.inputs[index].dtype).startswith(("int", "uint"))
