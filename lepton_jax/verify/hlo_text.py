"""The text of a compiled module: instructions, groups of devices, and source lines.

The text is a list of computations, callees before callers, each a list of instructions:

    %add (x: f32[], y: f32[]) -> f32[] {
      %x = f32[] parameter(0)
      %y = f32[] parameter(1)
      ROOT %sum = f32[] add(%x, %y)
    }
    ENTRY %main (p: f32[8]) -> f32[8] {
      %p = f32[8]{0} parameter(0)
      ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
    }
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

# The first line of a computation: its name.
HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
# The start of an instruction: its name.
LINE = re.compile(r"^\s+(ROOT\s+)?%([\w.\-]+) = ")
# An array's type, such as f32[8,4].
LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
PARENTHESIS = re.compile(r"[()]")
# The attributes that name computations that an instruction runs.
CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|"
    r"false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)

# Groups of devices written as axes of a mesh, and in any form.
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
        """Elements of the array."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the array, elements of few bits packed."""
        return -(-self.size * self.bits // 8)


@dataclass
class Instruction:
    """One instruction.

    Attributes:
      name: its name, without "%".
      shape: the type of its result, as text.
      opcode: such as "dot".
      operands: names of its operands.
      literal: the text between the parentheses: a constant, a parameter's number.
      attributes: the text after them.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    literal: str
    attributes: str

    @property
    def leaves(self) -> list[Leaf]:
        """Types of the arrays in the result, a tuple flattened."""
        without_layouts = re.sub(r"\{[^}]*\}", "", self.shape)
        return [
            Leaf(_bits(kind), _dims(dims))
            for kind, dims in LEAF.findall(without_layouts)
        ]

    def get(self, key: str) -> str:
        """Return an attribute `key={...}` or `key=word`, without braces, or ""."""
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.attributes)
        if match is None:
            return ""
        return match[1] or match[2] or ""

    def numbers(self, key: str) -> list[int]:
        """Return the numbers in an attribute."""
        return _integers(self.get(key))

    def called(self) -> list[tuple[str, str]]:
        """Return (role, computation) of those that it runs.

        The later halves of an asynchronous pair run none.
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
    """Instructions by name, and the name of the one that gives the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by their number."""
        return {
            int(i.literal): i.name
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }

    def users(self, name: str) -> Iterator[Instruction]:
        """Yield the instructions that read the result of another."""
        for instruction in self.instructions.values():
            if name in instruction.operands:
                yield instruction


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    match = re.search(r"\d+", kind)  # f32, bf16, s4, f8e4m3fn; a token has no digits
    return int(match[0]) if match else 0


def _dims(text: str) -> tuple[int, ...]:
    """Return the extents in "8,<=4", where "<=" bounds a dynamic extent."""
    parts = [part.strip("<= ") for part in text.split(",")]
    numbers = [int(part) for part in parts if part.isdigit()]
    return tuple(numbers)


def _balanced(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`.

    It is the end of the text if none does.
    """
    depth = 0
    for match in PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _type_end(line: str, start: int) -> int:
    """Return the index after the type that begins at `start`."""
    if line[start] == "(":  # a tuple
        return _balanced(line, start)
    return line.index(" ", start)


def instruction_of(
    line: str,
    start: int,
    name: str,
) -> Instruction:
    """Return the instruction of a line whose result's type begins at `start`."""
    end = _type_end(line, start)
    bracket = line.find("(", end)
    if bracket < 0:
        bracket = len(line)
    close = _balanced(line, bracket)
    inside = line[bracket + 1 : close - 1]
    return Instruction(
        name=name,
        shape=line[start:end],
        opcode=line[end:bracket].strip(),
        operands=re.findall(r"%([\w.\-]+)", inside),
        literal=inside.strip(),
        attributes=line[close:],
    )


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations by name, and the name of the one that a call runs.

    They are in the order of the text, callees before callers.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if match := LINE.match(line):
            if current is not None:
                name = match[2]
                current.instructions[name] = instruction_of(
                    line,
                    match.end(),
                    name,
                )
                if match[1]:
                    current.root = name
        elif line.startswith("}") and not line.startswith("}}"):
            # "}}" ends attributes that a kernel has written over several lines
            current = None
        elif (match := HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations.setdefault(match[2], Computation(match[2]))
            if match[1]:
                entry = match[2]
    assert entry, "not the text of an HLO module"
    return computations, entry


# ---- groups ----


def groups_of(
    attributes: str,
    partitions: int,
) -> tuple[tuple[int, ...], ...]:
    """Return groups of device numbers, or (source, target) pairs.

    XLA writes them in several forms; `partitions` is the number of devices.
    """
    match = GROUPS.search(attributes)
    return _expanded(match[0] if match else "", partitions)


@cache
def _expanded(
    text: str,
    partitions: int,
) -> tuple[tuple[int, ...], ...]:
    key, _, form = text.partition("=")
    if form.startswith("mesh"):
        parts = re.fullmatch(MESH, form)
        assert parts, form
        return _of_mesh(*parts.groups())
    if form.startswith("["):
        return _rows(_iota(form))
    inner = re.findall(r"\{([\d,\s]*)\}", form[1:-1])
    groups = tuple(tuple(_integers(group)) for group in inner)
    if groups or key == "source_target_pairs":
        return groups
    # No groups mean one of all devices.
    return (tuple(range(partitions)),)


def _rows(numbers: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in numbers)


def _iota(text: str) -> np.ndarray:
    """Return the numbers that a reshaped and transposed range stands for.

    `[4,2]<=[2,4]T(1,0)` is 0, 1, 2, ... reshaped to (2, 4), transposed by (1, 0) and
    reshaped to (4, 2); the first brackets may be absent:

        >>> _iota("[4,2]<=[2,4]T(1,0)").tolist()
        [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    match = re.search(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match, text
    shape = _integers(match[1])
    source = _integers(match[2])
    order = _integers(match[3])
    numbers: np.ndarray = np.arange(math.prod(source))
    numbers = numbers.reshape(source)
    if order:
        numbers = numbers.transpose(order)
    return numbers.reshape(shape) if shape else numbers


def _integers(text: str | None) -> list[int]:
    found = re.findall(r"\d+", text or "")
    return [int(number) for number in found]


class _AxisPart(NamedTuple):
    """A part of a mesh axis: the axis split as (before, size, rest), the middle one."""

    name: str
    before: int
    size: int


def _of_mesh(
    axes: str,
    ids: str | None,
    grouped: str,
) -> tuple[tuple[int, ...], ...]:
    """Return the groups that span axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`.

    A part of an axis is written `'b':(2)2`: split b as (2, 2, rest), take the middle.

        >>> _of_mesh("'a'=2,'b'=4", None, "'b'")
        ((0, 1, 2, 3), (4, 5, 6, 7))
        >>> _of_mesh("'a'=2,'b'=4", None, "'b':(2)2")
        ((0, 1), (2, 3), (4, 5), (6, 7))

    Args:
      axes: names and sizes of the mesh's axes.
      ids: the devices' numbers in the mesh's order; None: 0, 1, 2, ...
      grouped: the axes, or parts of axes, that a group spans.
    """
    pairs = re.findall(r"'?([^',=]+)'?=(\d+)", axes)
    sizes = {name: int(size) for name, size in pairs}
    count = math.prod(sizes.values())
    numbers = _device_numbers(ids, count)
    parts = []
    written = re.findall(r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?", grouped)
    for name, before, size in written:
        part = _AxisPart(
            name,
            int(before or 1),
            int(size or sizes[name]),
        )
        parts.append(part)

    shape: list[int] = []
    # The dim of the part of an axis that begins after `before` others.
    dims: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        cuts = _cuts(name, size, parts)
        for low, high in pairwise(cuts):
            dims[name, low] = len(shape)
            shape.append(high // low)

    places = [(part.name, part.before) for part in parts]
    last = [dims[place] for place in places if place in dims]
    others = [dim for dim in range(len(shape)) if dim not in last]
    width = math.prod(shape[dim] for dim in last)
    numbers = numbers.reshape(shape)
    numbers = numbers.transpose(others + last)
    return _rows(numbers.reshape(-1, width))


def _device_numbers(
    ids: str | None,
    count: int,
) -> np.ndarray:
    if not ids:
        return np.arange(count)
    if "[" in ids:
        return _iota(ids).reshape(-1)
    return np.asarray(_integers(ids))


def _cuts(
    name: str,
    size: int,
    parts: list[_AxisPart],
) -> list[int]:
    """Return where parts cut an axis, as products of the sizes before each cut."""
    cuts = {1, size}
    for part in parts:
        if part.name == name:
            cuts.add(part.before)
            cuts.add(part.before * part.size)
    return sorted(cuts)


# ---- source lines ----


class Sources:
    """Source lines of instructions.

    They are written in place, or as a number in the tables above the computations.

    Attributes:
      files: names of files by number.
      places: numbers of a file and a line by number.
      frames: numbers of a place and of the parent frame by number.
    """

    def __init__(self, text: str):
        tables = _tables(text)
        files = tables.get("FileNames", {})
        self.files = {number: name.strip('"') for number, name in files.items()}
        self.places = _parsed(tables.get("FileLocations", {}))
        self.frames = _parsed(tables.get("StackFrames", {}))
        # Some versions of XLA print a parent's number plus one, so that a root names
        # itself. In the others a root's parent is 0.
        frames = self.frames.values()
        parents = [frame.get("parent_frame_id") for frame in frames]
        self.shift = 0 if 0 in parents else 1

    def of(self, attributes: str) -> tuple[str, str, int]:
        """Return (op_name, file, line) of an instruction's attributes."""
        start = attributes.find("metadata={")
        data = attributes[start:] if start >= 0 else ""
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', data)
        file = re.search(r'source_file="([^"]*)"', data)
        line = re.search(r"source_line=(\d+)", data)
        op_name = name[1] if name else ""
        if file:
            number = int(line[1]) if line else 0
            return op_name, file[1], number
        frame = re.search(r"stack_frame_id=(\d+)", data)
        if not frame:
            return op_name, "", 0
        return op_name, *self.line(frame[1])

    def line(self, frame: str) -> tuple[str, int]:
        """Return (file, line) of a stack: the innermost that is no library's.

        If all are of libraries, it is the innermost.
        """
        first = ("", 0)
        while frame in self.frames:
            row = self.frames[frame]
            location = str(row["file_location_id"])
            place = self.places.get(location, {})
            number = str(place.get("file_name_id", 0))
            file = self.files.get(number, "")
            here = (file, place.get("line", 0))
            if file and not of_a_library(file):
                return here
            first = first if first[0] else here
            above = row.get("parent_frame_id", 0)
            parent = str(above - self.shift)
            frame = parent if parent != frame else ""
        return first


def _tables(text: str) -> dict[str, dict[str, str]]:
    """Return the rows of each table above the computations, by number."""
    above = text[: _tables_end(text)]
    names = r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n"
    parts = re.split(names, above, flags=re.MULTILINE)
    return {
        name: dict(re.findall(r"^(\d+) (.*)$", table, re.MULTILINE))
        for name, table in zip(
            parts[1::2],
            parts[2::2],
            strict=True,
        )
    }


def _tables_end(text: str) -> int:
    """Return where the tables end and the first computation begins."""
    first = text.find("\n")
    match = re.search(
        r"^(?:ENTRY\s+)?%?[\w.\-]+ .*\{\s*$",
        text[first:],
        re.MULTILINE,
    )
    if match is None:
        return 0
    return match.start() + first


def _parsed(rows: dict[str, str]) -> dict[str, dict[str, int]]:
    """Return rows such as "{file_name_id=1 line=12}" as numbers by name."""
    parsed = {}
    for number, row in rows.items():
        pairs = re.findall(r"(\w+)=(\d+)", row)
        parsed[number] = {key: int(text) for key, text in pairs}
    return parsed


def of_a_library(file: str) -> bool:
    """Whether a source file is of Lepton, of Python or of an installed package."""
    package = Path(__file__).resolve().parents[1]
    # A model of the zoo counts as the user's model.
    if file.startswith(str(package / "models")):
        return False
    if file.startswith((str(package), "<")):
        return True
    libraries = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
    return any(part in file for part in libraries)
