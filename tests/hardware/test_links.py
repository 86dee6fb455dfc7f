"""Axes on links, and costs that agree with each other and with measurements."""

import doctest
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax import PlanError
from lepton_jax.hardware import (
    COLLECTIVES,
    arrange,
    join,
    lay,
    links,
    roofline,
    topology,
)

GB = 1e9


def laid(name: str, *sizes: int):
    return list(
        lay({f"axis{i}": size for i, size in enumerate(sizes)}, topology(name)).values()
    )


@pytest.mark.parametrize(
    ("name", "sizes", "bandwidths", "wraps"),
    [
        # v5p: 90 GB/s a link one way, so 180 a ring
        ("v5p:4x4x4", (64,), (540,), (True,)),
        ("v5p:4x4x4", (16, 4), (360, 180), (True, True)),
        ("v5p:4x4x4", (4, 4, 4), (180, 180, 180), (True,) * 3),
        ("v5p:4x4x4", (8, 8), (180 + 45, 180 + 90), (False, False)),
        ("v5p:2x2x4", (4, 4), (90, 180), (False, False)),
        # v5e: 45 a link; a ring only at the full 16
        ("v5e:16x16", (16, 16), (90, 90), (True, True)),
        ("v5e:16x16", (256,), (180,), (True,)),
        ("v5e:16x16", (64, 4), (90 + 45 / 4, 45), (False, False)),
        ("v5e:4x4", (4, 4), (45, 45), (False, False)),
        ("v5e:4x4", (16,), (90,), (False,)),
        # tpu7x: the chip's two devices share its links, unless they are on the axis
        # together
        ("tpu7x:4x4x4", (64, 2), (270, 600), (True, False)),
        ("tpu7x:4x4x4", (16, 8), (180, 175), (True, True)),
    ],
)
def test_axes_on_a_torus(name, sizes, bandwidths, wraps):
    links = laid(name, *sizes)
    assert [link.bandwidth / GB for link in links] == pytest.approx(bandwidths)
    assert tuple(link.wraps for link in links) == wraps
    assert {link.kind for link in links} == {"ici"}


def test_explanations():
    assert [link.physical for link in laid("v5e:16x16", 64, 4)] == [
        "ICI 4 of dim 0 (16, stride 4) and dim 1 (16, wraps)",
        "ICI 4 of dim 0 (16)",
    ]
    assert laid("tpu7x:2x2x1", 4, 2)[1].physical == "the 2 devices of a chip"
    assert (
        laid("h200:64", 16, 4)[0].physical
        == "NVLink among 2 of a node and the network among 8 nodes"
    )


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [
        ((64,), ["network"]),
        ((16, 4), ["network", "nvlink"]),
        ((8, 8), ["network", "nvlink"]),
        ((4, 16), ["network", "network"]),
        ((8, 2, 4), ["network", "nvlink", "nvlink"]),
    ],
)
def test_axes_on_gpus(sizes, kinds):
    links = laid("h200:64", *sizes)
    assert [link.kind for link in links] == kinds
    assert all(
        link.bandwidth == pytest.approx(0.82 * 450 * GB)
        for link in links
        if link.kind == "nvlink"
    )


def test_an_axis_over_nodes_uses_the_network_cards_of_all_its_gpus():
    """Scaling book, part 12: V / min(GPU, node egress).

    An axis sharded inside the node leaves one card for each group.
    """
    alone = laid("h200:64", 8, 8)[0]
    half = laid("h200:64", 16, 4)[0]
    whole = laid("h200:64", 64)[0]
    assert alone.bandwidth == pytest.approx(0.85 * 50 * GB)
    assert half.bandwidth == pytest.approx(0.85 * 50 * GB * 15 / 7)
    assert whole.bandwidth == pytest.approx(0.82 * 450 * GB), (
        "eight cards are faster than the NVLink rate that is reached"
    )
    slow = laid("a100:64", 64)[0]
    assert slow.bandwidth == pytest.approx(0.85 * 6.25 * GB * 63 / 7), (
        "here the cards decide"
    )
    assert whole.exchange == pytest.approx(0.85 * 50 * GB * 63 / 56), (
        "of an all-to-all, 56 of 63 parts leave the node"
    )


