"""Machines that ssh reaches: a command for each; the first one is the coordinator."""

from __future__ import annotations

import re
import shlex
import sys
import time
import zlib
from pathlib import Path

from lepton_jax.errors import SettingError
from lepton_jax.launch import tokens
from lepton_jax.launch.children import spawn
from lepton_jax.launch.cluster import joined, port_of
from lepton_jax.launch.submit.job import (
    MISTAKE,
    NEW_TOKEN,
    PAUSE,
    WHY_TOKEN,
    Job,
    contained,
    exports,
    heading,
)

SUFFIX = ".ssh.sh"
# no password prompts, which many hosts would ask at once; a machine that is gone is
# noticed within a minute
CLIENT = (
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ServerAliveCountMax=4",
)
# ssh passes on no signal: standard input that ends says that the run shall, which hears
# SIGTERM, saves, and is still heard
WATCH = """child=$!
{ cat; kill -TERM "$child"; } <&3 >/dev/null 2>&1 &
watch=$!
trap 'kill -TERM "$child" 2>/dev/null' HUP INT TERM
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
kill "$watch" 2>/dev/null || :
exit "$code\""""
# the same for the script: every host reads a pipe that ends with the script, or with
# Ctrl-C
START = """pipe=$(mktemp -u)
mkfifo "$pipe"
exec 9<>"$pipe"
trap 'exec 9>&-' INT TERM"""
END = """while [ -n "$(jobs -pr)" ]; do wait; done
rm "$pipe"
if [ -s "$pipe.failed" ]; then cat "$pipe.failed" >&2; rm "$pipe.failed"; exit 1; fi"""


def client(job: Job, file: Path) -> list[str]:
    return ["bash", str(file)]


def render(job: Job) -> str:
    """A script with the command of every worker; as it stands it starts all and waits
    for them.
    """
    lines = [
        "#!/bin/bash",
        *heading(job),
        "# --submit also ends all when one fails, and goes on from the last checkpoint",
    ]
    made = commands(job)
    given = '<"$pipe"'
    if len(made) > 1:
        lines += [WHY_TOKEN, f"token={NEW_TOKEN}"]
        given = """< <(printf '%s\\n' "$token"; exec cat <"$pipe" 9>&-)"""
    lines.append(START)
    for host, each in enumerate(made):
        failed = f'echo "host {host}: exit code $?" >>"$pipe.failed"'
        lines.append(f"{shlex.join(each)} {given} 9>&- || {failed} &")
    lines.append(END)
    return "\n".join(lines) + "\n"


def commands(job: Job) -> list[list[str]]:
    """What this machine runs for each host."""
    hosts = read_hosts(Path(job.detail))
    port = port_of(zlib.crc32(job.run_dir.encode()))
    first = re.sub(
        r"^[^@]*@",
        "",
        hosts[0][0],
    )
    made = []
    for number, (host, *own) in enumerate(hosts):
        where = (
            ()
            if len(hosts) == 1
            else (
                f"--coordinator={joined(first, port)}",
                f"--hosts={len(hosts)}",
                f"--host-id={number}",
            )
        )
        remote = _remote(
            job,
            (*job.command, *where),
            with_token=len(hosts) > 1,
        )
        made.append(
            [
                *CLIENT,
                *job.options,
                *own,
                host,
                remote,
            ]
        )
    return made


def _remote(
    job: Job,
    command: tuple[str, ...],
    with_token: bool,
) -> str:
    variables = job.variables("cuda" if job.gpus else None)
    start = [f"cd {shlex.quote(job.folder)}"] if job.folder and not job.image else []
    if job.image:
        command = tuple(
            contained(
                job,
                command,
                variables,
                privileged=False,
                with_token=with_token,
            )
        )
    plain = {name: (value, "") for name, (value, _) in variables.items()}
    # the first line of its input, which no list of processes shows
    read = [f"read -r {tokens.VARIABLE}", f"export {tokens.VARIABLE}"]
    script = [
        "set -e",
        *(read if with_token else []),
        "exec 3<&0",
        *start,
        *([] if job.image else exports(plain)),
        *job.setup,
        f"{shlex.join(command)} &",
        WATCH,
    ]
    return shlex.join(
        [
            "exec",
            "sh",
            "-c",
            "\n".join(script),
        ]
    )


def submit(job: Job) -> int:
    """Start all hosts and wait for them; again after a failure, of which the
    supervisors alone may take care. The exit code.
    """
    made = commands(job)
    for attempt in range(job.retries + 1):
        first = f"{tokens.make()}\n" if len(made) > 1 else ""
        code = spawn(
            made, lifeline=True, with_fewer=job.goes_on_with_fewer, first=first
        )
        if code in (0, MISTAKE, 130, 143) or attempt == job.retries:
            break
        print(
            f"exit code {code}: going on, attempt {attempt + 1} of {job.retries}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(PAUSE)
    return code


def read_hosts(file: Path) -> list[list[str]]:
    """The hosts of a file, one a line as `[user@]name`, each with options of its own
    for ssh before it; # begins a comment.

    Raises:
      SettingError: there is no such file, nobody in it, or somebody twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            "the file of hosts can't be read:"
            f" {getattr(error, 'strerror', None) or error}",
            where=file,
            remedy="write a host a line, as ssh takes it: [user@]name",
        ) from error
    hosts: list[list[str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        *own, host = words
        if not re.fullmatch(r"([\w.-]+@)?[A-Za-z0-9][\w.:-]*", host, re.ASCII):
            raise SettingError(
                f"{host!r} is no host",
                where=f"{file}:{number}",
                remedy="write a host a line: [user@]name",
            )
        if [host, *own] in hosts:
            raise SettingError(
                f"{host} stands there twice",
                where=f"{file}:{number}",
                remedy="name each machine once; its process uses all of its devices",
            )
        hosts.append([host, *own])
    if not hosts:
        raise SettingError(
            "the file names no host",
            where=file,
            remedy="write a host a line: [user@]name",
        )
    return hosts
