"""Training samples a second of Lepton's whole `fit`, and of other frameworks.

    python -m tools.bench peers --python PEERS/bin/python

All train the same model on the same synthetic arrays, with the same batch, in float32,
with Adam (language models: AdamW), on the CPU:

  lepton    `Trainer.fit` as it comes (see `step.py`), in this process
  eager     PyTorch, a loop of its users; images in the faster of two layouts
  compiled  the same with `torch.compile` over model and loss; it needs a C++ compiler
  keras     `model.fit` of Keras on JAX

PyTorch and Keras run in processes of their own (`benchmarks/peers/speed_*.py`), with
the interpreter of `--python`, which wait while it is not their turn. A slice of each
comes after the other, in an order that rotates from round to round; ratios are taken
within a round (`timing.py`). Above 1, Lepton is the faster one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax.errors import SettingError
from lepton_jax.models.transformer import usual_hidden
from tools.bench import options as checks
from tools.bench import step
from tools.bench.timing import (
    Run,
    spread,
    spread_of_ratios,
    steps_of_slice,
    time_in_rounds,
)

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
COMPILERS = ("g++", "clang++", "c++")
SEED = 0
RATE = 1e-3

# program and form of each peer
PEERS = {
    "eager": ("speed_torch.py", "eager"),
    "compiled": ("speed_torch.py", "compiled"),
    "keras": ("speed_keras.py", ""),
}

TEXT = {"vocab": 10_000, "length": 64}
ENCODER = {**TEXT, "dim": 128, "layers": 2, "heads": 4}
TABLE = {
    "edges": np.linspace(-2, 2, 17).repeat(8).reshape(17, 8).T.tolist(),
    "sizes": [10, 10, 20, 20, 50, 50],
    "embedding": 8,
}
TOWERS = {"users": 6000, "items": 4000, "dim": 64}
LM = {"vocab": 256, "length": 256, "dim": 256, "layers": 4, "heads": 4}
LM_10M = {**LM, "dim": 384, "layers": 6, "heads": 6}


@dataclass(frozen=True)
class Case:
    """A model and its data, of one size in all frameworks.

    Attributes:
      model: of the zoo; takes `rngs`.
      data: makes (inputs, targets); inputs are an array, or several by name.
      batch_size: samples a step.
      spec: sizes, for the peers.
      loss: Lepton's.
      peers: names of those that have the model.
      optimizer: a function of the learning rate.
    """

    model: Callable[..., Any]
    data: Callable[[], tuple[Any, np.ndarray]]
    batch_size: int
    spec: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable = lepton.losses.cross_entropy
    peers: tuple[str, ...] = tuple(PEERS)
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adam


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Random words, none of them padding, int32 (samples, length), in two classes."""
    random = np.random.default_rng(SEED)
    words = random.integers(1, TEXT["vocab"], (4096, TEXT["length"]), np.int32)
    return words, random.integers(0, 2, len(words), np.int32)


def ratings() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random users and items, int32 (samples,), and ratings, float32."""
    random = np.random.default_rng(SEED)
    rows = 200_000
    pairs = {
        "user": random.integers(0, TOWERS["users"], rows, np.int32),
        "item": random.integers(0, TOWERS["items"], rows, np.int32),
    }
    return pairs, random.standard_normal(rows, np.float32)


def table() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random numbers, float32 (rows, 8), and categories, int32 (rows, 6)."""
    random = np.random.default_rng(SEED)
    rows = 32_768
    sizes = np.asarray(TABLE["sizes"])
    columns = {
        "numbers": random.standard_normal((rows, 8), np.float32),
        "categories": random.integers(0, sizes, (rows, 6)).astype(np.int32),
    }
    return columns, random.integers(0, 2, rows, np.int32)


def _language_model(sizes: Mapping[str, Any]) -> Case:
    """Return the case of a Transformer of these sizes, on random bytes."""
    dim, layers, heads = (sizes[name] for name in ("dim", "layers", "heads"))
    model = partial(
        lepton.models.TransformerLM,
        sizes["vocab"],
        dim=dim,
        layers=layers,
        heads=heads,
    )
    return Case(
        model,
        step.CASES["lm"].data,
        8,
        {
            **sizes,
            "model": "lm",
            "kv_heads": heads,
            "hidden": usual_hidden(dim),
            "precision": "float32",
            "tied": False,
            "theta": 10_000.0,
        },
        peers=("eager", "compiled"),
        optimizer=optax.adamw,
    )


