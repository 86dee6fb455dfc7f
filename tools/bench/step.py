"""Milliseconds that a train step takes in Lepton, and in loops written without it.

`tools.bench step`. All contenders train the same model on the same synthetic data from
the same seed, on one device:

  hand      JAX and Optax by hand, in the form that is hardest to beat: the module split
            once, its parameters a plain list, one jitted step with donated state; no
            metrics; an epoch of shuffled batches on the device beforehand
  hand-fed  the same step, fed as JAX tutorials do it: a permutation an epoch,
            `x[permutation[i:i + b]]`
  lepton    `Trainer.fit` as it comes: loader with prefetch and shuffling, loss and
            accuracy of every step read back, the check for losses that aren't finite,
            progress lines to a stream, every event appended to a journal. A slice is
            one `fit`, so what a fit costs once (the loader's thread, an epoch's order)
            is included. Not included: evaluations (none of the others has any),
            checkpoints, and the report
  nnx       the Flax NNX tutorial: `nnx.jit`, `nnx.Optimizer`, `nnx.MultiMetric` of loss
            and accuracy; fed as hand-fed

`timing.py` says how slices are sized and timed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton
from lepton_jax.monitor.events import encode
from tools.bench import options as checks
from tools.bench.timing import (
    Run,
    compilations,
    spread,
    spread_of_ratios,
    steps_of_slice,
    time_in_rounds,
)

SEED = 0
NEVER = 10**9  # steps, more than any run has
COMPARED = 20  # steps whose losses are compared
RIVALS = ("hand", "hand-fed", "nnx")
CONTENDERS = ("hand", "hand-fed", "lepton", "nnx")

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Case:
    """Model and data that the contenders train.

    Attributes:
      model: takes `rngs`.
      data: makes (inputs, targets).
      batch_size: samples a step.
      optimizer: a function of the learning rate.
      learning_rate: for `optimizer`.
    """

    model: Callable[..., nnx.Module]
    data: Callable[[], tuple[np.ndarray, np.ndarray]]
    batch_size: int
    optimizer: Callable[[float], optax.GradientTransformation]
    learning_rate: float = 1e-3


def images(samples: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise in [0, 1), float32 (samples, *shape), with labels 0 to 9."""
    random = np.random.default_rng(SEED)
    pixels = random.random((samples, *shape), np.float32)
    return pixels, random.integers(0, 10, samples, np.int32)


