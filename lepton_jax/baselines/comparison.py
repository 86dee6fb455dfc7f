"""A network against a cheap method: on the same rows, by the recipe's own metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lepton_jax.baselines.baseline import Baseline, Interval, Samples
from lepton_jax.baselines.intervals import (
    LEVEL,
    QUANTILE,
    Alone,
    alone,
    percentiles,
    resamples,
    wilson,
)
from lepton_jax.baselines.measuring import Measured, MeasuredMean, all_measured
from lepton_jax.errors import DataError

BETTER = "better"
WORSE = "worse"
EQUAL = "equal"
VERDICTS = {
    BETTER: "the network is better",
    WORSE: "the network is worse",
    EQUAL: "no difference that can be told apart from chance",
}
# Words of a metric's name that say that less of it is better, and short ones that must
# be a whole word; assumption.
LESS_IS_BETTER = (
    "loss",
    "error",
    "rmse",
    "perplexity",
    "deviance",
    "entropy",
    "brier",
    "distance",
)
SHORT_WORDS = {"mae", "mse", "mape", "ece", "nll", "fid"}
DIGITS = 2  # of the width of an interval that are shown
MOST_DECIMALS = 6


@dataclass(frozen=True)
class Compared:
    """One metric of the network and of a baseline.

    Attributes:
      metric: its name.
      network: its value; None: it was not measured.
      baseline: its value.
      difference: network less baseline; None where they can't be compared.
      chance: probability of such a difference by chance; NaN where the interval of the
        difference decides.
      verdict: "better", "worse" or "equal", of the network; "" without a difference.
      paired: whether both were measured on the same rows, one by one.
      alone: rows in which one of the two alone is right; None: they don't hit or miss.
    """

    metric: str
    network: Interval | None
    baseline: Interval
    difference: Interval | None = None
    chance: float = math.nan
    verdict: str = ""
    paired: bool = False
    alone: Alone | None = None


@dataclass(frozen=True, repr=False)
class Comparison:
    """A network and a baseline on the same rows.

    Attributes:
      name: of the baseline.
      fitted: how it was fitted; where it failed, "".
      rows: of the test set that both were measured on.
      total: rows of the test set; None: it has no end.
      seconds: that it took to fit and to measure.
      compared: by metric.
      failed: why there is no result; "" if there is one.
    """

    name: str
    fitted: str
    rows: int
    total: int | None
    seconds: float
    compared: tuple[Compared, ...] = ()
    failed: str = ""

    def __repr__(self) -> str:
        if self.failed:
            return f"no baseline: {self.name}: {self.failed}"
        return "\n".join(
            sentence(
                self.name,
                one,
            )
            for one in self.compared
        )

    def to_fields(self) -> dict[str, Any]:
        """Return it as the plain fields of an event, with a sentence a metric."""
        fields = asdict(self)
        for entry, one in zip(
            fields["compared"],
            self.compared,
            strict=True,
        ):
            entry["text"] = sentence(self.name, one)
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Comparison:
        """Return what `to_fields` was given."""
        compared = tuple(map(_compared, fields["compared"]))
        own = {name: fields[name] for name in fields if name != "text"}
        return cls(**{**own, "compared": compared})


def _compared(fields: Mapping[str, Any]) -> Compared:
    own = {name: value for name, value in fields.items() if name != "text"}
    for name in ("network", "baseline", "difference"):
        if own[name] is not None:
            own[name] = Interval(*own[name])
    if own.get("alone") is not None:
        own["alone"] = Alone(*own["alone"])
    return Compared(**own)


class Network:
    """The network's metrics over test rows, with their resamples.

    Args:
      metrics: the recipe's.
      outputs: of the network, rows first; None: they are not known.
      samples: the test rows.
    """

    def __init__(self, metrics: Mapping[str, Any], outputs: Any, samples: Samples):
        self.metrics = metrics
        self.outputs = outputs
        self.samples = samples
        self.measured: dict[str, Measured] = {}
        if outputs is not None:
            self.measured = all_measured(metrics, outputs, samples.targets)

    def against(self, baseline: Baseline) -> tuple[Compared, ...]:
        """Compare the network with a baseline, by each metric that it has.

        Raises:
          DataError: the baseline gives nothing, or not a value for each test row.
        """
        rows = len(self.samples)
        theirs: dict[str, Measured] = {}
        if baseline.outputs is not None:
            outputs = fitted_to(baseline, self.outputs, rows)
            theirs |= all_measured(
                self.metrics,
                outputs,
                self.samples.targets,
            )
        for name, values in baseline.values.items():
            _check_rows(baseline, len(values), rows)
            theirs[name] = MeasuredMean(
                np.asarray(values, np.float64),
                None,
                None,
            )
        given = {
            name: self._unpaired(name, interval)
            for name, interval in baseline.metrics.items()
            if name not in theirs
        }
        if not theirs and not given:
            raise DataError(
                "the baseline gives neither outputs nor metrics",
                where=baseline.name,
                remedy="return Baseline(..., outputs=...), or values, or metrics",
            )
        paired = _paired(self.measured, theirs, rows)
        return (*paired, *given.values())

    def _unpaired(self, name: str, baseline: Interval) -> Compared:
        """Compare by the intervals alone: the rows of the baseline are not known."""
        ours = self.measured.get(name)
        if ours is None:
            return Compared(name, None, baseline)
        network = ours.interval(len(self.samples))
        spread = math.hypot(
            half_width(network),
            half_width(baseline),
        )
        value = network.value - baseline.value
        difference = Interval(value, value - spread, value + spread)
        verdict = verdict_of(name, difference, math.nan)
        return Compared(
            name,
            network,
            baseline,
            difference,
            verdict=verdict,
        )


def _paired(
    ours: Mapping[str, Measured],
    theirs: Mapping[str, Measured],
    rows: int,
) -> list[Compared]:
    """Compare all metrics over the same resamples of the rows."""
    everything = [*ours.values(), *theirs.values()]
    drawn: dict[int, list[float]] = {id(one): [] for one in everything}
    most = max(
        (one.resamples for one in everything if one.hits is None),
        default=0,
    )
    for number, counts in enumerate(
        resamples(
            rows,
            most,
        )
    ):
        for one in everything:
            if number < one.resamples:
                drawn[id(one)].append(one.of(counts))
    compared = []
    for name, their in theirs.items():
        baseline = _of_drawn(their, drawn, rows)
        if name not in ours:
            compared.append(Compared(name, None, baseline))
            continue
        our = ours[name]
        network = _of_drawn(our, drawn, rows)
        compared.append(
            _difference(
                name,
                our,
                their,
                network,
                baseline,
                drawn,
            )
        )
    return compared


def _difference(
    name: str,
    ours: Measured,
    theirs: Measured,
    network: Interval,
    baseline: Interval,
    drawn: Mapping[int, list[float]],
) -> Compared:
    value = network.value - baseline.value
    chance = math.nan
    counts = None
    if ours.hits is not None and theirs.hits is not None:
        counts = alone(ours.hits, theirs.hits)
        chance = counts.chance()
        apart = ours.hits - theirs.hits
        width = QUANTILE * apart.std() / math.sqrt(len(apart))
        difference = Interval(value, value - width, value + width)
    else:
        count = min(
            len(drawn[id(ours)]),
            len(drawn[id(theirs)]),
        )
        values = np.subtract(
            drawn[id(ours)][:count],
            drawn[id(theirs)][:count],
        )
        difference = percentiles(value, values)
    verdict = verdict_of(name, difference, chance)
    return Compared(
        name,
        network,
        baseline,
        difference,
        chance,
        verdict,
        paired=True,
        alone=counts,
    )


def _of_drawn(
    one: Measured,
    drawn: Mapping[int, list[float]],
    rows: int,
) -> Interval:
    if one.hits is not None:
        return wilson(one.hits.sum(), rows)
    return percentiles(
        one.value,
        np.array(drawn[id(one)]),
    )


# ---- outputs of a baseline in the form of the network's ----


def fitted_to(baseline: Baseline, outputs: Any, rows: int) -> np.ndarray:
    """Return a baseline's outputs in the shape of the network's.

    Two columns of logits become one where the network gives one, their difference; and
    classes that the baseline has never seen get the least of its values.

    Raises:
      DataError: they can't be brought into this shape.
    """
    given = np.asarray(baseline.outputs, np.float32)
    _check_rows(baseline, len(given), rows)
    shape = (
        np.shape(outputs)
        if isinstance(
            outputs,
            np.ndarray,
        )
        else given.shape
    )
    if given.shape == shape:
        return given
    if given.shape == (rows, 2) and math.prod(shape) == rows:
        return (given[:, 1] - given[:, 0]).reshape(shape)
    if given.size == math.prod(shape):
        return given.reshape(shape)
    is_short = given.ndim == len(shape) == 2 and given.shape[1] < shape[1]
    if is_short:
        missing = np.full(
            (rows, shape[1] - given.shape[1]),
            given.min(),
            np.float32,
        )
        return np.concatenate(
            [given, missing],
            axis=1,
        )
    raise DataError(
        f"the baseline gives outputs {list(given.shape)}, the network {list(shape)}",
        where=baseline.name,
        remedy="give them in the shape of the network's",
    )


def _check_rows(baseline: Baseline, given: int, rows: int) -> None:
    if given != rows:
        raise DataError(
            f"the baseline gives {given} rows for {rows} test rows",
            where=baseline.name,
            remedy="give a value for each test row, in their order",
        )


# ---- words ----


def verdict_of(metric: str, difference: Interval, chance: float) -> str:
    """Return whether the network is better, worse, or can't be told apart.

    Args:
      metric: its name, which says whether less of it is better.
      difference: network less baseline.
      chance: probability of such a difference by chance; NaN: the interval decides.
    """
    is_sure = difference.low > 0 or difference.high < 0
    if not math.isnan(chance):
        is_sure = chance < 1 - LEVEL
    if not is_sure:
        return EQUAL
    is_more = difference.value > 0
    return BETTER if is_more != less_is_better(metric) else WORSE


def less_is_better(metric: str) -> bool:
    """Whether less of a metric is better, by its name."""
    name = metric.lower()
    words = set(re.split(r"[^a-z0-9]+", name))
    return any(part in name for part in LESS_IS_BETTER) or bool(words & SHORT_WORDS)


def half_width(interval: Interval) -> float:
    """Return half the width of an interval."""
    return (interval.high - interval.low) / 2


def shown(interval: Interval) -> str:
    """Return an interval as a person reads it.

    >>> shown(Interval(0.7912, 0.7790, 0.8030))
    '0.791 ± 0.012'
    """
    half = half_width(interval)
    if not math.isfinite(half) or half <= 0:
        return f"{interval.value:.4g}"
    decimals = DIGITS - 1 - math.floor(math.log10(half))
    decimals = min(max(0, decimals), MOST_DECIMALS)
    return f"{interval.value:.{decimals}f} ± {half:.{decimals}f}"


def sentence(name: str, compared: Compared) -> str:
    """Return one comparison in words."""
    baseline = f"{name} {shown(compared.baseline)}"
    if compared.network is None:
        return f"{compared.metric}: {baseline}"
    network = f"{compared.metric} {shown(compared.network)}"
    verdict = VERDICTS.get(compared.verdict, "")
    return f"{network}; {baseline}: {verdict}"
