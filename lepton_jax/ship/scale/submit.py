"""`lepton serve ARTIFACT --on k8s|kserve|ray`: a server on a cluster.

What starts it there is shown (--dry-run), written to runs/, or handed to the cluster's
own client (--submit). Each place has a module with the same three names: `SUFFIX` of
the file, `render(deployment)`, its text, and `client(deployment, file)`, the command
that submits it.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lepton_jax.errors import SettingError, nearest, writing_remedy
from lepton_jax.launch.options import reader
from lepton_jax.launch.submit.job import (
    plain_name,
    read_environment,
    read_size,
    read_volume,
)
from lepton_jax.ship.scale import kserve, kubernetes, ray_config
from lepton_jax.ship.scale.deployment import Deployment, name_of

LOCAL = "local"
PLACES: dict[str, ModuleType] = {
    "k8s": kubernetes,
    "kserve": kserve,
    "ray": ray_config,
}
FOLDER = Path("runs")  # of what is written without --dry-run
REPLICAS = re.compile(r"(\d{1,6})(?::(\d{1,6}))?")
LEAST = {"gpus": 0, "cpus": 1}


def add_options(group: Any) -> None:
    """Add --on, and the options that go with it, to an argparse group."""
    add = group.add_argument
    add(
        "--on",
        metavar="local|k8s|kserve|ray",
        default=LOCAL,
        help=(
            "serve in this process (local), or in many replicas on Kubernetes, KServe"
            " or a Ray cluster; without --submit what starts them is written to runs/"
        ),
    )
    add(
        "--dry-run",
        action="store_true",
        help="only show it, on standard output; write nothing",
    )
    add(
        "--submit",
        action="store_true",
        help="hand it to the cluster's own client: kubectl, serve",
    )
    add(
        "--replicas",
        metavar="N[:MOST]",
        help="replicas, or the least and the most of them (default: 1)",
    )
    add("--job-name", metavar="NAME", help="of the service (default: the artifact's)")
    add("--job-image", metavar="IMAGE", help="container image (k8s, kserve)")
    _add_machines(add)


def _add_machines(add: Any) -> None:
    add(
        "--job-cpus",
        type=reader(int),
        metavar="N",
        help="cores of a replica (default: 1)",
    )
    add("--job-memory", metavar="SIZE", help="of a replica: 4G")
    add("--job-gpus", type=reader(int), metavar="N", help="GPUs of a replica")
    add(
        "--job-node",
        action="append",
        metavar="KEY=VALUE",
        help="a label that the nodes must have (k8s, kserve)",
    )
    add(
        "--job-volume",
        action="append",
        metavar="SOURCE:FOLDER[:ro]",
        help=(
            "mount a persistent volume claim, gs://BUCKET, or a folder of the node"
            " (k8s, kserve)"
        ),
    )
    add(
        "--job-env",
        action="append",
        metavar="NAME=VALUE",
        help="set an environment variable",
    )
    add(
        "--job-option",
        action="append",
        metavar="OPTION",
        help="passed on to kubectl or serve, e.g. --job-option=--namespace=models",
    )


def wanted(options: argparse.Namespace) -> bool:
    """Whether the server is to run elsewhere.

    Raises:
      SettingError: options that only make sense then are given without --on, or
        contradict each other.
    """
    if options.on == LOCAL:
        _check_none_given(options)
        return False
    if options.dry_run and options.submit:
        raise SettingError(
            "--dry-run and --submit are both given",
            where="command line",
            remedy="leave out one of them",
        )
    if options.on not in PLACES:
        places = (LOCAL, *PLACES)
        raise SettingError(
            f"--on is {options.on!r}{nearest(options.on, places)}",
            where="command line, --on",
            remedy=f"write one of {', '.join(places)}",
        )
    return True


def inside(words: Sequence[str], artifacts: Sequence[str]) -> list[str]:
    """Return the words of a command line that are for each replica.

    Args:
      words: of the command line.
      artifacts: those that it names; they are given to replicas by `start`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--host")  # a replica's own are known
    parser.add_argument("--port")
    _, rest = parser.parse_known_args(list(words))
    for artifact in artifacts:
        rest.remove(artifact)
    return rest


def render(place: str, deployment: Deployment) -> str:
    """Return what starts a server on a cluster, as text.

    Args:
      place: "k8s", "kserve" or "ray".
      deployment: the request.

    Raises:
      SettingError: it can't run there.
    """
    return str(PLACES[place].render(deployment))


