"""`launch.py RECIPE.py --on slurm|k8s|tpu|ssh:HOSTFILE`: a run on a cluster.

The text that starts the run there, a script or a manifest, is shown (--dry-run),
written to runs/, or handed to the cluster's own client (--submit). Each place has a
module with the same three names: `SUFFIX` of the file, `render(job)`, the text, and
`client(job, file)`, the command that submits it.
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
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lepton_jax.errors import SettingError, nearest
from lepton_jax.launch import tokens
from lepton_jax.launch.cluster import MOST_HOSTS
from lepton_jax.launch.options import reader
from lepton_jax.launch.submit import kubernetes, slurm, ssh, tpu
from lepton_jax.launch.submit.job import (
    RETRIES,
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
# options --job-... that every place understands
EVERYWHERE = {"name", "image", "volume", "env", "retries", "dir", "python", "option"}
# those that a place understands as well; others would be dropped without a word
TAKES = {
    "slurm": {"time", "cpus", "gpus", "memory", "setup"},
    "k8s": {"time", "cpus", "gpus", "memory", "topology", "slices", "node"},
    "k8s:job": {"time", "cpus", "gpus", "memory", "node"},
    "tpu": {"setup"},
    "ssh": {"gpus", "setup"},
}
LEAST = {
    "gpus": 0,
    "cpus": 1,
    "retries": 0,
    "slices": 1,
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
# assumptions: seconds for which the others wait for a host that is lost; Kubernetes
# replaces it, elsewhere all begin anew together
GRACE = {
    "k8s": 900,
    "k8s:job": 900,
    "slurm": 30,
    "tpu": 30,
    "ssh": 30,
}
STATUS = {0: "submitted", 130: "interrupted"}  # of an exit code; else "failed"


def add_options(group: Any) -> None:
    """Add --on, and the options that go with it, to an argparse group."""
    add = group.add_argument
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
    _add_machines(group)
    _add_software(group)


def _add_machines(group: Any) -> None:
    add = group.add_argument
    number = reader(int)
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


def _add_software(group: Any) -> None:
    add = group.add_argument
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
        type=reader(int),
        metavar="N",
        help=(
            "how often the hosts are started again after a failure that restarts of"
            f" their own don't fix (default: {RETRIES}); a mistake, exit code 2, is not"
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
    if options.on is None:
        _check_none_given(options)
        return False
    if options.dry_run and options.submit:
        raise SettingError(
            "--dry-run and --submit are both given",
            where="command line",
            remedy="leave out one of them",
        )
    for name in ("coordinator", "host_id", "go_on"):
        if _is_given(getattr(options, name)):
            raise SettingError(
                f"{_flag(name)} and --on are both given",
                where="command line",
                remedy="with --on the hosts are told by what starts them: leave it out",
            )
    return True


def _check_none_given(options: argparse.Namespace) -> None:
    """Raise SettingError for an option that makes no sense without --on."""
    for name, value in vars(options).items():
        goes_with_on = name.startswith("job_") or name in ("dry_run", "submit")
        if goes_with_on and _is_given(value):
            raise SettingError(
                f"{_flag(name)} is given without --on",
                where=f"command line, {_flag(name)}",
                remedy=(
                    "say where to start the run: --on slurm, k8s, tpu or ssh:HOSTFILE"
                ),
            )


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def start(
    options: argparse.Namespace,
    given: dict[str, Any],
    file: Path,
    folder: Path,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Show, write or submit the text that starts the run.

    Args:
      options: of launch.py.
      given: settings of the recipe that were typed.
      file: of the recipe.
      folder: of the run.
      arguments: of the command line, as they were typed.

    Returns:
      {"status", "file", "client"}, and "exit_code" if it was submitted.

    Raises:
      SettingError: an unknown place, an option that means nothing there, a client that
        is not installed or refuses.
    """
    place, detail = _place(options.on)
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
    script = Path("runs") / f"{job.name}{module.SUFFIX}"
    client = module.client(job, script)
    summary = {"file": str(script), "client": client}
    command = shlex.join(client)
    if options.dry_run:
        print(text, end="")
        print(
            f"would be written to {script}, and submitted by: {command}",
            file=sys.stderr,
        )
        return {"status": "shown", **summary}

    if options.submit and shutil.which(client[0]) is None:
        raise SettingError(
            f"{client[0]} is not installed here",
            where=f"--on {options.on} --submit",
            remedy=(
                f"install it, or leave out --submit and run this where it is: {command}"
            ),
        )
    _write(script, text, secret=job.token in text)
    if not options.submit:
        print(f"wrote {script}; submit it by: {command}")
        return {"status": "written", **summary}

    code = _submit(module, job, script, client)
    status = STATUS.get(code, "failed")
    if code == 0 and module in (ssh, tpu):
        status = "finished"  # their clients stay until the run is over
    return {"status": status, **summary, "exit_code": code}