CASES = {
    "mlp": Case(
        partial(lepton.models.MLP, (784, 128, 10)),
        partial(step.images, 60_000, 784),
        256,
    ),
    "cnn": Case(
        partial(lepton.models.CNN, 10),
        partial(step.images, 12_800, 28, 28, 1),
        128,
    ),
    "lstm": Case(
        partial(lepton.models.LSTM, TEXT["vocab"], 2, dim=64, hidden=128),
        texts,
        128,
        {**TEXT, "dim": 64, "hidden": 128},
    ),
    "encoder": Case(
        partial(
            lepton.models.TextEncoder,
            2,
            TEXT["vocab"],
            dim=ENCODER["dim"],
            layers=ENCODER["layers"],
            heads=ENCODER["heads"],
            positions="learned",
            length=ENCODER["length"],
            dropout=0.0,
        ),
        texts,
        64,
        ENCODER,
    ),
    "lm": _language_model(LM),
    "lm-10m": _language_model(LM_10M),
    "two_tower": Case(
        partial(lepton.models.TwoTower, TOWERS["users"], TOWERS["items"]),
        ratings,
        1024,
        TOWERS,
        loss=optax.squared_error,
    ),
    "table_mlp": Case(
        partial(
            lepton.models.TabularMLP,
            2,
            edges=TABLE["edges"],
            sizes=TABLE["sizes"],
            embedding=TABLE["embedding"],
        ),
        table,
        256,
        TABLE,
    ),
}


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `peers` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "peers",
        __doc__,
        "training samples a second, against PyTorch and Keras",
    )
    checks.add_timing(parser, rounds=5, seconds=2.0)
    parser.add_argument(
        "--python",
        required=True,
        metavar="PATH",
        help="interpreter with PyTorch and Keras (benchmarks/peers/requirements.txt)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=list(PEERS),
        metavar="PEER",
        help=f"of {', '.join(PEERS)}",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the cases asked for, and print a line for each as it ends.

    Raises:
      SettingError: no such case or peer, or a peer that does not start.
    """
    checks.check_positive(options, "rounds", "seconds")
    checks.check_names(options.only, CASES, "--only", "case")
    checks.check_names(options.peers, PEERS, "--peers", "peer")
    results = []
    peers = list(dict.fromkeys(options.peers))
    if "compiled" in peers and not any(map(shutil.which, COMPILERS)):
        peers.remove("compiled")
        print("without torch.compile: there is no C++ compiler")
    for name in dict.fromkeys(options.only):
        measured = measure(name, options, peers)
        results.append(measured)
        print(_line(measured), flush=True)
    print(
        "samples a second: median of the rounds; ratios of lepton to each peer within a"
        " round: median (least-greatest); best: to the fastest peer of each round"
    )
    return results


def measure(
    name: str,
    options: argparse.Namespace,
    wanted: list[str],
) -> dict[str, Any]:
    """Measure one case.

    Returns:
      Milliseconds a step of each contender, and how much faster Lepton is.
    """
    case = CASES[name]
    inputs, targets = case.data()
    names = [peer for peer in wanted if peer in case.peers]
    peers: dict[str, _Peer] = {}
    with contextlib.ExitStack() as stack:
        for peer in names:
            process = _Peer(name, peer, options.python, inputs, targets)
            peers[peer] = stack.enter_context(process)
        runs: dict[str, Run] = {peer: own.run for peer, own in peers.items()}
        trainer, runs["lepton"] = stack.enter_context(_lepton(case, inputs, targets))
        multiples = dict.fromkeys(runs, 1)
        multiples["lepton"] = trainer.plan().steps_per_call
        steps = {
            who: steps_of_slice(run, options.seconds, multiples[who])
            for who, run in runs.items()
        }
        ms = time_in_rounds(runs, steps, options.rounds)

    parameters = {peer: own.about["parameters"] for peer, own in peers.items()}
    return {
        "case": name,
        "batch_size": case.batch_size,
        "samples": len(targets),
        "parameters": {"lepton": step.count_parameters(trainer), **parameters},
        "peers": {peer: own.about for peer, own in peers.items()},
        **_figures(ms, case.batch_size, names),
    }


def _figures(
    ms: Mapping[str, list[float]],
    batch_size: int,
    peers: list[str],
) -> dict[str, Any]:
    """Return times, rates and ratios from the milliseconds a step of each round."""
    rounds = zip(*(ms[peer] for peer in peers), strict=True)
    best = [min(times) for times in rounds]
    own = ms["lepton"]
    rates = {who: [1e3 * batch_size / x for x in times] for who, times in ms.items()}
    return {
        "ms_a_step": {who: spread(times) for who, times in ms.items()},
        "samples_a_second": {who: spread(rate) for who, rate in rates.items()},
        "lepton_to": {peer: spread_of_ratios(ms[peer], own) for peer in peers},
        "lepton_to_best": spread_of_ratios(best, own),
    }


# ---- the contenders ----


class _Peer:
    """A framework in a process of its own.

    Attributes:
      about: what runs, as the process says.
    """

    def __init__(
        self,
        case: str,
        name: str,
        python: str,
        inputs: Any,
        targets: np.ndarray,
    ):
        self.about: dict[str, Any] = {}
        self._name = name
        self._python = python
        self._case = case
        self._arrays = inputs if isinstance(inputs, dict) else {"inputs": inputs}
        self._targets = targets

    def __enter__(self) -> _Peer:
        program, form = PEERS[self._name]
        case = CASES[self._case]
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self._errors = self._stack.enter_context(tempfile.TemporaryFile("w+"))
        file = Path(folder) / "arrays.npz"
        np.savez(file, **self._arrays, targets=self._targets)
        spec = {
            **case.spec,
            "case": self._case,
            "batch": case.batch_size,
            "form": form,
            "file": str(file),
        }
        try:
            self._process = subprocess.Popen(
                [self._python, str(FOLDER / program), json.dumps(spec)],
                text=True,
                bufsize=1,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={"OMP_WAIT_POLICY": "passive", "JAX_PLATFORMS": "cpu"} | os.environ,
            )
        except OSError as error:
            self._stack.close()
            raise SettingError(
                f"{self._python!r} can't be run: {error.strerror}",
                where="--python",
                remedy="name a Python interpreter with PyTorch and Keras",
            ) from error
        self.about = self._answer()
        return self

    def run(self, steps: int) -> None:
        """Train some steps, and wait for them."""
        assert self._process.stdin is not None
        # if the process has ended, there will be no answer, and that is an error
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{steps}\n")
        loss = self._answer()["loss"]
        assert math.isfinite(loss), f"{self._name} diverges on {self._case}"

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = [text.strip() for text in self._errors if text.strip()]
        raise SettingError(
            f"{self._name} ended with code {code}: {said[-1] if said else 'no word'}",
            where=self._python,
            remedy=f"leave {self._name} out with --peers, or fix its environment",
        )

    def __exit__(self, *unused: Any) -> None:
        self._process.communicate()  # ends its input
        self._stack.close()


@contextmanager
def _lepton(
    case: Case,
    inputs: Any,
    targets: np.ndarray,
) -> Iterator[tuple[lepton.Trainer, Run]]:
    """Yield a trainer on one device, and what trains some steps with it."""
    is_real = np.issubdtype(targets.dtype, np.floating)
    recipe = lepton.Recipe(
        model=case.model,
        loss=case.loss,
        optimizer=case.optimizer,
        learning_rate=RATE,
        metrics={} if is_real else {"accuracy": lepton.metrics.accuracy},
        train=lepton.data.Arrays(inputs, targets),
        batch_size=case.batch_size,
        seed=SEED,
        evaluate_every=step.NEVER,
        save_every=step.NEVER,
    )
    with step.sinks() as sinks:
        trainer = lepton.Trainer(recipe, devices=1, sinks=sinks)
        yield trainer, partial(step.fit, trainer)


# ---- the table ----


def _line(result: dict[str, Any]) -> str:
    speeds = "  ".join(
        f"{who} {values['median']:,.0f}"
        for who, values in result["samples_a_second"].items()
    )
    ratios = {**result["lepton_to"], "best": result["lepton_to_best"]}
    shown = "  ".join(
        f"{peer} {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        for peer, ratio in ratios.items()
    )
    return f"{result['case']:10} {speeds}\n{'':10} lepton to: {shown}"
