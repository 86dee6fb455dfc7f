"""`lepton control RUN set learning_rate=3e-4`: requests to a run that is under way."""

from __future__ import annotations

import argparse
import hmac
import json
import sys
from pathlib import Path
from typing import Any

from lepton_jax.cli import settings
from lepton_jax.controller.live import REQUESTS
from lepton_jax.errors import LeptonError, SettingError, nearest
from lepton_jax.hosts.mailbox import ask, holder
from lepton_jax.launch import serve
from lepton_jax.launch.options import reader
from lepton_jax.monitor import stragglers
from lepton_jax.monitor.progress import duration, number
from lepton_jax.monitor.status import AT_WORK, status

DESCRIPTION = """\
Ask a run that is under way for something; it is done between two steps, and answered.

  set KNOB=VALUE ...  change knobs, e.g. learning_rate=3e-4; the journal keeps who did
                      it
  save                make a checkpoint
  evaluate            evaluate on the test data; policies do not see it
  pause, resume       hold the run, and let it go on
  stop                end the run with a checkpoint, to be resumed later
  status              say how it stands, and how each of its hosts does
  serve               serve that at --port, as launch.py --status does, until Ctrl-C;
                      also of a run that has ended"""
PORT = "8477"
MISTAKE = 2  # exit code
INTERRUPTED = 130  # exit code
PATIENCE = 60.0  # seconds to wait for the run's answer (assumption)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
      0; 2 if the request was refused or there is no such run; 130 after Ctrl-C.
    """
    arguments = settings.typed(arguments)
    options = None
    try:
        options = _parser().parse_args(arguments)
        answer = _do(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            settings.print_failure(error, ok=False)
        return MISTAKE
    except KeyboardInterrupt:
        if options is None or options.request != "serve":
            print(
                "interrupted; the request is withdrawn, unless the run took it already",
                file=sys.stderr,
            )
        return INTERRUPTED
    if answer is not None and options.json:
        print(json.dumps(answer))
    elif answer is not None:
        print(answer.get("text") or _status(answer))
    return 0


def _do(options: argparse.Namespace) -> dict[str, Any] | None:
    """Put the request; return the run's answer, None where there is none to print.

    Raises:
      LeptonError: a mistake in the command line, no such run, or a refusal.
    """
    request = _request(options.request, options.settings)
    if options.request == "serve":
        _serve(options.run, options.port)
        return None
    if options.port is not None:
        raise SettingError(
            "--port means nothing to another request than serve",
            where="command line, --port",
            remedy="leave it out",
        )
    if options.request == "status":
        answer = _state(options)
    else:
        answer = apply(options.run, request, timeout=options.timeout)
    if not answer["ok"]:
        raise SettingError(
            f"refused: {answer.get('text')}",
            where=options.run,
            remedy=answer.get("remedy", "see its report"),
        )
    return answer


def apply(
    folder: str | Path,
    request: dict[str, Any],
    token: str | None = None,
    timeout: float = PATIENCE,
) -> dict[str, Any]:
    """Put a request to the run in a folder of this machine, and return its answer.

    See `hosts.mailbox.ask`.

    Args:
      folder: of the run.
      request: {"do": ..., "settings": {knob: text}}; from elsewhere also "who".
      token: None: the caller acts for this process's own user, and the folder's
        permissions decide. A server that takes requests from a network gives the token
        that came with each.
      timeout: seconds to wait for the answer.

    Raises:
      SettingError: no run is at work there, it does not answer, or the token is not the
        run's.
    """
    if token is not None:
        expected = (holder(Path(folder)) or {}).get("token")
        if not expected or not hmac.compare_digest(token.encode(), expected.encode()):
            raise SettingError(
                "the token is not this run's",
                where=folder,
                remedy=(
                    "take it from control/run.json in the run folder, as the run's"
                    " owner"
                ),
            )
    return ask(Path(folder), request, timeout)


def _parser() -> settings.Parser:
    parser = settings.Parser(
        prog=settings.program("control"),
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="the run's folder",
    )
    parser.add_argument(
        "request",
        metavar="REQUEST",
        help=", ".join((*REQUESTS, "serve")),
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KNOB=VALUE",
        help="for set: knobs and their values",
    )
    parser.add_argument(
        "--timeout",
        type=reader(float),
        default=PATIENCE,
        metavar="SECONDS",
        help=(
            "how long to wait for the run to take the request (default: 60): one that"
            " compiles answers when it steps"
        ),
    )
    parser.add_argument(
        "--port",
        metavar="[HOST:]PORT",
        help=f"for serve: its port (default: {PORT}, for this machine alone)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the answer as a JSON object"
    )
    return parser


def _request(what: str, words: list[str]) -> dict[str, Any]:
    """Return the request as the run reads it.

    Args:
      what: name of the request.
      words: KNOB=VALUE, for set.
    """
    requests = (*REQUESTS, "serve")
    if what not in requests:
        raise SettingError(
            f"a run can't {what!r}{nearest(what, requests)}",
            where="command line",
            remedy=f"ask for one of {', '.join(requests)}",
        )
    if words and what != "set":
        raise SettingError(
            f"{what} takes no values, but {words[0]!r} is given",
            where="command line",
            remedy=f"write {what} alone, or set {words[0]}",
        )
    knobs = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not (name and sign and value):
            raise SettingError(
                f"{word!r} is not of the form KNOB=VALUE",
                where="command line",
                remedy="write e.g. set learning_rate=3e-4",
            )
        knobs[name] = value
    return {"do": what, "settings": knobs} if knobs else {"do": what}


def _state(options: argparse.Namespace) -> dict[str, Any]:
    """Return the run's own words about its state, and what is seen from outside.

    Where supervisors are at work and the run does not answer, only the latter.
    """
    try:
        answer = apply(
            options.run,
            {"do": "status"},
            timeout=options.timeout,
        )
    except SettingError:
        if not (options.run / "hosts.json").exists():
            raise
        seen = status(options.run)
        if not seen["hosts"] or seen["state"] not in AT_WORK:
            raise
        return {"ok": True, "step": seen["step"], "seen": seen}
    return {**answer, "seen": status(options.run)}


def _serve(folder: Path, port: str | None) -> None:
    """Serve the run's status until Ctrl-C."""
    place = serve.address(port or PORT)
    status(folder)  # raises if there is no run
    try:
        server = serve.Server(place, folder)
    except OSError as error:
        raise SettingError(
            f"port {place[1]} of {place[0]} can't be had: {error.strerror or error}",
            where="command line, --port",
            remedy="give another one by --port",
        ) from error
    with server:
        server.announce()
        server.serve_forever()


