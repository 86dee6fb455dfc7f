"""Prints and callbacks in a model or a loss.

They run once a step, with the right value, however the step is planned.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.experimental import io_callback

import lepton_jax as lepton
from lepton_jax.errors import PlanError
from lepton_jax.planner import planning
from lepton_jax.planner.program.remat import rematerialized
from lepton_jax.planner.search import build as search
from lepton_jax.train.program import Program

pytestmark = pytest.mark.usefixtures("quick_compilation")

CPU = lepton.topology("cpu:8")
ONE = lepton.topology("cpu:1")
BATCH = 16
WIDTH = 32
LAYERS = 6
told = []


@pytest.fixture(autouse=True)
def _nothing_told_yet():
    told.clear()


def tell(x):
    told.append(float(np.asarray(x).mean()))


def count(x):
    told.append(float(np.asarray(x).mean()))
    return np.float32(0)


def by_callback(x):
    jax.debug.callback(tell, x)
    return x


def by_io(x):
    return x + io_callback(
        count,
        jax.ShapeDtypeStruct((), jnp.float32),
        lax.stop_gradient(x),
    )


def by_io_alone(x):
    io_callback(tell, None, lax.stop_gradient(x))
    return x


def in_a_branch(x):
    return lax.cond(
        x.sum() < 1e9,
        by_callback,
        lambda x: x,
        x,
    )


class Deep(nnx.Module):
    """Layers that are worth rematerializing, in a row or in a loop."""

    def __init__(self, telling, loop, rngs):
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (LAYERS, WIDTH, WIDTH)) / 6
        )
        self.last = nnx.Linear(WIDTH, 4, rngs=rngs)
        self.telling = telling
        self.loop = loop

    def __call__(self, x):
        def layer(x, kernel):
            x = self.telling(x)
            wide = jnp.sin(jnp.concatenate([x @ kernel] * 64, 1))
            return x + jnp.tanh(wide.reshape(BATCH, 64, WIDTH).sum(1) / 8), None

        kernel = self.kernel[...]
        if self.loop:
            x = lax.scan(layer, x, kernel)[0]
        else:
            for index in range(LAYERS):
                x = layer(x, kernel[index])[0]
        return self.last(x)


def traced(telling, loop, **fields):
    recipe = lepton.Recipe(
        model=lambda rngs: Deep(telling, loop, rngs),
        loss=fields.pop("loss", lepton.losses.cross_entropy),
        optimizer=optax.sgd(0.1),
        batch_size=BATCH,
        steps_per_call=1,
        **fields,
    )
    row = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)
    return lepton.trace(
        recipe,
        row,
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def step(trace, topology, remat):
    """One train step; (the parameters before it, its batch, its loss)."""
    masks = {"batch": 1} if topology is CPU else {}
    plan = search.fixed(
        trace,
        topology,
        search.by_hand(
            trace,
            (topology.devices,),
            masks,
            0,
            remat,
        ),
    )
    program = Program(
        trace,
        plan,
        jax.devices()[: topology.devices],
    )
    state = program.init(0)
    params = jax.tree.map(np.asarray, state.params)
    rng = np.random.default_rng(0)
    batch = (
        rng.normal(size=(BATCH, WIDTH)).astype(np.float32),
        rng.integers(0, 4, BATCH).astype(np.int32),
    )
    records = program.train(state, jax.device_put(batch, program.block_sharding), 0, 1)[
        1
    ]
    jax.effects_barrier()
    return params, batch, float(records[0, 0])


def by_hand(params, x):
    """Means of what enters each layer."""
    found = []
    for kernel in params["kernel"]:
        found.append(x.mean())
        wide = np.sin(np.concatenate([x @ kernel] * 64, 1))
        x = x + np.tanh(wide.reshape(BATCH, 64, WIDTH).sum(1) / 8)
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    "topology",
    [ONE, CPU],
    ids=["1", "8"],
)
@pytest.mark.parametrize(
    "loop", [False, True], ids=["layers in a row", "layers in a loop"]
)
@pytest.mark.parametrize(
    "telling",
    [
        by_callback,
        by_io,
        in_a_branch,
    ],
)
def test_each_layer_tells_its_value_once_a_step(telling, loop, topology, remat):
    trace = traced(telling, loop)
    params, (x, _), loss = step(trace, topology, remat)
    np.testing.assert_allclose(
        sorted(told),
        sorted(by_hand(params, x)),
        rtol=1e-4,
        atol=1e-6,
    )
    told.clear()
    assert loss == pytest.approx(
        step(traced(lambda x: x, loop), ONE, "none")[2],
        rel=1e-5,
    )
    assert told == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_callback_that_gives_nothing_is_called_once_a_step(remat):
    """In straight code: of a loop that it differentiates, JAX itself drops it."""
    params, (x, _), _ = step(
        traced(by_io_alone, False),
        CPU,
        remat,
    )
    np.testing.assert_allclose(
        sorted(told),
        sorted(by_hand(params, x)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_rematerialization_still_keeps_less_of_a_loop_that_prints():
    def kept(telling, remat):
        trace = traced(telling, True)
        plan = planning.plan(trace, ONE, remat=remat)
        return (
            plan.bytes_per_device["activations"] + plan.bytes_per_device["temporaries"]
        )

    assert kept(by_callback, "full") < kept(by_callback, "none") / 2
    assert kept(by_callback, "full") == pytest.approx(
        kept(lambda x: x, "full"), rel=0.1
    )


def test_what_is_told_between_checkpoints_keeps_its_operands():
    def function(w, x):
        for _ in range(LAYERS):
            x = by_io(jnp.sin(x @ w))
            x = by_callback(x)
        return x.sum()

    w = np.eye(64, dtype=np.float32)
    x = np.ones((64, 64), np.float32)
    expected = jax.grad(function)(w, x)
    jax.effects_barrier()
    before = sorted(told)
    told.clear()
    found = jax.jit(jax.grad(rematerialized(function, "full")))(w, x)
    jax.effects_barrier()
    assert sorted(told) == pytest.approx(before)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def told_loss(outputs, targets):
    jax.debug.callback(tell, outputs)
    return lepton.losses.cross_entropy(outputs, targets)


def told_inputs(x):
    jax.debug.callback(tell, x)
    return x


@pytest.mark.parametrize(
    "topology",
    [ONE, CPU],
    ids=["1", "8"],
)
@pytest.mark.parametrize(
    "fields",
    [{"loss": told_loss}, {"preprocess": told_inputs}],
    ids=["loss", "preprocess"],
)
def test_a_print_in_loss_or_preprocessing_is_one_a_step(fields, topology):
    _, (x, _), _ = step(
        traced(lambda x: x, True, **fields),
        topology,
        "none",
    )
    assert len(told) == 1
    assert math.isfinite(told[0])
    if "preprocess" in fields:
        assert told == [pytest.approx(x.mean(), rel=1e-4)]


def test_jax_debug_print_trains_and_prints_what_there_is(capfd):
    def telling(x):
        jax.debug.print("mean {}", x.mean())
        return x

    params, (x, _), _ = step(
        traced(telling, True),
        CPU,
        "full",
    )
    printed = [
        float(line.split()[1])
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("mean ")
    ]
    np.testing.assert_allclose(
        sorted(printed),
        sorted(by_hand(params, x)),
        rtol=1e-4,
        atol=1e-6,
    )


def ordered(x):
    jax.debug.print(
        "mean {}",
        x.mean(),
        ordered=True,
    )
    return x


def ordered_callback(x):
    io_callback(
        tell,
        None,
        lax.stop_gradient(x),
        ordered=True,
    )
    return x


@pytest.mark.parametrize(
    "telling",
    [
        ordered,
        ordered_callback,
        jax.jit(ordered),
        lambda x: lax.cond(
            x.sum() < 9,
            ordered,
            lambda x: x,
            x,
        ),
    ],
    ids=["print", "io_callback", "in jit", "in cond"],
)
def test_an_ordered_effect_on_several_devices_is_an_error_that_names_the_line(telling):
    trace = traced(telling, False)
    with pytest.raises(
        PlanError, match=r"ordered=True can't run on 8 devices"
    ) as error:
        planning.plan(trace, CPU)
    assert "test_effects.py" in error.value.where
    assert "Trainer(devices=1)" in error.value.remedy
    with pytest.raises(PlanError, match="ordered=True"):
        by_hand = search.by_hand(trace, (8,), {"batch": 1}, 0)
        search.fixed(trace, CPU, by_hand).check(trace)
    planning.plan(trace, ONE)
    assert math.isfinite(step(trace, ONE, "none")[2])
