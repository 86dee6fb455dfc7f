"""`tools.bench step`: milliseconds a train step takes in Lepton, and in the loops that one
would write without it.

Every contender trains the same module by the same optimizer on the same arrays from the
same seed, on one device:

  hand      JAX and Optax by hand, in the form that is hardest to beat: the module split once, its parameters a plain
            list, one jitted step with donated state; no metrics; an epoch of shuffled batches on the device beforehand.
  hand-fed  the same step, and in the loop what JAX tutorials do: a permutation an epoch, `x[permutation[i:i + b]]`.
  lepton    `Trainer.fit` as it comes: loader with prefetch and shuffling, loss and accuracy of every step read back,
            the check for losses that aren't finite, progress lines to a stream, every event appended to a journal.
            A slice is one `fit`, so what a fit costs once (the loader's thread, an epoch's order) is in it. Not in it:
            evaluations (none of the others has any), checkpoints, and the report.
  nnx       the Flax NNX tutorial: `nnx.jit`, `nnx.Optimizer`, `nnx.MultiMetric` of loss and accuracy; fed as hand-fed.

Everything is compiled and each contender's slice sized before the rounds begin. In a
round each contender runs one slice, in an order that rotates from round to round; a
slice ends when the device is done. Ratios are taken within a round, since what disturbs
a machine disturbs a round.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton
from lepton_jax.errors import SettingError, nearest
from lepton_jax.monitor.events import encode

SEED = 0
NEVER = 10**9  # steps
COMPARED = 20  # steps whose losses are compared
RIVALS = ("hand", "hand-fed", "nnx")

Run = Callable[[int], None]
Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Case:
    """What the contenders train: `optimizer` is a function of the learning rate, `data`
    makes (inputs, targets).
    """

    model: Callable[..., nnx.Module]
    data: Callable[[], tuple[np.ndarray, np.ndarray]]
    batch_size: int
    optimizer: Callable[[float], optax.GradientTransformation]
    learning_rate: float = 1e-3


def images(samples: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise in [0, 1), float32 (samples, *shape), with labels 0 to 9."""
    random = np.random.default_rng(SEED)
    return random.random((samples, *shape), np.float32), random.integers(
        0, 10, samples, np.int32
    )


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


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `step` to the subcommands."""
    parser = commands.add_parser(
        "step",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help="milliseconds a train step, against loops by hand and the NNX tutorial's",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        metavar="N",
        help="rounds a case (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        metavar="S",
        help="length of a slice (default: %(default)s)",
    )
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
    if options.rounds < 1:
        raise SettingError(
            f"--rounds is {options.rounds}",
            where="command line",
            remedy="ask for 1 or more rounds",
        )
    if not (math.isfinite(options.seconds) and options.seconds > 0):
        raise SettingError(
            f"--seconds is {options.seconds:g}",
            where="command line",
            remedy="give a time above 0",
        )
    for name in options.only:
        if name not in CASES:
            raise SettingError(
                f"there is no case {name!r}{nearest(name, CASES)}",
                where="--only",
                remedy=f"the cases are {', '.join(CASES)}",
            )
    results = []
    print(_header(), flush=True)
    for name in dict.fromkeys(options.only):
        results.append(
            {
                "case": name,
                **measure(
                    CASES[name],
                    options.rounds,
                    options.seconds,
                ),
            }
        )
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
    """One case, in slices of about `seconds`: milliseconds a step, the ratios, and that
    lepton and hand train alike.
    """
    x, y = case.data()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sinks = [
            lepton.monitor.Progress(stack.enter_context(open(os.devnull, "w"))),
            Journal(Path(folder)),
        ]
        stack.callback(sinks[1].end)
        trainer = _trainer(case, x, y, sinks)
        steps_per_call = trainer.plan().steps_per_call
        runs = {
            "hand": _hand(case, itertools.cycle(_on_device(case, x, y))),
            "hand-fed": _hand(case, _fed(case, x, y)),
            "lepton": partial(_fit, trainer),
            "nnx": _nnx(case, _fed(case, x, y)),
        }
        steps = {
            name: _slice(
                f,
                seconds,
                steps_per_call if name == "lepton" else 1,
            )
            for name, f in runs.items()
        }
        difference = _loss_difference(case, x, y)
        with compilations() as compiled:
            ms = _rounds(runs, steps, rounds)
        assert not compiled, f"compiled while it was measured: {compiled}"
    ratios = {
        rival: _spread([a / b for a, b in zip(ms["lepton"], ms[rival], strict=True)])
        for rival in RIVALS
    }
    assert trainer.state is not None
    return {
        "batch_size": case.batch_size,
        "samples": len(x),
        "seconds": seconds,
        "parameters": sum(p.size for p in jax.tree.leaves(trainer.state.params)),
        "steps_per_call": steps_per_call,
        "steps_a_slice": steps,
        "loss_difference": difference,
        "ms_a_step": {name: _spread(values) for name, values in ms.items()},
        "lepton_to": ratios,
    }


def _rounds(
    runs: dict[str, Run],
    steps: dict[str, int],
    rounds: int,
) -> dict[str, list[float]]:
    """Milliseconds a step of each contender in each round."""
    ms: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for first in range(rounds):
        for name in (names[(first + i) % len(names)] for i in range(len(names))):
            gc.collect()  # nobody pays for another's garbage
            ms[name].append(_timed(runs[name], steps[name]) / steps[name] * 1e3)
    return ms


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of what XLA compiles in this context, anybody's."""
    names: list[str] = []

    def listen(
        event: str,
        duration_secs: float,
        **kwargs: str | int,
    ) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _slice(
    run: Run,
    seconds: float,
    multiple: int,
) -> int:
    """Steps in a slice of about `seconds`, a multiple of `multiple`; everything is
    compiled afterwards.
    """
    # what comes out of the first step may have another layout than what went in, and
    # compile again
    for _ in range(2):
        run(multiple)
    count = multiple
    while (took := _timed(run, count)) < seconds / 4:
        count *= 2
    return math.ceil(count * seconds / took / multiple) * multiple


