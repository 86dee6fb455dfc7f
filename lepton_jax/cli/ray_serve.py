"""The server of artifacts as a Ray Serve application: many replicas on a cluster.

A configuration names it (`lepton serve ARTIFACT --on ray` writes one), and Ray calls
`application` with the artifacts and the words that `lepton serve` would take:

    import_path: lepton_jax.cli.ray_serve:application
    args: {artifacts: [/models/digits.lepton], arguments: ["--queue=512"]}

A replica is the same server as anywhere else, without its socket: Ray's proxies take
the requests, and hand each to one of two replicas, the less busy one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lepton_jax.ship.extras import needs
from lepton_jax.ship.scale.ray_config import REPLICA

PURPOSE = "lepton serve --on ray"


def application(args: Mapping[str, Any]) -> Any:
    """Return the application, as Ray's configurations ask for one.

    Args:
      args: "artifacts": as every node sees them; "arguments": more words of the command
        line of `lepton serve`.

    Raises:
      MissingExtraError: Ray Serve is not installed.
    """
    serve: Any = needs("ray.serve", extra="rayserve", purpose=PURPOSE)

    class Replica:
        """A server of artifacts, without its socket."""

        # Ray waits for it, which no type says
        async def __init__(  # type: ignore[misc]
            self,
            artifacts: Sequence[str],
            arguments: Sequence[str],
        ) -> None:
            self.application = await loaded(artifacts, arguments)

        def __serve_build_asgi_app__(self) -> Any:
            return self.application

        def check_health(self) -> None:
            """Tell Ray whether to replace this replica."""
            assert self.application.is_ready, "the models are gone"

        def __del__(self) -> None:
            built = getattr(self, "application", None)
            if built is not None:
                close(built)

    deployment = serve.deployment(name=REPLICA)(serve.ingress()(Replica))
    return deployment.bind(
        list(args["artifacts"]),
        list(args.get("arguments", ())),
    )


async def loaded(artifacts: Sequence[str], arguments: Sequence[str]) -> Any:
    """Return the server's ASGI application with its models, warm.

    Args:
      artifacts: as on the command line.
      arguments: likewise.

    Raises:
      LeptonError: an artifact can't be opened or served, or an argument is wrong.
    """
    # only here: Ray imports this module on nodes that serve nothing
    from lepton_jax.cli import serve
    from lepton_jax.ship.serve.application import Phase
    from lepton_jax.ship.serve.serving import Loader, build

    options = serve.parsed([*artifacts, *arguments])
    names = dict(serve.named(text) for text in options.artifacts)
    open_artifact = partial(serve.opened, names)
    built = build(serve.options_of(options), open_artifact)
    await Loader(built.models, list(names), open_artifact)()
    built.phase = Phase.READY
    built.meter.ready(True)
    return built


def close(built: Any) -> None:
    """Let go of an application's threads."""
    built.answering.close()
    built.models.close()
    built.meter.close()
