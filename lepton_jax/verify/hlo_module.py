"""A compiled module: how often its computations run, their FLOPs and collectives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from lepton_jax.hardware import taps
from lepton_jax.verify.collectives import KINDS, CollectiveFound
from lepton_jax.verify.hlo_loops import PASSING, Loops
from lepton_jax.verify.hlo_text import (
    Instruction,
    Leaf,
    Sources,
    groups_of,
    parse,
)

# What libtpu sends from slice to slice: a collective's name, and the slices.
BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}')
PRODUCTS = ("dot_general", "conv_general_dilated")


class Module:
    """A parsed module.

    Attributes:
      computations: by name, callees before callers, as in the text.
      entry: name of the one that a call of the program runs.
      partitions: devices.
      loops: counts the turns of loops.
      callers: an instruction that runs each computation, by the computation's name.
    """

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.sources = Sources(text)
        self.loops = Loops(self.computations)
        first_line = text[: text.find("\n")]
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", first_line)
        self.partitions = math.prod(map(int, counts))
        self._flops: dict[str, int] = {}
        self._chains: set[tuple[str, str, int]] = set()
        self.callers: dict[str, Instruction] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for _, name in instruction.called():
                    self.callers.setdefault(name, instruction)

    def times(self) -> tuple[dict[str, int], dict[str, bool]]:
        """Return the runs of each computation in one call, and whether they are exact.

        Computations that never run are left out.
        """
        times = {self.entry: 1}
        exact = {self.entry: True}
        # Callers come before callees.
        for name in reversed(self.computations):
            if name not in times:
                continue
            for instruction in self.computations[name].instructions.values():
                turns: int | None = 1
                if instruction.opcode == "while":
                    turns = self.loops.turns(name, instruction)
                branches = instruction.opcode == "conditional"
                sure = exact[name] and turns is not None and not branches
                runs = times[name] * (1 if turns is None else turns)
                for _, callee in instruction.called():
                    times[callee] = times.get(callee, 0) + runs
                    exact[callee] = exact.get(callee, True) and sure
        return times, exact

    # ---- FLOPs ----

    def flops(self, name: str) -> int:
        """Return the FLOPs of matmuls and convolutions in one run of a computation."""
        if name not in self._flops:
            instructions = self.computations[name].instructions.values()
            self._flops[name] = sum(self.flops_of(name, i) for i in instructions)
        return self._flops[name]

    def flops_of(
        self,
        name: str,
        instruction: Instruction,
    ) -> int:
        """Return the FLOPs of an instruction and of what it runs."""
        inner = [self.flops(callee) for _, callee in instruction.called()]
        if instruction.opcode == "while":
            turns = self.loops.turns(name, instruction)
            inner = [flops * (1 if turns is None else turns) for flops in inner]
        branches = instruction.opcode == "conditional"
        below = max(inner, default=0) if branches else sum(inner)
        product = product_of(instruction)
        if product is None:
            return below
        return below + self._product_flops(name, instruction, product)

    def _product_flops(
        self, name: str, instruction: Instruction, product: Product
    ) -> int:
        left, right, *_ = (
            self._leaves(name, operand)[0] for operand in instruction.operands
        )
        out = instruction.leaves[0]
        if not product.convolution:
            summed = math.prod(left.dims[d] for d in product.contracted)
            return 2 * out.size * summed
        roles = {
            "convBackwardInput": (out, right, left),
            "convBackwardFilter": (left, out, right),
        }
        values = roles.get(product.call, (left, right, out))
        return _convolution_flops(instruction, *values)

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
        """Yield the collectives of a computation itself, each as one that runs once.

        XLA for TPU runs one next to a chain of fusions, and names it in each of them:
        such a chain is one.

        Args:
          name: the computation.
          times: how often it runs, to tell chains apart.
        """
        for instruction in self.computations[name].instructions.values():
            kind = _kind(instruction)
            if kind not in KINDS:
                continue
            chain = re.search(r'\bchain_id="(\w+)"', instruction.attributes)
            if chain:
                link = (chain[1], instruction.get("channel_id"), times)
                if link in self._chains:
                    continue
                self._chains.add(link)
            yield self._collective(name, instruction, kind)

    def _collective(
        self, name: str, instruction: Instruction, kind: str
    ) -> CollectiveFound:
        groups = groups_of(instruction.attributes, self.partitions)
        slices = _slices(instruction)
        if slices:
            # a module is the program of one slice
            groups = tuple(
                tuple(range(place, slices * self.partitions, self.partitions))
                for place in range(self.partitions)
            )
        size = self._buffer_bytes(name, instruction, kind)
        if kind == "all-gather" and groups:
            size *= len(groups[0])

        caller = self.callers.get(name)
        sliced = kind == "all-reduce" and self._sliced(name, instruction.name)
        scatters = name.startswith("all-reduce-scatter") or (
            caller is not None and "AllReduceScatter" in caller.attributes
        )
        if sliced and scatters:
            kind = "reduce-scatter"
            sliced = False

        op_name, file, line = self.sources.of(instruction.attributes)
        if not op_name and caller:
            op_name, file, line = self.sources.of(caller.attributes)
        permutes = kind == "collective-permute"
        return CollectiveFound(
            kind=kind,
            bytes=size,
            groups=groups,
            times=1,
            op_name=op_name,
            file=file,
            line=line,
            sliced=sliced,
            windowed=permutes and op_name.endswith(PRODUCTS),
            name=instruction.name,
            computation=name,
            channel=instruction.get("channel_id"),
        )

    def _buffer_bytes(
        self,
        name: str,
        instruction: Instruction,
        kind: str,
    ) -> int:
        """Return the bytes of a collective's operands."""
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
            # The others say where to put it.
            leaves = leaves[:1]
        return sum(leaf.bytes for leaf in leaves)

    def _sliced(
        self,
        computation: str,
        name: str,
        outer: tuple[tuple[str, str], ...] = (),
    ) -> bool:
        """Whether every use of a value takes a dynamic slice of it.

        Args:
          computation: the computation in which the value stands.
          name: the value's instruction.
          outer: (computation, instruction) of the fusions around it, outermost first.
        """
        here = self.computations[computation]
        if name == here.root:
            if not outer:
                return False
            caller, fusion = outer[-1]
            return self._sliced(caller, fusion, outer[:-1])
        users = list(here.users(name))
        return bool(users) and all(
            self._takes_slice(computation, user, name, outer) for user in users
        )

    def _takes_slice(
        self,
        computation: str,
        user: Instruction,
        name: str,
        outer: tuple[tuple[str, str], ...],
    ) -> bool:
        if user.opcode == "dynamic-slice" and user.operands[0] == name:
            return True
        if user.opcode in PASSING and self._sliced(computation, user.name, outer):
            return True
        if user.opcode != "fusion":
            return False
        inner = self.computations[user.called()[0][1]]
        around = (*outer, (computation, user.name))
        return all(
            self._sliced(
                inner.name,
                inner.parameters[i],
                around,
            )
            for i, operand in enumerate(user.operands)
            if operand == name
        )


