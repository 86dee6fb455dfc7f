"""What XLA's compiler made of a program: the collectives and the dot flops in the text
of a compiled module.

The text is read by computations: a collective in a loop's body counts as often as the
loop turns, in a fusion or an asynchronous computation as often as its caller runs.
Reads modules of CPU, TPU and GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lepton_jax.hardware import taps
from lepton_jax.verify.hlo_text import Instruction, Leaf, Sources, groups_of, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
PASSING = (
    "get-tuple-element",
    "bitcast",
    "copy",
    "reshape",
    "transpose",
    "convert",
    "copy-start",
    "copy-done",
    "opt-barrier",
    "optimization-barrier",
)


@dataclass(frozen=True)
class CollectiveFound:
    """One collective of the compiled module; an asynchronous pair, or a fusion and its
    inner operation, is one.

    Attributes:
      kind: one of `KINDS`. An all-reduce that its fusion scatters at once (TPU) is a
        reduce-scatter.
      bytes: of the whole buffer on one device in one run: an all-gather's result, else
        the operands. XLA for CPU widens bfloat16 to float32 here.
      groups: the members of each group, as positions in `mesh.devices.flat` (which are
        not `device.id`s); (source, target) pairs of a collective-permute.
      times: runs in one call of the program.
      op_name: JAX's name stack of the operation it comes from.
      file, line: the innermost line of that operation that is no library's; the empty
        string and 0 if unknown.
      exact: False inside a loop whose number of turns is not in the text (it counts as
        1), or a conditional's branch.
      sliced: an all-reduce each of whose uses takes a slice only: a reduce-scatter,
        were it not for the backend.
      windowed: a permute that bears a matmul's name: most likely a piece of an
        all-gather or reduce-scatter that XLA overlaps with it, a shard at a time (on
        TPU n or n + 1 shards in all, where a ring of n needs n - 1).
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    op_name: str = ""
    file: str = ""
    line: int = 0
    exact: bool = True
    sliced: bool = False
    windowed: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one call of the program, by a ring's count."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        size = len(self.groups[0]) if self.groups else 1
        return (
            (2 if self.kind == "all-reduce" else 1)
            * (size - 1)
            / size
            * self.bytes
            * self.times
        )

    def axes(
        self,
        mesh_shape: Mapping[str, int],
        device_ids: np.ndarray | None = None,
    ) -> tuple[str, ...] | None:
        """`axes_of` its groups."""
        return axes_of(
            self.groups,
            mesh_shape,
            device_ids,
            permute=self.kind == "collective-permute",
        )


@dataclass(frozen=True)
class Compiled:
    """What a compiled module does in one call, on one device.

    Attributes:
      collectives: in the order of the module's text.
      dot_flops: of matrix products and convolutions (a multiplication and an addition
        are two), loops multiplied out; of a conditional the costliest branch.
      rematerialized: instructions that XLA itself computes again to save memory (not
        those of `jax.checkpoint`).
      unknown_loops: while loops whose number of turns is not in the text and was taken
        as 1.
      custom_calls: number of calls by target that hold neither known flops nor known
        collectives (kernels).
      partitions: devices.
    """

    collectives: list[CollectiveFound]
    dot_flops: float
    rematerialized: int
    unknown_loops: list[str]
    custom_calls: dict[str, int]
    partitions: int


def read(text: str) -> Compiled:
    """Read the text of an optimized module, `compiled.as_text()`."""
    module = _Module(text)
    times, exact = module.times()
    found = [
        replace(
            c,
            times=times[name],
            exact=exact[name],
        )
        for name in module.computations
        if name in times
        for c in module.collectives(name, times[name])
    ]
    instructions = [
        i
        for name, c in module.computations.items()
        if name in times
        for i in c.instructions.values()
    ]
    calls = [
        m[1]
        for i in instructions
        if i.opcode == "custom-call"
        and module.own_flops(i) is None
        and (m := re.search(r'custom_call_target="([^"]*)"', i.attributes))
    ]
    return Compiled(
        found,
        float(module.flops(module.entry)),
        sum(".remat" in i.name for i in instructions),
        sorted(module.unknown),
        {t: calls.count(t) for t in sorted(set(calls) - PLUMBING)},
        module.partitions,
    )


