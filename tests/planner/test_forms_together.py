"""Forms of a step, several at a time, compute what one device computes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from functools import partial

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax import losses, models
from lepton_jax.errors import PlanError
from lepton_jax.planner.program import named
from lepton_jax.planner.rewrite import forms, narrow
from lepton_jax.step import optimizers, precision
from lepton_jax.train.program import Program

DEVICES = 8
BATCH = 16
LENGTH = 16
STEPS = 2
# Relative differences of losses. Where numbers are rounded to 8 bits, the last bit of
# float32 decides ties, and a tie which expert a token goes to.
BOUNDS = {"float32": 1e-5, "bfloat16": 2.0**-8, "fp8": 2.0**-8, "int8": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Part:
    """What one form adds to a recipe and to a plan.

    Attributes:
      axis: of the mesh, that the form needs two or more of.
      recipe: settings of `traced`.
      asked: arguments of `plan`.
      fields: of the plan, put into it by hand.
    """

    axis: str = ""
    recipe: tuple = ()
    asked: tuple = ()
    fields: tuple = ()


PARTS = {
    "tensor": Part("tensor"),
    "fsdp": Part("fsdp"),
    "ring": Part("sequence", asked=(("context", "ring"),)),
    "all-to-all": Part("sequence", asked=(("context", "all-to-all"),)),
    "stages": Part("stage", asked=(("stages", (2, 4)),)),
    "chunks": Part("stage", asked=(("stages", (2, 2, 2)),)),
    "experts": Part("expert", recipe=(("experts", 4),)),
    "pieces": Part(fields=(("loss_pieces", 4),)),
    "dots": Part(asked=(("remat", "dots"),)),
    "full": Part(asked=(("remat", "full"),)),
    "kept": Part(asked=(("remat", "keep 0,2 and 1 in 2"),)),
    "micro-batches": Part(asked=(("micro_batches", 2),)),
    "bfloat16": Part(recipe=(("narrowed", "bfloat16"),)),
    "fp8": Part(recipe=(("narrowed", "fp8"),)),
    "int8": Part(recipe=(("narrowed", "int8"),)),
    "muon": Part(recipe=(("muon", True),)),
}


@pytest.fixture(autouse=True, scope="module")
def small_arrays_take_every_form(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "SMALL", 0)
        patch.setattr(narrow, "LEAST_WIDTH", 8)
        # bfloat16 next to 8 bits would make a tie of much, as this many devices sum
        for kind in narrow.KINDS:
            patch.setitem(precision.COMPUTED_IN, kind, "float32")
        patch.setattr(narrow, "COMPUTED_IN", ("float32",))
        patch.setitem(forms.LEAST_LENGTH, "cpu", LENGTH)
        yield
    traced.cache_clear()
    alone.cache_clear()


@functools.cache
def traced(experts=0, narrowed="float32", muon=False):
    model = models.MoELM if experts else models.TransformerLM
    sizes = {"dim": 16, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 32}
    if experts:
        sizes |= {"experts": experts, "capacity": None}
    optimizer = optax.sgd  # the first update of Adam is no more than signs
    if muon:
        own = partial(optimizers.muon, consistent_rms=0.2)
        optimizer = optimizers.by_part({"blocks/*/kernel": own}, default=optax.sgd)
    recipe = lepton.Recipe(
        model=partial(model, 32, loop="scan", **sizes),
        loss=losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=0.1,
        batch_size=BATCH,
        steps_per_call=1,
        precision=narrowed,
    )
    return lepton.trace(recipe, *(x[0] for x in batches()))


@functools.cache
def batches():
    shape = (STEPS, BATCH, LENGTH + 1)
    x = np.random.default_rng(0).integers(0, 32, shape, dtype=np.int32)
    return x[..., :-1], x[..., 1:]


def trained(trace, plan):
    """Return the losses of the steps under a plan."""
    program = Program(trace, plan, jax.devices()[: plan.devices])
    state = program.init(0)
    values = []
    for step in range(STEPS):
        batch = jax.tree.map(lambda x, step=step: x[step], batches())
        batch = jax.device_put(batch, program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        values.append(float(records[0, 0]))
    return values


@functools.cache
def alone(recipe, micro_batches=1, stages=1, parts=1, chunks=1, groups=1):
    """Return the losses of one device, of which a stage is no more than an order."""
    trace = traced(**dict(recipe))
    one = lepton.topology("cpu:1")
    plan = lepton.plan(trace, one, micro_batches=micro_batches)
    flight = {"stage_parts": parts, "stage_chunks": chunks, "stage_groups": groups}
    return trained(trace, dataclasses.replace(plan, stages=stages, **flight))


def expected(recipe, plan):
    """Return the losses of the plain program on one device.

    In fp8 an array has one scale, so parts of a batch are rounded otherwise than all of
    it: there the program has the same parts.
    """
    if dict(recipe).get("narrowed") != "fp8":
        return alone(recipe)
    return alone(recipe, plan.micro_batches, *dataclasses.astuple(plan.pipeline))


def planned(names):
    """Return the recipe's settings and the plan of some forms together."""
    parts = [PARTS[name] for name in names]
    recipe = tuple(itertools.chain(*(part.recipe for part in parts)))
    axes = [part.axis for part in parts if part.axis]
    mesh = dict.fromkeys(sorted(axes, key="stage".__ne__), 2)
    mesh["data"] = DEVICES // math.prod(mesh.values())
    asked = dict(itertools.chain(*(part.asked for part in parts)))
    plan = lepton.plan(
        traced(**dict(recipe)), lepton.topology(f"cpu:{DEVICES}"), mesh=mesh, **asked
    )
    fields = dict(itertools.chain(*(part.fields for part in parts)))
    return recipe, dataclasses.replace(plan, **fields)


