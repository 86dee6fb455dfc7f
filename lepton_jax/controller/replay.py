"""The repetition of a run from its journal."""

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
    """Return a policy that repeats a run from its journal, to the bit.

    The recipe must be the same but for its policies. The policy gives each knob, in
    each step, the effective value that the journal has, a person's changes included.
    Where a rollback skipped data, the data goes on behind it. The policy watches the
    same signals as the run did, so that XLA compiles the rest of the step to the same
    program.

    Args:
      journal: a run folder, its `controller.jsonl`, or lines as `read_journal` gives
        them.

    Raises:
      DataError: there is no journal, it is damaged, or it is empty.

    Example:
      >>> lines = [
      ...     {"kind": "start", "step": 0, "watched": ["loss"], "moved": ["skip"]},
      ...     {"kind": "decision", "step": 2, "knob": "skip", "to": 1.0},
      ... ]
      >>> policy = replay(lines)
      >>> state = policy.init()
      >>> for _ in range(3):
      ...     moves, state = policy.update({}, state)
      ...     print(float(moves["skip"]))
      0.0
      1.0
      0.0
    """
    path = journal if isinstance(journal, str | Path) else None
    lines = read_journal(journal) if isinstance(journal, str | Path) else journal
    lines = in_effect(lines)
    start = next((line for line in lines if line["kind"] == "start"), None)
    if start is None:
        raise DataError(
            "the journal holds nothing to replay",
            where=path,
            remedy="name the folder of a run with policies",
        )
    tables = _tables(start["moved"], lines)

    def update(
        signals: Mapping[str, Any],
        done: Any,
    ) -> tuple[dict[str, Any], Any]:
        moves = {}
        for knob, (steps, values) in tables.items():
            moves[knob] = _at(knob, steps, values, done + 1)
        return moves, done + 1

    rollbacks = [line for line in lines if line["kind"] == "rollback"]
    jumps = {line["to"]: line["position"] for line in rollbacks}
    return Policy(
        "replay",
        lambda: jnp.int32(start["step"]),
        update,
        tuple(start["watched"]),
        tuple(tables),
        {"jumps": jumps} if jumps else {},
        absolute=True,
    )


def _tables(
    moved: list[str],
    lines: list[dict[str, Any]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the table of each knob that may be moved, or was."""
    lived = [line["knob"] for line in lines if "knob" in line]
    knobs = dict.fromkeys([*moved, *lived])
    knobs.pop("rollback", None)
    return {knob: _table(knob, lines) for knob in knobs}


def _table(
    knob: str,
    lines: list[dict[str, Any]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, int32, and the value of a knob from each of them on, float32."""
    by_step: dict[int, float] = {}
    for line in lines:
        if line.get("knob") == knob and line["kind"] in ("decision", "motion"):
            values = line.get("values", [line["to"]])
            by_step |= dict(enumerate(values, line["step"]))
    steps = sorted(by_step)
    values = [by_step[step] for step in steps]
    return np.array(steps, np.int32), np.array(values, np.float32)


def _at(
    knob: str,
    steps: np.ndarray,
    values: np.ndarray,
    step: Any,
) -> Any:
    """Return the value of a knob in a step; NaN before the first in the journal."""
    lasts_a_step = KNOBS[knob].combine == "any"
    if not len(steps):
        return jnp.float32(0 if lasts_a_step else jnp.nan)
    index = jnp.searchsorted(steps, step, side="right") - 1
    if lasts_a_step:
        hit = jnp.asarray(steps)[index] == step
        return jnp.where(
            hit,
            jnp.asarray(values)[index],
            0.0,
        )
    before = index < 0
    return jnp.where(
        before,
        jnp.nan,
        jnp.asarray(values)[index],
    )
