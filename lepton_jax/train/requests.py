"""A person's requests, performed by the loop between two steps.

Each is answered, told as an event, and written into the journal if it changes or holds
up the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lepton_jax.controller.live import (
    Request,
    requested_bases,
    setting_in_words,
    with_bases,
)
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.step.state import State
from lepton_jax.train.program import Program
from lepton_jax.train.records import Records


class Run(Protocol):
    """The part of the loop that requests act on."""

    program: Program
    state: State
    step: int
    test: Any
    records: Records
    paused: bool
    stop_requested: bool

    @property
    def halted(self) -> bool: ...

    def read(self, everything: bool) -> None: ...

    def save(self, metrics: dict[str, float] | None) -> None: ...

    def evaluate(self) -> dict[str, float]: ...

    def status(self) -> dict[str, Any]: ...


def perform(
    run: Run,
    content: Mapping[str, Any],
) -> dict[str, Any]:
    """Perform one request, or refuse it with a reason.

    Args:
      run: stands between two steps.
      content: what a client has put into the mailbox.

    Returns:
      The answer, in plain data. All but a question for the status are told as an event.
    """
    request = Request.read(content)
    step = run.step
    try:
        request.check()
        reply = ACTIONS[request.action](run, request)
        answer = {"ok": True, "step": step, **reply}
    except LeptonError as error:
        answer = {
            "ok": False,
            "step": run.step,
            "text": error.what,
            "remedy": error.remedy,
        }
    if request.action != "status":
        # The metrics have an event of their own, that of the evaluation.
        event = {name: value for name, value in answer.items() if name != "metrics"}
        event |= request.who
        run.records.monitor.event(
            "control",
            do=request.action,
            **event,
        )
    return answer


def _set(
    run: Run,
    request: Request,
) -> dict[str, Any]:
    bases = requested_bases(request, run.program.controller)
    run.state = with_bases(run.state, bases)
    _journal(run, request, bases)
    texts = [
        setting_in_words(name, value, run.records.journal.movers(name))
        for name, value in bases.items()
    ]
    return {
        "text": f"from step {run.step + 1} on {', '.join(texts)}",
        "settings": bases,
    }


def _save(
    run: Run,
    request: Request,
) -> dict[str, Any]:
    _journal(run, request)
    run.read(everything=True)
    if run.halted:
        return {"text": f"step {run.step} is not saved: the run does not go on from it"}
    run.save(None)
    return {"text": f"step {run.step} is being saved"}


def _evaluate(
    run: Run,
    request: Request,
) -> dict[str, Any]:
    if run.test is None:
        raise SettingError(
            "there is nothing to evaluate on",
            where="Recipe.test",
            remedy="start the run with test data",
        )
    _journal(run, request)
    run.read(everything=True)
    metrics = run.evaluate()
    values = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
    return {"text": f"{values} after step {run.step}", "metrics": metrics}


def _pause(
    run: Run,
    request: Request,
) -> dict[str, Any]:
    _journal(run, request)
    run.paused = True
    return {"text": f"paused after step {run.step}"}


def _resume(
    run: Run,
    request: Request,
) -> dict[str, Any]:
    _journal(run, request)
    was_paused = run.paused
    run.paused = False
    if not was_paused:
        return {"text": "it was not paused"}
    return {"text": f"goes on after step {run.step}"}


def _stop(
    run: Run,
    request: Request,
) -> dict[str, Any]:
    _journal(run, request)
    run.stop_requested = True
    run.paused = False
    run.records.history.reason = f"stopped at step {run.step} by {request.who['who']}"
    return {"text": f"stops after step {run.step}"}


def _status(
    run: Run,
    request: Request,
) -> dict[str, Any]:
    return {**run.status(), "paused": run.paused}


ACTIONS: dict[str, Callable[[Run, Request], dict[str, Any]]] = {
    "set": _set,
    "save": _save,
    "evaluate": _evaluate,
    "pause": _pause,
    "resume": _resume,
    "stop": _stop,
    "status": _status,
}


def _journal(
    run: Run,
    request: Request,
    settings: Mapping[str, float] | None = None,
) -> None:
    run.records.journal.requested(
        run.step,
        request.action,
        dict(request.who),
        dict(settings or {}),
    )
