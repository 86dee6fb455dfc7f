"""A server to be run elsewhere, in many replicas: what is asked for, as plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from lepton_jax.errors import SettingError
from lepton_jax.launch.submit.job import LONGEST_NAME, Volume

PORT = 8000  # of the server inside its container
# Where a cluster's own storage puts an artifact that is named by a URI.
MODELS = PurePosixPath("/mnt/models")
URI = re.compile(r"[a-z][a-z0-9+.-]*://.+")

# Seconds for which a replica may finish what it has accepted; the server's own limit
# is shorter. Assumption: KServe's documentation says 60.
GRACE = 60
# Seconds between "do not send any more" and SIGTERM, in which load balancers hear of
# it. Assumption: the endpoints of a service follow within a few seconds.
PAUSE = 5
# Seconds until a replica has opened, compiled and warmed its models. Assumption: a
# large model with a ladder of ten sizes.
LONGEST_START = 600

# Share of its cores, or of its queue, above which a replica is joined by another one.
# Assumption: Kubernetes' own examples say 50 to 80 %.
TARGET_CPU = 70  # percent
TARGET_QUEUE = 32  # rows that wait, by replica


@dataclass(frozen=True)
class Deployment:
    """A server in many replicas.

    Attributes:
      name: a label of a host name.
      artifacts: paths as the replicas see them, or URIs that the cluster fetches; each
        may stand behind "NAME=", as `lepton serve` takes them.
      image: of the container; None: there is none, as on a Ray cluster.
      least: replicas when nobody asks.
      most: replicas under load.
      cpus: cores of a replica.
      memory: bytes of a replica; None: not said.
      gpus: of a replica.
      node: labels that its machine must have.
      volumes: folders that it sees.
      environment: variables.
      arguments: more of `lepton serve`, as they were typed.
      options: for the cluster's own client.
      made_by: the command line that made it; empty if it does not fit on a line.
    """

    name: str
    artifacts: tuple[str, ...]
    image: str | None = None
    least: int = 1
    most: int = 1
    cpus: int = 1
    memory: int | None = None
    gpus: int = 0
    node: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    made_by: str = ""

    @property
    def grows(self) -> bool:
        """Whether the count of replicas changes."""
        return self.most > self.least

    @property
    def platform(self) -> str:
        """The platform that JAX has to find there."""
        return "cuda" if self.gpus else "cpu"

    @property
    def scheme(self) -> str:
        """Protocol of the server's port: "HTTPS" with a certificate, else "HTTP"."""
        words = [word.partition("=")[0] for word in self.arguments]
        return "HTTPS" if "--tls-cert" in words else "HTTP"

    def command(self, artifacts: tuple[str, ...] | None = None) -> list[str]:
        """Return the command of a replica.

        Args:
          artifacts: where it finds them; None: as they were named.
        """
        return [
            "python3",
            "-m",
            "lepton_jax",
            "serve",
            *(self.artifacts if artifacts is None else artifacts),
            "--host=0.0.0.0",
            f"--port={PORT}",
            *self.arguments,
        ]


def path_of(artifact: str) -> str:
    """Return the path or URI of an artifact, without the "NAME=" before it."""
    name, sign, rest = artifact.partition("=")
    is_named = sign and re.fullmatch(r"[\w.-]+", name)
    return rest if is_named else artifact


def name_of(artifact: str) -> str:
    """Return a name for a server of an artifact: a label of a host name."""
    name, sign, _ = artifact.partition("=")
    stem = name if sign else PurePosixPath(path_of(artifact)).name
    stem = re.sub(r"\.(lepton|zip)$", "", re.sub(r"\.zip$", "", stem))
    label = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"model-{label}"
    return label[:LONGEST_NAME].strip("-")


def check_seen(deployment: Deployment) -> None:
    """Check that replicas can see the artifacts.

    Raises:
      SettingError: an artifact's path is relative, or a URI that nobody fetches.
    """
    for artifact in deployment.artifacts:
        path = path_of(artifact)
        if URI.fullmatch(path):
            raise SettingError(
                f"the artifact {path} is a URI, which a container does not fetch",
                where="command line, ARTIFACT",
                remedy=(
                    "mount it: --job-volume gs://BUCKET:/models:ro and"
                    " /models/NAME.lepton; or let KServe fetch it: --on kserve"
                ),
            )
        if not PurePosixPath(path).is_absolute():
            raise SettingError(
                f"the artifact {path} is a path of this machine",
                where="command line, ARTIFACT",
                remedy=(
                    "name the path that the replicas see, such as"
                    " /models/digits.lepton, on a volume (--job-volume"
                    " CLAIM:/models:ro) or in the image"
                ),
            )


def check_image(deployment: Deployment, place: str) -> str:
    """Return the image.

    Raises:
      SettingError: there is none.
    """
    if deployment.image is None:
        raise SettingError(
            f"--on {place} needs an image",
            where="command line, --job-image",
            remedy=(
                "build one (docs/kubernetes/serve.Dockerfile) and name it:"
                " --job-image IMAGE"
            ),
        )
    return deployment.image
