"""The search for the cheapest model that keeps the metric.

    target      candidates
    int8        w8a8, w8
    int4        w4; w4 with as few weights in 8 bits as keep the metric; w8
    pruned      a half, a quarter, an eighth of the channels cut, each trained a little
    smallest    all of these, and the cut ones in 8 bits

A candidate is judged on one half of the test rows, by which it is chosen, and on the
other half, which no choice has seen. The cheapest is the one of the fewest bytes; of
two that differ by less than 2 % the quicker one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
from flax import nnx

from lepton_jax.data import Arrays
from lepton_jax.errors import DataError, ModelError, SettingError, nearest
from lepton_jax.ship.shrink import measuring
from lepton_jax.ship.shrink.calls import some_inputs
from lepton_jax.ship.shrink.cutting import cut, quicker
from lepton_jax.ship.shrink.packed import name_of
from lepton_jax.ship.shrink.quantization import (
    forms_of,
    kind_of,
    nnx_module,
    plain,
    quantizable,
    quantize,
    scaling_constants,
)

TARGETS = ("int8", "int4", "pruned", "smallest")
SPARSE = "2:4"  # a target that is answered, not searched

# Shares of channels that are cut, the most first. Assumption: each doubles the speed of
# a layer's product.
CUTS = (0.75, 0.5, 0.25)
# Passes over the training rows after a cut, and the share of the recipe's learning rate
# with which they are made (assumptions).
EPOCHS = 1.0
FINE_TUNING = 0.3

SAMPLED = 20  # steps at which a schedule is read, to find its peak; assumption

# Differences of size below which the quicker model is the cheaper one.
ALIKE = 0.02
# Fewest test rows of which a half is kept back. Assumption: below, halves say less than
# the whole.
FEWEST_TO_SPLIT = 200

NO_SPARSITY = (
    "2:4 saves nothing here: XLA runs weights with zeros as it runs others, on each of"
    " its backends, and they are stored as others are"
)


@dataclass(frozen=True)
class Candidate:
    """A model of the frontier.

    Attributes:
      name: of the way it was made, such as "w4, 2 weights in 8 bits".
      nbytes: of its weights.
      milliseconds: of a batch, in the median.
      metric: on the rows by which it was chosen.
      judged: on the rows that no choice has seen; the same as `metric` where there are
        too few rows for two halves.
      keeps: whether the metric is kept.
    """

    name: str
    nbytes: int
    milliseconds: float
    metric: float
    judged: float
    keeps: bool


@dataclass(frozen=True)
class Frontier:
    """Result of a search.

    Attributes:
      target: what was searched for.
      metric: its name.
      keep: share of the metric that is to be kept.
      rows: of the batch that was timed.
      whole: the model that was given.
      candidates: what was tried, the smallest first.
      chosen: name of the cheapest that keeps the metric; None: there is none.
      trainer: of the chosen model; None: there is none.
      notes: what could not be tried, and why.
    """

    target: str
    metric: str
    keep: float
    rows: int
    whole: Candidate
    candidates: tuple[Candidate, ...]
    chosen: str | None
    trainer: Any
    notes: tuple[str, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """Return all but the model as plain data."""
        return {
            "target": self.target,
            "metric": self.metric,
            "keep": self.keep,
            "rows": self.rows,
            "whole": asdict(self.whole),
            "candidates": [asdict(one) for one in self.candidates],
            "chosen": self.chosen,
            "notes": list(self.notes),
        }

    def best(self) -> list[Candidate]:
        """Return the candidates that no other one beats in size, time and metric."""
        every = [self.whole, *self.candidates]
        best = []
        for one in every:
            if not any(_beats(other, one, self) for other in every):
                best.append(one)
        return best

    def __str__(self) -> str:
        heads = ("", "model", "bytes", "share", f"ms, {self.rows} rows", self.metric)
        lines = [(*heads, "kept back")]
        best = self.best()
        for one in (self.whole, *self.candidates):
            is_chosen = one.name == self.chosen
            mark = ">" if is_chosen else ("*" if one in best else "")
            lines.append(
                (
                    mark,
                    one.name,
                    f"{one.nbytes:,}",
                    f"{100 * one.nbytes / self.whole.nbytes:.1f} %",
                    f"{one.milliseconds:.3f}",
                    f"{one.metric:.4f}{'' if one.keeps else ' (lost)'}",
                    f"{one.judged:.4f}",
                )
            )
        told = [_told(self), *self.notes]
        return "\n".join([*_aligned(lines), *told])


class Judge(NamedTuple):
    """The rows and the metric by which models are judged.

    Attributes:
      metric: its name.
      keep: share of it that is to be kept.
      choosing: rows by which a model is chosen.
      judging: rows that no choice has seen; the same where there are few.
      rows: of the batch that is timed.
    """

    metric: str
    keep: float
    choosing: Any
    judging: Any
    rows: int

    def value(self, trainer: Any) -> float:
        """Return the metric on the rows by which a model is chosen."""
        return measuring.metric_of(trainer, self.metric, self.choosing)

    def candidate(
        self,
        name: str,
        trainer: Any,
        whole: float | None,
    ) -> Candidate:
        """Measure a model but for its time.

        Args:
          name: of the model.
          trainer: of it.
          whole: metric of the model that was given; None: it is that one.
        """
        value = self.value(trainer)
        judged = value
        if self.judging is not self.choosing:
            judged = measuring.metric_of(trainer, self.metric, self.judging)
        is_kept = True
        if whole is not None:
            is_kept = measuring.keeps(self.metric, value, whole, self.keep)
        size = measuring.size_of(trainer)
        return Candidate(name, size, math.nan, value, judged, is_kept)


def search(
    trainer: Any,
    to: str = "int8",
    *,
    keep: float = 0.995,
    metric: str | None = None,
    rows: int = measuring.ROWS,
    epochs: float = EPOCHS,
    report: Callable[[str], None] = lambda text: None,
) -> Frontier:
    """Search for the cheapest model that keeps the metric.

    >>> frontier = shrink.search(trainer, "int8")  # doctest: +SKIP
    >>> print(frontier)  # doctest: +SKIP
    >>> lepton.Artifact.of(frontier.trainer).save("small.lepton")  # doctest: +SKIP

    Args:
      trainer: with the trained model, an NNX module, and test rows.
      to: "int8", "int4", "pruned" or "smallest"; "2:4" is answered with what it saves.
      keep: share of the metric that is to be kept, above 0 to 1.
      metric: its name; None: `Recipe.best`, or the first.
      rows: of the batch that is timed.
      epochs: passes over the training rows after channels are cut.
      report: called with a line about each model that is tried.

    Raises:
      SettingError: an argument can't be.
      DataError: the recipe has no test rows.
      ModelError: the model is no NNX module.
      MissingExtraError: qwix is not installed.
    """
    _check(to, keep)
    module = nnx_module(trainer)
    judge = _judge(trainer, keep, metric, rows)
    report("measuring the model as it is")
    whole = judge.candidate("as it is", trainer, None)
    tried: list[tuple[Candidate, Any]] = []
    notes = [NO_SPARSITY] if to == SPARSE else []

    for make in _makers(trainer, module, to, judge, whole.metric, epochs):
        try:
            for name, model in make():
                report(f"measuring {name}")
                tried.append((judge.candidate(name, model, whole.metric), model))
        except ModelError as error:
            notes.append(f"not tried: {error.what}")

    report("timing all of them in turns")
    models = [trainer, *(model for _, model in tried)]
    times = iter(measuring.latencies_of(models, rows))
    whole = replace(whole, milliseconds=next(times))
    tried = [(replace(one, milliseconds=next(times)), model) for one, model in tried]
    tried.sort(key=lambda pair: pair[0].nbytes)
    kept = [pair for pair in tried if pair[0].keeps]
    chosen, model = _cheapest(kept) if kept else (None, None)
    return Frontier(
        to,
        judge.metric,
        keep,
        rows,
        whole,
        tuple(one for one, _ in tried),
        None if chosen is None else chosen.name,
        model,
        tuple(notes),
    )


# ---- internals ----

Made = Iterator[tuple[str, Any]]


def _check(
    to: str,
    keep: float,
) -> None:
    known = (*TARGETS, SPARSE)
    if to not in known:
        raise SettingError(
            f"there is no target {to!r}{nearest(str(to), known)}",
            where="to",
            remedy=f"use one of {', '.join(known)}",
        )
    if not 0 < keep <= 1:
        raise SettingError(
            f"a share of {keep!r} of the metric is to be kept",
            where="keep",
            remedy="give a share above 0 up to 1, such as 0.995",
        )


def _judge(
    trainer: Any,
    keep: float,
    metric: str | None,
    rows: int,
) -> Judge:
    name = measuring.metric_name(trainer, metric)
    test = trainer.recipe.test
    if test is None:
        raise DataError(
            "there are no test rows to judge a smaller model by",
            where="Recipe.test",
            remedy="give the recipe a test set",
        )
    choosing = judging = test
    if isinstance(test, Arrays) and len(test) >= FEWEST_TO_SPLIT:
        choosing, judging = test.split(0.5, trainer.recipe.seed)
    return Judge(name, keep, choosing, judging, rows)


def _makers(
    trainer: Any,
    module: nnx.Module,
    to: str,
    judge: Judge,
    whole: float,
    epochs: float,
) -> list[Callable[[], Made]]:
    """Return functions that make the candidates of a target, some at a time."""

    def quantized(kind: str) -> Callable[[], Made]:
        return lambda: iter([(kind, quantize(trainer, kind))])

    def in_four_bits() -> Made:
        yield "w4", quantize(trainer, "w4")
        yield from _spared(trainer, module, judge, whole)

    def pruned() -> Made:
        yield from _pruned(trainer, epochs, to == "smallest", judge.rows)

    makers = {
        "int8": [quantized("w8a8"), quantized("w8")],
        "int4": [in_four_bits, quantized("w8")],
        "pruned": [pruned],
        SPARSE: [],
    }
    every = [*makers["int8"], in_four_bits, pruned]
    return makers.get(to, every)


def _pruned(
    trainer: Any,
    epochs: float,
    also_quantized: bool,
    rows: int,
) -> Made:
    only = quicker(trainer, CUTS[1], rows)
    for share in CUTS:
        smaller = cut(trainer, share, only=only, **_fine_tuning(trainer))
        if epochs:
            smaller.fit(epochs=epochs)
        name = f"{100 * share:.0f} % of the channels cut"
        yield name, smaller
        if also_quantized:
            yield f"{name}, w8", quantize(smaller, "w8")


def _fine_tuning(trainer: Any) -> dict[str, Any]:
    """Return the recipe's fields for the steps after a cut: a small, falling rate."""
    rate = trainer.recipe.learning_rate
    if rate is None:
        return {}
    if callable(rate):
        total = trainer.recipe.steps or trainer.step or 1
        steps = range(0, total, max(1, total // SAMPLED))
        rate = max(float(rate(step)) for step in steps)
    return {"learning_rate": FINE_TUNING * rate, "controller": ()}


def _spared(
    trainer: Any,
    module: nnx.Module,
    judge: Judge,
    whole: float,
) -> Made:
    """Make the model of 4 bits with the fewest weights in 8 bits that is good enough.

    What a weight's rounding does is seen in the float program, with rounded weights in
    place of its own: nothing is compiled for it.
    """
    probe = Probe(trainer, module, judge)
    weights = list(quantizable(module, probe.constants))
    if probe.is_kept([], whole) or not weights:
        return
    order = sorted(weights, key=probe.harm, reverse=True)
    low = 1
    high = len(order)
    if not probe.is_kept(order, whole):
        return
    while low < high:
        middle = (low + high) // 2
        if probe.is_kept(order[:middle], whole):
            high = middle
        else:
            low = middle + 1
    spare = order[:low]
    name = f"w4, {low} of {len(order)} weights in 8 bits"
    yield name, quantize(trainer, "w4", spare=spare)


class Probe:
    """A model whose weights can be rounded one by one, without compiling anew.

    Args:
      trainer: with the trained model.
      module: its plain module.
      judge: of the metric.

    Attributes:
      constants: paths of variables that are quantized as weights are.
    """

    def __init__(self, trainer: Any, module: nnx.Module, judge: Judge):
        self._judge = judge
        self._module = plain(module)
        self.constants = scaling_constants(self._module, some_inputs(trainer))
        self._trainer = trainer.with_module(self._module)
        self._state = self._trainer.state
        self._harms: dict[str, float] = {}

    def is_kept(
        self,
        spare: Sequence[str],
        whole: float,
    ) -> bool:
        """Whether the metric is kept with 4 bits but for some weights."""
        forms = self._forms(spare)
        self._round(forms)
        value = self._judge.value(self._trainer)
        return measuring.keeps(self._judge.metric, value, whole, self._judge.keep)

    def harm(self, path: str) -> float:
        """Return the loss with one weight in 4 bits, by which weights are ordered."""
        if path not in self._harms:
            forms = self._forms()
            self._round({path: forms[path]})
            data = self._judge.choosing
            self._harms[path] = measuring.metric_of(self._trainer, "loss", data)
        return self._harms[path]

    def _forms(
        self,
        spare: Sequence[str] = (),
    ) -> dict[str, Any]:
        return forms_of(self._module, kind_of("w4"), spare, self.constants)

    def _round(
        self,
        forms: dict[str, Any],
    ) -> None:
        def rounded(
            path: Any,
            value: jax.Array,
        ) -> jax.Array:
            name = name_of(tuple(key.key for key in path))
            form = forms.get(name)
            if form is None:
                return value
            plain_value = form.unpack(form.pack(value))
            return jax.device_put(plain_value, value.sharding)

        parts = (self._state.params, self._state.variables)
        params, variables = (
            jax.tree_util.tree_map_with_path(rounded, part) for part in parts
        )
        self._trainer.state = replace(
            self._state,
            params=params,
            variables=variables,
        )


def _cheapest(kept: list[tuple[Candidate, Any]]) -> tuple[Candidate, Any]:
    smallest = kept[0][0].nbytes
    most = (1 + ALIKE) * smallest
    alike = [pair for pair in kept if pair[0].nbytes <= most]
    return min(alike, key=lambda pair: pair[0].milliseconds)


def _beats(
    one: Candidate,
    other: Candidate,
    frontier: Frontier,
) -> bool:
    """Whether a model is as good in size, time and metric, and better in one."""
    sign = -1 if measuring.less_is_better(frontier.metric) else 1
    mine = (-one.nbytes, -one.milliseconds, sign * one.metric)
    its = (-other.nbytes, -other.milliseconds, sign * other.metric)
    return mine != its and all(a >= b for a, b in zip(mine, its, strict=True))


def _told(frontier: Frontier) -> str:
    if frontier.chosen is None:
        return f"none keeps {100 * frontier.keep:g} % of {frontier.metric}"
    return (
        f"> the cheapest that keeps {100 * frontier.keep:g} % of {frontier.metric};"
        " * no other one is better in size, time and metric"
    )


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        mark, name, *figures = line
        words = [mark.ljust(widths[0]), name.ljust(widths[1])]
        words += [f.rjust(w) for f, w in zip(figures, widths[2:], strict=True)]
        aligned.append("  ".join(words).rstrip())
    return aligned
