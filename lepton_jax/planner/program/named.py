"""Groups of named axes: what a search assigns mesh axes to.

A network of many layers has as many named axes for its hidden units as it has layers,
and all of them are best split alike. So the axes of repeated layers, whose paths differ
in a number only, are tied to one group:

    params/layers/0/kernel (4, 16): dims are the axes a and b
    params/layers/1/kernel (4, 16): dims are the axes a and c

Both dims 1 have the pattern `params/layers/*/kernel`, so b and c are one group, called
`layers/*.1`. Axes stay apart where tying them would make two dims of one array the
same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.kernels import KERNELS, LENGTH
from lepton_jax.planner.program.layout import Spec
from lepton_jax.planner.program.staged import layers_of_stages, samples_of_parts

# Bytes: a smaller array is kept whole on each device. Assumption: gathering it would
# cost more than it frees.
SMALL = 2**16

# Bytes of an element of the state, for sizes that are compared with each other.
ITEMSIZE = 4

# Assignments whose storage is remembered. Assumption: a search looks at fewer.
MOST_STORED = 4096

Place = tuple[int, int]  # (number of an input, dim)


@dataclass(frozen=True)
class Group:
    """Named axes that are assigned alike: one, or one of each of the repeated layers.

    Attributes:
      name: after the first parameter (or input) that has it.
      roots: the roots of the axes in the graph's union-find.
      size: the largest extent.
      divisor: the number of devices along it must divide this: the greatest common
        divisor of the extents.
      members: (parameter's or input's index in the graph's inputs, dim) pairs.
      weight: bytes of the arrays in `members`.
    """

    name: str
    roots: tuple[int, ...]
    size: int
    divisor: int
    members: tuple[Place, ...]
    weight: float


class Dim(NamedTuple):
    """A dim of an input.

    Attributes:
      extent: its extent in the program.
      group: its group.
      stepped: whether a loop steps along it.
      whole: its extent in the state, which is larger for an embedding that is updated
        by rows.
    """

    extent: int
    group: int | None
    stepped: bool
    whole: int

    def divides(self, count: int) -> bool:
        """Whether as many devices can have equal parts."""
        return self.extent % count == 0 and self.whole % count == 0


class Names:
    """The groups of a graph.

    Args:
      graph: with parameters first among its inputs.
      paths: of its inputs (see `argument_paths`).
      pinned: path of a parameter to the spec with which it is kept, whatever else is
        decided.

    Attributes:
      groups: by weight, heaviest first.
      of: root to its group's number.
      batch: number of the batch's group; None: there is no batch.
      rows: numbers of the groups by which embeddings are looked up.
      stages: numbers of the groups that are the stages of a pipeline.
      samples: numbers of the groups of samples: the batch, and the samples of a
        pipeline's micro-batch.
      lengths: numbers of the groups that are the sequence of a kernel of attention.
      batched: indices of the values that hold samples.
      patterns: for each input, its path with layer numbers starred.
    """

    def __init__(
        self,
        graph: Graph,
        paths: list[str],
        pinned: Mapping[str, Spec] | None = None,
    ):
        """Find the groups."""
        self.graph = graph
        self.paths = paths
        self.pinned = pinned or {}
        self.patterns = [starred(path) for path in paths]

        samples = _mark_loops_over_samples(graph, paths)
        roots = self._roots()
        groups = self._distinctly_named(self._find_groups(roots, samples))
        self.groups = sorted(groups, key=lambda group: -group.weight)
        self.of = {}
        for number, group in enumerate(self.groups):
            self.of.update(dict.fromkeys(group.roots, number))

        self.batch = self._batch_group(roots)
        self.rows = self._row_groups()
        layers = layers_of_stages(graph)
        self.stages = {self.of[root] for root in layers if root in self.of}
        self.samples = self._sample_groups()
        self.lengths = self._length_groups()
        self.batched = self._values_with_samples()
        self._dims = self._dims_of_inputs()
        self._stored: dict[tuple, list[Spec]] = {}

    # ---- finding the groups ----

    def _roots(self) -> dict[Place, int]:
        """Return the root of each dim of the parameters, the inputs and the targets."""
        roots = {}
        for index, path in enumerate(self.paths):
            if path.startswith(("params", "inputs", "targets")):
                nodes = self.graph.main.inputs[index].nodes
                for dim, node in enumerate(nodes):
                    roots[index, dim] = self.graph.find(node)
        return roots

    def _find_groups(
        self,
        roots: dict[Place, int],
        samples: set[int],
    ) -> list[Group]:
        """Collect the places of each group, those left out along which loops step."""
        graph = self.graph
        loops = {graph.find(node) for node in graph.loops} - samples
        tied = self._tie(roots)
        members: dict[int, list[Place]] = {}
        for place, root in roots.items():
            index, dim = place
            if root not in loops and graph.main.inputs[index].shape[dim] > 1:
                members.setdefault(tied[root], []).append(place)

        groups = []
        extents = self._extents()
        for places in members.values():
            groups.append(self._group(places, roots, extents))
        known = {root for group in groups for root in group.roots}
        parts = samples_of_parts(graph)
        if parts is not None and parts.part not in known:
            groups.append(_group_of_parts(parts.part, extents[parts.part]))
        return groups

    def _extents(self) -> dict[int, list[int]]:
        """Return the extents that each named axis has, and its numbers of pieces."""
        find = self.graph.find
        extents: dict[int, list[int]] = {}
        for value in self.graph.values:
            pairs = zip(value.nodes, value.shape, strict=True)
            for node, extent in pairs:
                extents.setdefault(find(node), []).append(extent)
        for node, pieces in self.graph.pieces.items():
            extents[find(node)].append(pieces)
        for index, size in self.graph.whole.items():
            node = self.graph.main.inputs[index].nodes[0]
            extents[find(node)].append(size)
        return extents

    def _group(
        self,
        places: list[Place],
        roots: dict[Place, int],
        extents: dict[int, list[int]],
    ) -> Group:
        inputs = self.graph.main.inputs
        own_roots = tuple(dict.fromkeys(roots[place] for place in places))
        divisor = 0
        for root in own_roots:
            divisor = math.gcd(divisor, *extents[root])
        elements = sum(math.prod(inputs[index].shape) for index, _ in places)
        return Group(
            name=self._name(places, self.patterns),
            roots=own_roots,
            size=max(inputs[index].shape[dim] for index, dim in places),
            divisor=divisor,
            members=tuple(places),
            weight=float(elements * ITEMSIZE),
        )

    def _tie(
        self,
        roots: dict[Place, int],
    ) -> dict[int, int]:
        """Map each root to the representative of the axes that it is tied to.

        Places are tied where pattern, dim and shape are the same, but not where that
        would make two dims of one array the same.
        """
        parent = {root: root for root in roots.values()}
        distinct = _roots_of_arrays(roots)
        for places in self._alike(roots):
            before = dict(parent)
            first = roots[places[0]]
            for place in places[1:]:
                own = _representative(parent, roots[place])
                parent[own] = _representative(parent, first)
            if parent != before and _any_merged(parent, distinct):
                parent = before
        return {root: _representative(parent, root) for root in parent}

    def _alike(
        self,
        roots: dict[Place, int],
    ) -> list[list[Place]]:
        """List the places that have pattern, dim and shape in common."""
        alike: dict[tuple, list[Place]] = {}
        for index, dim in roots:
            shape = self.graph.main.inputs[index].shape
            key = (self.patterns[index], dim, shape)
            alike.setdefault(key, []).append((index, dim))
        return list(alike.values())

    # ---- names ----

    def _distinctly_named(
        self,
        groups: list[Group],
    ) -> list[Group]:
        """Name groups with one name after the full path of their first member."""
        counts = Counter(group.name for group in groups)
        named = []
        for group in groups:
            if counts[group.name] > 1:
                name = self._name(list(group.members[:1]), self.paths)
                group = replace(group, name=name)
            named.append(group)
        return named

    def _name(
        self,
        places: list[Place],
        paths: list[str],
    ) -> str:
        """Return the name of the group at some places.

        "batch" and "inputs.1" for dims of a batch, else the shortest parameter path,
        and the dim.
        """
        in_params = []
        for index, dim in places:
            path = paths[index]
            if path.startswith("params"):
                rank = (path.count("/"), len(path))
                in_params.append((*rank, path, dim))
            elif dim == 0:
                return "batch"
        if not in_params:
            index, dim = places[0]
            return f"{self.paths[index]}.{dim}"

        *_, path, dim = min(in_params)
        path = path.removeprefix("params/")
        path = path.removesuffix("/kernel").removesuffix("/embedding")
        return f"{path}.{dim}"

    # ---- what the groups are ----

    def _batch_group(
        self,
        roots: dict[Place, int],
    ) -> int | None:
        """Return the number of the first group that is the leading dim of a batch."""
        for index, path in enumerate(self.paths):
            if path.startswith(("inputs", "targets")):
                root = roots.get((index, 0))
                if root in self.of:
                    return self.of[root]
        return None

    def _row_groups(self) -> set[int]:
        """Return the groups by which a parameter is looked up, the batch left out."""
        rows = set()
        for op in self.graph.operations():
            table = op.inputs[0] if op.name == "gather" else None
            if table is None or table.stored is None:
                continue
            for dim in op.params["dimension_numbers"].collapsed_slice_dims:
                root = self.graph.find(table.nodes[dim])
                if root in self.of:
                    rows.add(self.of[root])
        return rows - {self.batch}

    def _sample_groups(self) -> frozenset[int]:
        samples = samples_of_parts(self.graph)
        groups = {self.batch} - {None}
        if samples is not None and samples.part in self.of:
            groups.add(self.of[samples.part])
        return frozenset(groups)  # type: ignore[arg-type]

    def _values_with_samples(self) -> frozenset[int]:
        if self.batch is None:
            return frozenset()
        find = self.graph.find
        batch = {root for k in self.samples for root in self.groups[k].roots}
        return frozenset(
            value.index
            for value in self.graph.values
            if value.stored is None and any(find(node) in batch for node in value.nodes)
        )

    def _dims_of_inputs(self) -> list[tuple[Dim, ...]]:
        graph = self.graph
        inputs = []
        for number, value in enumerate(graph.main.inputs):
            dims = []
            state = list(value.shape)
            state[:1] = [graph.whole.get(number, extent) for extent in state[:1]]
            triples = zip(value.shape, value.nodes, state, strict=True)
            for extent, node, whole in triples:
                group = self.of.get(graph.find(node))
                dims.append(Dim(extent, group, node in graph.loops, whole))
            inputs.append(tuple(dims))
        return inputs

    def _length_groups(self) -> set[int]:
        """Return the groups that are the sequence of a kernel of attention."""
        groups = set()
        for op in self.graph.operations():
            if op.name in KERNELS and op.inputs[0] is not None:
                root = self.graph.find(op.inputs[0].nodes[LENGTH])
                if root in self.of:
                    groups.add(self.of[root])
        return groups

    # ---- specs under an assignment ----

    def uses(
        self,
        masks: list[int],
    ) -> dict[int, int]:
        """Return the mask of each root, from a mask for each group."""
        uses = {}
        pairs = zip(self.groups, masks, strict=True)
        for group, mask in pairs:
            if mask:
                uses.update(dict.fromkeys(group.roots, mask))
        return uses

    def storage(
        self,
        masks: Sequence[int],
        keep: int,
        counts: Sequence[int],
    ) -> list[Spec]:
        """Return the spec with which each parameter is kept.

        It is kept as it is used, and in parts over the axes of `keep` in addition where
        that is worthwhile (see `store`).

        Args:
          masks: the mesh axes of each group.
          keep: mesh axes over which the state is split.
          counts: the number of devices along each mask of mesh axes.
        """
        key = (tuple(masks), keep, tuple(counts))
        if key not in self._stored:
            if len(self._stored) > MOST_STORED:
                self._stored.clear()
            self._stored[key] = self._storage(masks, keep, counts)
        return self._stored[key]

    def _storage(
        self,
        masks: Sequence[int],
        keep: int,
        counts: Sequence[int],
    ) -> list[Spec]:
        by_dims: dict[tuple[Dim, ...], Spec] = {}
        specs = []
        for index, path in enumerate(self.paths):
            if not path.startswith("params"):
                continue
            dims = self._dims[index]
            if path in self.pinned:
                by_dims[dims] = self.pinned[path]
            elif dims not in by_dims:
                use = self.use(index, masks, counts)
                by_dims[dims] = self.store(index, use, keep, counts)
            specs.append(by_dims[dims])
        return specs

    def use(
        self,
        index: int,
        masks: Sequence[int],
        counts: Sequence[int],
    ) -> Spec:
        """Return the spec with which an input is used.

        The first dim that could take a mesh axis takes it.
        """
        taken = 0
        spec = []
        for dim in self._dims[index]:
            mask = 0 if dim.group is None else masks[dim.group] & ~taken
            if mask and not dim.divides(counts[mask]):
                mask = 0
            taken |= mask
            spec.append(mask)
        return tuple(spec)

    def store(
        self,
        index: int,
        use: Spec,
        keep: int,
        counts: Sequence[int],
    ) -> Spec:
        """Return `use` with the rest of the axes of `keep` on the largest dim left.

        An array stays as it is used where that dim does not divide, where it is small,
        and where rows are looked up where they lie, so that none are gathered.
        """
        dims = self._dims[index]
        taken = 0
        pairs = zip(use, dims, strict=True)
        for mask, dim in pairs:
            taken |= mask
            if mask and dim.group in self.rows:
                return use

        rest = keep & ~taken
        if not rest or self.is_small(index):
            return use

        best = None
        most = (False, 0)
        for number, dim in enumerate(dims):
            mask = use[number]
            if dim.stepped or not dim.divides(counts[mask] * counts[rest]):
                continue
            rank = (mask == 0, dim.whole // counts[mask])
            if best is None or rank > most:
                best = number
                most = rank
        if best is None:
            return use
        spec = list(use)
        spec[best] |= rest
        return tuple(spec)

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the shape of an input; of an embedding, all of its rows."""
        return tuple(dim.whole for dim in self._dims[index])

    def is_small(self, index: int) -> bool:
        """Whether an input, or what a loop takes of it, is not worth splitting."""
        elements = 1
        for dim in self._dims[index]:
            if not dim.stepped:
                elements *= dim.whole
        return elements * ITEMSIZE < SMALL


def _group_of_parts(root: int, extents: Sequence[int]) -> Group:
    """Return the group of the samples of a pipeline's micro-batch."""
    return Group(
        name="batch of a stage",
        roots=(root,),
        size=max(extents),
        divisor=math.gcd(*extents),
        members=(),
        weight=0.0,
    )


def starred(path: str) -> str:
    """Return a path with its numbers as stars, as repeated layers have it in common."""
    return re.sub(r"\d+", "*", path)


# ---- internals ----


def _mark_loops_over_samples(
    graph: Graph,
    paths: list[str],
) -> set[int]:
    """Return the roots of the batch dims; mark loops along them as needing the whole.

    A loop over samples, as `jax.lax.map` makes, is run by each device for all of them.
    The rest of the model need not be: what the loop takes is gathered before it.
    """
    samples = set()
    # the paths end before the knobs
    pairs = zip(paths, graph.main.inputs, strict=False)
    for path, value in pairs:
        if path.startswith(("inputs", "targets")) and value.nodes:
            samples.add(graph.find(value.nodes[0]))

    for operation, index in graph.stepping:
        stacked = operation.inputs[index]
        if stacked is None or graph.find(stacked.nodes[0]) not in samples:
            continue
        # a graph may be named twice
        if (index, 0) not in operation.whole:
            operation.whole.append((index, 0))
    return samples


def _representative(
    parent: dict[int, int],
    root: int,
) -> int:
    while parent[root] != root:
        root = parent[root]
    return root


def _roots_of_arrays(
    roots: dict[Place, int],
) -> list[set[int]]:
    """List the roots of each array that has several."""
    arrays: dict[int, set[int]] = {}
    for (index, _), root in roots.items():
        arrays.setdefault(index, set()).add(root)
    return [own for own in arrays.values() if len(own) > 1]


def _any_merged(
    parent: dict[int, int],
    distinct: list[set[int]],
) -> bool:
    """Whether roots that one array has are represented by the same one."""
    for roots in distinct:
        merged = {_representative(parent, root) for root in roots}
        if len(merged) < len(roots):
            return True
    return False
