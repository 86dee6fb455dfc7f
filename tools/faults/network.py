"""Hosts of a trial in network namespaces of their own, joined by a switch, and links
that go down: for `tools.faults`.

    network.py hold PARENT HOSTS FOLDER    makes them; reads "cut HOST HOW" and "mend HOST" from its standard input
    network.py enter PARENT PID COMMAND... becomes a command in the host that a process holds

Namespaces, switch and links are nobody's but those processes', which end with the
process that started them, however it does.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# host I is .(I + 1)
NETWORK = "10.77.0"
PORT = 8476
# of sched.h
NEW_MOUNT = 0x00020000
NEW_NAMES = 0x04000000
NEW_USER = 0x10000000
NEW_NETWORK = 0x40000000
# of sys/mount.h; all below as well
BIND = 4096
PRIVATE = 16384 | 1 << 18
END_WITH_PARENT = 1  # of sys/prctl.h
TIME = 30  # seconds for making a network
ANSWER = 10  # seconds for a change of it
GRACE = 4  # seconds that the others wait for a host that is cut off
# seconds after the cut in which such a host has ended: silence, grace, SIGKILL, and
# some
ENDS = 10.0 + GRACE + 3.0 + 8.0
# a cable that is pulled is seen by the machine; a switch that forwards nothing is not
WAYS = {"unplugged": ("down", "up"), "silent": ("nomaster", "master switch")}


# ---- what is drawn ----


def kinds(
    hosts: int, steps: int
) -> dict[str, Callable[[random.Random], dict[str, Any]]]:
    """By kind, what draws the fields of a `faults.Fault` of a run with so many hosts
    and steps.
    """

    def stage(
        rng: random.Random,
        host: int,
        seconds: float | None,
        *phases: str,
    ) -> dict[str, Any]:
        return {
            "kind": "network",
            "host": host,
            "phase": rng.choice(phases),
            "step": rng.randrange(1, steps - 20),
            "seconds": seconds,
            "how": rng.choice(sorted(WAYS)),
        }

    def away(rng: random.Random) -> dict[str, Any]:
        short = rng.random() < 0.5
        host = rng.randrange(hosts)
        seconds = round(rng.uniform(1, 3) if short else rng.uniform(20, 40), 1)
        one = stage(
            rng,
            host,
            seconds,
            "steps",
            "data",
            "evaluation",
            "save",
        )
        return {
            "name": f"network away {seconds} s in {one['phase']}",
            "promise": "recovered",
            "stages": (one,),
            "says": "" if short else rf"host {host} (is lost|has lost all)",
        }

    def lost(rng: random.Random) -> dict[str, Any]:
        one = stage(
            rng,
            rng.randrange(1, hosts),
            None,
            "steps",
            "data",
            "evaluation",
            "save",
        )
        return {
            "name": f"network lost in {one['phase']}",
            "promise": "went on with what is left",
            "stages": (one,),
            "says": (
                rf"(?s)(?=.*host {one['host']} is lost)(?=.*host 0 is lost: [^\n]*could"
                r" not be met again)"
                r"(?=.*remedy: look at the network)"
            ),
            "options": without(hosts),
        }

    def late(rng: random.Random) -> dict[str, Any]:
        one = stage(
            rng,
            rng.randrange(1, hosts),
            round(rng.uniform(20, 24), 1),
            "steps",
            "data",
        )
        return {
            "name": "network back late",
            "promise": "went on with what is left",
            "stages": (one | {"grace": 60},),
            "says": rf"going on without host {one['host']}",
            "options": without(hosts),
        }

    return {"network": away, "network lost": lost, "network back late": late}


def without(hosts: int) -> tuple[str, ...]:
    """Options with which a run goes on without one host."""
    return "--grace", str(GRACE), "--least-hosts", str(hosts - 1)


@functools.cache
def forbidden() -> str:
    """Why there can be no such network here; empty where there can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Network(Path(folder), 2).close()
        except OSError as error:
            return str(error)
    return ""


# ---- a network, as a trial holds it ----


