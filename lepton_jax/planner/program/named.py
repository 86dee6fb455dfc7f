"""The named axes of a graph, repeated layers tied to each other: what a search assigns
mesh axes to.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.layout import Spec

# bytes: an array below is kept whole on each device; gathering it would cost more than
# it frees
SMALL = 2**16
MOST_STORED = 4096  # assignments whose storage is remembered


@dataclass(frozen=True)
class Group:
    """Named axes that are assigned alike: one, or one of each of the repeated layers.

    Attributes:
      name: after the first parameter (or input) that has it.
      roots: of the union-find.
      size: the largest extent.
      divisor: what the number of devices along it must divide: the greatest common
        divisor of the extents.
      members: (parameter's or input's index in the graph's inputs, dim) pairs.
      weight: bytes of the arrays in `members`.
    """

    name: str
    roots: tuple[int, ...]
    size: int
    divisor: int
    members: tuple[tuple[int, int], ...]
    weight: float


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
      batched: indices of the values that hold samples.
      patterns: for each input, its path with layer numbers starred.
    """

    def __init__(
        self,
        graph: Graph,
        paths: list[str],
        pinned: Mapping[str, Spec] | None = None,
    ):
        self.graph = graph
        self.paths = paths
        self.pinned = pinned or {}
        self.patterns = [starred(path) for path in paths]
        values = graph.main.inputs
        find = graph.find
        loops = {find(n) for n in graph.loops} - _samples(graph, paths)
        sizes: dict[int, list[int]] = {}
        for value in graph.values:
            for node, extent in zip(value.nodes, value.shape, strict=True):
                sizes.setdefault(find(node), []).append(extent)
        for node, pieces in graph.pieces.items():
            sizes[find(node)].append(pieces)
        anchored = [
            (i, d)
            for i, path in enumerate(paths)
            if path.startswith(("params", "inputs", "targets"))
            for d in range(len(values[i].shape))
        ]
        root = {(i, d): find(values[i].nodes[d]) for i, d in anchored}
        tied = self._tie(root)
        members: dict[int, list[tuple[int, int]]] = {}
        for place in anchored:
            if root[place] not in loops and values[place[0]].shape[place[1]] > 1:
                members.setdefault(tied[root[place]], []).append(place)
        groups = []
        for places in members.values():
            roots = tuple(dict.fromkeys(root[p] for p in places))
            extents = [n for r in roots for n in sizes[r]]
            weight = sum(math.prod(values[i].shape) * 4.0 for i, _ in places)
            groups.append(
                Group(
                    self._name(places),
                    roots,
                    max(values[i].shape[d] for i, d in places),
                    math.gcd(*extents),
                    tuple(places),
                    weight,
                )
            )
        alike = Counter(g.name for g in groups)
        groups = [
            (
                g
                if alike[g.name] == 1
                else replace(g, name=self._name(list(g.members[:1]), paths))
            )
            for g in groups
        ]
        self.groups = sorted(groups, key=lambda g: -g.weight)
        self.of = {r: k for k, g in enumerate(self.groups) for r in g.roots}
        first = [
            i for i, path in enumerate(paths) if path.startswith(("inputs", "targets"))
        ]
        heads = [self.of.get(root.get((i, 0), -1)) for i in first]
        self.batch = next((k for k in heads if k is not None), None)
        self.rows = self._rows()
        # each input's dims: extent, group, and whether a loop steps along it
        self._looks = [
            tuple(
                (
                    n,
                    self.of.get(find(node)),
                    node in graph.loops,
                )
                for n, node in zip(v.shape, v.nodes, strict=True)
            )
            for v in values
        ]
        self._stored: dict[tuple, list[Spec]] = {}
        batch = set() if self.batch is None else set(self.groups[self.batch].roots)
        self.batched = frozenset(
            v.index
            for v in graph.values
            if v.stored is None and any(find(n) in batch for n in v.nodes)
        )

    def _rows(self) -> set[int]:
        """Groups by which a parameter is looked up: the rows of embeddings."""
        found = set()
        for op in self.graph.operations():
            if (
                op.name == "gather"
                and op.inputs[0] is not None
                and op.inputs[0].stored is not None
            ):
                for d in op.params["dimension_numbers"].collapsed_slice_dims:
                    group = self.of.get(self.graph.find(op.inputs[0].nodes[d]))
                    if group is not None:
                        found.add(group)
        return found - {self.batch}

    def _tie(self, root: dict[tuple[int, int], int]) -> dict[int, int]:
        """Root to the representative of its tied axes. What would make two dims of one
        array the same stays apart.
        """
        parent = {r: r for r in root.values()}

        def find(r: int) -> int:
            while parent[r] != r:
                r = parent[r]
            return r

        places: dict[tuple, list[tuple[int, int]]] = {}
        for i, d in root:
            places.setdefault(
                (self.patterns[i], d, self.graph.main.inputs[i].shape), []
            ).append((i, d))
        arrays: dict[int, list[int]] = {}
        for (i, _), r in root.items():
            arrays.setdefault(i, []).append(r)
        distinct = [set(roots) for roots in arrays.values() if len(set(roots)) > 1]
        for alike in places.values():
            before = dict(parent)
            for place in alike[1:]:
                parent[find(root[place])] = find(root[alike[0]])
            if parent != before and any(
                len({find(r) for r in roots}) < len(roots) for roots in distinct
            ):
                parent = before
        return {r: find(r) for r in parent}

    def _name(
        self,
        places: list[tuple[int, int]],
        paths: list[str] | None = None,
    ) -> str:
        """ "batch" and "inputs.1" for dims of a batch, else the shortest parameter
        path, and the dim.
        """
        paths = paths or self.patterns
        params = [
            (
                len(paths[i]),
                paths[i],
                d,
            )
            for i, d in places
            if paths[i].startswith("params")
        ]
        if any(d == 0 and not self.paths[i].startswith("params") for i, d in places):
            return "batch"
        if not params:
            return f"{self.paths[places[0][0]]}.{places[0][1]}"
        _, path, d = min(
            params,
            key=lambda p: (
                p[1].count("/"),
                p[0],
                p[1],
                p[2],
            ),
        )
        return f"{path.removeprefix('params/').removesuffix('/kernel').removesuffix('/embedding')}.{d}"

    def uses(self, masks: list[int]) -> dict[int, int]:
        """Root to mask, from a mask for each group."""
        return {
            r: mask
            for g, mask in zip(self.groups, masks, strict=True)
            if mask
            for r in g.roots
        }

    def storage(
        self,
        masks: Sequence[int],
        keep: int,
        counts: Sequence[int],
    ) -> list[Spec]:
        """How each parameter is kept: as it is used, and split over the axes of `keep`
        besides where that is worthwhile.
        """
        key = (tuple(masks), keep, tuple(counts))
        if key not in self._stored:
            if len(self._stored) > MOST_STORED:
                self._stored.clear()
            alike: dict[tuple, Spec] = {}
            found = []
            for i, path in enumerate(self.paths):
                if not path.startswith("params"):
                    continue
                look = self._looks[i]
                if look not in alike or path in self.pinned:
                    alike[look] = self.pinned.get(path) or self.store(
                        i,
                        self.use(i, masks, counts),
                        keep,
                        counts,
                    )
                found.append(alike[look])
            self._stored[key] = found
        return self._stored[key]

    def use(
        self,
        index: int,
        masks: Sequence[int],
        counts: Sequence[int],
    ) -> Spec:
        """How an input is used: the first dim that could take a mesh axis takes it."""
        taken = 0
        spec = []
        for extent, group, _ in self._looks[index]:
            mask = 0 if group is None else masks[group] & ~taken
            if mask and extent % counts[mask]:
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
        """`use`, and what is left of the axes of `keep` on the dim that stays
        largest.
        """
        taken = 0
        look = self._looks[index]
        for mask in use:
            taken |= mask
        more = keep & ~taken
        if any(
            mask and group in self.rows
            for mask, (_, group, _) in zip(use, look, strict=True)
        ):
            return use  # what is looked up where it lies is not gathered
        if (
            not more
            or math.prod(n for n, _, stepped in look if not stepped) * 4 < SMALL
        ):
            return use
        fits = [
            d
            for d, (n, _, stepped) in enumerate(look)
            if not stepped and n % (counts[use[d]] * counts[more]) == 0
        ]
        if not fits:
            return use
        best = max(
            fits,
            key=lambda d: (use[d] == 0, look[d][0] // counts[use[d]]),
        )
        return tuple(m | more if d == best else m for d, m in enumerate(use))


def _samples(graph: Graph, paths: list[str]) -> set[int]:
    """Roots of the batch dims, of which loops that step along them need the whole.

    A loop over samples, as `jax.lax.map` makes, is run by each device for all of them.
    The rest of the model need not be: what the loop takes is gathered before it.
    """
    first = [
        graph.find(value.nodes[0])
        # knobs: no path
        for path, value in zip(paths, graph.main.inputs, strict=False)
        if path.startswith(("inputs", "targets")) and value.nodes
    ]
    for operation, index in graph.stepping:
        value = operation.inputs[index]
        if value is None or graph.find(value.nodes[0]) not in first:
            continue
        if (index, 0) not in operation.whole:  # by the names of the same graph before
            operation.whole.append((index, 0))
    return set(first)


def starred(path: str) -> str:
    """A path with its numbers as stars: what repeated layers have in common."""
    return re.sub(r"\d+", "*", path)
