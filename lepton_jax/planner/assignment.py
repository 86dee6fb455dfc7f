"""From an assignment of mesh axes to the plan of each array, and why it lies so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax

from lepton_jax.planner.plans import ArrayPlan, entries
from lepton_jax.planner.program.layout import Spec
from lepton_jax.planner.program.named import SMALL, Names
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import by_path, nbytes


@dataclass(frozen=True)
class Assignment:
    """What a search decides.

    Attributes:
      sizes: of the mesh axes, outermost first; axis i is bit 1 << i.
      masks: for each group of `Names`, the mesh axes that split it.
      keep: mesh axes over which the state is split besides (ZeRO-3, FSDP).
      remat, micro_batches: as in Plan.
    """

    sizes: tuple[int, ...]
    masks: tuple[int, ...]
    keep: int
    remat: str = "none"
    micro_batches: int = 1

    @property
    def counts(self) -> list[int]:
        return [
            math.prod(n for i, n in enumerate(self.sizes) if mask >> i & 1)
            for mask in range(1 << len(self.sizes))
        ]


def axis_names(assignment: Assignment, names: Names) -> tuple[str, ...]:
    """The field's word for each mesh axis, by what it splits."""
    found: list[str] = []
    experts = expert_groups(names)
    for bit in range(len(assignment.sizes)):
        split = [k for k, mask in enumerate(assignment.masks) if mask >> bit & 1]
        others = [k for k in split if k != names.batch]
        inputs = [
            k
            for k in others
            if not any(
                names.paths[i].startswith("params") for i, _ in names.groups[k].members
            )
        ]
        if experts & set(others):
            word = "expert"
        elif names.batch in split:
            word = "fsdp" if assignment.keep >> bit & 1 else "data"
        elif inputs:
            word = "sequence"
        elif others:
            word = "tensor"
        else:
            word = "fsdp" if assignment.keep >> bit & 1 else "idle"
        count = sum(f.rstrip("0123456789") == word for f in found)
        found.append(word if not count else f"{word}{count + 1}")
    return tuple(found)


def expert_groups(names: Names) -> set[int]:
    """Groups along which parameters meet samples as a dot's batch dim: the experts of a
    mixture.
    """
    graph = names.graph
    found = set()
    for op in graph.operations():
        if op.name == "dot_general" and None not in op.inputs[:2]:
            (_, _), (lb, rb) = op.params["dimension_numbers"]
            left, right = op.inputs[:2]
            for value, dims in ((left, lb), (right, rb)):
                if value is not None and value.stored is not None:
                    found |= {
                        names.of[graph.find(value.nodes[d])]
                        for d in dims
                        if graph.find(value.nodes[d]) in names.of
                    }
    return found - {names.batch}


def strategy(
    assignment: Assignment,
    axes: tuple[str, ...],
    names: Names,
) -> str:
    """The plan's name in the field's words."""
    words = {
        "data": "data parallel",
        "fsdp": "FSDP",
        "tensor": "tensor parallel",
        "expert": "expert parallel",
        "sequence": "sequence parallel",
        "idle": "idle",
    }
    parts = list(
        dict.fromkeys(
            words[a.rstrip("0123456789")]
            for a, n in zip(axes, assignment.sizes, strict=True)
            if n > 1
        )
    )
    batch = 0 if names.batch is None else assignment.masks[names.batch]
    for k, mask in enumerate(assignment.masks):
        looked_up = any(
            names.paths[i].endswith("embedding") and d == 0
            for i, d in names.groups[k].members
        )
        if looked_up and mask & batch:
            parts.append("row-sharded embeddings")
            break
    return " x ".join(parts) or "one device"


