"""A run to be started elsewhere, and the pieces that shell scripts for it have in
common.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lepton_jax.errors import SettingError
from lepton_jax.launch import tokens

UNITS = {
    "s": 1,
    "m": 60,
    "h": 3600,
    "d": 86400,
}
SIZES = {
    "": 1,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}
MISTAKE = 2  # launch.py's exit code for what trying again does not mend
# Kubernetes adds indices to it, within the 63 characters of a host name
LONGEST_NAME = 40
PAUSE = 10  # seconds between attempts
# a token of its own for each start, which stands in no file and in nobody's command
# line
NEW_TOKEN = "$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
WHY_TOKEN = "# by which the hosts know each other; docs/clusters.md"


@dataclass(frozen=True)
class Volume:
    """`source` of the cluster, seen as `folder` by the run."""

    source: str
    folder: str
    read_only: bool = False


@dataclass(frozen=True)
class Job:
    """What is asked of a cluster.

    Args:
      name: of the job; a label of a host name.
      command: what every host runs.
      run_dir: the run's folder, as the hosts see it.
      made_by: the command line that made it; empty if it does not fit on a line.
      detail: what follows the colon of --on, else the place itself.
      hosts: how many.
      gpus, cpus, memory: of each host; memory in bytes.
      seconds: the time limit.
      topology, slices: TPU slices, as `lepton_jax.topology` names them.
      node: labels of the nodes.
      environment: variables of the user's, which go before ours.
      retries: how often to go on after a failure.
      folder: the working folder; None: the image's, or the home.
      setup: shell commands before the run.
      options: for the cluster's own client.
      grace: seconds that the hosts wait for one of them that is lost.
      goes_on_with_fewer: than all hosts, should some be lost for longer.
      token: by which the hosts know each other, where what is written must hold it.
    """

    name: str
    command: tuple[str, ...]
    run_dir: str
    made_by: str = ""
    detail: str = ""
    hosts: int = 1
    gpus: int = 0
    cpus: int | None = None
    memory: int | None = None
    seconds: int | None = None
    topology: str | None = None
    slices: int = 1
    node: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    volumes: tuple[Volume, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    retries: int = 3
    folder: str | None = None
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    grace: int = 30
    goes_on_with_fewer: bool = False
    token: str = field(default="", repr=False)

    def variables(
        self,
        chips: str | None = None,
    ) -> dict[str, tuple[str, str]]:
        """Environment variables with the reason for each; `chips`: the platform that
        must be there, "cuda" or "tpu".
        """
        ours = {
            "PYTHONUNBUFFERED": (
                "1",
                "the log holds what a host that was killed wrote last",
            )
        }
        if chips:
            ours["JAX_PLATFORMS"] = (
                f"{chips},cpu",
                "a host whose chips fail ends, instead of training on its CPU",
            )
        return ours | {name: (value, "") for name, value in self.environment.items()}


def exports(variables: Mapping[str, tuple[str, str]]) -> list[str]:
    """Lines of a shell script, each reason above its variable."""
    lines = []
    for name, (value, why) in variables.items():
        lines += [f"# {why}"] if why else []
        lines.append(f"export {name}={shlex.quote(value)}")
    return lines


def heading(job: Job) -> list[str]:
    return [f"# {job.made_by}"] if job.made_by else []


def retrying(command: str, retries: int) -> list[str]:
    """Lines of a shell script that run a command, and again after a failure; its exit
    code is the last one's.
    """
    if not retries:
        return [f"exec {command}"]
    return [
        (
            "# again after a failure, from the last checkpoint; 2 is a mistake that"
            " stays one, 130 and 143 were asked for"
        ),
        "attempt=0 asked=",
        (
            "trap 'asked=yes' TERM  # nor again when the end was asked for; until then"
            " this waits for what the hosts save"
        ),
        "while :; do",
        "    code=0",
        f"    {command} || code=$?",
        f"    case $asked$code in yes* | 0 | {MISTAKE} | 130 | 143) break ;; esac",
        "    attempt=$((attempt + 1))",
        f'    if [ "$attempt" -gt {retries} ]; then break; fi',
        f'    echo "exit code $code: going on, attempt $attempt of {retries}" >&2',
        f"    sleep {PAUSE}",
        "done",
        'exit "$code"',
    ]


def contained(
    job: Job,
    command: Sequence[str],
    variables: Mapping[str, tuple[str, str]],
    *,
    privileged: bool,
    with_token: bool,
) -> list[str]:
    """The command in a container of docker's, on the host's own network: the hosts must
    reach each other.
    """
    assert job.image is not None
    made = ["docker", "run", "--rm", "--init", "--net=host", "--ipc=host"]
    if privileged:
        sudo = ["sudo", *([f"--preserve-env={tokens.VARIABLE}"] if with_token else [])]
        made = [*sudo, *made, "--privileged"]  # a TPU's devices
    if job.gpus:
        made.append("--gpus=all")
    for each in job.volumes:
        made.append(
            f"--volume={each.source}:{each.folder}{':ro' if each.read_only else ''}"
        )
    made += [f"--env={name}={value}" for name, (value, _) in variables.items()]
    if with_token:
        # its value out of docker's own environment
        made.append(f"--env={tokens.VARIABLE}")
    made += [f"--workdir={job.folder}"] if job.folder else []
    return [*made, job.image, *command]


def plain_name(asked: str | None, folder: str) -> str:
    """The job's name, checked; without one, the run folder's as far as it is one.

    Raises:
      SettingError: it is no label of a host name, or too long.
    """
    if asked is None:
        made = re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")
        made = made if made[:1].isalpha() else f"run-{made}"
        return made[:LONGEST_NAME].strip("-")
    if (
        not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", asked)
        or len(asked) > LONGEST_NAME
    ):
        raise SettingError(
            f"--job-name is {asked!r}",
            where="command line, --job-name",
            remedy=(
                f"write at most {LONGEST_NAME} small letters, digits and hyphens, a"
                " letter first"
            ),
        )
    return asked


def read_seconds(text: str | None) -> int | None:
    """90m, 4h, 2d, 04:00:00 or 1-12:00:00 in seconds."""
    if text is None:
        return None
    if match := re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII):
        seconds = int(match[1]) * UNITS[match[2]]
    elif match := re.fullmatch(
        r"(?:(\d{1,4})-)?(\d{1,4}):([0-5]?\d):([0-5]?\d)", text, re.ASCII
    ):
        days, hours, minutes, rest = (int(each or 0) for each in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    else:
        seconds = 0
    if not seconds:
        raise SettingError(
            f"--job-time is {text!r}",
            where="command line, --job-time",
            remedy="write 90m, 4h, 2d, 04:00:00 or 1-12:00:00",
        )
    return seconds


def read_size(text: str | None) -> int | None:
    """64G in bytes."""
    if text is None:
        return None
    match = re.fullmatch(
        r"(\d{1,9})([KMGT]?)(?:i?B)?",
        text,
        re.ASCII | re.IGNORECASE,
    )
    size = int(match[1]) * SIZES[match[2].upper()] if match else 0
    if size < 2**20:
        raise SettingError(
            f"--job-memory is {text!r}",
            where="command line, --job-memory",
            remedy="write 64G, 512G, 1T; at least 1M",
        )
    return size


def read_volume(text: str) -> Volume:
    """claim:/data, /scratch:/data:ro, gs://bucket:/data."""
    match = re.fullmatch(r"(.+?):(/[^:,]*)(?::(ro|rw))?", text)
    if not match or "," in match[1]:
        raise SettingError(
            f"--job-volume is {text!r}",
            where="command line, --job-volume",
            remedy="write SOURCE:/FOLDER or SOURCE:/FOLDER:ro, without commas",
        )
    return Volume(
        match[1],
        match[2],
        match[3] == "ro",
    )


def read_environment(texts: Iterable[str], option: str) -> dict[str, str]:
    """NAME=VALUE; a label's key may have dots, a slash and hyphens."""
    pattern = r"[A-Za-z_]\w*" if option == "--job-env" else r"[A-Za-z0-9][\w./-]*"
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if name == tokens.VARIABLE:
            raise SettingError(
                f"{option} names {name}, which would then be written where others"
                " read it",
                where=f"command line, {option}",
                remedy="leave it out: each job makes a token of its own",
            )
        if not sign or not re.fullmatch(pattern, name, re.ASCII):
            raise SettingError(
                f"{option} is {text!r}",
                where=f"command line, {option}",
                remedy="write NAME=VALUE",
            )
        found[name] = value
    return found
