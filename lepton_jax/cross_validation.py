"""Cross validation: a run for each fold, and what they say together.

The folder of a cross validation:

    recipe.json        where the recipe came from, if it has a file
    folds.json         what is known so far: the metrics of each finished fold
    predictions.npz    targets, outputs and fold of all test rows
    report.html        the folds side by side
    fold_00/ ...       a run each, with its own report

The mean over folds has the interval of Nadeau and Bengio (Machine Learning 52, 2003,
section 3): folds share training rows, so their spread alone would be too sure. With K
folds the variance of the mean is (1/K + 1/(K - 1)) times that of the folds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.baselines import (
    VERDICTS,
    Alone,
    Compared,
    Comparison,
    Interval,
    all_measured,
    shown,
    verdict_of,
)
from lepton_jax.data import epoch_samples
from lepton_jax.errors import DataError, LeptonError, RecipeError, writing_remedy
from lepton_jax.hosts import agreement
from lepton_jax.monitor import Sink, plain, write_folds_report
from lepton_jax.recipe import Recipe
from lepton_jax.train.baseline import SECONDS
from lepton_jax.trainer import Trainer

FILE = "folds.json"
PREDICTIONS = "predictions.npz"
ROWS = "test_rows.npz"  # in a fold's folder
FORMAT = 1  # of the files; a later one may not be readable here
FEWEST = 2  # folds
TAIL = 0.975  # of Student's distribution, for an interval of 95 %
MOST_BYTES = 2**28  # of a fold's outputs that are kept; assumption


@dataclass(frozen=True)
class FoldResult:
    """One finished fold.

    Attributes:
      fold: its number.
      metrics: of its test rows.
      rows: of its test.
      steps: that were trained.
      baselines: what cheap methods reach on the same rows.
    """

    fold: int
    metrics: dict[str, float]
    rows: int
    steps: int
    baselines: tuple[Comparison, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """Return it as plain data."""
        fields = {**vars(self)}
        fields["baselines"] = [one.to_fields() for one in self.baselines]
        return plain(fields)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> FoldResult:
        """Return what `to_fields` was given."""
        baselines = tuple(
            map(
                Comparison.from_fields,
                fields["baselines"],
            )
        )
        return cls(**{**fields, "baselines": baselines})


@dataclass(frozen=True)
class OverFolds:
    """A metric, or a difference of two methods, over folds.

    Attributes:
      name: of the metric.
      values: of each fold.
      mean: of them.
      error: their standard error, std / sqrt(K).
      interval: of the mean, 95 %.
      pooled: the metric of all test rows together, with its interval; None: they are
        not known.
    """

    name: str
    values: tuple[float, ...]
    mean: float
    error: float
    interval: Interval
    pooled: Interval | None = None

    def __str__(self) -> str:
        text = f"{self.name} {shown(self.interval)} (mean of {len(self.values)} folds,"
        text += f" standard error {self.error:.2g})"
        if self.pooled is not None:
            text += f"; all rows together {shown(self.pooled)}"
        return text


@dataclass(frozen=True)
class BaselineOverFolds:
    """A cheap method and the network on the same folds.

    Attributes:
      name: of the method.
      metric: by which they are compared.
      baseline: the method over folds.
      difference: network less method, over folds.
      verdict: "better", "worse" or "equal", of the network, by the difference.
      alone: rows of all folds in which one of the two alone is right; None: they don't
        hit or miss.
    """

    name: str
    metric: str
    baseline: OverFolds
    difference: OverFolds
    verdict: str
    alone: Alone | None = None

    def __str__(self) -> str:
        figure = shown(self.baseline.interval)
        difference = shown(self.difference.interval)
        words = VERDICTS[self.verdict]
        text = f"{self.metric}: {self.name} {figure}, {difference} apart: {words}"
        if self.alone is None:
            return text
        return (
            f"{text}; of all rows the network alone is right in {self.alone.ours:,}, it"
            f" alone in {self.alone.theirs:,} (by chance: {self.alone.chance():.2g})"
        )


@dataclass(frozen=True)
class CrossValidation:
    """The runs of all folds together.

    Attributes:
      folds: how many there are to be.
      results: of the finished ones.
      metrics: by name.
      baselines: cheap methods on the same folds.
      folder: of all; None: nothing was written.
    """

    folds: int
    results: tuple[FoldResult, ...]
    metrics: Mapping[str, OverFolds] = field(default_factory=dict)
    baselines: tuple[BaselineOverFolds, ...] = ()
    folder: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether all folds are."""
        return len(self.results) == self.folds

    def __str__(self) -> str:
        lines = [str(one) for one in (*self.metrics.values(), *self.baselines)]
        lines += [
            f"no baseline in fold {result.fold}: {one.name}: {one.failed}"
            for result in self.results
            for one in result.baselines
            if one.failed
        ]
        if not self.finished:
            lines.insert(0, f"{len(self.results)} of {self.folds} folds are finished")
        return "\n".join(lines)

    def to_fields(self) -> dict[str, Any]:
        """Return it as plain data, for folds.json and the report."""
        return plain(
            {
                "format": FORMAT,
                "folds": self.folds,
                "results": [one.to_fields() for one in self.results],
                "metrics": {name: asdict(one) for name, one in self.metrics.items()},
                "baselines": [asdict(one) for one in self.baselines],
                "text": str(self),
            }
        )


