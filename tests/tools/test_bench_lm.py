"""The language-model benchmark, tiny, with a stand-in for PyTorch, which CI lacks."""

import argparse
import importlib.util
import json
import re
import sys

import jax
import pytest

import lepton_jax as lepton
from lepton_jax.errors import ModelError, PlanError, SettingError
from tools.bench import cli as bench
from tools.bench import lm as bench_lm

QUICK = ["lm", "--length", "16", "--batch", "2", "--seconds", "0.02", "--rounds", "2"]
STAND_IN = """#!{python}
import json, sys, time
if sys.argv[1] == "-c":
    sys.exit(0)
spec = json.loads(sys.argv[2])
assert spec["batch"] == 2 and spec["length"] == 16 and spec["device"] == "cpu"
{then}
about = {{"torch": "9.9", "compiled": True, "parameters": 994400}}
print(json.dumps(about), flush=True)
for line in sys.stdin:
    time.sleep(int(line) * 1e-3)
    print(json.dumps({{"loss": 5.5, "peak": 2**30}}), flush=True)
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(bench, "COMMANDS", (bench_lm,))
    # as somebody chose it: the benchmark leaves it
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")


@pytest.fixture
def stand_in(tmp_path):
    def write(then=""):
        file = tmp_path / "python-with-torch"
        file.write_text(STAND_IN.format(python=sys.executable, then=then))
        file.chmod(0o755)
        return str(file)

    return write


def measured(arguments, tmp_path, capsys):
    file = tmp_path / "lm.json"
    assert bench.main([*QUICK, *arguments, "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    return result, capsys.readouterr().out


@pytest.mark.slow
def test_lm_beside_another(stand_in, tmp_path, capsys):
    result, printed = measured(
        ["--torch", stand_in()],
        tmp_path,
        capsys,
    )
    assert "shrunken" in printed
    assert result["size"] == "1m"
    assert result["precision"] == "float32"
    assert result["parameters"] == 994_400
    assert result["batch_size"] == 2
    assert result["micro_batches"] == 1

    ms = result["ms_a_step"]
    rates = result["tokens_per_second"]
    assert rates["torch"]["rounds"] == pytest.approx(
        [2 * 16 / t * 1e3 for t in ms["torch"]["rounds"]]
    )
    assert ms["torch"]["min"] >= 1.0  # what the stand-in sleeps
    assert result["mfu"]["lepton"] == pytest.approx(
        rates["lepton"]["median"] * result["model_flop_a_token"] / result["peak_flops"]
    )
    assert result["lepton_to_torch"]["rounds"] == pytest.approx(
        [
            a / b
            for a, b in zip(
                rates["lepton"]["rounds"],
                rates["torch"]["rounds"],
                strict=True,
            )
        ]
    )
    assert result["measured_to_predicted"] == pytest.approx(
        ms["lepton"]["median"] / result["predicted_ms_a_step"]
    )
    memory = result["peak_bytes"]
    assert memory["torch"] == {"allocated": 2**30}
    assert memory["lepton"]["allocated"] is None
    assert 0.5 < memory["lepton"]["predicted"] / memory["lepton"]["xla"] < 2
    assert re.search(r"^torch 9\.9, compiled .* 1\.0 GiB$", printed, re.MULTILINE)
    assert "6 N" in printed
    assert "TFLOP/s dense in float32" in printed


def test_a_rival_that_fails_is_told_and_left_out(stand_in):
    case = bench_lm.Case(
        "1m",
        lepton.models.transformer_size("1m"),
        16,
        "float32",
    )
    with bench_lm.Torch(
        case, 2, stand_in("raise MemoryError('too much')"), "cpu"
    ) as rival:
        assert rival.about == {}
        assert rival.notes == [
            "without PyTorch: its process ended with code 1: MemoryError: too much"
        ]
    with bench_lm.Torch(case, 2, None, "cpu") as rival:
        assert rival.about == {} and rival.notes == []
    with bench_lm.Torch(case, 2, stand_in(), "cpu") as rival:
        rival._process.kill()
        rival._process.wait()
        with pytest.raises(SettingError, match="ended with code -9"):
            rival.run(1)


def test_an_interpreter_without_torch_is_no_error_and_none_is(tmp_path, capsys):
    if importlib.util.find_spec("torch") is None:
        assert "has none" in bench_lm._no_torch(sys.executable)
    assert bench_lm._no_torch("none") == "as asked for"
    with pytest.raises(SettingError, match="can't be run"):
        bench_lm._no_torch(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--size", "1g"], "did you mean '1m'"),
        (["--batch", "0"], "--batch is '0'"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--length", "-3"], "--length is -3"),
    ],
)
def test_settings_that_can_not_be(arguments, what, capsys):
    assert bench.main(["lm", *arguments]) == 2
    assert what in capsys.readouterr().err


def test_the_flop_of_a_token_are_those_of_the_traced_dots():
    """The formula counts the causal half of the attention, the dots all of it."""
    shape = {
        "vocab": 96,
        "dim": 64,
        "layers": 3,
        "heads": 8,
        "kv_heads": 8,
        "hidden": 160,
        "tied": False,
    }
    case = bench_lm.Case("untied", shape, 32, "float32")
    trainer = lepton.Trainer(case.recipe(4), devices=1)
    trainer.plan()
    assert trainer.trace is not None
    parameters = sum(x.size for x in jax.tree.leaves(trainer.trace.state.params))
    attention = 6 * 3 * 32 * 64
    norms = 6 * 7 * 64  # counted among the N, and no dots
    assert case.flops(parameters) + attention - norms == pytest.approx(
        trainer.trace.flops / (4 * 32)
    )


def test_the_batch_found_is_the_largest_that_fits(monkeypatch):
    largest = {"none": 0, None: 6}
    tried = []

    def plan(
        self,
        on=None,
        *,
        remat=None,
        micro_batches=None,
    ):
        tried.append((self.recipe.batch_size, remat))
        if self.recipe.batch_size > largest[remat]:
            raise PlanError("nothing fits", remedy="")
        return argparse.Namespace(
            batch_size=self.recipe.batch_size, remat=remat, micro_batches=micro_batches
        )

    monkeypatch.setattr(lepton.Trainer, "plan", plan)
    case = bench_lm.Case(
        "1m",
        lepton.models.transformer_size("1m"),
        16,
        "float32",
    )
    plan = bench_lm.fitting(case)
    assert (plan.batch_size, plan.remat, plan.micro_batches) == (4, None, 1)

    largest["none"] = 2
    # plain, though more would fit with rematerialization
    assert bench_lm.fitting(case).batch_size == 2
    monkeypatch.setattr(bench_lm, "MOST_TOKENS", 16)
    assert bench_lm.fitting(case).batch_size == 1
    largest.update({"none": 0, None: 0})
    with pytest.raises(PlanError):
        bench_lm.fitting(case)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_after_all_is_halved(monkeypatch):
    monkeypatch.setattr(bench_lm, "MOST_TOKENS", 4 * 16)
    case = bench_lm.Case(
        "1m",
        lepton.models.transformer_size("1m"),
        16,
        "float32",
    )

    def fit(trainer, steps):
        if trainer.recipe.batch_size > 1:
            raise ModelError(
                "the train program failed: RESOURCE_EXHAUSTED: Out of memory", remedy=""
            )

    monkeypatch.setattr(bench_lm.bench_step, "fit", fit)
    started = bench_lm._start(case, 0)
    assert started.plan.batch_size == 1
    assert [note.partition(" was")[0] for note in started.notes] == [
        "a batch of 4",
        "a batch of 2",
    ]
    with pytest.raises(ModelError):
        bench_lm._start(case, 4)  # asked for, so not changed
