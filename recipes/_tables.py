"""Tables of a person's own, read and prepared for the recipes.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import atexit
import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import lepton_jax as lepton
from lepton_jax.cli.preparing import summary
from lepton_jax.data import prepare
from lepton_jax.data.readers import ROW, Column, Reader, reader_of
from lepton_jax.data.table import MOST_CLASSES
from lepton_jax.errors import DataError, RecipeError, nearest

PIECE_BYTES = 2**26  # of a source that are read at once; assumption
LARGEST = float(np.finfo(np.float32).max)  # number that a model can take
TEST_SHARE = 0.2  # of the rows, where there is no test table
MOST_WORDS = 8  # of a column whose words are inputs; assumption

# How a reader's remedies name its settings.
AS_TEXT = re.compile(r"types=\{('.+?'): 'String'\}.*")
SETTING = re.compile(r"\b(decimal|thousands|day_first|missing)=('.*?'|\S+)")
QUOTED = re.compile(r"`(\w+)`")
KEEPING = {"categorical": "to keep it as categories", "ignore": "to leave it out"}

Inputs = str | Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Asked:
    """What a person asks of a table.

    Attributes:
      data: the file, or a reader.
      label: name of the column to predict, or of several ones.
      test: another file to test on; None: a share of the rows is held out.
      columns: names of the columns to predict from; None: all but the label.
      categorical: names of columns that are categories though they look like numbers.
      ignore: names of columns that are left out.
      words: names of columns whose most frequent words are inputs, in place of the
        whole cells.
      label_kind: "classes", "quantity", "count", or "auto".
      label_end: characters that are cut off the end of labels.
      duplicates: "keep" rows that are there twice, or "drop" them.
      test_share: of the rows, where there is no test file.
      group: names of columns, which are no inputs; rows with the same values there are
        held out together.
      folds: the test is one of so many equal parts, in place of a share.
      fold: which one, from 0.
      validation: share of the rows that are held out, besides the test; with a test
        file, of the training file's.
      reading: settings of `reader_of`.
      test_reading: other ones for the test file.
      folder: for what is prepared; None: it is removed at the end of the process.
      settings: names of the recipe's settings that a remedy may name.
    """

    data: Any
    label: str | Sequence[str]
    test: Path | None = None
    columns: Sequence[str] | None = None
    categorical: Sequence[str] = ()
    ignore: Sequence[str] = ()
    words: Sequence[str] = ()
    label_kind: str = "auto"
    label_end: str = ""
    duplicates: str = "keep"
    test_share: float = TEST_SHARE
    group: Sequence[str] = ()
    folds: int | None = None
    fold: int = 0
    validation: float = 0.0
    reading: Mapping[str, Any] = field(
        default_factory=dict,
    )
    test_reading: Mapping[str, Any] = field(
        default_factory=dict,
    )
    folder: Path | None = None
    settings: Sequence[str] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns to predict."""
        return (self.label,) if isinstance(self.label, str) else tuple(self.label)


