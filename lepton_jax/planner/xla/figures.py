"""Figures on which the model of XLA rests, each with its unit and its source.

A source is a citation, a command that measures the figure or shows how well it fits, or
the word "assumption". The constants below the table are what the code imports.
"""

from __future__ import annotations

from typing import NamedTuple

PALLAS = "Pallas TPU documentation, docs.jax.dev/en/latest/pallas/tpu/details.html"
CHIP_TABLE = (
    "the chip table of jax.experimental.pallas.tpu, less what libtpu keeps for"
    " kernels: 16 MiB, and 32 MiB in a v6e"
)
FITTED = (
    "fitted by `python -m tools.bench planner-memory` and some 40 more programs that"
    " libtpu compiled: the best of the values that were tried"
)


class Figure(NamedTuple):
    """A number that somebody chose, found or looked up."""

    value: float
    unit: str
    source: str


FIGURES = {
    "lanes": Figure(128, "numbers in a row of a TPU's vector register", PALLAS),
    "sublanes": Figure(8, "rows of a TPU's vector register", PALLAS),
    "vector_memory.v5e": Figure(112, "MiB for buffers next to the HBM", CHIP_TABLE),
    "vector_memory.v6e": Figure(96, "MiB for buffers next to the HBM", CHIP_TABLE),
    "vector_memory.v5p": Figure(48, "MiB for buffers next to the HBM", CHIP_TABLE),
    "vector_memory.tpu7x": Figure(48, "MiB for buffers next to the HBM", CHIP_TABLE),
    # There is nearly always room in that memory for a buffer below this size.
    "tiny_share": Figure(1 / 32, "share of the memory next to the HBM", FITTED),
    # Buffers that wait less than this have that memory before others; it is about where
    # XLA's memory space assignment stops.
    "patience": Figure(10.0, "times the seconds that moving the buffer takes", FITTED),
    # A product over more rows than this for each byte of a number has its result summed
    # over the devices piece by piece.
    "windowed_rows": Figure(
        256,
        "rows on a device for each byte of a number",
        "found by compiling MLPs with libtpu of jax 0.10 for v5e, v5p and v6e",
    ),
    "windowed_devices.least": Figure(
        8,
        "devices",
        "found by compiling MLPs with libtpu of jax 0.10 for v5e, v5p and v6e",
    ),
    "windowed_devices.most": Figure(
        32,
        "devices",
        "found by compiling MLPs with libtpu of jax 0.10 for v5e, v5p and v6e",
    ),
    # Gradients of tables below this size are summed over the devices at the same time,
    # larger ones each alone.
    "combined": Figure(
        16 * 2**20,
        "bytes of the whole table",
        "found by compiling tables of 1 MB and of 26 MB with libtpu of jax 0.10",
    ),
    # Buffers beyond this number are small, so only their sum counts.
    "packed_singly": Figure(320, "buffers", "assumption, to keep packing fast"),
    # A buffer that exists for more than a tenth of the program counts as an activation.
    "lasting_part": Figure(10, "parts of the program", "assumption"),
    # Of communication that XLA's latency-hiding scheduler runs next to computing, this
    # share shows all the same.
    "hidden_share": Figure(0.1, "share of the seconds", "assumption"),
    # Of gathers of parameters and sums of gradients on TPUs, the share that is waited
    # for with the flags of `xla.flags`; without them it is all.
    "waited_share": Figure(
        0.4,
        "share of the bytes",
        "found by `python tools/overlap.py` (libtpu 0.0.42): 0.40 of 8B on"
        " v5p:4x4x4, 0.36 on v6e:16x16, 0.65 of 1B on v5e:8x8",
    ),
}

LANES = int(FIGURES["lanes"].value)
SUBLANES = int(FIGURES["sublanes"].value)
VECTOR_MEMORY = {
    name.partition(".")[2]: figure.value * 2**20
    for name, figure in FIGURES.items()
    if name.startswith("vector_memory.")
}
TINY_SHARE = FIGURES["tiny_share"].value
PATIENCE = FIGURES["patience"].value
WINDOWED_ROWS = FIGURES["windowed_rows"].value
WINDOWED_DEVICES = (
    FIGURES["windowed_devices.least"].value,
    FIGURES["windowed_devices.most"].value,
)
COMBINED = FIGURES["combined"].value
PACKED_SINGLY = int(FIGURES["packed_singly"].value)
LASTING_PART = int(FIGURES["lasting_part"].value)
HIDDEN_SHARE = FIGURES["hidden_share"].value
WAITED_SHARE = FIGURES["waited_share"].value
