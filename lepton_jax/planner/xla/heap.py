"""XLA's heap: the packing of buffers, and those in a TPU's vector memory.

The five operations of `fusion`'s example, `(tanh(x @ w) * 2 + 1).sum()`, have three
buffers: the gathered parameter of 128 bytes at the moments 2 to 4, the product of 512
bytes at 4 to 6, and the sum of 4 bytes at 6 to 8. At 4 the first two exist, which is
the most at once. The sum then takes the place of the parameter:

    >>> starts, ends = np.array([2, 4, 6]), np.array([4, 6, 8])
    >>> sizes = np.array([128.0, 512.0, 4.0])
    >>> alive(starts, ends, sizes)[2:9].tolist()
    [128.0, 128.0, 640.0, 512.0, 516.0, 4.0, 4.0]
    >>> packed("cpu", starts, ends, sizes)
    640.0

A heap may need more than what is alive at once, since buffers can't move. Here the
third buffer doesn't fit below the second, as long as the first comes first:

    >>> starts, ends = np.array([0, 0, 2]), np.array([1, 9, 9])
    >>> sizes = np.array([2.0, 1.0, 3.0])
    >>> packed("tpu", starts, ends, sizes), packed("cpu", starts, ends, sizes)
    (6.0, 4.0)
"""

from __future__ import annotations

from bisect import insort

import numpy as np

from lepton_jax.planner.xla.figures import PACKED_SINGLY, TINY_SHARE

# A span of addresses: (first byte, end).
Span = tuple[float, float]


def packed(
    platform: str,
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
) -> float:
    """Return the bytes of the heap that holds some buffers.

    libtpu packs in the program's order. XLA's other backends pack the largest first,
    and those that last the longest first, and keep the smaller heap
    (`GlobalDecreasingSizeBestFitHeap` in `xla/service/heap_simulator`).

    Args:
      platform: "cpu", "tpu" or "gpu".
      starts: first moment of each buffer.
      ends: last moment of each buffer, inclusive.
      sizes: bytes of each buffer.
    """
    occupied = np.flatnonzero(sizes > 0)
    if not len(occupied):
        return 0.0
    largest_first = occupied[np.argsort(-sizes[occupied], kind="stable")]
    big = np.sort(largest_first[:PACKED_SINGLY])
    rest = largest_first[PACKED_SINGLY:]
    held = alive(
        starts[rest],
        ends[rest],
        sizes[rest],
    )
    small = float(held.max(initial=0.0))

    starts = starts[big]
    ends = ends[big]
    sizes = sizes[big]
    if platform == "tpu":
        return small + _packed_in_order(starts, ends, sizes)
    negative_length = starts - ends
    number = np.arange(len(big))
    by_size = np.lexsort((number, negative_length, -sizes))
    by_time = np.lexsort((number, -sizes, negative_length))
    return small + min(
        _packed_by_rank(order, starts, ends, sizes) for order in (by_size, by_time)
    )


def alive(
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
    length: int = 0,
) -> np.ndarray:
    """Return the bytes that exist at each moment, of at least `length` moments."""
    length = max(length, int(ends.max(initial=0)) + 2)
    begun = np.bincount(starts, sizes, length)
    ended = np.bincount(ends + 1, sizes, length)
    return np.cumsum(begun - ended)


def _packed_in_order(
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
) -> float:
    """Put each buffer into the smallest gap when it comes, else on top."""
    begins = [(int(moment), 0, i) for i, moment in enumerate(starts)]
    gone = [(int(moment), 1, i) for i, moment in enumerate(ends)]
    bytes_ = sizes.tolist()
    held: list[Span] = []
    spans: dict[int, Span] = {}
    top = 0.0
    for _, ends_here, i in sorted(begins + gone):
        if ends_here:
            held.remove(spans.pop(i))
            continue
        low = _smallest_gap(held, bytes_[i])
        spans[i] = (low, low + bytes_[i])
        insort(held, spans[i])
        top = max(top, low + bytes_[i])
    return top


def _smallest_gap(
    held: list[Span],
    size: float,
) -> float:
    """Return where the smallest gap between spans begins that holds `size` bytes.

    The spans are in the order of their addresses. If no gap is large enough, this is
    the end of the last span.
    """
    reach = 0.0
    best = -1.0
    least = np.inf
    for low, high in held:
        gap = low - reach
        if size <= gap < least:
            best = reach
            least = gap
        reach = high
    return reach if best < 0 else best


def _packed_by_rank(
    order: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
) -> float:
    """Put buffer after buffer, in this order, into the smallest gap that holds it.

    Only the buffers that were placed before it and exist together with it count.
    """
    starts = starts[order]
    ends = ends[order]
    sizes = sizes[order]
    low = np.zeros(len(order))
    top = 0.0
    buffers = zip(starts, ends, sizes, strict=True)
    for i, (start, end, size) in enumerate(buffers):
        together = np.flatnonzero((starts[:i] <= end) & (start <= ends[:i]))
        together = together[np.argsort(low[together], kind="stable")]
        tops = np.concatenate(([0.0], low[together] + sizes[together]))
        reach = np.maximum.accumulate(tops)
        gaps = low[together] - reach[:-1]
        fits = np.flatnonzero(gaps >= size)
        low[i] = reach[-1]
        if len(fits):
            smallest = fits[np.argmin(gaps[fits])]
            low[i] = reach[smallest]
        top = max(top, low[i] + size)
    return float(top)


def in_vector_memory(
    starts: np.ndarray,
    ends: np.ndarray,
    sizes: np.ndarray,
    room: float,
    rank: np.ndarray,
) -> np.ndarray:
    """Whether each buffer is all its time in a memory next to the HBM, (buffers,) bool.

    XLA gives that memory to buffers that gain the most from it: those that are read
    soon. Here tiny buffers come first, then those of lower rank, the larger ones, the
    earlier ones. A buffer for which there is no room all the time takes HBM, though XLA
    may have it in that memory for a time.

    Args:
      starts: first moment of each buffer.
      ends: last moment of each buffer, inclusive.
      sizes: bytes of each buffer.
      room: bytes of the memory.
      rank: lower is more urgent.
    """
    chosen = np.zeros(len(sizes), bool)
    if room <= 0:
        return chosen
    able = np.flatnonzero((sizes > 0) & (sizes <= room))
    tiny = sizes[able] <= TINY_SHARE * room
    order = np.lexsort(
        (
            starts[able],
            -sizes[able],
            rank[able],
            ~tiny,
        )
    )

    taken = np.zeros(int(ends.max(initial=0)) + 2)
    for i in able[order][: 4 * PACKED_SINGLY]:
        span = taken[starts[i] : ends[i] + 1]
        if np.max(span, initial=0.0) + sizes[i] <= room:
            span += sizes[i]
            chosen[i] = True
    return chosen