def tokens(
    samples: int,
    length: int,
    vocab: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Random text, int32 (samples, length), and the same one token later."""
    text = np.random.default_rng(SEED).integers(
        0, vocab, (samples, length + 1), np.int32
    )
    return text[:, :-1].copy(), text[:, 1:].copy()


CASES = {
    "mlp-256": Case(
        partial(lepton.models.MLP, (784, 128, 10)),
        partial(images, 60_000, 784),
        256,
        optax.adam,
    ),
    "mlp-16": Case(
        partial(lepton.models.MLP, (784, 128, 10)),
        partial(images, 60_000, 784),
        16,
        optax.adam,
    ),
    "cnn-128": Case(
        partial(lepton.models.CNN, 10),
        partial(images, 12_800, 28, 28, 1),
        128,
        optax.adam,
    ),
    "lm": Case(
        partial(
            lepton.models.TransformerLM,
            256,
            dim=256,
            layers=4,
            heads=4,
        ),
        partial(tokens, 2048, 256, 256),
        8,
        optax.adamw,
        3e-4,
    ),
}


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `step` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "step",
        __doc__,
        "milliseconds a train step, against loops by hand and the NNX tutorial's",
    )
    checks.add_timing(parser, rounds=8, seconds=2.0)
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)}",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the cases asked for, and print a line for each as it ends.

    Raises:
      SettingError: no such case, or a count or time that can't be.
    """
    checks.check_positive(options, "rounds", "seconds")
    checks.check_names(options.only, CASES, "--only", "case")
    results = []
    print(_header(), flush=True)
    for name in dict.fromkeys(options.only):
        measured = measure(CASES[name], options.rounds, options.seconds)
        results.append({"case": name, **measured})
        print(_line(results[-1]), flush=True)
    print(
        "ms a step: median of the rounds; ratios within a round: median"
        " (least-greatest); loss difference: greatest of |lepton - hand| over the"
        f" first {COMPARED} losses, unshuffled"
    )
    return results


def measure(
    case: Case,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Measure one case, in slices of about `seconds`.

    Returns:
      Milliseconds a step of each contender, the ratios, and by how much the losses of
      lepton and hand differ.
    """
    x, y = case.data()
    with sinks() as told:
        trainer = make_trainer(case, x, y, told)
        steps_per_call = trainer.plan().steps_per_call
        runs = {
            "hand": _hand(case, itertools.cycle(_on_device(case, x, y))),
            "hand-fed": _hand(case, _fed(case, x, y)),
            "lepton": partial(fit, trainer),
            "nnx": _nnx(case, _fed(case, x, y)),
        }
        multiples = dict.fromkeys(runs, 1) | {"lepton": steps_per_call}
        steps = {
            name: steps_of_slice(run, seconds, multiples[name])
            for name, run in runs.items()
        }
        difference = _loss_difference(case, x, y)
        with compilations() as compiled:
            ms = time_in_rounds(runs, steps, rounds)
        assert not compiled, f"compiled while it was measured: {compiled}"

    assert trainer.state is not None
    return {
        "batch_size": case.batch_size,
        "samples": len(x),
        "seconds": seconds,
        "parameters": count_parameters(trainer),
        "steps_per_call": steps_per_call,
        "steps_a_slice": steps,
        "loss_difference": difference,
        "ms_a_step": {name: spread(values) for name, values in ms.items()},
        "lepton_to": {
            rival: spread_of_ratios(ms["lepton"], ms[rival]) for rival in RIVALS
        },
    }


def count_parameters(trainer: lepton.Trainer) -> int:
    """Return how many numbers the parameters of a trained model are."""
    assert trainer.state is not None
    return sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))


# ---- the contenders ----


class Journal:
    """A file of events like a run folder's, which stays open over several fits.

    A trainer with a run folder would end every slice with a checkpoint and a report.
    Without one the events are put in JSON all the same. So here that is done twice, at
    Lepton's expense.
    """

    def __init__(self, folder: Path):
        self.path = folder / "events.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def event(self, event: dict[str, Any]) -> None:
        """Append an event."""
        os.write(self._file, encode(event))

    def close(self) -> None:
        """Leave the file open: each fit closes its sinks, and another one follows."""

    def end(self) -> None:
        """Close the file."""
        os.close(self._file)


@contextmanager
def sinks() -> Iterator[list[Any]]:
    """Yield what a run usually tells its events to."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        journal = Journal(Path(folder))
        try:
            yield [lepton.monitor.Progress(nowhere), journal]
        finally:
            journal.end()


def make_trainer(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
    sinks: Any = (),
    shuffle: bool = True,
    controller: Any = (),
    steps: int | None = None,
) -> lepton.Trainer:
    """Return a trainer of a case on one device, without evaluations or checkpoints.

    Its run has a number of steps, or no end that policies would know.
    """
    recipe = lepton.Recipe(
        model=case.model,
        loss=lepton.losses.cross_entropy,
        optimizer=case.optimizer,
        learning_rate=case.learning_rate,
        metrics={"accuracy": lepton.metrics.accuracy},
        train=lepton.data.Arrays(x, y),
        batch_size=case.batch_size,
        seed=SEED,
        shuffle=shuffle,
        evaluate_every=NEVER,
        save_every=NEVER,
        controller=controller,
        steps=steps,
    )
    return lepton.Trainer(recipe, devices=1, sinks=sinks)


def fit(
    trainer: lepton.Trainer,
    steps: int,
) -> None:
    """Train, and wait for the device."""
    trainer.fit(steps=steps)
    jax.block_until_ready(trainer.state)


def _by_hand(case: Case) -> tuple[Callable[..., Any], Any, Any]:
    """Return the step by hand, and what it begins with.

    Returns:
      A function (params, state, x, y) to (params, state, loss); the parameters; the
      optimizer's first state.
    """
    graph, state, rest = nnx.split(case.model(rngs=nnx.Rngs(SEED)), nnx.Param, ...)
    # a list of arrays: JAX flattens an nnx.State in Python at every call, and this
    # contender should not have to wait for that
    params, tree = jax.tree.flatten(state)
    optimizer = case.optimizer(case.learning_rate)

    def mean_loss(
        params: Any,
        x: Any,
        y: Any,
    ) -> Any:
        model: Any = nnx.merge(graph, jax.tree.unflatten(tree, params), rest)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Any,
        state: Any,
        x: Any,
        y: Any,
    ) -> tuple[Any, Any, Any]:
        loss, gradients = jax.value_and_grad(mean_loss)(params, x, y)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step, params, optimizer.init(params)


def _hand(
    case: Case,
    batches: Iterator[Batch],
) -> Run:
    step, params, state = _by_hand(case)

    def run(steps: int) -> None:
        nonlocal params, state
        for _ in range(steps):
            x, y = next(batches)
            params, state, _loss = step(params, state, x, y)
        jax.block_until_ready((params, state))

    return run


def _nnx(
    case: Case,
    batches: Iterator[Batch],
) -> Run:
    model: Any = case.model(rngs=nnx.Rngs(SEED))
    model.train()
    transformation = case.optimizer(case.learning_rate)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    metrics = nnx.MultiMetric(
        accuracy=nnx.metrics.Accuracy(),
        loss=nnx.metrics.Average("loss"),
    )

    def mean_loss(
        model: Any,
        x: Any,
        y: Any,
    ) -> tuple[Any, Any]:
        logits = model(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), logits

    @nnx.jit
    def step(
        model: Any,
        optimizer: Any,
        metrics: Any,
        x: Any,
        y: Any,
    ) -> None:
        gradient = nnx.value_and_grad(mean_loss, has_aux=True)
        (loss, logits), gradients = gradient(model, x, y)
        metrics.update(loss=loss, logits=logits, labels=y)
        optimizer.update(model, gradients)

    def run(steps: int) -> None:
        for _ in range(steps):
            step(model, optimizer, metrics, *next(batches))
        jax.block_until_ready(nnx.state((model, optimizer, metrics)))

    return run


def _fed(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
) -> Iterator[Batch]:
    """Yield shuffled batches without end, the rest of each epoch dropped."""
    random = np.random.default_rng(SEED)
    size = case.batch_size
    while True:
        order = random.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            rows = order[start : start + size]
            yield x[rows], y[rows]


def _on_device(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
) -> list[Batch]:
    """Return one epoch of shuffled batches on the device."""
    batches = itertools.islice(_fed(case, x, y), len(x) // case.batch_size)
    # no device is named: committed batches would make the step compile once more, for
    # its own committed results
    return jax.block_until_ready([jax.device_put(batch) for batch in batches])


def _loss_difference(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
) -> float:
    """Return the greatest difference of the first losses of lepton and of hand.

    Both see the same batches, unshuffled.
    """
    step, params, state = _by_hand(case)
    by_hand = []
    for index in range(COMPARED):
        first = index * case.batch_size
        rows = np.arange(first, first + case.batch_size) % len(x)
        params, state, loss = step(params, state, x[rows], y[rows])
        by_hand.append(float(loss))

    history = make_trainer(case, x, y, shuffle=False).fit(steps=COMPARED)
    difference = history.records["loss"] - np.asarray(by_hand)
    return float(np.abs(difference).max())


# ---- the table ----


def _header() -> str:
    ratios = "  ".join(f"{'lepton/' + rival:>18}" for rival in RIVALS)
    ms = "  ".join(f"{name:>8}" for name in CONTENDERS)
    return f"{'case':8}  {ms}  {ratios}  {'steps/call':>10}  loss difference"


def _line(result: dict[str, Any]) -> str:
    medians = [result["ms_a_step"][name]["median"] for name in CONTENDERS]
    ms = "  ".join(f"{median:8.4g}" for median in medians)
    ratios = "  ".join(
        f"{ratio['median']:5.2f} ({ratio['min']:4.2f}-{ratio['max']:4.2f})".rjust(18)
        for ratio in (result["lepton_to"][rival] for rival in RIVALS)
    )
    return (
        f"{result['case']:8}  {ms}  {ratios}  {result['steps_per_call']:10} "
        f" {result['loss_difference']:15.2g}"
    )
