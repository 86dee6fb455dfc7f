"""The planning command line: what it prints and writes.

Each wrong argument is an error before anything is searched.
"""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lepton_jax.cli import plan as planning
from lepton_jax.planner import Plan

ROOT = Path(__file__).resolve().parents[2]
RECIPE = '''
import numpy as np
import optax
import lepton_jax as lepton


def recipe(
    width: int = 256,
    batch_size: int = 64,
    micro_batches: int | None = None,
    data: bool = True,
) -> lepton.Recipe:
    """A small network.

    Args:
      width: units of a hidden layer.
    """
    train = (np.zeros((640, 32), np.float32), np.zeros(640, np.int32)) if data else None
    return lepton.Recipe(
        model=lambda rngs: lepton.models.MLP((32, width, width, 10), rngs=rngs),
        train=train,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=batch_size,
        steps=10,
        micro_batches=micro_batches,
    )
'''


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipes") / "small.py"
    file.write_text(RECIPE)
    return str(file)


@pytest.fixture
def look(recipe, capsys):
    def run(*arguments, code=0):
        assert planning.main([recipe, *map(str, arguments)]) == code
        return capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "kind", ["lepton.data.Source(train)", "grain.MapDataset.source(rows)"]
)
def test_data_of_every_kind_gives_the_shapes(tmp_path, capsys, kind):
    text = RECIPE.replace("import optax\n", "import grain\nimport optax\n")
    rows = "    rows = list(zip(*train))\n"
    text = text.replace("    return lepton.Recipe(", f"{rows}    return lepton.Recipe(")
    file = tmp_path / "other.py"
    file.write_text(text.replace("train=train", f"train={kind}"))

    code = planning.main([str(file), "--on", "v5e:2x2"])

    out = capsys.readouterr()
    assert code == 0, out.err
    assert "256x256" in out.out


def test_one_topology_prints_its_plan(look, tmp_path):
    out = look("--on", "v5e:2x2", "--width", 512, "--json", tmp_path / "r.json").out
    result = json.loads((tmp_path / "r.json").read_text())
    (entry,) = result["plans"]
    plan = Plan.from_json(json.dumps(entry["plan"]))

    assert str(plan) in out
    assert plan.topology == "v5e:2x2"
    assert "512x512" in out, "the recipe's own setting counts"

    predicted = entry["predicted"]

    assert (
        predicted["peak_bytes"]
        == plan.peak
        == sum(predicted["bytes_per_device"].values())
    )
    assert predicted["step_seconds"] == plan.step_seconds > 0
    assert predicted["unit"] == "samples"
    assert result["peak_rss_bytes"] > 2**20
    assert 0 < result["seconds"]["trace"] < result["seconds"]["process"]


def test_several_topologies_print_the_frontier(look, tmp_path):
    out = look(
        "--on",
        "v5e:2x2, h200:8 ,v5e:2x2",
        "--tokens",
        "5e6",
        "--json",
        tmp_path / "r.json",
        "--html",
        tmp_path / "r.html",
    ).out
    result = json.loads((tmp_path / "r.json").read_text())

    assert "5e6 samples" in out
    assert out.count("v5e:2x2") == 1, "named twice, planned once"

    seconds = [p["predicted"]["step_seconds"] * 5e6 / 64 for p in result["plans"]]

    assert [p["seconds"] for p in result["frontier"]["points"]] == pytest.approx(
        seconds
    )

    page = (tmp_path / "r.html").read_text()

    assert page.startswith("<!doctype html>")
    assert page.count('class="lepton"') == 3, "the comparison and both plans"


