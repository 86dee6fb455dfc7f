"""The models of a server: versions, hot swap, canary and shadow.

    digits   version 1   half of those who name no version... all but the canary's share
             version 2   canary: 10 % of them
             version 3   shadow: a copy of each request, whose answers are compared only

A version is loaded and warmed next to the ones that work, takes over in one step, and
the one it replaces goes when its last request is answered.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import LeptonError, SettingError, nearest
from lepton_jax.ship.serve.afterwards import Afterwards
from lepton_jax.ship.serve.batcher import Batcher, Done, Limits
from lepton_jax.ship.serve.refusal import Refusal, busy, unknown
from lepton_jax.ship.serve.signature import Signature
from lepton_jax.ship.serve.warming import Warm, difference_of, warm

LOOK = 0.02  # seconds between two looks whether a version is still in use
SHADOW_PRIORITY = 3


@dataclass
class Shadowing:
    """How a shadow's answers compare with those that the clients got.

    Attributes:
      compared: requests that both answered.
      differing: those whose outputs differ by more than rounding.
      failed: those that the shadow did not answer.
      largest: difference, as a share of an output's largest size.
    """

    compared: int = 0
    differing: int = 0
    failed: int = 0
    largest: float = 0.0

    def compare(
        self,
        ours: Mapping[str, np.ndarray],
        theirs: Mapping[str, np.ndarray],
    ) -> None:
        """Count one request."""
        self.compared += 1
        differs = False
        for name, expected in theirs.items():
            got = ours.get(name)
            if got is None or got.shape != expected.shape:
                differs = True
                continue
            difference, bound = difference_of(got, expected, expected)
            self.largest = max(self.largest, difference)
            differs |= difference > bound
        self.differing += int(differs)


@dataclass(eq=False)
class Served:
    """One version of a model, warm.

    Attributes:
      name: of the model.
      version: of the model.
      artifact: the `Artifact`.
      place: that it was loaded from.
      signature: of the protocol.
      warm: its programs, and how they were proved.
      batcher: its queue.
      meter: of `ship.watch`; None: nothing is measured.
      visits: requests that use it now.
      shadowing: counts, if it is a shadow.
    """

    name: str
    version: str
    artifact: Any
    place: Path | None
    signature: Signature
    warm: Warm
    batcher: Batcher
    meter: Any = None
    visits: int = 0
    shadowing: Shadowing = field(default_factory=Shadowing)

    async def retire(self) -> None:
        """End when the last request is answered."""
        while self.visits or not self.batcher.is_idle:
            await asyncio.sleep(LOOK)
        self.batcher.close()

    def metadata(self, versions: list[str]) -> dict[str, Any]:
        """Return what the protocol tells of a model.

        Args:
          versions: all that are ready.
        """
        facts: dict[str, Any] = {
            "name": self.name,
            "versions": versions,
            "platform": "lepton_jax",
            "inputs": [part.facts() for part in self.signature.inputs.values()],
            "outputs": [part.facts() for part in self.signature.outputs.values()],
        }
        parameters: dict[str, Any] = {
            "version": self.version,
            "sizes": self.batcher.ladder.sizes,
            "rows_share_batches": self.warm.together,
            "difference_from_the_trainer": self.warm.difference,
            "rows_compared": self.warm.rows,
        }
        if self.signature.columns:
            arrays = self.signature.arrays.values()
            parameters["arrays"] = [part.facts() for part in arrays]
        if self.shadowing.compared or self.shadowing.failed:
            parameters["shadow"] = vars(self.shadowing)
        return {**facts, "parameters": parameters}


@dataclass(frozen=True)
class Canary:
    """A version that gets a share of the requests that name none.

    Attributes:
      version: of the model.
      share: from 0 to 1.
    """

    version: str
    share: float


class Models:
    """All models of a server.

    Methods are for the event loop's thread alone.

    Args:
      limits: of each queue.
      sizes: to compile; empty: as many as pay.
      meter: of `ship.watch`; None: nothing is measured.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        sizes: tuple[int, ...] = (),
        meter: Any = None,
    ):
        self.limits = limits or Limits()
        self.canaries: dict[str, Canary] = {}
        self.shadows: dict[str, str] = {}
        self.afterwards = Afterwards()
        # Whether there is one request under way; a server knows.
        self.is_alone: Callable[[], bool] = lambda: False
        self._sizes = sizes
        self._meter = meter
        self._versions: dict[str, dict[str, Served]] = {}
        self._defaults: dict[str, Served] = {}  # that were looked up already
        self._expected: dict[str, set[str]] = {}  # versions that are being loaded
        self._is_stopped = threading.Event()
        self._loader = ThreadPoolExecutor(1, "lepton-load")
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- loading ----

    async def load(self, artifact: Any, place: Path | None = None) -> Served:
        """Warm an artifact, and let it take over from one of its name and version.

        Raises:
          LeptonError: it can't be served; what was served before still is.
        """
        name = artifact.manifest.name
        version = str(artifact.manifest.version)
        signature = Signature.of(artifact)
        expected = self._expected.setdefault(name, set())
        expected.add(version)
        try:
            loop = asyncio.get_running_loop()
            ready = await loop.run_in_executor(
                self._loader, warm, artifact, self._sizes, self._is_stopped.is_set
            )
        finally:
            # a server that leaves while it loads has not forgotten the model
            if not self._is_stopped.is_set():
                expected.discard(version)
            if not expected:
                del self._expected[name]

        meter = None
        if self._meter is not None:
            meter = self._meter.model(name, version, artifact)
        batcher = Batcher(
            ready.programs,
            ready.ladder,
            self.limits,
            meter,
            ready.together,
            self.afterwards,
            lambda: self.is_alone(),
        )
        served = Served(
            name, version, artifact, place, signature, ready, batcher, meter
        )
        self._put(served)
        return served

    def unload(self, name: str, version: str | None = None) -> None:
        """Serve a model, or one version of it, no longer.

        Raises:
          Refusal: it is not here.
        """
        self.find(name, version)
        self._defaults.clear()
        versions = self._versions[name]
        for key in [version] if version else list(versions):
            self._retire(versions.pop(key))
            if self._meter is not None:
                self._meter.forget(name, key)
        if not versions:
            del self._versions[name]

    def stop(self) -> None:
        """End the loading of models."""
        self._is_stopped.set()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Let go of all models."""
        for served in self.all():
            served.batcher.close()
        self.afterwards.flush()

    # ---- finding ----

    def all(self) -> list[Served]:
        """Return all versions of all models."""
        return [
            served
            for versions in self._versions.values()
            for served in versions.values()
        ]

    @property
    def is_loading(self) -> bool:
        """Whether a model is on its way that takes no requests yet."""
        return bool(self._expected.keys() - self._versions.keys())

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is computed."""
        return all(served.batcher.is_idle for served in self.all())

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are ready, oldest first."""
        return sorted(self._versions.get(name, ()), key=order)

    def find(self, name: str, version: str | None = None) -> Served:
        """Return a version of a model; None: the one that others answer with.

        Raises:
          Refusal: 404, it is not here; 503, it is not ready yet.
        """
        versions = self._versions.get(name)
        if versions is not None:
            if version is None:
                return self._default(name)
            if version in versions:
                return versions[version]
        expected = self._expected.get(name)
        if expected is not None and (version is None or version in expected):
            raise busy(f"model {name!r} is being loaded")
        if versions is None:
            raise unknown(f"there is no model {name!r}{nearest(name, self._versions)}")
        raise unknown(
            f"model {name!r} has no version {version!r};"
            f" it has {', '.join(self.versions(name))}"
        )

    def choose(self, name: str, version: str | None) -> Served:
        """Return the version of a model that answers a request.

        Args:
          name: of the model.
          version: that the request names; None: the canary gets its share.

        Raises:
          Refusal: see `find`.
        """
        if version is None and name in self.canaries:
            canary = self.canaries[name]
            is_there = canary.version in self._versions.get(name, ())
            if is_there and random.random() < canary.share:
                version = canary.version
        return self.find(name, version)

    def set_aside(
        self,
        name: str,
        version: str,
        canary: float | None,
        is_shadow: bool,
    ) -> None:
        """Say what share of the requests a version gets.

        Args:
          name: of the model.
          version: of the model.
          canary: its share, from 0 to 1; None: it is no canary.
          is_shadow: whether it is asked the same, and only compared.
        """
        self._defaults.clear()
        if self.canaries.get(name, Canary("", 0)).version == version:
            del self.canaries[name]
        if self.shadows.get(name) == version:
            del self.shadows[name]
        if canary is not None:
            self.canaries[name] = Canary(version, canary)
        if is_shadow:
            self.shadows[name] = version

    # ---- shadow ----

    def shadow(
        self,
        served: Served,
        inputs: Mapping[str, np.ndarray],
        rows: int,
        outputs: Mapping[str, np.ndarray],
    ) -> None:
        """Ask the shadow of a model the same, and compare; nobody waits for it."""
        version = self.shadows.get(served.name)
        shadow = self._versions.get(served.name, {}).get(version or "")
        if shadow is None or shadow is served:
            return
        self._begin(_compare(shadow, inputs, rows, outputs))

    # ---- internals ----

    def _default(self, name: str) -> Served:
        """Return the newest version that is neither canary nor shadow."""
        if name in self._defaults:
            return self._defaults[name]
        aside = {self.shadows.get(name)}
        if name in self.canaries:
            aside.add(self.canaries[name].version)
        versions = self.versions(name)
        usual = [version for version in versions if version not in aside]
        newest = (usual or versions)[-1]
        self._defaults[name] = self._versions[name][newest]
        return self._defaults[name]

    def _put(self, served: Served) -> None:
        versions = self._versions.setdefault(served.name, {})
        old = versions.get(served.version)
        versions[served.version] = served
        self._defaults.clear()
        if old is not None:
            self._retire(old)

    def _retire(self, served: Served) -> None:
        self._begin(served.retire())

    def _begin(self, work: Any) -> None:
        """Start work that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def order(version: str) -> tuple[int, int, str]:
    """Return a key by which versions are sorted: numbers as numbers, before words.

    >>> sorted(["10", "9", "beta"], key=order)
    ['9', '10', 'beta']
    """
    if version.isascii() and version.isdigit():
        return 0, int(version), version
    return 1, 0, version


def parse_canary(text: str) -> tuple[str, Canary]:
    """Return the model and the canary of "NAME=VERSION:SHARE".

    Raises:
      SettingError: it is not of this form, or the share is none.
    """
    name, sign, rest = text.partition("=")
    version, _, share = rest.rpartition(":")
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    if not (name and sign and version and 0 <= number <= 1):
        raise SettingError(
            f"{text!r} names no canary",
            where="command line, --canary",
            remedy="write NAME=VERSION:SHARE, e.g. digits=2:0.1",
        )
    return name, Canary(version, number)


async def _compare(
    shadow: Served,
    inputs: Mapping[str, np.ndarray],
    rows: int,
    outputs: Mapping[str, np.ndarray],
) -> None:
    """Ask a shadow, and count how its answer compares."""
    try:
        done: Done = await shadow.batcher.submit(inputs, rows, SHADOW_PRIORITY)
    except (Refusal, LeptonError, KeyError):
        shadow.shadowing.failed += 1
        return
    shadow.shadowing.compare(done.outputs, outputs)
