"""Script for a TPU VM that exists: one command for all of its workers, by gcloud."""

from __future__ import annotations

import shlex
from pathlib import Path

from lepton_jax.launch import tokens
from lepton_jax.launch.submit.job import (
    NEW_TOKEN,
    WHY_TOKEN,
    Job,
    contained,
    exports,
    heading,
    retrying,
    without_reasons,
)

SUFFIX = ".tpu.sh"
GCLOUD = ("gcloud", "compute", "tpus", "tpu-vm")
# options that `tpu-vm ssh` takes and `tpu-vm scp` does not
OF_SSH_ALONE = ("--ssh-flag", "--output-directory", "--dry-run")


def client(job: Job, file: Path) -> list[str]:
    """Return the command that runs the script."""
    return ["bash", str(file)]


def render(job: Job) -> str:
    """Return a script for the workstation.

    The hosts find each other by the TPU's own metadata.
    """
    # every worker gets the same command, which ps would show: so the token goes ahead
    # in a file
    file = f".lepton-{job.name}.token"
    # a login shell of any kind must end where a line fails
    script = "\n".join(["set -e", *_inside(job, file)])
    remote = ["bash", "-c", script]
    command = [
        *GCLOUD,
        "ssh",
        job.name,
        "--worker=all",
        *job.options,
        f"--command={shlex.join(remote)}",
    ]
    lines = [
        "#!/bin/bash",
        *heading(job),
        "set -euo pipefail",
        *_send_token(job, file),
        *retrying(shlex.join(command), job.retries),
    ]
    return "\n".join(lines) + "\n"


def _inside(job: Job, file: str) -> list[str]:
    """Return the lines that each worker runs."""
    variables = job.variables("tpu")
    read = [f'{tokens.VARIABLE}=$(cat "$HOME/{file}")', f"export {tokens.VARIABLE}"]
    if job.image:
        command = contained(
            job, job.command, variables, privileged=True, with_token=True
        )
        return [*read, *job.setup, f"exec {shlex.join(command)}"]

    folder = [f"cd {shlex.quote(job.folder)}"] if job.folder else []
    return [
        *folder,
        *exports(without_reasons(variables)),
        *read,
        *job.setup,
        f"exec {shlex.join(job.command)}",
    ]


def _send_token(job: Job, file: str) -> list[str]:
    """Return lines that copy a new token to all workers.

    Only its owner can read the file.
    """
    options = [option for option in job.options if not option.startswith(OF_SSH_ALONE)]
    to = shlex.join([f"{job.name}:{file}", "--worker=all", *options])
    return [
        WHY_TOKEN,
        "token=$(mktemp)  # with mode 0600, which the copies keep",
        "trap 'rm -f \"$token\"' EXIT",
        f'printf \'%s\\n\' "{NEW_TOKEN}" >"$token"',
        f'{shlex.join(GCLOUD)} scp "$token" {to} </dev/null >&2',
        'rm "$token"',
        "trap - EXIT",
    ]
