"""Libraries that only a shipped model needs: what to install when one is missing."""

from __future__ import annotations

from functools import partial

from lepton_jax.data import extras
from lepton_jax.errors import LeptonError


class MissingExtraError(LeptonError):
    """A library of one of Lepton's extras that is not installed."""


needs = partial(extras.needs, kind=MissingExtraError)
