"""A worker without JAX, for tests.

It steps when all hosts do, saves, goes on from the last save, and fails as its plan
says:

    python dummy.py '{"until": 9, "every": 3, "seconds": 0.02, "faults": [{"host": 1,
    "generation": 1, "phase": "data", "step": 4, "do": "kill"}]}'
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# without what the package imports, which takes seconds
sys.modules["lepton_jax"] = types.ModuleType("lepton_jax")
sys.modules["lepton_jax"].__path__ = [str(ROOT / "lepton_jax")]

from lepton_jax.errors import DataError  # noqa: E402
from lepton_jax.hosts import phase  # noqa: E402
from lepton_jax.launch.supervise import watchdog  # noqa: E402


class Dummy:
    """A worker that goes by a plan, see above."""

    def __init__(self, plan):
        self.plan = plan
        self.assignment = watchdog.begin()
        self.asked = []
        self.folder = Path(self.assignment.run_dir)
        signal.signal(signal.SIGTERM, lambda number, _: self.asked.append(number))
        here = {
            **vars(self.assignment),
            "pid": os.getpid(),
            "variables": sorted(k for k in os.environ if "LEPTON" in k),
        }
        self.write(
            f"worker-{self.assignment.generation}-{self.assignment.host_id}",
            json.dumps(here),
        )

    def write(self, name, text):
        (self.folder / f"{name}.new").write_text(text)
        (self.folder / f"{name}.new").replace(self.folder / name)

    def fail(self, here, step):
        """Do what the plan says for this place."""
        generation = self.assignment.generation
        for fault in self.plan.get("faults", ()):
            if (
                fault["host"] in (self.assignment.host_id, "all")
                and fault.get("generation", generation) == generation
                and fault["phase"] == here
                and fault.get("step", step) == step
            ):
                self.do(fault["do"])

    def do(self, what):
        """Fail in one of the ways that a plan knows."""
        kind, _, number = what.partition(" ")
        if kind in ("kill", "freeze", "hold", "exit"):
            time.sleep(0.6)  # for the watchdog to tell where this happens
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "hang":
            self.hang()
        elif kind == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.write(f"deaf-{self.assignment.host_id}", "")
            self.hang()
        elif kind == "hold":  # the interpreter, for ever
            c = ctypes.PyDLL(None)
            mutex = ctypes.create_string_buffer(64)
            while True:
                c.pthread_mutex_lock(mutex)
        elif kind == "mistake":
            watchdog.tell(DataError("a bad cell", where="table.csv:7", remedy="fix it"))
            sys.exit(2)
        elif kind == "exit":
            os._exit(int(number))

    def hang(self):
        time.sleep(1000)

    def reach(self, step, what="reached", for_ever=False):
        """Wait for the others, as a collective does, in one place.

        Returns False if a stop was asked for meanwhile.
        """
        self.write(
            f"{what}-{self.assignment.generation}-{self.assignment.host_id}", str(step)
        )
        marks = [
            self.folder / f"{what}-{self.assignment.generation}-{host}"
            for host in range(self.assignment.hosts)
        ]
        met = []
        over = threading.Event()

        def has_reached(mark):
            return mark.exists() and int(mark.read_text()) >= step

        def look():
            while not met and (for_ever or not self.asked):
                if all(has_reached(mark) for mark in marks):
                    met.append(True)
                else:
                    time.sleep(0.01)
            over.set()

        threading.Thread(target=look, daemon=True).start()
        over.wait()
        return bool(met)

    def save(self, step):
        with phase.phase("save"):
            self.fail("save", step)
            self.reach(
                len(list(self.folder.glob("checkpoints/*"))), "saved", for_ever=True
            )
            if self.assignment.host_id == 0:
                (self.folder / "checkpoints" / str(step)).mkdir(
                    parents=True, exist_ok=True
                )

    def train(self):
        self.fail("start", 0)
        with phase.phase("restore"):
            step = max(
                (int(each.name) for each in self.folder.glob("checkpoints/*")),
                default=0,
            )
            self.fail("restore", step)
            phase.reached(step=step, done=step)
        self.write(
            f"began-{self.assignment.generation}-{self.assignment.host_id}", str(step)
        )
        with phase.phase("compile"):
            self.fail("compile", step)
        phase.reached(phase="steps")
        self.fail("steps", step)
        while step < self.plan["until"]:
            with phase.phase("data"):
                self.fail("data", step)
                time.sleep(self.plan.get("seconds", 0.02))
            phase.reached(step=step + 1)
            if not self.reach(step + 1):
                break
            step += 1
            phase.reached(done=step)
            self.fail("steps", step)
            if step % self.plan.get("every", 10**9) == 0:
                self.save(step)
        if self.asked:
            self.save(step)
            print("asked", len(self.asked), flush=True)
            return 130
        print("done", step, flush=True)
        return 0


if __name__ == "__main__":
    dummy = Dummy(json.loads(sys.argv[1]))
    sys.exit(dummy.train())
