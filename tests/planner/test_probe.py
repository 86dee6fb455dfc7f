"""The probe: XLA's account of a step before its code is generated."""

import dataclasses
import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.errors import PlanError
from lepton_jax.hardware import topology
from lepton_jax.models import MLP, TransformerLM
from lepton_jax.planner import ahead, plan, trace
from lepton_jax.planner.probe import early, kept
from lepton_jax.train.program import Program
from lepton_jax.verify import comparison
from lepton_jax.verify.comparison import prove
from lepton_jax.verify.probing import corrected, probe

EIGHT = topology("cpu:8")
VMEM = 2**27  # a chip's memory of its own, which XLA counts in the figure it ends with
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiles for a TPU that is not there",
)


def language_model():
    recipe = lepton.Recipe(
        model=lambda rngs: TransformerLM(
            128, dim=64, layers=4, heads=4, loop="scan", rngs=rngs
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=32,
    )
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    return trace(recipe, tokens, tokens)


def network(batch_size):
    recipe = lepton.Recipe(
        model=lambda rngs: MLP((256, 512, 512, 10), rngs=rngs),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=batch_size,
    )
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32)
    return trace(recipe, x, jax.ShapeDtypeStruct((1,), jnp.int32))


@pytest.fixture(scope="module")
def traced():
    return language_model()


@pytest.fixture(scope="module")
def planned(traced):
    return plan(traced, EIGHT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="module")
def probed(traced, planned, folder):
    return probe(traced, planned, cache=folder)


def test_the_account_is_that_of_the_compiled_step(traced, planned, probed):
    whole = probe(traced, planned, whole=True)

    assert whole.whole
    assert not probed.whole
    assert probed.memory == replace(whole.memory, code=0)
    assert probed.peak == whole.peak <= probed.bound
    assert probed.fits


def test_a_second_probe_asks_no_compiler(traced, planned, probed, folder, monkeypatch):
    monkeypatch.setattr(early, "memory", None)
    again = probe(traced, planned, cache=folder)

    assert again.remembered
    assert again.memory == probed.memory
    assert "earlier" in str(again)


def test_another_plan_is_another_file(traced, planned, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        early, "memory", lambda *_: asked.append(1) or ahead.Memory(1, 2, 1, 1, 0)
    )
    other = probe(traced, replace(planned, remat="full"), cache=folder)

    assert asked
    assert other.memory.peak == 3


def test_a_damaged_file_is_read_anew(tmp_path):
    account = kept.Account(ahead.Memory(4, 3, 2, 1, 0), None, True)
    file = tmp_path / "new" / "a.json"
    kept.write(file, account)
    assert kept.read(file) == account
    file.write_text(file.read_text()[:-9])
    assert kept.read(file) is None


def test_a_compiler_that_stops_is_an_error(traced, planned, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text("raise SystemExit('F1129 Check failed')")
    monkeypatch.setattr(early, "CHILD", script)
    with pytest.raises(PlanError, match="Check failed") as error:
        probe(traced, planned)
    assert "--whole" in error.value.remedy


def test_a_program_that_compiles_too_long_is_stopped(traced, planned):
    devices = ahead.mesh_devices(EIGHT, planned.mesh, ahead.devices_for(EIGHT))
    lowered = Program(traced, planned, devices).lower()
    with pytest.raises(TimeoutError, match="compiles for more"):
        early.finished(lowered, list(devices.flat), 0.01)
    memory = early.finished(lowered, list(devices.flat), 300)
    assert memory.peak == ahead.compile_for(lowered)[1].peak


def test_a_refused_program_says_what_it_needs():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory"
        " space hbm. Used 20.10G of 15.75G hbm.\nand more"
    )
    with pytest.raises(ahead.TooLarge) as error:
        early._ended({"error": message})
    assert error.value.needed == pytest.approx(20.1 * 2**30)
    with pytest.raises(PlanError, match="INTERNAL: what"):
        early._ended({"error": "INTERNAL: what\nmore"})


def test_prove_passes_over_what_xla_refuses(traced, planned, monkeypatch):
    lean = replace(planned, remat="full")
    answers = {
        "none": ahead.too_large("RESOURCE_EXHAUSTED: Used 9.00G of 8.00G hbm."),
        "full": ahead.Memory(planned.memory // 4, planned.memory // 4, 0, 0, 0),
    }

    def account(lowered, devices):
        answer = answers["none" if account.first else "full"]
        account.first = False
        if isinstance(answer, Exception):
            raise answer
        return answer

    account.first = True
    monkeypatch.setattr(early, "memory", account)
    monkeypatch.setattr(
        comparison,
        "candidates",
        lambda *_, **__: [replace(planned, remat="none"), lean],
    )
    chosen, (first, second) = prove(traced, EIGHT, 2)

    assert not first.fits
    assert second.fits
    assert chosen.remat == "full"
    assert chosen.peak == pytest.approx(second.peak, rel=1e-6)
    assert second.predicted == lean.peak
    assert "passed over" in chosen.notes[-1]
    assert "9.0 GiB" in chosen.notes[-1]


def test_a_corrected_plan_keeps_the_bytes_of_its_state(planned, probed):
    found = dataclasses.replace(probed, peak=2.0 * planned.peak)
    plan = corrected(planned, found)

    assert plan.peak == pytest.approx(2 * planned.peak, rel=1e-6)
    assert plan.bytes_per_device["params"] == planned.bytes_per_device["params"]


@needs_libtpu
def test_the_places_on_a_tpu_are_those_of_the_compiled_step():
    traced = network(1024)
    planned = plan(traced, topology("v5e:2x2"))
    found = probe(traced, planned)
    whole = probe(traced, planned, whole=True)

    assert found.memory.arguments == whole.memory.arguments
    assert abs(whole.peak - found.peak) < VMEM


@needs_libtpu
def test_the_placed_program_is_the_compiled_one():
    traced = network(1024)
    planned = replace(plan(traced, topology("v5e:2x2")), steps_per_call=1)
    found = comparison.verify(traced, planned)
    whole = comparison.verify(traced, planned, whole=True)

    assert found.rows == whole.rows
    assert found.flops == whole.flops
    assert found.unexpected == whole.unexpected


@needs_libtpu
def test_a_tpus_refusal_is_told():
    traced = network(2**27)
    planned = plan(network(2**10), topology("v5e:2x2"))
    found = probe(traced, replace(planned, batch_size=2**27))

    assert not found.fits
    assert found.peak > planned.memory
    assert "not fit" in str(found).lower()