# ---- the text of "status" ----


def _status(answer: dict[str, Any]) -> str:
    """Return the state of a run as lines of text."""
    seen = answer["seen"]
    lines = _own_words(answer) if "until" in answer else [_no_answer(answer)]
    if seen["goodput"] is not None:
        lines.append(
            f"goodput {100 * seen['goodput']:.1f} % of"
            f" {duration(seen['seconds']['wall'])}; begun again after a failure:"
            f" {seen['restarts']} times"
        )
    if seen["refused_connections"]:
        lines.append(
            f"{seen['refused_connections']:,} connections to host 0 were refused"
            " without proof of the run's token"
        )
    table = stragglers.text(seen["hosts"], seen["slowest"])
    if table:
        lines.append(table)
    return "\n".join(lines)


def _no_answer(answer: dict[str, Any]) -> str:
    """Return the line about a run that only its supervisors speak for."""
    until = answer["seen"]["until"]
    of = f" of {until:,}" if until else ""
    return (
        f"{answer['seen']['state']}, step {answer['step']:,}{of}; the run itself does"
        " not answer"
    )


def _own_words(answer: dict[str, Any]) -> list[str]:
    """Return the lines about a run that has answered."""
    paused = ", paused" if answer["paused"] else ""
    lines = [
        f"step {answer['step']:,} of {answer['until']:,}{paused}, after"
        f" {duration(answer['seconds'])}"
    ]
    if answer["rollbacks"]:
        lines.append(f"rolled back {answer['rollbacks']} times")
    width = max(map(len, answer["record"]), default=0)
    for name, value in answer["record"].items():
        lines.append(f"  {name:<{width}}  {number(value)}")
    return lines