def arrays(
    trace: Trace,
    names: Names,
    assignment: Assignment,
    axes: tuple[str, ...],
) -> tuple[ArrayPlan, ...]:
    """How each array of the state lies: optimizer state as the parameter that it
    belongs to.
    """
    counts = assignment.counts
    masks = list(assignment.masks)
    params = {p: i for i, p in enumerate(names.paths) if p.startswith("params")}
    stored = dict(
        zip(
            params,
            names.storage(masks, assignment.keep, counts),
            strict=True,
        )
    )
    found = []
    leaves = by_path(trace.state)
    tails = {
        p.removeprefix("params/"): (spec, tuple(leaves[p].shape))
        for p, spec in stored.items()
    }
    for path, leaf in leaves.items():
        dtype = dtype_name(leaf)
        kind = path.partition("/")[0]
        shape = tuple(leaf.shape)
        spec: Spec = (0,) * len(shape)
        use = spec
        reason = "small; a copy on each device"
        if path in params:
            spec = stored[path]
            use = names.use(
                params[path],
                masks,
                counts,
            )
            reason = _why(
                shape,
                spec,
                use,
                assignment,
                axes,
                names,
                params[path],
            )
        elif kind in ("optimizer", "controller"):
            spec, reason = _follow(path, shape, tails)
            use = spec
        found.append(
            ArrayPlan(
                path,
                kind,
                shape,
                dtype,
                nbytes(leaf),
                entries(spec, axes),
                entries(use, axes),
                reason,
            )
        )
    return tuple(found)


def dtype_name(leaf: Any) -> str:
    return (
        "key"
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else str(leaf.dtype)
    )


def batch_arrays(
    trace: Trace,
    names: Names,
    assignment: Assignment,
    axes: tuple[str, ...],
) -> tuple[ArrayPlan, ...]:
    """How inputs and targets lie in the step."""
    found = []
    if trace.inputs is None:
        return ()
    leaves = by_path({"inputs": trace.inputs, "targets": trace.targets})
    for i, path in enumerate(names.paths):
        if path in leaves:
            leaf = leaves[path]
            use = names.use(
                i,
                list(assignment.masks),
                assignment.counts,
            )
            first = entries(use[:1], axes)
            found.append(
                ArrayPlan(
                    path,
                    path.partition("/")[0],
                    tuple(leaf.shape),
                    str(leaf.dtype),
                    nbytes(leaf),
                    first,
                    entries(use, axes),
                    (
                        "split over the devices that hold different samples"
                        if first
                        else "each device gets all samples"
                    ),
                )
            )
    return tuple(found)


def _follow(
    path: str,
    shape: tuple[int, ...],
    stored: dict[str, tuple[Spec, tuple[int, ...]]],
) -> tuple[Spec, str]:
    """State of optimizer and controller lies as the parameter whose path it ends in,
    dim by dim where it has fewer.
    """
    parts = path.split("/")
    tail = next(
        (t for t in ("/".join(parts[i:]) for i in range(1, len(parts))) if t in stored),
        None,
    )
    if tail is not None:
        spec, whole = stored[tail]
        if shape == whole:
            return spec, f"lies as {tail}"
        places = []
        start = 0
        for extent in shape:  # a factored moment has the parameter's dims without one
            place = next(
                (d for d in range(start, len(whole)) if whole[d] == extent), None
            )
            if place is None:
                break
            places.append(place)
            start = place + 1
        if shape and len(places) == len(shape):
            return tuple(spec[d] for d in places), f"lies as the same dims of {tail}"
    return (0,) * len(shape), "small; a copy on each device"


def _why(
    shape: tuple[int, ...],
    spec: Spec,
    use: Spec,
    assignment: Assignment,
    axes: tuple[str, ...],
    names: Names,
    index: int,
) -> str:
    graph = names.graph
    parts = []
    for d, mask in enumerate(use):
        if mask:
            group = names.groups[
                names.of[graph.find(graph.main.inputs[index].nodes[d])]
            ]
            parts.append(f"dim {d} is {group.name}, split over {_words(mask, axes)}")
    more = [
        (d, s & ~u) for d, (s, u) in enumerate(zip(spec, use, strict=True)) if s & ~u
    ]
    if more:
        d, mask = more[0]
        parts.append(
            f"kept in parts of dim {d} over {_words(mask, axes)}, gathered where it is"
            " used"
        )
    elif assignment.keep:
        steps = [node in graph.loops for node in graph.main.inputs[index].nodes]
        small = (
            math.prod(n for n, step in zip(shape, steps, strict=True) if not step) * 4
            < SMALL
        )
        parts.append(
            "too small to be worth splitting further"
            if small
            else (
                f"no dim of {'x'.join(map(str, shape))} divides by"
                f" {assignment.counts[assignment.keep]} more"
            )
        )
    if not parts:
        parts.append(
            "a copy on each device: what the copies cost in memory is less than what"
            " parts would cost in time"
        )
    return "; ".join(parts)


def _words(mask: int, axes: tuple[str, ...]) -> str:
    return " and ".join(n for i, n in enumerate(axes) if mask >> i & 1)