def cross_validate(
    make: Callable[[int], Recipe],
    folds: int,
    *,
    run_dir: str | Path | None = None,
    baseline_seconds: float = SECONDS,
    sinks: Callable[[Path | None], Sequence[Sink]] | None = None,
    source: Callable[[int], dict[str, Any]] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> CrossValidation:
    """Train a recipe on each of several folds, and put the results together.

    Folds that are finished in `run_dir` are not trained again, and one that was stopped
    goes on, so that the same call goes on with all.

    >>> from recipes.digits_cnn import recipe
    >>> result = lepton.cross_validate(
    ...     lambda fold: recipe(folds=5, fold=fold), folds=5
    ... )  # doctest: +SKIP

    Args:
      make: the number of a fold, from 0, to its recipe.
      folds: how many there are.
      run_dir: folder for a run a fold, and for what they say together; None: nothing is
        written.
      baseline_seconds: that each of the recipe's baselines may take; 0: none is fitted.
      sinks: the folder of a fold to receivers of its events.
      source: the number of a fold to where its recipe came from; see `Trainer`.
      trainer: further arguments of `Trainer`.

    Returns:
      What is known: of fewer folds if one was interrupted.

    Raises:
      RecipeError: `folds` is no count of at least 2.
      DataError: a recipe has no test data, or the folder holds other folds.
    """
    if (
        not isinstance(folds, int)
        or isinstance(
            folds,
            bool,
        )
        or folds < FEWEST
    ):
        raise RecipeError(
            f"folds is {folds!r}",
            where="cross_validate",
            remedy="give a whole number of at least 2",
        )
    folder = None if run_dir is None else Path(run_dir)
    known = agreement.first(
        lambda: [
            one.to_fields()
            for one in _finished(
                folder,
                folds,
            )
        ]
    )
    results = {one["fold"]: FoldResult.from_fields(one) for one in known}
    outputs: dict[int, Any] = {}
    recipe = None
    for fold in range(folds):
        if fold in results:
            continue
        place = None if folder is None else folder / fold_name(fold)
        recipe = make(fold)
        _check_tested(recipe, fold)
        run = Trainer(
            recipe,
            run_dir=place,
            sinks=() if sinks is None else sinks(place),
            source=None if source is None else source(fold),
            **(trainer or {}),
        )
        one = _trained(run, fold, baseline_seconds, outputs)
        if one is None:
            break
        results[fold] = one
        _write(
            folder,
            _together(folds, list(results.values()), folder),
        )
    done = _together(
        folds,
        [results[fold] for fold in sorted(results)],
        folder,
    )
    if recipe is not None or folder is not None:
        done = _with_pooled(
            done,
            recipe or make(0),
            outputs,
        )
    _write(folder, done)
    return done


def fold_name(fold: int) -> str:
    """Return the name of a fold's folder."""
    return f"fold_{fold:02}"


# ---- one fold ----


def _trained(
    run: Trainer,
    fold: int,
    seconds: float,
    outputs: dict[int, Any],
) -> FoldResult | None:
    """Train and judge a fold; None: it was interrupted."""
    place = run.run_dir
    has_begun = agreement.first(
        lambda: place is not None and (place / "recipe.json").exists()
    )
    if has_begun:
        run.resume()
    history = run.fit()
    if history.status != "finished":
        return None
    examined = run.examine(seconds)
    metrics = run.evaluate()._asdict()
    rows = epoch_samples(run.recipe.test) or 0
    comparisons: Sequence[Comparison] = ()
    if examined is not None:
        comparisons = examined.comparisons
        arrays = (examined.judged.samples.targets, examined.judged.outputs)
        if all(
            isinstance(
                one,
                np.ndarray,
            )
            for one in arrays
        ):
            _keep(run.run_dir, fold, arrays, outputs)
    return FoldResult(
        fold,
        metrics,
        rows,
        run.step,
        tuple(comparisons),
    )


def _keep(
    folder: Path | None,
    fold: int,
    arrays: tuple[np.ndarray, np.ndarray],
    outputs: dict[int, Any],
) -> None:
    """Keep targets and outputs of a fold's test rows, if they are not too large."""
    if sum(one.nbytes for one in arrays) > MOST_BYTES or agreement.host():
        return
    outputs[fold] = arrays
    if folder is not None:
        targets, given = arrays
        np.savez_compressed(
            folder / ROWS,
            targets=targets,
            outputs=given,
        )


def _check_tested(recipe: Recipe, fold: int) -> None:
    if recipe.test is None:
        raise DataError(
            f"the recipe of fold {fold} has no test data",
            where="cross_validate",
            remedy="let make(fold) return a recipe with Recipe.test",
        )


# ---- all folds ----


def over_folds(name: str, values: Sequence[float]) -> OverFolds:
    """Return the mean of a metric's values of folds, with its interval."""
    # only here: it takes a second to import, as long as the rest of Lepton
    from scipy.stats import t as student

    count = len(values)
    mean = float(np.mean(values))
    if count < FEWEST:
        return OverFolds(
            name,
            tuple(values),
            mean,
            math.nan,
            Interval(
                mean,
                math.nan,
                math.nan,
            ),
        )
    spread = float(
        np.std(
            values,
            ddof=1,
        )
    )
    corrected = spread * math.sqrt(1 / count + 1 / (count - 1))
    width = (
        float(
            student.ppf(
                TAIL,
                count - 1,
            )
        )
        * corrected
    )
    interval = Interval(mean, mean - width, mean + width)
    return OverFolds(
        name,
        tuple(values),
        mean,
        spread / math.sqrt(count),
        interval,
    )


def _together(
    folds: int,
    results: Sequence[FoldResult],
    folder: Path | None,
) -> CrossValidation:
    names = list(results[0].metrics) if results else []
    metrics = {
        name: over_folds(
            name,
            [one.metrics[name] for one in results],
        )
        for name in names
    }
    baselines = tuple(_baselines(results)) if results else ()
    return CrossValidation(
        folds,
        tuple(results),
        metrics,
        baselines,
        folder,
    )


def _baselines(results: Sequence[FoldResult]) -> list[BaselineOverFolds]:
    """Compare the network with each baseline that all folds have a result of."""
    found = []
    for place, first in enumerate(results[0].baselines):
        theirs = [one.baselines[place : place + 1] for one in results]
        for compared in first.compared:
            metric = compared.metric
            known = [
                one
                for comparisons in theirs
                for comparison in comparisons
                for one in comparison.compared
                if one.metric == metric and one.network is not None
            ]
            if len(known) == len(results):
                found.append(_baseline(first.name, known))
    return found


def _baseline(name: str, folds: Sequence[Compared]) -> BaselineOverFolds:
    """Put the comparisons of all folds together, by one metric."""
    metric = folds[0].metric
    ours = [one.network.value for one in folds if one.network is not None]
    theirs = [one.baseline.value for one in folds]
    difference = over_folds(metric, list(np.subtract(ours, theirs)))
    counts = [one.alone for one in folds if one.alone is not None]
    together = None
    if len(counts) == len(folds):
        together = Alone(
            sum(one.ours for one in counts),
            sum(one.theirs for one in counts),
        )
    return BaselineOverFolds(
        name,
        metric,
        over_folds(metric, theirs),
        difference,
        verdict_of(metric, difference.interval, math.nan),
        together,
    )


def _with_pooled(
    done: CrossValidation,
    recipe: Recipe,
    outputs: dict[int, Any],
) -> CrossValidation:
    """Add the metrics of all test rows together, and write these rows."""
    rows = _rows_of_folds(done, outputs)
    if rows is None or agreement.host():
        return done
    targets, given, fold_of = rows
    if done.folder is not None:
        np.savez_compressed(
            done.folder / PREDICTIONS, targets=targets, outputs=given, fold=fold_of
        )
    together = all_measured(recipe.metrics, given, targets)
    metrics = dict(done.metrics)
    for name, one in together.items():
        if name in metrics:
            metrics[name] = replace(
                metrics[name],
                pooled=one.interval(len(targets)),
            )
    return replace(done, metrics=metrics)


def _rows_of_folds(
    done: CrossValidation,
    outputs: dict[int, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return targets, outputs and folds of all test rows; None: some are not known."""
    parts = []
    for one in done.results:
        part = outputs.get(one.fold)
        if part is None and done.folder is not None:
            part = _read_rows(done.folder / fold_name(one.fold) / ROWS)
        if part is None:
            return None
        parts.append(part)
    if not parts:
        return None
    targets = np.concatenate([targets for targets, _ in parts])
    given = np.concatenate([given for _, given in parts])
    counts = [len(targets) for targets, _ in parts]
    return (
        targets,
        given,
        np.repeat(
            [one.fold for one in done.results],
            counts,
        ),
    )


def _read_rows(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as content:
        return content["targets"], content["outputs"]


# ---- files ----


def _finished(folder: Path | None, folds: int) -> list[FoldResult]:
    """Return the finished folds of a folder.

    Raises:
      DataError: it holds another count of folds, or can't be read.
    """
    if folder is None or not (folder / FILE).is_file():
        return []
    path = folder / FILE
    try:
        content = json.loads(path.read_text())
        count = content["folds"]
        results = [FoldResult.from_fields(one) for one in content["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the results of the finished folds can't be read: {error}",
            where=path,
            remedy="restore it from a copy, or name another folder",
        ) from error
    if count != folds:
        raise DataError(
            f"the folder holds {count} folds, and {folds} are asked for",
            where=path,
            remedy=f"ask for {count}, or name another folder",
        )
    return results


def _write(folder: Path | None, done: CrossValidation) -> None:
    if folder is None or agreement.host():
        return
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(
            json.dumps(
                done.to_fields(),
                indent=1,
            )
        )
        part.replace(path)
    except OSError as error:
        raise LeptonError(
            f"the results of the folds can't be written: {error.strerror or error}",
            where=path,
            remedy=f"{writing_remedy(error)}; then start again: it goes on",
        ) from error
    write_folds_report(folder)
