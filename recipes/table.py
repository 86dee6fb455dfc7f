"""A table of numbers, categories and dates: classes, quantities or counts."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax.data.table import quantile_edges
from lepton_jax.errors import RecipeError, nearest

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

# Settings of this recipe that decide how a table is read.
SETTINGS = (
    *("missing", "delimiter", "decimal", "thousands"),
    *("categorical", "ignore", "words", "label_kind"),
)
TEST_SHARE = 0.2  # of the rows, where there is no test file
BASELINES = (
    lepton.baselines.logistic,
    lepton.baselines.nearest,
    lepton.baselines.boosting,
)
LEAST_STEPS = 100  # of a run, so that a small table is learned too; assumption
EMBEDDED_ROWS = 2500  # a fifth is held out; assumption: a minute is enough for them
# Rows per step, of a small table and of others. Assumption: on a few hundred rows large
# batches are learned by heart before they are learned from.
BATCHES = (64, 256)
SMALL = 10_000  # training rows, below which a table is small; assumption
WARMUP = 0.1  # of the run, in which the rate rises


class Defaults(NamedTuple):
    """Settings of a model, unless somebody gives others.

    Attributes:
      width: see `recipe`.
      dropout: see `recipe`.
      learning_rate: see `recipe`.
      weight_decay: see `recipe`.
      epochs: see `recipe`.
      numbers: kind of the features of numbers; see `lepton_jax.models.TabularFront`.
      bins: of a number, at most.
    """

    width: int
    dropout: float
    learning_rate: float
    weight_decay: float
    epochs: float
    numbers: str
    bins: int = 128


# Chosen by the likelihood of validation fifths of Adult's training file (mlp and tabm),
# or the defaults of Gorishniy et al. 2021, appendix E (the others).
DEFAULTS = {
    "mlp": Defaults(256, 0.3, 1e-3, 1e-4, 20, "codes", bins=48),
    "resnet": Defaults(192, 0.15, 1e-3, 1e-3, 10, "piecewise"),
    "ft_transformer": Defaults(64, 0.1, 1e-3, 1e-5, 10, "linear"),
    "tabm": Defaults(128, 0.1, 3e-3, 0.02, 10, "periodic"),
}
# The same where a table is small. Of three tried the best by the loss over five folds
# of Titanic that are others than those reported: 0.424, with "linear" 0.429 and 0.430.
SMALL_DEFAULTS = {"tabm": Defaults(64, 0.2, 3e-3, 0.02, 20, "piecewise", bins=16)}


def recipe(
    data: Path | None = None,
    label: str = "label",
    test: Path | None = None,
    categorical: str = "",
    ignore: str = "",
    words: str = "",
    group: str = "",
    missing: str = ",".join(
        filter(
            None,
            lepton.data.MISSING,
        )
    ),
    label_kind: Literal["auto", "classes", "quantity", "count"] = "auto",
    delimiter: str | None = None,
    decimal: Literal[".", ","] | None = None,
    thousands: str | None = None,
    names: str = "",
    test_skip: int | None = None,
    label_end: str = "",
    duplicates: Literal["keep", "drop"] = "keep",
    prepared: Path | None = None,
    model: Literal["mlp", "resnet", "ft_transformer", "tabm"] = "tabm",
    members: int = 16,
    width: int | None = None,
    dropout: float | None = None,
    class_weights: Literal["none", "balanced"] = "none",
    folds: int | None = None,
    fold: int = 0,
    validation: float = 0.0,
    patience: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    micro_batches: int | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """A table with a network: classes, quantities or counts.

    Without `data` it learns a made-up table, `sklearn.datasets.make_hastie_10_2`, 2,500
    rows of 10 numbers whose class is decided by the sum of their squares. It gets
    93.4 % of a held-out fifth right in 20 seconds, baselines included. Logistic
    regression gets 53 % and nearest neighbours 66 %; gradient boosting gets 92.2 %,
    which these 500 rows don't tell apart from it. Breast cancer, scikit-learn's real
    table with two classes, is not the default, since logistic regression (97.9 % over
    five folds) was better there than the networks tried:

        python tools/launch.py recipes/table.py

    With UCI Adult, it gets 87.50 % of the test file right (median of three seeds), in
    three and a half minutes on one busy CPU core; tuned gradient boosting gets 87.33 %
    (benchmarks/peers/adult_hgb.py FOLDER --trials 20). The files have no header, and
    the test file has a line above its rows and dots after its labels:

        python tools/launch.py recipes/table.py --data adult.data.gz
        ... --test adult.test.gz --test-skip 1 --label column_15 --label-end .

    With Titanic, it gets 82.4 % right (10 folds, all 891 rows together, +- 2.5), where
    the passengers of a ticket are in one fold and the titles in their names are inputs;
    on the same folds logistic regression gets 82.2 % and gradient boosting 79.2 %. The
    settings for small tables were chosen on other folds of the same rows:

        python tools/launch.py recipes/table.py --data titanic.csv --label Survived
        ... --group Ticket --folds 10 --ignore PassengerId,Cabin --words Name

    Args:
      data: table of which each row is a sample: a CSV file in any dialect, JSON lines,
        Parquet or Arrow; see docs/data.md.
      label: name of the column to predict, or names of several, with commas between,
        which must be of one kind.
      test: table to evaluate on; if left out, a random fifth of the rows of data, the
        same one whatever the seed.
      categorical: names, with commas between, of columns that are categories though
        they look like numbers or dates.
      ignore: names, with commas between, of columns that are left out.
      words: names, with commas between, of columns of text, such as names with titles:
        the model sees whether a row has each of the eight most frequent words.
      group: names, with commas between, of columns that say what belongs together, such
        as the patient of a row: rows of one group are held out together. They are no
        inputs.
      missing: words, with commas between, that stand for no value; empty cells always
        do.
      label_kind: whether the label has classes, is a quantity (its mean is learned, by
        squared errors) or a count (its rate, by a Poisson distribution); "auto" takes
        it for a quantity if it is numeric with more than 20 distinct values, else for
        classes.
      delimiter: what separates the cells, one character or "tab"; found out if left
        out.
      decimal: the decimal mark of all numbers; found out if left out.
      thousands: the mark between groups of three digits; found out if left out.
      names: names of the columns, with commas between, of a file without a header; if
        left out, column_1, column_2, ...
      test_skip: lines above the rows of the test table.
      label_end: characters that are cut off the end of labels.
      duplicates: what to do about rows that equal an earlier one; they are counted in
        any case.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      model: see `lepton_jax.models`: TabularMLP, TabularResNet, FTTransformer or TabM.
      members: of TabM.
      width: units of the first hidden layer, or of a token; if left out, as suits the
        model. The MLP's second layer has half as many.
      dropout: share of the hidden units dropped; if left out, as suits the model.
      class_weights: "balanced": each class counts the same in the training loss,
        however rare it is.
      folds: the test is one of so many equal parts of the rows, in place of a fifth.
      fold: which one, from 0; `launch.py` without it runs all, one after the other.
      validation: share of the rows to choose settings by: the figures of the run are
        theirs, and the test rows stay unseen.
      patience: end the run after so many evaluations, one a pass, that were no better,
        and keep the best parameters; needs `validation`.
      learning_rate: of AdamW at its peak; it rises over the first tenth of the run and
        falls as a cosine to zero. If left out, as suits the model.
      weight_decay: of AdamW; if left out, as suits the model.
      batch_size: rows per step, over all devices; if left out, 256, or 64 where there
        are less than 10,000 training rows.
      epochs: passes over the training rows; if left out, as suits the model, and such
        that there are 100 steps.
      steps: length of the run in steps, instead of epochs.
      micro_batches: parts in which a batch passes through the model.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, dropout and the order of the rows.
    """
    if model not in DEFAULTS:
        raise RecipeError(
            f"model {model!r} is not known{nearest(model, DEFAULTS)}",
            where="--model",
            remedy=f"use one of {', '.join(DEFAULTS)}",
        )
    if members < 1:
        raise RecipeError(
            f"members is {members}; it must be at least 1",
            where="--members",
            remedy="set it to e.g. 8",
        )
    source = source_of(
        data,
        label,
        test=test,
        categorical=_words(categorical),
        ignore=_words(ignore),
        words=_words(words),
        group=_words(group),
        folds=folds,
        fold=fold,
        validation=validation,
        label_kind=label_kind,
        label_end=label_end,
        duplicates=duplicates,
        reading={
            "missing": ("", *_words(missing)),
            "delimiter": delimiter,
            "decimal": decimal,
            "thousands": thousands,
            "names": _words(names) or None,
        },
        bins=lambda rows: defaults_of(model, rows).bins,
        test_reading={} if test_skip is None else {"skip": test_skip},
        folder=prepared,
        settings=SETTINGS,
    )
    if patience is not None and source.validation is None:
        raise RecipeError(
            "to stop by the test rows would make their figure too good",
            where="--patience",
            remedy="give --validation too, such as 0.15",
        )
    defaults = defaults_of(model, len(source.train))
    task = task_of(source, class_weights)
    if model == "tabm":
        task = of_ensemble(task)
    batch_size = batch_size or BATCHES[len(source.train) >= SMALL]
    epochs = epochs or _epochs(
        defaults.epochs,
        len(source.train),
        batch_size,
    )
    total = steps or math.ceil(epochs * len(source.train) / batch_size)

    asked = Network(
        model,
        members,
        width or defaults.width,
        defaults.dropout if dropout is None else dropout,
        defaults.numbers,
    )
    return lepton.Recipe(
        name="table",
        model=network(asked, source, task),
        loss=task.loss,
        metrics=task.metrics,
        decode=task.decode,
        baseline=baselines_of(task, source),
        optimizer=partial(
            optax.adamw,
            weight_decay=(
                defaults.weight_decay if weight_decay is None else weight_decay
            ),
        ),
        learning_rate=optax.warmup_cosine_decay_schedule(
            0.0,
            learning_rate or defaults.learning_rate,
            int(total * WARMUP),
            total,
        ),
        train=source.train,
        test=source.test if source.validation is None else source.validation,
        controller=stopping(patience),
        preparation=source.serving,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        micro_batches=micro_batches,
        save_every=save_every,
        seed=seed,
    )


def defaults_of(model: str, rows: int) -> Defaults:
    """Return the settings of a model that suit so many training rows."""
    if rows < SMALL and model in SMALL_DEFAULTS:
        return SMALL_DEFAULTS[model]
    return DEFAULTS[model]


def baselines_of(
    task: Task,
    source: Source,
) -> tuple[Callable[..., Any], ...]:
    """Return what the network has to beat, and the alarm of columns that are too good.

    The alarm is for one label with classes, or one quantity.
    """
    if len(source.labels) > 1 or source.kind == "count":
        return task.baselines
    alarm = partial(
        lepton.baselines.without_suspects,
        names=source.columns,
    )
    return (*task.baselines, alarm)


def stopping(patience: int | None) -> tuple[Any, ...]:
    """Return the policies of a run that ends early; () for one that does not."""
    if patience is None:
        return ()
    return (lepton.controllers.early_stopping(patience=patience),)


class Source(NamedTuple):
    """Samples, and what the model and the loss depend on.

    Attributes:
      train: samples to train on.
      test: samples to test on.
      edges: edges of the bins of each number.
      sizes: count of indices of each category.
      kind: "classes", "quantity" or "count".
      labels: names of the columns to predict.
      classes: count of each label's classes; () for quantities and counts.
      serving: the way from raw rows to samples; None for the embedded table.
      validation: samples to choose settings by; None: there are none.
      columns: names of the columns, by the model's argument.
    """

    train: lepton.data.Arrays
    test: lepton.data.Arrays
    edges: tuple[tuple[float, ...], ...]
    sizes: tuple[int, ...]
    kind: str
    labels: tuple[str, ...]
    classes: tuple[int, ...]
    serving: Any = None
    validation: lepton.data.Arrays | None = None
    columns: Mapping[str, list[str]] | None = None


class Task(NamedTuple):
    """What is to be learned: the model's outputs, the loss and the metrics.

    Attributes:
      outputs: the model's arguments that say what it returns.
      merge: a function from the outputs of TabM's members to one.
      loss: of a batch.
      metrics: by name.
      baselines: what the network has to beat.
      decode: outputs to predictions; None: what the loss implies.
    """

    outputs: Mapping[str, Any]
    merge: Callable[..., Any]
    loss: Callable[..., Any]
    metrics: Mapping[str, Any]
    baselines: tuple[Callable[..., Any], ...]
    decode: Callable[..., Any] | None = None


class Network(NamedTuple):
    """A model that somebody asks for; the attributes are settings of `recipe`."""

    model: str
    members: int
    width: int
    dropout: float
    numbers: str


def source_of(
    data: Path | None,
    label: str,
    bins: Callable[[int], int],
    **asked: Any,
) -> Source:
    """Return a person's own table, prepared, or the embedded one.

    Args:
      data: the file; None: the embedded table.
      label: name of the column to predict, or names with commas between.
      bins: of a number, at most, by the count of training rows.
      **asked: fields of `_tables.Asked`.

    Raises:
      RecipeError: there is a test table, but no training table.
      DataError: the file can't be read, or not be prepared.
    """
    if data is not None:
        return _prepared(data, label, bins, **asked)
    for name in ("test", "group", "folds", "validation", "words"):
        if asked[name]:
            raise RecipeError(
                "there is a test table, but no training table"
                if name == "test"
                else f"{name} is for a table of one's own",
                where=f"--{name}",
                remedy="give --data too",
            )
    return _embedded(label, bins)


def task_of(
    source: Source,
    class_weights: str,
) -> Task:
    """Return what is to be learned.

    Raises:
      RecipeError: weights of classes are asked for, but there are none.
    """
    if class_weights != "none" and source.kind != "classes":
        raise RecipeError(
            f"the label is a {source.kind} and has no classes to weigh",
            where="--class-weights",
            remedy="leave it out, or set --label-kind classes",
        )
    if source.kind == "classes":
        return _classes(source, class_weights)
    if source.kind == "count":
        return _counts(source)
    return _quantities(source)


def network(
    asked: Network,
    source: Source,
    task: Task,
) -> Callable[..., Any]:
    """Return the factory of a model for a table."""
    front = {"edges": source.edges, "sizes": source.sizes}
    if asked.model == "mlp":
        return partial(
            lepton.models.TabularMLP,
            **front,
            hidden=(asked.width, asked.width // 2),
            dropout=asked.dropout,
            **task.outputs,
        )
    front["kind"] = asked.numbers
    if asked.model == "tabm":
        return partial(
            lepton.models.TabM,
            members=asked.members,
            hidden=(asked.width, asked.width),
            dropout=asked.dropout,
            merge=task.merge,
            front=front,
            **task.outputs,
        )
    of_name = {
        "resnet": lepton.models.TabularResNet,
        "ft_transformer": lepton.models.FTTransformer,
    }
    return partial(
        of_name[asked.model],
        width=asked.width,
        dropout=asked.dropout,
        front=front,
        **task.outputs,
    )


def of_ensemble(task: Task) -> Task:
    """Return a task with the loss of each member, and metrics of all together."""
    ndim = 1 if task.outputs["outputs"] is None else 2
    metrics = {
        name: lepton.metrics.of_ensemble(metric, task.merge, ndim)
        for name, metric in task.metrics.items()
    }
    loss = partial(
        lepton.losses.of_members,
        loss=task.loss,
        ndim=ndim,
    )
    return task._replace(loss=loss, metrics=metrics)


# ---- what is to be learned ----


def _classes(
    source: Source,
    class_weights: str,
) -> Task:
    """Return one label, or several ones, with classes."""
    if len(source.classes) > 1:
        return _several_classes(source, class_weights)
    (classes,) = source.classes
    metrics: dict[str, Any] = {"accuracy": lepton.metrics.accuracy}
    if classes == 2:
        metrics["auc"] = lepton.metrics.auc
    if classes > 2 or class_weights == "balanced":
        metrics["f1"] = lepton.metrics.f1
    loss: Any = lepton.losses.cross_entropy
    if class_weights == "balanced":
        weights = lepton.losses.balanced(source.train.targets, classes)
        loss = partial(
            lepton.losses.weighted_cross_entropy,
            weights=weights,
        )
    return Task(
        {"outputs": classes},
        lepton.models.mean_of_probabilities,
        loss,
        metrics,
        BASELINES,
    )


def _several_classes(
    source: Source,
    class_weights: str,
) -> Task:
    if class_weights != "none":
        raise RecipeError(
            f"there are {len(source.labels)} labels, whose classes can't be weighed",
            where="--class-weights",
            remedy="leave it out, or predict one label",
        )
    classes = source.classes
    metrics = {
        _metric_name("accuracy", label, column): partial(
            _joint_accuracy,
            classes=classes,
            column=column,
        )
        for column, label in enumerate(source.labels)
    }
    return Task(
        {"outputs": sum(classes)},
        partial(
            lepton.models.mean_of_probabilities,
            classes=classes,
        ),
        partial(
            lepton.losses.joint_cross_entropy,
            classes=classes,
        ),
        metrics,
        (),
    )


def _joint_accuracy(
    outputs: Any,
    targets: Any,
    *,
    classes: tuple[int, ...],
    column: int,
) -> Any:
    labels = lepton.losses.joint_labels(outputs, classes=classes)
    hits = labels[:, column] == targets[:, column]
    return hits.astype(jnp.float32)


def _counts(source: Source) -> Task:
    targets = source.train.targets
    # the model begins at the mean rate
    mean = np.log(np.maximum(targets.mean(axis=0), LEAST_RATE))
    return Task(
        {"outputs": _outputs(source), "center": _plain(mean)},
        lepton.models.mean_of_rates,
        lepton.losses.poisson,
        _each(source, "rmse", _squared_error_of_rate),
        (_mean_rate, _boosted_rate),
    )


def _quantities(source: Source) -> Task:
    targets = source.train.targets
    spread = targets.std(axis=0)
    spread = np.where(spread > 0, spread, 1)
    center = targets.mean(axis=0)
    return Task(
        {
            "outputs": _outputs(source),
            "center": _plain(center),
            "spread": _plain(spread),
        },
        lepton.models.mean_of_outputs,
        partial(
            lepton.losses.scaled_squared_error,
            spread=_plain(spread),
        ),
        _each(source, "rmse", lepton.losses.squared_error),
        BASELINES,
    )


LEAST_RATE = 1e-6  # of counts that are all zero, so that it has a logarithm


def _outputs(source: Source) -> int | None:
    """Return the count of outputs; None for one without a dim of its own."""
    labels = len(source.labels)
    return labels if labels > 1 else None


def _plain(values: np.ndarray) -> Any:
    """Return a number, or a tuple of numbers, of Python's own."""
    listed = values.astype(float).tolist()
    return tuple(listed) if isinstance(listed, list) else listed


