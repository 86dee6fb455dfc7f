"""Network namespaces for the hosts of a trial, joined by a switch whose links go down.

As a program, this file is run by `Network`:

    network.py hold PARENT HOSTS FOLDER
        makes the namespaces; reads "cut HOST HOW" and "mend HOST HOW" lines
    network.py enter PARENT PID COMMAND...
        becomes a command in the host whose namespaces the process PID holds

Namespaces, switch and links belong to these processes alone. They end with the process
that started them, however that ends.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A private range (RFC 1918). Host I has the address .(I + 1).
NETWORK = "10.77.0"
PORT = 8476  # of the coordinator

# Flags of unshare(2), from sched.h.
NEW_MOUNT = 0x00020000
NEW_NAMES = 0x04000000
NEW_USER = 0x10000000
NEW_NETWORK = 0x40000000
# Flags of mount(2), from sys/mount.h; PRIVATE holds for all mounts below, too.
BIND = 4096
PRIVATE = 16384 | 1 << 18
# PR_SET_PDEATHSIG of prctl(2), from sys/prctl.h.
END_WITH_PARENT = 1

# Seconds; the first two are assumptions, many times what it takes here.
TIME = 30  # to make a network
ANSWER = 10  # to change it
GRACE = 4  # that the others wait for a host that is cut off
# Seconds after the cut by which such a host must have ended: the supervisors' limit for
# silence, the grace, the time before SIGKILL, and a margin.
ENDS = 10.0 + GRACE + 3.0 + 8.0

# How a link is cut and fixed, as arguments of `ip link set`. The machine notices a
# cable that is pulled; it does not notice a switch that forwards nothing.
WAYS = {"unplugged": ("down", "up"), "silent": ("nomaster", "master switch")}


def without(hosts: int) -> tuple[str, ...]:
    """Return the options with which a run goes on without one host."""
    return "--grace", str(GRACE), "--least-hosts", str(hosts - 1)


@functools.cache
def forbidden() -> str:
    """Return why there can be no such network here; empty where there can."""
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
        """Return the command that runs another command on a host."""
        return [*command]

    def options(self, host: int) -> tuple[str, ...]:
        """Return the options for the command line of a host."""
        return "--coordinator", self.coordinator

    def tend(self, codes: Mapping[int, int | None]) -> None:
        """Do what is due.

        Args:
          codes: the exit code of each host's process; None while it runs.
        """

    def wrong(self) -> str | None:
        """Return what went wrong with a link or with a host that is cut off, if any."""
        return None

    def close(self) -> None:
        """End what belongs to the network."""


class Network(Loopback):
    """Hosts in namespaces of their own, each with a link to one switch.

    Args:
      folder: of the trial, with its `faults.json`; the hosts' names are written there.
      hosts: the number of hosts.
      stages: of the fault.

    Attributes:
      holders: by host, the process that holds its namespaces.
      cuts: by stage, the Unix time at which its link was cut.
      mended: by stage, the Unix time at which its link was fixed.
      ended: by host, the Unix time at which its process ended, and its exit code.

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
        """Return the command that enters a host; it ends with this process."""
        return [
            sys.executable,
            __file__,
            "enter",
            str(os.getpid()),
            str(self.holders[host]),
            *command,
        ]

    def options(self, host: int) -> tuple[str, ...]:
        """Return the options for the command line of a host."""
        graces = [
            stage["grace"]
            for stage in self.stages
            if stage["host"] == host and "grace" in stage
        ]
        more = [text for grace in graces for text in ("--grace", str(grace))]
        return (*super().options(host), *more)

    def tend(self, codes: Mapping[int, int | None]) -> None:
        """Cut and fix the links that are due, and note which hosts have ended."""
        for i, stage in enumerate(self.stages):
            if i not in self.cuts:
                self._cut_if_fired(i, stage)
            elif i not in self.mended and self._is_due(i, stage):
                self.mended[i] = self.tell("mend", stage["host"], stage["how"])

        for host, code in codes.items():
            if code is not None:
                self.ended.setdefault(host, (time.time(), code))

    def _cut_if_fired(
        self,
        i: int,
        stage: Mapping[str, Any],
    ) -> None:
        if not Path(f"{self.file}.fired.{i}").exists():
            return
        self.cuts[i] = self.tell("cut", stage["host"], stage["how"])
        # the host goes on when it sees this file
        record = json.dumps({"time": self.cuts[i]})
        Path(f"{self.file}.cut.{i}").write_text(record)

    def _is_due(
        self,
        i: int,
        stage: Mapping[str, Any],
    ) -> bool:
        """Return whether a link that was cut is to be fixed by now."""
        seconds = stage["seconds"]
        return seconds is not None and time.time() >= self.cuts[i] + seconds

    def tell(
        self,
        do: str,
        host: int,
        how: str,
    ) -> float:
        """Cut or fix the link of a host, and wait until that is done.

        Args:
          do: "cut" or "mend".
          host: the host whose link it is.
          how: one of `WAYS`.

        Returns:
          The Unix time at which it was done.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{do} {host} {how}\n")
        self._process.stdin.flush()
        return self._answer()

    def wrong(self) -> str | None:
        """Return what went wrong with a link or with a host that is cut off, if any."""
        for i, stage in enumerate(self.stages):
            if i not in self.cuts:
                return "the link was not cut"
            if stage["seconds"] is not None:
                continue
            at, code = self.ended[stage["host"]]
            seconds = at - self.cuts[i]
            if code != 1 or seconds > ENDS:
                return (
                    f"host {stage['host']}, cut off, ended with exit code {code} after"
                    f" {seconds:.1f} s"
                )
        return None

    def close(self) -> None:
        """End the network, and all processes in it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()  # it has an alarm of its own
        if not line:
            lines = self._process.stderr.read().strip().splitlines()
            raise OSError(lines[-1] if lines else "it takes too long")
        return json.loads(line)


