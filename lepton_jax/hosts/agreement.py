"""What the hosts of a run must do alike: one of them says it, the others hear it.

A host is a process. What is said goes through the key-value store of `jax.distributed`,
not through the devices: it neither waits for a step nor has to be in one. All hosts
call these functions in the same order. On a single host they cost nothing.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lepton_jax import errors
from lepton_jax.compat import coordination
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.hosts import phase

# seconds to wait for what another host has to say; who watches the run is sooner
PATIENCE = 1800.0
POLL = 0.02  # seconds between two looks at a barrier
BEAT = 0.25  # seconds between two beats, about
KEPT = 256  # messages that are still there when a slow host comes to read them
_said = 0


def hosts() -> int:
    """How many there are."""
    return jax.process_count()


def host() -> int:
    """Which one this is, from 0."""
    return jax.process_index()


def first(say: Callable[[], Any]) -> Any:
    """What host 0's `say()` returns, in plain data; the others don't call theirs.

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
    """What each host's `say()` returns, in plain data, by host.

    Raises:
      LeptonError: the one that the first such host's `say` raised, on every host.
    """
    if hosts() == 1:
        return [say()]
    key = _key()
    answer, fault = _tried(say)
    _client().key_value_set(f"{key}/{host()}", json.dumps(answer))
    answers = [_heard(f"{key}/{i}") for i in range(hosts())]
    if fault is not None and all("fault" not in answers[i] for i in range(host())):
        raise fault
    return [_opened(answer) for answer in answers]


def same(facts: Mapping[str, str]) -> None:
    """Compare what must not differ between the hosts: texts, by what they are.

    Raises:
      SettingError: on every host: which one differs from host 0 in what, with the first
        line that does.
    """
    if hosts() == 1:
        return
    sums = every(
        lambda: {name: zlib.crc32(text.encode()) for name, text in facts.items()}
    )
    differing = [
        (i, name)
        for i, found in enumerate(sums)
        for name in facts
        if found.get(name) != sums[0].get(name)
    ]
    if not differing:
        return
    other, name = differing[0]
    lines = facts[name].splitlines()
    marks = [zlib.crc32(line.encode()) for line in lines]
    theirs = every(lambda: marks if host() in (0, other) else None)
    number = next(
        (
            i
            for i, (a, b) in enumerate(zip(theirs[0], theirs[other], strict=False))
            if a != b
        ),
        min(len(theirs[0]), len(theirs[other])),
    )
    shown = every(
        lambda: lines[number].strip()[:200] if number < len(lines) else "nothing"
    )
    raise SettingError(
        f"host {other} differs from host 0 in {name}, first in line {number + 1}:"
        f" {shown[other]} there, {shown[0]} on host 0",
        where=f"host {other} of {hosts()}",
        remedy="give all hosts the same code, settings and data, and start again",
    )


def wish(name: str, why: str = "") -> None:
    """Say that this host wants something, at any time and from any thread; see
    `wished`.
    """
    if hosts() > 1:
        _client().key_value_set(
            f"lepton-wish/{name}/{host()}", why, allow_overwrite=True
        )


def wished(name: str) -> dict[int, str]:
    """Which hosts have said that they want this, and why."""
    if hosts() == 1:
        return {}
    return {
        int(key.rpartition("/")[2]): why
        for key, why in _client().key_value_dir_get(f"lepton-wish/{name}/")
    }


def barrier(
    key: str,
    seconds: float,
    given_up: str,
) -> None:
    """Return when all hosts have called this with the same key, from whatever thread.

    `wait_at_barrier` of the key-value store can't be told that somebody will not come.

    Raises:
      TimeoutError: some did not come in time.
      LeptonError: a host wishes for what `given_up` names.
    """
    until = time.monotonic() + seconds
    count = _client().key_value_increment(f"lepton-barrier/{key}", 1)
    all_here = -(-count // hosts()) * hosts()  # the key may be another round's
    while count < all_here:
        if gone := wished(given_up):
            other, why = next(iter(gone.items()))
            raise LeptonError(
                f"host {other}: {why}",
                where=f"host {other}",
                remedy="mend that, and start again",
            )
        if time.monotonic() > until:
            raise TimeoutError(
                f"only {count % hosts()} of {hosts()} hosts came to {key} within"
                f" {seconds:g} s"
            )
        time.sleep(POLL)
        count = int(_client().key_value_try_get(f"lepton-barrier/{key}"))


class Beat:
    """The moments at which all hosts hear from host 0: at steps that it chooses one
    beat ahead, about four a second.
    """

    def __init__(self) -> None:
        self.next = 0
        self._step = 0
        self._time = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one falls on this step; on a single host, on each."""
        return hosts() == 1 or step >= self.next

    def hear(
        self,
        step: int,
        say: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """What host 0 says at this step."""
        if hosts() == 1:
            return say()
        heard = first(lambda: {**say(), "next": step + self._steps_ahead(step)})
        self.next = heard.pop("next")
        return heard

    def again(self, step: int) -> None:
        """The run has gone back to a step: the next beat is there."""
        self.next = self._step = step

    def _steps_ahead(self, step: int) -> int:
        now = time.monotonic()
        rate = max(0, step - self._step) / max(now - self._time, 1e-6)
        self._step = step
        self._time = now
        return min(1000, max(1, round(rate * BEAT)))


def _key() -> str:
    global _said
    _said += 1
    return f"lepton/{_said}"


def _client() -> Any:
    client = coordination()
    assert client is not None, "several processes without jax.distributed"
    return client


def _heard(key: str) -> dict[str, Any]:
    """What another host says under a key; until then this one waits, and is not behind
    it.
    """
    with phase.phase("agreement"):
        return json.loads(_client().blocking_key_value_get(key, int(PATIENCE * 1000)))


def _tried(say: Callable[[], Any]) -> tuple[dict[str, Any], LeptonError | None]:
    try:
        return {"said": say()}, None
    except LeptonError as error:
        return {
            "fault": [
                type(error).__name__,
                error.what,
                str(error.where),
                error.remedy,
            ]
        }, error


def _opened(answer: dict[str, Any]) -> Any:
    if "fault" not in answer:
        return answer["said"]
    kind, what, where, remedy = answer["fault"]
    raise getattr(errors, kind, LeptonError)(
        what,
        where=where,
        remedy=remedy,
    )
