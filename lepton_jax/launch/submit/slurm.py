"""Batch script for SLURM: one task on each machine, with all of its resources."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lepton_jax.errors import SettingError
from lepton_jax.launch import tokens
from lepton_jax.launch.submit.job import (
    NEW_TOKEN,
    WHY_TOKEN,
    Job,
    exports,
    heading,
    retrying,
)

SUFFIX = ".sbatch"
# assumptions, in seconds
NOTICE = 120  # before the time limit, when the hosts are told to save
# for the other hosts to end by themselves, after the grace for the first that has ended
LEAVING = 90


def client(job: Job, file: Path) -> list[str]:
    """Return the command that submits the script."""
    return ["sbatch", str(file)]


def render(job: Job) -> str:
    """Return the script, which `sbatch` takes as it is.

    Raises:
      SettingError: volumes without an image; an option that is no #SBATCH line.
    """
    if job.volumes and job.image is None:
        raise SettingError(
            "--job-volume is given without --job-image",
            where="command line, --job-volume",
            remedy=(
                "SLURM's machines see the cluster's folders as they are: leave it out,"
                " or name an image"
            ),
        )
    variables = job.variables("cuda" if job.gpus else None)
    if job.cpus:
        variables["SRUN_CPUS_PER_TASK"] = (
            str(job.cpus),
            "since SLURM 22.05 srun does not take it over from sbatch",
        )
    command = shlex.join([*_step(job), *job.command])
    lines = [
        "#!/bin/bash",
        *heading(job),
        *(f"#SBATCH {option}" for option in _options(job)),
        "set -euo pipefail",
        *exports(variables),
        *(_token() if job.hosts > 1 else []),
        *job.setup,
        *retrying(command, job.retries),
    ]
    return "\n".join(lines) + "\n"


def _options(job: Job) -> list[str]:
    """Return the options of sbatch."""
    options = [f"--job-name={job.name}", f"--nodes={job.hosts}", "--ntasks-per-node=1"]
    if job.gpus:
        options.append(f"--gpus-per-node={job.gpus}")
    if job.cpus:
        options.append(f"--cpus-per-task={job.cpus}")
    if job.memory:
        options.append(f"--mem={job.memory // 2**20}M")
    if job.seconds:
        minutes, seconds = divmod(job.seconds, 60)
        options.append(f"--time={minutes}:{seconds:02}")
        if job.seconds > 2 * NOTICE:
            options.append(f"--signal=TERM@{NOTICE}")
    if job.folder:
        options.append(f"--chdir={_quoted(job.folder)}")
    if job.goes_on_with_fewer:
        options.append("--no-kill")
    # a job that is queued again goes on with its log as with its run
    options += ["--output=%x-%j.log", "--open-mode=append", "--requeue"]
    return options + [_checked(option) for option in job.options]


def _checked(option: str) -> str:
    """Return a user's option if it fits on a #SBATCH line."""
    if not re.fullmatch(r"--?[A-Za-z][^\r\n]*", option):
        raise SettingError(
            f"--job-option is {option!r}",
            where="command line, --job-option",
            remedy="write an option of sbatch, e.g. --job-option=--partition=gpu",
        )
    return option


def _step(job: Job) -> list[str]:
    """Return srun and its options, before the hosts' command."""
    step = ["srun"]
    # the hosts see by themselves that one is lost, and say which and where; a process
    # that still runs long after that is stuck
    if job.hosts > 1:
        step.append("--kill-on-bad-exit=0")
        if job.goes_on_with_fewer:
            step += ["--no-kill", "--wait=0"]
        else:
            step.append(f"--wait={job.grace + LEAVING}")
    if job.image:
        step.append(f"--container-image={job.image}")
        if job.volumes:
            mounts = ",".join(str(volume) for volume in job.volumes)
            step.append(f"--container-mounts={mounts}")
        if job.folder:
            step.append(f"--container-workdir={job.folder}")
    return step


def _token() -> list[str]:
    """Return lines that give the hosts a token, in the environment of srun."""
    name = tokens.VARIABLE
    return [WHY_TOKEN, f"{name}={NEW_TOKEN}", f"export {name}"]


def _quoted(text: str) -> str:
    """Return a folder as sbatch reads it: it takes quotes, but knows no shell."""
    if re.search(r"[\"'\\\r\n]", text):
        raise SettingError(
            f"SLURM can't be told of the folder {text!r}",
            where="--job-dir",
            remedy="name a folder without quotes, backslashes and line ends",
        )
    return f'"{text}"' if re.search(r"[\s#]", text) else text
