"""A run to be started elsewhere, and the common pieces of its shell scripts."""

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
}  # seconds
SIZES = {
    "": 1,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}  # bytes
LEAST_MEMORY = 2**20  # bytes; SLURM and Kubernetes are told in MiB
MISTAKE = 2  # launch.py's exit code for a mistake, which trying again does not fix
# Kubernetes adds indices to it, within the 63 characters of a host name
LONGEST_NAME = 40
PAUSE = 10  # seconds between attempts (assumption)
RETRIES = 3  # after the first attempt (assumption)
# a token of its own for each start, which is in no file and on nobody's command line
NEW_TOKEN = "$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
WHY_TOKEN = "# by which the hosts know each other; docs/clusters.md"


@dataclass(frozen=True)
class Volume:
    """A folder that the run sees.

    Args:
      source: its name for the cluster: a folder, a claim or a bucket.
      folder: its path for the run.
      read_only: whether the run may only read it.
    """

    source: str
    folder: str
    read_only: bool = False

    def __str__(self) -> str:
        """Return it as docker and pyxis write it."""
        return f"{self.source}:{self.folder}{':ro' if self.read_only else ''}"


@dataclass(frozen=True)
class Job:
    """Request to a cluster.

    Args:
      name: of the job; a label of a host name.
      command: of every host.
      run_dir: the run's folder, as the hosts see it.
      made_by: the command line that made it; empty if it does not fit on a line.
      detail: the part of --on behind its colon, else the place itself.
      hosts: number of hosts.
      gpus: GPUs of each host.
      cpus: CPU cores of each host.
      memory: bytes of each host.
      seconds: the time limit.
      topology: TPU slice, as `lepton_jax.topology` names it.
      slices: number of these slices.
      node: labels of the nodes.
      image: of the container; None: none.
      volumes: folders that are mounted.
      environment: variables of the user's, which go before ours.
      retries: number of times to go on after a failure.
      folder: the working folder; None: the image's, or the home.
      setup: shell commands before the run.
      options: for the cluster's own client.
      grace: seconds that the hosts wait for one of them that is lost.
      goes_on_with_fewer: whether the run goes on without hosts that are lost for
        longer.
      token: by which the hosts know each other, where the script must hold it.
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
    retries: int = RETRIES
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
        """Return environment variables with the reason for each.

        Args:
          chips: the platform that must be there, "cuda" or "tpu"; None: any.
        """
        variables = {
            "PYTHONUNBUFFERED": (
                "1",
                "the log holds what a host that was killed wrote last",
            )
        }
        if chips:
            variables["JAX_PLATFORMS"] = (
                f"{chips},cpu",
                "a host whose chips fail ends, instead of training on its CPU",
            )
        for name, value in self.environment.items():
            variables[name] = (value, "")
        return variables


def exports(variables: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return lines of a shell script, each reason above its variable."""
    lines = []
    for name, (value, why) in variables.items():
        if why:
            lines.append(f"# {why}")
        lines.append(f"export {name}={shlex.quote(value)}")
    return lines


def without_reasons(
    variables: Mapping[str, tuple[str, str]],
) -> dict[str, tuple[str, str]]:
    """Return the variables for a script whose comments nobody would see."""
    return {name: (value, "") for name, (value, _) in variables.items()}


def heading(job: Job) -> list[str]:
    """Return the comment with the command line that made the script."""
    return [f"# {job.made_by}"] if job.made_by else []


def retrying(command: str, retries: int) -> list[str]:
    """Return lines of a shell script that run a command, and again after a failure.

    The script's exit code is that of the last attempt.
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
    """Return the command in a container of docker's.

    It uses the host's own network: the hosts must reach each other.

    Args:
      job: with an image.
      command: inside the container.
      variables: with a reason for each, which is left out.
      privileged: whether it needs the machine's devices, as a TPU does.
      with_token: whether it gets the run's token.
    """
    assert job.image is not None
    docker = ["docker", "run", "--rm", "--init", "--net=host", "--ipc=host"]
    if privileged:
        sudo = ["sudo"]
        if with_token:
            sudo.append(f"--preserve-env={tokens.VARIABLE}")
        docker = [*sudo, *docker, "--privileged"]
    if job.gpus:
        docker.append("--gpus=all")
    docker += [f"--volume={volume}" for volume in job.volumes]
    docker += [f"--env={name}={value}" for name, (value, _) in variables.items()]
    if with_token:
        # docker takes the value from its own environment
        docker.append(f"--env={tokens.VARIABLE}")
    if job.folder:
        docker.append(f"--workdir={job.folder}")
    return [*docker, job.image, *command]


# ---- options ----


def plain_name(asked: str | None, folder: str) -> str:
    """Return the job's name.

    Args:
      asked: that of --job-name; None: make one from the run folder's.
      folder: name of the run folder.

    Raises:
      SettingError: it is no label of a host name, or too long.
    """
    if asked is None:
        name = re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")
        if not name[:1].isalpha():
            name = f"run-{name}"
        return name[:LONGEST_NAME].strip("-")

    is_label = re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", asked)
    if not is_label or len(asked) > LONGEST_NAME:
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
    """Return the seconds of a time.

    >>> read_seconds("90m"), read_seconds("04:00:00"), read_seconds("1-12:00:00")
    (5400, 14400, 129600)
    """
    if text is None:
        return None

    seconds = 0
    if match := re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII):
        seconds = int(match[1]) * UNITS[match[2]]
    elif match := re.fullmatch(
        r"(?:(\d{1,4})-)?(\d{1,4}):([0-5]?\d):([0-5]?\d)", text, re.ASCII
    ):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not seconds:
        raise SettingError(
            f"--job-time is {text!r}",
            where="command line, --job-time",
            remedy="write 90m, 4h, 2d, 04:00:00 or 1-12:00:00",
        )
    return seconds


def read_size(text: str | None) -> int | None:
    """Return the bytes of a size.

    >>> read_size("64G")
    68719476736
    """
    if text is None:
        return None
    match = re.fullmatch(
        r"(\d{1,9})([KMGT]?)(?:i?B)?",
        text,
        re.ASCII | re.IGNORECASE,
    )
    size = 0
    if match:
        number, unit = match.groups()
        size = int(number) * SIZES[unit.upper()]
    if size < LEAST_MEMORY:
        raise SettingError(
            f"--job-memory is {text!r}",
            where="command line, --job-memory",
            remedy="write 64G, 512G, 1T; at least 1M",
        )
    return size


def read_volume(text: str) -> Volume:
    """Return the volume of "claim:/data", "/scratch:/data:ro", "gs://bucket:/data"."""
    match = re.fullmatch(r"(.+?):(/[^:,]*)(?::(ro|rw))?", text)
    if not match or "," in match[1]:
        raise SettingError(
            f"--job-volume is {text!r}",
            where="command line, --job-volume",
            remedy="write SOURCE:/FOLDER or SOURCE:/FOLDER:ro, without commas",
        )
    source, folder, mode = match.groups()
    return Volume(source, folder, read_only=mode == "ro")


def read_environment(texts: Iterable[str], option: str) -> dict[str, str]:
    """Return the values of texts like NAME=VALUE, by name.

    Args:
      texts: of the option.
      option: --job-env, or --job-node whose names may have dots, slashes and hyphens.
    """
    pattern = r"[A-Za-z_]\w*" if option == "--job-env" else r"[A-Za-z0-9][\w./-]*"
    values: dict[str, str] = {}
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
        values[name] = value
    return values
