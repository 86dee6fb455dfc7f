"""A supervisor as a process of its own, for tests.

It is forked from a server where the imports are done already.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

from lepton_jax.errors import LeptonError
from lepton_jax.launch.cluster import Cluster
from lepton_jax.launch.supervise import supervisor
from lepton_jax.launch.supervise.rules import Rules

DUMMY = Path(__file__).with_name("dummy.py")
LIMITS = {
    "start": 30.0,
    "steps": 1.5,
    "data": 1.5,
    "save": 1.5,
    "restore": 1.5,
    "silence": 1.5,
    "stop": 6.0,
}
QUICK = {
    "limits": LIMITS,
    "lost": 2.5,
    "ending": 0.4,
    "settle": 0.2,
    "pause": 0.05,
    "grace": 8.0,
}


def watch(folder, name, cluster, rules, command, more):
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(
            os.open(folder / f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            number,
        )
    result = {"crashed": True}
    try:
        run = supervisor.WatchedRun(
            Cluster(**cluster), Rules(**rules), command, folder=folder, **more
        )
        result = supervisor.run(run)
    except LeptonError as error:
        result = {
            "error": type(error).__name__,
            "what": error.what,
            "where": error.where,
            "remedy": error.remedy,
            "exit_code": getattr(error, "exit_code", 2),
        }
    except BaseException:
        traceback.print_exc()
    finally:
        (folder / f"{name}.new").write_text(json.dumps(result))
        (folder / f"{name}.new").rename(folder / f"{name}.result")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(result.get("exit_code", 70))


class Watched:
    """A run with dummy workers, or one host of it, in a process of its own.

    Args:
      folder: of the run.
      hosts: number of hosts.
      host: the one that this process watches over; None: all, on this machine.
      port: the coordinator's.
      plan: of the workers.
      rules: other than QUICK.
      command: of a worker; None: dummy.py with its plan.
      more: fields of WatchedRun: facts, name, limit.
    """

    started: list = []  # all of them, so that a test that fails leaves none behind  # noqa: RUF012

    def __init__(
        self,
        folder,
        hosts=3,
        host=None,
        port=None,
        plan=None,
        rules=None,
        command=None,
        **more,
    ):
        self.folder = folder
        self.name = (
            f"supervisor-{'all' if host is None else host}-{time.monotonic_ns()}"
        )
        cluster = (
            {"source": "local", "why": "a test", "hosts": hosts}
            if host is None
            else {
                "source": "options",
                "why": "a test",
                "hosts": hosts,
                "host_id": host,
                "coordinator": f"localhost:{port}",
            }
        )
        command = command or [
            sys.executable,
            str(DUMMY),
            json.dumps({"until": 12, "every": 4, **(plan or {})}),
        ]
        self.process = multiprocessing.get_context("forkserver").Process(
            target=watch,
            args=(
                folder,
                self.name,
                cluster,
                {**QUICK, **(rules or {})},
                command,
                {"facts": {}, "limit": 10.0, **more},
            ),
        )
        self.process.start()
        self.started.append(self)

    def done(self, limit=40.0):
        """Wait for the end; return the result, standard output and standard error."""
        self.process.join(limit)
        assert self.process.exitcode is not None, "it does not end"
        result = self.folder / f"{self.name}.result"
        return (
            (json.loads(result.read_text()) if result.exists() else {}),
            self.said("out"),
            self.said("err"),
        )

    def said(self, kind="err"):
        path = self.folder / f"{self.name}.{kind}"
        return path.read_text() if path.exists() else ""

    def signal(self, number):
        os.kill(self.process.pid, number)
