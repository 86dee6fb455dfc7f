"""Libraries outside the core: what to install when one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from lepton_jax.errors import DataError, LeptonError

__all__ = ["needs"]


def needs(
    module: str,
    *,
    extra: str,
    purpose: str,
    kind: type[LeptonError] = DataError,
) -> ModuleType:
    """Import a library that one of Lepton's extras brings.

    Args:
      module: the library's name, such as "polars".
      extra: the extra that installs it.
      purpose: what it is needed for, the subject of the error's sentence.
      kind: of the error.

    Raises:
      DataError: it is not installed; or `kind`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise kind(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed",
            where=module,
            remedy=f"pip install 'lepton-jax[{extra}]'",
        ) from error