def test_cpu_devices_share_one_memory():
    few = laid("cpu:2", 2)[0]
    many = laid("cpu:8", 4, 2)[1]
    assert (few.kind, many.physical) == ("memory", "shared memory")
    assert few.bandwidth == 4 * many.bandwidth


@pytest.mark.parametrize("sizes", [(3, 4), (64, 2), (0, 64), (64, -1)])
def test_a_mesh_that_does_not_multiply_up(sizes):
    with pytest.raises(PlanError, match=r"v5p:4x4x4 has 64 devices"):
        laid("v5p:4x4x4", *sizes)


def test_axes_of_one_cost_nothing():
    links = laid("v5p:4x4x4", 1, 64, 1)
    assert (
        links[0].seconds("all-reduce", 1e9) == links[2].seconds("all-gather", 1e9) == 0
    )
    assert join(links).seconds("all-gather", 1e9) == links[1].seconds("all-gather", 1e9)


# What was measured, by others.


def test_an_all_gather_of_8_h100():
    """Scaling book, part 12, quiz 2: 512 MiB take 1.5 ms, 1.04 ms in theory."""
    assert laid("h100:8", 8)[0].seconds("all-gather", 2**29) == pytest.approx(
        1.5e-3, rel=0.1
    )


@pytest.mark.parametrize(("payload", "bus"), [(58e6, 150e9), (10e9, 370e9)])
def test_all_reduces_of_8_h100(payload, bus):
    """Scaling book, part 12: bus bandwidth 2 V (N-1)/N / seconds with SHARP off."""
    assert laid("h100:8", 8)[0].seconds("all-reduce", payload) == pytest.approx(
        2 * payload * 7 / 8 / bus, rel=0.15
    )


@pytest.mark.parametrize(("payload", "seconds"), [(34e6, 680e-6), (4 * 32e3, 8e-6)])
def test_all_gathers_of_4_v5e_without_wrap(payload, seconds):
    """Scaling book, part 3: 34 MB take 680 us, and 32 kB over 3 hops take 8 us."""
    assert laid("v5e:4x4", 4, 4)[1].seconds("all-gather", payload) == pytest.approx(
        seconds, rel=0.3 if payload < 1e6 else 0.2
    )


@pytest.mark.parametrize(
    ("megabytes", "rate"), [(1.6, 71.8), (6.3, 129), (25, 162), (101, 175), (403, 179)]
)
def test_all_gathers_of_4_tpu7x_chips(megabytes, rate):
    """GB/s of the bytes transferred on 2x2x1.

    Source: AI-Hypercomputer/accelerator-microbenchmarks, Ironwood, all_gather.md.
    """
    measured = megabytes * 1e6 / (rate * GB)
    assert laid("tpu7x:2x2x1", 8)[0].seconds(
        "all-gather", megabytes * 1e6
    ) == pytest.approx(measured, rel=0.2)


def test_the_books_formulas_on_a_wrapped_axis():
    """Scaling book, part 3: an all-gather takes V / W2, an all-to-all a quarter of it.

    Both are of the same global array, so V is 16 local payloads.
    """
    link = laid("v5e:16x16", 16, 16)[1]
    v = 1e10
    gather = link.seconds("all-gather", v)
    exchange = link.seconds("all-to-all", v / 16)
    assert gather == pytest.approx(v / 90e9, rel=0.07)
    assert exchange == pytest.approx(v / 90e9 / 4, rel=0.01)
    open_link = laid("v5e:8x8", 8, 8)[1]
    assert open_link.seconds("all-to-all", v / 8) == pytest.approx(
        v / 45e9 / 4, rel=0.01
    )


# What must hold for every topology.

