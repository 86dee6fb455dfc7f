"""The library that quantizes, imported where it is used."""

from __future__ import annotations

import functools
from types import ModuleType

from lepton_jax.ship.extras import needs


@functools.cache
def qwix() -> ModuleType:
    """Return the library qwix.

    Raises:
      MissingExtraError: it is not installed.
    """
    return needs("qwix", extra="quant", purpose="quantization")
