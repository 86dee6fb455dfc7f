"""The plan: how a traced recipe lies on a topology, as plain data, and why."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.compat import make_mesh
from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology
from lepton_jax.planner.trace import Trace
from lepton_jax.state import by_path, nbytes

DATA = "data"
CALL_SECONDS = 1e-2  # of computing in one call: about a hundred times what dispatching it costs the host
MOST_STEPS_PER_CALL = 32
MOST_BLOCK_BYTES = 64 * 2**20
RESIDENT_SHARE = 0.05  # of a device's memory


@dataclass(frozen=True)
class ArrayPlan:
    """How one array of the state lies: mesh axes per dim (None: not sharded), and why."""

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    spec: tuple[str | None, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """How a recipe lies on a topology.

    Attributes:
      topology: its name.
      mesh: mesh axis name to size.
      batch: spec of a batch: the mesh axis of the batch dim.
      arrays: one entry per array of the state.
      batch_size, micro_batches: samples a step, and parts in which a device's share passes through the model.
      unroll_micro_batches: micro-batches as straight code instead of a loop.
      steps_per_call: steps that one XLA call runs.
      data: "resident": the training data lies on each device, and a batch is gathered there by its indices;
        "streamed": batches come from the host.
      bytes_per_device: predicted bytes by kind. What the activations take is not predicted.
      reasons: each decision that is not an array's, and why.
    """

    topology: str
    mesh: dict[str, int]
    batch: tuple[str | None, ...]
    arrays: tuple[ArrayPlan, ...]
    batch_size: int
    micro_batches: int
    unroll_micro_batches: bool
    steps_per_call: int
    data: str
    bytes_per_device: dict[str, int]
    reasons: dict[str, str] = field(default_factory=dict)

    def make_mesh(self, devices: list[jax.Device]) -> Mesh:
        """The mesh over live devices.

        Raises:
          PlanError: their number isn't the plan's.
        """
        if len(devices) != math.prod(self.mesh.values()):
            raise PlanError(f"the plan is for {math.prod(self.mesh.values())} devices, {len(devices)} are given",
                            where=f"plan for {self.topology}", remedy="plan anew for the devices that are there")
        return make_mesh(self.mesh, devices)

    def state_shardings(self, mesh: Mesh, state: Any) -> Any:
        """A NamedSharding for each leaf of a state."""
        specs = {a.path: PartitionSpec(*a.spec) for a in self.arrays}
        leaves = [NamedSharding(mesh, specs[path]) for path in by_path(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
          PlanError: the text is no plan.
        """
        try:
            data = json.loads(text)
            arrays = tuple(ArrayPlan(**{**a, "shape": tuple(a["shape"]), "spec": tuple(a["spec"])})
                           for a in data.pop("arrays"))
            return cls(**{**data, "batch": tuple(data["batch"]), "arrays": arrays})
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(f"not a plan: {error}", where="plan.json", remedy="plan anew") from error

    def __str__(self) -> str:
        parameters = [a for a in self.arrays if a.kind == "params"]
        width = max(len(a.path.partition("/")[2]) for a in parameters)
        lines = [f"Plan for {self.topology}: mesh {' x '.join(f'{k}={v}' for k, v in self.mesh.items())}, "
                 f"batch {self.batch_size} over {self.batch[0]!r}"]
        for a in parameters:
            shape, spec = "x".join(map(str, a.shape)) or "scalar", ", ".join(map(str, a.spec)) or "replicated"
            lines.append(f"  {a.path.partition('/')[2]:{width}}  {shape:>16}  {a.dtype:8} {_size(a.bytes):>9}  "
                         f"{spec}: {a.reason}")
        held = ", ".join(f"{kind} {_size(count)}" for kind, count in self.bytes_per_device.items())
        lines += textwrap.wrap(f"a device holds {held}; what activations take is not predicted", 100,
                               initial_indent="  ", subsequent_indent="    ")
        lines += [f"  {what}: {why}" for what, why in self.reasons.items()]
        return "\n".join(lines)


