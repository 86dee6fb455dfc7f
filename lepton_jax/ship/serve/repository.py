"""Models changed while the server runs: load, unload, canary, shadow.

Triton's extension for model repositories, with an admin's token:

    POST /v2/repository/index
    POST /v2/repository/models/digits/load
         {"parameters": {"place": "digits-2.lepton", "canary": 0.1}}
    POST /v2/repository/models/digits/unload  {"parameters": {"version": "1"}}

`load` without a place opens the model's artifact again, which may have been replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError
from lepton_jax.ship.serve.answering import Answer
from lepton_jax.ship.serve.application import Call, Handler, as_json, read_body
from lepton_jax.ship.serve.guards import Guards
from lepton_jax.ship.serve.models import Models
from lepton_jax.ship.serve.protocol import parse_json
from lepton_jax.ship.serve.refusal import bad


@dataclass
class Repository:
    """Changes of what a server serves.

    Attributes:
      models: of the server.
      guards: of its messages.
      open: opens an artifact.
    """

    models: Models
    guards: Guards
    open: Callable[[Path], Any]

    def handlers(self) -> dict[tuple[str, str], Handler]:
        """Return the handlers by method and path."""
        return {
            ("POST", "/v2/repository/index"): self._index,
            ("POST", "/v2/repository/models/*/load"): self._load,
            ("POST", "/v2/repository/models/*/unload"): self._unload,
        }

    async def _index(self, call: Call) -> Answer:
        """Return all versions of all models."""
        await read_body(call, self.guards)
        return as_json(
            [
                {"name": served.name, "version": served.version, "state": "READY"}
                for served in self.models.all()
            ]
        )

    async def _load(self, call: Call) -> Answer:
        """Load an artifact, and let it take over from the one of its version."""
        self.guards.check_admin(call.headers)
        name = call.words[0]
        parameters = _parameters(await read_body(call, self.guards))
        canary = _share(parameters)
        place = self._place(name, parameters)
        loop = asyncio.get_running_loop()
        try:
            artifact = await loop.run_in_executor(None, self.open, place)
            if artifact.manifest.name != name:
                raise bad(f"{place} holds the model {artifact.manifest.name!r}")
            version = str(artifact.manifest.version)
            # said before it is loaded, so that it gets no request too many
            is_shadow = parameters.get("shadow") is True
            self.models.set_aside(name, version, canary, is_shadow)
            await self.models.load(artifact, place)
        except LeptonError as error:
            where = f" ({error.where})" if error.where else ""
            raise bad(f"{error.what}{where}; {error.remedy}") from error
        return as_json({"name": name, "version": version})

    async def _unload(self, call: Call) -> Answer:
        """Serve a model, or a version of it, no longer."""
        self.guards.check_admin(call.headers)
        parameters = _parameters(await read_body(call, self.guards))
        version = parameters.get("version")
        if version is not None and not isinstance(version, str):
            raise bad("parameter 'version' is no text")
        self.models.unload(call.words[0], version)
        return as_json({})

    # ---- internals ----

    def _place(self, name: str, parameters: Mapping[str, Any]) -> Path:
        """Return the artifact to open."""
        given = parameters.get("place")
        if isinstance(given, str) and given:
            return Path(given)
        if given is not None:
            raise bad("parameter 'place' is no path")
        place = self.models.find(name).place
        if place is None:
            raise bad(f"model {name!r} was not loaded from a file; name its 'place'")
        return place


def _parameters(body: bytes) -> Mapping[str, Any]:
    parsed = parse_json(body) if body.strip() else {}
    parameters = parsed.get("parameters", {})
    if type(parameters) is not dict:
        raise bad("'parameters' is no object")
    return parameters


def _share(parameters: Mapping[str, Any]) -> float | None:
    """Return the canary's share; None: it is no canary."""
    share = parameters.get("canary")
    if share is None:
        return None
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise bad("parameter 'canary' is no share from 0 to 1")
    return float(share)
