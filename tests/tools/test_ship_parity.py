"""The parity of all recipes: each has a case, and the table says what can't be."""

from pathlib import Path

from lepton_jax.ship.export import LEPTON, TARGETS
from tools.ship import cases, environments, parity

RECIPES = Path(cases.ROOT) / "recipes"


def test_every_recipe_has_a_case():
    recipes = {path.stem for path in RECIPES.glob("[!_]*.py")}
    assert {case.recipe for case in cases.CASES} == recipes


def test_every_target_has_an_environment_with_its_runtime_alone():
    assert set(environments.RUNTIMES) == {LEPTON, *TARGETS}
    for target, wanted in environments.RUNTIMES.items():
        assert target == LEPTON or not any("lepton" in name for name in wanted)


def test_the_table_has_a_number_or_a_reason_for_each_target():
    content = {
        "cases": {
            "digits_cnn": {
                "lepton": {"rows": 200, "passes": True, "scaled": 0.0},
                "onnx": {"refused_because": "no rule for igamma"},
                "iree": {
                    "rows": 200,
                    "passes": False,
                    "scaled": 0.5,
                    "departs": "03 dot_general net.py:7",
                },
                "safetensors": {"rows": 0, "passes": True, "scaled": 0.0},
            }
        }
    }
    table = parity.table(content)
    row = next(line for line in table.splitlines() if line.startswith("| digits_cnn"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "digits_cnn" and len(cells) == 2 + len(TARGETS)
    assert "no (1)" in cells and "**5e-01** (2)" in cells and "bit by bit" in cells
    assert "1. no rule for igamma" in table and "2. 03 dot_general net.py:7" in table
