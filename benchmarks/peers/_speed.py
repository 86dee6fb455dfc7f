"""A process that trains some steps when it is told to.

It is started by `python -m tools.bench peers` with one argument, JSON: the case's name
and sizes, the file of its arrays, and the form that runs. The first line out says what
runs; it comes when everything is compiled. Then each line in is a number of steps, and
is answered by a line with the last loss. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP = 5  # steps, in which everything is compiled


def arrays(file: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the inputs and the targets of a case."""
    with np.load(file) as stored:
        inputs = [stored[name] for name in stored.files if name != "targets"]
        return inputs, stored["targets"]


def serve(
    make: Callable[[dict[str, Any]], tuple[Callable[[int], float], dict[str, Any]]],
) -> None:
    """Answer the lines of standard input.

    Args:
      make: the case to a function that trains some steps and returns the last loss, and
        to what is said of it.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the error stream

    run, about = make(json.loads(sys.argv[1]))
    about["loss"] = run(WARM_UP)
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        print(json.dumps({"loss": run(int(line))}), file=answers)