def test_what_is_asked_for_reaches_the_planner(look, monkeypatch):
    from jax.sharding import PartitionSpec as P

    asked = {}
    real = planning.plan
    monkeypatch.setattr(
        planning,
        "plan",
        lambda traced, target, **options: (
            asked.update(options, recipe=traced.recipe.micro_batches),
            real(traced, target),
        )[1],
    )
    look(
        "--on",
        "cpu:8",
        "--mesh",
        "data=4, tensor=2",
        "--pin",
        "**/kernel=None,tensor",
        "--pin",
        "a=b=data+tensor,-",
        "--pin",
        "x=",
        "--remat",
        "full",
        "--objective",
        "memory",
        "--micro-batches",
        2,
    )

    assert asked == {
        "mesh": {"data": 4, "tensor": 2},
        "remat": "full",
        "objective": "memory",
        "recipe": 2,
        "pins": {
            "**/kernel": P(None, "tensor"),
            "a=b": P(("data", "tensor"), None),
            "x": P(),
        },
    }


def test_a_saved_plan_is_replayed_without_a_search(look, tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    first = look("--on", "cpu:8", "--save", file).out

    assert "nothing differs" in look("--on", "cpu:8", "--diff", file).out

    changed = look("--on", "cpu:8", "--diff", file, "--batch-size", 128).out

    assert "batch_size: 64 -> 128" in changed

    monkeypatch.setattr(
        planning,
        "plan",
        lambda *a, **k: pytest.fail("it searches"),
    )
    again = look("--replay", file).out

    assert first[: first.index("traced")] == again[: again.index("traced")]

    error = look("--replay", file, "--width", 512, code=2).err

    assert "arrays differ" in error
    assert "[32, 256] in the plan, [32, 512] in the recipe" in error
    assert str(file) in error
    assert (
        "for cpu:8, not for v5e:2x2"
        in look("--replay", file, "--on", "v5e:2x2", code=2).err
    )


def test_without_on_the_live_devices_are_planned_for(look):
    assert "cpu:8" in look().out


def test_what_cannot_fit_is_an_answer(look, tmp_path):
    chips = tmp_path / "chips.toml"
    chips.write_text('[tiny]\nlike = "v5e"\nmemory = 6e5\n')
    error = look(
        "--on",
        "tiny:2x2",
        "--chips",
        chips,
        "--json",
        tmp_path / "r.json",
        code=2,
    ).err

    assert "nothing fits" in error
    assert "remedy" in error

    (entry,) = json.loads((tmp_path / "r.json").read_text())["plans"]

    assert "nothing fits" in entry["error"]["what"]
    assert "plan" not in entry

    out = look("--on", "tiny:2x2,v5e:2x2", "--chips", chips).out

    assert "tiny:2x2: nothing fits" in out
    assert "fastest" in out


def test_verify_is_shown_and_kept(look, tmp_path):
    out = look("--on", "cpu:8", "--verify", "--json", tmp_path / "r.json").out
    (entry,) = json.loads((tmp_path / "r.json").read_text())["plans"]

    assert "compiled for cpu:8" in out
    assert entry["verify"][0]["fits"]
    assert entry["verify"][0]["predicted"]["peak"] == entry["predicted"]["peak_bytes"]


def test_what_xla_refuses_is_a_failure(look, monkeypatch):
    refused = types.SimpleNamespace(fits=False)
    monkeypatch.setitem(
        sys.modules,
        "lepton_jax.verify.comparison",
        types.SimpleNamespace(verify=lambda *_: refused),
    )
    look("--on", "cpu:8", "--verify", code=2)


@pytest.mark.parametrize("whole", [(), ("--whole",)])
def test_prove_takes_the_plan_that_xla_chose(look, tmp_path, monkeypatch, whole):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "r.json"
    out = look("--on", "cpu:8", "--prove", 2, *whole, "--json", file).out
    (entry,) = json.loads(file.read_text())["plans"]

    assert 1 <= len(entry["prove"]) <= 2
    verb = "compiled" if whole else "probed"
    assert out.count(f"{verb} for cpu:8") == len(entry["prove"])
    assert entry["plan"]["mesh"] in [
        check["mesh"] for check in entry["prove"] if check["fits"]
    ]


def test_help_lists_the_recipes_settings_and_the_tools_own(look):
    out = look("--help").out

    assert "--width" in out
    assert "units of a hidden layer" in out
    assert "--objective" in out
    assert "--micro-batches" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--on", "v5q:4x4"], "did you mean 'v5"),
        (["--on", "v5p"], "chip:count"),
        (["--on", ","], "names no topology"),
        (["--on", "cpu:8", "--mesh", "data=0"], "axis=size"),
        (["--on", "cpu:8", "--mesh", "data:8"], "axis=size"),
        (["--on", "cpu:8", "--mesh", "data=2,data=4"], "given twice"),
        (["--on", "cpu:8", "--mesh", "data=3"], "devices"),
        (["--on", "cpu:8", "--pin", "tensor,None"], "pattern=spec"),
        (["--on", "cpu:8", "--pin", "**/kernel=P(tensor)"], "no mesh axis"),
        (
            ["--on", "cpu:8", "--mesh", "data=8", "--pin", "**/kernle=data"],
            "did you mean 'kernel'",
        ),
        (["--on", "cpu:8", "--remat", "ful"], "did you mean 'full'"),
        (["--on", "cpu:8", "--objective", "speed"], "not one of time, memory, cost"),
        (["--on", "cpu:8", "--micro-batches", "5"], "64"),
        (["--on", "cpu:8", "--tokens", "-1"], "--tokens is -1"),
        (["--on", "cpu:8", "--prove", "0"], "--prove is 0"),
        (["--on", "cpu:8", "--prove", "2", "--verify"], "both given"),
        (["--on", "cpu:8", "--whole"], "without --prove"),
        (["--on", "cpu:8", "--onn", "cpu:4"], "did you mean '--on'"),
        (["--on", "cpu:8", "--widht", "4"], "did you mean '--width'"),
        (["--on", "cpu:8", "--width", "wide"], "not a whole number"),
        (["--on", "cpu:8", "--chips", "none.toml"], "none.toml"),
        (["--on", "cpu:8", "--diff", "none.json"], "none.json"),
        (["--replay", "none.json"], "none.json"),
        (["--on", "cpu:8,v5e:2x2", "--save", "plan.json"], "name one topology"),
        (["--on", "cpu:8", "--json", "no/such/folder/r.json"], "no/such/folder"),
        (
            ["--on", "cpu:8,v5e:2x4", "--mesh", "data=8", "--pin", "**/kernle=data"],
            "matches no parameter",
        ),
    ],
)
def test_a_wrong_argument_is_said_with_its_remedy(
    arguments, says, look, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    error = look(*arguments, code=2).err

    assert says in error
    assert "remedy:" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"topology": "cpu:8"}', "\xff"])
