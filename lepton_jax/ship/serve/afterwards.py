"""Work that no client has to wait for, done some milliseconds later in one go.

What the meter is told takes a tenth of the time of a small request. Told at once, it
would delay the answer, or the request that comes next on the same connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

DELAY = 5e-3  # seconds (assumption: far below the time between two looks at metrics)
MOST = 256  # things to do, after which they are done at once (assumption)


class Afterwards:
    """Things to do later, in their order, in the thread of the event loop."""

    def __init__(self) -> None:
        self._things: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def do(
        self,
        function: Callable[..., Any],
        *arguments: Any,
    ) -> None:
        """Call a function later."""
        self._things.append((function, arguments))
        if len(self._things) == 1:
            asyncio.get_running_loop().call_later(DELAY, self.flush)
        elif len(self._things) >= MOST:
            self.flush()

    def flush(self) -> None:
        """Do all that is still to be done."""
        things = self._things
        self._things = []
        for function, arguments in things:
            function(*arguments)
