"""The plan: how a traced recipe lies on a topology, what it will cost, and why.

It is plain data: it saves as JSON, compares with another plan, and replays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.compat import make_mesh, ordered_effect, source_line
from lepton_jax.errors import PlanError
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.layout import Layout, meets_stored
from lepton_jax.planner.program.products import kind_of
from lepton_jax.planner.program.staged import layers_of_stages, samples_of_parts
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.rewrite import Forms, Stages
from lepton_jax.trees import by_path

# what a plan may be best in: time of a step, memory of a device, price of a step
OBJECTIVES = ("time", "memory", "cost")
# how attention meets a sequence that is split over devices
CONTEXTS = ("all-to-all", "ring")
# fields that plans of older versions lack
SINCE = {
    "peak_least",
    "peak_bound",
    "peak_source",
    "loss_pieces",
    "attention",
    "stages",
    "stage_parts",
    "stage_chunks",
    "stage_groups",
    "products",
    "experts",
    "context",
    "flags",
}
# kinds of bytes that XLA decides
DECIDED_BY_XLA = ("gradients", "activations", "temporaries")
# the key in `Plan.reasons` of a plan that is not the very best
SIMPLEST = "the simplest"
# arrays that an error names where a plan is for another recipe
NAMED_ARRAYS = 3

# the mesh axes of one dim, as in a PartitionSpec
Entry = str | tuple[str, ...] | None
Entries = tuple[Entry, ...]


@dataclass(frozen=True)
class ArrayPlan:
    """The layout of one array.

    Attributes:
      path: its place in the state or the batch, as in "params/layers/0/kernel".
      kind: a field of State, "inputs" or "targets".
      shape: of the whole array.
      dtype: as text, e.g. "float32".
      bytes: size of the whole array.
      spec: mesh axes of each dim as it is kept; () if each device has a copy.
      use: the same while it is computed with: a parameter is gathered along the axes
        that only `spec` has.
      reason: why it lies so.
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
      name: a parameter (path and dim) or an input that has it; repeated layers share
        one name.
      size: its extent, the largest where dims that merge several factors differ.
      mesh: the mesh axes that split it in computing.
      members: number of dims of parameters and inputs that it is.
    """

    name: str
    size: int
    mesh: tuple[str, ...]
    members: int


@dataclass(frozen=True)
class Collective:
    """Communication of one kind over the same mesh axes in one step.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", ...
      axes: the mesh axes that it runs along.
      count: number of collectives.
      bytes: sum over them, as in `Link.seconds`.
      seconds: sum over them.
      what: the largest causes.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    seconds: float
    what: str


