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
        "",
        "name a Python file",
        "did you mean 'digits.py'",
    ),
    Bad(
        "recipe-in-no-folder",
        lambda folder: ["no/where/digits.py"],
        RecipeError,
        "no/where",
        "name a Python file",
    ),
    Bad(
        "recipe-is-a-folder",
        lambda folder: [str(folder)],
        RecipeError,
        "",
        "name a Python file",
        "there is no recipe file",
    ),
    Bad(
        "recipe-is-no-python",
        lambda folder: [str(write(folder / "notes.txt", "hello"))],
        RecipeError,
        "notes.txt",
        "ends in .py",
    ),
    Bad(
        "recipe-syntax-error",
        recipe("a = 1\ndef f(:\n"),
        RecipeError,
        "r.py:2: def f(:",
        "fix the recipe file",
        "SyntaxError",
    ),
    Bad(
        "recipe-null-bytes",
        recipe(b"a = 1\0b"),
        RecipeError,
        "r.py",
        "fix the recipe file",
        "null bytes",
    ),
    Bad(
        "recipe-not-utf8",
        recipe(b"a = '\xff'\n"),
        RecipeError,
        "r.py",
        "fix the recipe file",
        "utf-8",
    ),
    Bad(
        "recipe-import-error",
        recipe("import nothere\n"),
        RecipeError,
        "r.py:1: import nothere",
        "fix the recipe file",
        "No module named 'nothere'",
    ),
    Bad(
        "recipe-raises-at-import",
        recipe("x = 1\n1 / 0\n"),
        RecipeError,
        "r.py:2: 1 / 0",
        "fix the recipe file",
        "ZeroDivisionError",
    ),
    Bad(
        "recipe-exits-at-import",
        recipe("import sys\nsys.exit(0)\n"),
        RecipeError,
        "r.py:2: sys.exit(0)",
        "fix the recipe file",
        "SystemExit",
    ),
    Bad(
        "recipe-without-function",
        recipe("def recipes(): pass\n"),
        RecipeError,
        "r.py",
        "def recipe(",
        "did you mean 'recipes'",
    ),
    Bad(
        "recipe-is-a-value",
        recipe("recipe = 3\n"),
        RecipeError,
        "r.py",
        "def recipe(",
        "`recipe` is 3",
    ),
    Bad(
        "recipe-is-a-class",
        recipe("class recipe: pass\n"),
        RecipeError,
        "r.py",
        "def recipe(",
        "not a plain function",
    ),
    Bad(
        "recipe-is-async",
        recipe("async def recipe(): pass\n"),
        RecipeError,
        "r.py",
        "def recipe(",
        "not a plain function",
    ),
    Bad(
        "setting-without-default",
        recipe("def recipe(a: int): pass\n"),
        RecipeError,
        "r.py:1",
        "a: int = 1",
        "`a` has no default",
    ),
    Bad(
        "setting-collects-keywords",
        recipe("def recipe(**rest): pass\n"),
        RecipeError,
        "r.py:1",
        "every setting",
        "`**rest`",
    ),
    Bad(
        "setting-by-position-only",
        recipe("def recipe(a: int = 1, /): pass\n"),
        RecipeError,
        "r.py:1",
        "every setting",
        "can't be given by name",
    ),
    Bad(
        "setting-without-annotation",
        recipe("def recipe(a=None): pass\n"),
        RecipeError,
        "r.py:1",
        "annotate it",
        "'a' has no annotation",
    ),
    Bad(
        "setting-of-unknown-type",
        recipe("def recipe(a: list[int] = ()): pass\n"),
        RecipeError,
        "r.py:1",
        "annotate it",
        "list[int]",
    ),
    Bad(
        "annotation-undefined",
        recipe("def recipe(a: 'Foo' = 1): pass\n"),
        RecipeError,
        "r.py:1",
        "import",
        "'Foo'",
    ),
    Bad(
        "annotation-of-no-attribute",
        recipe("import numpy\ndef recipe(a: 'numpy.nope' = 1): pass\n"),
        RecipeError,
        "r.py:2",
        "import",
        "nope",
    ),
    Bad(
        "annotation-is-no-expression",
        recipe("def recipe(a: 'int |' = 1): pass\n"),
        RecipeError,
        "r.py:1",
        "import",
        "int |",
    ),
    Bad(
        "setting-named-like-an-option",
        recipe("def recipe(run_dir: str = ''): pass\n"),
        RecipeError,
        "r.py:1",
        "another name",
        "--run-dir",
    ),
    Bad(
        "setting-negates-another",
        recipe("def recipe(x: bool = True, no_x: int = 3): pass\n"),
        RecipeError,
        "r.py:1",
        "another name",
        "--no-x",
    ),
    Bad(
        "setting-negated-by-another",
        recipe("def recipe(no_x: int = 3, x: bool = True): pass\n"),
        RecipeError,
        "r.py:1",
        "another name",
        "--no-x",
    ),
    Bad(
        "recipe-returns-nothing",
        recipe("def recipe(a: int = 1): pass\n"),
        RecipeError,
        "r.py:1",
        "return a lepton_jax.Recipe",
        "NoneType",
    ),
    Bad(
        "recipe-raises",
        recipe("def recipe(a: int = 1):\n    return {}['k']\n"),
        RecipeError,
        "r.py:2: return {}['k']",
        "fix the recipe or its settings",
        "KeyError: 'k'",
    ),
    Bad(
        "recipe-raises-in-a-library",
        recipe("import json\ndef recipe(a: int = 1):\n    return json.loads('{')\n"),
        RecipeError,
        "r.py:3: return json.loads",
        "fix the recipe",
    ),
    Bad(
        "recipe-exits",
        recipe("def recipe(a: int = 1):\n    raise SystemExit(0)\n"),
        RecipeError,
        "r.py:2",
        "fix the recipe",
        "SystemExit",
    ),
    Bad(
        "recipe-names-no-field",
        recipe(HEAD + "def recipe():\n    return lepton.Recipe(model=Net, los=3)\n"),
        RecipeError,
        "r.py:13",
        "fix the recipe",
        "'los'",
    ),
]

