"""All parts of a server put together: `serve(artifacts, options)`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lepton_jax.errors import SettingError
from lepton_jax.ship.serve import page
from lepton_jax.ship.serve.answering import Answer, Answering
from lepton_jax.ship.serve.application import Application, Call, Handler
from lepton_jax.ship.serve.batcher import Limits
from lepton_jax.ship.serve.guards import Guards
from lepton_jax.ship.serve.models import Canary, Models
from lepton_jax.ship.serve.repository import Repository
from lepton_jax.ship.serve.server import (
    Listening,
    Server,
    check_tls,
    listen,
)
from lepton_jax.ship.serve.warming import StoppedError

MOST_ROWS = 1024  # of a request (assumption)
FAILED = 2  # exit code: the user can fix it
FORCED = 130  # exit code of a second Ctrl-C

log = logging.getLogger("lepton.serve")


@dataclass(frozen=True)
class Options:
    """How artifacts are served.

    Attributes:
      listening: where, and how it ends.
      limits: of each model's queue.
      guards: of messages.
      sizes: to compile; empty: doubling, for as long as it pays.
      most_rows: of a request.
      canaries: by model.
      shadows: versions by model.
      meter: of `ship.watch`; None: nothing is measured.
      say: prints a line for the person who started the server.
    """

    listening: Listening = field(default_factory=Listening)
    limits: Limits = field(default_factory=Limits)
    guards: Guards = field(default_factory=Guards)
    sizes: tuple[int, ...] = ()
    most_rows: int = MOST_ROWS
    canaries: dict[str, Canary] = field(default_factory=dict)
    shadows: dict[str, str] = field(default_factory=dict)
    meter: Any = None
    say: Callable[[str], None] = print


def serve(
    places: Sequence[Path],
    open_artifact: Callable[[Path], Any],
    options: Options,
) -> int:
    """Serve artifacts until a signal ends it.

    Args:
      places: of the artifacts.
      open_artifact: opens one.
      options: see there.

    Returns:
      The exit code.

    Raises:
      LeptonError: an artifact can't be opened or served, or the port can't be had.
    """
    check_tls(options.listening)
    listener = listen(options.listening)
    # A program of the CPU then runs in the thread that calls it: waking another one
    # takes 30 to 50 microseconds, a third of a small model's time (jax 0.10.2;
    # python -m tools.bench serve).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    port = listener.getsockname()[1]

    application = build(options, open_artifact)
    loader = Loader(application.models, places, open_artifact)
    server = Server(application, options.listening, listener, loader)
    scheme = "http" if options.listening.certificate is None else "https"
    host = options.listening.host
    loader.done = lambda: options.say(
        f"ready: {scheme}://{host}:{port}/ serves {_names(application.models)}"
    )
    options.say(f"listening on {scheme}://{host}:{port}/, loading")
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure
    return FORCED if server.force_exit else 0


def build(
    options: Options,
    open_artifact: Callable[[Path], Any],
) -> Application:
    """Return the application, which has no models yet."""
    models = Models(options.limits, options.sizes, options.meter)
    models.canaries.update(options.canaries)
    models.shadows.update(options.shadows)
    repository = Repository(models, options.guards, open_artifact)
    most_rows = min(options.most_rows, options.limits.waiting)
    return Application(
        models,
        Answering(models, most_rows),
        options.guards,
        {
            **page.handlers(models),
            **repository.handlers(),
            **_metrics(options.meter, models),
        },
        _Documents(),
        options.meter,
    )


class Loader:
    """Loads the artifacts: all at first, those that have changed when called again.

    Args:
      models: of the server.
      places: of the artifacts.
      open_artifact: opens one.
    """

    def __init__(
        self,
        models: Models,
        places: Sequence[Path],
        open_artifact: Callable[[Path], Any],
    ):
        self.done: Callable[[], None] = lambda: None
        self._models = models
        self._places = places
        self._open = open_artifact
        self._stamps: dict[Path, Any] = {}

    async def __call__(self) -> None:
        """Load what is new.

        Raises:
          LeptonError: an artifact can't be opened or served.
        """
        loop = asyncio.get_running_loop()
        opened = []
        for place in self._places:
            stamp = _stamp(place)
            if place in self._stamps and self._stamps[place] == stamp:
                continue
            artifact = await loop.run_in_executor(None, self._open, place)
            opened.append((artifact, place, stamp))
        _check_apart([artifact for artifact, _, _ in opened])
        # all are expected from now on, so that nobody is told that there is no such
        # model
        loads = [self._models.load(artifact, place) for artifact, place, _ in opened]
        try:
            await asyncio.gather(*loads)
        except StoppedError as error:
            raise asyncio.CancelledError from error
        self._stamps.update({place: stamp for _, place, stamp in opened})
        self.done()


class _Documents:
    """The description, made when somebody first asks for it: FastAPI takes a while."""

    def __init__(self) -> None:
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            from lepton_jax.ship.serve.documents import documents

            self._app = documents()
        await self._app(scope, receive, send)


def _metrics(meter: Any, models: Models) -> dict[tuple[str, str], Handler]:
    """Return the handler of Prometheus' metrics, if there are any."""
    if meter is None:
        return {}

    async def metrics(call: Call) -> Answer:
        models.afterwards.flush()
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(None, meter.text)
        return Answer(text.encode(), b"text/plain; version=0.0.4; charset=utf-8")

    return {("GET", "/metrics"): metrics}


def _stamp(place: Path) -> Any:
    """Return what changes when an artifact is replaced; None: it can't be looked at."""
    file = place / "manifest.json" if place.is_dir() else place
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _check_apart(artifacts: Sequence[Any]) -> None:
    """Check that no two artifacts are the same version of the same model.

    Raises:
      SettingError: two are.
    """
    seen = set()
    for artifact in artifacts:
        key = (artifact.manifest.name, str(artifact.manifest.version))
        if key in seen:
            raise SettingError(
                f"two artifacts are version {key[1]} of the model {key[0]!r}",
                where="command line",
                remedy="give one of them another name or version when you export it",
            )
        seen.add(key)


def _names(models: Models) -> str:
    """Return what is served, with how it was proved, as a sentence."""
    parts = []
    for served in models.all():
        sizes = served.batcher.ladder.sizes
        text = f"{served.name} {served.version} in batches of {sizes[0]} to {sizes[-1]}"
        if served.warm.difference is not None:
            text += (
                f", within {served.warm.difference:.1g} of the trainer's outputs on"
                f" {served.warm.rows} rows"
            )
        parts.append(text)
    return "; ".join(parts)
