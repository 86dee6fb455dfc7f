"""The step benchmark measures what it says, in one process and in no time."""

import json
from functools import partial

import jax.numpy as jnp
import optax
import pytest

from lepton_jax.models import MLP
from tools.bench import cli as bench
from tools.bench import overhead as bench_overhead
from tools.bench import step as bench_step
from tools.bench import timing

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTENDERS = ["hand", "hand-fed", "lepton", "nnx"]
TINY = bench_step.Case(
    partial(MLP, (12, 8, 10)),
    partial(bench_step.images, 100, 12),
    16,
    optax.adam,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench_step.CASES, "tiny", TINY)
    monkeypatch.setitem(bench_overhead.MODELS, "tiny", TINY)


@pytest.mark.slow
def test_step_prints_and_writes_what_it_measured(tiny, tmp_path, capsys):
    file = tmp_path / "step.json"
    arguments = [
        "step",
        "--only",
        "tiny",
        "--rounds",
        "3",
        "--seconds",
        "0.02",
        "--json",
        str(file),
    ]
    assert bench.main(arguments) == 0
    document = json.loads(file.read_text())
    assert document["command"].endswith("python -m tools.bench " + " ".join(arguments))
    assert document["platform"] == "cpu"
    assert document["machine"]["cores"] >= 1

    (result,) = document["results"]
    ms = result["ms_a_step"]
    steps = result["steps_a_slice"]
    assert list(ms) == CONTENDERS
    assert list(steps) == CONTENDERS
    assert steps["lepton"] % result["steps_per_call"] == 0
    assert result["loss_difference"] <= 1e-5
    for rival in ("hand", "hand-fed", "nnx"):
        ratios = result["lepton_to"][rival]
        assert ratios["rounds"] == [
            a / b
            for a, b in zip(ms["lepton"]["rounds"], ms[rival]["rounds"], strict=True)
        ]
        assert ratios["min"] <= ratios["median"] <= ratios["max"]
        assert len(ratios["rounds"]) == 3

    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[0] == "tiny"
    assert row[1:5] == [f"{ms[name]['median']:.4g}" for name in CONTENDERS]


@pytest.mark.slow
def test_the_order_rotates_so_that_each_contender_is_first_once():
    order = []

    def note(name, steps):
        order.append(name)

    runs = {name: partial(note, name) for name in CONTENDERS}

    timing.time_in_rounds(runs, dict.fromkeys(CONTENDERS, 1), 4)

    assert sorted(order[::4]) == CONTENDERS
    assert all(sorted(order[i : i + 4]) == CONTENDERS for i in range(0, 16, 4))


def test_a_model_that_differs_is_seen_in_the_losses(monkeypatch):
    x, y = TINY.data()
    real = bench_step.make_trainer
    monkeypatch.setattr(
        bench_step,
        "make_trainer",
        lambda case, x, y, **options: real(
            case,
            x * 2,
            y,
            **options,
        ),
    )
    assert bench_step._loss_difference(TINY, x, y) > 1e-3


def test_a_slice_lasts_about_as_long_as_asked(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        timing.time,
        "perf_counter",
        lambda: clock[0],
    )

    def run(steps):
        clock[0] += 0.1 + steps * 0.01  # a fixed cost, and 10 ms a step

    steps = timing.steps_of_slice(run, 8.0, 32)

    assert steps % 32 == 0
    assert 6 <= 0.1 + steps * 0.01 <= 10


def test_a_compilation_among_the_measurements_is_noticed():
    import jax

    function = jax.jit(lambda x: x * 3 + 1)
    with timing.compilations() as compiled:
        function(jnp.ones(7))
    assert compiled
    with timing.compilations() as compiled:
        function(jnp.ones(7))
    assert not compiled


def test_the_journal_survives_the_fits_that_close_it(tmp_path):
    from lepton_jax.monitor import read_events

    journal = bench_step.Journal(tmp_path)
    trainer = bench_step.make_trainer(
        TINY,
        *TINY.data(),
        [journal],
    )
    for _ in range(2):
        bench_step.fit(trainer, 4)
    journal.end()
    events = read_events(tmp_path)
    assert [e["kind"] for e in events].count("end") == 2
    assert [(e["first"], e["last"]) for e in events if e["kind"] == "steps"] == [
        (1, 4),
        (5, 8),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["setp"], "step"),
        (["step", "--only", "mlp-265"], "did you mean 'mlp-256'"),
        (["step", "--rounds", "0"], "--rounds is 0"),
        (["step", "--seconds", "nan"], "--seconds is nan"),
        (["step", "--rounds", "few"], "--rounds"),
        (["step", "--round", "2"], "--round"),
        (["step", "--json", "no/such/folder/step.json"], "no/such/folder"),
    ],
)
def test_a_wrong_argument_is_said_before_anything_is_measured(
    arguments, says, capsys, monkeypatch
):
    monkeypatch.setattr(
        bench_step, "measure", lambda *unused: pytest.fail("it measures")
    )
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "remedy:" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_overhead_compares_policies_with_none(tiny, tmp_path):
    file = tmp_path / "overhead.json"
    assert (
        bench.main(
            [
                "overhead",
                "--only",
                "tiny",
                "--rounds",
                "2",
                "--seconds",
                "0.02",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    (result,) = json.loads(file.read_text())["results"]
    ms = result["ms_a_step"]
    assert list(ms) == ["plain", "signals", "adaptive"]
    assert all(len(spread["rounds"]) == 2 for spread in ms.values())
    for name, ratio in result["to_plain"].items():
        assert ratio["rounds"] == [
            a / b
            for a, b in zip(ms[name]["rounds"], ms["plain"]["rounds"], strict=True)
        ]
