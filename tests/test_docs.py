"""The pages name files that are there."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lepton_jax"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:\w+/)*\w+\.py)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]

    missing = [target for target in local if not (page.parent / target).exists()]

    assert not missing


@pytest.mark.parametrize("name", ["glossary.md", "planner.md"])
def test_every_file_that_a_page_names_is_in_the_package(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    folders = [PACKAGE, PACKAGE / "planner", ROOT]

    missing = [
        file
        for file in FILE.findall(text)
        if not any((folder / file).exists() for folder in folders)
    ]

    assert not missing


def test_the_examples_of_data_run_as_written(tmp_path, monkeypatch):
    pytest.importorskip("PIL", reason="pip install 'lepton-jax[image]'")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/data.md", "exec"), names)
    assert names["page"].is_file()
    assert set(names["opened"].predict(names["people"], words=True)) == {"yes", "no"}
    assert names["images"].split("train").inputs.shape == (16, 16, 16, 3)
    assert names["inputs"]["tokens"].shape == names["targets"].shape == (4, 128)
    assert len(names["names"]) == 32
    assert len(names["state"]) < 500


def test_the_kernel_of_ones_own_runs_as_written():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/kernels.md", "exec"), names)

    x, scale = names["x"], names["scale"]
    root = np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(names["value"], (x / root * scale).sum(), rtol=1e-4)
    of_scale = (x / root).sum(0)
    np.testing.assert_allclose(names["slopes"][1], of_scale, rtol=1e-4, atol=1e-4)
