from __future__ import annotations

import sys

import pytest

from lepton_jax.errors import LeptonError
from lepton_jax.monitor import Monitor, TensorBoard


def read(folder):
    """Read the files of TensorBoard.

    Returns:
      (tag, step) to value, and the steps from which earlier files are to be forgotten.
    """
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    purged = []
    for path in sorted(folder.glob("events.out*")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16  # a record is length (8), checksum (4), data, checksum (4)
            if event.HasField("session_log"):
                purged.append(event.step)
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
    return scalars, purged


def test_scalars_lie_at_their_steps(tmp_path):
    pytest.importorskip("tensorboardX")
    monitor = Monitor(None, [TensorBoard(tmp_path)])
    monitor.event("start", step=4)
    monitor.event(
        "steps",
        first=5,
        last=6,
        seconds=0.5,
        data_wait=0.125,
        records={"loss": [3.0, 2.0], "name": ["x"]},
    )
    monitor.event(
        "evaluation",
        step=6,
        metrics={"accuracy": 0.75},
    )
    monitor.event("end")
    monitor.close()
    scalars, purged = read(tmp_path)
    assert scalars == {
        ("train/loss", 5): 3.0,
        ("train/loss", 6): 2.0,
        ("evaluation/accuracy", 6): 0.75,
        ("time/step_seconds", 6): 0.25,
        ("time/data_wait", 6): 0.25,
    }
    assert purged == [5]


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(LeptonError, match=r"pip install 'lepton-jax\[tensorboard\]'"):
        TensorBoard(tmp_path)
