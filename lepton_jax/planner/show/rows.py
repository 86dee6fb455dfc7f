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
            layout = (array.spec, array.use)
            key = (pattern, array.shape, array.dtype, layout)
            tied.setdefault(key, []).append(array)
    return [_row(arrays, plan) for arrays in tied.values()]


def _row(arrays: Sequence[ArrayPlan], plan: Plan) -> Row:
    """Return the row of arrays that repeated layers share."""
    first = arrays[0]
    path = starred(first.path) if len(arrays) > 1 else first.path
    return Row(
        path=path.removeprefix("params/"),
        array=first,
        count=len(arrays),
        bytes=sum(bytes_on_device(array, plan) for array in arrays),
    )


def numbered_reasons(plan_rows: Sequence[Row]) -> dict[str, str]:
    """Return each reason with the number by which a table refers to it."""
    numbers: dict[str, str] = {}
    for row in plan_rows:
        following = str(len(numbers) + 1)
        numbers.setdefault(row.array.reason, following)
    return numbers


def other_state(plan: Plan) -> list[str]:
    """Return a phrase for each kind of state that is no parameter."""
    kinds: dict[str, list[ArrayPlan]] = {}
    for array in plan.arrays:
        if array.kind != "params":
            kinds.setdefault(array.kind, []).append(array)

    phrases = []
    for kind, arrays in kinds.items():
        held = sum(bytes_on_device(array, plan) for array in arrays)
        count = _counted(arrays, plan)
        phrases.append(f"{kind}{count}, {size(held)} a device")
    return phrases


def _counted(
    arrays: Sequence[ArrayPlan],
    plan: Plan,
) -> str:
    if len(arrays) == 1:
        return ""
    parts = [ways(array.spec, plan) for array in arrays]
    split = sum(count > 1 for count in parts)
    in_parts = f" ({split:,} in parts)" if split else ""
    return f" {len(arrays):,} arrays{in_parts}"


def bytes_on_device(array: ArrayPlan, plan: Plan) -> int:
    """Return the bytes of an array that one device holds."""
    parts = ways(array.spec, plan)
    return -(-array.bytes // parts)


def ways(entries: Entries, plan: Plan) -> int:
    """Return the number of parts that an array is split into."""
    sizes = [plan.mesh.get(name, 1) for name in axes_in(entries)]
    return math.prod(sizes)


def axes_in(entries: Entries) -> list[str]:
    """Return the mesh axes that split an array."""
    return [name for entry in entries for name in axes_of(entry)]


def spelled(entries: Entries) -> str:
    """Return a PartitionSpec without its quotes: P(None, data+fsdp)."""
    dims = ["+".join(axes_of(entry)) for entry in entries]
    words = [dim or "None" for dim in dims]
    return f"P({', '.join(words)})"


def handled(array: ArrayPlan) -> str:
    """Return what happens to an array before it is computed with."""
    used = axes_in(array.use)
    stored = axes_in(array.spec)
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
    return joined_mesh(plan.mesh) or "one device"


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


def memory_verdict(plan: Plan) -> str:
    """Return the bounds of the peak and whether it fits: ", 58.0 to 68.2 GiB"."""
    words = ""
    if plan.peak_bound:
        words = f", {size(plan.peak_least)} to {size(plan.peak_bound)}"
    if plan.peak_source:
        words += f" by {plan.peak_source}"
    verdict = {"may not": ": may not fit", "no": ": does not fit"}
    return words + (verdict.get(plan.fits, "") if plan.peak_bound else "")
