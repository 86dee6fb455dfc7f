"""`lepton serve ARTIFACT-or-RUN [...]`: trained models as a service."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lepton_jax.cli import settings, trained, watching
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import tokens
from lepton_jax.launch.options import reader
from lepton_jax.ship import scale
from lepton_jax.ship.extras import needs
from lepton_jax.ship.scale.deployment import path_of

DESCRIPTION = """\
Serve trained models over HTTP, by the Open Inference Protocol v2, until SIGTERM.

Each ARTIFACT is what `lepton export` wrote, or the folder of a run or a saved model.
Several of one name are versions of one model. The page at / tries them, /docs describes
the interface, and SIGHUP loads artifacts that have been replaced."""
MISTAKE = 2  # exit code
INTERRUPTED = 130  # exit code
LIBRARIES = ("fastapi", "uvicorn", "orjson", "httptools")
MEBIBYTE = 1 << 20
MILLISECOND = 1e-3
LOADER = "lepton-load"  # of a thread's name; it may be compiling


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
      0 after SIGTERM or Ctrl-C, if every request was answered; 2 for a mistake; 130
      after a second Ctrl-C.
    """
    arguments = settings.typed(arguments)
    try:
        options = parsed(arguments)
        if scale.wanted(options):
            named = [str(text) for text in options.artifacts]
            inside = scale.inside(arguments, named)
            return scale.start(options, named, inside)
        return _serve(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted before it listened", file=sys.stderr)
        return INTERRUPTED


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a command line.

    Raises:
      SettingError: one is unknown or ill-typed.
    """
    return _parser().parse_args(arguments)


# ---- internals ----


def _parser() -> settings.Parser:
    parser = settings.Parser(
        prog=settings.program("serve"),
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artifacts", nargs="+", metavar="[NAME=]ARTIFACT")
    _add_listening(parser)
    _add_batching(parser)
    _add_versions(parser)
    _add_guards(parser)
    watching.add_options(parser)
    scale.add_options(parser.add_argument_group("many replicas, on a cluster"))
    return parser


def _add_listening(parser: settings.Parser) -> None:
    group = parser.add_argument_group("where it listens, and how it ends")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address (default: 127.0.0.1, this machine alone; 0.0.0.0: all)",
    )
    group.add_argument(
        "--port",
        type=reader(int),
        default=8000,
        help="0: any that is free (default: 8000)",
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="chain, in PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, in PEM")
    group.add_argument(
        "--unready",
        type=reader(float),
        default=1.0,
        metavar="SECONDS",
        help=(
            "after SIGTERM it is not ready, and takes requests still, for so long: what"
            " a load balancer needs to see it (default: 1)"
        ),
    )
    group.add_argument(
        "--drain",
        type=reader(float),
        default=30.0,
        metavar="SECONDS",
        help="time for the requests that are under way then (default: 30)",
    )


def _add_batching(parser: settings.Parser) -> None:
    group = parser.add_argument_group("batches and the queue")
    group.add_argument(
        "--batch",
        metavar="SIZES",
        default="",
        help=(
            "sizes to compile, such as 1,8,64 (default: doubling up to 128, for as long"
            " as that is faster)"
        ),
    )
    group.add_argument(
        "--collect",
        type=reader(float),
        default=0.0,
        metavar="MS",
        help="milliseconds that a request waits for company (default: 0)",
    )
    group.add_argument(
        "--queue",
        type=reader(int),
        default=1024,
        metavar="ROWS",
        help="rows that may wait; more are told to come back (default: 1024)",
    )
    group.add_argument(
        "--timeout",
        type=reader(float),
        default=30.0,
        metavar="SECONDS",
        help="time in the queue, unless a request says otherwise (default: 30)",
    )


def _add_versions(parser: settings.Parser) -> None:
    group = parser.add_argument_group("versions of a model")
    group.add_argument(
        "--canary",
        action="append",
        default=[],
        metavar="NAME=VERSION:SHARE",
        help="a version that gets a share of the requests that name none",
    )
    group.add_argument(
        "--shadow",
        action="append",
        default=[],
        metavar="NAME=VERSION",
        help="a version that is asked the same, and only compared",
    )


def _add_guards(parser: settings.Parser) -> None:
    group = parser.add_argument_group("who may ask, and how much")
    group.add_argument(
        "--token-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a token that requests must bring; may be given several times",
    )
    group.add_argument(
        "--admin-token-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a token with which models may be loaded and unloaded",
    )
    group.add_argument(
        "--most-mib",
        type=reader(float),
        default=64.0,
        metavar="MIB",
        help="size of a request (default: 64)",
    )
    group.add_argument(
        "--most-rows",
        type=reader(int),
        default=1024,
        metavar="ROWS",
        help="rows of a request (default: 1024)",
    )


def _serve(options: argparse.Namespace) -> int:
    """Serve, and return the exit code.

    Raises:
      LeptonError: a mistake that the user can fix.
    """
    for library in LIBRARIES:
        needs(library, extra="serve", purpose="lepton serve")
    # only here: the libraries may be missing
    from lepton_jax.ship.serve.server import end_process
    from lepton_jax.ship.serve.serving import serve

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    chosen = options_of(options)
    names = dict(named(text) for text in options.artifacts)
    others = set(threading.enumerate())
    try:
        code = serve(list(names), partial(opened, names), chosen)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        code = MISTAKE
    own = set(threading.enumerate()) - others
    if any(thread.name.startswith(LOADER) for thread in own):
        end_process(code)
    return code


def options_of(options: argparse.Namespace) -> Any:
    """Return how artifacts are served, as a command line says.

    Raises:
      LeptonError: a mistake that the user can fix.
    """
    from lepton_jax.ship.serve.serving import Options

    return Options(
        _listening(options),
        _limits(options),
        _guards(options),
        _sizes(options.batch),
        options.most_rows,
        _canaries(options.canary),
        _shadows(options.shadow),
        meter=watching.meter_of(options),
        say=_say,
    )


def opened(names: Mapping[Path, str], place: Path) -> Any:
    """Return the artifact at a place, under the name that the command line gives it."""
    artifact = trained.artifact_of(place)
    if names[place]:
        artifact.manifest = replace(artifact.manifest, name=names[place])
    return artifact


def named(text: str) -> tuple[Path, str]:
    """Return the place of an artifact, and the name before it; "": its own."""
    path = path_of(text)
    return Path(path), text.removesuffix(path).removesuffix("=")


def _say(text: str) -> None:
    print(text, flush=True)


def _listening(options: argparse.Namespace) -> Any:
    from lepton_jax.ship.serve.server import Listening

    _check_positive("--drain", options.drain)
    _check_positive("--unready", options.unready, or_zero=True)
    if not 0 <= options.port < 1 << 16:
        raise SettingError(
            f"{options.port} is no port",
            where="command line, --port",
            remedy="give a number from 0 to 65535",
        )
    return Listening(
        options.host,
        options.port,
        options.tls_cert,
        options.tls_key,
        options.unready,
        options.drain,
    )


def _limits(options: argparse.Namespace) -> Any:
    from lepton_jax.ship.serve.batcher import Limits

    _check_positive("--queue", options.queue)
    _check_positive("--timeout", options.timeout)
    _check_positive("--collect", options.collect, or_zero=True)
    return Limits(
        options.queue,
        options.timeout,
        options.collect * MILLISECOND,
    )


def _guards(options: argparse.Namespace) -> Any:
    from lepton_jax.ship.serve.guards import Guards

    _check_positive("--most-mib", options.most_mib)
    _check_positive("--most-rows", options.most_rows)
    is_local = _is_loopback(options.host)
    if not (is_local or options.token_file):
        print(
            f"anybody who reaches {options.host} may ask: no --token-file is given",
            file=sys.stderr,
        )
    return Guards(
        _tokens(options.token_file, "--token-file"),
        _tokens(options.admin_token_file, "--admin-token-file"),
        int(options.most_mib * MEBIBYTE),
        is_local=is_local,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tokens(files: list[Path], flag: str) -> tuple[str, ...]:
    """Return the tokens in some files.

    Raises:
      SettingError: one can't be read, others can read it, or it could be guessed.
    """
    found = []
    for file in files:
        try:
            found.append(tokens.read(file))
        except OSError as error:
            raise SettingError(
                f"a token can't be read: {error.strerror or error}",
                where=f"{flag} {file}",
                remedy=f"make one: (umask 077; {tokens.MAKE} > {file})",
            ) from error
    return tuple(found)


def _sizes(text: str) -> tuple[int, ...]:
    """Return the batch sizes of --batch.

    Raises:
      SettingError: one is no size.
    """
    if not text:
        return ()
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) for word in words):
        raise SettingError(
            f"{text!r} are no batch sizes",
            where="command line, --batch",
            remedy="write whole numbers with commas, e.g. 1,8,64",
        )
    return tuple(sorted({int(word) for word in words}))


def _canaries(texts: list[str]) -> dict[str, Any]:
    from lepton_jax.ship.serve.models import parse_canary

    return dict(parse_canary(text) for text in texts)


def _shadows(texts: list[str]) -> dict[str, str]:
    """Return the shadows of --shadow, by model.

    Raises:
      SettingError: one is not of the form.
    """
    shadows = {}
    for text in texts:
        name, sign, version = text.partition("=")
        if not (name and sign and version):
            raise SettingError(
                f"{text!r} names no shadow",
                where="command line, --shadow",
                remedy="write NAME=VERSION, e.g. digits=2",
            )
        shadows[name] = version
    return shadows


def _check_positive(
    flag: str,
    value: float,
    or_zero: bool = False,
) -> None:
    if value > 0 or (or_zero and value == 0):
        return
    raise SettingError(
        f"{flag} is {value:g}",
        where=f"command line, {flag}",
        remedy="give a number above zero",
    )
