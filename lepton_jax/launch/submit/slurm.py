"""A batch script for SLURM: one task a machine, which gets all that was asked for
there.
"""

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
NOTICE = 120  # seconds before the time limit at which the hosts are told, to save
# seconds, beyond the grace for the first one that has ended, in which the others end by
# themselves
LEAVING = 90


def client(job: Job, file: Path) -> list[str]:
    return ["sbatch", str(file)]


def render(job: Job) -> str:
    """The script; `sbatch` takes it as it is.

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
    asked = [f"--job-name={job.name}", f"--nodes={job.hosts}", "--ntasks-per-node=1"]
    asked += [f"--gpus-per-node={job.gpus}"] if job.gpus else []
    asked += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    asked += [f"--mem={job.memory // 2**20}M"] if job.memory else []
    if job.seconds:
        minutes, seconds = divmod(job.seconds, 60)
        asked += [f"--time={minutes}:{seconds:02}"]
        asked += [f"--signal=TERM@{NOTICE}"] if job.seconds > 2 * NOTICE else []
    if job.folder:
        asked.append(f"--chdir={_quoted(job.folder)}")
    asked += ["--no-kill"] if job.goes_on_with_fewer else []
    # a job that is queued again goes on with its log as with its run
    asked += ["--output=%x-%j.log", "--open-mode=append", "--requeue"]
    for option in job.options:
        if not re.fullmatch(r"--?[A-Za-z][^\r\n]*", option):
            raise SettingError(
                f"--job-option is {option!r}",
                where="command line, --job-option",
                remedy="write an option of sbatch, e.g. --job-option=--partition=gpu",
            )
        asked.append(option)
    step = ["srun"]
    # the hosts see by themselves that one is lost, and say which and where; what then
    # still runs is stuck
    if job.hosts > 1:
        step += ["--kill-on-bad-exit=0"]
        step += (
            ["--no-kill", "--wait=0"]
            if job.goes_on_with_fewer
            else [f"--wait={job.grace + LEAVING}"]
        )
    if job.image:
        step.append(f"--container-image={job.image}")
        if job.volumes:
            mounts = ",".join(
                f"{each.source}:{each.folder}{':ro' if each.read_only else ''}"
                for each in job.volumes
            )
            step.append(f"--container-mounts={mounts}")
        step += [f"--container-workdir={job.folder}"] if job.folder else []
    variables = job.variables("cuda" if job.gpus else None)
    if job.cpus:
        variables |= {
            "SRUN_CPUS_PER_TASK": (
                str(job.cpus),
                "since SLURM 22.05 srun does not take it over from sbatch",
            )
        }
    lines = [
        "#!/bin/bash",
        *heading(job),
        *(f"#SBATCH {each}" for each in asked),
        "set -euo pipefail",
        *exports(variables),
        *(_token() if job.hosts > 1 else []),
        *job.setup,
        *retrying(shlex.join([*step, *job.command]), job.retries),
    ]
    return "\n".join(lines) + "\n"


def _token() -> list[str]:
    """Lines that give the hosts a token, by the environment that srun hands on."""
    name = tokens.VARIABLE
    return [WHY_TOKEN, f"{name}={NEW_TOKEN}", f"export {name}"]


def _quoted(text: str) -> str:
    """As sbatch reads a #SBATCH line: it takes quotes, but knows no shell."""
    if re.search(r"[\"'\\\r\n]", text):
        raise SettingError(
            f"SLURM can't be told of the folder {text!r}",
            where="--job-dir",
            remedy="name a folder without quotes, backslashes and line ends",
        )
    return f'"{text}"' if re.search(r"[\s#]", text) else text