@dataclass(frozen=True)
class Rival:
    """A plan that was not chosen.

    Attributes:
      name: the strategy, as in `Plan`.
      mesh: mesh axis name to size.
      remat, micro_batches: as in `Plan`.
      seconds: predicted time of a step.
      bytes: predicted peak of a device.
      loses: by how much it loses in the objective, in words.
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
    """The layout of a recipe on a topology, and its predicted cost.

    Attributes:
      topology: name of the topology.
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
      remat: rematerialization: "none", "dots", "full", or what is kept (`keeping`).
      unroll_micro_batches: micro-batches as straight code instead of a loop.
      steps_per_call: steps that one XLA call runs.
      data: "resident": the training data lies on each device, and a batch is gathered
        there by its indices; "streamed": batches come from the host.
      bytes_per_device: predicted bytes by kind; their sum is the predicted peak.
      memory: bytes that a device has.
      seconds: predicted seconds of a step by kind ("matmul", "memory", "communication",
        ...); their sum is the time of a step.
      flops: FLOPs of a step on one device.
      collectives: predicted communication of a step.
      price_per_hour: US dollars for the whole topology; None: not known.
      rivals: the five best of the plans that were not chosen.
      reasons: each decision that is not an array's, and why.
      notes: what could not be done, or was left to XLA.
      peak_least, peak_bound: bytes between which the peak lies; at least 97 % of peaks
        are below `peak_bound`. 0: not known.
      peak_source: what the peak was measured with; empty: it is predicted.
      loss_pieces: pieces of the tokens whose logits are computed one after the other,
        about; 1: all logits are there at once.
      attention: the kernel that computes attention: "blocks", "splash" (TPUs), or "":
        the model's own operations.
      stages: of a pipeline of equal layers; 1: there is none.
      stage_parts: micro-batches that are in flight in the pipeline.
      stage_chunks: runs of layers of each stage.
      stage_groups: runs of samples that have micro-batches of their own.
      products: how large kernels are multiplied: "fp8", "int8", "int8 as float32" where
        float32 emulates it, ...; "": in the dtype that the model computes in.
      experts: whether each device sorts the tokens that it has by their expert, in
        mixtures that drop none.
      flags: XLA's options of the compiled step, by name; those that this XLA does not
        know are left out.
      context: how attention meets a sequence that is split: "all-to-all": devices
        exchange parts of it for heads, as far as there are heads; "ring": keys and
        values go around; "": it is not split.
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
    peak_least: int = 0
    peak_bound: int = 0
    peak_source: str = ""
    loss_pieces: int = 1
    attention: str = ""
    stages: int = 1
    stage_parts: int = 1
    stage_chunks: int = 1
    stage_groups: int = 1
    products: str = ""
    experts: bool = False
    context: str = ""
    flags: dict[str, Any] = field(default_factory=dict)

    # How a plan shows itself, by form: "text" and "html". The package fills them in,
    # since the room `show` knows plans, and a plan knows nothing of pictures.
    renderers: ClassVar[dict[str, Callable[[Plan], str]]] = {}

    # ---- figures ----

    @property
    def peak(self) -> int:
        """Predicted bytes that a device holds at the peak of a step."""
        return sum(self.bytes_per_device.values())

    @property
    def fits(self) -> str:
        """Whether the plan fits the device's memory.

        "yes": `peak_bound` does. "may not": `peak` does, and `peak_bound` doesn't or is
        not known. "no": not even `peak` does.
        """
        if self.peak > self.memory:
            return "no"
        if 0 < self.peak_bound <= self.memory:
            return "yes"
        return "may not"

    def with_measured(
        self,
        peak: float,
        bound: float,
        source: str,
        least: float | None = None,
    ) -> Plan:
        """Return the plan with a peak that was measured in place of the predicted one.

        What XLA decides (gradients, activations, temporaries) is scaled so that
        `bytes_per_device` still adds up to the peak.

        Args:
          peak: bytes of a device at the peak of a step.
          bound: bytes that the peak does not exceed.
          source: what measured it, as in "a probe of 2 and 4 layers".
          least: bytes that the peak does not fall below; None: `peak`.
        """
        least = peak if least is None else least
        return replace(
            self,
            bytes_per_device=_adding_up(self.bytes_per_device, int(peak)),
            peak_least=int(least),
            peak_bound=int(bound),
            peak_source=source,
        )

    @property
    def forms(self) -> Forms:
        """The forms in which the loss is computed."""
        return Forms(
            self.loss_pieces,
            self.attention,
            self.experts,
            self.pipeline,
            self.products,
        )

    @property
    def pipeline(self) -> Stages:
        """The pipeline of a stack of equal layers."""
        return Stages(
            self.stages,
            self.stage_parts,
            self.stage_chunks,
            self.stage_groups,
        )

    @property
    def devices(self) -> int:
        """Number of devices that the plan is for."""
        return math.prod(self.mesh.values())

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a step."""
        return sum(self.seconds.values())

    @property
    def price_per_step(self) -> float | None:
        """US dollars; None: not known."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour * self.step_seconds / 3600

    # ---- on devices ----

    def make_mesh(self, devices: Any) -> Mesh:
        """Return the mesh over live devices.

        Args:
          devices: a list, or an array of the mesh's shape.

        Raises:
          PlanError: their number isn't the plan's.
        """
        count = devices.size if hasattr(devices, "size") else len(devices)
        planned = self.devices
        if count != planned:
            raise PlanError(
                f"the plan is for {planned} devices, {count} are given",
                where=f"plan for {self.topology}",
                remedy="plan anew for the devices that are there",
            )
        return make_mesh(self.mesh, devices)

    def state_shardings(
        self,
        mesh: Mesh,
        state: Any,
    ) -> Any:
        """Return a NamedSharding for each leaf of a state."""
        specs = {array.path: array.spec for array in self.arrays}
        leaves = []
        for path in by_path(state):
            spec = PartitionSpec(*specs[path])
            leaves.append(NamedSharding(mesh, spec))
        structure = jax.tree.structure(state)
        return jax.tree.unflatten(structure, leaves)

    def layout(
        self,
        graph: Graph,
        paths: list[str],
    ) -> Layout:
        """Return what the plan says of a program.

        Args:
          graph: of the program.
          paths: of its inputs, parameters first (see `laid_out`).
        """
        bits = {name: 1 << i for i, name in enumerate(self.mesh)}
        arrays = (*self.arrays, *self.batch)
        known = {array.path: array for array in arrays}
        uses: dict[int, int] = {}
        storage = []
        for path, value in zip(paths, graph.main.inputs, strict=True):
            array = known.get(path)
            if array is None:
                continue

            for node, entry in zip(value.nodes, array.use, strict=False):
                mask = _mask(entry, bits)
                if mask:
                    root = graph.find(node)
                    uses[root] = uses.get(root, 0) | mask

            if array.kind == "params":
                spec = tuple(_mask(entry, bits) for entry in array.spec)
                not_named = len(value.shape) - len(spec)
                storage.append(spec + (0,) * not_named)
        parts = samples_of_parts(graph)
        if parts is not None:
            over = [uses.get(root, 0) for root in layers_of_stages(graph)]
            uses[parts.part] = uses.get(parts.batch, 0) & ~max(over, default=0)
        return Layout(
            graph,
            tuple(self.mesh.values()),
            uses,
            storage,
            meets_stored(graph),
            ring=self.context == "ring",
        )

    def check(
        self,
        trace: Trace,
        where: object = None,
    ) -> None:
        """Check that the plan is one for this recipe.

        Where the plan or the trace knows no batch, batches are not compared.

        Args:
          trace: of the recipe.
          where: place of the plan, for the error; None: the topology.

        Raises:
          PlanError: arrays, batch_size or batch are not the recipe's, or JAX can't
            compile the recipe's effects for the plan's devices.
        """
        if where is None:
            where = f"plan for {self.topology}"
        if self.batch_size != trace.recipe.batch_size:
            raise PlanError(
                f"the plan is for batches of {self.batch_size}, and the recipe has"
                f" {trace.recipe.batch_size}",
                where=where,
                remedy="set the recipe's batch_size, or plan anew",
            )

        self._check_products(trace, where)
        planned = {array.path: array.shape for array in self.arrays}
        traced = _shapes(trace.state)
        if self.batch and trace.inputs is not None:
            planned |= {array.path: array.shape for array in self.batch}
            batch = {"inputs": trace.inputs, "targets": trace.targets}
            traced |= _shapes(batch)
        differences = [
            f"{path} {_spelled(planned.get(path))} in the plan,"
            f" {_spelled(traced.get(path))} in the recipe"
            for path in dict.fromkeys((*traced, *planned))
            if traced.get(path) != planned.get(path)
        ]
        if differences:
            raise PlanError(
                f"the plan is not for this recipe: {len(differences)} arrays differ,"
                f" e.g. {'; '.join(differences[:NAMED_ARRAYS])}",
                where=where,
                remedy=(
                    "give the recipe the settings that it was planned with, or plan"
                    " anew"
                ),
            )
        check_effects(trace, self.devices)

    def _check_products(self, trace: Trace, where: object) -> None:
        """Check that large kernels are multiplied as the recipe asks."""
        asked = kind_of(trace.recipe.precision)
        planned = kind_of(self.products)
        if asked != planned:
            raise PlanError(
                f"the plan is for {planned or 'bfloat16'} products, and the recipe"
                f" asks for {asked or trace.recipe.precision}",
                where=where,
                remedy="set the recipe's precision, or plan anew",
            )

    # ---- on disk ----

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote.

        Raises:
          PlanError: the text is no plan.
        """
        kinds = {
            "arrays": ArrayPlan,
            "batch": ArrayPlan,
            "axes": Axis,
            "collectives": Collective,
            "rivals": Rival,
        }
        names = {f.name for f in fields(cls)}
        try:
            data: Any = _tuples(json.loads(text))
            # Plans that were saved before a plan had bounds lack them.
            if not isinstance(data, dict) or not names - SINCE <= set(data) <= names:
                raise ValueError("its entries are not a plan's")
            for name, kind in kinds.items():
                data[name] = tuple(kind(**entry) for entry in data[name])
            return cls(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(
                f"not a plan: {error}", where="plan.json", remedy="plan anew"
            ) from error

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Return the plan in a file.

        Raises:
          PlanError: it can't be read, or holds no plan.
        """
        remedy = "name a file that Plan.save, --save or a run has written"
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PlanError(
                f"the plan can't be read: {reason}", where=file, remedy=remedy
            ) from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(error.what, where=file, remedy=remedy) from error

    def save(self, file: str | Path) -> None:
        """Write the plan to a file, as JSON.

        Raises:
          PlanError: it can't be written.
        """
        try:
            Path(file).write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(
                f"the plan can't be written: {error}",
                where=file,
                remedy="name a file in a folder that exists",
            ) from error

    # ---- for people ----

    def diff(self, other: Plan) -> str:
        """Return what differs from another plan, a line each; empty if nothing does."""
        not_compared = ("rivals", "reasons", "collectives", "axes")
        names = [f.name for f in fields(self)]
        lines = []
        for name in names:
            mine = getattr(self, name)
            theirs = getattr(other, name)
            if mine == theirs or name in not_compared:
                continue
            if name in ("arrays", "batch"):
                lines += _differing_arrays(mine, theirs)
            else:
                lines.append(f"{name}: {mine} -> {theirs}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.renderers["text"](self)

    def _repr_html_(self) -> str:
        return self.renderers["html"](self)


def check_effects(trace: Trace, devices: int) -> None:
    """Check that JAX can compile the recipe's effects for a number of devices.

    Args:
      trace: of the recipe.
      devices: number of them.

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


def entries(
    spec: tuple[int, ...],
    names: tuple[str, ...],
) -> Entries:
    """Return masks of mesh axes as a PartitionSpec's entries; () if nothing is split.

    >>> entries((0b01, 0b11, 0b00), ("data", "tensor"))
    ('data', ('data', 'tensor'))
    """
    result: list[Entry] = []
    for mask in spec:
        axes = [name for i, name in enumerate(names) if mask >> i & 1]
        if len(axes) > 1:
            result.append(tuple(axes))
        else:
            result.append(axes[0] if axes else None)
    while result and result[-1] is None:
        result.pop()
    return tuple(result)


def axes_of(entry: Entry) -> tuple[str, ...]:
    """Return the mesh axes of one dim."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry)


# ---- internals ----


def _adding_up(held: dict[str, int], peak: int) -> dict[str, int]:
    """Return bytes by kind that add up to a peak, by scaling what XLA decides."""
    uncertain = sum(held.get(kind, 0) for kind in DECIDED_BY_XLA)
    room = peak - (sum(held.values()) - uncertain)
    factor = max(0, room) / uncertain if uncertain else 0.0
    scaled = {
        kind: int(count * factor) if kind in DECIDED_BY_XLA else count
        for kind, count in held.items()
    }
    # The rest is rounding, or what was not predicted at all.
    rest = peak - sum(scaled.values())
    scaled["temporaries"] = scaled.get("temporaries", 0) + rest
    return scaled


def _mask(
    entry: Entry,
    bits: dict[str, int],
) -> int:
    return sum(bits[name] for name in axes_of(entry))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = by_path(tree)
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _spelled(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _differing_arrays(
    mine: tuple[ArrayPlan, ...],
    theirs: tuple[ArrayPlan, ...],
) -> list[str]:
    first = {array.path: array for array in mine}
    second = {array.path: array for array in theirs}
    lines = []
    for path in dict.fromkeys((*first, *second)):
        a = first.get(path)
        b = second.get(path)
        if a is None:
            lines.append(f"{path}: only in the second")
        elif b is None:
            lines.append(f"{path}: only in the first")
        elif replace(a, reason="") != replace(b, reason=""):
            lines.append(f"{path}: {_described(a)} -> {_described(b)}")
    return lines


def _described(array: ArrayPlan) -> str:
    return (
        f"{list(array.shape)} {array.dtype} {array.spec or 'replicated'}, used as"
        f" {array.use or 'replicated'}"
    )


def _tuples(data: Any) -> Any:
    """Return JSON data with tuples in place of lists."""
    if isinstance(data, list):
        return tuple(_tuples(item) for item in data)
    if isinstance(data, dict):
        return {key: _tuples(value) for key, value in data.items()}
    return data