class Product(NamedTuple):
    """A matmul or a convolution.

    Attributes:
      convolution: whether it is a convolution.
      call: the function of the GPU's library that it calls; empty if it calls none.
      contracted: dims of the left operand over which a matmul sums.
    """

    convolution: bool
    call: str
    contracted: list[int]


def product_of(instruction: Instruction) -> Product | None:
    """Return a dot, a convolution or a GPU library's call for one as a product.

    It is None for anything else.
    """
    library = re.search(
        r'custom_call_target="__(cublas|cudnn)\$(\w+)', instruction.attributes
    )
    call = library[2] if library else ""
    if instruction.opcode == "convolution" or call.startswith("conv"):
        return Product(True, call, [])
    if library is None:
        if instruction.opcode not in ("dot", "ragged-dot"):
            return None
        return Product(False, "", instruction.numbers("lhs_contracting_dims"))

    contracted = instruction.numbers("lhs_contracting_dims")
    if library[1] == "cublas":
        dims = re.search(
            r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes
        )
        numbers = re.findall(r"\d+", dims[1]) if dims else []
        contracted = [int(number) for number in numbers]
    return Product(False, call, contracted) if contracted else None


def _slices(instruction: Instruction) -> int:
    """Return the slices among which an instruction sends; 0: it stays in one."""
    target = SLICES.search(instruction.attributes)
    return len(target[1].split(",")) if target else 0


def _kind(instruction: Instruction) -> str:
    pairs = instruction.get("_xla_send_recv_source_target_pairs")
    kind = instruction.opcode.removesuffix("-start")
    between = BETWEEN_SLICES.search(instruction.attributes)
    if kind == "send" and between:
        return between[1].lower().replace("_", "-")
    return "collective-permute" if kind == "send" and pairs else kind


def _convolution_flops(
    instruction: Instruction,
    left: Leaf,
    right: Leaf,
    out: Leaf,
) -> int:
    """Return the FLOPs of a convolution.

    Taps on padding or in the holes of a dilated input cost nothing. XLA for TPU writes
    matmuls as convolutions, batch dims as strided windows most of whose taps are such.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.name
    left_labels, right_labels, out_labels = labels.groups()
    batch = left.dims[left_labels.index("b")]
    features = out.dims[out_labels.index("f")]
    inputs = right.dims[right_labels.index("i")]
    total = 2 * batch * features * inputs

    parts = instruction.get("window").split()
    window = dict(part.split("=") for part in parts if "=" in part)
    for d in range(len(left_labels) - 2):
        padding = _of_dim(window, "pad", d, "0_0")
        low, _, _ = padding.partition("_")
        total *= taps(
            size=left.dims[left_labels.index(str(d))],
            kernel=right.dims[right_labels.index(str(d))],
            out=out.dims[out_labels.index(str(d))],
            stride=int(_of_dim(window, "stride", d, "1")),
            low=int(low),
            holes=int(_of_dim(window, "lhs_dilate", d, "1")),
            apart=int(_of_dim(window, "rhs_dilate", d, "1")),
        )
    return total // max(1, sum(instruction.numbers("batch_group_count")))


def _of_dim(
    window: dict[str, str],
    key: str,
    dim: int,
    default: str,
) -> str:
    """Return a dim's part of a window's attribute, such as the "2" of stride=1x2."""
    return window[key].split("x")[dim] if key in window else default