class Looked:
    """A table that was looked at: its columns, and of which kind each is.

    Args:
      asked: for what.

    Raises:
      DataError: the file can't be read, or a column is not there.
    """

    def __init__(self, asked: Asked):
        self.asked = asked
        as_words = [*asked.categorical, *asked.ignore, *asked.words]
        reading = dict(asked.reading)
        reading["types"] = dict.fromkeys(
            as_words,
            "String",
        ) | _types(reading)
        self.reading = {k: v for k, v in reading.items() if v not in (None, {})}
        self._open()
        # "yes" and "no" are to be predicted as such
        as_text = {
            name: "String"
            for name in asked.labels
            if name in self.kinds and self.kinds[name].type == pl.Boolean
        }
        if as_text:
            self.reading["types"] = self.reading.get("types", {}) | as_text
            self._open()
        self._check_names(as_words)
        used = self._used()
        self.numbers = [name for name in used if _is_number(self.kinds[name])]
        self.dates = [name for name in used if self.kinds[name].type.is_temporal()]
        apart = {*self.numbers, *self.dates}
        self.categories = [name for name in used if name not in apart]

    def _check_names(self, as_words: Sequence[str]) -> None:
        """Raise DataError or RecipeError if the columns can't be as they are asked."""
        asked = self.asked
        named = [*as_words, *(asked.columns or ()), *asked.group, *asked.labels]
        for name in named:
            self._check(name)
        for number, name in enumerate(asked.labels):
            others = [*asked.labels[:number], *asked.ignore, *asked.group, *asked.words]
            if name in [*others, *(asked.columns or ())]:
                raise RecipeError(
                    f"the label {name!r} is named twice: it can't be an input, a group"
                    " or ignored too",
                    where=asked.data,
                    remedy="name each column once",
                )

    def _used(self) -> list[str]:
        """Return the columns to predict from; those without a value are left out.

        Raises:
          DataError: none is left.
        """
        asked = self.asked
        used = list(asked.columns or ())
        if not used:
            left_out = {*asked.ignore, *asked.group, *asked.labels, *asked.words}
            used = [name for name in self.kinds if name not in left_out]
        rows = self.table.height
        gaps = dict(
            zip(
                self.table.columns,
                self.table.null_count().row(0),
                strict=True,
            )
        )
        self.empty = [name for name in used if gaps[name] == rows]
        used = [name for name in used if gaps[name] < rows]
        if not (used or asked.words) and rows:
            raise DataError(
                "no column is left to predict from",
                where=asked.data,
                remedy="take some out of `ignore`, or fill some that have no value",
            )
        return used

    def _open(self) -> None:
        with _offering(self.asked.settings):
            self.reader = reader_of(self.asked.data, **self.reading)
            columns = self.reader.columns()
        self.kinds = {column.name: column for column in columns}

    @cached_property
    def table(self) -> pl.DataFrame:
        """All rows of the file."""
        return rows_of(self.reader)

    @cached_property
    def is_quantity(self) -> bool:
        """Whether the label is a quantity or a count, and has no classes."""
        return self.kind != "classes"

    @cached_property
    def kind(self) -> str:
        """What all labels are: "classes", "quantity" or "count"."""
        of_label = {name: self._kind_of(name) for name in self.asked.labels}
        first, *others = of_label
        for name in others:
            if of_label[name] != of_label[first]:
                raise DataError(
                    f"the labels differ in kind: {first!r} is taken for"
                    f" {of_label[first]}, {name!r} for {of_label[name]}",
                    where=self.asked.data,
                    remedy="predict one of them, or set `label_kind`",
                )
        return of_label[first]

    def _kind_of(self, label: str) -> str:
        """Return the kind of one label, and check that its cells are of it."""
        kind = self.asked.label_kind
        column = self.kinds[label]
        is_number = _is_number(column)
        where = f"{self.asked.data}, column {label!r}"
        if kind in ("quantity", "count") and not is_number:
            remedy = "name a column of numbers"
            if "label_kind" in self.asked.settings:
                remedy += ", or set `label_kind` to classes"
            raise DataError(
                f"the label holds no numbers: {column.reason}",
                where=where,
                remedy=remedy,
            )
        if kind == "auto":
            is_quantity = is_number and self.table[label].n_unique() > MOST_CLASSES
            kind = "quantity" if is_quantity else "classes"
        if column.type.is_temporal() and self.asked.label_kind == "auto":
            raise DataError(
                f"the label holds dates: {column.reason}",
                where=where,
                remedy=(
                    "predict a number, such as the days since the first, that is in a"
                    " column of its own, or set `label_kind` to classes"
                ),
            )
        if kind != "classes":
            self._check_numbers(label, kind, where)
            return kind
        values = self.table[label].drop_nulls()
        if len(values) > 1 and values.n_unique() == len(values):
            raise DataError(
                f"each of {len(values):,} rows has a class of its own",
                where=where,
                remedy="name a column whose values come up more than once",
            )
        return kind

    def _check_numbers(
        self,
        label: str,
        kind: str,
        where: str,
    ) -> None:
        numbers = self.table.select(ROW, pl.col(label).cast(pl.Float64)).drop_nulls()
        value = pl.col(label)
        is_wrong = value.abs() > LARGEST
        if kind == "count":
            is_wrong = is_wrong | (value < 0) | (value.round() != value)
        wrong = numbers.filter(is_wrong)
        if len(wrong):
            raise DataError(
                f"the label holds {wrong[label][0]:g} in row {wrong[ROW][0]}, which is"
                f" no {'count' if kind == 'count' else 'quantity'}; so do"
                f" {len(wrong):,} rows in all",
                where=where,
                remedy="correct the cells, or empty them: rows without a label are"
                " left out",
            )

    def sources(self) -> dict[str, Reader]:
        """Return the readers of the file, and of the test file, which has its types."""
        if self.asked.test is None:
            return {_source_name(self.reader): self.reader}
        sources = {"train": self.reader}
        types = {name: str(column.type) for name, column in self.kinds.items()}
        reading = {**self.reading, **self.asked.test_reading, "types": types}
        self._check_test()
        sources["test"] = reader_of(
            self.asked.test,
            **reading,
        )
        return sources

    def _check_test(self) -> None:
        """Raise DataError if the test file lacks a label."""
        reading = {**self.reading, **self.asked.test_reading, "types": {}}
        reader = reader_of(self.asked.test, **reading)
        names = [column.name for column in reader.columns()]
        for label in self.asked.labels:
            if label not in names:
                raise DataError(
                    f"the test table has no label {label!r}{nearest(label, names)}",
                    where=self.asked.test,
                    remedy=f"its columns are {', '.join(names)}",
                )

    def _check(self, name: str) -> None:
        if name not in self.kinds:
            raise DataError(
                f"there is no column {name!r}{nearest(name, self.kinds)}",
                where=self.asked.data,
                remedy=f"the columns are {', '.join(self.kinds)}",
            )


