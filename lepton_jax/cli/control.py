"""`python tools/control.py RUN set learning_rate=3e-4`: requests to a run that is under
way.
"""

from __future__ import annotations

import argparse
import hmac
import json
import sys
from pathlib import Path
from typing import Any

from lepton_jax.cli import settings
from lepton_jax.controller.live import REQUESTS
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.hosts.mailbox import ask, holder
from lepton_jax.launch import serve
from lepton_jax.monitor import stragglers
from lepton_jax.monitor.progress import duration, number
from lepton_jax.monitor.status import AT_WORK, status

DESCRIPTION = """Ask a run that is under way for something; it is done between two steps, and answered.

  set KNOB=VALUE ...  change knobs, e.g. learning_rate=3e-4; the journal keeps who did it
  save                make a checkpoint
  evaluate            evaluate on the test data; policies do not see it
  pause, resume       hold the run, and let it go on
  stop                end the run with a checkpoint, to be resumed later
  status              say how it stands, and how each of its hosts does
  serve               serve that at --port, as launch.py --status does, until Ctrl-C; also of a run that has ended"""
PORT = "8477"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 if the request was refused
    or there is no such run.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(arguments)
        request = _request(options.request, options.settings)
        if options.port is not None and options.request != "serve":
            raise SettingError(
                "--port means nothing to another request than serve",
                where="command line, --port",
                remedy="leave it out",
            )
        if options.request == "serve":
            return _serve(options.run, options.port)
        answer = (
            _stands(options)
            if options.request == "status"
            else apply(options.run, request, timeout=options.timeout)
        )
        if not answer["ok"]:
            raise SettingError(
                f"refused: {answer.get('text')}",
                where=options.run,
                remedy=answer.get("remedy", "see its report"),
            )
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            print(
                json.dumps(
                    {
                        "ok": False,
                        "error": error.what,
                        "where": error.where,
                        "remedy": error.remedy,
                    }
                )
            )
        return 2
    except KeyboardInterrupt:
        if options.request == "serve":
            return 130
        print(
            "interrupted; the request is withdrawn, unless the run took it already",
            file=sys.stderr,
        )
        return 130
    print(json.dumps(answer) if options.json else answer.get("text") or _status(answer))
    return 0


def apply(
    folder: str | Path,
    request: dict[str, Any],
    token: str | None = None,
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Put a request to the run in a folder of this machine, and return its answer; see
    `hosts.mailbox.ask`.

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
        prog="control.py",
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
        help="of set",
    )
    parser.add_argument(
        "--timeout",
        type=settings.reader(float),
        default=60.0,
        metavar="SECONDS",
        help=(
            "how long to wait for the run to take the request (default: 60): one that"
            " compiles answers when it steps"
        ),
    )
    parser.add_argument(
        "--port",
        metavar="[HOST:]PORT",
        help=f"of serve (default: {PORT}, for this machine alone)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the answer as a JSON object"
    )
    return parser


def _request(what: str, given: list[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in given]
    if given and what != "set":
        raise SettingError(
            f"{what} takes no values, but {given[0]!r} is given",
            where="command line",
            remedy=f"write {what} alone, or set {given[0]}",
        )
    for name, sign, value in pairs:
        if not (name and sign and value):
            raise SettingError(
                f"{name + sign + value!r} is not of the form KNOB=VALUE",
                where="command line",
                remedy="write e.g. set learning_rate=3e-4",
            )
    return {
        "do": what,
        **({"settings": {name: value for name, _, value in pairs}} if pairs else {}),
    }


def _stands(options: argparse.Namespace) -> dict[str, Any]:
    """What the run says of itself, and as "seen" what is seen from outside; that alone
    where supervisors are at work and the run does not answer.
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
        return {
            "ok": True,
            "step": seen["step"],
            "seen": seen,
        }
    return {**answer, "seen": status(options.run)}


def _serve(folder: Path, port: str | None) -> int:
    """Until Ctrl-C."""
    place = serve.address(port or PORT)
    status(folder)  # that there is a run
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
    return 0


def _status(answer: dict[str, Any]) -> str:
    """How a run stands, a line each."""
    seen = answer["seen"]
    lines = _own(answer)
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
    return "\n".join(
        [*lines, *filter(None, [stragglers.text(seen["hosts"], seen["slowest"])])]
    )


def _own(answer: dict[str, Any]) -> list[str]:
    """What it says of itself, or that it says nothing."""
    if "until" not in answer:
        until = answer["seen"]["until"]
        return [
            f"{answer['seen']['state']}, step {answer['step']:,}"
            + (f" of {until:,}" if until else "")
            + "; the run itself does not answer"
        ]
    lines = [
        f"step {answer['step']:,} of"
        f" {answer['until']:,}{', paused' if answer['paused'] else ''}, after"
        f" {duration(answer['seconds'])}"
    ]
    if answer["rollbacks"]:
        lines.append(f"rolled back {answer['rollbacks']} times")
    width = max(map(len, answer["record"]), default=0)
    return [
        *lines,
        *(
            f"  {name:<{width}}  {number(value)}"
            for name, value in answer["record"].items()
        ),
    ]