# ---- settings and options ----

SETTINGS = [
    Bad(
        "nothing-given",
        lambda folder: [],
        SettingError,
        "command line",
        "name a recipe file",
    ),
    Bad(
        "only-options-given",
        lambda folder: ["--steps", "3"],
        SettingError,
        "command line",
        "name a recipe file",
    ),
    Bad(
        "setting-unknown",
        given("--widht", 4),
        SettingError,
        "command line",
        "--width, --mode",
        "did you mean '--width'",
    ),
    Bad(
        "setting-abbreviated",
        given("--run", "q"),
        SettingError,
        "command line",
        "--help",
        "did you mean '--run-dir'",
    ),
    Bad(
        "setting-in-short",
        given("-w", 4),
        SettingError,
        "command line",
        "--width",
        "'-w'",
    ),
    Bad(
        "argument-too-many",
        given("other.py"),
        SettingError,
        "command line",
        "the settings are",
        "other.py",
    ),
    Bad(
        "int-of-letters",
        given("--width", "abc"),
        SettingError,
        "--width",
        "--help",
        "'abc' is not a whole number",
    ),
    Bad(
        "int-with-fraction",
        given("--width", "3.5"),
        SettingError,
        "--width",
        "--help",
        "'3.5' is not a whole number",
    ),
    Bad(
        "float-of-letters",
        given("--learning-rate", "fast"),
        SettingError,
        "--learning-rate",
        "--help",
        "is not a number",
    ),
    Bad(
        "choice-unknown",
        given("--mode", "fency"),
        SettingError,
        "--mode",
        "--help",
        "did you mean 'fancy'",
    ),
    Bad(
        "flag-with-value",
        given("--bright=yes"),
        SettingError,
        "--bright",
        "--no-bright",
        "takes no value",
    ),
    Bad(
        "value-missing",
        given("--width"),
        SettingError,
        "--width",
        "--help",
        "expected one argument",
    ),
    Bad(
        "batch-size-negative",
        given("--batch-size", -3),
        RecipeError,
        "Recipe.batch_size",
        "1 or more",
        "-3",
    ),
    Bad(
        "micro-batches-do-not-divide",
        given("--micro-batches", 3),
        RecipeError,
        "Recipe.micro_batches",
        "divide batch_size",
    ),
    Bad(
        "epochs-zero",
        given("--epochs", 0),
        RecipeError,
        "Recipe.epochs",
        "positive number",
        "epochs is 0.0",
    ),
    Bad(
        "epochs-nan",
        given("--epochs", "nan"),
        RecipeError,
        "Recipe.epochs",
        "positive number",
        "nan",
    ),
    Bad(
        "steps-zero",
        given("--steps", 0),
        RecipeError,
        "Recipe.steps",
        "1 or more",
    ),
    Bad(
        "no-budget",
        given("--steps", "none"),
        RecipeError,
        "Recipe.steps",
        "or epochs=...",
        "no budget",
    ),
    Bad(
        "precision-unknown",
        given("--precision", "float23"),
        RecipeError,
        "Recipe.precision",
        "bfloat16",
        "did you mean 'float32'",
    ),
    Bad(
        "learning-rate-negative",
        given("--learning-rate", -1),
        RecipeError,
        "Recipe.learning_rate",
        "1e-3",
        "-1.0",
    ),
    Bad(
        "learning-rate-infinite",
        given("--learning-rate", "inf"),
        RecipeError,
        "Recipe.learning_rate",
        "1e-3",
        "inf",
    ),
    Bad(
        "steps-too-many",
        given("--steps", 10**30),
        RecipeError,
        "Recipe.steps",
        "at most",
    ),
    Bad(
        "epochs-too-many",
        given("--epochs", "1e300", "--steps", "none"),
        RecipeError,
        "Recipe.steps",
        "at most",
    ),
    Bad(
        "seed-negative",
        given("--seed", -1),
        RecipeError,
        "Recipe.seed",
        "seed=0",
    ),
    Bad(
        "seed-too-large",
        given("--seed", 2**32),
        RecipeError,
        "Recipe.seed",
        "seed=0",
    ),
    Bad(
        "batch-beyond-memory",
        given("--batch-size", 8 * 10**14),
        PlanError,
        "plan for cpu:",
        "use a batch_size of",
        "nothing fits",
    ),
    Bad(
        "devices-zero",
        given("--devices", 0),
        SettingError,
        "--devices",
        "1 to",
    ),
    Bad(
        "devices-of-letters",
        given("--devices", "all"),
        SettingError,
        "--devices",
        "--help",
        "not a whole number",
    ),
    Bad(
        "devices-too-many",
        given("--devices", 10**9),
        SettingError,
        "--devices",
        "1 to",
    ),
    Bad(
        "devices-more-than-there-are",
        given("--devices", 100),
        PlanError,
        "--devices",
        "new process",
        "8 devices",
    ),
]

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ZOO = [
    Bad(
        "zoo-csv-missing",
        lambda folder: [
            str(RECIPES / "csv_mlp.py"),
            "--data",
            "nothing.csv",
        ],
        DataError,
        "nothing.csv",
        "check the path",
        "no such file",
    ),
    Bad(
        "zoo-idx-missing",
        lambda folder: [
            str(RECIPES / "mnist_cnn.py"),
            "--data",
            "nothing",
        ],
        DataError,
        "nothing",
        "four idx files",
        "no such folder",
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
        "t.csv",
        "csv_mlp.py",
        "3 classes",
    ),
    Bad(
        "zoo-width-zero",
        lambda folder: [
            str(RECIPES / "mnist_mlp.py"),
            "--hidden",
            "0",
        ],
        ModelError,
        "",
        "at least 1",
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
        "line 2, column 'a'",
        "add '-' to `missing`",
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
        "column 'y'",
        "`label_kind`",
        "no numbers",
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
        "t.csv",
        "`ignore`",
        "column 'b' has categories",
    ),
]

