"""XLA's flags for overlap, and what a schedule runs beside products."""

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
from lepton_jax.planner import Plan
from lepton_jax.planner.xla import flags
from lepton_jax.train.program import Program
from lepton_jax.verify.schedule import FROM_HOST, TO_HOST, schedule


def test_the_examples_of_flags_hold():
    assert doctest.testmod(flags).failed == 0


def test_a_users_flags_win_wherever_they_stand():
    name = "xla_tpu_enable_async_collective_fusion"
    for variable in flags.VARIABLES:
        left = flags.chosen("tpu", 8, {variable: f"--other=1 --{name}=false"})

        assert name not in left
        assert len(left) == len(flags.TPU) - 1


def test_one_device_and_a_cpu_get_no_flags():
    assert flags.chosen("tpu", 1, {}) == flags.chosen("cpu", 8, {}) == {}
    assert flags.chosen("cuda", 8, {})["xla_gpu_enable_latency_hiding_scheduler"]


@pytest.mark.parametrize(
    ("capacity", "axis", "is_given"),
    [(None, "expert", False), (None, "fsdp", True), (1.25, "expert", True)],
    ids=["dropless", "whole experts", "slots"],
)
def test_split_experts_that_drop_no_token_are_compiled_without_what_fails_on_them(
    capacity, axis, is_given
):
    recipe = lepton.Recipe(
        model=partial(
            models.MoELM, 64, dim=16, layers=1, heads=2, experts=4, capacity=capacity
        ),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=8,
    )
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    traced = lepton.trace(recipe, tokens, tokens)

    plan = lepton.plan(traced, lepton.topology("v5e:2x2"), mesh={axis: 4})

    assert (flags.FUSES_SCATTERS in plan.flags) == is_given
    assert flags.FUSES in plan.flags


@pytest.mark.parametrize("text", ("xla_a", "a=1", "--=true", "None"))
def test_what_is_no_flag_is_refused(text):
    with pytest.raises(PlanError, match="is no flag of XLA's"):
        flags.parsed(text)


def test_xla_is_never_given_a_flag_that_it_does_not_know(monkeypatch):
    asked = {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_from_tomorrow": 3}

    known, refused = flags.known(asked, jax.devices())
    assert (list(known), refused) == (list(asked)[:1], ["xla_from_tomorrow"])

    monkeypatch.setenv("XLA_FLAGS", "--xla_from_tomorrow=4")
    assert flags.known(asked, jax.devices())[1] == []


def traced():
    x = np.zeros((8, 4), np.float32)
    recipe = lepton.Recipe(
        model=lambda rngs: models.MLP((4, 8, 2), rngs=rngs),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=8,
        steps_per_call=1,
    )
    return lepton.trace(recipe, x, np.zeros(8, np.int32))


def test_flags_are_a_field_of_the_plan_and_can_be_asked_for():
    trace = traced()
    on_pod = lepton.plan(trace, lepton.topology("v5p:2x2x1"))
    without = lepton.plan(trace, lepton.topology("v5p:2x2x1"), flags={})

    assert on_pod.flags == flags.TPU
    assert "xla_enable_async_all_gather=true" in on_pod.reasons["XLA flags"]
    assert Plan.from_json(on_pod.to_json()).flags == flags.TPU
    assert without.flags == {}
    assert "XLA flags" not in without.reasons


def test_a_plan_with_unknown_flags_runs_without_them_and_says_so():
    trace = traced()
    asked = {"xla_from_tomorrow": True}
    plan = lepton.plan(trace, lepton.topology("cpu:2"), mesh={"data": 2}, flags=asked)

    with pytest.warns(UserWarning, match="has no flag xla_from_tomorrow"):
        program = Program(trace, plan, jax.devices()[:2])

    assert program.lower().compile().as_text()


MODULE = """HloModule step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%fused (a: f32[8,8], b: f32[2,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[2,8]{1,0} parameter(1)
  %in = f32[8,8]{1,0} all-gather(%b), channel_id=3, replica_groups={{0,1,2,3}}, \
dimensions={0}
  ROOT %product = f32[8,8]{1,0} dot(%a, %in), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

ENTRY %main (p: f32[8,8], q: f32[2,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[2,8]{1,0} parameter(1)
  %early = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%q), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}
  %work = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  %late = f32[8,8]{1,0} all-gather-done(%early)
  %alone = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%q), channel_id=2, \
replica_groups={{0,1,2,3}}, dimensions={0}
  %waited = f32[8,8]{1,0} all-gather-done(%alone)
  %both = f32[8,8]{1,0} fusion(%work, %q), kind=kOutput, calls=%fused
  ROOT %sum = f32[8,8]{1,0} all-reduce(%both), channel_id=4, \
replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


HOSTS = """
HloModule hosts, is_scheduled=true

%put (s: bf16[4,8,8], x: bf16[1,8,8], i: s32[]) -> bf16[4,8,8] {
  %s = bf16[4,8,8]{2,1,0:S(5)} parameter(0)
  %x = bf16[1,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %made = bf16[4,8,8]{2,1,0:S(5)} dynamic-update-slice(%s, %x, %i, %i, %i)
}

%get (s: bf16[4,8,8], i: s32[]) -> bf16[1,8,8] {
  %s = bf16[4,8,8]{2,1,0:S(5)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %part = bf16[1,8,8]{2,1,0} dynamic-slice(%s, %i, %i, %i), \
dynamic_slice_sizes={1,8,8}
}

ENTRY %main (stack: bf16[4,8,8], x: bf16[1,8,8], i: s32[]) -> bf16[1,8,8] {
  %stack = bf16[4,8,8]{2,1,0:S(5)} parameter(0)
  %x = bf16[1,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %dynamic-update-slice-start = ((bf16[4,8,8]{2,1,0:S(5)}, bf16[1,8,8]{2,1,0}, s32[]), \
bf16[4,8,8]{2,1,0:S(5)}, u32[]{:S(2)}) async-start(%stack, %x, %i), calls=%put
  %work = bf16[1,8,8]{2,1,0} dot(%x, %x), lhs_batch_dims={0}, rhs_batch_dims={0}, \
lhs_contracting_dims={2}, rhs_contracting_dims={1}
  %dynamic-update-slice-done = bf16[4,8,8]{2,1,0:S(5)} \
async-done(%dynamic-update-slice-start)
  %dynamic-slice-start = ((bf16[4,8,8]{2,1,0:S(5)}, s32[]), bf16[1,8,8]{2,1,0}, \
u32[]{:S(2)}) async-start(%dynamic-update-slice-done, %i), calls=%get
  ROOT %dynamic-slice-done = bf16[1,8,8]{2,1,0} async-done(%dynamic-slice-start)
}
"""


def test_a_schedule_tells_which_copies_to_the_host_run_beside_products():
    found = {kind.kind: kind for kind in schedule(HOSTS)}

    assert set(found) == {TO_HOST, FROM_HOST}
    assert found[TO_HOST].bytes_beside == found[TO_HOST].bytes == 2 * 8 * 8
    assert found[FROM_HOST].bytes == 2 * 8 * 8
    assert found[FROM_HOST].beside == 0, "it is waited for at once"


def test_a_schedule_tells_what_runs_beside_products():
    gathers, sums = sorted(schedule(MODULE), key=lambda kind: kind.kind)

    assert (gathers.kind, gathers.count, gathers.beside) == ("all-gather", 3, 2)
    assert gathers.bytes_beside == pytest.approx(gathers.bytes * 2 / 3)
    assert (sums.kind, sums.beside) == ("all-reduce", 0)
