"""The shape of the house: floors, public names, the walk, the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lepton_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lepton_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = [
    {"errors", "compat", "phase"},
    {"agreement"},
    {
        "arguments",
        "dropout",
        "state",
        "precision",
        "recipe",
        "hardware",
        "losses",
        "metrics",
        "models",
    },
    {"module", "optimizers", "adoption"},
    {
        "planner",
        "checkpoint",
        "local_checkpoint",
        "controller",
        "data",
        "monitor",
        "history",
    },
    {"program"},
    {"diagnosis", "restore", "verify"},
    {"loop"},
    {"trainer"},
    {"launch", "ship"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> list[str]:
    """Modules of the package that a file imports, below `lepton_jax.`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "lepton_jax"
        ):
            inner = node.module.split(".")[1:]
            found += (
                [".".join(inner)] if inner else [alias.name for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            found += [
                a.name.partition(".")[2]
                for a in node.names
                if a.name.split(".")[0] == "lepton_jax" and "." in a.name
            ]
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path",
    FILES,
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_imports_never_run_upward_nor_into_a_neighbours_insides(path):
    here = room(path)
    if here == "__init__":
        return
    for module in imports(path):
        there = module.split(".")[0]
        assert there in LEVEL, f"{path.name} imports {module}, which is on no floor"
        if there == here:
            continue
        assert LEVEL[there] <= LEVEL[here], (
            f"{path.name} ({here}) imports {module} from above"
        )
        if LEVEL[there] == LEVEL[here]:
            assert "." not in module, (
                f"{path.name} imports {module}, the inside of a neighbour"
            )
        assert here != "models", "a zoo model is an ordinary Flax module"


def test_every_room_has_a_floor():
    assert {room(p) for p in FILES} - {"__init__"} <= LEVEL.keys()


def test_the_public_names_are_these():
    assert sorted(lepton_jax.__all__) == [
        "CheckpointError",
        "DataError",
        "DivergedError",
        "History",
        "LeptonError",
        "ModelError",
        "Plan",
        "PlanError",
        "Program",
        "Recipe",
        "RecipeError",
        "SettingError",
        "State",
        "Topology",
        "Trace",
        "Trainer",
        "controllers",
        "data",
        "hardware",
        "losses",
        "metrics",
        "models",
        "monitor",
        "plan",
        "topology",
        "trace",
    ]
    assert all(hasattr(lepton_jax, name) for name in lepton_jax.__all__)


def test_a_recipe_has_at_most_30_fields():
    assert len(lepton_jax.Recipe.__dataclass_fields__) <= 30


def test_the_walk_names_every_file_it_takes():
    walk = [
        ROOT / name
        for name in re.findall(
            r"^\d+\. \[`(.+?)`\]",
            (ROOT / "docs" / "walk.md").read_text(),
            re.MULTILINE,
        )
    ]
    assert len(walk) <= 10 and all(path.is_file() for path in walk)
    # what the loop, the program and the loader import is on the walk, has done its work
    # before the first batch, or stands by
    before = {
        "errors",
        "compat",
        "recipe",
        "hardware",
        "planner",
        "history",
        "monitor",
        "checkpoint",
        "data",
        "controller",
        "phase",
        "agreement",
        "local_checkpoint",
        "arguments",
        "dropout",
        "adoption",
        "restore",
        "diagnosis",
    }
    rooms = {room(path) for path in walk}
    for path in walk:
        missing = {m.split(".")[0] for m in imports(path)} - rooms - before
        assert not missing, (
            f"{path.name} leads to {missing}, which the walk does not name"
        )


def test_importing_starts_no_backend():
    code = (
        "import lepton_jax; from jax._src import xla_bridge; "
        "raise SystemExit(bool(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_linters_are_content():
    for command in (["ruff", "check", "."], ["mypy"]):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (
        names["accuracy"] > 0.9
        and len(names["labels"])
        and (tmp_path / "digit_classifier").is_dir()
    )
