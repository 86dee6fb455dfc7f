"""Two processes read a folder onto one mesh, train, and write it.

    python -m tools.hub.hosts PORT NUMBER IN OUT

is one of them, and prints how many bytes of the tensors it read.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from lepton_jax.errors import SettingError
from tools.hub import checkpoints

PROCESSES = 2
DEVICES = 2  # of a process
MOST_SECONDS = 300
FLAGS = f"--xla_force_host_platform_device_count={DEVICES}"
FLAG = {"scaling": "llama3", "schema": "rope_parameters", "head_dim": 8, "groups": 4}


def look() -> dict[str, Any]:
    """Return which share of the tensors each process read, and what was written.

    Raises:
      SettingError: a process failed.
    """
    with tempfile.TemporaryDirectory() as place:
        came = Path(place) / "in"
        went = Path(place) / "out"
        checkpoints.write(checkpoints.Case("llama", FLAG, tied="tied"), came)
        answers = _run(came, went)
        before = load_file(came / "model.safetensors")
        after = load_file(went / "model.safetensors")
    total = sum(values.nbytes for values in before.values())
    same = before.keys() == after.keys() and all(
        before[name].tobytes() == after[name].tobytes() for name in before
    )
    shares = [answer["read"] / total for answer in answers]
    return {
        "bytes": total,
        "shares_read": shares,
        "same": same,
        "steps": [answer["step"] for answer in answers],
        "passes": same and max(shares) < 1 / PROCESSES + SMALL,
    }


SMALL = 0.05  # share of norms, which each device holds whole


def work(port: str, number: str, came: str, went: str) -> None:
    """Be one of the processes."""
    os.environ["XLA_FLAGS"] = FLAGS
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(number))
    import numpy as np
    import optax

    import lepton_jax as lepton
    from lepton_jax.hub import reading, shards

    read = []
    usual = reading.read

    def counted(opened: shards.Shards, *more: Any) -> Any:
        arrays = usual(opened, *more)
        read.append(opened.bytes_read)
        return arrays

    reading.read = counted
    folder = lepton.hub.open(came)
    text = np.stack([checkpoints.tokens_of(seed) for seed in range(16)])
    recipe = lepton.Recipe(
        model=folder.model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=1e-3,
        train=(text[:, :-1], text[:, 1:]),
        batch_size=8,
    )
    kept = jax.sharding.PartitionSpec("fsdp")
    pins = {"*kernel": kept, "*embedding": kept}
    mesh = {"fsdp": PROCESSES * DEVICES}
    plan = lepton.Trainer(recipe).plan(mesh=mesh, pins=pins)
    trainer = lepton.Trainer(recipe, plan=plan)
    folder.load_into(trainer)
    lepton.hub.save(trainer, went, like=folder)
    trainer.fit(steps=2)
    print(json.dumps({"read": sum(read), "step": trainer.step}))


def _run(came: Path, went: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tools.hub.hosts", port]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(came), str(went)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    answers = []
    for process in processes:
        out, told = process.communicate(timeout=MOST_SECONDS)
        if process.returncode:
            raise SettingError(
                f"a process failed: {told.strip().splitlines()[-1]}",
                where="tools.hub hosts",
                remedy="see the message",
            )
        answers.append(json.loads(out.strip().splitlines()[-1]))
    return answers


if __name__ == "__main__":
    work(*sys.argv[1:])
