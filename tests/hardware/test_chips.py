"""The catalogue: sources, names, topologies; and a user's own chips."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import jax.numpy as jnp
import pytest

from lepton_jax import PlanError, hardware
from lepton_jax.hardware import (
    CHIPS,
    Chip,
    calibrate_cpu,
    matmul_seconds,
    memory_seconds,
    read_chips,
    topology,
)

HARDWARE = Path(hardware.__file__).parent
# no figures, or looked at apart
STRUCTURE = {"name", "platform", "aliases", "sources", "peaks", "price"}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_each_figure_has_a_source_with_address_and_date_or_is_an_assumption(chip):
    defaults = {f.name: f.default for f in fields(Chip)}
    for key in [f.name for f in fields(Chip) if f.name not in STRUCTURE] + [
        f"peaks.{dtype}" for dtype in chip.peaks
    ]:
        source = chip.sources.get(key)
        # a figure that has no meaning for this chip is the class's default
        if source is None:
            assert getattr(chip, key) == defaults[key], (
                f"{chip.name}.{key} has no source"
            )
            continue
        assert re.match(r"assumption: \w", source) or re.search(
            r"https://\S+ \(.*read 20\d\d-\d\d-\d\d\)", source
        ), source
    assert (chip.price is None) == ("price" not in chip.sources)
    used = {
        "tpu": ["torus", "wrap_size"],
        "cuda": ["link_fraction", "network_fraction"],
        "cpu": [],
    }[chip.platform]
    for key in [
        "kinds",
        "memory",
        "link_bandwidth",
        "link_latency",
        "call_latency",
        "tile",
        "matmul_fraction",
        *used,
    ]:
        assert key in chip.sources, f"{chip.name} leaves {key} to the default"


def test_every_source_is_used_and_named_right():
    text = (HARDWARE / "catalogue.toml").read_text()
    for name in tomllib.loads(text)["sources"]:
        assert re.search(rf'source = "{name}[":]', text), f"{name} is cited nowhere"
    cited = set(re.findall(r'source = "(\w+)[":]', text)) - {"assumption"}
    assert cited <= tomllib.loads(text)["sources"].keys()


def test_the_catalogue_travels_with_the_package():
    tools = tomllib.loads((HARDWARE.parents[1] / "pyproject.toml").read_text())["tool"]
    assert (
        "hardware/catalogue.toml" in tools["setuptools"]["package-data"]["lepton_jax"]
    )


def test_a_chip_prints_its_figures_and_sources():
    text = str(CHIPS["h200"])
    assert "peaks.bfloat16" in text
    assert "9.89e+14" in text
    assert "https://" in text
    assert "assumption: " in text
    assert "unknown" in str(CHIPS["tpu7x"]).splitlines()[-1], "no price was found"


def test_peaks_by_dtype():
    v5p = CHIPS["v5p"]
    h100 = CHIPS["h100"]
    assert (
        h100.peak("bfloat16"),
        h100.peak(jnp.float32),
        h100.peak(jnp.float8_e4m3fn),
    ) == (989e12, 494.5e12, 1979e12)
    assert v5p.peak("float8") == v5p.bf16_flops, "no units for it, so no gain"
    assert (
        CHIPS["tpu7x"].peak(jnp.int8)
        == CHIPS["tpu7x"].peak(jnp.int4)
        == CHIPS["tpu7x"].bf16_flops
    )
    assert v5p.peak("float64") == v5p.peak("int32") == v5p.peak("float32")


@pytest.mark.parametrize(
    ("name", "price"),
    [
        ("v5e:16x16", 256 * 1.20),
        ("v5p:4x4x4", 64 * 4.20),
        ("h200:8x8", 64 * 10.84),
        ("b200:8", None),
        ("tpu7x:2x2x1", None),
        ("a100:8", None),
        ("cpu:8", None),
    ],
)
def test_prices(name, price):
    assert topology(name).price_per_hour == (
        price if price is None else pytest.approx(price)
    )


@pytest.mark.parametrize(
    ("name", "chips", "devices", "nodes", "grid", "wraps"),
    [
        ("v7x:4x4x4", 64, 128, 16, (4, 4, 4, 2), (True, True, True, False)),
        ("v5p:2x2x4", 16, 16, 4, (2, 2, 4), (False,) * 3),
        ("v5p:4x4x6", 96, 96, 24, (4, 4, 6), (False,) * 3),
        ("v4:4x4x8", 128, 128, 32, (4, 4, 8), (True,) * 3),
        ("v5e:8x16", 128, 128, 16, (8, 16), (False, True)),
        ("v6e:16x16", 256, 256, 32, (16, 16), (True, True)),
        ("v5e:8", 8, 8, 1, (8, 1), (False, False)),
        ("h200:64", 64, 64, 8, (8, 8), (False, False)),
        ("h200:8x8", 64, 64, 8, (8, 8), (False, False)),
        ("h200:2x4", 8, 8, 2, (2, 4), (False, False)),
        ("a100:12", 12, 12, 2, (2, 6), (False, False)),
        ("cpu:8", 8, 8, 1, (8,), (False,)),
    ],
)
def test_topologies(name, chips, devices, nodes, grid, wraps):
    found = topology(name)
    assert (found.chips, found.devices, found.nodes, found.grid, found.wraps) == (
        chips,
        devices,
        nodes,
        grid,
        wraps,
    )
    assert found.name == name.replace("v7x", "tpu7x")
    assert str(found).startswith(f"{found.name}: {devices} devices")


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("v5e:4x4x4", ("3 dims", "have 2", '"v5e:4x4"')),
        ("v5p:2x2x2x2", ("4 dims", '"v5p:4x4x4"')),
        ("cpu:2x4", ("2 dims", '"cpu:8"')),
        ("h200:2x4x8", ("3 dims", "nodes x GPUs")),
        ("h200:2x16", ("at most 8", '"h200:32"')),
        ("v7y:4x4x4", ("did you mean",)),
        ("v5p:00x4", ("form",)),
    ],
)
def test_topologies_that_cannot_be(name, fragments):
    with pytest.raises(PlanError) as error:
        topology(name)
    assert all(fragment in str(error.value) for fragment in fragments), error.value


def test_virtual_cpu_devices_share_their_machine():
    one = topology("cpu:1")
    eight = topology("cpu:8")
    assert eight.device.bf16_flops == one.device.bf16_flops / 8
    assert eight.device.memory == one.device.memory / 8
    assert topology("h200:8").device is CHIPS["h200"]


OWN = """
[sources]
sheet = "Acme data sheet, https://acme.example (read 2026-01-02)"

