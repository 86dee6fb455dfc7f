"""Row groups that are held in memory, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class HeldGroups:
    """Row groups of all sources of a feed; the one used longest ago goes first.

    Where two threads want one at the same time, one of them reads it and the other
    waits. One group is held even if it alone is larger than the limit.

    >>> held = HeldGroups(limit=10)
    >>> held.get("a", lambda: ("rows of a", 6))
    'rows of a'
    >>> held.get("b", lambda: ("rows of b", 6))
    'rows of b'
    >>> held.bytes  # "a" has gone
    6

    Args:
      limit: bytes.

    Attributes:
      bytes: of the groups that are held now.
      loads: how many groups were read.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        self.loads = 0
        self._groups: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._loading: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(
        self,
        key: Hashable,
        load: Callable[[], tuple[Any, int]],
    ) -> Any:
        """Return a group.

        Args:
          key: of the group.
          load: returns (group, bytes), if it is not held.
        """
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key][0]
            loading = self._loading.setdefault(key, threading.Lock())

        with loading:
            with self._lock:
                if key in self._groups:
                    return self._groups[key][0]
            group, size = load()
            with self._lock:
                self._add(key, group, size)
        return group

    def _add(
        self,
        key: Hashable,
        group: Any,
        size: int,
    ) -> None:
        self._groups[key] = group, size
        self._loading.pop(key, None)
        self.bytes += size
        self.loads += 1
        while self.bytes > self.limit and len(self._groups) > 1:
            _, (_, gone) = self._groups.popitem(last=False)
            self.bytes -= gone