def _each(
    source: Source,
    name: str,
    squared_error: Callable[..., Any],
) -> dict[str, Any]:
    """Return the root of the mean squared error of each label, in its own unit."""
    if len(source.labels) == 1:
        return {name: lepton.metrics.Metric(squared_error, jnp.sqrt)}
    return {
        _metric_name(name, label, column): lepton.metrics.Metric(
            partial(
                _of_column,
                column=column,
                values=squared_error,
            ),
            jnp.sqrt,
        )
        for column, label in enumerate(source.labels)
    }


def _metric_name(
    name: str,
    label: str,
    column: int,
) -> str:
    """Return the name of a label's metric: letters, digits and underscores."""
    plain = re.sub(r"\W+", "_", label).strip("_")
    return f"{name}_{plain or column}"


def _of_column(
    outputs: Any,
    targets: Any,
    *,
    column: int,
    values: Callable[..., Any],
) -> Any:
    return values(outputs[:, column], targets[:, column])


def _mean_rate(train: Any, test: Any) -> Any:
    return _log_of(lepton.baselines.majority(train, test))


def _boosted_rate(train: Any, test: Any) -> Any:
    return _log_of(
        lepton.baselines.boosting(
            train,
            test,
            loss="poisson",
        )
    )


def _log_of(baseline: Any) -> Any:
    """Return a baseline with logarithms of rates, as the model gives them."""
    rates = np.maximum(baseline.outputs, LEAST_RATE)
    return dataclasses.replace(baseline, outputs=np.log(rates))