def _place(on: str) -> tuple[str, str]:
    """Return the place that --on names, and what follows its colon.

    Without a colon that is the place itself.
    """
    if on in PLACES and on != "ssh":
        return on, on.rpartition(":")[2]
    place, _, detail = on.partition(":")
    if place == "ssh" and detail:
        return place, detail
    raise SettingError(
        f"--on is {on!r}{nearest(on, PLACES)}",
        where="command line, --on",
        remedy=(
            "write slurm, k8s, k8s:job, tpu or ssh:HOSTFILE; hardware to plan for"
            " goes to tools/plan.py"
        ),
    )


def _submit(
    module: ModuleType,
    job: Job,
    script: Path,
    client: list[str],
) -> int:
    """Hand the job to the cluster's client; return its exit code."""
    if module is ssh:
        return ssh.submit(job)
    print(f"wrote {script}; {shlex.join(client)}", file=sys.stderr, flush=True)
    code = subprocess.run(client, check=False, stdin=subprocess.DEVNULL).returncode
    if code and module is not tpu:
        raise SettingError(
            f"{client[0]} did not take the job: exit code {code}",
            where=script,
            remedy="its own message is above; fix that and submit again",
        )
    return code


def _write(
    file: Path,
    text: str,
    secret: bool,
) -> None:
    """Write the text that starts the run.

    Only its owner may read a file with the run's token.
    """
    try:
        file.parent.mkdir(exist_ok=True)
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
    except OSError as error:
        raise SettingError(
            f"the job can't be written: {error.strerror}",
            where=file,
            remedy="fix that, or see it by --dry-run",
        ) from error


# ---- the job ----


def _job(
    options: argparse.Namespace,
    place: str,
    detail: str,
    given: dict[str, Any],
    file: Path,
    folder: Path,
    arguments: Sequence[str],
) -> Job:
    """Return the job that a command line asks for; arguments as of `start`."""
    asked = {
        name.removeprefix("job_"): value
        for name, value in vars(options).items()
        if name.startswith("job_") and value is not None
    }
    _check_asked(asked, place)
    hosts = _hosts(options, place, asked)
    several = hosts > 1 or "topology" in asked or place in ("tpu", "ssh")
    here = place in ("slurm", "ssh") and "image" not in asked

    typed = _typed(arguments)
    inside = _inside(options, typed)
    grace = GRACE[place]
    if "--grace" in typed:
        grace = math.ceil(options.grace)
    elif several:
        inside.append(f"--grace={grace}")

    python = asked.get("python", sys.executable if here else "python3")
    launch = [python, "-m", "lepton_jax", "launch", str(file)]
    run = [f"--run-dir={folder}", "--go-on"]
    made_by = ""
    if all(word.isprintable() for word in arguments):
        made_by = f"launch.py {shlex.join(arguments)}"
    job = Job(
        name=plain_name(asked.get("name"), folder.name),
        command=(
            *launch,
            *_flags(given),
            *run,
            *inside,
        ),
        run_dir=str(folder),
        made_by=made_by,
        detail=detail,
        hosts=hosts,
        retries=asked.get("retries", RETRIES),
        folder=asked.get("dir") or (os.getcwd() if here else None),
        grace=grace,
        goes_on_with_fewer=options.least_hosts is not None,
        token="" if options.dry_run else tokens.make(),
    )
    return _with_software(_with_machines(job, asked), asked)