def axes_of(
    groups: Sequence[Sequence[int]],
    mesh_shape: Mapping[str, int],
    device_ids: np.ndarray | None = None,
    permute: bool = False,
) -> tuple[str, ...] | None:
    """The mesh axes along which a collective moves data, in the mesh's order.

    Args:
      groups: of `CollectiveFound`.
      mesh_shape: sizes of the mesh's axes.
      device_ids: the numbers that `groups` uses, in the mesh's shape; default 0, 1, 2,
        ..., as XLA numbers the devices of a jitted function by their place in the mesh.
      permute: the groups are (source, target) pairs; then the axes along which any of
        them moves.

    Returns:
      None if the groups are not a product of whole axes.
    """
    shape = np.asarray(tuple(mesh_shape.values()), int)
    ids = (
        np.arange(shape.prod())
        if device_ids is None
        else np.asarray(device_ids).reshape(-1)
    )
    if len({len(group) for group in groups}) != 1 or not np.isin(groups, ids).all():
        return None
    order = np.argsort(ids)
    # (groups, members)
    places = order[np.searchsorted(ids, np.asarray(groups), sorter=order)]
    coordinates = np.stack(np.unravel_index(places, tuple(shape)), -1)
    varying = (coordinates != coordinates[:, :1]).any(1)  # (groups, axes)
    if permute:
        varying = varying.any(0, keepdims=True)
    elif (varying != varying[0]).any() or shape[varying[0]].prod() != places.shape[1]:
        return None
    return tuple(
        name for name, moves in zip(mesh_shape, varying[0], strict=True) if moves
    )


# ---- the module ----

# custom calls that neither compute nor move anything worth a word
PLUMBING = {
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "PadToStatic",
    "SliceToDynamic",
    "AssumeGatherIndicesInBound",
    "annotate_device_placement",
    "MoveToHost",
    "MoveToDevice",
}


