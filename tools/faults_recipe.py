"""What `tools/faults.py` trains: next tokens of three filtered, mixed and packed
sources; and faults, where it is told so.

A fault is made inside the training process, at an exact place: when it enters a phase
at a step. $LEPTON_FAULTS names a file with a list of faults, {"kind", "host", "phase",
"step", "generation", "seconds"}; each happens once in a run, whatever is restarted,
unless it says "always".
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

from lepton_jax import Recipe, losses, metrics
from lepton_jax.data import Source, mix, sequential
from lepton_jax.hosts import phase
from lepton_jax.launch import watchdog

TOKENS = 64
LENGTH = 16


class NextToken(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(TOKENS, 32, rngs=rngs)
        self.hidden = nnx.Linear(32, 64, rngs=rngs)
        self.out = nnx.Linear(64, TOKENS, rngs=rngs)

    def __call__(self, tokens):
        return self.out(nnx.relu(self.hidden(self.embed(tokens))))


def recipe(steps: int = 60, batch_size: int = 24) -> Recipe:
    """A tiny next-token model on three sources of documents: filtered, mixed 5:3:2,
    packed to 16 tokens.
    """
    rng = np.random.default_rng(7)
    sources = {
        name: Source(
            [rng.integers(0, TOKENS, size=rng.integers(5, 40)) for _ in range(count)]
        )
        for name, count in (("a", 150), ("b", 90), ("c", 70))
    }
    sources["b"] = sources["b"].filter(lambda tokens: len(tokens) % 3 != 0)
    train = mix(sources, weights={"a": 5, "b": 3, "c": 2}).pack(LENGTH)
    test = tuple(
        rng.integers(0, TOKENS, size=(96, LENGTH)).astype(np.int32) for _ in range(2)
    )
    return Recipe(
        model=NextToken,
        loss=LOSS,
        optimizer=optax.adam,
        learning_rate=0.01,
        train=train,
        test=test,
        batch_size=batch_size,
        steps=steps,
        steps_per_call=1,
        evaluate_every=20,
        save_every=10,
        keep=4,
        shuffle=True,
        seed=3,
        metrics={"accuracy": metrics.accuracy},
        name="faults",
    )


# ---- the faults ----


class Agent:
    """Makes the faults of a file come true in this process, which trains as some host
    in some attempt.
    """

    def __init__(
        self,
        file: Path,
        told: watchdog.Told,
    ):
        self.file = file
        self.host = told.host_id
        self.generation = told.generation
        self.faults = [
            (i, fault)
            for i, fault in enumerate(json.loads(file.read_text()))
            if fault.get("host", 0) == self.host
            and fault.get("generation", 1) <= self.generation
        ]
        self._stepped = False
        self._reached = phase.reached
        self._phase = phase.phase
        phase.reached = self.reached
        phase.phase = self.entered
        self._spoil_data()
        self.look()

    def reached(
        self,
        step: int | None = None,
        done: int | None = None,
        phase: str | None = None,
    ) -> None:
        self._reached(step, done, phase)
        if step is not None and not self._stepped:
            self._stepped = True
            self.note(f"stepped.{self.generation}.{self.host}", step=step)
        self.look()

    @contextlib.contextmanager
    def entered(self, name: str):
        with self._phase(name):
            self.look()
            yield

    def look(self) -> None:
        at = phase.where()
        for i, fault in self.faults:
            if fault["phase"] == "reading":
                continue
            here = at.phase == fault["phase"] and at.step >= fault.get("step", 0)
            if here and (self.note(f"fired.{i}") or fault.get("always")):
                getattr(self, "do_" + fault["kind"].replace("-", "_"))(fault)

    def note(
        self,
        name: str,
        **what: Any,
    ) -> bool:
        """Write down that something happened now; False if it had already."""
        try:
            with open(f"{self.file}.{name}", "x") as file:
                json.dump(
                    {
                        "time": time.time(),
                        "host": self.host,
                        "generation": self.generation,
                        **what,
                    },
                    file,
                )
        except FileExistsError:
            return False
        return True

    def do_kill(self, fault: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_stop(self, fault: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def do_abort(self, fault: dict[str, Any]) -> None:
        os.abort()

    def do_exit(self, fault: dict[str, Any]) -> None:
        os._exit(3)

    def do_raise(self, fault: dict[str, Any]) -> None:
        raise RuntimeError("a fault of the program's own")

    def do_stall(self, fault: dict[str, Any]) -> None:
        time.sleep(3600)

    def do_freeze(self, fault: dict[str, Any]) -> None:
        # takes for ever, and holds the interpreter's lock
        re.match(r"(a|aa)+$", "a" * 200 + "b")

    def do_sigterm(self, fault: dict[str, Any]) -> None:
        os.kill(os.getppid(), signal.SIGTERM)

    def do_sigterm_worker(self, fault: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def do_supervisor(self, fault: dict[str, Any]) -> None:
        os.kill(os.getppid(), signal.SIGKILL)

    def do_clock(self, fault: dict[str, Any]) -> None:
        real = time.time
        time.time = lambda: real() + fault.get("seconds", 86400.0)

    def do_network(self, fault: dict[str, Any]) -> None:
        """The campaign cuts the link of this host; not sooner than that it goes on."""
        number = next(i for i, each in self.faults if each is fault)
        until = time.monotonic() + 5
        while (
            not os.path.exists(f"{self.file}.cut.{number}") and time.monotonic() < until
        ):
            time.sleep(0.005)

    def do_disk(self, fault: dict[str, Any]) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def do_damage(self, fault: dict[str, Any]) -> None:
        """To the newest checkpoint: a "bit" of its largest file flips, it is
        "truncate"d or "delete"d, or "half" are gone.
        """
        checkpoints = Path(watchdog.begin().run_dir) / "checkpoints"
        newest = max(
            (p for p in checkpoints.iterdir() if p.name.isdigit()),
            key=lambda p: int(p.name),
        )
        files = sorted(
            (p for p in (newest / "state").rglob("*") if p.is_file()),
            key=lambda p: p.stat().st_size,
        )
        how = fault["how"]
        victim = files[-1]
        if how == "bit":
            data = bytearray(victim.read_bytes())
            data[len(data) // 2] ^= 4
            victim.write_bytes(data)
        elif how == "truncate":
            os.truncate(victim, victim.stat().st_size // 2)
        elif how == "delete":
            victim.unlink()
        else:
            for file in files[len(files) // 2 :]:
                file.unlink()

    def _spoil_data(self) -> None:
        """Of the samples of a step and later, this host's can't be read, or are no
        tokens.
        """
        spoiled = [
            (i, fault) for i, fault in self.faults if fault["phase"] == "reading"
        ]
        read = sequential.SequentialBlocks.__getitem__

        def spoil(sequence: Any, index: Any) -> Any:
            reached = sequence.consumed // sequence.batch_size + sequence.steps
            for i, fault in spoiled:
                if reached >= fault["step"] and self.note(f"fired.{i}"):
                    if fault["kind"] == "no-data":
                        raise OSError("a shard of the data can't be read")
                    sequence.share.put = partial(_none, sequence.share.put)
            return read(sequence, index)

        sequential.SequentialBlocks.__getitem__ = spoil


def _none(put: Any, rows: Any) -> Any:
    return put(np.full_like(rows, TOKENS + 5))


def _loss() -> Any:
    """The loss; another one on the host that is told to differ."""
    file = os.environ.get("LEPTON_FAULTS")
    told = watchdog.begin()
    if file is None or told is None:
        return losses.cross_entropy
    Agent(Path(file), told)
    different = [
        f
        for f in json.loads(Path(file).read_text())
        if f["kind"] == "program" and f["host"] == told.host_id
    ]
    if not different:
        return losses.cross_entropy
    return lambda outputs, targets: losses.cross_entropy(outputs, targets) * 1.25


LOSS = _loss()
