"""Joules by the machine's counters, and their way to models."""

import math
import os
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_jax.monitor import energy
from lepton_jax.monitor.energy import EnergyMeter, Found, find_counters
from lepton_jax.ship.watch.charges import Price
from lepton_jax.ship.watch.ledger import Ledger

NO_GPU = "there_is_no_such_module"
RANGE = 262_143_328_850  # microjoules: of a real package


def zone(root, path, name, microjoules, most=RANGE):
    folder = root / path
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


class Tap:
    """A counter that a test turns."""

    name = "tap"

    def __init__(self):
        self.total = 0.0

    def joules(self):
        return self.total


def test_packages_and_memory_add_up_and_parts_are_not_counted_twice(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 1)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 9)
    again = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    platform = zone(tmp_path, "intel-rapl:2", "psys", 5_000_000)
    meter = EnergyMeter(find_counters(tmp_path, NO_GPU))
    assert meter.joules == 0

    package.write_text("8000000\n")
    memory.write_text("500009\n")
    for ignored in (core, again, platform):
        ignored.write_text("99000000\n")
    other.write_text("7000000\n")
    assert meter.read() == {"package-0": 3.0, "dram-0": 0.5, "package-1": 0.0}
    assert meter.joules == 3.5
    assert str(meter.found) == "package-0, dram-0, package-1"


def test_a_counter_that_runs_over_goes_on(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900, most=999)
    meter = EnergyMeter(find_counters(tmp_path, NO_GPU))
    file.write_text("100")  # 99 to the end, one to 0, 100 more
    assert meter.joules == pytest.approx(200e-6)
    file.write_text("900")
    assert meter.joules == pytest.approx(1000e-6)


def test_a_machine_without_counters_says_why(tmp_path):
    found = find_counters(tmp_path / "nowhere", NO_GPU)
    assert not found.measured and EnergyMeter(found).joules is None
    assert str(found).startswith("not measured: no energy counters of a processor")
    assert NO_GPU in str(found)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_counter_that_only_root_reads_says_so(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1).chmod(0)
    assert "closed to this user" in str(find_counters(tmp_path, NO_GPU))


def test_a_refusal_of_the_system_is_a_reason(tmp_path, monkeypatch):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy.Rapl, "__init__", refuse)
    assert "closed to this user" in str(find_counters(tmp_path, NO_GPU))


def test_a_counter_that_goes_away_stays_where_it_was(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(find_counters(tmp_path, NO_GPU))
    file.write_text("2000000")
    assert meter.joules == 2.0
    file.unlink()
    assert meter.joules == 2.0


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["a", "b"]),
        ("1", ["b"]),
        ("1,0", ["b", "a"]),
        ("GPU-b", ["b"]),
        ("0,-1,1", ["a"]),
        ("", []),
    ],
)
def test_the_gpus_are_those_that_cuda_shows(tmp_path, monkeypatch, visible, expected):
    joules = {"a": 1_000, "b": 5_000}
    handles = list(joules)
    library = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: handles[number],
        nvmlDeviceGetHandleByUUID=lambda name: name.removeprefix("GPU-"),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: joules[handle],
    )
    monkeypatch.setitem(__import__("sys").modules, "a_library", library)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = find_counters(tmp_path, "a_library")
    assert [counter._handle for counter in found.counters] == expected
    joules["a"] += 2_500
    spent = EnergyMeter(found).joules
    assert spent == (None if not expected else 2.5 * ("a" in expected))


def test_an_old_gpu_that_does_not_tell_its_energy_is_a_reason(tmp_path, monkeypatch):
    class Unsupported(Exception):
        pass

    def refuse(handle):
        raise Unsupported("Not Supported")

    library = types.SimpleNamespace(
        NVMLError=Unsupported,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=refuse,
    )
    monkeypatch.setitem(__import__("sys").modules, "a_library", library)
    assert "Not Supported" in str(find_counters(tmp_path, "a_library"))


@given(
    st.lists(
        st.tuples(
            st.floats(0, 10),  # seconds of the interval
            st.floats(0, 500),  # joules in it
            st.lists(
                st.tuples(
                    st.sampled_from("ab"),
                    st.floats(0, 3),
                    st.integers(1, 9),
                    st.integers(0, 9),
                ),
                max_size=4,
            ),
        ),
        max_size=8,
    )
)
def test_charges_and_idle_energy_add_up_to_what_the_counters_say(intervals):
    now = [0.0]
    tap = Tap()
    meter = EnergyMeter(Found((tap,), ()), clock=lambda: now[0])
    ledger = Ledger(meter, Price(1.0), clock=lambda: now[0])
    for seconds, joules, batches in intervals:
        for model, spent, rows, empty in batches:
            padding = spent * empty / (rows + empty)
            ledger.add((model, "1"), rows, spent, padding)
        now[0] += seconds
        tap.total += joules
        ledger.settle()

    costs = ledger.costs([("a", "1"), ("b", "1")])
    charged = sum(each["joules"] for each in costs.values())
    assert math.isclose(charged + ledger.unclaimed, tap.total, abs_tol=1e-6)
    assert ledger.unclaimed >= -1e-6
    for each in costs.values():
        assert -1e-9 <= each["padding_joules"] <= each["joules"] + 1e-9


def test_energy_goes_to_whoever_computed_in_its_interval():
    now = [0.0]
    tap = Tap()
    meter = EnergyMeter(Found((tap,), ()), clock=lambda: now[0])
    ledger = Ledger(meter, Price(0.0, per_joule=2.0), clock=lambda: now[0])
    ledger.add(("early", "1"), rows=10, seconds=0.5, padding_seconds=0.25)
    now[0] += 1.0
    tap.total = 100.0
    ledger.settle()
    ledger.add(("late", "1"), rows=5, seconds=0.1, padding_seconds=0.0)
    now[0] += 1.0
    tap.total = 110.0
    costs = ledger.costs([("early", "1"), ("late", "1")])
    early, late = costs.values()
    assert early["joules"] == 50.0 and early["padding_joules"] == 25.0
    assert early["joules_per_1000_predictions"] == 5_000.0
    assert late["joules"] == pytest.approx(1.0) and late["price"] == pytest.approx(2.0)
    assert ledger.unclaimed == pytest.approx(59.0)
    assert meter.watts == pytest.approx(10.0)


def test_a_real_counter_agrees_with_one_that_is_read_by_hand():
    found = find_counters()
    if not found.measured:
        pytest.skip(f"energy is {found}")
    files = sorted(energy.POWERCAP.glob("intel-rapl:*/energy_uj"))
    packages = [f for f in files if (f.parent / "name").read_text().startswith("pack")]
    meter = EnergyMeter(found)
    before = [int(file.read_text()) for file in packages]
    math.factorial(200_000)
    after = [int(file.read_text()) for file in packages]
    by_hand = sum(b - a for a, b in zip(before, after, strict=True)) / 1e6
    ours = sum(v for name, v in meter.read().items() if name.startswith("package"))
    assert ours == pytest.approx(by_hand, rel=0.2)
