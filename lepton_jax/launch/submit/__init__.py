"""`launch.py RECIPE.py --on slurm|k8s|tpu|ssh:HOSTFILE`: what starts the run there,
shown, written or submitted.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lepton_jax.errors import SettingError, nearest
from lepton_jax.launch import tokens
from lepton_jax.launch.options import reader
from lepton_jax.launch.submit import kubernetes, slurm, ssh, tpu
from lepton_jax.launch.submit.job import (
    Job,
    plain_name,
    read_environment,
    read_seconds,
    read_size,
    read_volume,
)

PLACES: dict[str, ModuleType] = {
    "slurm": slurm,
    "k8s": kubernetes,
    "k8s:job": kubernetes,
    "tpu": tpu,
    "ssh": ssh,
}
EVERYWHERE = {"name", "image", "volume", "env", "retries", "dir", "python", "option"}
# what else a place understands; anything else would be dropped without a word
TAKES = {
    "slurm": {"time", "cpus", "gpus", "memory", "setup"},
    "k8s": {"time", "cpus", "gpus", "memory", "topology", "slices", "node"},
    "k8s:job": {"time", "cpus", "gpus", "memory", "node"},
    "tpu": {"setup"},
    "ssh": {"gpus", "setup"},
}
# options of launch.py that are not for the hosts, or that they get anew; all others
# they get as they were typed
OUTSIDE = {
    "recipe",
    "help",
    "run_dir",
    "resume",
    "go_on",
    "hosts",
    "coordinator",
    "host_id",
    "on",
    "dry_run",
    "submit",
}
# seconds for which the others wait for a host that is lost: Kubernetes replaces it,
# elsewhere all begin anew together
GRACE = {
    "k8s": 900,
    "k8s:job": 900,
    "slurm": 30,
    "tpu": 30,
    "ssh": 30,
}


def add_options(group: Any) -> None:
    """Add --on and what goes with it."""
    add = group.add_argument
    number = reader(int)
    add(
        "--on",
        metavar="WHERE",
        help=(
            "start it on slurm, k8s (a JobSet), k8s:job (a plain indexed Job), tpu (a"
            " TPU VM that is there) or ssh:HOSTFILE (a host a line); without --submit"
            " what starts it is written to runs/. Not to be confused with the --on of"
            " tools/plan.py, which names hardware to plan for; here that is"
            " --job-topology"
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
        help="hand it to the cluster's own client: sbatch, kubectl, gcloud, ssh",
    )
    add(
        "--job-name",
        metavar="NAME",
        help="of the job (default: the run folder's); with --on tpu, the TPU VM's name",
    )
    add("--job-time", metavar="TIME", help="at most this long: 90m, 4h, 2d, 1-12:00:00")
    add(
        "--job-gpus",
        type=number,
        metavar="N",
        help="GPUs of each host",
    )
    add(
        "--job-cpus",
        type=number,
        metavar="N",
        help="CPU cores of each host",
    )
    add("--job-memory", metavar="SIZE", help="of each host: 64G, 1T")
    add(
        "--job-topology",
        metavar="TPU",
        help="k8s: a TPU slice as tools/plan.py --on names it, e.g. v5p:4x4x4",
    )
    add(
        "--job-slices",
        type=number,
        metavar="N",
        help="k8s: how many of these slices (default: 1)",
    )
    add(
        "--job-node",
        action="append",
        metavar="KEY=VALUE",
        help="k8s: a label that the nodes must have",
    )
    add(
        "--job-image",
        metavar="IMAGE",
        help="container image; SLURM needs pyxis for it, ssh and tpu docker",
    )
    add(
        "--job-volume",
        action="append",
        metavar="SOURCE:FOLDER[:ro]",
        help=(
            "mount a folder; with k8s the source is a "
            "persistent volume claim, gs://BUCKET, or a folder of the node"
        ),
    )
    add(
        "--job-env",
        action="append",
        metavar="NAME=VALUE",
        help="set an environment variable",
    )
    add(
        "--job-retries",
        type=number,
        metavar="N",
        help=(
            "how often the hosts are started again after a failure that they don't mend"
            " by restarts of their own (default: 3); a mistake, exit code 2, is not"
            " tried again"
        ),
    )
    add(
        "--job-dir",
        metavar="FOLDER",
        help=(
            "working folder there, from which the recipe and the run folder are named "
            "(default: this folder, for slurm and ssh; the image's)"
        ),
    )
    add(
        "--job-python",
        metavar="PYTHON",
        help=(
            "the interpreter there (default: this one for slurm and ssh without an"
            " image, else python3)"
        ),
    )
    add(
        "--job-setup",
        action="append",
        metavar="COMMAND",
        help="shell command before the run, e.g. `module load cuda`",
    )
    add(
        "--job-option",
        action="append",
        metavar="OPTION",
        help=(
            "passed on to sbatch (as #SBATCH), kubectl, gcloud or ssh, "
            "e.g. --job-option=--partition=gpu"
        ),
    )


def wanted(options: argparse.Namespace) -> bool:
    """Whether the run is to be started elsewhere.

    Raises:
      SettingError: options that only make sense then are given without --on, or
        contradict each other.
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(options).items()
        if (name.startswith("job_") or name in ("dry_run", "submit"))
        and value is not None
        and value is not False
    ]
    if options.on is None:
        if given:
            raise SettingError(
                f"{given[0]} is given without --on",
                where=f"command line, {given[0]}",
                remedy=(
                    "say where to start the run: --on slurm, k8s, tpu or ssh:HOSTFILE"
                ),
            )
        return False
    if options.dry_run and options.submit:
        raise SettingError(
            "--dry-run and --submit are both given",
            where="command line",
            remedy="leave out one of them",
        )
    for name in ("coordinator", "host_id", "go_on"):
        value = getattr(options, name)
        if value is not None and value is not False:
            raise SettingError(
                f"--{name.replace('_', '-')} and --on are both given",
                where="command line",
                remedy="with --on the hosts are told by what starts them: leave it out",
            )
    return True


