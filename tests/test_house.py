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
    {"models", "errors", "compat", "heap", "trees"},
    {"augment", "recipe", "losses", "metrics", "hardware"},
    {"step", "data", "monitor", "hosts", "baselines"},
    {"controller", "checkpoint", "adapt"},
    {"planner", "launch"},
    {"train"},
    {"verify", "ship", "trainer", "generation", "hub"},
    {"cross_validation"},
    {"api"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# Inside the planner: each room imports those before it alone.
PLANNERS_ROOMS = (
    "patience",
    "rewrite",
    "program",
    "xla",
    "plans",
    "assignment",
    "estimate",
    "search",
    "show",
)
MOST_ROOMS = 30


def module_of(path: Path) -> str:
    """Name of a file below `lepton_jax.`, as "planner.search.pins"."""
    inner = path.relative_to(PACKAGE).with_suffix("")
    return ".".join(inner.parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def for_types_alone(tree: ast.AST) -> set[ast.AST]:
    """The nodes under `if TYPE_CHECKING:`, which are never run."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    return {inner for block in blocks for inner in ast.walk(block)}


def imports(path: Path) -> list[str]:
    """Modules of the package that a file imports, also inside of functions."""
    tree = ast.parse(path.read_text())
    unused = for_types_alone(tree)
    names = []
    for node in ast.walk(tree):
        if node in unused:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    inner = [
        name.removeprefix("lepton_jax.")
        for name in names
        if name.startswith("lepton_jax.")
    ]
    return [name if name in MODULES else name.rpartition(".")[0] for name in inner]


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_never_run_upward_nor_into_a_neighbours_insides(path):
    here = room(module_of(path))
    if here == "__init__":
        return
    for module in imports(path):
        there = room(module)
        if there in ("", here):
            continue
        assert there in LEVEL, f"{path.name} imports {module}, which is on no floor"
        assert LEVEL[there] <= LEVEL[here], f"{path.name} imports {module} from above"
        if LEVEL[there] == LEVEL[here]:
            assert "." not in module, f"{path.name} imports a neighbour's {module}"
        assert here != "models", "a zoo model is an ordinary Flax module"


def test_no_file_imports_itself_by_way_of_others():
    unseen = {
        name: set(imports(path)) & MODULES.keys() for name, path in MODULES.items()
    }
    while unseen:
        free = [
            name for name, needs in unseen.items() if not needs & unseen.keys() - {name}
        ]
        assert free, f"a circle among {sorted(unseen)}"
        for name in free:
            del unseen[name]


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "planner").rglob("*.py")), ids=lambda p: p.name
)
def test_the_planners_rooms_are_climbed_in_one_direction(path):
    def level(module: str) -> int | None:
        parts = module.split(".")
        known = parts[0] == "planner" and len(parts) > 1 and parts[1] in PLANNERS_ROOMS
        return PLANNERS_ROOMS.index(parts[1]) if known else None

    here = level(module_of(path))
    if here is None:
        return
    for module in imports(path):
        there = level(module)
        if module == "planner.show.text" and module_of(path) == "planner.plans":
            continue  # a plan that is printed is drawn, when somebody prints it
        assert there is None or there <= here, f"{path.name} imports {module}"


def test_every_room_has_a_floor_and_they_are_few():
    rooms = {room(name) for name in MODULES} - {"__init__"}
    assert rooms <= LEVEL.keys()
    assert len(rooms) <= MOST_ROOMS


def test_the_public_names_are_these():
    assert sorted(lepton_jax.__all__) == [
        "Artifact",
        "CheckpointError",
        "CrossValidation",
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
        "adapt",
        "augment",
        "baselines",
        "controllers",
        "cross_validate",
        "data",
        "generate",
        "hardware",
        "hub",
        "losses",
        "metrics",
        "models",
        "monitor",
        "optimizers",
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
        "adapt",
        "augment",
        "errors",
        "compat",
        "trees",
        "recipe",
        "hardware",
        "planner",
        "monitor",
        "checkpoint",
        "hosts",
    }
    rooms = {room(module_of(path)) for path in walk}
    for path in walk:
        missing = {room(module) for module in imports(path)} - rooms - before
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
    commands = (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"])
    for command in commands:
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