NAMES = (
    "v5p:4x4x4",
    "v5p:4x4x8",
    "v5p:2x2x4",
    "v5e:16x16",
    "v5e:8x16",
    "v5e:4x4",
    "v6e:8x8",
    "v4:2x2x2",
    "tpu7x:4x4x4",
    "tpu7x:2x2x1",
    "h200:8",
    "h200:64",
    "a100:12",
    "b200:4x8",
    "cpu:8",
)


@st.composite
def laid_meshes(draw):
    target = topology(draw(st.sampled_from(NAMES)))
    left = target.devices
    mesh = {}
    while left > 1 and len(mesh) < 3:
        mesh[f"axis{len(mesh)}"] = size = draw(
            st.sampled_from([n for n in range(1, left + 1) if left % n == 0])
        )
        left //= size
    return target, {**mesh, "last": left}


@settings(deadline=None, max_examples=200)
@given(laid_meshes(), st.floats(0, 1e10), st.floats(0, 1e10))
def test_costs_grow_with_the_payload_and_agree(laying, small, large):
    small, large = sorted((small, large))
    for link in lay(laying[1], laying[0]).values():
        for collective in COLLECTIVES:
            assert (
                0
                <= link.seconds(collective, small)
                <= link.seconds(collective, large)
                < math.inf
            )
        both = link.seconds("all-gather", large) + link.seconds("reduce-scatter", large)
        assert link.seconds("all-reduce", large) == pytest.approx(both)
        if link.size > 1:
            assert link.seconds("all-gather", 0) > 0
            assert link.bandwidth >= link.exchange * 0.999


@settings(deadline=None, max_examples=200)
@given(laid_meshes())
def test_all_axes_joined_are_the_whole_machine(laying):
    target, mesh = laying
    whole = lay({"all": target.devices}, target)["all"]
    joined = join(lay(mesh, target).values())
    assert (joined.size, joined.kind, joined.wraps, joined.physical) == (
        whole.size,
        whole.kind,
        whole.wraps,
        whole.physical,
    )
    for collective in COLLECTIVES:
        assert joined.seconds(collective, 1e9) == pytest.approx(
            whole.seconds(collective, 1e9)
        )


@settings(deadline=None, max_examples=200)
@given(laid_meshes())
def test_a_joined_gather_is_no_slower_than_one_axis_after_the_other(laying):
    target, mesh = laying
    links = list(lay(mesh, target).values())
    for first, second in itertools.pairwise(links):
        payload = 1e10  # latencies are negligible
        turns = first.seconds("all-gather", payload / second.size) + second.seconds(
            "all-gather", payload
        )
        turns = min(
            turns,
            second.seconds("all-gather", payload / first.size)
            + first.seconds("all-gather", payload),
        )
        assert (
            join([first, second]).seconds("all-gather", payload) <= turns * 1.01 + 1e-3
        )
        assert join([first, second]) == join([second, first])


@settings(deadline=None, max_examples=100)
@given(laid_meshes())
def test_devices_are_arranged_as_laid(laying):
    target, mesh = laying
    torus = target.chip.torus
    spots = list(np.ndindex(target.grid))
    devices = [
        SimpleNamespace(
            coords=(*spot[:torus], 0)[:3],
            core_on_chip=spot[-1] if len(spot) > torus else 0,
            spot=spot,
        )
        for spot in spots
    ]
    if torus:
        devices.reverse()  # JAX's order isn't relied on
    placed = arrange(mesh, target, devices)
    assert placed.shape == tuple(mesh.values())
    assert len({device.spot for device in placed.flat}) == target.devices
    for axis, link in enumerate(lay(mesh, target).values()):
        line = np.moveaxis(placed, axis, 0).reshape(link.size, -1)[:, 0]
        for dim in range(len(target.grid)):
            reached = sorted({device.spot[dim] for device in line})
            part = next((part for part in link.parts if part.dim == dim), None)
            assert reached == (
                [reached[0] + i * part.stride for i in range(part.size)]
                if part
                else reached[:1]
            )


@pytest.mark.parametrize("module", [links, roofline], ids=lambda m: m.__name__)
def test_the_examples_hold(module):
    failed, tried = doctest.testmod(module)

    assert tried > 0
    assert failed == 0