@dataclass(frozen=True)
class Tables:
    """Prepared tables.

    Attributes:
      train: samples to train on.
      test: samples to test on.
      serving: the way from raw rows to these.
      sizes: count of codes of each column of categories, by its name.
      classes: values of the label; () for a quantity.
      counts: count of each label's classes; () for quantities.
      validation: samples to choose settings by; None: there are none.
    """

    train: lepton.data.Arrays
    test: lepton.data.Arrays
    serving: Any
    sizes: dict[str, int]
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    validation: lepton.data.Arrays | None = None


def tables(
    looked: Looked,
    inputs: Inputs,
    steps: Iterable[Any],
) -> Tables:
    """Prepare a table, and say on the terminal what was read and done.

    Args:
      looked: the table.
      inputs: which columns after the steps are the model's inputs.
      steps: between the split, which comes first, and the label's, which comes last.

    Raises:
      DataError: rows can't be read, or a step does not fit.
    """
    asked = looked.asked
    preparation = prepare.Preparation(
        looked.sources(),
        [*_first(looked), *_alarms(looked), *steps, *_last(looked)],
        inputs=_names(inputs),
        target=asked.label,
    )
    for name in looked.empty:
        print(f"column {name!r} is left out: it has no value", file=sys.stderr)
    serving = prepared(
        preparation,
        inputs,
        asked.folder,
        looked.reading,
    )
    print(
        twice(preparation.sources),
        file=sys.stderr,
    )
    train = serving.split("train")
    validation = None
    if asked.validation and asked.test is not None:
        train, validation = train.split(asked.validation, seed=0)
    elif asked.validation:
        validation = serving.split("validation")
    return Tables(
        train=train,
        validation=validation,
        test=serving.split("test"),
        serving=serving,
        sizes=sizes_of(serving),
        classes=serving.words,
        counts=_counts(serving),
    )