# ---- run folders ----

RUN_FOLDERS = [
    Bad(
        "run-folder-occupied",
        given("--run-dir", "run"),
        SettingError,
        "run",
        "--resume run",
        "already holds a run",
    ),
    Bad(
        "run-folder-holds-checkpoints",
        prepared(
            lambda folder: (folder / "old" / "checkpoints").mkdir(parents=True),
            "--run-dir",
            "old",
        ),
        SettingError,
        "old",
        "--resume",
        "already holds a run",
    ),
    Bad(
        "run-folder-is-a-file",
        given("--run-dir", "r.py"),
        SettingError,
        "r.py",
        "another folder",
        "is a file",
    ),
    Bad(
        "run-folder-below-a-file",
        given("--run-dir", "r.py/run"),
        LeptonError,
        "r.py/run",
        "another run folder",
        "Not a directory",
    ),
    Bad(
        "run-folder-cannot-be-made",
        given("--run-dir", "/proc/lepton"),
        LeptonError,
        "/proc/lepton",
        "another run folder",
    ),
    Bad(
        "run-folder-without-name",
        given("--run-dir", ""),
        SettingError,
        "--run-dir",
        "name a folder",
    ),
    Bad(
        "two-run-folders",
        lambda folder: ["--resume", "run", "--run-dir", "other"],
        SettingError,
        "command line",
        "leave out --run-dir",
    ),
    Bad(
        "journal-is-a-folder",
        prepared(
            lambda folder: (folder / "a" / "plan.json").mkdir(parents=True),
            "--run-dir",
            "a",
        ),
        CheckpointError,
        "a",
        "another folder",
        "plan.json",
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
        "tensorboard",
        "leave out --tensorboard",
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
        "report.html",
        "lepton_jax.monitor.report",
        "Is a directory",
    ),
    Bad(
        "resume-of-nothing",
        lambda folder: ["--resume", "nothing"],
        CheckpointError,
        "nothing",
        "name the folder of a run",
    ),
    Bad(
        "resume-of-a-file",
        given("--resume", "r.py"),
        CheckpointError,
        "r.py",
        "name the folder of a run",
    ),
    Bad(
        "resume-recipe-json-cut",
        resumed(lambda run: json.dumps(run)[:30]),
        CheckpointError,
        "run/recipe.json",
        "a copy",
        "damaged",
    ),
    Bad(
        "resume-recipe-json-binary",
        resumed(lambda run: "\0\1\2"),
        CheckpointError,
        "run/recipe.json",
        "a copy",
        "damaged",
    ),
    Bad(
        "resume-recipe-json-a-list",
        resumed(lambda run: []),
        CheckpointError,
        "run/recipe.json",
        "a copy",
        "damaged",
    ),
    Bad(
        "resume-file-is-a-number",
        resumed(lambda run: {**run, "file": 3}),
        CheckpointError,
        "run/recipe.json",
        "a copy",
    ),
    Bad(
        "resume-settings-are-a-list",
        resumed(lambda run: {**run, "settings": []}),
        CheckpointError,
        "run/recipe.json",
        "a copy",
    ),
    Bad(
        "resume-without-recipe-file",
        resumed(lambda run: {**run, "file": None}),
        SettingError,
        "command line",
        "name a recipe file",
        "not started from a recipe file",
    ),
    Bad(
        "resume-recipe-file-gone",
        resumed(lambda run: {**run, "file": "/no/where/r.py"}),
        RecipeError,
        "run/recipe.json",
        "RECIPE.py --resume run",
        "/no/where/r.py",
    ),
    Bad(
        "resume-setting-ill-typed",
        resumed(settings(width="wide")),
        SettingError,
        "run/recipe.json",
        "give --width anew",
        "not a whole number",
    ),
    Bad(
        "resume-flag-ill-typed",
        resumed(settings(bright=3)),
        SettingError,
        "run/recipe.json",
        "give --bright anew",
        "neither true nor false",
    ),
    Bad(
        "resume-setting-gone",
        resumed(settings(widht=4)),
        SettingError,
        "run/recipe.json",
        "recipe as it was",
        "did you mean 'width'",
    ),
    Bad(
        "resume-other-width",
        resumed(lambda run: run, "--width", 5),
        CheckpointError,
        "checkpoints/3",
        "model and optimizer",
        "params/a/kernel: the checkpoint has float32[4, 8], the model float32[4, 5]",
    ),
    Bad(
        "resume-journal-damaged",
        damaged_journal,
        DataError,
        "events.jsonl, line 2",
        "delete that line",
        "garbage",
    ),
    Bad(
        "run-folder-name-too-long",
        given("--run-dir", "x" * 300),
        LeptonError,
        "xxx",
        "make the path shorter",
        "File name too long",
    ),
    Bad(
        "local-folder-below-a-file",
        given("--local-dir", "r.py/local", "--run-dir", "a"),
        CheckpointError,
        "r.py/local",
        "move the file away",
        "Not a directory",
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
    content: str | bytes,
    label: str = "y",
    **options: Any,
) -> Callable[[Path], Any]:
    return lambda folder: data.table(
        write(folder / "t.csv", content),
        label,
        **options,
    )


def tested(content: str) -> Callable[[Path], Any]:
    """Return a test table encoded by the schema of the good one."""

    def provoke(folder: Path) -> Any:
        schema = data.table(write(folder / "train.csv", GOOD_CSV), "y").schema
        return data.table(
            write(folder / "t.csv", content),
            "y",
            schema=schema,
        )

    return provoke


CSV_FILES = [
    Bad(
        "csv-missing",
        lambda folder: data.table(folder / "t.csv", "y"),
        DataError,
        "t.csv",
        "check the path",
        "no such file",
    ),
    Bad(
        "csv-is-a-folder",
        lambda folder: data.table(folder, "y"),
        DataError,
        "",
        "check the path",
        "can't be read",
    ),
    Bad(
        "csv-empty",
        csv(""),
        DataError,
        "t.csv",
        "with a header",
        "empty",
    ),
    Bad(
        "csv-header-only",
        csv("a,b,y\n"),
        DataError,
        "t.csv",
        "at least one row",
        "no rows",
    ),
    Bad(
        "csv-column-twice",
        csv("a,a,y\n1,2,3\n"),
        DataError,
        "line 1",
        "name of its own",
        "'a' is there twice",
    ),
    Bad(
        "csv-column-without-name",
        csv("a,,y\n1,2,3\n"),
        DataError,
        "line 1",
        "name it",
        "column 2 has no name",
    ),
    Bad(
        "csv-ragged-row",
        csv(GOOD_CSV + "1.5,p\n"),
        DataError,
        "t.csv, line 12",
        "as wide as the header",
        "expected 3 cells, found 2",
    ),
    Bad(
        "csv-open-quote",
        csv(GOOD_CSV + '1.5,"p,yes\n'),
        DataError,
        "t.csv, line 12",
        "close every quote",
    ),
    Bad(
        "csv-bad-number",
        csv(GOOD_CSV + "oops,p,yes\n"),
        DataError,
        "line 12, column 'a'",
        "correct the cell",
        "'oops'",
    ),
    Bad(
        "csv-infinite-number",
        csv(GOOD_CSV + "1e400,p,yes\n"),
        DataError,
        "line 12, column 'a'",
        "correct the cell",
        "1e400",
    ),
    Bad(
        "csv-label-unknown",
        csv(GOOD_CSV.replace("y\n", "target\n", 1), "targte"),
        DataError,
        "line 1",
        "a, b, target",
        "did you mean 'target'",
    ),
    Bad(
        "csv-label-missing",
        csv(GOOD_CSV + "1.5,p,\n"),
        DataError,
        "line 12, column 'y'",
        "leave the row out",
    ),
    Bad(
        "csv-one-class",
        csv("a,y\n1,no\n2,no\n"),
        DataError,
        "line 2, column 'y'",
        "at least two classes",
    ),
    Bad(
        "csv-label-only",
        csv("y\n1\n2\n"),
        DataError,
        "line 1",
        "give columns",
    ),
    Bad(
        "csv-not-utf8",
        csv(GOOD_CSV.encode() + b"1.5,\xff,yes\n"),
        DataError,
        "t.csv, line 12",
        "UTF-8",
        "0xff",
    ),
    Bad(
        "csv-categorical-unknown",
        csv(GOOD_CSV, categorical=["bb"]),
        DataError,
        "t.csv",
        "a, b, y",
        "did you mean 'b'",
    ),
    Bad(
        "csv-test-label-unseen",
        tested(GOOD_CSV + "1.5,p,yess\n"),
        DataError,
        "line 12, column 'y'",
        "no, yes",
        "did you mean 'yes'",
    ),
    Bad(
        "csv-test-column-gone",
        tested("aa,b,y\n1.5,p,yes\n"),
        DataError,
        "t.csv",
        "training table's columns",
        "did you mean 'aa'",
    ),
    Bad(
        "csv-split-leaves-nothing",
        lambda folder: data.table_split(
            write(folder / "t.csv", GOOD_CSV),
            "y",
            1.0,
            0,
        ),
        DataError,
        "split",
        "between 0 and 1",
    ),
    Bad(
        "csv-word-among-numbers",
        csv(numbered(lambda i: i if i % 6 else "none")),
        DataError,
        "line 2, column 'a'",
        "add 'none' to `missing`",
        "5 of the column's 30 cells (17 %)",
    ),
    Bad(
        "csv-dates",
        csv(numbered(lambda i: f"2024-03-{i + 1:02d}")),
        DataError,
        "line 2, column 'a'",
        "in `categorical`",
        "is a date or a time",
    ),
    Bad(
        "csv-times",
        csv(numbered(lambda i: f"{i % 24}:{i:02d}")),
        DataError,
        "line 2, column 'a'",
        "in `ignore`",
        "is a date or a time",
    ),
    Bad(
        "csv-thousands-or-decimals",
        csv(numbered(lambda i: f'"{i + 1},500"')),
        DataError,
        "line 2, column 'a'",
        "`thousands` to ','",
        "nothing in the file tells which",
    ),
    Bad(
        "csv-two-currencies",
        csv(numbered(lambda i: f"{i} €" if i % 2 else f"${i}")),
        DataError,
        "line 3, column 'a'",
        "one unit",
        "spelled otherwise",
    ),
    Bad(
        "csv-numbers-with-a-unit",
        csv(numbered(lambda i: f"{i} kg")),
        DataError,
        "line 2, column 'a'",
        "without 'kg'",
        "'kg'",
    ),
    Bad(
        "csv-marks-of-another-file",
        csv(numbered(lambda i: f"{i}.5"), decimal=","),
        DataError,
        "line 2, column 'a'",
        "leave the two out",
        "`decimal`",
    ),
    Bad(
        "csv-workbook",
        csv(b"PK\x03\x04" + b"\0" * 30),
        DataError,
        "t.csv",
        "as a CSV file",
        "xlsx",
    ),
    Bad(
        "csv-utf16-without-mark",
        csv(GOOD_CSV.encode("utf-16-le")),
        DataError,
        "line 1",
        "iconv -f utf-16le",
        "zero bytes",
    ),
    Bad(
        "csv-delimiter-unknown",
        csv("a:b:y\n1:p:no\n2:q:yes\n"),
        DataError,
        "line 1",
        "`delimiter`",
        "no label column 'y'",
    ),
    Bad(
        "csv-delimiter-of-two",
        csv(GOOD_CSV, delimiter="::"),
        DataError,
        "delimiter",
        "one character",
        "'::'",
    ),
    Bad(
        "csv-row-names-without-a-name",
        csv("b,y\n" + GOOD_CSV.partition("\n")[2]),
        DataError,
        "line 2",
        "row names",
        "expected 2 cells, found 3",
    ),
    Bad(
        "csv-label-kind-unknown",
        csv(GOOD_CSV, label_kind="number"),
        DataError,
        "label_kind",
        "quantity",
        "'number'",
    ),
    Bad(
        "csv-label-is-no-quantity",
        csv(GOOD_CSV, label_kind="quantity"),
        DataError,
        "line 2, column 'y'",
        "`label_kind`",
        "no numbers",
    ),
    Bad(
        "csv-label-ignored",
        csv(GOOD_CSV, ignore=["y"]),
        DataError,
        "t.csv",
        "`ignore`",
        "label 'y' is to be ignored",
    ),
    Bad(
        "csv-path-with-zero-byte",
        lambda folder: data.table(f"{folder}/a\0b.csv", "y"),
        DataError,
        "",
        "check the path",
        "null byte",
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
        "mnist",
        "four idx files",
        "there is no such folder",
    ),
    Bad(
        "idx-file-missing",
        idx("t10k-labels", lambda b: None),
        DataError,
        "",
        "four idx files",
        "t10k-labels-idx1-ubyte",
    ),
    Bad(
        "idx-images-cut",
        idx("train-images", lambda b: b[:-7]),
        DataError,
        "train-images",
        "download",
        "cut short",
    ),
    Bad(
        "idx-labels-cut",
        idx("train-labels", lambda b: b[:-1]),
        DataError,
        "train-labels",
        "download",
        "cut short",
    ),
    Bad(
        "idx-header-cut",
        idx("train-images", lambda b: b[:9]),
        DataError,
        "train-images",
        "download",
        "16 bytes",
    ),
    Bad(
        "idx-empty",
        idx("train-labels", lambda b: b""),
        DataError,
        "train-labels",
        "download",
        "none",
    ),
    Bad(
        "idx-bad-magic",
        idx("train-labels", lambda b: b"PK\3\4" + b),
        DataError,
        "train-labels",
        "download",
        "50 4b 03 04",
    ),
    Bad(
        "idx-followed-by-bytes",
        idx("t10k-images", lambda b: b + b"\0"),
        DataError,
        "t10k-images",
        "download",
        "other bytes",
    ),
    Bad(
        "idx-gzip-damaged",
        idx("train-images", lambda b: gzip.compress(b)[:-9]),
        DataError,
        "train-images",
        "download",
        "gzip",
    ),
    Bad(
        "idx-counts-differ",
        idx("train-labels", lambda b: idx_bytes(np.zeros(5, np.uint8))),
        DataError,
        "train-labels",
        "one data set",
        "6 images, but 5 labels",
    ),
    Bad(
        "idx-sizes-differ",
        idx("t10k-images", lambda b: idx_bytes(np.zeros((4, 6, 6), np.uint8))),
        DataError,
        "",
        "one data set",
        "(6, 6, 1)",
    ),
    Bad(
        "idx-labels-for-images",
        idx("train-images", lambda b: idx_bytes(np.zeros(6, np.uint8))),
        DataError,
        "train-images",
        "download",
        "3 dims",
    ),
    Bad(
        "idx-of-no-images",
        idx(
            "train-",
            lambda b: idx_bytes(np.zeros((0, 5, 5) if len(b) > 20 else 0, np.uint8)),
        ),
        DataError,
        "train-images",
        "download",
        "none are there",
    ),
]

COMMAND_LINES = RECIPE_FILES + SETTINGS + ZOO + RUN_FOLDERS
DATA_FILES = CSV_FILES + IDX_FILES