def _squared_error_of_rate(
    outputs: Any,
    targets: Any,
) -> Any:
    return lepton.losses.squared_error(jnp.exp(outputs), targets)


def _epochs(
    epochs: float,
    rows: int,
    batch_size: int,
) -> float:
    """Return passes over the rows: more of them where the rows are few."""
    return max(epochs, LEAST_STEPS * batch_size / rows)


# ---- tables ----


def _prepared(
    data: Path,
    label: str,
    bins: Callable[[int], int],
    **asked: Any,
) -> Source:
    """Read and prepare a person's own tables."""
    # only here: the embedded table needs no library that reads files
    from lepton_jax.data import prepare
    from recipes import _tables

    labels = _words(label)
    if not labels:
        raise RecipeError(
            "there is no label",
            where="--label",
            remedy="name the column to predict",
        )
    looked = _tables.Looked(
        _tables.Asked(
            data,
            labels[0] if len(labels) == 1 else labels,
            **asked,
        )
    )
    steps: list[Any] = [*_tables.words_of(looked)]
    of_words = [step.column for step in steps]
    numbers = [*looked.numbers, *_tables.parts_of_dates(looked), *of_words]
    inputs: dict[str, Any] = {}
    if looked.dates:
        steps.append(prepare.DateFeatures(looked.dates))
    if numbers:
        steps.append(prepare.AsFloats(numbers))
        inputs["numbers"] = numbers
    if looked.categories:
        steps.append(prepare.Vocabulary(looked.categories))
        inputs["categories"] = looked.categories
    tables = _tables.tables(looked, inputs, steps)

    return Source(
        train=tables.train,
        test=tables.test,
        edges=_edges(tables.train, bins) if numbers else (),
        sizes=tuple(tables.sizes[name] for name in looked.categories),
        kind=looked.kind,
        labels=labels,
        classes=tables.counts,
        serving=tables.serving,
        validation=tables.validation,
        columns=inputs,
    )


def _edges(
    train: lepton.data.Arrays,
    bins: Callable[[int], int],
) -> tuple[tuple[float, ...], ...]:
    """Return the edges of the bins of each number."""
    most = bins(len(train))
    columns = train.inputs["numbers"].T
    return tuple(quantile_edges(column, most) for column in columns)


def _embedded(
    label: str,
    bins: Callable[[int], int],
) -> Source:
    """Return the ten numbers of `make_hastie_10_2`, of which a fifth is held out."""
    try:
        from sklearn.datasets import make_hastie_10_2
    except ImportError as error:
        raise RecipeError(
            "scikit-learn, which makes the default data, is not installed",
            where="recipes/table.py",
            remedy="pip install -e '.[recipes]', or give --data, a table",
        ) from error

    numbers, labels = make_hastie_10_2(EMBEDDED_ROWS, random_state=0)
    samples = lepton.data.Arrays(
        {"numbers": numbers.astype(np.float32)},
        (labels > 0).astype(np.int32),
    )
    train, test = samples.split(TEST_SHARE, seed=0)
    return Source(
        train,
        test,
        _edges(train, bins),
        (),
        "classes",
        (label,),
        (2,),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