def prepared(
    preparation: Any,
    inputs: Any,
    folder: Path | None,
    reading: Mapping[str, Any],
) -> Any:
    """Prepare, say what was done, and return the `Serving`.

    Args:
      preparation: what to do.
      inputs: which columns after the steps are the model's inputs.
      folder: for what comes out; None: it is removed at the end of the process.
      reading: settings of `reader_of`, for raw rows in files.
    """
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="lepton-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    done = prepare.prepare(preparation, folder)
    print(summary(done), file=sys.stderr)
    for leak in prepare.leaks_in(done):
        print(f"alarm: {leak.what}", file=sys.stderr)
    return prepare.Serving(done, inputs, reading=reading)


def twice(
    sources: Mapping[str, Reader],
    but: Sequence[str] = (),
) -> str:
    """Return how many rows of each source equal an earlier one.

    Args:
      sources: by name.
      but: names of columns that don't count.
    """
    lines = []
    for name, reader in sources.items():
        rows = rows_of(reader).drop(ROW, *but)
        count = rows.height - rows.unique().height
        lines.append(f"{name}: {count:,} duplicate rows")
    return "\n".join(lines)


def texts(data: Path) -> Reader:
    """Return the reader of texts: of a table, or of files with a text on each line."""
    source = reader_of(data)
    if any(column.name == "text" for column in source.columns()):
        return reader_of(data, format="text", rows="line")
    return source


def words(text: str) -> tuple[str, ...]:
    """Return the words of a setting, with commas between."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parts_of_dates(looked: Looked) -> list[str]:
    """Return the columns that DateFeatures makes of a table's dates."""
    if not looked.dates:
        return []
    step = prepare.DateFeatures(looked.dates)
    before = pl.Schema({name: looked.kinds[name].type for name in looked.dates})
    return [name for name in step.check(before) if name not in before]


def words_of(looked: Looked) -> list[prepare.Derive]:
    """Return steps that make a column, true or false, of each frequent word.

    Words are what spaces part; case does not count. Which are frequent is counted in
    all rows of the file, the test rows among them, without their labels.
    """
    steps = []
    for column in looked.asked.words:
        cells = looked.table[column].alias("word").drop_nulls()
        words = cells.str.to_lowercase().str.split(" ").list.unique().explode()
        counts = words.filter(words != "").value_counts()
        frequent = counts.sort(
            "count",
            "word",
            descending=[True, False],
        )
        for word in frequent["word"].head(MOST_WORDS):
            text = f'" " + lower(col({column!r})) + " "'
            is_there = f"contains({text}, {f' {word} '!r})"
            steps.append(prepare.Derive(f"{column} has {word}", is_there))
    return steps


# ---- internals ----


@contextlib.contextmanager
def _offering(settings: Sequence[str]) -> Iterator[None]:
    """Name in a reader's remedies the settings of a recipe.

    >>> _remedy("types={'a': 'String'} to keep it as text", ["ignore"])
    "`ignore` with 'a' to leave it out"
    """
    try:
        yield
    except DataError as error:
        remedy = _remedy(error.remedy, settings)
        raise DataError(
            error.what,
            where=error.where,
            remedy=remedy,
        ) from error


def _remedy(
    remedy: str,
    settings: Sequence[str],
) -> str:
    parts = []
    for part in remedy.split("; or "):
        column = AS_TEXT.search(part)
        if column is not None:
            parts += [
                f"`{name}` with {column[1]} {why}"
                for name, why in KEEPING.items()
                if name in settings
            ]
            continue
        part = SETTING.sub(r"`\1` \2", part)
        named = QUOTED.findall(part)
        if not named or set(named) <= set(settings):
            parts.append(part)
    return (
        "; or ".join(parts)
        or "correct the cells, or prepare the file with lepton prepare"
    )


def _source_name(reader: Reader) -> str:
    """Return a reader's name as that of a source: of a path its last part."""
    name = Path(reader.name).name
    return re.sub(r"[^\w.-]+", "_", name) or "data"