def _timed(run: Run, steps: int) -> float:
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": values,
    }


# ---- the contenders ----


class Journal:
    """Appends events to a file as a run folder's journal does, through any number of
    fits.

    A trainer with a run folder would end every slice with a checkpoint and a report.
    Without one the events are put in JSON all the same, so here that is done twice, at
    Lepton's expense.
    """

    def __init__(self, folder: Path):
        self.path = folder / "events.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def event(self, event: dict[str, Any]) -> None:
        os.write(self._file, encode(event))

    def close(self) -> None:
        """Each fit closes its sinks; the file stays open for the next."""

    def end(self) -> None:
        os.close(self._file)


def _trainer(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
    sinks: Any = (),
    shuffle: bool = True,
    controller: Any = (),
) -> lepton.Trainer:
    return lepton.Trainer(
        lepton.Recipe(
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
        ),
        devices=1,
        sinks=sinks,
    )


def _fit(trainer: lepton.Trainer, steps: int) -> None:
    trainer.fit(steps=steps)
    jax.block_until_ready(trainer.state)


def _by_hand(case: Case) -> tuple[Callable[..., Any], Any, Any]:
    """The step by hand, (params, state, x, y) to (params, state, loss); params and the
    optimizer's first state.
    """
    graph, state, rest = nnx.split(
        case.model(rngs=nnx.Rngs(SEED)),
        nnx.Param,
        ...,
    )
    # a list of arrays: JAX flattens an nnx.State in Python at every call, and this
    # rival shall not wait for that
    params, tree = jax.tree.flatten(state)
    optimizer = case.optimizer(case.learning_rate)

    def mean_loss(
        params: Any,
        x: Any,
        y: Any,
    ) -> Any:
        model: Any = nnx.merge(
            graph,
            jax.tree.unflatten(tree, params),
            rest,
        )
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


def _hand(case: Case, batches: Iterator[Batch]) -> Run:
    step, params, state = _by_hand(case)

    def run(steps: int) -> None:
        nonlocal params, state
        for _ in range(steps):
            x, y = next(batches)
            params, state, _loss = step(params, state, x, y)
        jax.block_until_ready((params, state))

    return run


def _nnx(case: Case, batches: Iterator[Batch]) -> Run:
    model: Any = case.model(rngs=nnx.Rngs(SEED))
    model.train()
    optimizer = nnx.Optimizer(
        model,
        case.optimizer(case.learning_rate),
        wrt=nnx.Param,
    )
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
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

    @nnx.jit
    def step(
        model: Any,
        optimizer: Any,
        metrics: Any,
        x: Any,
        y: Any,
    ) -> None:
        (loss, logits), gradients = nnx.value_and_grad(mean_loss, has_aux=True)(
            model, x, y
        )
        metrics.update(
            loss=loss,
            logits=logits,
            labels=y,
        )
        optimizer.update(model, gradients)

    def run(steps: int) -> None:
        for _ in range(steps):
            step(model, optimizer, metrics, *next(batches))
        jax.block_until_ready(
            nnx.state(
                (
                    model,
                    optimizer,
                    metrics,
                )
            )
        )

    return run


def _fed(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
) -> Iterator[Batch]:
    """Shuffled batches without end; what is left over at an epoch's end is dropped."""
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
    """One epoch of shuffled batches, on the device."""
    batches = itertools.islice(_fed(case, x, y), len(x) // case.batch_size)
    # no device is named: committed batches would make the step compile once more, for
    # its own committed results
    return jax.block_until_ready([jax.device_put(batch) for batch in batches])


def _loss_difference(
    case: Case,
    x: np.ndarray,
    y: np.ndarray,
) -> float:
    """Greatest absolute difference of the first losses of lepton and of hand, on the
    same batches.
    """
    step, params, state = _by_hand(case)
    losses = []
    for index in range(COMPARED):
        rows = np.arange(index * case.batch_size, (index + 1) * case.batch_size) % len(
            x
        )
        params, state, loss = step(
            params,
            state,
            x[rows],
            y[rows],
        )
        losses.append(float(loss))
    history = _trainer(case, x, y, shuffle=False).fit(steps=COMPARED)
    return float(np.abs(history.records["loss"] - np.asarray(losses)).max())


# ---- the table ----


def _header() -> str:
    ratios = "  ".join(f"{'lepton/' + rival:>18}" for rival in RIVALS)
    ms = "  ".join(f"{name:>8}" for name in ("hand", "hand-fed", "lepton", "nnx"))
    return f"{'case':8}  {ms}  {ratios}  {'steps/call':>10}  loss difference"


def _line(result: dict[str, Any]) -> str:
    ms = "  ".join(
        f"{result['ms_a_step'][name]['median']:8.4g}"
        for name in ("hand", "hand-fed", "lepton", "nnx")
    )
    spreads = (result["lepton_to"][rival] for rival in RIVALS)
    ratios = "  ".join(
        f"{s['median']:5.2f} ({s['min']:4.2f}-{s['max']:4.2f})".rjust(18)
        for s in spreads
    )
    return (
        f"{result['case']:8}  {ms}  {ratios}  {result['steps_per_call']:10} "
        f" {result['loss_difference']:15.2g}"
    )