class Loopback:
    """No network of its own: all hosts are on this machine."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.coordinator = f"127.0.0.1:{probe.getsockname()[1]}"

    def inside(
        self,
        host: int,
        command: Sequence[str],
    ) -> list[str]:
        """The command that runs another one on a host."""
        return [*command]

    def options(self, host: int) -> tuple[str, ...]:
        """Of the command line of a host."""
        return "--coordinator", self.coordinator

    def tend(self, codes: Mapping[int, int | None]) -> None:
        """Do what is due; exit codes are by host, None of what still runs."""

    def wrong(self) -> str | None:
        """What is wrong with the link, or with how a host ended that is cut off for
        good.
        """
        return None

    def close(self) -> None:
        """Nothing is left of it."""


class Network(Loopback):
    """So many hosts with a link each to one switch.

    Args:
      folder: for files of their names; and of the `faults.json` of the trial.
      hosts: how many.
      stages: of the fault.

    Attributes:
      holders: by host, the process that holds its namespaces.
      cuts: by stage, when its link was cut (Unix time); `mended`: likewise.
      ended: by host, when its process had ended, and its exit code.

    Raises:
      OSError: it is not permitted here, or a tool is missing.
    """

    def __init__(
        self,
        folder: Path,
        hosts: int,
        stages: Sequence[Mapping[str, Any]] = (),
    ):
        self.coordinator = f"{address(0)}:{PORT}"
        self.file = folder / "faults.json"
        self.stages = stages
        self.cuts: dict[int, float] = {}
        self.mended: dict[int, float] = {}
        self.ended: dict[int, tuple[float, int]] = {}
        self._process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "hold",
                str(os.getpid()),
                str(hosts),
                str(folder),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.holders: list[int] = self._answer()
        except OSError:
            self.close()
            raise

    def inside(
        self,
        host: int,
        command: Sequence[str],
    ) -> list[str]:
        """See above; it ends with this process."""
        return [
            sys.executable,
            __file__,
            "enter",
            str(os.getpid()),
            str(self.holders[host]),
            *command,
        ]

    def options(self, host: int) -> tuple[str, ...]:
        graces = [
            stage["grace"]
            for stage in self.stages
            if stage["host"] == host and "grace" in stage
        ]
        return *super().options(host), *(
            text for grace in graces for text in ("--grace", str(grace))
        )

    def tend(self, codes: Mapping[int, int | None]) -> None:
        """Cut and mend what is due."""
        for i, stage in enumerate(self.stages):
            if i not in self.cuts:
                if Path(f"{self.file}.fired.{i}").exists():
                    self.cuts[i] = self.tell(
                        "cut",
                        stage["host"],
                        stage["how"],
                    )
                    Path(f"{self.file}.cut.{i}").write_text(
                        json.dumps({"time": self.cuts[i]})
                    )
            elif (
                i not in self.mended
                and stage["seconds"] is not None
                and time.time() >= self.cuts[i] + stage["seconds"]
            ):
                self.mended[i] = self.tell(
                    "mend",
                    stage["host"],
                    stage["how"],
                )
        for host, code in codes.items():
            if code is not None:
                self.ended.setdefault(host, (time.time(), code))

    def tell(
        self,
        do: str,
        host: int,
        how: str,
    ) -> float:
        """To "cut" the link of a host in one of `WAYS`, or to "mend" it; returns when
        that was done.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{do} {host} {how}\n")
        self._process.stdin.flush()
        return self._answer()

    def wrong(self) -> str | None:
        for i, stage in enumerate(self.stages):
            if i not in self.cuts:
                return "the link was not cut"
            if stage["seconds"] is not None:
                continue
            at, code = self.ended[stage["host"]]
            if code != 1 or at - self.cuts[i] > ENDS:
                return (
                    f"host {stage['host']}, cut off, ended with exit code {code} after"
                    f" {at - self.cuts[i]:.1f} s"
                )
        return None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()  # it has an alarm of its own
        if not line:
            said = self._process.stderr.read().strip().splitlines() or [
                "it takes too long"
            ]
            raise OSError(said[-1])
        return json.loads(line)


def address(host: int) -> str:
    return f"{NETWORK}.{host + 1}"


# ---- in processes of their own ----