def test_a_file_that_is_no_plan_is_named(content, look, tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(content.encode("latin-1"))
    error = look("--replay", file, code=2).err

    assert str(file) in error
    assert "remedy:" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no recipe is named"),
        (["--on", "cpu:8"], "no recipe is named"),
        (["gone.py", "--on", "cpu:8"], "no recipe file"),
        (["--nothing"], "'--nothing' is not known"),
    ],
)
def test_a_recipe_must_be_there(arguments, says, capsys):
    assert planning.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_recipe_may_come_after_the_options(recipe, capsys):
    assert planning.main(["--on", "v5e:2x2", "--width", "64", recipe]) == 0
    assert "v5e:2x2" in capsys.readouterr().out


def test_planning_by_name_starts_no_backend_and_survives_a_closed_pipe(recipe):
    code = (
        "import sys; from lepton_jax.cli.plan import main; code ="
        " main(sys.argv[1:]); from jax._src import xla_bridge; raise SystemExit(code or"
        " 10 * len(xla_bridge._backends))"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            recipe,
            "--on",
            "v5p:4x4x4",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()

    assert (process.stderr.read(), process.wait()) == ("", 0)


def test_the_tool_is_the_module(recipe):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "plan.py"),
            recipe,
            "--on",
            "v5e:2x2",
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0
    assert "v5e:2x2" in done.stdout, done.stderr