def plan(trace: Trace, topology: Topology) -> Plan:
    """Data parallelism over all devices: the batch is split, the state is replicated.

    Raises:
      PlanError: the batch does not divide over the devices and micro-batches.
    """
    recipe, devices = trace.recipe, topology.devices
    parts = devices * recipe.micro_batches
    if recipe.batch_size % parts:
        low = recipe.batch_size // parts * parts
        near = " or ".join(str(n) for n in (low, low + parts) if n)
        micro = f" in {recipe.micro_batches} micro-batches" if recipe.micro_batches > 1 else ""
        raise PlanError(f"batch_size {recipe.batch_size} does not divide over {devices} devices{micro}",
                        where=f"topology {topology.name}", remedy=f"set batch_size to {near}, or use fewer devices")
    arrays = []
    for path, leaf in by_path(trace.state).items():
        dtype = "key" if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else str(leaf.dtype)
        arrays.append(ArrayPlan(path, path.partition("/")[0], tuple(leaf.shape), dtype, nbytes(leaf), (),
                                "data parallelism keeps a copy on each device"))
    held = {kind: sum(a.bytes for a in arrays if a.kind == kind) for kind in ("params", "variables", "optimizer")}
    held["gradients"] = held["params"]
    row = sum(nbytes(x) for x in jax.tree.leaves((trace.inputs, trace.targets)))
    held["batch"] = row // devices
    data, why_data = _residence(trace, topology, row)
    slow_loops = _slow_loops(trace, topology)
    steps, why = _steps_per_call(trace, topology, row, slow_loops)
    held["batch"] *= steps
    if data == "resident":
        held["data"], held["batch"] = row // recipe.batch_size * (trace.samples or 0), row // devices
    reasons = {f"data {data}": why_data} | {f"{steps} step{'s' if steps > 1 else ''} per call": why}
    if recipe.micro_batches > 1 and slow_loops:
        reasons["micro-batches unrolled"] = "XLA's CPU backend runs convolutions inside loops on a slow path"
    return Plan(topology.name, {DATA: devices}, (DATA,), tuple(arrays), recipe.batch_size, recipe.micro_batches,
                slow_loops, steps, data, held, reasons)


def _residence(trace: Trace, topology: Topology, batch_bytes: int) -> tuple[str, str]:
    """Where the training data lies, and why."""
    if trace.samples is None:
        return "streamed", "it is not held as arrays in memory"
    size = batch_bytes // trace.recipe.batch_size * trace.samples
    copies = topology.devices if topology.platform == "cpu" else 1  # virtual devices share one memory
    if size * copies > RESIDENT_SHARE * topology.chip.memory:
        return "streamed", f"{_size(size)} on each device would be more than {RESIDENT_SHARE:.0%} of its memory"
    return "resident", f"{_size(size)} on each device spare copying each batch there"


def _slow_loops(trace: Trace, topology: Topology) -> bool:
    """XLA's CPU backend: a convolution of one step in a loop took 20 times as long as outside of it (jax 0.10, 0.12)."""
    return topology.platform == "cpu" and "conv_general_dilated" in trace.operations


def _steps_per_call(trace: Trace, topology: Topology, batch_bytes: int, slow_loops: bool) -> tuple[int, str]:
    asked = trace.recipe.steps_per_call
    if trace.jaxpr is None:
        return asked or 1, "the data is not known yet, so nothing is said about the batch"
    if slow_loops:
        why = "XLA's CPU backend runs convolutions inside loops on a slow path"
        return 1, why + (f", so {asked} as asked for would be slower" if asked and asked > 1 else "")
    if asked:
        return asked, "as the recipe asks"
    seconds = trace.flops / topology.devices / topology.chip.bf16_flops
    # a virtual CPU device is a share of the machine, not one more
    seconds *= topology.devices if topology.platform == "cpu" else 1
    most = min(MOST_STEPS_PER_CALL, max(1, MOST_BLOCK_BYTES // max(1, batch_bytes)))
    steps = min(most, 2 ** max(0, math.ceil(math.log2(CALL_SECONDS / max(seconds, 1e-9)))))
    return 2 ** int(math.log2(steps)), f"a step computes for about {seconds * 1e3:.2g} ms"


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} TiB"