def _with_machines(job: Job, asked: dict[str, Any]) -> Job:
    """Return the job with the machines that were asked for."""
    return replace(
        job,
        gpus=asked.get("gpus", 0),
        cpus=asked.get("cpus"),
        memory=read_size(asked.get("memory")),
        seconds=read_seconds(asked.get("time")),
        topology=asked.get("topology"),
        slices=asked.get("slices", 1),
        node=read_environment(asked.get("node", ()), "--job-node"),
    )


def _with_software(job: Job, asked: dict[str, Any]) -> Job:
    """Return the job with the image, folders and variables that were asked for."""
    return replace(
        job,
        image=asked.get("image"),
        volumes=tuple(read_volume(text) for text in asked.get("volume", ())),
        environment=read_environment(asked.get("env", ()), "--job-env"),
        setup=tuple(asked.get("setup", ())),
        options=tuple(asked.get("option", ())),
    )


def _check_asked(asked: dict[str, Any], place: str) -> None:
    """Raise SettingError for a --job option that means nothing, or is too small."""
    known = EVERYWHERE | TAKES[place]
    for name in asked.keys() - known:
        flags = ", ".join(f"--job-{other}" for other in sorted(known))
        raise SettingError(
            f"--job-{name} means nothing to --on {place}",
            where=f"command line, --job-{name}",
            remedy=f"leave it out; --on {place} takes {flags}",
        )
    for name, least in LEAST.items():
        if asked.get(name, least) < least:
            raise SettingError(
                f"--job-{name} is {asked[name]}",
                where=f"command line, --job-{name}",
                remedy=f"write a whole number from {least}",
            )


def _hosts(
    options: argparse.Namespace,
    place: str,
    asked: dict[str, Any],
) -> int:
    """Return the number of machines to ask for."""
    if options.hosts is None:
        return 1
    elsewhere = place in ("tpu", "ssh") or "topology" in asked
    is_number = options.hosts.isdecimal() and 0 < int(options.hosts) < MOST_HOSTS
    if elsewhere or not is_number:
        raise SettingError(
            f"--hosts is {options.hosts!r} with --on {options.on}",
            where="command line, --hosts",
            remedy=(
                "with slurm, and k8s without --job-topology, write how many"
                " machines to ask for; else leave it out"
            ),
        )
    return int(options.hosts)


def _flags(given: dict[str, Any]) -> list[str]:
    """Return the recipe's own settings as they would be typed.

    They are written with `=`, so that no value is taken for an option.
    """
    return [_setting_flag(name, value) for name, value in given.items()]


def _setting_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if value is None:
        return f"--{flag}=none"
    if isinstance(value, Path) and str(value).lower() == "none":
        return f"--{flag}=./{value}"  # a file of that name, not None
    return f"--{flag}={value}"


def _inside(options: argparse.Namespace, typed: set[str]) -> list[str]:
    """Return the options that were typed and that are for the hosts."""
    flags = []
    for name, value in vars(options).items():
        of_job = name in OUTSIDE or name.startswith(("job_", "setting:"))
        flag = _flag(name)
        if of_job or flag not in typed:
            continue
        if value is True:
            flags.append(flag)
        elif isinstance(value, list):
            flags += [f"{flag}={part}" for part in value]
        else:
            flags.append(f"{flag}={value}")
    return flags


def _typed(arguments: Sequence[str]) -> set[str]:
    """Return the names of the options that were typed."""
    return {
        word.partition("=")[0].replace("_", "-")
        for word in arguments
        if word.startswith("--")
    }