class _Module:
    """A parsed module.

    Attributes:
      computations: by name, callees before callers, as in the text.
      entry: name of the one that a call of the program runs.
      partitions: devices.
      unknown: loops whose number of turns was asked for and not found.
    """

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.sources = Sources(text)
        self.unknown = set[str]()
        counts = re.findall(
            r"\b(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")]
        )
        self.partitions = math.prod(map(int, counts))
        self._flops: dict[str, int] = {}
        self._chains: set[tuple[str, str, int]] = set()
        self.callers: dict[str, Instruction] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for _, name in instruction.called():
                    self.callers.setdefault(name, instruction)

    # ---- how often ----

    def times(self) -> tuple[dict[str, int], dict[str, bool]]:
        """Runs of each computation in one call of the program, and whether that is
        exact.
        """
        times = {self.entry: 1}
        exact = {self.entry: True}
        for name in reversed(self.computations):  # callers before callees
            for instruction in (
                self.computations[name].instructions.values() if name in times else ()
            ):
                turns = (
                    self.turns(name, instruction)
                    if instruction.opcode == "while"
                    else 1
                )
                sure = (
                    turns is not None
                    and instruction.opcode != "conditional"
                    and exact[name]
                )
                for _, callee in instruction.called():
                    times[callee] = times.get(callee, 0) + times[name] * (
                        turns or 1 if turns is None else turns
                    )
                    exact[callee] = exact.get(callee, True) and sure
        return times, exact

    def turns(
        self,
        name: str,
        loop: Instruction,
    ) -> int | None:
        """Turns of a while loop in computation `name`; None if they can't be told from
        the text.
        """
        if known := re.search(
            r'"known_trip_count":\s*\{"n":\s*"(\d+)"', loop.attributes
        ):
            return int(known[1])
        called = dict(loop.called())
        if (
            result := self._counted(
                name,
                loop,
                called["condition"],
                called["body"],
            )
        ) is None:
            self.unknown.add(loop.name)
        return result

    def _counted(
        self,
        name: str,
        loop: Instruction,
        condition: str,
        body: str,
    ) -> int | None:
        """Turns of a loop that compares a counter with a constant and adds a constant
        to it each turn.
        """
        compared = self._compared(condition, {0: "carry"})
        start = self._value(
            name,
            loop.operands[0],
            {},
        )
        after = self._value(
            body,
            self.computations[body].root,
            {0: "carry"},
        )
        if (
            compared is None
            or not isinstance(start, list)
            or not isinstance(after, list)
        ):
            return None
        (left, right), direction = compared[:2], compared[2]
        if isinstance(right, tuple) and not isinstance(left, tuple):
            left, right = right, left
            direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(
                direction, direction
            )
        right = self._constant(right, start, after)
        if not isinstance(left, tuple) or right is None:
            return None
        index, offset = left
        begin = start[index]
        then = after[index]
        if (
            not isinstance(begin, int)
            or not isinstance(then, tuple)
            or then[0] != index
            or not then[1]
        ):
            return None
        step = then[1]
        distance = (right - begin - offset) * (1 if step > 0 else -1)
        if direction in ("LE", "GE"):
            distance += 1
        if direction not in (("LT", "LE", "NE") if step > 0 else ("GT", "GE", "NE")):
            return None
        return max(0, -(-distance // abs(step)))

    def _constant(
        self,
        value: Any,
        start: list,
        after: list,
    ) -> int | None:
        """A limit: a constant, or a carried value that no turn changes."""
        if (
            isinstance(value, tuple)
            and after[value[0]] == (value[0], 0)
            and isinstance(start[value[0]], int)
        ):
            return start[value[0]] + value[1]
        return value if isinstance(value, int) else None

    def _compared(
        self, name: str, given: Mapping[int, Any]
    ) -> tuple[Any, Any, str] | None:
        """The values that a condition compares, and the direction."""
        computation = self.computations[name]
        root = computation.instructions[computation.root]
        if root.opcode == "compare":
            left, right = (
                self._value(name, operand, given) for operand in root.operands
            )
            return left, right, root.get("direction")
        if root.opcode in ("fusion", "call"):
            inner = {
                i: self._value(name, operand, given)
                for i, operand in enumerate(root.operands)
            }
            return self._compared(root.called()[0][1], inner)
        return None

    def _value(
        self,
        computation: str,
        name: str,
        given: Mapping[int, Any],
    ) -> Any:
        """A small integer as far as the text tells it: an int, (index, offset) relative
        to an element of the loop's carry, a list of such for a tuple, "carry" for the
        whole carry, or None.
        """
        here = self.computations[computation]
        instruction = here.instructions[name]
        opcode = instruction.opcode
        operands = instruction.operands
        if not instruction.shape.startswith("(") and "[]" not in instruction.shape:
            # no scalar; to look further takes a time that doubles with each operation
            return None
        if opcode == "parameter":
            return given.get(int(instruction.literal))
        if opcode == "constant":
            return (
                int(instruction.literal)
                if re.fullmatch(r"-?\d+", instruction.literal)
                else None
            )
        if opcode == "tuple":
            return [self._value(computation, operand, given) for operand in operands]
        if opcode == "get-tuple-element":
            whole = self._value(computation, operands[0], given)
            index = int(instruction.get("index"))
            return (
                (index, 0)
                if whole == "carry"
                else whole[index]
                if isinstance(whole, list)
                else None
            )
        if opcode in PASSING:
            return self._value(computation, operands[0], given)
        if opcode in ("add", "subtract"):
            left, right = (
                self._value(computation, operand, given) for operand in operands
            )
            return _sum(
                left,
                right,
                1 if opcode == "add" else -1,
            )
        if opcode in ("fusion", "call"):
            inner = {
                i: self._value(computation, operand, given)
                for i, operand in enumerate(operands)
            }
            callee = self.computations[instruction.called()[0][1]]
            return self._value(callee.name, callee.root, inner)
        return None

    # ---- flops ----

    def flops(self, name: str) -> int:
        """Flops of dots and convolutions in one run of a computation."""
        if name not in self._flops:
            total = 0
            for instruction in self.computations[name].instructions.values():
                total += self.own_flops(instruction, name) or 0
                inner = [self.flops(callee) for _, callee in instruction.called()]
                if instruction.opcode == "while":
                    turns = self.turns(name, instruction)
                    inner = [f * (1 if turns is None else turns) for f in inner]
                total += (
                    max(inner, default=0)
                    if instruction.opcode == "conditional"
                    else sum(inner)
                )
            self._flops[name] = total
        return self._flops[name]

    def own_flops(
        self,
        instruction: Instruction,
        name: str = "",
    ) -> int | None:
        """Flops of a dot, a convolution or a GPU library's call for one; None for
        anything else.
        """
        target = re.search(
            r'custom_call_target="__(cublas|cudnn)\$(\w+)', instruction.attributes
        )
        convolution = instruction.opcode == "convolution" or (
            target and target[2].startswith("conv")
        )
        contracted = instruction.numbers("lhs_contracting_dims")
        if target and target[1] == "cublas":
            match = re.search(
                r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes
            )
            contracted = [int(n) for n in re.findall(r"\d+", match[1])] if match else []
        if not (convolution or target or instruction.opcode in ("dot", "ragged-dot")):
            return None
        if target and not convolution and not contracted:
            return None
        if not name:  # only asked whether it is one
            return 0
        left, right, *_ = (
            self._leaves(name, operand)[0] for operand in instruction.operands
        )
        out = instruction.leaves[0]
        if convolution:
            roles = {
                "convBackwardInput": (out, right, left),
                "convBackwardFilter": (left, out, right),
            }
            return _convolution(
                instruction, *roles.get(target[2] if target else "", (left, right, out))
            )
        return 2 * out.size * math.prod(left.dims[d] for d in contracted)

    def _leaves(
        self,
        computation: str,
        name: str,
    ) -> list[Leaf]:
        return self.computations[computation].instructions[name].leaves

    # ---- collectives ----

    def collectives(
        self,
        name: str,
        times: int,
    ) -> Iterator[CollectiveFound]:
        """Those that stand in a computation itself; times are filled in by the caller.

        XLA for TPU runs one beside a chain of fusions, and names it in each of them:
        such a chain is one.
        """
        for instruction in self.computations[name].instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            pairs = instruction.get("_xla_send_recv_source_target_pairs")
            if kind == "send" and pairs:
                kind = "collective-permute"
            if kind not in KINDS:
                continue
            if chain := re.search(r'\bchain_id="(\w+)"', instruction.attributes):
                link = chain[1], instruction.get("channel_id"), times
                if link in self._chains:
                    continue
                self._chains.add(link)
            groups = groups_of(instruction.attributes, self.partitions)
            leaves = [
                leaf
                for operand in instruction.operands
                for leaf in self._leaves(name, operand)
            ]
            if (
                kind == "ragged-all-to-all"
                or instruction.get("slice_sizes")
                or instruction.opcode == "send"
            ):
                leaves = leaves[:1]  # the others are where to put it
            size = sum(leaf.bytes for leaf in leaves) * (
                len(groups[0]) if kind == "all-gather" and groups else 1
            )
            sliced = kind == "all-reduce" and self._sliced(name, instruction.name)
            caller = self.callers.get(name)
            if sliced and (
                name.startswith("all-reduce-scatter")
                or (caller and "AllReduceScatter" in caller.attributes)
            ):
                kind = "reduce-scatter"
                sliced = False
            op_name, file, line = self.sources.of(instruction.attributes)
            if not op_name and caller:
                op_name, file, line = self.sources.of(caller.attributes)
            windowed = kind == "collective-permute" and op_name.endswith(
                ("dot_general", "conv_general_dilated")
            )
            yield CollectiveFound(
                kind,
                size,
                groups,
                1,
                op_name,
                file,
                line,
                True,
                sliced,
                windowed,
            )

    def _sliced(
        self,
        computation: str,
        name: str,
        outer: tuple[tuple[str, str], ...] = (),
    ) -> bool:
        """Whether every use of a value takes a dynamic slice of it; `outer` are the
        fusions that it stands in.
        """
        here = self.computations[computation]
        if name == here.root:
            return bool(outer) and self._sliced(*outer[-1], outer[:-1])
        users = list(here.users(name))
        for user in users:
            if user.opcode == "dynamic-slice" and user.operands[0] == name:
                continue
            if user.opcode in PASSING and self._sliced(computation, user.name, outer):
                continue
            inner = (
                self.computations[user.called()[0][1]]
                if user.opcode == "fusion"
                else None
            )
            if inner is None or not all(
                self._sliced(
                    inner.name,
                    inner.parameters[i],
                    (*outer, (computation, user.name)),
                )
                for i, operand in enumerate(user.operands)
                if operand == name
            ):
                return False
        return bool(users)


def _sum(
    left: Any,
    right: Any,
    sign: int,
) -> Any:
    if isinstance(left, int) and isinstance(right, tuple) and sign > 0:
        left, right = right, left
    if not isinstance(right, int):
        return None
    if isinstance(left, tuple):
        return left[0], left[1] + sign * right
    return left + sign * right if isinstance(left, int) else None


def _convolution(
    instruction: Instruction,
    left: Leaf,
    right: Leaf,
    out: Leaf,
) -> int:
    """Flops of a convolution; taps on padding or in the holes of a dilated input cost
    nothing.

    XLA for TPU writes dots as convolutions, batch dims as strided windows most of whose
    taps are such.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.name
    window = dict(
        part.split("=") for part in instruction.get("window").split() if "=" in part
    )
    total = (
        2
        * left.dims[labels[1].index("b")]
        * out.dims[labels[3].index("f")]
        * right.dims[labels[2].index("i")]
    )
    for d in range(len(labels[1]) - 2):

        def of(
            key: str,
            default: str,
            d: int = d,
        ) -> str:
            return window[key].split("x")[d] if key in window else default

        low = int(of("pad", "0_0").split("_")[0])
        total *= taps(
            left.dims[labels[1].index(str(d))],
            right.dims[labels[2].index(str(d))],
            out.dims[labels[3].index(str(d))],
            int(of("stride", "1")),
            low,
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    return total // max(1, sum(instruction.numbers("batch_group_count")))
