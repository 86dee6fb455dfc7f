"""Decisions that the hosts of a run must make alike: one host speaks, the others hear.

A host is a process. The words go through the key-value store of `jax.distributed`, not
through the devices: an agreement neither waits for a step nor has to be in one. All
hosts call these functions in the same order, which numbers the messages. On a single
host they cost nothing.

Example, for two hosts that begin a run with the third call of `first` or `every`:

    host 0                                       host 1
    first(lambda: 7)                             first(lambda: 8)
      sets "lepton/3" to {"said": 7}               waits for "lepton/3"
      returns 7                                    returns 7, without calling its lambda

A *beat* is such a moment within training. Only host 0 knows the time and a person's
requests, so at steps that it has named one beat ahead it says whether to save or to
stop (`Beat`). If it has seen 40 steps a second, it names a step 10 steps ahead, so that
a beat comes about four times a second:

    step   90: host 0 says {"stop": False, "next": 100}; both hosts train on
    step   91 to 99: neither hears from the other but through the devices
    step  100: host 0, which had SIGTERM at step 93, says {"stop": True, "next": 110};
               both save after step 100

If a host fails, the others wait for it in the phase "agreement" until their supervisors
end them (see `launch/supervise/head.py`); the next generation begins with fresh
processes and a fresh store.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lepton_jax import errors
from lepton_jax.compat import coordination
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.hosts import phase

# assumption: seconds to wait for another host's word; supervisors notice sooner
PATIENCE = 1800.0
POLL = 0.02  # seconds between two looks at a barrier
BEAT = 0.25  # seconds between two beats, about
MOST_STEPS = 1000  # between two beats
LEAST_SECONDS = 1e-6  # that have passed, where a rate is taken
KEPT = 256  # messages that are still there when a slow host comes to read them
SHOWN = 200  # characters of a line in an error
_said = 0


def hosts() -> int:
    """Return the number of hosts."""
    return jax.process_count()


def host() -> int:
    """Return this host's number, from 0."""
    return jax.process_index()


def first(say: Callable[[], Any]) -> Any:
    """Return host 0's `say()` on every host; the others don't call theirs.

    Args:
      say: returns plain data.

    Raises:
      LeptonError: the one that host 0's `say` raised, on every host.
    """
    if hosts() == 1:
        return say()
    key = _key()
    if host():
        return _opened(_heard(key))

    answer, fault = _tried(say)
    _client().key_value_set(key, json.dumps(answer))
    if _said > KEPT:
        _client().key_value_delete(f"lepton/{_said - KEPT}")
    if fault is not None:
        raise fault
    return answer["said"]


def every(say: Callable[[], Any]) -> list[Any]:
    """Return each host's `say()`, by host.

    Args:
      say: returns plain data.

    Raises:
      LeptonError: the one that the first such host's `say` raised, on every host.
    """
    if hosts() == 1:
        return [say()]
    key = _key()
    answer, fault = _tried(say)
    _client().key_value_set(f"{key}/{host()}", json.dumps(answer))
    answers = [_heard(f"{key}/{number}") for number in range(hosts())]
    earlier = answers[: host()]
    if fault is not None and all("fault" not in answer for answer in earlier):
        raise fault  # this host's own error keeps its cause
    return [_opened(answer) for answer in answers]


# ---- facts that must be the same ----


def same(facts: Mapping[str, str]) -> None:
    """Compare texts that must not differ between the hosts, by name.

    The hosts exchange checksums, and only the line that differs.

    Raises:
      SettingError: on every host: which host differs from host 0 in what, with the
        first line that does.
    """
    if hosts() == 1:
        return
    own_sums = {name: _checksum(text) for name, text in facts.items()}
    sums = every(lambda: own_sums)
    differing = _first_difference(sums, list(facts))
    if differing is None:
        return

    other, name = differing
    lines = facts[name].splitlines()
    marks = None
    if host() in (0, other):
        marks = [_checksum(line) for line in lines]
    all_marks = every(lambda: marks)

    number = _unequal(all_marks[0], all_marks[other])
    own_line = "nothing"
    if number < len(lines):
        own_line = lines[number].strip()[:SHOWN]
    shown = every(lambda: own_line)
    raise SettingError(
        f"host {other} differs from host 0 in {name}, first in line {number + 1}:"
        f" {shown[other]} there, {shown[0]} on host 0",
        where=f"host {other} of {hosts()}",
        remedy="give all hosts the same code, settings and data, and start again",
    )


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def _first_difference(
    sums: Sequence[Mapping[str, int]], names: Sequence[str]
) -> tuple[int, str] | None:
    """Return the first host that differs from host 0, and in what."""
    for number, its in enumerate(sums):
        for name in names:
            if its.get(name) != sums[0].get(name):
                return number, name
    return None


