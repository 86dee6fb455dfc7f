"""A plan shown: each number where it belongs, and pictures true to the specs."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lepton_jax.planner.plans import ArrayPlan, Axis, Collective, Plan, Rival
from lepton_jax.planner.show.html import html, page
from lepton_jax.planner.show.rows import rows, units
from lepton_jax.planner.show.text import BAR
from lepton_jax.planner.show.words import duration

GIB = 2**30
REASON = (
    "dim 1 is up.1, split over tensor; kept in parts of dim 0 over fsdp, gathered where"
    " it is used"
)


def kernel(
    path,
    shape=(64, 128),
    spec=("fsdp", "tensor"),
    use=(None, "tensor"),
    reason=REASON,
    kind="params",
):
    return ArrayPlan(
        path,
        kind,
        shape,
        "float32",
        4 * shape[0] * shape[-1] if shape else 4,
        spec,
        use,
        reason,
    )


def batch(
    path,
    shape=(16, 32),
    dtype="int32",
):
    return ArrayPlan(
        path,
        path,
        shape,
        dtype,
        2048,
        ("fsdp",),
        ("fsdp",),
        "a batch is split over the devices",
    )


def plan(**changes):
    fields = {
        "topology": "v5e:2x4",
        "name": "FSDP x tensor parallel",
        "objective": "time",
        "mesh": {"fsdp": 4, "tensor": 2},
        "batch_axes": ("fsdp",),
        "arrays": (
            *(kernel(f"params/blocks/{i}/up/kernel") for i in range(12)),
            kernel(
                "params/norm/scale",
                (64,),
                (),
                (),
                "too small to be worth splitting further",
            ),
            kernel(
                "optimizer/0/mu/norm/scale",
                (64,),
                (),
                (),
                "small",
                "optimizer",
            ),
        ),
        "batch": (batch("inputs"), batch("targets")),
        "axes": (
            Axis(
                "blocks/*/up.1",
                128,
                ("tensor",),
                12,
            ),
        ),
        "batch_size": 16,
        "micro_batches": 2,
        "remat": "dots",
        "unroll_micro_batches": False,
        "steps_per_call": 1,
        "data": "resident",
        "bytes_per_device": {"params": 2 * GIB, "activations": 8 * GIB},
        "memory": 16 * GIB,
        "seconds": {"matmul": 0.3, "communication": 0.1},
        "flops": 4e13,
        "collectives": (
            Collective(
                "all-gather",
                ("fsdp",),
                24,
                3 * GIB,
                0.06,
                "blocks/*/up/kernel",
            ),
        ),
        "price_per_hour": 9.0,
        "rivals": (
            Rival(
                "data parallel",
                {"data": 8},
                "full",
                1,
                0.5,
                20 * GIB,
                "does not fit",
            ),
        ),
        "reasons": {"remat dots": "without it a step would take 40 GiB"},
        "notes": ("my_op is not known",),
    }
    return Plan(**(fields | changes))


def test_tied_parameters_share_a_line_and_others_keep_their_names():
    layers = [
        kernel(f"params/layers/{i}/kernel", shape, (), ())
        for i, shape in enumerate([(12, 16), (16, 3)])
    ]
    arrays = (*plan().arrays, *layers)
    lines = str(plan(arrays=arrays)).splitlines()
    (tied,) = [
        line for line in lines if line.startswith("blocks/") and "up/kernel" in line
    ]

    assert tied.split()[:4] == ["blocks/*/up/kernel", "x12", "64x128", "f32"]
    assert "P(fsdp, tensor)" in tied
    assert "gathered: fsdp" in tied
    assert "48.0 KiB" in tied, "12 layers of 32 KiB, each over 8 devices"
    assert [line.split()[1] for line in lines if line.startswith("layers/")] == [
        "12x16",
        "16x3",
    ]


def test_layers_that_lie_differently_are_not_one_line():
    arrays = (
        kernel("params/blocks/0/k"),
        kernel("params/blocks/1/k"),
        kernel("params/blocks/2/k", spec=()),
    )
    found = [(row.path, row.count) for row in rows(plan(arrays=arrays, batch=()))]

    assert found == [("blocks/*/k", 2), ("blocks/2/k", 1)]


def test_the_figures_of_a_step_are_those_of_the_plan():
    text = str(plan())

    assert "predicted 400 ms a step" in text
    assert "1.28k tokens/s" in text
    assert "100 TFLOP/s" in text
    assert "$0.001 a step" in text
    assert "10.0 GiB of 16.0 GiB (62%)" in text

    bar = re.search(r"activations +8\.0 GiB (█+) ", text)

    assert len(bar[1]) == BAR // 2, "half of the device"
    assert "my_op is not known" in text
    assert "data=8" in text
    assert "without it a step would take 40 GiB" in text


def test_each_reason_stands_once_and_is_referred_to():
    text = str(plan())
    why = text[text.index("\nwhy\n") :]

    assert " ".join(why.split()).count("dim 1 is up.1, split over tensor") == 1

    number = next(
        line.split()[-1] for line in text.splitlines() if line.startswith("norm/scale")
    )

    assert re.search(rf"^ +{number}  too small", why, re.MULTILINE)


@pytest.mark.parametrize(
    ("shape", "dtype", "unit"),
    [
        ((16, 32), "int32", "512 tokens"),
        ((16, 784), "uint8", "16 samples"),
        ((16, 32), "float32", "16 samples"),
        ((16,), "int32", "16 samples"),
    ],
)
def test_tokens_are_whole_numbers_in_a_row(shape, dtype, unit):
    assert (
        " ".join(map(str, units(plan(batch=(batch("inputs", shape, dtype),))))) == unit
    )


def test_no_line_is_wider_than_a_terminal_of_110_columns():
    long = "a_module_with_a_long_name/" * 6
    wide = plan(
        arrays=(
            kernel(
                f"params/{long}kernel",
                (128256, 16384),
                (("fsdp", "fsdp2", "data"), ("tensor", "expert")),
            ),
        ),
        name=" x ".join(["FSDP"] * 20),
        mesh={f"axis{i}": 2 for i in range(20)},
        notes=("word " * 60,),
        axes=(
            Axis(
                long * 2,
                5,
                ("tensor",),
                1,
            ),
        ),
        rivals=(
            Rival(
                "x" * 90,
                {"data": 8},
                "full",
                1,
                0.5,
                1.0,
                "y" * 90,
            ),
        ),
        collectives=(
            Collective(
                "all-gather",
                ("fsdp", "tensor"),
                1,
                1.0,
                1.0,
                "z" * 200,
            ),
        ),
    )

    assert max(map(len, str(wide).splitlines())) <= 110
    assert "/kernel" in str(wide), "a path's end tells more than its beginning"


def test_a_plan_that_does_not_fit_says_by_how_much():
    tight = plan(bytes_per_device={"activations": 20 * GIB})

    assert re.search(r"too much +4\.0 GiB", str(tight))
    assert "20.0 GiB of 16.0 GiB a device: 4.0 GiB too much" in html(tight)
    assert 'class="limit"' in html(tight)


def test_without_data_there_is_no_time_but_a_plan():
    bare = plan(
        batch=(),
        seconds={},
        collectives=(),
        rivals=(),
        flops=0.0,
        axes=(),
        notes=(),
    )

    assert "not known yet" in str(bare)
    assert "blocks/*/up/kernel" in str(bare)
    assert "not known yet" in html(bare)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2e-6, "2.00 µs"),
        (9.996e-4, "1.00 ms"),
        (0.25, "250 ms"),
        (99.0, "99.0 s"),
        (101.0, "1.68 min"),
        (7200.0, "2.00 h"),
        (864000.0, "10.0 d"),
        (0.0, "0 s"),
        (float("inf"), "inf"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Balanced(HTMLParser):
    """Fails where a tag is not closed in order; collects attributes."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_names_cannot_break_it():
    evil = "<script>alert('x')</script>&\""
    hostile = plan(
        name=evil,
        notes=(evil,),
        reasons={evil: evil},
        arrays=(kernel(f"params/{evil}/kernel", reason=evil),),
        axes=(Axis(evil, 1, (), 1),),
        rivals=(
            Rival(
                evil,
                {"data": 8},
                "full",
                1,
                1.0,
                1.0,
                evil,
            ),
        ),
        collectives=(
            Collective(
                "all-gather",
                ("fsdp",),
                1,
                1.0,
                1.0,
                evil,
            ),
        ),
    )
    text = page(evil, html(hostile))
    parsed = Balanced(text)

    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "&lt;script&gt;" in text
    assert not any(
        name in attributes
        for _, attributes in parsed.tags
        for name in ("src", "href", "onclick")
    )
    assert "@import" not in text
    assert "url(" not in text


