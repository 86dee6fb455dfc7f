"""The search for the cheapest model that keeps the metric, and its command."""

import json

import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.cli import main, settings
from lepton_jax.ship import Artifact, shrink
from lepton_jax.ship.shrink.search import Candidate, Frontier
from tests.ship import shrinking

pytest.importorskip("qwix", reason="needs the extra quant")
pytest.importorskip("safetensors", reason="needs the extra ship")
pytest.importorskip("flatbuffers", reason="needs the extra ship")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(quick_compilation):
    return shrinking.trained(steps=60)


def test_the_chosen_model_keeps_the_metric_and_none_smaller_does(trained):
    frontier = shrink.search(trained, "int4", keep=0.98)
    kept = [one for one in frontier.candidates if one.keeps]
    assert kept and frontier.chosen in {one.name for one in kept}
    chosen = next(one for one in kept if one.name == frontier.chosen)
    assert chosen.nbytes <= 1.02 * min(one.nbytes for one in kept)
    assert chosen.metric >= 0.98 * frontier.whole.metric
    assert shrink.size_of(frontier.trainer) == chosen.nbytes < frontier.whole.nbytes
    json.dumps(frontier.to_fields())
    assert chosen.name in str(frontier) and "accuracy" in str(frontier)


def test_where_four_bits_lose_the_metric_as_few_weights_as_needed_get_eight(trained):
    test = trained.recipe.test
    loss = trained.evaluate(test)[0]
    in_four = shrink.quantize(trained, "w4").evaluate(test)[0]
    in_eight = shrink.quantize(trained, "w8").evaluate(test)[0]
    assert in_eight < in_four
    keep = 1 - ((in_eight + in_four) / 2 - loss) / loss
    frontier = shrink.search(trained, "int4", keep=keep, metric="loss")
    spared = [one for one in frontier.candidates if "in 8 bits" in one.name]
    assert len(spared) == 1 and spared[0].keeps
    four = next(one for one in frontier.candidates if one.name == "w4")
    eight = next(one for one in frontier.candidates if one.name == "w8")
    assert not four.keeps and four.nbytes < spared[0].nbytes <= eight.nbytes


def test_cut_models_are_trained_and_measured_next_to_the_whole_one(trained):
    frontier = shrink.search(trained, "pruned", keep=0.9, epochs=2)
    sizes = [one.nbytes for one in frontier.candidates]
    assert len(sizes) == 3 and max(sizes) < frontier.whole.nbytes
    assert frontier.chosen is not None
    kernel = frontier.trainer.state.params["layers"][0]["kernel"]
    assert kernel.shape[1] <= 64


def test_sparsity_that_nothing_runs_is_said_to_save_nothing(trained):
    frontier = shrink.search(trained, "2:4")
    assert frontier.candidates == () and frontier.chosen is None
    assert "saves nothing" in str(frontier)


def test_a_model_beaten_in_all_is_not_of_the_frontier():
    def made(name, nbytes, milliseconds, metric):
        return Candidate(name, nbytes, milliseconds, metric, metric, True)

    whole = made("as it is", 100, 1.0, 0.9)
    small = made("small", 30, 1.0, 0.9)
    worse = made("worse", 40, 2.0, 0.8)
    frontier = Frontier(
        "int8", "accuracy", 0.9, 1, whole, (small, worse), "small", None
    )
    assert [one.name for one in frontier.best()] == ["small"]


def test_the_command_writes_an_artifact_and_shows_the_frontier(tmp_path, capsys):
    recipe = tmp_path / "moons.py"
    recipe.write_text(RECIPE)
    run = tmp_path / "run"
    source = {"file": str(recipe), "settings": {}}
    made = settings.load(recipe)()
    lepton.Trainer(made, devices=1, run_dir=run, source=source).fit()
    out = tmp_path / "small.lepton"
    capsys.readouterr()
    words = ["shrink", str(run), "--to", "int8", "--keep", "0.95", "--json"]
    assert main([*words, "-o", str(out), "--batch", "8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["chosen"] in ("w8", "w8a8")
    opened = Artifact.open(out)
    share = opened.size / told["whole"]["nbytes"]
    assert share < 0.5
    assert opened.manifest.recipe["shrunk"]["chosen"] == told["chosen"]
    assert opened.predict(np.zeros((3, 16), np.float32)).shape == (3,)


def test_mistakes_are_errors_with_a_remedy(trained, tmp_path, capsys):
    for arguments in ({"to": "int9"}, {"keep": 0}, {"metric": "acuracy"}):
        with pytest.raises(lepton.SettingError):
            shrink.search(trained, **arguments)
    assert main(["shrink", str(tmp_path)]) == 2
    assert "remedy" in capsys.readouterr().err


RECIPE = '''
import numpy as np
import optax
from functools import partial

import lepton_jax as lepton


def recipe(width: int = 64) -> lepton.Recipe:
    """Halves of a space."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(600, 16)).astype(np.float32)
    labels = (inputs[:, :4].sum(axis=1) > 0).astype(np.int32)
    return lepton.Recipe(
        name="halves",
        model=partial(lepton.models.MLP, (16, width, 2)),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.adam,
        learning_rate=1e-2,
        train=(inputs[:300], labels[:300]),
        test=(inputs[300:], labels[300:]),
        steps=40,
    )
'''
