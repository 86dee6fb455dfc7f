"""Bad inputs, and the error of each: rows for `test_bad_inputs.py`.

The files that provoke them are here, too.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lepton_jax import data
from lepton_jax.errors import (
    CheckpointError,
    DataError,
    LeptonError,
    ModelError,
    PlanError,
    RecipeError,
    SettingError,
)


class Bad(NamedTuple):
    """One mistake.

    Args:
      name: of the row.
      provoke: makes the mistake in an empty folder; a command line is returned, not
        run.
      error: class of the error.
      place: fragment of its `where`.
      remedy: fragment of its `remedy`.
      what: fragment of its `what`.
    """

    name: str
    provoke: Callable[[Path], Any]
    error: type[LeptonError]
    place: str
    remedy: str
    what: str = ""


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- recipe files ----

HEAD = """\
import lepton_jax as lepton, numpy as np, optax
from flax import nnx
from pathlib import Path
from typing import Literal

class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.a = nnx.Linear(4, width, rngs=rngs)
        self.b = nnx.Linear(width, 3, rngs=rngs)
    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))
"""
RECIPE = (
    HEAD
    + """
def recipe(
    width: int = 8,
    mode: Literal["plain", "fancy"] = "plain",
    bright: bool = False,
    data: Path | None = None,
    learning_rate: float = 0.1,
    batch_size: int = 8,
    micro_batches: int = 1,
    epochs: float | None = None,
    steps: int | None = 3,
    precision: str = "float32",
    seed: int = 0,
) -> lepton.Recipe:
    x = np.random.default_rng(0).normal(size=(16, 4))
    return lepton.Recipe(
        model=lambda rngs: Net(width, rngs),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam,
        learning_rate=learning_rate,
        train=(x, np.arange(16) % 3),
        batch_size=batch_size,
        micro_batches=micro_batches,
        epochs=epochs,
        steps=steps,
        precision=precision,
        seed=seed,
        save_every=1,
        keep=10,
    )
