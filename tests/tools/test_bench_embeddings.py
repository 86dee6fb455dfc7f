"""`tools.bench embeddings` in the small."""

import json

import pytest

from lepton_jax.errors import SettingError
from tools.bench import cli as bench
from tools.bench import embeddings

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_time_and_memory_are_set_next_to_the_smallest_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "COMMANDS", (embeddings,))
    monkeypatch.setattr(embeddings, "SAMPLES", 4 * embeddings.BATCH)
    file = tmp_path / "embeddings.json"
    arguments = "embeddings --millions 0.1 0.02 --rounds 1 --seconds 0.01 --dim 8"
    assert bench.main([*arguments.split(), "--json", str(file)]) == 0
    small, large = json.loads(file.read_text())["results"]
    assert [small["rows"], large["rows"]] == [20_000, 100_000]
    assert small["to_first"]["median"] == 1.0
    moments = 2
    more = 80_000 * 8 * 4 * (1 + moments)
    assert large["bytes"]["arguments"] - small["bytes"]["arguments"] == more
    assert large["bytes"]["beyond"] < 1.1 * small["bytes"]["beyond"]


def test_an_optimizer_that_is_not_measured_is_named():
    with pytest.raises(SettingError, match="sparse_adam"):
        bench.embeddings.run(
            bench._parser().parse_args(["embeddings", "--optimizers", "sparse_adm"])
        )