[Acme-1]
platform = "cuda"
kinds = ["ACME One"]
memory = 96e9
bandwidth = { value = 4e12, source = "sheet: page 3" }
link_bandwidth = 300e9
peaks.bfloat16 = 500e12

[acme-2]
like = "Acme-1"
node = 4
price = { value = 2.5, source = "our contract" }

[lab]
like = "h200"
network_bandwidth = 12.5e9
"""


def test_own_chips(tmp_path):
    path = tmp_path / "chips.toml"
    path.write_text(OWN)
    chips = read_chips(path)
    assert list(chips) == ["acme-1", "acme-2", "lab"]
    assert "acme-1" not in CHIPS
    one, two, lab = chips.values()
    assert (one.memory, one.peak("float32"), one.kinds, one.price) == (
        96e9,
        500e12,
        ("ACME One",),
        None,
    )
    assert (
        one.sources["bandwidth"]
        == "Acme data sheet, https://acme.example (read 2026-01-02); page 3"
    )
    assert one.sources["memory"] == str(path)
    assert (two.memory, two.price, two.kinds, two.sources["price"]) == (
        96e9,
        2.5,
        (),
        "our contract",
    )
    assert (lab.memory, lab.network_bandwidth, lab.price) == (141e9, 12.5e9, None), (
        "the price isn't taken over"
    )
    found = topology("ACME-2:4x4", chips)
    assert (found.nodes, found.devices, found.price_per_hour, found.platform) == (
        4,
        16,
        40.0,
        "cuda",
    )
    assert topology("h200:8", chips).chip is CHIPS["h200"]
    with pytest.raises(PlanError, match="did you mean 'acme-1'"):
        topology("acme1:8", chips)


@pytest.mark.parametrize(
    ("text", "place", "fragments"),
    [
        ("[a]\nmemory = = 3", "", ("no TOML", "line 2")),
        ("memory = 3", "", ("'memory'", "[name]")),
        ('["a b"]\nmemory = 3', "", ("'a b'",)),
        ('[a]\nlike = "h20"', "[a] like", ("did you mean 'h200'",)),
        ("[a]\nlike = 3", "[a] like", ("3 is no chip",)),
        ('[a]\nlike = "h200"\nmemry = 3e9', "[a] memry", ("did you mean 'memory'",)),
        ('[a]\nlike = "h200"\nmemory = "80 GB"', "[a] memory", ("'80 GB'", "a number")),
        ('[a]\nlike = "h200"\nmemory = true', "[a] memory", ("a number",)),
        ('[a]\nlike = "h200"\nmemory = -80e9', "[a] memory", ("-80", "above zero")),
        ('[a]\nlike = "h200"\nmemory = nan', "[a] memory", ("nan",)),
        (f'[a]\nlike = "h200"\nmemory = 1{"0" * 400}', "[a] memory", ("a number",)),
        ('[a]\nlike = "h200"\nnode = 7.5', "[a] node", ("a whole number",)),
        (
            '[a]\nlike = "h200"\nlink_fraction = 1.2',
            "[a] link_fraction",
            ("between 0 and 1",),
        ),
        (
            '[a]\nlike = "h200"\nmemory = { vlue = 3 }',
            "[a] memory",
            ("'vlue'", "value = "),
        ),
        (
            '[a]\nlike = "h200"\nmemory = { source = "x" }',
            "[a] memory",
            ("needs a value",),
        ),
        ('[a]\nlike = "h200"\npeaks = 3', "[a] peaks", ("by dtype",)),
        (
            '[a]\nlike = "h200"\npeaks.bf16 = 3e12',
            "[a] peaks.bf16",
            ("did you mean 'bfloat16'",),
        ),
        ('[a]\nlike = "h200"\npeaks.float8 = 0', "[a] peaks.float8", ("above zero",)),
        ('[a]\nlike = "h200"\nplatform = "gpu"', "[a] platform", ("cuda",)),
        ('[a]\nlike = "h200"\nkinds = "A"', "[a] kinds", ('["..."]',)),
        (
            '[a]\nplatform = "cuda"\nmemory = 3e9',
            "[a] peaks.bfloat16",
            ("has no peaks.bfloat16", "like"),
        ),
        (
            (
                '[a]\nplatform = "tpu"\nmemory = 3e9\nbandwidth = 1e9\nlink_bandwidth ='
                " 1e9\npeaks.bfloat16 = 1e12"
            ),
            "[a] torus",
            ("has no torus",),
        ),
    ],
)
def test_own_chips_that_cannot_be_read(tmp_path, text, place, fragments):
    path = tmp_path / "chips.toml"
    path.write_text(text)
    with pytest.raises(PlanError) as error:
        read_chips(path)
    assert str(path) in error.value.where
    assert place in error.value.where
    assert all(fragment in str(error.value) for fragment in fragments), error.value


def test_a_file_of_chips_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="can't be read"):
        read_chips(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("side", "rate"),
    [(512, 105e12), (1024, 350e12), (2048, 679e12), (4096, 893e12), (16384, 950e12)],
)
def test_matmuls_of_one_tpu7x_device_as_published(side, rate):
    """See AI-Hypercomputer/accelerator-microbenchmarks, Ironwood readme, GEMM."""
    assert 2 * side**3 / matmul_seconds(
        CHIPS["tpu7x"], side, side, side
    ) == pytest.approx(rate, rel=0.17)


def test_a_matmul_of_an_h100_as_published():
    """See https://gist.github.com/Chillee/2ec89696db8b7ed1c24461159e325405."""
    flops = 2 * 4224 * 8192 * 2048
    assert flops / matmul_seconds(CHIPS["h100"], 4224, 8192, 2048) == pytest.approx(
        780.2e12, rel=0.1
    )


