"""Several slices: names, links, meshes, and a step over two of them."""

from __future__ import annotations

import doctest
from functools import partial

import jax
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import losses, models
from lepton_jax.errors import PlanError
from lepton_jax.hardware import across_slices, arrange, lay, links, topology
from lepton_jax.planner import ahead
from lepton_jax.planner.program import named
from lepton_jax.planner.search import shapes
from lepton_jax.train.program import Program
from lepton_jax.verify import hlo

RTOL = 1e-5


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (links, shapes), ids=lambda m: m.__name__)
def test_the_examples_of_slices_hold(module):
    assert doctest.testmod(module).failed == 0


def test_a_name_says_how_many_slices_there_are():
    two = topology("2*v5p:4x4x4")

    assert (two.name, two.slice) == ("2*v5p:4x4x4", "v5p:4x4x4")
    assert (two.chips, two.devices, two.nodes) == (128, 128, 32)
    assert two.price_per_hour == 2 * topology("v5p:4x4x4").price_per_hour
    assert topology("1*v5p:4x4x4") == topology("v5p:4x4x4")


@pytest.mark.parametrize("name", ("0*v5p:4x4x4", "*v5p:4x4x4", "2*h200:8"))
def test_what_is_no_name_of_slices_is_refused(name):
    with pytest.raises(PlanError):
        topology(name)


def test_the_outermost_axis_lies_across_slices():
    two = topology("2*v5p:4x4x4")
    one = topology("v5p:4x4x4")
    outer, inner = lay({"data": 2, "fsdp": 64}, two).values()

    assert outer.kind == "network"
    assert outer.bandwidth == two.chip.network_bandwidth * two.chip.network_fraction
    assert inner.bandwidth == lay({"fsdp": 64}, one)["fsdp"].bandwidth
    # the axes inside take all of a slice first
    assert across_slices((64, 2), two) == 0b01


def test_a_sum_over_slices_sends_each_devices_share_over_the_network():
    two = topology("2*v5p:4x4x4")
    size = 2**32
    both = lay({"data": 128}, two)["data"].seconds("all-reduce", size)
    inside = lay({"data": 64}, topology("v5p:4x4x4"))["data"]
    network = lay({"data": 2, "fsdp": 64}, two)["data"]

    expected = inside.seconds("all-reduce", size)
    expected += network.seconds("all-reduce", size / 64)

    assert both == pytest.approx(expected, rel=0.01)


def test_devices_lie_slice_after_slice():
    two = topology("2*cpu:4")
    laid = arrange({"data": 2, "fsdp": 4}, two, list(range(8)))

    assert laid.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


BATCH = 8


def language():
    arguments = {"vocab": 32, "dim": 32, "layers": 1, "heads": 4}
    x = np.random.default_rng(0).integers(0, 32, (BATCH, 9), dtype=np.int32)
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, **arguments),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        steps_per_call=1,
    )
    batch = (x[:, :-1], x[:, 1:])
    return lepton.trace(recipe, *batch), batch


def test_a_step_over_two_slices_is_that_of_one_device(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)
    trace, batch = language()

    def trained(where, **asked):
        plan = lepton.plan(trace, where, **asked)
        devices = arrange(plan.mesh, where, jax.devices()[: where.devices])
        program = Program(trace, plan, devices)
        state = program.init(0)
        values = []
        for _ in range(2):
            given = jax.device_put(batch, program.block_sharding)
            state, records = program.train(state, given, 0, 1)
            values.append(float(records[0, 0]))
        return values

    over_two = trained(topology("2*cpu:4"), mesh={"data": 2, "fsdp": 4})

    np.testing.assert_allclose(over_two, trained(topology("cpu:1")), rtol=RTOL)


def test_of_equal_plans_that_with_sums_alone_on_the_network_is_taken():
    arguments = models.transformer_size("8b") | {"loop": "scan", "layers": 2}
    token = jax.ShapeDtypeStruct((1, 4096), "int32")
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, **arguments),
        loss=losses.cross_entropy,
        optimizer=optax.adamw(1e-4),
        batch_size=512,
        precision="bfloat16",
    )
    where = topology("2*v5p:4x4x4")
    plan = lepton.plan(lepton.trace(recipe, token, token), where)
    across = across_slices(tuple(plan.mesh.values()), where)
    names = [name for i, name in enumerate(plan.mesh) if across >> i & 1]

    kept = {axis for a in plan.arrays for axis in str(a.spec).split("'")}
    assert names
    assert not kept & set(names)


MODULE = """HloModule two, is_scheduled=true, num_partitions=4

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %begin = token[] after-all()
  %send = (f32[8]{0}, u32[], token[]) send(%p, %begin), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[8]{0}, u32[], token[]) recv(%begin), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %done = f32[8]{0} get-tuple-element(%recv), index=0
}
"""


def test_what_a_module_sends_between_slices_is_a_collective():
    [found] = hlo.read(MODULE).collectives

    assert (found.kind, found.bytes) == ("all-reduce", 32)
    assert found.axes({"data": 2, "fsdp": 4}) == ("data",)


def test_libtpu_describes_two_slices():
    pytest.importorskip("libtpu")
    devices = ahead.devices_for(topology("2*v5e:2x2"))

    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
