"""What a recipe does to inputs on the devices, as functions with names.

A saved model finds a named function again; a lambda it can't (see `Trainer.open`).
"""

from __future__ import annotations

from typing import Any


def divided(x: Any, by: float) -> Any:
    """Return whole numbers as float32, divided: pixels by 255, say."""
    return x.astype("float32") / by
