"""The plan of each array under an assignment of mesh axes, and its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from lepton_jax.planner.plans import ArrayPlan, entries
from lepton_jax.planner.program.graph import Operation
from lepton_jax.planner.program.layout import Spec, device_counts
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.ruled import expert_nodes
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import by_path, nbytes

# the words for what the axes of a mesh do, in a plan's name
STRATEGIES = {
    "data": "data parallel",
    "fsdp": "FSDP",
    "tensor": "tensor parallel",
    "stage": "pipeline",
    "expert": "expert parallel",
    "sequence": "sequence parallel",
    "idle": "idle",
}

UNSPLIT = "small; a copy on each device"


@dataclass(frozen=True)
class Assignment:
    """The outcome of a search.

    Attributes:
      sizes: of the mesh axes, outermost first; axis i is bit 1 << i.
      masks: for each group of `Names`, the mesh axes that split it.
      keep: mesh axes over which the state is split in addition (ZeRO-3, FSDP).
      remat, micro_batches: as in Plan.
      ring: whether attention over a split sequence goes around a ring, also where heads
        can be exchanged.
    """

    sizes: tuple[int, ...]
    masks: tuple[int, ...]
    keep: int
    remat: str = "none"
    micro_batches: int = 1
    ring: bool = False

    @property
    def counts(self) -> list[int]:
        """The number of devices along each mask of mesh axes."""
        return device_counts(self.sizes)


# ---- names ----


def axis_names(
    assignment: Assignment,
    names: Names,
) -> tuple[str, ...]:
    """Name each mesh axis by what it splits, in the field's words."""
    experts = expert_groups(names)
    axes: list[str] = []
    counts: dict[str, int] = {}
    for axis in range(len(assignment.sizes)):
        word = _axis_word(assignment, names, experts, axis)
        counts[word] = counts.get(word, 0) + 1
        axes.append(word if counts[word] == 1 else f"{word}{counts[word]}")
    return tuple(axes)


def _axis_word(
    assignment: Assignment,
    names: Names,
    experts: set[int],
    axis: int,
) -> str:
    split = {k for k, mask in enumerate(assignment.masks) if mask >> axis & 1}
    others = split - {names.batch}
    splits_state = assignment.keep >> axis & 1
    if names.stages & others:
        return "stage"
    if experts & others:
        return "expert"
    if names.batch in split:
        return "fsdp" if splits_state else "data"
    if not all(_has_parameters(names, k) for k in others):
        return "sequence"
    if others:
        return "tensor"
    return "fsdp" if splits_state else "idle"


def _has_parameters(names: Names, group: int) -> bool:
    members = names.groups[group].members
    paths = [names.paths[index] for index, _ in members]
    return any(path.startswith("params") for path in paths)


def expert_groups(names: Names) -> set[int]:
    """Find the groups along which parameters meet samples as a dot's batch dim.

    They are the experts of a mixture. So are dims that a user's rule calls "experts".
    """
    find = names.graph.find
    groups = set()
    for op in names.graph.operations():
        for node in (*_stored_batch_nodes(op), *expert_nodes(op)):
            root = find(node)
            if root in names.of:
                groups.add(names.of[root])
    return groups - {names.batch} - names.stages


def _stored_batch_nodes(op: Operation) -> list[int]:
    """List the nodes of a dot's batch dims in those of its operands that are stored."""
    if op.name != "dot_general" or None in op.inputs[:2]:
        return []
    nodes = []
    _, batched = op.params["dimension_numbers"]
    pairs = zip(
        op.inputs[:2],
        batched,
        strict=True,
    )
    for value, dims in pairs:
        if value is not None and value.stored is not None:
            nodes += [value.nodes[dim] for dim in dims]
    return nodes


def strategy(
    assignment: Assignment,
    axes: tuple[str, ...],
    names: Names,
) -> str:
    """Return a plan's name in the field's words, such as "FSDP x tensor parallel"."""
    parts: list[str] = []
    pairs = zip(axes, assignment.sizes, strict=True)
    for axis, size in pairs:
        part = STRATEGIES[axis.rstrip("0123456789")]
        if size > 1 and part not in parts:
            parts.append(part)
    if _shards_rows(assignment, names):
        parts.append("row-sharded embeddings")
    return " x ".join(parts) or "one device"


def _shards_rows(assignment: Assignment, names: Names) -> bool:
    """Whether the rows of an embedding are split over the devices of the batch."""
    batch = 0 if names.batch is None else assignment.masks[names.batch]
    pairs = zip(names.groups, assignment.masks, strict=False)
    for group, mask in pairs:
        rows = any(
            names.paths[index].endswith("embedding") and dim == 0
            for index, dim in group.members
        )
        if rows and mask & batch:
            return True
    return False


# ---- arrays ----


def arrays(
    trace: Trace,
    names: Names,
    assignment: Assignment,
    axes: tuple[str, ...],
) -> tuple[ArrayPlan, ...]:
    """Plan each array of the state.

    State of the optimizer and of the controller lies as the parameter that it belongs
    to.

    Args:
      trace: the program.
      names: its groups.
      assignment: the mesh axes of each group.
      axes: names of the mesh axes.
    """
    leaves = by_path(trace.state)
    params = _parameters(leaves, names, assignment)
    stored = {
        path.removeprefix("params/"): (parameter.spec, parameter.shape)
        for path, parameter in params.items()
    }
    plans = []
    for path, leaf in leaves.items():
        kind = path.partition("/")[0]
        shape = tuple(leaf.shape)
        spec: Spec = (0,) * len(shape)
        use = spec
        reason = UNSPLIT
        if kind == "params":
            parameter = params[path]
            spec = parameter.spec
            use = parameter.use
            reason = _why(parameter, assignment, axes, names)
        elif kind in ("optimizer", "controller"):
            spec, reason = _follow(path, shape, stored)
            use = spec
        plans.append(
            ArrayPlan(
                path,
                kind,
                shape,
                dtype_name(leaf),
                nbytes(leaf),
                entries(spec, axes),
                entries(use, axes),
                reason,
            )
        )
    return tuple(plans)