def grids(made):
    """Return (label, colours of the squares) of each drawing of devices."""
    text = html(made)
    return [
        (label, re.findall(r'<path color="(.*?)"', drawing))
        for label, drawing in re.findall(
            r'<svg [^>]*aria-label="(P\([^"]*\)) on the devices">(.*?)</svg>', text
        )
    ]


def test_devices_that_hold_the_same_part_have_the_same_colour():
    (_, data), (_, kept), (_, used), (_, copied) = grids(plan())

    assert len(data) == len(kept) == 8
    # columns are fsdp, the larger axis, and rows tensor
    assert len(set(data)) == 4
    assert data[:4] == data[4:], "a batch over fsdp is the same along tensor"
    assert len(set(kept)) == 8, "each device keeps its own part"
    assert len(set(used)) == 2
    assert len(set(used[:4])) == 1, "gathered along fsdp: one part per row"
    assert set(copied) == {"var(--copy)"}


def test_an_array_is_drawn_in_as_many_parts_as_it_is_kept_in():
    text = html(
        plan(
            arrays=(kernel("params/up/kernel"),),
            batch=(),
        )
    )
    (drawing,) = re.findall(r'aria-label="64x128 in parts">(.*?)</svg>', text)
    (_, kept), _ = grids(
        plan(
            arrays=(kernel("params/up/kernel"),),
            batch=(),
        )
    )

    assert sorted(re.findall(r'fill="(.*?)"', drawing)) == sorted(kept), (
        "the same parts in the same colours"
    )


@pytest.mark.parametrize(
    "mesh",
    [
        {},
        {"fsdp": 1},
        {"fsdp": 4096},
        {"data": 7},
        {"data": 4, "fsdp": 64, "tensor": 16},
        {
            "data": 2,
            "fsdp": 3,
            "expert": 5,
            "tensor": 7,
        },
    ],
)
def test_any_mesh_can_be_drawn(mesh):
    arrays = (
        kernel(
            "params/k",
            spec=("fsdp",) * ("fsdp" in mesh),
            use=(),
        ),
        kernel("params/s", (), (), ()),
    )
    made = plan(
        mesh=mesh,
        arrays=arrays,
        batch=(
            replace(
                batch("inputs"),
                spec=(),
                use=(),
            ),
        ),
        axes=(),
    )
    text = html(made)
    Balanced(text)

    assert len(text) < 200_000, "a page of thousands of devices stays small"
    assert str(made)