def test_reading_memory_as_published():
    """Scaling book, part 12: adding two float32 [2^30] takes 4.1 ms on an H100."""
    assert memory_seconds(CHIPS["h100"], 12 * 2**30) == pytest.approx(4.1e-3, rel=0.05)


def test_matmuls_pad_to_tiles():
    chip = CHIPS["v6e"]
    assert (
        matmul_seconds(chip, 8192, 8192, 64)
        > 0.9 * matmul_seconds(chip, 8192, 8192, 256) / 1.7
    ), "k pads to 256"
    assert matmul_seconds(chip, 4096, 8192, 8192) == matmul_seconds(
        chip, 8192, 4096, 8192
    )
    assert matmul_seconds(chip, 4096, 4096, 4096, batch=3) < 3 * matmul_seconds(
        chip, 4096, 4096, 4096
    )
    assert matmul_seconds(chip, 4096, 4096, 4096, dtype="float32") > matmul_seconds(
        chip, 4096, 4096, 4096
    )
    assert matmul_seconds(chip, 0, 4096, 4096) == 0
    one = matmul_seconds(chip, 1, 8192, 8192)
    assert one == pytest.approx(
        chip.op_seconds + 2 * 8192**2 / (0.9 * chip.bandwidth), rel=0.2
    ), "reading the weights decides"


def test_calibration_measures_this_cpu():
    chip = calibrate_cpu()
    assert chip.name == "cpu"
    assert chip.bf16_flops > 1e8
    assert chip.bandwidth > 1e8
    assert chip.link_bandwidth > 1e6
    assert all(
        "calibrated this CPU" in chip.sources[key]
        for key in ("peaks.float32", "bandwidth", "link_bandwidth")
    )
    assert topology("cpu:8", {"cpu": chip}).chip is chip
    assert topology("cpu:8").chip is CHIPS["cpu"]
