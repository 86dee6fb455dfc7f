"""The page in a real browser: from the command to the answer for a drawn digit."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from tools.siege.target import ROOT, target

# A three, as shares of the pad's sides: an upper bow and a lower one.
STEPS = 14
LAST = 110.0  # degrees at which a bow ends
WIDTH = 900  # pixels of the window
HEIGHT = 800
MOST_SECONDS = 20.0  # of the claim
ANSWERED = "document.querySelector('.bar') !== null"
ANSWER = "document.querySelector('#answer').textContent"


def try_page(place: Path, png: Path | None) -> dict[str, Any]:
    """Draw a three for a model of digits, and return what the page answers.

    Args:
      place: of the artifact, or a run's folder.
      png: file for a picture of the page; None: none is made.
    """
    sys.path.insert(0, str(ROOT / "tests" / "ship"))
    from browser import browser

    began = time.monotonic()
    with browser(WIDTH, HEIGHT) as page, target(place, "--unready", "0") as server:
        ready = time.monotonic() - began
        page.open(f"http://127.0.0.1:{server.port}/")
        page.until("document.querySelector('#pad') !== null")
        page.draw("#pad", _three())
        page.until(ANSWERED)
        answer = page.value(ANSWER)
        seconds = time.monotonic() - began
        if png is not None:
            page.picture(png)
        code = server.end()
    return {
        "place": place.name,
        "ready_seconds": round(ready, 2),
        "answer_seconds": round(seconds, 2),
        "answer": answer,
        "exit_code": code,
        "kept": answer == "3" and seconds < MOST_SECONDS and code == 0,
    }


def _three() -> list[tuple[float, float]]:
    """Return the places of the pen for a three."""
    upper = _bow(0.46, 0.3, 0.2, 0.19, -150)
    lower = _bow(0.46, 0.7, 0.24, 0.21, -75)
    return [*upper, (0.44, 0.49), *lower]


def _bow(
    x: float,
    y: float,
    wide: float,
    tall: float,
    start: float,
) -> list[tuple[float, float]]:
    """Return places on the right side of an ellipse, from an angle in degrees on."""
    turn = (LAST - start) / (STEPS - 1)
    angles = [math.radians(start + turn * step) for step in range(STEPS)]
    return [(x + wide * math.cos(a), y + tall * math.sin(a)) for a in angles]
