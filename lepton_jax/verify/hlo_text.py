"""The text of a compiled module: its computations and instructions, groups of devices,
and source lines.
"""

from __future__ import annotations

import math
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
LINE = re.compile(r"^\s+(ROOT\s+)?%([\w.\-]+) = ")
LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    r"called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)

MESH = r"mesh\[(.*?)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? ?\{(.*?)\}"
GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)=(?:\{(?:\{[\d,\s]*\},?\s*)*\}|"
    r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|" + MESH + ")"
)


class Leaf(NamedTuple):
    """An array's type: bits per element and dims."""

    bits: int
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.size * self.bits // 8)


@dataclass
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    literal: str
    attributes: str

    @property
    def leaves(self) -> list[Leaf]:
        """Types of the arrays in the result, a tuple flattened."""
        return [
            Leaf(
                _bits(kind),
                tuple(
                    int(n.lstrip("<="))
                    for n in dims.split(",")
                    if n.strip("<= ").isdigit()
                ),
            )
            for kind, dims in LEAF.findall(re.sub(r"\{[^}]*\}", "", self.shape))
        ]

    def get(self, key: str) -> str:
        """Text of an attribute `key={...}` or `key=word`, without braces; empty if
        absent.
        """
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.attributes)
        return (match[1] or match[2] or "") if match else ""

    def numbers(self, key: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", self.get(key))]

    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of those that it runs; the later halves of an
        asynchronous pair run none.
        """
        if self.opcode.endswith(("-done", "-update")):
            return []
        return [
            (role, name)
            for role, names in CALLED.findall(self.attributes)
            for name in re.findall(r"%([\w.\-]+)", names)
        ]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @property
    def parameters(self) -> dict[int, str]:
        return {
            int(i.literal): i.name
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }

    def users(self, name: str) -> Iterator[Instruction]:
        return (i for i in self.instructions.values() if name in i.operands)


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    match = re.search(r"\d+", kind)  # f32, bf16, s4, f8e4m3fn; a token has no digits
    return int(match[0]) if match else 0


def _balanced(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`; the end of the
    text if none does.
    """
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def instruction_of(
    line: str,
    start: int,
    name: str,
) -> Instruction:
    end = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
    bracket = line.find("(", end)
    bracket = len(line) if bracket < 0 else bracket
    close = _balanced(line, bracket)
    inside = line[bracket + 1 : close - 1]
    return Instruction(
        name,
        line[start:end],
        line[end:bracket].strip(),
        re.findall(r"%([\w.\-]+)", inside),
        inside.strip(),
        line[close:],
    )


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, callees before callers as in the text, and the name of
    the one that a call runs.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if match := LINE.match(line):
            if current is not None:
                instruction = instruction_of(
                    line,
                    match.end(),
                    match[2],
                )
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if match[1] else current.root
        elif line.startswith("}"):
            current = None
        elif (match := HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations.setdefault(match[2], Computation(match[2]))
            entry = match[2] if match[1] else entry
    assert entry, "not the text of an HLO module"
    return computations, entry


# ---- groups ----


def groups_of(attributes: str, partitions: int) -> tuple[tuple[int, ...], ...]:
    """Groups of device numbers, or (source, target) pairs, from any of the forms that
    XLA writes them in.
    """
    match = GROUPS.search(attributes)
    return _expanded(match[0] if match else "", partitions)


@cache
def _expanded(text: str, partitions: int) -> tuple[tuple[int, ...], ...]:
    key, _, form = text.partition("=")
    if form.startswith("mesh"):
        axes, ids, grouped = re.fullmatch(MESH, form).groups()  # type: ignore[union-attr]
        return _of_mesh(axes, ids, grouped)
    if form.startswith("["):
        return tuple(tuple(map(int, group)) for group in _iota(form))
    groups = tuple(
        tuple(map(int, re.findall(r"\d+", group)))
        for group in re.findall(r"\{([\d,\s]*)\}", form[1:-1])
    )
    return (
        groups
        if groups or key == "source_target_pairs"
        else (tuple(range(partitions)),)
    )


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: 0, 1, 2, ... reshaped to (2, 4), transposed by (1, 0),
    reshaped to (4, 2); the first may lack.
    """
    match = re.search(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match, text
    shape, source, order = (
        [int(n) for n in (part or "").split(",") if n] for part in match.groups()
    )
    numbers: np.ndarray = np.arange(math.prod(source)).reshape(source)
    numbers = numbers.transpose(order) if order else numbers
    return numbers.reshape(shape) if shape else numbers


def _of_mesh(
    axes: str,
    ids: str | None,
    grouped: str,
) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=2,'b'=4] {'b'}`; a part of an axis is written `'b':(2)2`: split b as
    (2, 2, rest) and take the middle.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", axes)}
    numbers: np.ndarray = np.arange(math.prod(sizes.values()))
    if ids:
        numbers = (
            _iota(ids).reshape(-1)
            if "[" in ids
            else np.asarray([int(n) for n in re.findall(r"\d+", ids)])
        )
    taken = [
        (
            name,
            int(before or 1),
            int(size or sizes[name]),
        )
        for name, before, size in re.findall(
            r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?", grouped
        )
    ]
    shape: list[int] = []
    # dim of the part of an axis that begins after `before` others
    place: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        cuts = sorted(
            {1, size}
            | {
                c
                for n, before, part in taken
                if n == name
                for c in (before, before * part)
            }
        )
        for low, high in pairwise(cuts):
            place[name, low] = len(shape)
            shape.append(high // low)
    last = [place[name, before] for name, before, _ in taken if (name, before) in place]
    order = [d for d in range(len(shape)) if d not in last] + last
    width = math.prod(shape[d] for d in last)
    return tuple(
        tuple(map(int, row))
        for row in numbers.reshape(shape).transpose(order).reshape(-1, width)
    )


# ---- source lines ----


class Sources:
    """Source lines of instructions, whether written in place or as a number in the
    tables above the computations.
    """

    def __init__(self, text: str):
        above = text[: _tables_end(text)]
        parts = re.split(
            r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n",
            above,
            flags=re.MULTILINE,
        )
        tables = dict(
            zip(
                parts[1::2],
                parts[2::2],
                strict=True,
            )
        )
        rows = {
            name: dict(
                re.findall(
                    r"^(\d+) (.*)$",
                    table,
                    re.MULTILINE,
                )
            )
            for name, table in tables.items()
        }
        self.files = {
            number: name.strip('"')
            for number, name in rows.get("FileNames", {}).items()
        }
        self.places = {
            number: _pairs(row) for number, row in rows.get("FileLocations", {}).items()
        }
        self.frames = {
            number: _pairs(row) for number, row in rows.get("StackFrames", {}).items()
        }
        # XLA prints a parent's number plus one, so that a root names itself; plainly, a
        # root's parent would be 0
        self.shift = (
            0 if any(f.get("parent_frame_id") == 0 for f in self.frames.values()) else 1
        )

    def of(self, attributes: str) -> tuple[str, str, int]:
        """(op_name, file, line) of an instruction."""
        start = attributes.find("metadata={")
        data = attributes[start:] if start >= 0 else ""
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', data)
        file = re.search(r'source_file="([^"]*)"', data)
        line = re.search(r"source_line=(\d+)", data)
        op_name = name[1] if name else ""
        if file:
            return op_name, file[1], int(line[1]) if line else 0
        frame = re.search(r"stack_frame_id=(\d+)", data)
        return op_name, *(self.line(frame[1]) if frame else ("", 0))

    def line(self, frame: str) -> tuple[str, int]:
        """The innermost line of a stack that is no library's; else the innermost."""
        first = ("", 0)
        while frame in self.frames:
            row = self.frames[frame]
            place = self.places.get(str(row["file_location_id"]), {})
            here = (
                self.files.get(str(place.get("file_name_id", 0)), ""),
                place.get("line", 0),
            )
            if here[0] and not of_a_library(here[0]):
                return here
            first = first if first[0] else here
            parent = str(row.get("parent_frame_id", 0) - self.shift)
            frame = parent if parent != frame else ""
        return first


def _tables_end(text: str) -> int:
    """Where the tables end and the first computation begins."""
    match = re.search(
        r"^(?:ENTRY\s+)?%?[\w.\-]+ .*\{\s*$",
        text[text.find("\n") :],
        re.MULTILINE,
    )
    return match.start() + text.find("\n") if match else 0


def _pairs(row: str) -> dict[str, int]:
    return {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", row)}


def of_a_library(file: str) -> bool:
    package = Path(__file__).resolve().parents[1]
    # a model of the zoo is the user's model
    if file.startswith(str(package / "models")):
        return False
    return file.startswith((str(package), "<")) or any(
        part in file
        for part in ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
    )
