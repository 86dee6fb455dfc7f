"""Does transformers compute what we do, of folders that we write?

Each case is written as others write it, read by `lepton_jax.hub`, and written twice:
like the folder that it came from, and with a configuration of our own. transformers
opens both, and its distribution over the next token is compared with ours.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import SettingError
from tools.hub import checkpoints

WORKER = Path(__file__).with_name("others.py")
BAR = 1e-6  # nats a token
MOST_SECONDS = 800  # of transformers, for all folders


def compare(python: str, families: Sequence[str]) -> dict[str, Any]:
    """Return the divergence of each case, and the worst of each family.

    Args:
      python: an interpreter with transformers and torch.
      families: by `model_type`.

    Raises:
      SettingError: the interpreter can't be used.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases = [case for name in families for case in checkpoints.covering(name)]
        ours = {}
        for number, case in enumerate(cases):
            ours |= _written(case, folder / str(number))
        theirs = _asked(python, ours, folder)

    rows = []
    for name, (case, way, _, logits) in ours.items():
        row = {"family": case.family, "case": str(case), "way": way}
        if f"error/{name}" in theirs:
            rows.append({**row, "error": str(theirs[f"error/{name}"])})
            continue
        divergence = kl(logits, theirs[name])
        rows.append(
            {
                **row,
                "kl_mean": float(divergence.mean()),
                "kl_most": float(divergence.max()),
                "logit_most": float(np.abs(logits - theirs[name]).max()),
            }
        )
    versions = [str(version) for version in theirs["version"]]
    return {
        "bar": BAR,
        "transformers": versions[0],
        "torch": versions[1],
        "machine": platform.processor() or platform.machine(),
        "families": {name: _worst(rows, name) for name in families},
        "cases": rows,
    }


def kl(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return KL(left || right) in nats of each token, of logits (length, vocab)."""
    ours = _log_softmax(left)
    theirs = _log_softmax(right)
    return (np.exp(ours) * (ours - theirs)).sum(axis=-1)


# ---- internals ----


def _written(case: checkpoints.Case, place: Path) -> dict[str, tuple]:
    """Write a case in both ways, and return our logits by folder."""
    checkpoints.write(case, place / "came")
    tokens = checkpoints.tokens_of()
    folder = lepton.hub.open(place / "came")
    module = folder.module()
    logits = np.asarray(module(jnp.asarray(tokens)[None])[0], np.float64)
    like = lepton.hub.save(module, place / "like", like=folder)
    own = lepton.hub.save(module, place / "own")
    return {
        str(like): (case, "like the folder", tokens, logits),
        str(own): (case, "configuration of our own", tokens, logits),
    }


def _asked(python: str, ours: dict[str, tuple], place: Path) -> dict[str, np.ndarray]:
    """Return what transformers says."""
    request = place / "request.json"
    answer = place / "answer.npz"
    wanted = [[name, tokens.tolist()] for name, (_, _, tokens, _) in ours.items()]
    request.write_text(json.dumps(wanted))
    try:
        done = subprocess.run(
            [python, str(WORKER), str(request), str(answer)],
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unusable(python, str(error)) from error
    if done.returncode:
        raise _unusable(python, done.stderr.strip().splitlines()[-1])
    with np.load(answer) as found:
        return {name: found[name] for name in found.files}


def _unusable(python: str, why: str) -> SettingError:
    return SettingError(
        f"transformers did not answer: {why}",
        where=f"--python {python}",
        remedy="name a Python in which transformers and torch are installed",
    )


def _worst(rows: list[dict[str, Any]], family: str) -> dict[str, Any]:
    own = [row for row in rows if row["family"] == family]
    read = [row for row in own if "error" not in row]
    worst = max((row["kl_most"] for row in read), default=None)
    return {
        "folders": len(own),
        "opened": len(read),
        "kl_most": worst,
        "passes": len(read) == len(own) and worst is not None and worst <= BAR,
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