def start(
    options: argparse.Namespace,
    artifacts: Sequence[str],
    arguments: Sequence[str] = (),
) -> int:
    """Show, write or submit what starts a server.

    Args:
      options: those of `add_options`.
      artifacts: as they were typed.
      arguments: of `lepton serve`, for each replica, as words of its command line.

    Returns:
      The exit code: 0.

    Raises:
      SettingError: an option means nothing there, or a client is not installed or
        refuses.
    """
    deployment = deployment_of(options, artifacts, arguments)
    module = PLACES[options.on]
    text = render(options.on, deployment)
    file = FOLDER / f"{deployment.name}-{options.on}{module.SUFFIX}"
    client = module.client(deployment, file)
    command = shlex.join(client)
    if options.dry_run:
        print(text, end="")
        print(
            f"would be written to {file}, and submitted by: {command}", file=sys.stderr
        )
        return 0
    if options.submit:
        _check_installed(client[0], options.on, command)
    _write(file, text)
    if not options.submit:
        print(f"wrote {file}; submit it by: {command}")
        return 0
    _submit(client, file)
    return 0


def deployment_of(
    options: argparse.Namespace,
    artifacts: Sequence[str],
    arguments: Sequence[str] = (),
) -> Deployment:
    """Return the request that a command line makes; arguments as of `start`.

    Raises:
      SettingError: a value can't be what it should be.
    """
    least, most = read_replicas(options.replicas)
    for name, smallest in LEAST.items():
        value = getattr(options, f"job_{name}")
        if value is not None and value < smallest:
            raise SettingError(
                f"--job-{name} is {value}",
                where=f"command line, --job-{name}",
                remedy=f"write a whole number from {smallest}",
            )
    words = ["lepton", "serve", *artifacts, f"--on={options.on}", *arguments]
    made_by = shlex.join(words)
    return Deployment(
        name=plain_name(options.job_name, name_of(artifacts[0])),
        artifacts=tuple(artifacts),
        image=options.job_image,
        least=least,
        most=most,
        cpus=options.job_cpus or 1,
        memory=read_size(options.job_memory),
        gpus=options.job_gpus or 0,
        node=read_environment(options.job_node or (), "--job-node"),
        volumes=tuple(read_volume(text) for text in options.job_volume or ()),
        environment=read_environment(options.job_env or (), "--job-env"),
        arguments=tuple(arguments),
        options=tuple(options.job_option or ()),
        made_by=made_by if made_by.isprintable() else "",
    )


def read_replicas(text: str | None) -> tuple[int, int]:
    """Return the least and the most replicas.

    >>> read_replicas("3"), read_replicas("2:10"), read_replicas(None)
    ((3, 3), (2, 10), (1, 1))
    """
    if text is None:
        return 1, 1
    match = REPLICAS.fullmatch(text)
    least = int(match[1]) if match else 0
    most = int(match[2] or least) if match else 0
    if not 1 <= least <= most:
        raise SettingError(
            f"--replicas is {text!r}",
            where="command line, --replicas",
            remedy="write 3, or 2:10 for two to ten",
        )
    return least, most


# ---- internals ----


def _check_none_given(options: argparse.Namespace) -> None:
    """Raise SettingError for an option that makes no sense without --on."""
    for name, value in vars(options).items():
        goes_with_on = name.startswith("job_") or name in (
            "dry_run",
            "submit",
            "replicas",
        )
        if goes_with_on and value not in (None, False):
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(
                f"{flag} is given without --on",
                where=f"command line, {flag}",
                remedy=f"say where to serve: --on {', '.join(PLACES)}",
            )


def _check_installed(
    name: str,
    place: str,
    command: str,
) -> None:
    if shutil.which(name) is None:
        raise SettingError(
            f"{name} is not installed here",
            where=f"--on {place} --submit",
            remedy=(
                f"install it, or leave out --submit and run this where it is: {command}"
            ),
        )


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingError(
            f"it can't be written: {error.strerror or error}",
            where=file,
            remedy=f"{writing_remedy(error)}, or see it by --dry-run",
        ) from error


def _submit(client: list[str], file: Path) -> None:
    """Hand the file to the cluster's client."""
    print(f"wrote {file}; {shlex.join(client)}", file=sys.stderr, flush=True)
    code = subprocess.run(client, check=False, stdin=subprocess.DEVNULL).returncode
    if code:
        raise SettingError(
            f"{client[0]} did not take it: exit code {code}",
            where=file,
            remedy="its own message is above; fix that and submit again",
        )