"""
)


def recipe(text: str | bytes, *arguments: str) -> Callable[[Path], list[str]]:
    """Return a command line with a recipe file of this text."""
    return lambda folder: [str(write(folder / "r.py", text)), *arguments]


def given(*arguments: object) -> Callable[[Path], list[str]]:
    """Return a command line with a good recipe and these arguments."""
    return recipe(RECIPE, *map(str, arguments))


def prepared(
    prepare: Callable[[Path], Any], *arguments: object
) -> Callable[[Path], list[str]]:
    """Return the same, after something was done to the folder."""

    def provoke(folder: Path) -> list[str]:
        prepare(folder)
        return given(*arguments)(folder)

    return provoke


def resumed(
    change: Callable[[dict[str, Any]], Any], *arguments: object
) -> Callable[[Path], list[str]]:
    """Return `--resume` of a run of three steps with a changed recipe.json.

    `change` returns its new content, a dict or a text.
    """

    def provoke(folder: Path) -> list[str]:
        path = folder / "run" / "recipe.json"
        content = change(json.loads(path.read_text()))
        write(path, content if isinstance(content, str) else json.dumps(content))
        return ["--resume", "run", *map(str, arguments)]

    return provoke


def settings(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda run: {**run, "settings": values}


def damaged_journal(folder: Path) -> list[str]:
    path = folder / "run" / "events.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    write(path, first + "garbage\n" + "".join(rest))
    return ["--resume", "run", "--steps", "4"]


RECIPE_FILES = [
    Bad(
        "recipe-missing-with-near-name",
        lambda folder: [str(write(folder / "digits.py", RECIPE))[:-5] + "z.py"],
        RecipeError,
        place="",
        remedy="name a Python file",
        what="did you mean 'digits.py'",
    ),
    Bad(
        "recipe-in-no-folder",
        lambda folder: ["no/where/digits.py"],
        RecipeError,
        place="no/where",
        remedy="name a Python file",
    ),
    Bad(
        "recipe-is-a-folder",
        lambda folder: [str(folder)],
        RecipeError,
        place="",
        remedy="name a Python file",
        what="there is no recipe file",
    ),
    Bad(
        "recipe-is-no-python",
        lambda folder: [str(write(folder / "notes.txt", "hello"))],
        RecipeError,
        place="notes.txt",
        remedy="ends in .py",
    ),
    Bad(
        "recipe-syntax-error",
        recipe("a = 1\ndef f(:\n"),
        RecipeError,
        place="r.py:2: def f(:",
        remedy="fix the recipe file",
        what="SyntaxError",
    ),
    Bad(
        "recipe-null-bytes",
        recipe(b"a = 1\0b"),
        RecipeError,
        place="r.py",
        remedy="fix the recipe file",
        what="null bytes",
    ),
    Bad(
        "recipe-not-utf8",
        recipe(b"a = '\xff'\n"),
        RecipeError,
        place="r.py",
        remedy="fix the recipe file",
        what="utf-8",
    ),
    Bad(
        "recipe-import-error",
        recipe("import nothere\n"),
        RecipeError,
        place="r.py:1: import nothere",
        remedy="fix the recipe file",
        what="No module named 'nothere'",
    ),
    Bad(
        "recipe-raises-at-import",
        recipe("x = 1\n1 / 0\n"),
        RecipeError,
        place="r.py:2: 1 / 0",
        remedy="fix the recipe file",
        what="ZeroDivisionError",
    ),
    Bad(
        "recipe-exits-at-import",
        recipe("import sys\nsys.exit(0)\n"),
        RecipeError,
        place="r.py:2: sys.exit(0)",
        remedy="fix the recipe file",
        what="SystemExit",
    ),
    Bad(
        "recipe-without-function",
        recipe("def recipes(): pass\n"),
        RecipeError,
        place="r.py",
        remedy="def recipe(",
        what="did you mean 'recipes'",
    ),
    Bad(
        "recipe-is-a-value",
        recipe("recipe = 3\n"),
        RecipeError,
        place="r.py",
        remedy="def recipe(",
        what="`recipe` is 3",
    ),
    Bad(
        "recipe-is-a-class",
        recipe("class recipe: pass\n"),
        RecipeError,
        place="r.py",
        remedy="def recipe(",
        what="not a plain function",
    ),
    Bad(
        "recipe-is-async",
        recipe("async def recipe(): pass\n"),
        RecipeError,
        place="r.py",
        remedy="def recipe(",
        what="not a plain function",
    ),
    Bad(
        "setting-without-default",
        recipe("def recipe(a: int): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="a: int = 1",
        what="`a` has no default",
    ),
    Bad(
        "setting-collects-keywords",
        recipe("def recipe(**rest): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="every setting",
        what="`**rest`",
    ),
    Bad(
        "setting-by-position-only",
        recipe("def recipe(a: int = 1, /): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="every setting",
        what="can't be given by name",
    ),
    Bad(
        "setting-without-annotation",
        recipe("def recipe(a=None): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="annotate it",
        what="'a' has no annotation",
    ),
    Bad(
        "setting-of-unknown-type",
        recipe("def recipe(a: list[int] = ()): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="annotate it",
        what="list[int]",
    ),
    Bad(
        "annotation-undefined",
        recipe("def recipe(a: 'Foo' = 1): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="import",
        what="'Foo'",
    ),
    Bad(
        "annotation-of-no-attribute",
        recipe("import numpy\ndef recipe(a: 'numpy.nope' = 1): pass\n"),
        RecipeError,
        place="r.py:2",
        remedy="import",
        what="nope",
    ),
    Bad(
        "annotation-is-no-expression",
        recipe("def recipe(a: 'int |' = 1): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="import",
        what="int |",
    ),
    Bad(
        "setting-named-like-an-option",
        recipe("def recipe(run_dir: str = ''): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="another name",
        what="--run-dir",
    ),
    Bad(
        "setting-negates-another",
        recipe("def recipe(x: bool = True, no_x: int = 3): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="another name",
        what="--no-x",
    ),
    Bad(
        "setting-negated-by-another",
        recipe("def recipe(no_x: int = 3, x: bool = True): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="another name",
        what="--no-x",
    ),
    Bad(
        "recipe-returns-nothing",
        recipe("def recipe(a: int = 1): pass\n"),
        RecipeError,
        place="r.py:1",
        remedy="return a lepton_jax.Recipe",
        what="NoneType",
    ),
    Bad(
        "recipe-raises",
        recipe("def recipe(a: int = 1):\n    return {}['k']\n"),
        RecipeError,
        place="r.py:2: return {}['k']",
        remedy="fix the recipe or its settings",
        what="KeyError: 'k'",
    ),
    Bad(
        "recipe-raises-in-a-library",
        recipe("import json\ndef recipe(a: int = 1):\n    return json.loads('{')\n"),
        RecipeError,
        place="r.py:3: return json.loads",
        remedy="fix the recipe",
    ),
    Bad(
        "recipe-exits",
        recipe("def recipe(a: int = 1):\n    raise SystemExit(0)\n"),
        RecipeError,
        place="r.py:2",
        remedy="fix the recipe",
        what="SystemExit",
    ),
    Bad(
        "recipe-names-no-field",
        recipe(HEAD + "def recipe():\n    return lepton.Recipe(model=Net, los=3)\n"),
        RecipeError,
        place="r.py:13",
        remedy="fix the recipe",
        what="'los'",
    ),
]

# ---- settings and options ----

SETTINGS = [
    Bad(
        "nothing-given",
        lambda folder: [],
        SettingError,
        place="command line",
        remedy="name a recipe file",
    ),
    Bad(
        "only-options-given",
        lambda folder: ["--steps", "3"],
        SettingError,
        place="command line",
        remedy="name a recipe file",
    ),
    Bad(
        "setting-unknown",
        given("--widht", 4),
        SettingError,
        place="command line",
        remedy="--width, --mode",
        what="did you mean '--width'",
    ),
    Bad(
        "setting-abbreviated",
        given("--run", "q"),
        SettingError,
        place="command line",
        remedy="--help",
        what="did you mean '--run-dir'",
    ),
    Bad(
        "setting-in-short",
        given("-w", 4),
        SettingError,
        place="command line",
        remedy="--width",
        what="'-w'",
    ),
    Bad(
        "argument-too-many",
        given("other.py"),
        SettingError,
        place="command line",
        remedy="the settings are",
        what="other.py",
    ),
    Bad(
        "int-of-letters",
        given("--width", "abc"),
        SettingError,
        place="--width",
        remedy="--help",
        what="'abc' is not a whole number",
    ),
    Bad(
        "int-with-fraction",
        given("--width", "3.5"),
        SettingError,
        place="--width",
        remedy="--help",
        what="'3.5' is not a whole number",
    ),
    Bad(
        "float-of-letters",
        given("--learning-rate", "fast"),
        SettingError,
        place="--learning-rate",
        remedy="--help",
        what="is not a number",
    ),
    Bad(
        "choice-unknown",
        given("--mode", "fency"),
        SettingError,
        place="--mode",
        remedy="--help",
        what="did you mean 'fancy'",
    ),
    Bad(
        "flag-with-value",
        given("--bright=yes"),
        SettingError,
        place="--bright",
        remedy="--no-bright",
        what="takes no value",
    ),
    Bad(
        "value-missing",
        given("--width"),
        SettingError,
        place="--width",
        remedy="--help",
        what="expected one argument",
    ),
    Bad(
        "batch-size-negative",
        given("--batch-size", -3),
        RecipeError,
        place="Recipe.batch_size",
        remedy="1 or more",
        what="-3",
    ),
    Bad(
        "micro-batches-do-not-divide",
        given("--micro-batches", 3),
        RecipeError,
        place="Recipe.micro_batches",
        remedy="divide batch_size",
    ),
    Bad(
        "epochs-zero",
        given("--epochs", 0),
        RecipeError,
        place="Recipe.epochs",
        remedy="positive number",
        what="epochs is 0.0",
    ),
    Bad(
        "epochs-nan",
        given("--epochs", "nan"),
        RecipeError,
        place="Recipe.epochs",
        remedy="positive number",
        what="nan",
    ),
    Bad(
        "steps-zero",
        given("--steps", 0),
        RecipeError,
        place="Recipe.steps",
        remedy="1 or more",
    ),
    Bad(
        "no-budget",
        given("--steps", "none"),
        RecipeError,
        place="Recipe.steps",
        remedy="or epochs=...",
        what="no budget",
    ),
    Bad(
        "precision-unknown",
        given("--precision", "float23"),
        RecipeError,
        place="Recipe.precision",
        remedy="bfloat16",
        what="did you mean 'float32'",
    ),
    Bad(
        "learning-rate-negative",
        given("--learning-rate", -1),
        RecipeError,
        place="Recipe.learning_rate",
        remedy="1e-3",
        what="-1.0",
    ),
    Bad(
        "learning-rate-infinite",
        given("--learning-rate", "inf"),
        RecipeError,
        place="Recipe.learning_rate",
        remedy="1e-3",
        what="inf",
    ),
    Bad(
        "steps-too-many",
        given("--steps", 10**30),
        RecipeError,
        place="Recipe.steps",
        remedy="at most",
    ),
    Bad(
        "epochs-too-many",
        given("--epochs", "1e300", "--steps", "none"),
        RecipeError,
        place="Recipe.steps",
        remedy="at most",
    ),
    Bad(
        "seed-negative",
        given("--seed", -1),
        RecipeError,
        place="Recipe.seed",
        remedy="seed=0",
    ),
    Bad(
        "seed-too-large",
        given("--seed", 2**32),
        RecipeError,
        place="Recipe.seed",
        remedy="seed=0",
    ),
    Bad(
        "batch-beyond-memory",
        given("--batch-size", 8 * 10**14),
        PlanError,
        place="plan for cpu:",
        remedy="use a batch_size of",
        what="nothing fits",
    ),
    Bad(
        "devices-zero",
        given("--devices", 0),
        SettingError,
        place="--devices",
        remedy="1 to",
    ),
    Bad(
        "devices-of-letters",
        given("--devices", "all"),
        SettingError,
        place="--devices",
        remedy="--help",
        what="not a whole number",
    ),
    Bad(
        "devices-too-many",
        given("--devices", 10**9),
        SettingError,
        place="--devices",
        remedy="1 to",
    ),
    Bad(
        "devices-more-than-there-are",
        given("--devices", 100),
        PlanError,
        place="--devices",
        remedy="new process",
        what="8 devices",
    ),
]

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ZOO = [
    Bad(
        "zoo-csv-missing",
        lambda folder: [str(RECIPES / "csv_mlp.py"), "--data", "nothing.csv"],
        DataError,
        place="nothing.csv",
        remedy="check the path",
        what="no such file",
    ),
    Bad(
        "zoo-idx-missing",
        lambda folder: [str(RECIPES / "mnist_cnn.py"), "--data", "nothing"],
        DataError,
        place="nothing",
        remedy="four idx files",
        what="no such folder",
    ),
    Bad(
        "zoo-three-classes",
        lambda folder: [
            str(RECIPES / "logistic.py"),
            "--label",
            "y",
            "--data",
            str(
                write(
                    folder / "t.csv",
                    "a,y\n" + "".join(f"{i},{i % 3}\n" for i in range(30)),
                )
            ),
        ],
        RecipeError,
        place="t.csv",
        remedy="csv_mlp.py",
        what="3 classes",
    ),
    Bad(
        "zoo-width-zero",
        lambda folder: [str(RECIPES / "mnist_mlp.py"), "--hidden", "0"],
        ModelError,
        place="",
        remedy="at least 1",
    ),
    Bad(
        "zoo-csv-word-among-numbers",
        lambda folder: [
            str(RECIPES / "csv_mlp.py"),
            "--label",
            "y",
            "--data",
            str(write(folder / "t.csv", numbered(lambda i: i if i % 6 else "-"))),
        ],
        DataError,
        place="line 2, column 'a'",
        remedy="add '-' to `missing`",
    ),
    Bad(
        "zoo-csv-label-no-quantity",
        lambda folder: [
            str(RECIPES / "csv_mlp.py"),
            "--label",
            "y",
            "--label-kind",
            "quantity",
            "--data",
            str(write(folder / "t.csv", numbered(str))),
        ],
        DataError,
        place="column 'y'",
        remedy="`label_kind`",
        what="no numbers",
    ),
    Bad(
        "zoo-logistic-categories",
        lambda folder: [
            str(RECIPES / "logistic.py"),
            "--label",
            "y",
            "--data",
            str(write(folder / "t.csv", GOOD_CSV)),
        ],
        RecipeError,
        place="t.csv",
        remedy="`ignore`",
        what="column 'b' has categories",
    ),
]

# ---- run folders ----

RUN_FOLDERS = [
    Bad(
        "run-folder-occupied",
        given("--run-dir", "run"),
        SettingError,
        place="run",
        remedy="--resume run",
        what="already holds a run",
    ),
    Bad(
        "run-folder-holds-checkpoints",
        prepared(
            lambda folder: (folder / "old" / "checkpoints").mkdir(parents=True),
            "--run-dir",
            "old",
        ),
        SettingError,
        place="old",
        remedy="--resume",
        what="already holds a run",
    ),
    Bad(
        "run-folder-is-a-file",
        given("--run-dir", "r.py"),
        SettingError,
        place="r.py",
        remedy="another folder",
        what="is a file",
    ),
    Bad(
        "run-folder-below-a-file",
        given("--run-dir", "r.py/run"),
        LeptonError,
        place="r.py/run",
        remedy="another run folder",
        what="Not a directory",
    ),
    Bad(
        "run-folder-cannot-be-made",
        given("--run-dir", "/proc/lepton"),
        LeptonError,
        place="/proc/lepton",
        remedy="another run folder",
    ),
    Bad(
        "run-folder-without-name",
        given("--run-dir", ""),
        SettingError,
        place="--run-dir",
        remedy="name a folder",
    ),
    Bad(
        "two-run-folders",
        lambda folder: ["--resume", "run", "--run-dir", "other"],
        SettingError,
        place="command line",
        remedy="leave out --run-dir",
    ),
    Bad(
        "journal-is-a-folder",
        prepared(
            lambda folder: (folder / "a" / "plan.json").mkdir(parents=True),
            "--run-dir",
            "a",
        ),
        CheckpointError,
        place="a",
        remedy="another folder",
        what="plan.json",
    ),
    Bad(
        "tensorboard-folder-is-a-file",
        prepared(
            lambda folder: write(folder / "a" / "tensorboard", ""),
            "--run-dir",
            "a",
            "--tensorboard",
        ),
        LeptonError,
        place="tensorboard",
        remedy="leave out --tensorboard",
    ),
    Bad(
        "report-cannot-be-written",
        prepared(
            lambda folder: (folder / "a" / "report.html").mkdir(parents=True),
            "--run-dir",
            "a",
            "--devices",
            1,
        ),
        LeptonError,
        place="report.html",
        remedy="lepton_jax.monitor.report",
        what="Is a directory",
    ),
    Bad(
        "resume-of-nothing",
        lambda folder: ["--resume", "nothing"],
        CheckpointError,
        place="nothing",
        remedy="name the folder of a run",
    ),
    Bad(
        "resume-of-a-file",
        given("--resume", "r.py"),
        CheckpointError,
        place="r.py",
        remedy="name the folder of a run",
    ),
    Bad(
        "resume-recipe-json-cut",
        resumed(lambda run: json.dumps(run)[:30]),
        CheckpointError,
        place="run/recipe.json",
        remedy="a copy",
        what="damaged",
    ),
    Bad(
        "resume-recipe-json-binary",
        resumed(lambda run: "\0\1\2"),
        CheckpointError,
        place="run/recipe.json",
        remedy="a copy",
        what="damaged",
    ),
    Bad(
        "resume-recipe-json-a-list",
        resumed(lambda run: []),
        CheckpointError,
        place="run/recipe.json",
        remedy="a copy",
        what="damaged",
    ),
    Bad(
        "resume-file-is-a-number",
        resumed(lambda run: {**run, "file": 3}),
        CheckpointError,
        place="run/recipe.json",
        remedy="a copy",
    ),
    Bad(
        "resume-settings-are-a-list",
        resumed(lambda run: {**run, "settings": []}),
        CheckpointError,
        place="run/recipe.json",
        remedy="a copy",
    ),
    Bad(
        "resume-without-recipe-file",
        resumed(lambda run: {**run, "file": None}),
        SettingError,
        place="command line",
        remedy="name a recipe file",
        what="not started from a recipe file",
    ),
    Bad(
        "resume-recipe-file-gone",
        resumed(lambda run: {**run, "file": "/no/where/r.py"}),
        RecipeError,
        place="run/recipe.json",
        remedy="RECIPE.py --resume run",
        what="/no/where/r.py",
    ),
    Bad(
        "resume-setting-ill-typed",
        resumed(settings(width="wide")),
        SettingError,
        place="run/recipe.json",
        remedy="give --width anew",
        what="not a whole number",
    ),
    Bad(
        "resume-flag-ill-typed",
        resumed(settings(bright=3)),
        SettingError,
        place="run/recipe.json",
        remedy="give --bright anew",
        what="neither true nor false",
    ),
    Bad(
        "resume-setting-gone",
        resumed(settings(widht=4)),
        SettingError,
        place="run/recipe.json",
        remedy="recipe as it was",
        what="did you mean 'width'",
    ),
    Bad(
        "resume-other-width",
        resumed(lambda run: run, "--width", 5),
        CheckpointError,
        place="checkpoints/3",
        remedy="model and optimizer",
        what=(
            "params/a/kernel: the checkpoint has float32[4, 8], the model float32[4, 5]"
        ),
    ),
    Bad(
        "resume-journal-damaged",
        damaged_journal,
        DataError,
        place="events.jsonl, line 2",
        remedy="delete that line",
        what="garbage",
    ),
    Bad(
        "run-folder-name-too-long",
        given("--run-dir", "x" * 300),
        LeptonError,
        place="xxx",
        remedy="make the path shorter",
        what="File name too long",
    ),
    Bad(
        "local-folder-below-a-file",
        given("--local-dir", "r.py/local", "--run-dir", "a"),
        CheckpointError,
        place="r.py/local",
        remedy="move the file away",
        what="Not a directory",
    ),
]

# ---- CSV files ----

GOOD_CSV = "a,b,y\n" + "".join(
    f"{i}.5,{'pq'[i % 2]},{'no' if i < 5 else 'yes'}\n" for i in range(10)
)


def numbered(cell: Callable[[int], object]) -> str:
    """Return thirty rows of one column and two classes."""
    return "a,y\n" + "".join(f"{cell(i)},{'uv'[i % 2]}\n" for i in range(30))


def csv(
    content: str | bytes, label: str = "y", **options: Any
) -> Callable[[Path], Any]:
    return lambda folder: data.table(write(folder / "t.csv", content), label, **options)


def tested(content: str) -> Callable[[Path], Any]:
    """Return a test table encoded by the schema of the good one."""

    def provoke(folder: Path) -> Any:
        schema = data.table(write(folder / "train.csv", GOOD_CSV), "y").schema
        return data.table(write(folder / "t.csv", content), "y", schema=schema)

    return provoke


CSV_FILES = [
    Bad(
        "csv-missing",
        lambda folder: data.table(folder / "t.csv", "y"),
        DataError,
        place="t.csv",
        remedy="check the path",
        what="no such file",
    ),
    Bad(
        "csv-is-a-folder",
        lambda folder: data.table(folder, "y"),
        DataError,
        place="",
        remedy="check the path",
        what="can't be read",
    ),
    Bad(
        "csv-empty",
        csv(""),
        DataError,
        place="t.csv",
        remedy="with a header",
        what="empty",
    ),
    Bad(
        "csv-header-only",
        csv("a,b,y\n"),
        DataError,
        place="t.csv",
        remedy="at least one row",
        what="no rows",
    ),
    Bad(
        "csv-column-twice",
        csv("a,a,y\n1,2,3\n"),
        DataError,
        place="line 1",
        remedy="name of its own",
        what="'a' is there twice",
    ),
    Bad(
        "csv-column-without-name",
        csv("a,,y\n1,2,3\n"),
        DataError,
        place="line 1",
        remedy="name it",
        what="column 2 has no name",
    ),
    Bad(
        "csv-ragged-row",
        csv(GOOD_CSV + "1.5,p\n"),
        DataError,
        place="t.csv, line 12",
        remedy="as wide as the header",
        what="expected 3 cells, found 2",
    ),
    Bad(
        "csv-open-quote",
        csv(GOOD_CSV + '1.5,"p,yes\n'),
        DataError,
        place="t.csv, line 12",
        remedy="close every quote",
    ),
    Bad(
        "csv-bad-number",
        csv(GOOD_CSV + "oops,p,yes\n"),
        DataError,
        place="line 12, column 'a'",
        remedy="correct the cell",
        what="'oops'",
    ),
    Bad(
        "csv-infinite-number",
        csv(GOOD_CSV + "1e400,p,yes\n"),
        DataError,
        place="line 12, column 'a'",
        remedy="correct the cell",
        what="1e400",
    ),
    Bad(
        "csv-label-unknown",
        csv(GOOD_CSV.replace("y\n", "target\n", 1), "targte"),
        DataError,
        place="line 1",
        remedy="a, b, target",
        what="did you mean 'target'",
    ),
    Bad(
        "csv-label-missing",
        csv(GOOD_CSV + "1.5,p,\n"),
        DataError,
        place="line 12, column 'y'",
        remedy="leave the row out",
    ),
    Bad(
        "csv-one-class",
        csv("a,y\n1,no\n2,no\n"),
        DataError,
        place="line 2, column 'y'",
        remedy="at least two classes",
    ),
    Bad(
        "csv-label-only",
        csv("y\n1\n2\n"),
        DataError,
        place="line 1",
        remedy="give columns",
    ),
    Bad(
        "csv-not-utf8",
        csv(GOOD_CSV.encode() + b"1.5,\xff,yes\n"),
        DataError,
        place="t.csv, line 12",
        remedy="UTF-8",
        what="0xff",
    ),
    Bad(
        "csv-categorical-unknown",
        csv(GOOD_CSV, categorical=["bb"]),
        DataError,
        place="t.csv",
        remedy="a, b, y",
        what="did you mean 'b'",
    ),
    Bad(
        "csv-test-label-unseen",
        tested(GOOD_CSV + "1.5,p,yess\n"),
        DataError,
        place="line 12, column 'y'",
        remedy="no, yes",
        what="did you mean 'yes'",
    ),
    Bad(
        "csv-test-column-gone",
        tested("aa,b,y\n1.5,p,yes\n"),
        DataError,
        place="t.csv",
        remedy="training table's columns",
        what="did you mean 'aa'",
    ),
    Bad(
        "csv-split-leaves-nothing",
        lambda folder: data.table_split(write(folder / "t.csv", GOOD_CSV), "y", 1.0, 0),
        DataError,
        place="split",
        remedy="between 0 and 1",
    ),
    Bad(
        "csv-word-among-numbers",
        csv(numbered(lambda i: i if i % 6 else "none")),
        DataError,
        place="line 2, column 'a'",
        remedy="add 'none' to `missing`",
        what="5 of the column's 30 cells (17 %)",
    ),
    Bad(
        "csv-dates",
        csv(numbered(lambda i: f"2024-03-{i + 1:02d}")),
        DataError,
        place="line 2, column 'a'",
        remedy="in `categorical`",
        what="is a date or a time",
    ),
    Bad(
        "csv-times",
        csv(numbered(lambda i: f"{i % 24}:{i:02d}")),
        DataError,
        place="line 2, column 'a'",
        remedy="in `ignore`",
        what="is a date or a time",
    ),
    Bad(
        "csv-thousands-or-decimals",
        csv(numbered(lambda i: f'"{i + 1},500"')),
        DataError,
        place="line 2, column 'a'",
        remedy="`thousands` to ','",
        what="nothing in the file tells which",
    ),
    Bad(
        "csv-two-currencies",
        csv(numbered(lambda i: f"{i} €" if i % 2 else f"${i}")),
        DataError,
        place="line 3, column 'a'",
        remedy="one unit",
        what="spelled otherwise",
    ),
    Bad(
        "csv-numbers-with-a-unit",
        csv(numbered(lambda i: f"{i} kg")),
        DataError,
        place="line 2, column 'a'",
        remedy="without 'kg'",
        what="'kg'",
    ),
    Bad(
        "csv-marks-of-another-file",
        csv(numbered(lambda i: f"{i}.5"), decimal=","),
        DataError,
        place="line 2, column 'a'",
        remedy="leave the two out",
        what="`decimal`",
    ),
    Bad(
        "csv-workbook",
        csv(b"PK\x03\x04" + b"\0" * 30),
        DataError,
        place="t.csv",
        remedy="as a CSV file",
        what="xlsx",
    ),
    Bad(
        "csv-utf16-without-mark",
        csv(GOOD_CSV.encode("utf-16-le")),
        DataError,
        place="line 1",
        remedy="iconv -f utf-16le",
        what="zero bytes",
    ),
    Bad(
        "csv-delimiter-unknown",
        csv("a:b:y\n1:p:no\n2:q:yes\n"),
        DataError,
        place="line 1",
        remedy="`delimiter`",
        what="no label column 'y'",
    ),
    Bad(
        "csv-delimiter-of-two",
        csv(GOOD_CSV, delimiter="::"),
        DataError,
        place="delimiter",
        remedy="one character",
        what="'::'",
    ),
    Bad(
        "csv-row-names-without-a-name",
        csv("b,y\n" + GOOD_CSV.partition("\n")[2]),
        DataError,
        place="line 2",
        remedy="row names",
        what="expected 2 cells, found 3",
    ),
    Bad(
        "csv-label-kind-unknown",
        csv(GOOD_CSV, label_kind="number"),
        DataError,
        place="label_kind",
        remedy="quantity",
        what="'number'",
    ),
    Bad(
        "csv-label-is-no-quantity",
        csv(GOOD_CSV, label_kind="quantity"),
        DataError,
        place="line 2, column 'y'",
        remedy="`label_kind`",
        what="no numbers",
    ),
    Bad(
        "csv-label-ignored",
        csv(GOOD_CSV, ignore=["y"]),
        DataError,
        place="t.csv",
        remedy="`ignore`",
        what="label 'y' is to be ignored",
    ),
    Bad(
        "csv-path-with-zero-byte",
        lambda folder: data.table(f"{folder}/a\0b.csv", "y"),
        DataError,
        place="",
        remedy="check the path",
        what="null byte",
    ),
]

# ---- idx files ----


def idx_bytes(values: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, values.ndim])
        + b"".join(n.to_bytes(4, "big") for n in values.shape)
        + values.tobytes()
    )


def idx(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], Any]:
    """Read a folder of idx files, one of which is changed.

    `change` returns its new content; None: it is not there.
    """

    def provoke(folder: Path) -> Any:
        for part, count in (("train", 6), ("t10k", 4)):
            files = {
                f"{part}-images-idx3-ubyte": idx_bytes(
                    np.zeros((count, 5, 5), np.uint8)
                ),
                f"{part}-labels-idx1-ubyte": idx_bytes(
                    np.arange(count, dtype=np.uint8)
                ),
            }
            for file, content in files.items():
                changed = change(content) if file.startswith(name) else content
                if changed is not None:
                    write(folder / file, changed)
        return data.idx(folder)

    return provoke


IDX_FILES = [
    Bad(
        "idx-folder-missing",
        lambda folder: data.idx(folder / "mnist"),
        DataError,
        place="mnist",
        remedy="four idx files",
        what="there is no such folder",
    ),
    Bad(
        "idx-file-missing",
        idx("t10k-labels", lambda b: None),
        DataError,
        place="",
        remedy="four idx files",
        what="t10k-labels-idx1-ubyte",
    ),
    Bad(
        "idx-images-cut",
        idx("train-images", lambda b: b[:-7]),
        DataError,
        place="train-images",
        remedy="download",
        what="cut short",
    ),
    Bad(
        "idx-labels-cut",
        idx("train-labels", lambda b: b[:-1]),
        DataError,
        place="train-labels",
        remedy="download",
        what="cut short",
    ),
    Bad(
        "idx-header-cut",
        idx("train-images", lambda b: b[:9]),
        DataError,
        place="train-images",
        remedy="download",
        what="16 bytes",
    ),
    Bad(
        "idx-empty",
        idx("train-labels", lambda b: b""),
        DataError,
        place="train-labels",
        remedy="download",
        what="none",
    ),
    Bad(
        "idx-bad-magic",
        idx("train-labels", lambda b: b"PK\3\4" + b),
        DataError,
        place="train-labels",
        remedy="download",
        what="50 4b 03 04",
    ),
    Bad(
        "idx-followed-by-bytes",
        idx("t10k-images", lambda b: b + b"\0"),
        DataError,
        place="t10k-images",
        remedy="download",
        what="other bytes",
    ),
    Bad(
        "idx-gzip-damaged",
        idx("train-images", lambda b: gzip.compress(b)[:-9]),
        DataError,
        place="train-images",
        remedy="download",
        what="gzip",
    ),
    Bad(
        "idx-counts-differ",
        idx("train-labels", lambda b: idx_bytes(np.zeros(5, np.uint8))),
        DataError,
        place="train-labels",
        remedy="one data set",
        what="6 images, but 5 labels",
    ),
    Bad(
        "idx-sizes-differ",
        idx("t10k-images", lambda b: idx_bytes(np.zeros((4, 6, 6), np.uint8))),
        DataError,
        place="",
        remedy="one data set",
        what="(6, 6, 1)",
    ),
    Bad(
        "idx-labels-for-images",
        idx("train-images", lambda b: idx_bytes(np.zeros(6, np.uint8))),
        DataError,
        place="train-images",
        remedy="download",
        what="3 dims",
    ),
    Bad(
        "idx-of-no-images",
        idx(
            "train-",
            lambda b: idx_bytes(np.zeros((0, 5, 5) if len(b) > 20 else 0, np.uint8)),
        ),
        DataError,
        place="train-images",
        remedy="download",
        what="none are there",
    ),
]

COMMAND_LINES = RECIPE_FILES + SETTINGS + ZOO + RUN_FOLDERS
DATA_FILES = CSV_FILES + IDX_FILES