def address(host: int) -> str:
    """Return the address of a host."""
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
    _enter_new_network(parent)

    _ip("link add name switch type bridge")
    _ip("link set switch up")
    holders = [_add_host(host, hosts, folder) for host in range(hosts)]
    signal.alarm(0)
    print(json.dumps(holders), flush=True)

    for line in sys.stdin:
        do, number, how = line.split()
        cut, fixed = WAYS[how]
        signal.alarm(ANSWER)
        now = time.time()
        _ip(f"link set port{number} {fixed if do == 'mend' else cut}")
        print(json.dumps(now), flush=True)
        signal.alarm(0)


def _enter_new_network(parent: int) -> None:
    """Move this process into a network namespace of its own."""
    try:
        _call("unshare", NEW_NETWORK)
        return
    except PermissionError:
        pass

    # an ordinary user may do it within a user namespace, as its root
    user = os.geteuid()
    group = os.getegid()
    _call("unshare", NEW_USER | NEW_NETWORK)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _end_with(parent)  # new capabilities have cleared it


def _add_host(
    host: int,
    hosts: int,
    folder: Path,
) -> int:
    """Make a host with a link to the switch; return the process that holds it."""
    ours, theirs = socket.socketpair()
    names = _write_names(host, hosts, folder)
    holder = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_host(host, theirs, holder, names)
    theirs.close()

    _expect(ours)  # its namespaces are there
    _ip(f"link add name port{host} type veth peer name eth0 netns {pid}")
    _ip(f"link set port{host} master switch")
    _ip(f"link set port{host} up")
    ours.sendall(b".")
    _expect(ours)  # its end of the link is up
    return pid


def _write_names(
    host: int,
    hosts: int,
    folder: Path,
) -> Path:
    """Write a host's /etc/hosts; its own name is 127.0.1.1, as Debian has it."""
    lines = ["127.0.0.1 localhost"]
    for other in range(hosts):
        where = "127.0.1.1" if other == host else address(other)
        lines.append(f"{where} host{other}")
    file = folder / f"names.{host}"
    file.write_text("\n".join(lines) + "\n")
    return file


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
        del ends[0]  # a process may not enter its own user namespace again
    for end in ends:
        _call("setns", end, 0)
        os.close(end)
    os.chdir(here)
    _end_with(parent)  # only now, since new capabilities would have cleared it
    os.execvp(command[0], command)


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
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
    """Call a function of the C library.

    Raises:
      OSError: it failed.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    given = list(arguments)
    if name in ("prctl", "mount"):  # their numbers are unsigned long, not int
        given = [ctypes.c_ulong(x) if isinstance(x, int) else x for x in given]
    if function(*given):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _ip(command: str) -> None:
    """Run `ip`.

    Raises:
      OSError: there is no `ip`, or it fails.
    """
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