def start(
    options: argparse.Namespace,
    given: dict[str, Any],
    file: Path,
    folder: Path,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Show, write or submit what starts the run; returns what was done.

    Raises:
      SettingError: an unknown place, an option that means nothing there, a client that
        is not installed or refuses.
    """
    place, _, detail = options.on.partition(":")
    place = options.on if options.on in PLACES else place
    if place not in PLACES or (place == "ssh") != bool(detail and place != options.on):
        raise SettingError(
            f"--on is {options.on!r}{nearest(options.on, PLACES)}",
            where="command line, --on",
            remedy=(
                "write slurm, k8s, k8s:job, tpu or ssh:HOSTFILE; hardware to plan for"
                " goes to tools/plan.py"
            ),
        )
    job = _job(
        options,
        place,
        detail,
        given,
        file,
        folder,
        arguments,
    )
    module = PLACES[place]
    text = module.render(job)
    kept = Path("runs") / f"{job.name}{module.SUFFIX}"
    client = module.client(job, kept)
    if options.dry_run:
        print(text, end="")
        print(
            f"would be written to {kept}, and submitted by: {shlex.join(client)}",
            file=sys.stderr,
        )
        return {
            "status": "shown",
            "file": str(kept),
            "client": client,
        }
    if options.submit and shutil.which(client[0]) is None:
        raise SettingError(
            f"{client[0]} is not installed here",
            where=f"--on {options.on} --submit",
            remedy=(
                "install it, or leave out --submit and run this where it is:"
                f" {shlex.join(client)}"
            ),
        )
    try:
        kept.parent.mkdir(exist_ok=True)
        _write(kept, text, secret=job.token in text)
    except OSError as error:
        raise SettingError(
            f"the job can't be written: {error.strerror}",
            where=kept,
            remedy="mend that, or see it by --dry-run",
        ) from error
    if not options.submit:
        print(f"wrote {kept}; submit it by: {shlex.join(client)}")
        return {
            "status": "written",
            "file": str(kept),
            "client": client,
        }
    if module is ssh:
        code = ssh.submit(job)
    else:
        print(f"wrote {kept}; {shlex.join(client)}", file=sys.stderr, flush=True)
        code = subprocess.run(client, check=False, stdin=subprocess.DEVNULL).returncode
        if code and module is not tpu:
            raise SettingError(
                f"{client[0]} did not take the job: exit code {code}",
                where=kept,
                remedy="its own message is above; mend that and submit again",
            )
    attached = module in (ssh, tpu)
    status = {0: "finished" if attached else "submitted", 130: "interrupted"}.get(
        code, "failed"
    )
    return {
        "status": status,
        "file": str(kept),
        "client": client,
        "exit_code": code,
    }


def _write(
    file: Path,
    text: str,
    secret: bool,
) -> None:
    """Write what starts the run; what holds the run's token is its owner's alone."""
    file.unlink(missing_ok=True)  # an earlier one may be open to others
    number = os.open(
        file,
        os.O_WRONLY | os.O_CREAT | os.O_EXCL,
        0o600,
    )
    with open(number, "w", encoding="utf-8") as stream:
        stream.write(text)
    if not secret:
        file.chmod(0o755 if text.startswith("#!") else 0o644)


def _job(
    options: argparse.Namespace,
    place: str,
    detail: str,
    given: dict[str, Any],
    file: Path,
    folder: Path,
    arguments: Sequence[str],
) -> Job:
    said = {
        name.removeprefix("job_"): value
        for name, value in vars(options).items()
        if name.startswith("job_") and value is not None
    }
    for name in said.keys() - EVERYWHERE - TAKES[place]:
        raise SettingError(
            f"--job-{name} means nothing to --on {place}",
            where=f"command line, --job-{name}",
            remedy=(
                f"leave it out; --on {place} takes "
                f"{', '.join('--job-' + each for each in sorted(EVERYWHERE | TAKES[place]))}"
            ),
        )
    for name, least in (("gpus", 0), ("cpus", 1), ("retries", 0), ("slices", 1)):
        if said.get(name, least) < least:
            raise SettingError(
                f"--job-{name} is {said[name]}",
                where=f"command line, --job-{name}",
                remedy=f"write a whole number from {least}",
            )
    hosts = 1
    if options.hosts is not None:
        if (
            place in ("tpu", "ssh")
            or "topology" in said
            or not options.hosts.isdecimal()
            or not 0 < int(options.hosts) < 65536
        ):
            raise SettingError(
                f"--hosts is {options.hosts!r} with --on {options.on}",
                where="command line, --hosts",
                remedy=(
                    "with slurm, and k8s without --job-topology, write how many"
                    " machines to ask for; else leave it out"
                ),
            )
        hosts = int(options.hosts)
    here = place in ("slurm", "ssh") and "image" not in said
    python = said.get("python", sys.executable if here else "python3")
    inside = _inside(options, arguments)
    grace = GRACE[place]
    if "--grace" in _typed(arguments):
        grace = math.ceil(options.grace)
    elif hosts > 1 or "topology" in said or place in ("tpu", "ssh"):
        inside.append(f"--grace={grace}")
    made = (
        f"launch.py {shlex.join(arguments)}"
        if all(each.isprintable() for each in arguments)
        else ""
    )
    return Job(
        name=plain_name(said.get("name"), folder.name),
        made_by=made,
        detail=detail or place,
        run_dir=str(folder),
        hosts=hosts,
        command=(
            python,
            "-m",
            "lepton_jax",
            "launch",
            str(file),
            *_flags(given),
            f"--run-dir={folder}",
            "--go-on",
            *inside,
        ),
        gpus=said.get("gpus", 0),
        cpus=said.get("cpus"),
        memory=read_size(said.get("memory")),
        seconds=read_seconds(said.get("time")),
        topology=said.get("topology"),
        slices=said.get("slices", 1),
        node=read_environment(said.get("node", ()), "--job-node"),
        image=said.get("image"),
        volumes=tuple(read_volume(each) for each in said.get("volume", ())),
        environment=read_environment(said.get("env", ()), "--job-env"),
        retries=said.get("retries", 3),
        folder=said.get("dir") or (os.getcwd() if here else None),
        setup=tuple(said.get("setup", ())),
        options=tuple(said.get("option", ())),
        grace=grace,
        goes_on_with_fewer=options.least_hosts is not None,
        token="" if options.dry_run else tokens.make(),
    )


def _flags(given: dict[str, Any]) -> list[str]:
    """The recipe's own settings as they would be typed; with `=`, so that no value is
    taken for an option.
    """
    flags = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            # a file of that name, not nothing
            named_none = isinstance(value, Path) and str(value).lower() == "none"
            flags.append(
                f"--{flag}={'none' if value is None else f'./{value}' if named_none else value}"
            )
    return flags


def _inside(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """The options for the hosts that were typed."""
    flags = []
    typed = _typed(arguments)
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if (
            name in OUTSIDE
            or name.startswith(("job_", "setting:"))
            or flag not in typed
        ):
            continue
        flags += (
            [flag]
            if value is True
            else [
                f"{flag}={each}"
                for each in (value if isinstance(value, list) else [value])
            ]
        )
    return flags


def _typed(arguments: Sequence[str]) -> set[str]:
    return {
        each.partition("=")[0].replace("_", "-")
        for each in arguments
        if each.startswith("--")
    }
