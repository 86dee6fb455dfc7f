"""A TPU VM that is there: one command for all of its workers, by gcloud."""

from __future__ import annotations

import shlex
from pathlib import Path

from lepton_jax.launch.submit.job import Job, contained, exports, heading, retrying

SUFFIX = ".tpu.sh"


def client(job: Job, file: Path) -> list[str]:
    return ["bash", str(file)]


def render(job: Job) -> str:
    """A script for the workstation; the hosts find each other by the TPU's own metadata."""
    variables = job.variables("tpu")
    inside = [*job.setup]
    if job.image:
        inside.append(f"exec {shlex.join(contained(job, job.command, variables, privileged=True))}")
    else:
        start = [f"cd {shlex.quote(job.folder)}"] if job.folder else []
        plain = {name: (value, "") for name, (value, _) in variables.items()}
        inside = [*start, *exports(plain), *inside, f"exec {shlex.join(job.command)}"]
    # a login shell of any kind, that it ends where a line fails
    remote = shlex.join(["bash", "-c", "\n".join(["set -e", *inside])])
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", job.name, "--worker=all", *job.options, f"--command={remote}"]
    lines = ["#!/bin/bash", *heading(job), "set -euo pipefail", *retrying(shlex.join(command), job.retries)]
    return "\n".join(lines) + "\n"
