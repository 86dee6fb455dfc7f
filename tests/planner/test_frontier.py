"""The comparison of topologies, in words and as a drawing that can be read."""

import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from test_show import GIB, Balanced, plan

from lepton_jax.errors import PlanError
from lepton_jax.hardware import topology
from lepton_jax.planner.show.axis import TIMES, Log
from lepton_jax.planner.show.frontier import frontier
from lepton_jax.planner.show.words import amount

NAMES = [
    "v5e:4x4",
    "v5e:8x8",
    "v5e:16x16",
    "v5p:4x4x4",
    "v5p:8x8x8",
    "h100:8",
    "h100:16",
    "h200:8",
    "h200:16",
    "v6e:4x4",
    "v6e:16x16",
    "a100:16",
]


def entry(name, seconds, hourly):
    on = topology(name)
    on = replace(on, chip=replace(on.chip, price=None)) if hourly is None else on
    return plan(topology=name, seconds={"matmul": seconds}, price_per_hour=hourly), on


def test_time_and_price_are_those_of_all_tokens():
    (point,) = frontier(
        [entry("v5e:4x4", 2.0, 36.0)],
        tokens=1e6,
        tokens_per_step=500,
    ).points

    assert point.seconds == pytest.approx(4000)
    assert point.price == pytest.approx(40.0)
    assert point.margin == 6 * GIB
    assert (point.best, point.fastest, point.cheapest) == (
        True,
        True,
        True,
    )


def test_the_frontier_is_what_nothing_beats():
    rng = random.Random(0)
    for _ in range(50):
        entries = [
            entry(
                name,
                rng.choice([1.0, 2.0, 3.0, 5.0]),
                rng.choice([10.0, 20.0, 40.0, None]),
            )
            for name in NAMES
        ]
        points = frontier(entries, 1e6, 500).points
        priced = [p for p in points if p.price is not None]
        for p in points:
            beaten = [
                q
                for q in priced
                if p.price is not None
                and q.seconds <= p.seconds
                and q.price <= p.price
                and (q.seconds, q.price) != (p.seconds, p.price)
            ]
            assert p.best == (p.price is not None and not beaten)
            assert p.fastest == (p.seconds == min(q.seconds for q in points))
            assert p.cheapest == (
                p.price is not None and p.price == min(q.price for q in priced)
            )


def test_where_nothing_fits_the_row_says_what_would():
    error = PlanError(
        "nothing fits: 40 GiB of 16",
        where="v5e:2x4",
        remedy="use v5e:4x4, the smallest that holds it",
    )
    big = (
        plan(
            bytes_per_device={"activations": 20 * GIB},
            notes=("take batch_size 8",),
        ),
        topology("v5e:4x8"),
    )
    shown = frontier(
        [
            entry("v5e:4x4", 2.0, 36.0),
            (error, topology("v5e:2x4")),
            big,
        ],
        1e6,
        500,
    )
    text = str(shown)

    assert (
        "v5e:2x4: nothing fits: 40 GiB of 16; use v5e:4x4, the smallest that holds it"
        in text
    )
    assert "v5e:4x8: needs 20.0 GiB of 16.0 GiB a device; take batch_size 8" in text
    assert [p.best for p in shown.points] == [
        True,
        False,
        False,
    ]
    assert "smallest that holds it" in shown._repr_html_()


def test_only_failures_still_print():
    shown = frontier(
        [(PlanError("no", remedy="yes"), topology("v5e:2x4"))],
        1e6,
        500,
    )

    assert str(shown) == "1e6 tokens\nv5e:2x4: no; yes"
    assert shown.svg() == ""

    Balanced(shown._repr_html_())


def spread(seed):
    rng = random.Random(seed)
    return frontier(
        [
            entry(
                name,
                10 ** rng.uniform(-1, 1.5),
                rng.choice([None, 10 ** rng.uniform(1, 3)]),
            )
            for name in NAMES
        ],
        1e12,
        1e6,
    )


@pytest.mark.parametrize("seed", range(5))
def test_labels_cover_neither_each_other_nor_a_point(seed):
    shown = spread(seed)
    root = ElementTree.fromstring(shown.svg())
    circles = [
        (float(c.get("cx")), float(c.get("cy"))) for c in root.findall(".//{*}circle")
    ]

    assert len(circles) == len(NAMES)

    width, height = map(float, root.get("viewBox").split()[2:])
    boxes = []
    for text in root.findall(".//{*}text"):
        if text.get("style"):
            wide = 6.2 * len(text.text)
            x = float(text.get("x"))
            y = float(text.get("y"))
            left = x - wide if text.get("text-anchor") == "end" else x
            assert left >= 0
            assert left + wide <= width
            assert 0 < y <= height
            boxes.append(
                (
                    left,
                    y - 9,
                    left + wide,
                    y + 2,
                )
            )

    assert len(boxes) == len(NAMES)

    for i, a in enumerate(boxes):
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in circles)
        assert not any(
            a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
            for b in boxes[:i]
        )


def test_the_text_chart_has_each_priced_topology_once_and_in_its_place():
    shown = frontier(
        [entry(name, 10.0**i, 36.0) for i, name in enumerate(NAMES[:4])],
        1e6,
        500,
    )
    lines = str(shown).splitlines()

    assert max(map(len, lines)) <= 110

    chart = [
        line.partition("┤" if "┤" in line else "│")[2]
        for line in lines
        if "┤" in line or "│" in line
    ]
    at = {
        mark: (line.index(mark), y)
        for mark in "abcd"
        for y, line in enumerate(chart)
        if mark in line
    }

    assert sorted(at) == list("abcd")

    xs, ys = zip(
        *(at[mark] for mark in "abcd"),
        strict=True,
    )

    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True), (
        "slower is to the right, dearer further up"
    )


def test_topologies_in_one_spot_get_neighbouring_letters():
    chart = str(
        frontier(
            [entry(name, 1.0, 36.0) for name in NAMES],
            1e6,
            500,
        )
    )
    assert "abcdefghijkl" in chart


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1e-4, 1e-4),
        (0.5, 0.6),
        (59, 3700),
        (1, 1e7),
        (86400, 9e8),
    ],
)
def test_every_range_of_times_has_ticks_within_it(low, high):
    axis = Log.over([low, high])
    ticks = axis.ticks(TIMES)

    assert len(ticks) >= 2
    assert all(axis.low <= t <= axis.high for t in ticks)
    assert 0 < axis.at(low) <= axis.at(high) < 1


def test_the_page_is_whole_and_the_colours_of_a_lone_drawing_are_its_own():
    shown = spread(7)
    Balanced(shown._repr_html_())

    assert "var(" not in shown.svg()
    assert not re.search(r"nan|inf\b", shown.svg())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e9, "1e9"),
        (2.5e12, "2.5e12"),
        (640, "640"),
        (50_000, "50,000"),
    ],
)
def test_amounts(value, text):
    assert amount(value) == text