def fit_together(names):
    """Whether no two forms are of one kind, and none is an error with another."""
    parts = [PARTS[name] for name in names]
    said = [key for part in parts for key, _ in (*part.recipe, *part.asked)]
    axes = [part.axis for part in parts if part.axis]
    if {"stage", "sequence"} <= set(axes):
        return False
    return len(said) == len(set(said)) and len(axes) == len(set(axes))


TOGETHER = [
    names
    for count in (2, 3)
    for names in itertools.combinations(PARTS, count)
    if fit_together(names)
]


def check(names):
    recipe, plan = planned(names)
    found = trained(traced(**dict(recipe)), plan)
    bound = BOUNDS[dict(recipe).get("narrowed", "float32")]
    np.testing.assert_allclose(found, expected(recipe, plan), rtol=bound)


@pytest.mark.parametrize("names", ["ring kept", "stages experts fp8"])
def test_these_forms_together_train_as_one_device_does(names):
    check(tuple(names.split()))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(TOGETHER))
def test_forms_together_train_as_one_device_does(names):
    check(names)


@pytest.mark.parametrize(
    ("mesh", "asked", "says", "remedy"),
    [
        (
            {"stage": 2, "sequence": 4},
            {"stages": (2, 4), "context": "ring"},
            "in a pipeline each device gathers the sequence",
            "or the stages",
        ),
        (
            {"data": 2, "stage": 2, "sequence": 2},
            {"context": "all-to-all"},
            "in a pipeline each device gathers the sequence",
            "or the stages",
        ),
    ],
)
def test_a_way_of_attention_that_a_pipeline_lacks_is_an_error(
    mesh, asked, says, remedy
):
    with pytest.raises(PlanError, match=says) as caught:
        lepton.plan(traced(), lepton.topology("cpu:8"), mesh=mesh, **asked)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("context", ["ring", "all-to-all"])
def test_a_way_of_attention_needs_a_kernel(context, monkeypatch):
    monkeypatch.setitem(forms.LEAST_LENGTH, "cpu", 2 * LENGTH)
    mesh = {"data": 4, "sequence": 2}
    trace = traced()
    with pytest.raises(PlanError, match="no kernel computes it here"):
        lepton.plan(trace, lepton.topology("cpu:8"), mesh=mesh, context=context)
    assert not lepton.plan(trace, lepton.topology("cpu:8"), mesh=mesh).context
