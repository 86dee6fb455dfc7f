"""Checkpoints: retention, damage, mismatch, folders of any name, failed saves."""

import errno
import os
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import lepton_jax as lepton
from lepton_jax.checkpoint.durable import (
    Checkpoints,
    Damaged,
    _copy_and_checksum,
    _quoted,
    _unquoted,
)
from lepton_jax.compat import make_mesh
from lepton_jax.errors import CheckpointError, writing_remedy
from lepton_jax.monitor import read_events
from lepton_jax.train.restore import Reader

pytestmark = pytest.mark.usefixtures("quick_compilation")


def state_of(seed=0, rows=16):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "a.b/c": jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32),
            "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        },
        "flags": jnp.array([True, False]),
        "step": jnp.int32(7),
        "key": jax.random.key(seed),
    }


def template_of(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding or x.sharding
        ),
        state,
    )


def same(left, right):
    def data(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(data(a), data(b)),
        left,
        right,
    )
    assert jax.tree.map(lambda x: x.dtype, left) == jax.tree.map(
        lambda x: x.dtype, right
    )


def test_round_trip_keeps_every_bit_and_the_record(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = state_of()
    checkpoints.save(
        7,
        state,
        {"position": {"samples": 5}},
    )
    checkpoints.close()
    restored, record = Checkpoints(tmp_path).restore(7, template_of(state))
    same(restored, state)
    assert record == {"position": {"samples": 5}}


def test_restores_onto_other_devices(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = state_of()
    checkpoints.save(1, state, {})
    checkpoints.close()
    mesh = make_mesh({"data": 8}, jax.devices())
    template = template_of(state, NamedSharding(mesh, PartitionSpec()))
    template["params"]["a.b/c"] = jax.ShapeDtypeStruct(
        (16, 3),
        jnp.float32,
        sharding=NamedSharding(mesh, PartitionSpec("data", None)),
    )
    restored, _ = Checkpoints(tmp_path).restore(1, template)
    same(restored, state)
    assert restored["params"]["a.b/c"].addressable_shards[0].data.shape == (2, 3)


def test_the_saved_values_are_those_at_the_call(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = state_of(rows=100_000)
    expected = jax.tree.map(lambda x: x.copy(), state)
    checkpoints.save(1, state, {})
    jax.jit(
        lambda s: jax.tree.map(
            lambda x: x if x.dtype == state["key"].dtype else (x * 0).astype(x.dtype), s
        ),
        donate_argnums=0,
    )(state)
    checkpoints.close()
    same(Checkpoints(tmp_path).restore(1, template_of(expected))[0], expected)


def test_keeps_the_last_ones_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best="-loss")
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 4.0), 1):
        checkpoints.save(
            step,
            state_of(step),
            {},
            {"loss": loss},
        )
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 4, 5]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_the_latest_readable_step_is_used_and_the_damaged_one_reported(
    damage, tmp_path
):
    checkpoints = Checkpoints(tmp_path)
    states = {step: state_of(step, rows=4000) for step in (1, 2)}
    for step, state in states.items():
        checkpoints.save(step, state, {})
    checkpoints.close()
    files = [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
    target = max(
        (p for p in files if "record" not in p.parts),
        key=lambda p: p.stat().st_size,
    )
    if damage == "record":
        target = next(
            p for p in files if "record" in p.parts and b"body" in p.read_bytes()
        )
        target.write_bytes(
            target.read_bytes().replace(
                b"checksums",
                b"checksumz",
                1,
            )
        )
    elif damage == "delete":
        target.unlink()
    else:
        content = bytearray(target.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(
            content if damage == "flip" else content[: len(content) // 2]
        )
    reported = []
    step, state, _ = Checkpoints(tmp_path).restore_latest(
        template_of(states[1]), lambda *what: reported.append(what)
    )
    assert step == 1
    assert [s for s, _ in reported] == [2]
    assert reported[0][1]
    same(state, states[1])
    with pytest.raises(Damaged, match="step 2"):
        Checkpoints(tmp_path).restore(2, template_of(states[1]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4 * 48 - 1), st.integers(0, 7))
def test_any_flipped_bit_changes_the_checksum(byte, bit):
    values = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    flipped = values.copy()
    flipped.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
    one, other = (
        int(_copy_and_checksum({"x": jnp.asarray(v)})[1]["x"])
        for v in (values, flipped)
    )
    assert one != other


@given(
    st.text(alphabet="ab./%", max_size=12),
    st.text(
        alphabet="ab./%",
        max_size=12,
    ),
)
def test_quoted_paths_come_back_and_never_collide(left, right):
    assert _unquoted(_quoted(left)) == left
    assert "/" not in _quoted(left)
    assert "." not in _quoted(left)
    assert (_quoted(left) == _quoted(right)) == (left == right)


def test_an_uncommitted_folder_is_not_the_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = state_of()
    checkpoints.save(3, state, {})
    checkpoints.close()
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    assert (
        Checkpoints(tmp_path).restore_latest(
            template_of(state), lambda *what: pytest.fail(str(what))
        )[0]
        == 3
    )


def test_a_damaged_run_resumes_from_the_step_before_and_says_so(blobs, tmp_path):
    def make():
        return lepton.Trainer(
            model=lambda rngs: lepton.models.MLP((12, 8, 3), rngs=rngs),
            train=blobs,
            loss=lepton.losses.cross_entropy,
            optimizer=optax.adam(1e-2),
            batch_size=30,
            steps=20,
            save_every=10,
            devices=1,
            run_dir=tmp_path / "run",
        )

    expected = make().fit()["loss"]
    for path in (tmp_path / "run" / "checkpoints" / "20").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    trainer = make().resume()
    assert trainer.step == 10
    np.testing.assert_array_equal(trainer.fit()["loss"], expected[10:])
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [e["step"] for e in events if e["kind"] == "damaged"] == [20]
    assert Checkpoints(tmp_path / "run" / "checkpoints").restore(
        20, Reader(trainer.program).template()
    )
    assert (tmp_path / "run" / "set_aside" / "20").is_dir(), (
        "the damaged step is kept, not deleted"
    )


# ---- folders of any name ----

NAMES = [
    "a#b",
    "a?b",
    "a|b",
    "50%b",
    "a%20b",
    "a b",
    "a:b",
    "a*b",
    'it\'s "so"',
    "größe 日本",
    "end.",
    "x" * 255,
    "[x]",
    "back\\slash",
    "two\nlines",
    "$HOME",
    "gs:",
    "{0}",
    "caf\udce9",
    "/".join(["deep" * 50] * 11),
]


@pytest.mark.parametrize(
    "name",
    NAMES,
    ids=range(len(NAMES)),
)
def test_a_folder_of_any_name_gives_back_what_was_saved(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / name / "checkpoints"
    checkpoints = Checkpoints(folder)
    states = {1: state_of(1), 2: state_of(2)}
    checkpoints.begin()
    for step, state in states.items():
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    reader = Checkpoints(folder)
    for step, state in states.items():
        restored, record = reader.restore(step, template_of(state))
        same(restored, state)
        assert record == {"step": step}
    reader.close()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoints"]
    assert not list(tmp_path.glob("lepton-*")), "the links are removed"


@pytest.mark.parametrize("name", ["r #1?", "[5e-1]|50%b"])
def test_a_run_in_a_folder_of_any_name_is_resumed_and_its_model_loaded(
    name, blobs, tmp_path
):
    def trainer(**changes):
        return lepton.Trainer(
            model=lambda rngs: lepton.models.MLP((12, 8, 3), rngs=rngs),
            train=blobs,
            loss=lepton.losses.cross_entropy,
            optimizer=optax.adam(1e-2),
            batch_size=30,
            devices=1,
            **changes,
        )

    plain = trainer(steps=3)
    plain.fit()
    run = {
        "run_dir": tmp_path / name,
        "local_dir": tmp_path / "local",
        "local_every": 0.0,
    }
    trainer(steps=2, **run).fit()
    resumed = trainer(steps=3, **run).resume()
    assert resumed.step == 2
    resumed.fit()
    saved = resumed.save(tmp_path / f"model {name}")
    resumed.save(saved)
    for folder in (tmp_path / name, saved):
        loaded = trainer().load(folder)
        assert loaded.step == 3
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get(loaded.state.params),
            jax.device_get(plain.state.params),
        )
    assert (tmp_path / name / "report.html").is_file()


def test_a_name_that_reads_as_a_pattern_finds_no_neighbours_files(tmp_path):
    """Orbax looks for its parts by a glob: `a*` matches `ab`, which saves meanwhile."""
    pattern = Checkpoints(tmp_path / "a*")
    neighbour = Checkpoints(tmp_path / "ab")
    states = state_of(1, rows=4000), state_of(2, rows=4000)
    for _ in range(3):
        neighbour.save(
            len(neighbour.steps()) + 1,
            states[1],
            {},
        )
        pattern.save(
            len(pattern.steps()) + 1,
            states[0],
            {},
        )
        neighbour.wait()
        pattern.wait()
    same(pattern.restore(3, template_of(states[0]))[0], states[0])
    same(neighbour.restore(3, template_of(states[1]))[0], states[1])
    pattern.close()
    neighbour.close()


def test_a_damaged_step_is_named_by_the_folder_and_not_by_the_link(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a#b")
    state = state_of()
    checkpoints.save(1, state, {})
    checkpoints.close()
    for file in (tmp_path / "a#b" / "1" / "state").rglob("manifest*"):
        file.write_bytes(b"")
    with pytest.raises(Damaged) as caught:
        checkpoints.restore(1, template_of(state))
    checkpoints.close()
    assert "lepton-" not in str(caught.value)


def test_what_cannot_be_saved_is_refused_before_the_first_step(
    blobs, tmp_path, monkeypatch
):
    def run(folder):
        trainer = lepton.Trainer(
            model=lambda rngs: lepton.models.MLP((12, 8, 3), rngs=rngs),
            train=blobs,
            devices=1,
            loss=lepton.losses.cross_entropy,
            optimizer=optax.sgd(1e-2),
            batch_size=30,
            steps=2,
            run_dir=folder,
        )
        with pytest.raises(CheckpointError) as caught:
            trainer.fit()
        assert trainer.step == 0
        assert not [
            e for e in read_events(folder / "events.jsonl") if e["kind"] == "steps"
        ]
        return caught.value

    # a file where the folder of checkpoints would be
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "checkpoints").write_text("")
    assert "move the file away" in run(tmp_path / "one").remedy

    # no link can be made to a folder that needs one
    (tmp_path / "tmp#").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp#"))
    error = run(tmp_path / "two?")
    assert "TMPDIR" in error.remedy
    assert error.where.endswith("two?/checkpoints")
    assert not list((tmp_path / "tmp#").iterdir())


def test_a_saved_model_that_cannot_be_read_back_leaves_the_older_one(
    blobs, tmp_path, monkeypatch
):
    trainer = lepton.Trainer(
        model=lambda rngs: lepton.models.MLP((12, 8, 3), rngs=rngs),
        train=blobs,
        devices=1,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(1e-2),
        batch_size=30,
        steps=1,
    )
    trainer.fit()
    saved = trainer.save(tmp_path / "model")
    wait = Checkpoints.wait

    def spoiled(self):
        wait(self)
        for file in self.folder.rglob("manifest*"):
            file.write_bytes(b"")

    trainer.fit(steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", spoiled)
        with pytest.raises(Damaged):
            trainer.save(saved)
    assert trainer.load(saved).step == 1


# ---- values of every kind ----


def test_complex_narrow_and_empty_arrays_come_back(tmp_path):
    values = np.random.default_rng(0)
    state = {
        "spectrum": jnp.asarray(
            values.normal(size=(4, 3)) + 1j * values.normal(size=(4, 3)), jnp.complex64
        ),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "float8": jnp.linspace(-2, 2, 9).astype(jnp.float8_e4m3fn),
        "none": jnp.zeros((0, 3)),
        "no_keys": jax.random.split(jax.random.key(0), 0),
        "one": jnp.ones(()),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.close()
    same(Checkpoints(tmp_path).restore(1, template_of(state))[0], state)


@pytest.mark.parametrize("part", ["real", "imag"])
def test_the_checksum_sees_both_parts_of_a_complex_number(part):
    values = np.zeros(3, np.complex64)
    before = int(_copy_and_checksum({"x": jnp.asarray(values)})[1]["x"])
    setattr(values, part, [0, 1, 0])
    assert int(_copy_and_checksum({"x": jnp.asarray(values)})[1]["x"]) != before


# ---- a save that fails ----


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "^free disk space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "^free disk space.*quota"),
        (OSError(errno.EFBIG, "File too large"), "^free disk space.*ulimit -f"),
        (PermissionError(errno.EACCES, "Permission denied"), "^let this user write"),
        (
            PermissionError(errno.EPERM, "Operation not permitted"),
            "^let this user write",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "mounted read-only"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "shorter"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory"),
            "moved or deleted",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error"), "disk repaired"),
        (
            ValueError(
                "RESOURCE_EXHAUSTED: ... Failed to write: No space left on device"
                " [os_error_code='28']"
            ),
            "^free disk space",
        ),
        (
            ValueError("PERMISSION_DENIED: ... Permission denied [os_error_code='13']"),
            "^let this user write",
        ),
        (
            ValueError(
                "INTERNAL: Error opening [OS error 30: EROFS Read-only file system]"
            ),
            "mounted read-only",
        ),
        (ValueError("Unsupported data type: uint4"), "^change what is to be stored"),
        (
            TypeError("Object of type Path is not JSON serializable"),
            "^change what is to be stored",
        ),
        (MemoryError(), "^free memory"),
        (
            RuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4096 bytes"
            ),
            "^free memory",
        ),
        (RuntimeError("anything else"), "^remove the cause"),
    ],
)
def test_the_remedy_is_that_of_the_cause(error, remedy):
    assert re.search(remedy, writing_remedy(error))
    assert ("disk space" in writing_remedy(error)) == ("disk space" in remedy)
    wrapped = RuntimeError("the save failed")
    wrapped.__cause__ = error
    if isinstance(error, OSError):
        assert writing_remedy(wrapped) == writing_remedy(error)


def test_a_record_that_is_no_plain_data_is_named_and_not_the_disk(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"Path.* is not JSON serializable"
    ) as caught:
        Checkpoints(tmp_path).save(
            1,
            state_of(),
            {"folder": Path("x")},
        )
    assert "disk" not in caught.value.remedy
    assert "no step is committed yet" in caught.value.what


def test_a_path_that_is_too_long_is_to_be_shortened(tmp_path):
    with pytest.raises(CheckpointError, match="File name too long") as caught:
        Checkpoints(tmp_path / ("x" * 256)).begin()
    assert "make the path shorter" in caught.value.remedy


def test_a_disk_that_is_mounted_read_only_is_said_so(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            "ro",
            "none",
            disk,
        ],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        with pytest.raises(CheckpointError) as caught:
            Checkpoints(disk / "c").save(1, state_of(), {})
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "mounted read-only" in caught.value.remedy
    assert "space" not in caught.value.remedy
    assert str(caught.value).count("can't be written") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_told_from_a_full_disk(tmp_path):
    (tmp_path / "c").mkdir()
    os.seteuid(12345)
    try:
        with pytest.raises(CheckpointError, match="Permission denied") as caught:
            Checkpoints(tmp_path / "c").begin()
    finally:
        os.seteuid(0)
    assert "let this user write there" in caught.value.remedy
