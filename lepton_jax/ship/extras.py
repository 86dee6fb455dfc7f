"""Libraries that only a shipped model needs: what to install when one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from lepton_jax.errors import LeptonError


class MissingExtraError(LeptonError):
    """A library of one of Lepton's extras that is not installed."""


def needs(
    module: str,
    *,
    extra: str,
    purpose: str,
) -> ModuleType:
    """Import a library that one of Lepton's extras brings.

    Args:
      module: the library's name, such as "safetensors.numpy".
      extra: the extra that installs it.
      purpose: what it is needed for, the subject of the error's sentence.

    Raises:
      MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed",
            where=module,
            remedy=f"pip install 'lepton-jax[{extra}]'",
        ) from error
