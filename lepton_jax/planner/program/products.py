"""Products of 8 bits that a recipe asks for, on the chips of a plan.

A chip multiplies numbers of 8 bits if its catalogue has a peak for them. Others compute
the same products of the same rounded numbers in a wider dtype, which holds them
exactly: that is slower than no rounding, and good for tests alone.
"""

from __future__ import annotations

from lepton_jax.hardware import Chip
from lepton_jax.planner.rewrite.narrow import EMULATED, KINDS

# Precisions to the dtype of a chip's peak.
PEAKS = {"fp8": "float8", "int8": "int8"}
# Dtype in which a platform emulates: CPUs compute bfloat16 in float32 anyway.
EMULATED_IN = {"cpu": "float32"}

MEANINGS = {
    "fp8": (
        "products of large kernels take numbers of 8 bits, e4m3, and e5m2 for"
        " gradients; one scale an array, from its greatest value over all devices"
    ),
    "int8": (
        "products of large kernels, and the gradients of what they are multiplied with,"
        " take whole numbers of 8 bits; a scale for each row and column, from its"
        " greatest value over all devices; gradients of kernels are in bfloat16"
    ),
}


def products_on(precision: str, chip: Chip) -> str:
    """Return how the large kernels of a model are multiplied on a chip.

    Args:
      precision: as in `Recipe`.
      chip: of the devices.

    Returns:
      A kind of products, as `rewrite.narrow` takes it; "": the model's own.
    """
    if precision not in KINDS:
        return ""
    if PEAKS[precision] in chip.peaks:
        return precision
    return f"{precision}{EMULATED}{EMULATED_IN.get(chip.platform, 'bfloat16')}"


def kind_of(words: str) -> str:
    """Return the kind in a precision or in a plan's products; "": it is none."""
    kind = words.partition(EMULATED)[0]
    return kind if kind in KINDS else ""


def reason(products: str) -> tuple[str, str]:
    """Return the decision of a plan that has products of 8 bits, and why."""
    kind, emulated, computed = products.partition(EMULATED)
    if not emulated:
        return f"products {kind}", MEANINGS[kind]
    return f"products {kind}, emulated in {computed}", MEANINGS[kind]


def notes(products: str, chip: Chip) -> list[str]:
    """Return what a plan says of products from which nothing is gained."""
    kind, emulated, computed = products.partition(EMULATED)
    if not kind:
        return []
    faster = [name for name, dtype in PEAKS.items() if _gains(chip, dtype)]
    instead = f'; precision="{faster[0]}" is faster there' if faster else ""
    if emulated:
        return [
            f"{chip.name} has no {kind} products: they are emulated in {computed}, with"
            f" the same rounding, and nothing is gained{instead}"
        ]
    if not _gains(chip, PEAKS[kind]):
        return [f"{kind} products of {chip.name} are no faster than bfloat16{instead}"]
    return []


# ---- internals ----


def _gains(chip: Chip, dtype: str) -> bool:
    return chip.peaks.get(dtype, 0.0) > chip.bf16_flops
