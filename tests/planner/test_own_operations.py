"""Operations that a user brings, with a rule of how they may be split."""

from __future__ import annotations

import doctest
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas as pl

import lepton_jax as lepton
from lepton_jax import losses
from lepton_jax.planner.program import named, ruled
from lepton_jax.planner.rewrite import notation, own
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program

RTOL = 1e-5
BATCH, LENGTH, WIDTH = 8, 6, 16
EPSILON = 1e-6


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (notation, own), ids=lambda m: m.__name__)
def test_the_examples_of_rules_hold(module):
    assert doctest.testmod(module).failed == 0


# ---- a kernel: rows divided by their root mean square ----


def forward_kernel(x_ref, scale_ref, out_ref, root_ref):
    x = x_ref[...]
    root = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    out_ref[...] = x * root * scale_ref[...]
    root_ref[...] = root


def call(x, scale, interpret):
    rows = math.prod(x.shape[:-1])
    width = x.shape[-1]
    shapes = (
        jax.ShapeDtypeStruct((rows, width), x.dtype),
        jax.ShapeDtypeStruct((rows, 1), x.dtype),
    )
    out, root = pl.pallas_call(forward_kernel, shapes, interpret=interpret)(
        x.reshape(rows, width), scale[None]
    )
    return out.reshape(x.shape), root.reshape(*x.shape[:-1], 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def unruled(x, scale, interpret=True):
    return call(x, scale, interpret)[0]


def kept(x, scale, interpret):
    out, root = call(x, scale, interpret)
    return out, (x, scale, root)


def pulled(interpret, saved, slope):
    x, scale, root = saved
    normal = x * root
    slope_of_normal = slope * scale
    inner = (slope_of_normal * normal).mean(-1, keepdims=True)
    axes = tuple(range(x.ndim - 1))
    return root * (slope_of_normal - normal * inner), (slope * normal).sum(axes)


unruled.defvjp(kept, pulled)

DIMS = "... width, width -> ... width"
ruled_rows = lepton.planner.rule(DIMS, whole="width", saves="... _")(
    lambda x, scale, interpret=False: unruled(x, scale, interpret)
)
again = lepton.planner.rule(DIMS, whole="width", name="again")(
    lambda x, scale, interpret=False: unruled(x, scale, interpret)
)


def plain(x, scale):
    root = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * root * scale


class Model(nnx.Module):
    def __init__(self, norm, *, rngs):
        self.embed = nnx.Embed(32, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.scale = nnx.Param(jnp.linspace(0.5, 1.5, 4 * WIDTH))
        self.down = nnx.Linear(4 * WIDTH, 32, rngs=rngs)
        self.norm = norm

    def __call__(self, tokens):
        x = nnx.tanh(self.up(self.embed(tokens)))
        return self.down(self.norm(x, self.scale[...]))


def traced(norm, **more):
    recipe = lepton.Recipe(
        model=partial(Model, norm),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        steps_per_call=1,
        **more,
    )
    return lepton.trace(recipe, *(x[0] for x in batches()))


def batches():
    x = np.random.default_rng(0).integers(0, 32, (2, BATCH, LENGTH + 1), np.int32)
    return x[..., :-1], x[..., 1:]


def trained(trace, plan):
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    values = []
    for step in range(2):
        batch = jax.tree.map(lambda x, step=step: x[step], batches())
        batch = jax.device_put(batch, program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        values.append(float(records[0, 0]))
    return values


def planned(trace, sizes, masks, keep=0, remat="none"):
    count = math.prod(sizes)
    trace = trace.on(lepton.topology(f"cpu:{count}"))
    assignment = build.by_hand(trace, sizes, masks, keep, remat)
    return trace, build.fixed(trace, lepton.topology(f"cpu:{count}"), assignment)


@pytest.fixture(scope="module")
def expected():
    return trained(*planned(traced(plain), (1,), {}))


@pytest.fixture(autouse=True)
def small_arrays_split(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)


@pytest.mark.parametrize("norm", (ruled_rows, again), ids=lambda norm: norm.__name__)
@pytest.mark.parametrize(
    ("sizes", "masks", "keep", "remat"),
    [
        ((1,), {}, 0, "none"),
        ((8,), {"batch": 1}, 1, "dots"),
        ((2, 4), {"batch": 1, "down.0": 2}, 1, "full"),
    ],
    ids=["one device", "fsdp", "the whole dim split"],
)
def test_a_kernel_with_a_rule_trains_as_plain_jax(
    norm, sizes, masks, keep, remat, expected
):
    trace = traced(norm)
    if norm is again and len(sizes) == 1:
        pytest.skip("the other kernel has this case")
    names = named.Names(trace.gradient("none"), trace.arguments)
    known = [group.name for group in names.groups]
    masks = {next(k for k in known if k in (m, "up.1", "scale.0") and (m == "batch") == (k == "batch")): v for m, v in masks.items()}

    np.testing.assert_allclose(
        trained(*planned(trace, sizes, masks, keep, remat)), expected, rtol=RTOL
    )