def hold(
    parent: int,
    hosts: int,
    folder: Path,
) -> None:
    """Make the network; then change it as standard input says, until that ends."""
    signal.alarm(TIME)
    _end_with(parent)
    try:
        _call("unshare", NEW_NETWORK)
    except PermissionError:  # a user of their own namespace may do it
        user = os.geteuid()
        group = os.getegid()
        _call("unshare", NEW_USER | NEW_NETWORK)
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            Path("/proc/self", file).write_text(text)
        _end_with(parent)  # which new capabilities make void
    _ip("link add name switch type bridge")
    _ip("link set switch up")
    holders = []
    for host in range(hosts):
        names = folder / f"names.{host}"  # its own as Debian writes it
        names.write_text(
            "127.0.0.1 localhost\n"
            + "".join(
                f"{address(other) if other != host else '127.0.1.1'} host{other}\n"
                for other in range(hosts)
            )
        )
        ours, theirs = socket.socketpair()
        holder = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_host(host, theirs, holder, names)
        theirs.close()
        holders.append(pid)
        _expect(ours)
        _ip(f"link add name port{host} type veth peer name eth0 netns {pid}")
        _ip(f"link set port{host} master switch")
        _ip(f"link set port{host} up")
        ours.sendall(b".")
        _expect(ours)
    signal.alarm(0)
    print(json.dumps(holders), flush=True)
    for line in sys.stdin:
        do, number, how = line.split()
        signal.alarm(ANSWER)
        now = time.time()
        _ip(f"link set port{number} {WAYS[how][do == 'mend']}")
        print(json.dumps(now), flush=True)
        signal.alarm(0)


def _be_host(
    host: int,
    line: socket.socket,
    parent: int,
    names: Path,
) -> None:
    """Hold a host's namespaces until the parent ends."""
    try:
        _end_with(parent)
        _call("unshare", NEW_NETWORK | NEW_NAMES | NEW_MOUNT)
        _call("mount", None, b"/", None, PRIVATE, None)
        _call(
            "mount",
            bytes(names),
            b"/etc/hosts",
            None,
            BIND,
            None,
        )
        socket.sethostname(f"host{host}")
        line.sendall(b".")
        _expect(line)
        _ip("link set lo up")
        _ip(f"addr add {address(host)}/24 dev eth0")
        _ip("link set eth0 up")
        line.sendall(b".")
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    while True:
        signal.pause()


def enter(
    parent: int,
    holder: int,
    command: list[str],
) -> None:
    """Become a command in the host that a process holds."""
    here = os.getcwd()
    ends = [
        os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY)
        for kind in ("user", "net", "uts", "mnt")
    ]
    if os.fstat(ends[0]).st_ino == os.stat("/proc/self/ns/user").st_ino:
        del ends[0]  # nobody may enter their own again
    for end in ends:
        _call("setns", end, 0)
        os.close(end)
    os.chdir(here)
    _end_with(parent)  # new capabilities make it void before
    os.execvp(command[0], command)


def _end_with(parent: int) -> None:
    _call(
        "prctl",
        END_WITH_PARENT,
        signal.SIGKILL,
        0,
        0,
        0,
    )
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _call(name: str, *arguments: Any) -> None:
    """A function of the C library's.

    Raises:
      OSError: it failed.
    """
    numbers = (
        (
            ctypes.c_ulong(each)
            if isinstance(each, int) and name in ("prctl", "mount")
            else each
        )
        for each in arguments
    )
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*numbers):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _ip(command: str) -> None:
    """Raises OSError: there is no `ip`, or it fails."""
    done = subprocess.run(
        ["ip", *command.split()],
        capture_output=True,
        text=True,
        timeout=ANSWER,
    )
    if done.returncode:
        raise OSError(f"ip {command}: {done.stderr.strip()}")


def _expect(line: socket.socket) -> None:
    if line.recv(1) != b".":
        raise OSError("a host's namespaces can't be made")


if __name__ == "__main__":
    try:
        if sys.argv[1] == "hold":
            hold(
                int(sys.argv[2]),
                int(sys.argv[3]),
                Path(sys.argv[4]),
            )
        else:
            enter(
                int(sys.argv[2]),
                int(sys.argv[3]),
                sys.argv[4:],
            )
    except OSError as error:
        sys.exit(str(error))
