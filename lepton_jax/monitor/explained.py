"""Section of a run's report that explains some of its predictions.

It is drawn from `explained.json`, which `ship.explain` fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lepton_jax.monitor.progress import number

FILE = "explained.json"

STYLE = """
.why{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:12px}
.why figure{padding:10px 12px}
.why .pair{display:grid;grid-template-columns:1fr 1fr;gap:6px;margin-bottom:6px}
.why .near{display:grid;grid-template-columns:repeat(3,1fr);gap:4px;margin-top:6px}
.why img{
 display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;
 background:var(--shade);border-radius:6px
}
.why p{margin:0;font-size:12.5px;line-height:1.4;overflow-wrap:anywhere}
.why dl{margin:6px 0 0;display:grid;grid-template-columns:1fr max-content;gap:1px 12px}
.why dd{margin:0;text-align:right}
"""


def section(facts: Mapping[str, Any] | None) -> str:
    """Return the section; "" where nothing is explained.

    Args:
      facts: the content of explained.json; None: there is none.
    """
    if not facts or not facts.get("rows"):
        return ""
    cards = "".join(_card(row) for row in facts["rows"])
    told = (
        f"{facts['method'].replace('_', ' ').capitalize()}: what of a row speaks for"
        " (red) and against (blue) its prediction. The shares of a row add up to its"
        f" output less that of a blank one, within {number(facts['gap'])}."
    )
    return f"<p>{escape(told)}</p>{_importances(facts)}<div class='why'>{cards}</div>"


def _card(row: Mapping[str, Any]) -> str:
    parts = []
    if "map" in row:
        pair = f"{_image(row['picture'], 'the row')}{_image(row['map'], 'its shares')}"
        parts.append(f"<div class='pair'>{pair}</div>")
    told = f"{row['explained']}: {number(row['output'])}"
    told += f" (blank: {number(row['baseline'])})"
    if row.get("target") not in (None, row["explained"]):
        told += f", in truth {row['target']}"
    parts.append(f"<p>{escape(told)}</p>")
    parts.append(_shares(row.get("shares") or []))
    near = "".join(_image(one, "a training row") for one in row.get("examples") or [])
    if near:
        parts.append(
            f"<p>nearest of the training rows</p><div class='near'>{near}</div>"
        )
    return f"<figure>{''.join(parts)}</figure>"


def _shares(shares: Sequence[Sequence[Any]]) -> str:
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(number(share))}</dd>"
        for name, share in shares
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _importances(facts: Mapping[str, Any]) -> str:
    columns = facts.get("columns") or []
    if not columns:
        return ""
    rows = "".join(
        f"<tr><td>{escape(one['column'])}</td><td>{escape(number(one['mean']))}</td>"
        f"<td>± {escape(number(one['deviation']))}</td></tr>"
        for one in columns
    )
    head = "<th>column</th><th>the metric falls by</th><th></th>"
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _image(
    address: str,
    words: str,
) -> str:
    return f'<img src="{escape(address)}" alt="{escape(words)}">'