def _unequal(marks: Sequence[int], others: Sequence[int]) -> int:
    """Return the first position at which two lists differ."""
    shorter = min(len(marks), len(others))
    for position in range(shorter):
        if marks[position] != others[position]:
            return position
    return shorter


# ---- wishes and barriers ----


def wish(name: str, why: str = "") -> None:
    """Say that this host wants something, at any time and from any thread.

    See `wished`.
    """
    if hosts() > 1:
        _client().key_value_set(
            f"lepton-wish/{name}/{host()}", why, allow_overwrite=True
        )


def wished(name: str) -> dict[int, str]:
    """Return the hosts that have said that they want this, and why."""
    if hosts() == 1:
        return {}
    wishes = _client().key_value_dir_get(f"lepton-wish/{name}/")
    reasons = {}
    for key, why in wishes:
        _, _, number = key.rpartition("/")
        reasons[int(number)] = why
    return reasons


def barrier(
    key: str,
    seconds: float,
    given_up: str,
) -> None:
    """Return when all hosts have called this with the same key, from any thread.

    `wait_at_barrier` of the key-value store can't be told that a host will not come.

    Args:
      key: name of the barrier, which may be used in several rounds.
      seconds: to wait.
      given_up: name of the wish by which a host says that it will not come.

    Raises:
      TimeoutError: some did not come in time.
      LeptonError: a host wishes for what `given_up` names.
    """
    until = time.monotonic() + seconds
    count = _client().key_value_increment(f"lepton-barrier/{key}", 1)
    rounds = -(-count // hosts())
    all_here = rounds * hosts()
    while count < all_here:
        if gone := wished(given_up):
            other, why = next(iter(gone.items()))
            raise LeptonError(
                f"host {other}: {why}",
                where=f"host {other}",
                remedy="fix that, and start again",
            )
        if time.monotonic() > until:
            raise TimeoutError(
                f"only {count % hosts()} of {hosts()} hosts came to {key} within"
                f" {seconds:g} s"
            )
        time.sleep(POLL)
        count = int(_client().key_value_try_get(f"lepton-barrier/{key}"))


class Beat:
    """Moments at which all hosts hear from host 0, about four a second.

    They fall on steps that host 0 chooses one beat ahead.

    Attributes:
      next: step of the next beat.
    """

    def __init__(self) -> None:
        self.next = 0
        self._step = 0
        self._time = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a beat falls on this step; on a single host, on each."""
        return hosts() == 1 or step >= self.next

    def hear(
        self,
        step: int,
        say: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """Return host 0's `say()` at this step."""
        if hosts() == 1:
            return say()

        def say_and_name_next() -> dict[str, Any]:
            words = say()
            return {**words, "next": step + self._steps_ahead(step)}

        words = first(say_and_name_next)
        self.next = words.pop("next")
        return words

    def again(self, step: int) -> None:
        """Put the next beat at a step to which the run has gone back."""
        self.next = step
        self._step = step

    def _steps_ahead(self, step: int) -> int:
        now = time.monotonic()
        steps = max(0, step - self._step)
        rate = steps / max(now - self._time, LEAST_SECONDS)
        self._step = step
        self._time = now
        ahead = max(1, round(rate * BEAT))
        return min(MOST_STEPS, ahead)


# ---- messages ----


def _key() -> str:
    """Return the key of the next message."""
    global _said
    _said += 1
    return f"lepton/{_said}"


def _client() -> Any:
    client = coordination()
    assert client is not None, "several processes without jax.distributed"
    return client


def _heard(key: str) -> dict[str, Any]:
    """Wait for another host's message under a key, and return it.

    A host that waits here is not behind the others.
    """
    milliseconds = int(PATIENCE * 1000)
    with phase.phase("agreement"):
        text = _client().blocking_key_value_get(key, milliseconds)
    return json.loads(text)


def _tried(
    say: Callable[[], Any],
) -> tuple[dict[str, Any], LeptonError | None]:
    """Return the message with a result, or with an error and that error."""
    try:
        return {"said": say()}, None
    except LeptonError as error:
        kind = type(error).__name__
        fields = [
            kind,
            error.what,
            str(error.where),
            error.remedy,
        ]
        return {"fault": fields}, error


def _opened(answer: dict[str, Any]) -> Any:
    """Return the result in a message.

    Raises:
      LeptonError: the message holds an error; it has the class of the original.
    """
    if "fault" not in answer:
        return answer["said"]
    name, what, where, remedy = answer["fault"]
    kind = getattr(errors, name, LeptonError)
    raise kind(what, where=where, remedy=remedy)
