"""Compiling for devices that aren't there."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lepton_jax.errors import PlanError
from lepton_jax.hardware import topology
from lepton_jax.planner import ahead
from lepton_jax.verify import hlo

P = PartitionSpec


def mesh_for(name, axes):
    where = topology(name)
    return Mesh(
        ahead.mesh_devices(
            where,
            axes,
            ahead.devices_for(where),
        ),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )


def shape(mesh, *dims, spec=None):
    return jax.ShapeDtypeStruct(
        dims,
        jnp.float32,
        sharding=NamedSharding(mesh, spec or P()),
    )


def test_virtual_devices_lie_in_order():
    mesh = mesh_for("cpu:8", {"a": 2, "b": 4})

    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert mesh.devices.shape == (2, 4)


@pytest.mark.parametrize(
    "name, words",
    [
        ("cpu:64", "xla_force_host_platform_device_count=64"),
        ("h200:8", "where such a GPU is"),
    ],
)
def test_devices_that_are_not_there(name, words):
    with pytest.raises(PlanError, match=words):
        ahead.devices_for(topology(name))


def test_a_mesh_that_does_not_multiply_up():
    with pytest.raises(PlanError, match="8 devices"):
        mesh_for("cpu:8", {"a": 2, "b": 3})


def test_tpus_without_libtpu(monkeypatch):
    monkeypatch.setattr(
        ahead.importlib.util,
        "find_spec",
        lambda name: None,
    )
    with pytest.raises(PlanError, match=r"pip install 'lepton-jax\[tpu\]'"):
        ahead.devices_for(topology("v5e:4x4"))


def test_memory_counts_donated_arguments_once():
    mesh = mesh_for("cpu:8", {"a": 8})
    argument = shape(
        mesh,
        1024,
        64,
        spec=P("a"),
    )
    compiled, memory = ahead.compile_for(
        jax.jit(lambda x: x * 2 + 1, donate_argnums=0).lower(argument)
    )

    assert memory.arguments == memory.outputs == memory.aliases == 1024 * 64 * 4 // 8
    assert memory.peak == memory.arguments + memory.temporaries
    assert hlo.read(compiled.as_text()).partitions == 8


@pytest.mark.parametrize(
    "message, sizes",
    [
        (
            (
                "Ran out of memory on HBM, the total memory required for HLO"
                " temporaries (33.54G) exceeds available HBM (15.75G)."
            ),
            (33.54 * 2**30, 15.75 * 2**30),
        ),
        (
            (
                "Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm."
                " Exceeded hbm capacity by 4.35G."
            ),
            (20.10 * 2**30, 15.75 * 2**30),
        ),
        ("no figures", (None, None)),
    ],
)
def test_the_sizes_that_xla_names(message, sizes):
    assert ahead._sizes(message) == sizes


# ---- TPUs ----


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="pip install 'lepton-jax[tpu]'")


@pytest.mark.parametrize(
    "name",
    [
        "v4:2x2x1",
        "v5e:1x1",
        "v5e:4x4",
        "v5e:16x16",
        "v5p:2x2",
        "v5p:4x4x8",
        "v6e:2x4",
        "tpu7x:2x2x1",
    ],
)
def test_the_devices_of_a_slice(libtpu, name):
    devices = ahead.devices_for(topology(name))

    assert len(devices) == topology(name).devices
    assert devices[0].device_kind in topology(name).chip.kinds
    assert "TPU_WORKER_HOSTNAMES" not in os.environ


def test_a_shape_that_libtpu_refuses(libtpu):
    with pytest.raises(PlanError, match="libtpu refuses v5e:16"):
        ahead.devices_for(topology("v5e:16"))


@pytest.mark.parametrize(
    "name, axes", [("v5e:4x4", {"a": 8, "b": 2}), ("tpu7x:2x2x1", {"a": 2, "b": 4})]
)
def test_known_collectives_on_a_tpu(libtpu, name, axes):
    """Groups are numbered by their place in the mesh.

    The devices are not in the order of their ids here.
    """
    mesh = mesh_for(name, axes)
    a, b = axes.values()

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("a", "b"), P("b")),
        out_specs=(P("a", "b"), P("a")),
        check_vma=False,
    )
    def function(x, w):  # on a device (512, 256) and (256 / b, 256)
        def body(x, _):
            y = jnp.tanh(
                x
                @ jax.lax.all_gather(
                    w * x.sum(),
                    "b",
                    axis=0,
                    tiled=True,
                )
            )
            y = jax.lax.psum_scatter(
                jnp.concatenate([y] * a, 1),
                "a",
                scatter_dimension=1,
                tiled=True,
            )
            return y, None

        x, _ = jax.lax.scan(
            body,
            x,
            None,
            length=7,
        )
        return x, jax.lax.all_to_all(
            x,
            "a",
            split_axis=0,
            concat_axis=1,
            tiled=True,
        )

    lowered = jax.jit(function).lower(
        shape(
            mesh,
            512 * a,
            256 * b,
            spec=P("a", "b"),
        ),
        shape(
            mesh,
            256,
            256,
            spec=P("b"),
        ),
    )
    compiled, memory = ahead.compile_for(lowered)
    read = hlo.read(compiled.as_text())
    found = {c.kind: c for c in read.collectives if c.bytes > 1024}

    assert {kind: (c.times, c.axes(axes)) for kind, c in found.items()} == {
        "all-gather": (7, ("b",)),
        "reduce-scatter": (7, ("a",)),
        "all-to-all": (1, ("a",)),
    }
    # XLA may gather what the matmul will round anyway
    assert found["all-gather"].bytes in (256 * 256 * 2, 256 * 256 * 4)
    assert found["reduce-scatter"].bytes == 512 * 256 * a * 4
    assert found["all-to-all"].bytes == 512 * 256 * 4
    assert read.dot_flops == 7 * 2 * 512 * 256 * 256
    assert all(c.file == __file__ and c.exact for c in found.values())
    assert memory.arguments >= 512 * 256 * 4 + 256 // b * 256 * 4
    assert memory.peak > memory.arguments


def test_a_program_that_does_not_fit(libtpu):
    mesh = mesh_for("v5e:2x2", {"a": 4})
    with pytest.raises(ahead.TooLarge, match="Ran out of memory") as caught:
        ahead.compile_for(
            jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(shape(mesh, 60000, 60000))
        )

    assert caught.value.needed > caught.value.available
    assert 15 < caught.value.available / 2**30 < 16
