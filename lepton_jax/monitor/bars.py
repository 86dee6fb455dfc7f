"""Bars: how the values of a column are distributed, as HTML and SVG.

The first table is drawn in bars, the others as lines over them, in shares of their
rows: so tables of different sizes can be compared by eye.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lepton_jax.monitor.progress import number

Column = Mapping[str, Any]  # a column of a profile, as its JSON

_UNITS = 1000  # of the SVG's own coordinates, in both directions
_GAP = 0.12  # of a bar's width, left free between two; assumption
_HEADROOM = 1.06  # of the highest bar
WORDS = 8  # of a column of categories that a card has room for; assumption
# CSS classes of the tables that are compared: bars, then lines.
TONES = ("train", "evaluation", "other", "third")

STYLE = """
.columns{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:14px}
.column{padding:12px 16px 10px;display:flex;flex-direction:column}
.column figcaption b::first-letter{text-transform:none}
.column figcaption b{overflow-wrap:anywhere}
.hist{position:relative;flex:1;min-height:104px;margin:8px 0 22px}
.hist path.bars{fill:var(--train);opacity:.8}
.hist path.tails{fill:var(--raw);opacity:.7}
.hist path.third,s.third{stroke:var(--resume);border-color:var(--resume)}
.hist path.line{stroke-width:1.75}
.hist i{
 position:absolute;top:100%;margin-top:6px;font-style:normal;font-size:11.5px;
 line-height:1;color:var(--soft);white-space:nowrap
}
.hist i.end{right:0}
.hist u{
 position:absolute;left:0;right:0;bottom:0;border-bottom:1px solid var(--line)
}
.words{margin:8px 0 6px;padding:0;list-style:none;font-size:12.5px}
.words li{
 display:grid;grid-template-columns:minmax(0,10em) minmax(0,1fr) 4em;gap:8px;
 align-items:center;line-height:1.55
}
.words span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.words em{
 font-style:normal;color:var(--soft);text-align:right;white-space:nowrap
}
.words div{position:relative;height:9px}
.words s{
 position:absolute;inset:0 auto 0 0;background:var(--train);opacity:.8;
 border-radius:2px;min-width:1px
}
.words q{position:absolute;top:-2px;bottom:-2px;width:2px;quotes:none}
q.evaluation{background:var(--eval)}
q.other{background:var(--other)}
q.third{background:var(--resume)}
.column p{margin:auto 0 0;font-size:12.5px;color:var(--soft);line-height:1.45}
.column p b{color:var(--warn);font-weight:600}
@media (max-width:960px){.columns{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media screen and (max-width:640px){.columns{grid-template-columns:minmax(0,1fr)}}
"""


def card(
    name: str,
    columns: Sequence[Column],
) -> str:
    """Return a column's card.

    Args:
      name: of the column.
      columns: its profile in each table, with the same edges or words; the first one is
        drawn in bars.
    """
    first = columns[0]
    drawn = _words(columns) if first["kind"] == "category" else _histogram(columns)
    return (
        f'<figure class="column"><figcaption><b>{escape(name)}</b>'
        f'<span class="note">{escape(_kind(first))}</span></figcaption>'
        f"{drawn}<p>{_facts(first)}</p></figure>"
    )


def legend(names: Sequence[str]) -> str:
    """Return a list that says which table is drawn how."""
    items = [
        f'<li><s class="line {tone}"></s>{escape(name)}</li>'
        for name, tone in zip(
            names,
            TONES,
            strict=False,
        )
    ]
    return f'<ul class="legend" style="margin-left:0">{"".join(items)}</ul>'


# ---- internals ----


def _kind(column: Column) -> str:
    measured = {
        "text": "characters",
        "list": "values of each row",
        "bytes": "bytes",
        "time": "days since 1970",
    }
    note = measured.get(column["kind"])
    return f"{column['type']}, {note}" if note else str(column["type"])


def _facts(column: Column) -> str:
    parts = []
    rows = column["rows"]
    if column["mean"] is not None:
        spread = (
            column["m2"]
            / max(
                1,
                sum(column["counts"]),
            )
        ) ** 0.5
        parts.append(f"mean {number(column['mean'], 3)} ± {number(spread, 3)}")
        least = number(column["least"], 3)
        parts.append(f"{least} to {number(column['greatest'], 3)}")
    if column["kind"] == "category":
        count = len(column["words"]) + column["other_words"]
        parts.append(f"{count:,} different")
    if column["outliers"]:
        parts.append(f"{column['outliers']:,} outliers")
    missing = column["missing"]
    if missing:
        parts.append(f"<b>{missing:,} missing ({share(missing, rows)})</b>")
    else:
        parts.append("none missing")
    return " · ".join(parts)


def share(part: float, whole: float) -> str:
    """Return a share in per cent, as text: 12.3 %."""
    value = part / whole if whole else 0.0
    return "< 0.1 %" if 0 < value < 0.0005 else f"{100 * value:.1f} %"


def _histogram(columns: Sequence[Column]) -> str:
    edges = columns[0]["edges"]
    if not edges:
        return '<p class="empty">no value</p>'
    shares = [_shares(column) for column in columns]
    bins = range(len(shares[0]))
    top = _HEADROOM * max(max(heights) for heights in shares) or 1.0
    bars = "".join(
        _bar(
            i,
            shares[0][i] / top,
            len(bins),
        )
        for i in bins
    )
    lines = "".join(
        f'<path class="line {tone}" d="{_steps(heights, top)}"/>'
        for heights, tone in zip(
            shares[1:],
            TONES[1:],
            strict=False,
        )
    )
    return (
        f'<div class="hist"><svg viewBox="0 0 {_UNITS} {_UNITS}"'
        ' preserveAspectRatio="none" role="img" aria-label="histogram">'
        f'<path class="bars" d="{bars}"/>{lines}</svg><u></u>'
        f"<i>{number(edges[0], 3)}</i>"
        f'<i class="end">{number(edges[-1], 3)}</i></div>'
    )


def _shares(column: Column) -> list[float]:
    """Return each bin's share of the rows; the outermost ones are left out."""
    rows = column["rows"] or 1
    return [count / rows for count in column["counts"][1:-1]]


def _bar(
    place: int,
    height: float,
    bins: int,
) -> str:
    width = _UNITS / bins
    left = (place + _GAP / 2) * width
    return (
        f"M{left:.1f} {_UNITS}v{-height * _UNITS:.1f}h{(1 - _GAP) * width:.1f}"
        f"V{_UNITS}z"
    )


def _steps(
    heights: Sequence[float],
    top: float,
) -> str:
    width = _UNITS / len(heights)
    parts = []
    for place, height in enumerate(heights):
        y = (1 - height / top) * _UNITS
        start = "M0 " if place == 0 else "V"
        parts.append(f"{start}{y:.1f}H{(place + 1) * width:.1f}")
    return "".join(parts)


def _words(columns: Sequence[Column]) -> str:
    first = columns[0]
    shown = min(len(first["words"]), WORDS)
    rows = [
        _word(
            first["words"][i],
            [_word_share(column, i) for column in columns],
        )
        for i in range(shown)
    ]
    left = len(first["words"]) - shown + first["other_words"]
    if left:
        rest = sum(first["word_counts"][shown:]) + first["others"]
        rows.append(
            _word(
                f"{left:,} others",
                [rest / max(1, first["rows"])],
            )
        )
    return f'<ul class="words">{"".join(rows)}</ul>'


def _word_share(column: Column, place: int) -> float:
    return column["word_counts"][place] / max(
        1,
        column["rows"],
    )


def _word(
    word: str,
    shares: Sequence[float],
) -> str:
    ticks = "".join(
        f'<q class="{tone}" style="left:{100 * value:.1f}%"></q>'
        for value, tone in zip(
            shares[1:],
            TONES[1:],
            strict=False,
        )
    )
    return (
        f'<li><span title="{escape(word)}">{escape(word) or "(empty)"}</span>'
        f'<div><s style="width:{100 * shares[0]:.1f}%"></s>{ticks}</div>'
        f"<em>{share(shares[0], 1)}</em></li>"
    )
