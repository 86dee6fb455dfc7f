"""Script for machines that ssh reaches; the first one is the coordinator."""

from __future__ import annotations

import re
import shlex
import sys
import time
import zlib
from collections.abc import Sequence
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
    without_reasons,
)

SUFFIX = ".ssh.sh"
ASKED_TO_END = (130, 143)  # exit codes: Ctrl-C, SIGTERM
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
# ssh passes on no signal. So the end of standard input asks the run to end: it gets
# SIGTERM, saves, and can still be heard
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
    """Return the command that runs the script."""
    return ["bash", str(file)]


def render(job: Job) -> str:
    """Return a script that starts the workers of all hosts, and waits for them."""
    host_commands = commands(job)
    lines = [
        "#!/bin/bash",
        *heading(job),
        "# --submit also ends all when one fails, and goes on from the last checkpoint",
    ]
    given = '<"$pipe"'
    if len(host_commands) > 1:
        lines += [WHY_TOKEN, f"token={NEW_TOKEN}"]
        given = """< <(printf '%s\\n' "$token"; exec cat <"$pipe" 9>&-)"""
    lines.append(START)
    for host, command in enumerate(host_commands):
        failed = f'echo "host {host}: exit code $?" >>"$pipe.failed"'
        lines.append(f"{shlex.join(command)} {given} 9>&- || {failed} &")
    lines.append(END)
    return "\n".join(lines) + "\n"


def commands(job: Job) -> list[list[str]]:
    """Return the command of this machine for each host."""
    hosts = read_hosts(Path(job.detail))
    port = port_of(zlib.crc32(job.run_dir.encode()))
    first = re.sub(
        r"^[^@]*@",
        "",
        hosts[0][0],
    )
    several = len(hosts) > 1
    host_commands = []
    for number, (host, *own) in enumerate(hosts):
        command = list(job.command)
        if several:
            command += [
                f"--coordinator={joined(first, port)}",
                f"--hosts={len(hosts)}",
                f"--host-id={number}",
            ]
        remote = _remote(job, command, with_token=several)
        host_commands.append(
            [
                *CLIENT,
                *job.options,
                *own,
                host,
                remote,
            ]
        )
    return host_commands


def _remote(
    job: Job,
    command: Sequence[str],
    with_token: bool,
) -> str:
    """Return the command of a host, in a shell that ends it with standard input."""
    variables = job.variables("cuda" if job.gpus else None)
    start = []
    if job.image:
        command = contained(
            job, command, variables, privileged=False, with_token=with_token
        )
    else:
        if job.folder:
            start.append(f"cd {shlex.quote(job.folder)}")
        start += exports(without_reasons(variables))

    read_token = []
    if with_token:
        # the first line of its input, which no list of processes shows
        read_token = [f"read -r {tokens.VARIABLE}", f"export {tokens.VARIABLE}"]
    script = [
        "set -e",
        *read_token,
        "exec 3<&0",
        *start,
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
    """Start all hosts and wait for them; return the exit code.

    After a failure that the supervisors can't survive, all hosts are started again.
    """
    host_commands = commands(job)
    for attempt in range(job.retries + 1):
        token = f"{tokens.make()}\n" if len(host_commands) > 1 else ""
        code = spawn(
            host_commands,
            lifeline=True,
            with_fewer=job.goes_on_with_fewer,
            first=token,
        )
        if code in (0, MISTAKE, *ASKED_TO_END) or attempt == job.retries:
            break
        print(
            f"exit code {code}: going on, attempt {attempt + 1} of {job.retries}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(PAUSE)
    return code


def read_hosts(file: Path) -> list[list[str]]:
    """Return the hosts of a file, each followed by options of its own for ssh.

    A line has the options and then the host as `[user@]name`; # begins a comment.

    Raises:
      SettingError: there is no such file, it names no host, or one twice.
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
