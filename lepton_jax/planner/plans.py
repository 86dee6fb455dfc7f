"""The plan: how a traced recipe lies on a topology, as plain data, what it will cost,
and why.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.compat import make_mesh, ordered_effect, source_line
from lepton_jax.errors import PlanError
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.layout import Layout, meets_stored
from lepton_jax.trees import by_path

Entry = str | tuple[str, ...] | None  # the mesh axes of one dim, as in a PartitionSpec
Entries = tuple[Entry, ...]


@dataclass(frozen=True)
class ArrayPlan:
    """How one array lies.

    Attributes:
      path, kind, shape, dtype: of the array; kind is a field of State, "inputs" or
        "targets".
      bytes: of all of it.
      spec: mesh axes of each dim as it is kept; () if each device has a copy.
      use: the same while it is computed with: a parameter is gathered along what `spec`
        has more.
      reason: why.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    spec: Entries
    use: Entries
    reason: str


@dataclass(frozen=True)
class Axis:
    """A named axis of the model: one thing, found as a dim of many arrays.

    Attributes:
      name: after a parameter (path and dim) or an input that has it; repeated layers
        share one.
      size: its extent, the largest where dims that merge several factors differ.
      mesh: the mesh axes that split it in computing.
      members: how many dims of parameters it is.
    """

    name: str
    size: int
    mesh: tuple[str, ...]
    members: int


