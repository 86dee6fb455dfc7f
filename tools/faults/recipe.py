"""The recipe that `tools.faults` trains, and the faults that it makes come true.

It predicts next tokens of three filtered, mixed and packed sources. A fault is made
inside the training process, at an exact place: when it enters a phase at a step.
$LEPTON_FAULTS names a file with a list of faults, {"kind", "host", "phase", "step",
"generation", "seconds"}. Each happens once in a run, whatever is restarted, unless it
says "always".
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
from typing import Any, Literal

import numpy as np
import optax
from flax import nnx

from lepton_jax import Recipe, controllers, losses, metrics, models
from lepton_jax.data import Source, mix, sequential
from lepton_jax.hosts import phase
from lepton_jax.launch.supervise import watchdog
from lepton_jax.step import optimizers

TOKENS = 64  # different ones
LENGTH = 16  # of a sample, where no setting says otherwise
TEST_TOKENS = 96 * LENGTH
HEADS = 4  # of attention
STALL_SECONDS = 3600  # longer than any limit
CUT_SECONDS = 5  # in which the campaign must have cut a link
POLL = 0.005  # seconds between two looks for that


class NextToken(nnx.Module):
    """An embedding and two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(TOKENS, 32, rngs=rngs)
        self.hidden = nnx.Linear(32, 64, rngs=rngs)
        self.out = nnx.Linear(64, TOKENS, rngs=rngs)

    def __call__(self, tokens):
        """Map tokens (batch, length) to logits (batch, length, TOKENS)."""
        return self.out(nnx.relu(self.hidden(self.embed(tokens))))


