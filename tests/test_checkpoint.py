"""Retention, damage, mismatch; what restores where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import lepton_jax as lepton
from lepton_jax.checkpoint import Checkpoints, Damaged, _copy_and_checksum, _quoted, _unquoted
from lepton_jax.compat import make_mesh
from lepton_jax.monitor import read_events
from lepton_jax.restore import Reader

pytestmark = pytest.mark.usefixtures("quick_compilation")


def state_of(seed=0, rows=16):
    rng = np.random.default_rng(seed)
    return {"params": {"a.b/c": jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32),
                       "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
            "flags": jnp.array([True, False]), "step": jnp.int32(7), "key": jax.random.key(seed)}


def template_of(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def same(left, right):
    data = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b)), left, right)
    assert jax.tree.map(lambda x: x.dtype, left) == jax.tree.map(lambda x: x.dtype, right)


def test_round_trip_keeps_every_bit_and_the_record(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), state_of()
    checkpoints.save(7, state, {"position": {"samples": 5}})
    checkpoints.close()
    restored, record = Checkpoints(tmp_path).restore(7, template_of(state))
    same(restored, state)
    assert record == {"position": {"samples": 5}}


def test_restores_onto_other_devices(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), state_of()
    checkpoints.save(1, state, {})
    checkpoints.close()
    mesh = make_mesh({"data": 8}, jax.devices())
    template = template_of(state, NamedSharding(mesh, PartitionSpec()))
    template["params"]["a.b/c"] = jax.ShapeDtypeStruct(
        (16, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", None)))
    restored, _ = Checkpoints(tmp_path).restore(1, template)
    same(restored, state)
    assert restored["params"]["a.b/c"].addressable_shards[0].data.shape == (2, 3)


def test_the_saved_values_are_those_at_the_call(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), state_of(rows=100_000)
    expected = jax.tree.map(lambda x: x.copy(), state)
    checkpoints.save(1, state, {})
    jax.jit(lambda s: jax.tree.map(lambda x: x if x.dtype == state["key"].dtype else (x * 0).astype(x.dtype), s),
            donate_argnums=0)(state)
    checkpoints.close()
    same(Checkpoints(tmp_path).restore(1, template_of(expected))[0], expected)


def test_keeps_the_last_ones_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best="-loss")
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 4.0), 1):
        checkpoints.save(step, state_of(step), {}, {"loss": loss})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 4, 5]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_the_latest_readable_step_is_used_and_the_damaged_one_reported(damage, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    states = {step: state_of(step, rows=4000) for step in (1, 2)}
    for step, state in states.items():
        checkpoints.save(step, state, {})
    checkpoints.close()
    files = [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
    target = max((p for p in files if "record" not in p.parts), key=lambda p: p.stat().st_size)
    if damage == "record":
        target = next(p for p in files if "record" in p.parts and b"body" in p.read_bytes())
        target.write_bytes(target.read_bytes().replace(b"checksums", b"checksumz", 1))
    elif damage == "delete":
        target.unlink()
    else:
        content = bytearray(target.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content if damage == "flip" else content[:len(content) // 2])
    reported = []
    step, state, _ = Checkpoints(tmp_path).restore_latest(template_of(states[1]), lambda *what: reported.append(what))
    assert step == 1 and [s for s, _ in reported] == [2] and reported[0][1]
    same(state, states[1])
    with pytest.raises(Damaged, match="step 2"):
        Checkpoints(tmp_path).restore(2, template_of(states[1]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4 * 48 - 1), st.integers(0, 7))
def test_any_flipped_bit_changes_the_checksum(byte, bit):
    values = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    flipped = values.copy()
    flipped.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
    one, other = (int(_copy_and_checksum({"x": jnp.asarray(v)})[1]["x"]) for v in (values, flipped))
    assert one != other


@given(st.text(alphabet="ab./%", max_size=12), st.text(alphabet="ab./%", max_size=12))
def test_quoted_paths_come_back_and_never_collide(left, right):
    assert _unquoted(_quoted(left)) == left and "/" not in _quoted(left) and "." not in _quoted(left)
    assert (_quoted(left) == _quoted(right)) == (left == right)


def test_an_uncommitted_folder_is_not_the_latest(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), state_of()
    checkpoints.save(3, state, {})
    checkpoints.close()
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).restore_latest(template_of(state), lambda *what: pytest.fail(str(what)))[0] == 3


def test_a_damaged_run_resumes_from_the_step_before_and_says_so(blobs, tmp_path):
    make = lambda: lepton.Trainer(model=lambda rngs: lepton.models.MLP((12, 8, 3), rngs=rngs), train=blobs,  # noqa: E731
                                  loss=lepton.losses.cross_entropy, optimizer=optax.adam(1e-2), batch_size=30, steps=20,
                                  save_every=10, devices=1, run_dir=tmp_path / "run")
    expected = make().fit()["loss"]
    for path in (tmp_path / "run" / "checkpoints" / "20").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    trainer = make().resume()
    assert trainer.step == 10
    np.testing.assert_array_equal(trainer.fit()["loss"], expected[10:])
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [e["step"] for e in events if e["kind"] == "damaged"] == [20]
    assert Checkpoints(tmp_path / "run" / "checkpoints").restore(20, Reader(trainer.program).template())
    assert (tmp_path / "run" / "set_aside" / "20").is_dir(), "the damaged step is kept, not deleted"