@dataclass(frozen=True)
class Collective:
    """Communication of one step: bytes as in `Link.seconds`, summed over `count` of
    them; `what` are the largest causes.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    seconds: float
    what: str


@dataclass(frozen=True)
class Rival:
    """A plan that was not chosen: its step's seconds, its peak bytes, and by how much
    it loses in the objective.
    """

    name: str
    mesh: dict[str, int]
    remat: str
    micro_batches: int
    seconds: float
    bytes: float
    loses: str


@dataclass(frozen=True)
class Plan:
    """How a recipe lies on a topology.

    Attributes:
      topology: its name.
      name: the strategy in the field's words: "data parallel", "FSDP x tensor
        parallel", ...
      objective: what it is best in: "time", "memory" or "cost".
      mesh: mesh axis name to size, outermost first.
      batch_axes: the mesh axes over which a batch is split.
      arrays: one entry per array of the state.
      batch: one entry per array of a batch.
      axes: the named axes that were found, largest first.
      batch_size, micro_batches: samples a step, and parts in which they pass through
        the model.
      remat: rematerialization: "none", "dots" or "full".
      unroll_micro_batches: micro-batches as straight code instead of a loop.
      steps_per_call: steps that one XLA call runs.
      data: "resident": the training data lies on each device, and a batch is gathered
        there by its indices; "streamed": batches come from the host.
      bytes_per_device: predicted bytes by kind; their sum is the predicted peak.
      memory: bytes that a device has.
      seconds: predicted seconds of a step by kind ("matmul", "memory", "communication",
        ...): their sum.
      flops: of a step on one device.
      collectives: predicted communication of a step.
      price_per_hour: of the whole topology in US dollars; None: not known.
      rivals: the five best of the plans that were not chosen.
      reasons: each decision that is not an array's, and why.
      notes: what could not be done, or was left to XLA.
    """

    topology: str
    name: str
    objective: str
    mesh: dict[str, int]
    batch_axes: tuple[str, ...]
    arrays: tuple[ArrayPlan, ...]
    batch: tuple[ArrayPlan, ...]
    axes: tuple[Axis, ...]
    batch_size: int
    micro_batches: int
    remat: str
    unroll_micro_batches: bool
    steps_per_call: int
    data: str
    bytes_per_device: dict[str, int]
    memory: int
    seconds: dict[str, float]
    flops: float
    collectives: tuple[Collective, ...]
    price_per_hour: float | None
    rivals: tuple[Rival, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Predicted bytes that a device holds at the most."""
        return sum(self.bytes_per_device.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def price_per_step(self) -> float | None:
        """US dollars."""
        return (
            None
            if self.price_per_hour is None
            else self.price_per_hour * self.step_seconds / 3600
        )

    def make_mesh(self, devices: Any) -> Mesh:
        """The mesh over live devices (a list, or an array of the mesh's shape).

        Raises:
          PlanError: their number isn't the plan's.
        """
        count = devices.size if hasattr(devices, "size") else len(devices)
        if count != math.prod(self.mesh.values()):
            raise PlanError(
                f"the plan is for {math.prod(self.mesh.values())} devices, {count} are"
                " given",
                where=f"plan for {self.topology}",
                remedy="plan anew for the devices that are there",
            )
        return make_mesh(self.mesh, devices)

    def state_shardings(
        self,
        mesh: Mesh,
        state: Any,
    ) -> Any:
        """A NamedSharding for each leaf of a state."""
        specs = {a.path: PartitionSpec(*a.spec) for a in self.arrays}
        leaves = [NamedSharding(mesh, specs[path]) for path in by_path(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def layout(
        self,
        graph: Graph,
        paths: list[str],
    ) -> Layout:
        """What the plan says of a program, whose inputs have these paths: parameters
        first (see `laid_out`).
        """
        bits = {name: 1 << i for i, name in enumerate(self.mesh)}
        masks = lambda entries: tuple(sum(bits[n] for n in _names(e)) for e in entries)
        known = {a.path: a for a in (*self.arrays, *self.batch)}
        uses: dict[int, int] = {}
        storage = []
        for path, value in zip(paths, graph.main.inputs, strict=True):
            array = known.get(path)
            if array is None:
                continue
            full = (0,) * len(value.shape)
            for node, mask in zip(value.nodes, masks(array.use), strict=False):
                if mask:
                    uses[graph.find(node)] = uses.get(graph.find(node), 0) | mask
            if array.kind == "params":
                spec = masks(array.spec)
                storage.append(spec + full[len(spec) :])
        return Layout(
            graph,
            tuple(self.mesh.values()),
            uses,
            storage,
            meets_stored(graph),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
          PlanError: the text is no plan.
        """
        try:
            data: Any = _tuples(json.loads(text))
            if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:
                raise ValueError("its entries are not a plan's")
            kinds = {
                "arrays": ArrayPlan,
                "batch": ArrayPlan,
                "axes": Axis,
                "collectives": Collective,
                "rivals": Rival,
            }
            made: dict[str, Any] = {
                k: tuple(kinds[k](**x) for x in v) if k in kinds else v
                for k, v in data.items()
            }
            return cls(**made)
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(
                f"not a plan: {error}", where="plan.json", remedy="plan anew"
            ) from error

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """The plan in a file.

        Raises:
          PlanError: it can't be read, or holds no plan.
        """
        try:
            text = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"the plan can't be read: {error}",
                where=file,
                remedy="name a file that Plan.save wrote",
            ) from error
        return cls.from_json(text)

    def save(self, file: str | Path) -> None:
        """Write the plan to a file, as JSON.

        Raises:
          PlanError: it can't be written.
        """
        try:
            Path(file).write_text(self.to_json() + "\n")
        except OSError as error:
            raise PlanError(
                f"the plan can't be written: {error}",
                where=file,
                remedy="name a file in a folder that exists",
            ) from error

    def diff(self, other: Plan) -> str:
        """What differs from another plan, a line each; empty if nothing does."""
        lines = []
        for f in fields(self):
            mine = getattr(self, f.name)
            theirs = getattr(other, f.name)
            if mine == theirs or f.name in ("rivals", "reasons", "collectives", "axes"):
                continue
            if f.name in ("arrays", "batch"):
                left, right = ({a.path: a for a in x} for x in (mine, theirs))
                for path in dict.fromkeys((*left, *right)):
                    a = left.get(path)
                    b = right.get(path)
                    if a is None or b is None:
                        lines.append(
                            f"{path}: only in the {'second' if a is None else 'first'}"
                        )
                    elif replace(a, reason="") != replace(b, reason=""):
                        lines.append(f"{path}: {_described(a)} -> {_described(b)}")
            else:
                lines.append(f"{f.name}: {mine} -> {theirs}")
        return "\n".join(lines)

    def __str__(self) -> str:
        # the picture of a plan is drawn from the plan
        from lepton_jax.planner.show.text import text

        return text(self)

    def _repr_html_(self) -> str:
        from lepton_jax.planner.show.text import html

        return html(self)


def check_plan(plan: Plan, trace: Any) -> None:
    """That a plan is one for this recipe.

    Raises:
      PlanError: its arrays or its batch are not the recipe's.
    """
    mine = {path: tuple(leaf.shape) for path, leaf in by_path(trace.state).items()}
    planned = {a.path: a.shape for a in plan.arrays}
    wrong = [path for path in (*mine, *planned) if mine.get(path) != planned.get(path)]
    if wrong:
        path = wrong[0]
        raise PlanError(
            f"the plan is for another recipe: {path} is {planned.get(path, 'absent')}"
            f" in the plan and {mine.get(path, 'absent')} in the recipe; {len(wrong)}"
            " arrays differ",
            where=f"plan for {plan.topology}",
            remedy="plan this recipe anew",
        )
    if plan.batch_size != trace.recipe.batch_size:
        raise PlanError(
            f"the plan is for batches of {plan.batch_size}, and the recipe has"
            f" {trace.recipe.batch_size}",
            where=f"plan for {plan.topology}",
            remedy="set the recipe's batch_size, or plan anew",
        )
    check_effects(trace, math.prod(plan.mesh.values()))


def check_effects(trace: Any, devices: int) -> None:
    """Check that JAX can compile the recipe's effects for so many devices.

    Args:
      trace: of the recipe.
      devices: how many.

    Raises:
      PlanError: a print or another callback is to keep its order, on several devices.
    """
    if devices == 1 or trace.jaxpr is None:
        return
    eqn = ordered_effect(trace.jaxpr.jaxpr)
    if eqn is not None:
        raise PlanError(
            f"a {eqn.primitive.name} with ordered=True can't run on {devices} devices: "
            "JAX keeps the order of callbacks on one device only",
            where=source_line(eqn),
            remedy=(
                "leave out ordered=True, or train on one device: "
                "Trainer(devices=1), --devices 1"
            ),
        )


def entries(spec: tuple[int, ...], names: tuple[str, ...]) -> Entries:
    """Masks of mesh axes as a PartitionSpec's entries; () if nothing is split."""
    found: list[Entry] = []
    for mask in spec:
        axes = tuple(n for i, n in enumerate(names) if mask >> i & 1)
        found.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    while found and found[-1] is None:
        found.pop()
    return tuple(found)


def _names(entry: Entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _described(array: ArrayPlan) -> str:
    return (
        f"{list(array.shape)} {array.dtype} {array.spec or 'replicated'}, used as"
        f" {array.use or 'replicated'}"
    )


def _tuples(data: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(data, list):
        return tuple(_tuples(x) for x in data)
    return {k: _tuples(v) for k, v in data.items()} if isinstance(data, dict) else data