def _types(reading: Mapping[str, Any]) -> dict[str, Any]:
    return dict(reading.get("types") or {})


def _is_number(column: Column) -> bool:
    return column.type.is_numeric() or column.type == pl.Boolean


def rows_of(reader: Reader) -> pl.DataFrame:
    """Return all rows of a source, with their numbers.

    Raises:
      DataError: it has none.
    """
    parts = [reader.read(piece).table for piece in reader.pieces(PIECE_BYTES)]
    if not parts:
        raise DataError(
            "the table has no rows",
            where=reader.name,
            remedy="give one with rows under its header",
        )
    return pl.concat(parts)


def _first(looked: Looked) -> list[Any]:
    """Return the steps on rows: duplicates and the split."""
    asked = looked.asked
    steps: list[Any] = []
    if asked.duplicates == "drop":
        steps.append(prepare.Duplicates())
    if asked.label_end:
        steps.append(
            prepare.TrimEnd(
                asked.labels,
                asked.label_end,
            )
        )
    steps.append(prepare.DropMissing(asked.labels))
    steps.append(_split(looked))
    return steps


def _split(looked: Looked) -> Any:
    """Return the step that splits: by file, by group, or by class."""
    asked = looked.asked
    if asked.test is not None:
        _check_with_test_file(asked)
        return prepare.SplitBySource(test=[1])
    shares: dict[str, Any] = {
        "test": asked.test_share if asked.folds is None else 0.0,
        "validation": asked.validation,
        "folds": asked.folds,
        "fold": asked.fold,
    }
    if asked.group:
        return prepare.SplitByGroup(group=asked.group, **shares)
    is_one_class = not looked.is_quantity and len(asked.labels) == 1
    return prepare.Split(
        stratify=asked.labels if is_one_class else (),
        **shares,
    )


def _check_with_test_file(asked: Asked) -> None:
    """Raise RecipeError where a test file leaves nothing to split as is asked."""
    if asked.folds is not None:
        raise RecipeError(
            "there is a test file, and there are to be folds",
            where="--folds",
            remedy="leave one of the two out",
        )
    if asked.group and asked.validation:
        raise RecipeError(
            "with a test file, a validation share is drawn row by row, not by group",
            where="--validation",
            remedy="leave --validation or --group out",
        )


def _alarms(looked: Looked) -> list[Any]:
    """Return the step that looks for rows of both splits, and for given-away labels."""
    raw = [*looked.numbers, *looked.categories, *looked.dates]
    group = looked.asked.group
    return [
        prepare.Leaks(
            target=label,
            inputs=raw,
            group=group[0] if len(group) == 1 else None,
        )
        for label in looked.asked.labels
    ]


def _last(looked: Looked) -> list[Any]:
    labels = looked.asked.labels
    if looked.is_quantity:
        return [prepare.AsFloats(labels)]
    return [prepare.Classes(label) for label in labels]


def _counts(serving: Any) -> tuple[int, ...]:
    """Return the count of classes of each label that has some."""
    return tuple(
        state.height
        for step, state in serving.prepared.steps
        if isinstance(step, prepare.Classes)
    )


def sizes_of(serving: Any) -> dict[str, int]:
    """Return the count of codes of the columns that a Vocabulary has coded."""
    codes: dict[str, int] = {}
    for step, state in serving.prepared.steps:
        if isinstance(step, prepare.Vocabulary):
            counts = state.group_by("column").len()
            codes |= dict(counts.iter_rows())
    return {name: count + 1 for name, count in codes.items()}


def _names(inputs: Inputs) -> list[str]:
    """Return the names of columns, however they are arranged."""
    if isinstance(inputs, str):
        return [inputs]
    parts = (
        inputs.values()
        if isinstance(
            inputs,
            Mapping,
        )
        else [inputs]
    )
    names = [
        [part]
        if isinstance(
            part,
            str,
        )
        else list(part)
        for part in parts
    ]
    return list(dict.fromkeys(name for part in names for name in part))
