"""A run again, from its journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_jax.controller.journal import in_effect, read_journal
from lepton_jax.controller.knobs import KNOBS
from lepton_jax.controller.policy import Policy
from lepton_jax.errors import DataError


def replay(journal: str | Path | Iterable[dict[str, Any]]) -> Policy:
    """A journal as a fixed schedule: in a recipe that is otherwise the same it makes
    the same run, to the bit.

    It gives each knob, in each step, the effective value that the journal has, a
    person's changes included; where a rollback skipped data, the data goes on behind
    it. It watches what was watched, so that XLA makes the same of the rest of the step.

    Args:
      journal: a run folder, its `controller.jsonl`, or lines as `read_journal` gives
        them.

    Raises:
      DataError: there is no journal, it is damaged, or nothing stands in it.
    """
    path = journal if isinstance(journal, str | Path) else None
    lines = in_effect(read_journal(path) if path is not None else journal)  # type: ignore[arg-type]
    start = next((line for line in lines if line["kind"] == "start"), None)
    if start is None:
        raise DataError(
            "the journal holds nothing to replay",
            where=path,
            remedy="name the folder of a run with policies",
        )
    tables = {
        knob: _table(knob, lines)
        for knob in dict.fromkeys(
            [*start["moved"], *(line["knob"] for line in lines if "knob" in line)]
        )
        if knob != "rollback"
    }

    def init() -> Any:
        return jnp.int32(start["step"])

    def update(signals: Mapping[str, Any], done: Any) -> tuple[dict[str, Any], Any]:
        return {
            knob: _at(knob, *table, done + 1) for knob, table in tables.items()
        }, done + 1

    jumps = {
        line["to"]: line["position"] for line in lines if line["kind"] == "rollback"
    }
    return Policy(
        "replay",
        init,
        update,
        tuple(start["watched"]),
        tuple(tables),
        {"jumps": jumps} if jumps else {},
        absolute=True,
    )


def _table(knob: str, lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, int32, and the value that a knob has from each of them on, float32."""
    found: dict[int, float] = {}
    for line in lines:
        if line.get("knob") == knob and line["kind"] in ("decision", "motion"):
            found |= dict(enumerate(line.get("values", [line["to"]]), line["step"]))
    steps = np.array(sorted(found), np.int32)
    return steps, np.array([found[step] for step in sorted(found)], np.float32)


def _at(
    knob: str,
    steps: np.ndarray,
    values: np.ndarray,
    step: Any,
) -> Any:
    """The value of a knob in a step; NaN before the first that the journal has."""
    if not len(steps):
        return jnp.float32(0 if KNOBS[knob].combine == "any" else jnp.nan)
    index = jnp.searchsorted(steps, step, side="right") - 1
    if KNOBS[knob].combine == "any":
        return jnp.where(
            jnp.asarray(steps)[index] == step,
            jnp.asarray(values)[index],
            0.0,
        )
    return jnp.where(
        index < 0,
        jnp.nan,
        jnp.asarray(values)[index],
    )