@dataclass(frozen=True)
class _Parameter:
    """A parameter: its number among the inputs, and how it is kept and used."""

    index: int
    shape: tuple[int, ...]
    spec: Spec
    use: Spec


def _parameters(
    leaves: dict[str, Any],
    names: Names,
    assignment: Assignment,
) -> dict[str, _Parameter]:
    """Return the parameters by their paths."""
    masks = assignment.masks
    counts = assignment.counts
    specs = iter(names.storage(masks, assignment.keep, counts))
    parameters = {}
    for index, path in enumerate(names.paths):
        if path.startswith("params"):
            shape = tuple(leaves[path].shape)
            use = names.use(index, masks, counts)
            parameters[path] = _Parameter(
                index,
                shape,
                next(specs),
                use,
            )
    return parameters


def dtype_name(leaf: Any) -> str:
    """Return the name of an array's dtype; "key" for a random key."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key"
    return str(leaf.dtype)


def batch_arrays(
    trace: Trace,
    names: Names,
    assignment: Assignment,
    axes: tuple[str, ...],
) -> tuple[ArrayPlan, ...]:
    """Plan the inputs and the targets of a step, with the arguments of `arrays`."""
    if trace.inputs is None:
        return ()
    plans = []
    leaves = by_path({"inputs": trace.inputs, "targets": trace.targets})
    for index, path in enumerate(names.paths):
        if path not in leaves:
            continue
        leaf = leaves[path]
        use = names.use(index, assignment.masks, assignment.counts)
        fed = entries(use[:1], axes)
        if fed:
            reason = "split over the devices that hold different samples"
        else:
            reason = "each device gets all samples"
        plans.append(
            ArrayPlan(
                path,
                path.partition("/")[0],
                tuple(leaf.shape),
                str(leaf.dtype),
                nbytes(leaf),
                fed,
                entries(use, axes),
                reason,
            )
        )
    return tuple(plans)


# ---- state that follows a parameter ----


def _follow(
    path: str,
    shape: tuple[int, ...],
    stored: dict[str, tuple[Spec, tuple[int, ...]]],
) -> tuple[Spec, str]:
    """Return spec and reason of an array as of the parameter that its path ends in.

    Args:
      path: of an array of the optimizer's or the controller's state.
      shape: its shape, which may lack dims of the parameter's.
      stored: spec and shape of each parameter, by its path without "params/".
    """
    _, _, tail = path.partition("/")
    while tail and tail not in stored:
        _, _, tail = tail.partition("/")
    if tail:
        spec, whole = stored[tail]
        if shape == whole:
            return spec, f"lies as {tail}"
        dims = _same_dims(shape, whole)
        if shape and len(dims) == len(shape):
            return tuple(spec[d] for d in dims), f"lies as the same dims of {tail}"
    return (0,) * len(shape), UNSPLIT


def _same_dims(
    shape: tuple[int, ...],
    whole: tuple[int, ...],
) -> list[int]:
    """List the dims of `whole` that have the extents of `shape`, in that order.

    A factored moment has a parameter's dims without one of them: (4, 3) of (4, 8, 3)
    are its dims 0 and 2. The list ends where no dim is left that fits.
    """
    dims: list[int] = []
    start = 0
    for extent in shape:
        if extent not in whole[start:]:
            break
        dim = whole.index(extent, start)
        dims.append(dim)
        start = dim + 1
    return dims


# ---- reasons ----


def _why(
    parameter: _Parameter,
    assignment: Assignment,
    axes: tuple[str, ...],
    names: Names,
) -> str:
    """Explain how a parameter is used and kept."""
    graph = names.graph
    value = graph.main.inputs[parameter.index]
    parts = []
    for dim, mask in enumerate(parameter.use):
        if mask:
            root = graph.find(value.nodes[dim])
            group = names.groups[names.of[root]]
            split = _axis_list(mask, axes)
            parts.append(f"dim {dim} is {group.name}, split over {split}")

    pairs = zip(parameter.spec, parameter.use, strict=True)
    in_addition = [kept & ~used for kept, used in pairs]
    if any(in_addition):
        mask = next(mask for mask in in_addition if mask)
        dim = in_addition.index(mask)
        split = _axis_list(mask, axes)
        parts.append(
            f"kept in parts of dim {dim} over {split}, gathered where it is used"
        )
    elif assignment.keep and names.is_small(parameter.index):
        parts.append("too small to be worth splitting further")
    elif assignment.keep:
        shape = "x".join(map(str, parameter.shape))
        count = assignment.counts[assignment.keep]
        parts.append(f"no dim of {shape} divides by {count} more")

    if not parts:
        return (
            "a copy on each device: what the copies cost in memory is less than what"
            " parts would cost in time"
        )
    return "; ".join(parts)


def _axis_list(
    mask: int,
    axes: tuple[str, ...],
) -> str:
    return " and ".join(name for axis, name in enumerate(axes) if mask >> axis & 1)
