"""Colours at even steps to the eye."""

from __future__ import annotations

import math

# OKLCH to linear sRGB, by way of cone responses (Ottosson 2020,
# https://bottosson.github.io/posts/oklab)
CONES = (
    (0.3963377774, 0.2158037573),
    (-0.1055613458, -0.0638541728),
    (-0.0894841775, -1.2914855480),
)
LINEAR = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def oklch(
    lightness: float,
    chroma: float,
    hue: float,
) -> str:
    """Return an OKLCH colour as #rrggbb; the hue is in radians.

    >>> oklch(1.0, 0.0, 0.0)
    '#ffffff'
    """
    a = chroma * math.cos(hue)
    b = chroma * math.sin(hue)
    x, y, z = ((lightness + p * a + q * b) ** 3 for p, q in CONES)
    linear = [u * x + v * y + w * z for u, v, w in LINEAR]
    return "#" + "".join(f"{round(255 * _curved(value)):02x}" for value in linear)


def _curved(value: float) -> float:
    """Return the sRGB value of a linear one, cut to what a screen shows."""
    value = min(1.0, max(0.0, value))
    if value <= 0.0031308:
        return 12.92 * value
    return 1.055 * value ** (1 / 2.4) - 0.055
