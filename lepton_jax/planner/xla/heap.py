"""How XLA packs buffers into one heap, and which of them a TPU keeps in the memory
beside its HBM.
"""

from __future__ import annotations

from bisect import insort

import numpy as np

TINY = 1 / 32  # of that memory: there is nearly always room for such a buffer
MOST = 320  # buffers that are packed one by one; what is left is small


def packed(
    platform: str,
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
) -> float:
    """Bytes of the heap that holds buffers, each from its first moment to its last,
    inclusive.

    libtpu packs in the program's order. XLA's other backends pack the largest first,
    and those that last the longest first, and keep the smaller heap
    (`GlobalDecreasingSizeBestFitHeap` in `xla/service/heap_simulator`).
    """
    there = np.flatnonzero(sizes > 0)
    if not len(there):
        return 0.0
    order = there[np.argsort(-sizes[there], kind="stable")]
    big = np.sort(order[:MOST])
    rest = order[MOST:]
    small = float(alive(starts[rest], ends[rest], sizes[rest]).max(initial=0.0))
    starts = starts[big]
    ends = ends[big]
    sizes = sizes[big]
    if platform == "tpu":
        return small + _in_order(starts, ends, sizes)
    lasting = starts - ends
    number = np.arange(len(big))
    by_size = np.lexsort((number, lasting, -sizes))
    by_time = np.lexsort((number, -sizes, lasting))
    return small + min(
        _by_rank(order, starts, ends, sizes) for order in (by_size, by_time)
    )


def alive(
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
    length: int = 0,
) -> np.ndarray:
    """Bytes at each moment."""
    length = max(length, int(ends.max(initial=0)) + 2)
    return np.cumsum(
        np.bincount(starts, sizes, length)
        - np.bincount(
            ends + 1,
            sizes,
            length,
        )
    )


def _in_order(
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
) -> float:
    """Each buffer in the smallest gap that holds it when it comes, else on top."""
    events = sorted(
        [(int(t), 0, i) for i, t in enumerate(starts)]
        + [(int(t), 1, i) for i, t in enumerate(ends)]
    )
    wanted = sizes.tolist()
    held: list[tuple[float, float]] = []
    places: dict[int, tuple[float, float]] = {}
    top = 0.0
    for _, gone, i in events:
        if gone:
            held.remove(places.pop(i))
            continue
        size = wanted[i]
        reach = 0.0
        at = -1.0
        least = np.inf
        for low, high in held:
            gap = low - reach
            if size <= gap < least:
                at = reach
                least = gap
            reach = high
        at = reach if at < 0 else at
        places[i] = (at, at + size)
        insort(held, places[i])
        top = max(top, at + size)
    return top


def _by_rank(
    order: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
) -> float:
    """Each buffer in the smallest gap among those that were placed before it and are
    there with it.
    """
    low = np.zeros(len(order))
    count = 0
    ranked = starts[order], ends[order], sizes[order]
    top = 0.0
    for start, end, size in zip(*ranked, strict=True):
        beside = np.flatnonzero(
            (ranked[0][:count] <= end) & (start <= ranked[1][:count])
        )
        beside = beside[np.argsort(low[beside], kind="stable")]
        reach = np.maximum.accumulate(
            np.concatenate(([0.0], low[beside] + ranked[2][beside]))
        )
        gaps = low[beside] - reach[:-1]
        fits = np.flatnonzero(gaps >= size)
        low[count] = reach[fits[np.argmin(gaps[fits])]] if len(fits) else reach[-1]
        top = max(top, low[count] + size)
        count = count + 1
    return float(top)


def beside(
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
    room: float,
    rank: np.ndarray,
) -> np.ndarray:
    """Which buffers are all their time in a memory of `room` bytes, bool.

    XLA gives that memory to what gains the most from it: what is read soon. Here tiny
    buffers come first, then those of lower rank, the larger ones, the earlier ones. A
    buffer that there is no room for all the while takes HBM all the same, though XLA
    may have it in that memory for a time.
    """
    chosen = np.zeros(len(sizes), bool)
    if room <= 0:
        return chosen
    taken = np.zeros(int(ends.max(initial=0)) + 2)
    able = np.flatnonzero((sizes > 0) & (sizes <= room))
    for i in able[
        np.lexsort((starts[able], -sizes[able], rank[able], sizes[able] > TINY * room))
    ][: 4 * MOST]:
        span = taken[starts[i] : ends[i] + 1]
        if np.max(span, initial=0.0) + sizes[i] <= room:
            span += sizes[i]
            chosen[i] = True
    return chosen
