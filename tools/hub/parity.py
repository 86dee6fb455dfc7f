"""Does transformers compute what we do, of folders that we write?

Each case is written as others write it, read by `lepton_jax.hub`, and written twice:
like the folder that it came from, and with a configuration of our own. transformers
opens both, and its distribution over the next token is compared with ours.
"""

from __future__ import annotations

import dataclasses
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
ROUNDED = "/bfloat16"  # after a folder's name: computed so
MOST_RATIO = 2.0  # of our distance to theirs; assumption
TOKENS = 64  # of the text on which somebody's model is compared
MOST_SECONDS = 800  # of transformers, for all folders


def compare(
    python: str,
    families: Sequence[str],
    folders: Sequence[Path] = (),
) -> dict[str, Any]:
    """Return the divergence of each case, and the worst of each family.

    Args:
      python: an interpreter with transformers and torch.
      families: by `model_type`.
      folders: of other models to compare, each a family of its own.

    Raises:
      SettingError: the interpreter can't be used.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases = [case for name in families for case in checkpoints.covering(name)]
        ours = {}
        for number, case in enumerate(cases):
            ours |= _written(case, folder / str(number))
        for given in folders:
            ours |= _rewritten(given, folder / given.resolve().parent.name)
        theirs = _asked(python, ours, folder)

    rows = []
    for name, (family, case, way, _, logits) in ours.items():
        row = {"family": family, "case": case, "way": way}
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
        "families": {name: _worst(rows, name) for name in _names(rows)},
        "cases": rows,
    }


def rounding(python: str, families: Sequence[str]) -> dict[str, Any]:
    """Return how far bfloat16 moves the distributions here, and in transformers.

    Both are measured from their own float32. A norm or an angle that is rounded at
    another place shows as a larger distance.

    Args:
      python: an interpreter with transformers and torch.
      families: by `model_type`.
    """
    found = {}
    with tempfile.TemporaryDirectory() as place:
        ours = {}
        for name in families:
            for number, case in enumerate(checkpoints.covering(name)):
                ours |= _rounded(case, Path(place) / name / str(number))
        theirs = _asked(python, ours, Path(place))
    for family in families:
        here = []
        there = []
        for name, (own, *_, logits) in ours.items():
            if own == family and not name.endswith(ROUNDED):
                here.append(kl(logits, ours[name + ROUNDED][-1]).mean())
                there.append(kl(theirs[name], theirs[name + ROUNDED]).mean())
        mean_here = float(np.mean(here))
        mean_there = float(np.mean(there))
        found[family] = {
            "cases": len(here),
            "kl_here": mean_here,
            "kl_transformers": mean_there,
            "passes": mean_here <= MOST_RATIO * mean_there,
        }
    return {"ratio_bar": MOST_RATIO, "families": found}


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
    return _both(place / "came", place, (case.family, str(case)), tokens)


def _rewritten(given: Path, place: Path) -> dict[str, tuple]:
    """Write somebody's model in both ways, and return our logits by folder."""
    vocab = lepton.hub.open(given).shape.vocab
    tokens = np.random.default_rng(0).integers(0, vocab, TOKENS).astype(np.int32)
    return _both(given, place, (place.name, given.name), tokens)


def _both(
    came: Path,
    place: Path,
    names: tuple[str, str],
    tokens: np.ndarray,
) -> dict[str, tuple]:
    folder = lepton.hub.open(came)
    module = folder.module()
    logits = np.asarray(module(jnp.asarray(tokens)[None])[0], np.float64)
    like = lepton.hub.save(module, place / "like", like=folder)
    own = lepton.hub.save(module, place / "own")
    return {
        str(like): (*names, "like the folder", tokens, logits),
        str(own): (*names, "configuration of our own", tokens, logits),
    }


def _rounded(case: checkpoints.Case, place: Path) -> dict[str, tuple]:
    """Return our logits in float32 and in bfloat16, of weights that are bfloat16."""
    case = dataclasses.replace(case, dtype="BF16")
    checkpoints.write(case, place)
    tokens = checkpoints.tokens_of()
    folder = lepton.hub.open(place)
    answers = {}
    for suffix, dtype in (("", jnp.float32), (ROUNDED, jnp.bfloat16)):
        module = folder.module(dtype)
        logits = np.asarray(module(jnp.asarray(tokens)[None])[0], np.float64)
        answers[f"{place}{suffix}"] = (case.family, str(case), "", tokens, logits)
    return answers


def _dtype(name: str) -> str:
    return "bfloat16" if name.endswith(ROUNDED) else "float32"


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in rows))


def _asked(python: str, ours: dict[str, tuple], place: Path) -> dict[str, np.ndarray]:
    """Return what transformers says."""
    request = place / "request.json"
    answer = place / "answer.npz"
    wanted = [
        [name, name.removesuffix(ROUNDED), tokens.tolist(), _dtype(name)]
        for name, (_, _, _, tokens, _) in ours.items()
    ]
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