def recipe(
    steps: int = 60,
    batch_size: int = 24,
    layers: int = 0,
    width: int = 32,
    length: int = LENGTH,
    experts: int = 0,
    precision: str = "float32",
    optimizer: Literal["adam", "muon"] = "adam",
    learning_rate: float = 0.01,
    steered: bool = False,
) -> Recipe:
    """A tiny next-token model on documents.

    There are three sources, of which one is filtered; they are mixed 5:3:2 and packed
    to samples of one length.

    Args:
      steps: length of the run.
      batch_size: samples of a step.
      layers: of a Transformer, in a loop; 0: the model has no such layers.
      width: of a layer; half of its feed-forward's.
      length: of a sample, in tokens.
      experts: of each layer, none of which drops a token; 0: layers have none.
      precision: as in `Recipe`.
      optimizer: Adam for all, or Muon for the kernels of the layers.
      learning_rate: of the optimizer.
      steered: let `controllers.adaptive` and `controllers.guard` steer the run.
    """
    rng = np.random.default_rng(7)
    sources = {
        "a": _documents(rng, 150),
        "b": _documents(rng, 90),
        "c": _documents(rng, 70),
    }
    sources["b"] = sources["b"].filter(lambda tokens: len(tokens) % 3 != 0)
    train = mix(sources, weights={"a": 5, "b": 3, "c": 2}).pack(length)
    test = (TEST_TOKENS // length, length)
    inputs = rng.integers(0, TOKENS, size=test).astype(np.int32)
    targets = rng.integers(0, TOKENS, size=test).astype(np.int32)
    return Recipe(
        model=_model(layers, width, experts),
        loss=LOSS,
        optimizer=_optimizer(optimizer),
        learning_rate=learning_rate,
        train=train,
        test=(inputs, targets),
        batch_size=batch_size,
        steps=steps,
        steps_per_call=1,
        evaluate_every=20,
        save_every=10,
        keep=4,
        shuffle=True,
        seed=3,
        metrics={"accuracy": metrics.accuracy},
        precision=precision,
        controller=(controllers.adaptive(), controllers.guard()) if steered else (),
        name="faults",
    )


def _model(layers: int, width: int, experts: int) -> Any:
    if not layers:
        return NextToken
    sizes = {"dim": width, "layers": layers, "heads": HEADS, "hidden": 2 * width}
    if experts:
        sizes |= {"experts": experts, "capacity": None}
    kind = models.MoELM if experts else models.TransformerLM
    return partial(kind, TOKENS, loop="scan", **sizes)


def _optimizer(name: str) -> Any:
    if name == "adam":
        return optax.adam
    muon = partial(optimizers.muon, consistent_rms=0.2)
    return optimizers.by_part({"blocks/*/kernel": muon}, default=optax.adam)


def _documents(
    rng: np.random.Generator,
    count: int,
) -> Source:
    documents = []
    for _ in range(count):
        length = rng.integers(5, 40)
        documents.append(rng.integers(0, TOKENS, size=length))
    return Source(documents)


# ---- the faults ----


class Agent:
    """Makes the faults of a file come true in this process.

    Args:
      file: with the faults.
      told: which host this process is, in which generation.
    """

    def __init__(
        self,
        file: Path,
        told: watchdog.Assignment,
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
        # the training loop reports where it is by these two: look then
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
        """Take the place of `phase.reached`."""
        self._reached(step, done, phase)
        if step is not None and not self._stepped:
            self._stepped = True
            self.note(f"stepped.{self.generation}.{self.host}", step=step)
        self.look()

    @contextlib.contextmanager
    def entered(self, name: str):
        """Take the place of `phase.phase`."""
        with self._phase(name):
            self.look()
            yield

    def look(self) -> None:
        """Make the faults come true that belong here."""
        at = phase.where()
        for i, fault in self.faults:
            if fault["phase"] == "reading":  # see `_spoil_data`
                continue
            here = at.phase == fault["phase"] and at.step >= fault.get("step", 0)
            if here and (self.note(f"fired.{i}") or fault.get("always")):
                name = fault["kind"].replace("-", "_")
                getattr(self, f"_do_{name}")(fault)

    def note(self, name: str, **more: Any) -> bool:
        """Write down that something happened now; return False if it had already."""
        record = {
            "time": time.time(),
            "host": self.host,
            "generation": self.generation,
            **more,
        }
        try:
            with open(f"{self.file}.{name}", "x") as file:
                json.dump(record, file)
        except FileExistsError:
            return False
        return True

    def _do_kill(self, fault: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _do_stop(self, fault: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _do_abort(self, fault: dict[str, Any]) -> None:
        os.abort()

    def _do_exit(self, fault: dict[str, Any]) -> None:
        os._exit(3)

    def _do_raise(self, fault: dict[str, Any]) -> None:
        raise RuntimeError("a fault of the program's own")

    def _do_stall(self, fault: dict[str, Any]) -> None:
        time.sleep(STALL_SECONDS)

    def _do_pause(self, fault: dict[str, Any]) -> None:
        time.sleep(fault["seconds"])

    def _do_freeze(self, fault: dict[str, Any]) -> None:
        # takes for ever, and holds the interpreter's lock
        re.match(r"(a|aa)+$", "a" * 200 + "b")

    def _do_sigterm(self, fault: dict[str, Any]) -> None:
        os.kill(os.getppid(), signal.SIGTERM)

    def _do_sigterm_worker(self, fault: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _do_supervisor(self, fault: dict[str, Any]) -> None:
        os.kill(os.getppid(), signal.SIGKILL)

    def _do_clock(self, fault: dict[str, Any]) -> None:
        real = time.time
        time.time = lambda: real() + fault.get("seconds", 86400.0)

    def _do_network(self, fault: dict[str, Any]) -> None:
        """Wait until the campaign has cut the link of this host, and go on then."""
        number = next(i for i, other in self.faults if other is fault)
        cut = Path(f"{self.file}.cut.{number}")
        until = time.monotonic() + CUT_SECONDS
        while not cut.exists() and time.monotonic() < until:
            time.sleep(POLL)

    def _do_disk(self, fault: dict[str, Any]) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def _do_damage(self, fault: dict[str, Any]) -> None:
        """Damage the newest checkpoint.

        A "bit" of its largest file is flipped, it is "truncate"d or "delete"d, or the
        larger "half" of all files is deleted.
        """
        checkpoints = Path(watchdog.begin().run_dir) / "checkpoints"
        steps = [path for path in checkpoints.iterdir() if path.name.isdigit()]
        newest = max(steps, key=lambda path: int(path.name))
        files = [path for path in (newest / "state").rglob("*") if path.is_file()]
        files.sort(key=lambda path: path.stat().st_size)
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
        """Let this host's samples of a step and later be unreadable, or no tokens."""
        spoiled = [
            (i, fault) for i, fault in self.faults if fault["phase"] == "reading"
        ]
        read = sequential.SequentialBlocks._read

        def spoil(sequence: Any, batches: Any, hints: Any) -> Any:
            reached = batches[-1].before // sequence.batch_size + 1
            for i, fault in spoiled:
                if reached >= fault["step"] and self.note(f"fired.{i}"):
                    if fault["kind"] == "no-data":
                        raise OSError("a shard of the data can't be read")
                    sequence.share.put = partial(_none, sequence.share.put)
            return read(sequence, batches, hints)

        sequential.SequentialBlocks._read = spoil


def _none(put: Any, rows: Any) -> Any:
    return put(np.full_like(rows, TOKENS + 5))


def _loss() -> Any:
    """Return the loss; another one on a host whose program has to differ."""
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
