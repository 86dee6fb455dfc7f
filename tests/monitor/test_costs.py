"""Goodput, energy and money in a run's report."""

import json

import pytest

from lepton_jax.monitor import prometheus
from lepton_jax.monitor.costs import cost_tiles
from lepton_jax.monitor.recorded_run import Run
from lepton_jax.monitor.status import status


def tiles(**fields):
    return {tile.name: tile for tile in cost_tiles(Run(**fields), None)}


def test_energy_is_shown_by_counter_and_by_sample():
    end = {"energy": {"joules": {"package-0": 1500.0, "gpu-0": 500.0}}}
    tile = tiles(end=end, samples=1000)["energy"]
    assert tile.figure == "2 kJ" and "2 J a sample" in tile.remark
    assert "package-0, gpu-0 of host 0" in tile.remark


def test_energy_that_was_not_measured_says_why_and_an_older_run_says_nothing():
    found = tiles(end={"energy": {"not_measured": "no counters"}})["energy"]
    assert (found.figure, found.remark) == ("not measured", "no counters")
    assert tiles(end={"status": "finished"}) == {}


def test_the_price_is_that_of_all_the_time_so_far():
    tile = tiles(start={"price_per_hour": 4.2}, seconds=1800.0)["cost"]
    assert tile.figure == "$2.10" and "$4.20/h" in tile.remark
    assert tiles(start={"price_per_hour": None}, seconds=1800.0) == {}


def test_the_status_has_the_cost_so_far_while_the_run_is_under_way(tmp_path):
    events = [
        {"kind": "start", "time": 1000.0, "price_per_hour": 3.6, "steps": 10},
        {"kind": "end", "time": 2000.0, "status": "finished", "step": 10},
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (tmp_path / "events.jsonl").write_text(lines)
    seen = status(tmp_path)
    assert seen["cost"]["so_far"] == pytest.approx(1.0)
    assert "lepton_cost_dollars 1.0" in prometheus(seen)
