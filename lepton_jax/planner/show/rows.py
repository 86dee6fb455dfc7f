"""The plan as rows of plain data, which text and HTML both show.

Nothing here knows how a plan looks: a row says what a line is about, and the functions
say in words or numbers what a line tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.plans import ArrayPlan, Collective, Entries, Plan, axes_of
from lepton_jax.planner.program.named import starred
from lepton_jax.planner.show.words import joined_mesh

# dtypes of inputs that may be tokens; bytes are pixels
TOKEN_DTYPES = ("int32", "int64", "uint32", "uint16")


@dataclass(frozen=True)
class Row:
    """Arrays that repeated layers share: one line.

    Attributes:
      path: with `*` for the layers' numbers if there are several.
      array: the first of them.
      count: number of arrays.
      bytes: of all of them on one device.
    """

    path: str
    array: ArrayPlan
    count: int
    bytes: int

    @property
    def elements(self) -> int:
        """Numbers in all of them together, unsplit."""
        return math.prod(self.array.shape) * self.count


def rows(plan: Plan) -> list[Row]:
    """Return one row per tied parameter and array of a batch, in the model's order."""
    tied: dict[tuple, list[ArrayPlan]] = {}
    for array in (*plan.arrays, *plan.batch):
        if array.kind in ("params", "inputs", "targets"):
            pattern = starred(array.path)
            key = (pattern, array.shape, array.dtype, array.spec, array.use)
            tied.setdefault(key, []).append(array)

    result = []
    for (pattern, *_), arrays in tied.items():
        path = pattern if len(arrays) > 1 else arrays[0].path
        held = sum(bytes_on_device(array, plan) for array in arrays)
        row = Row(path.removeprefix("params/"), arrays[0], len(arrays), held)
        result.append(row)
    return result


def numbered_reasons(plan_rows: Sequence[Row]) -> dict[str, str]:
    """Return each reason with the number by which a table refers to it."""
    reasons = dict.fromkeys(row.array.reason for row in plan_rows)
    return {reason: str(number) for number, reason in enumerate(reasons, 1)}


def other_state(plan: Plan) -> list[str]:
    """Return a phrase for each kind of state that is no parameter."""
    kinds: dict[str, list[ArrayPlan]] = {}
    for array in plan.arrays:
        if array.kind != "params":
            kinds.setdefault(array.kind, []).append(array)

    phrases = []
    for kind, arrays in kinds.items():
        held = size(sum(bytes_on_device(array, plan) for array in arrays))
        phrases.append(f"{kind}{_counted(arrays, plan)}, {held} a device")
    return phrases


def _counted(
    arrays: Sequence[ArrayPlan],
    plan: Plan,
) -> str:
    if len(arrays) == 1:
        return ""
    split = sum(ways(array.spec, plan) > 1 for array in arrays)
    in_parts = f" ({split:,} in parts)" if split else ""
    return f" {len(arrays):,} arrays{in_parts}"


def bytes_on_device(array: ArrayPlan, plan: Plan) -> int:
    """Return the bytes of an array that one device holds."""
    return -(-array.bytes // ways(array.spec, plan))


def ways(entries: Entries, plan: Plan) -> int:
    """Return the number of parts that an array is split into."""
    axes = [name for entry in entries for name in axes_of(entry)]
    return math.prod(plan.mesh.get(name, 1) for name in axes)


def spelled(entries: Entries) -> str:
    """Return a PartitionSpec without its quotes: P(None, data+fsdp)."""
    dims = ["+".join(axes_of(entry)) or "None" for entry in entries]
    return f"P({', '.join(dims)})"


def handled(array: ArrayPlan) -> str:
    """Return what happens to an array before it is computed with."""
    used = {name for entry in array.use for name in axes_of(entry)}
    stored = [name for entry in array.spec for name in axes_of(entry)]
    gathered = [name for name in stored if name not in used]
    if gathered:
        return f"gathered: {'+'.join(gathered)}"
    return "in parts" if array.spec else "copied"


def units(plan: Plan) -> tuple[int, str]:
    """Return what a step consumes: (count, "tokens" or "samples").

    Whole numbers in a row are tokens. Bytes are pixels, and columns have names.
    """
    for array in plan.batch:
        is_row = array.path == "inputs" and len(array.shape) == 2
        if is_row and array.dtype in TOKEN_DTYPES:
            return math.prod(array.shape), "tokens"
    return plan.batch_size, "samples"


def meshed(plan: Plan) -> str:
    """Return the plan's mesh: fsdp=4 x tensor=2."""
    return joined_mesh(plan.mesh)


def longest_first(plan: Plan) -> list[Collective]:
    """Return the communication of a step, the longest first."""
    return sorted(plan.collectives, key=lambda collective: -collective.seconds)


def split_over(
    axes: Sequence[str],
    plan: Plan,
    between: str,
) -> str:
    """Return mesh axes with their sizes: fsdp (4) and tensor (2)."""
    return between.join(f"{name} ({plan.mesh.get(name, 1)})" for name in axes)
