"""A TPU VM that is there: one command for all of its workers, by gcloud."""

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
)

SUFFIX = ".tpu.sh"
GCLOUD = ("gcloud", "compute", "tpus", "tpu-vm")
# options that `tpu-vm ssh` takes and `tpu-vm scp` does not
OF_SSH_ALONE = ("--ssh-flag", "--output-directory", "--dry-run")


def client(job: Job, file: Path) -> list[str]:
    return ["bash", str(file)]


def render(job: Job) -> str:
    """A script for the workstation; the hosts find each other by the TPU's own
    metadata.
    """
    variables = job.variables("tpu")
    # every worker gets the same command, which ps would show: so the token goes ahead
    file = f".lepton-{job.name}.token"
    read = [f'{tokens.VARIABLE}=$(cat "$HOME/{file}")', f"export {tokens.VARIABLE}"]
    inside = [*read, *job.setup]
    if job.image:
        command = contained(
            job, job.command, variables, privileged=True, with_token=True
        )
        inside.append(f"exec {shlex.join(command)}")
    else:
        start = [f"cd {shlex.quote(job.folder)}"] if job.folder else []
        plain = {name: (value, "") for name, (value, _) in variables.items()}
        inside = [
            *start,
            *exports(plain),
            *inside,
            f"exec {shlex.join(job.command)}",
        ]
    # a login shell of any kind, that it ends where a line fails
    remote = shlex.join(
        [
            "bash",
            "-c",
            "\n".join(["set -e", *inside]),
        ]
    )
    command = [
        *GCLOUD,
        "ssh",
        job.name,
        "--worker=all",
        *job.options,
        f"--command={remote}",
    ]
    lines = [
        "#!/bin/bash",
        *heading(job),
        "set -euo pipefail",
        *_send_token(job, file),
        *retrying(shlex.join(command), job.retries),
    ]
    return "\n".join(lines) + "\n"


def _send_token(job: Job, file: str) -> list[str]:
    """Lines that copy a new token to all workers, into a file that its owner alone
    reads.
    """
    options = [each for each in job.options if not each.startswith(OF_SSH_ALONE)]
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
