"""Besiege a server of one artifact, and say what was not kept.

load          good requests in open loop with bursts, slow clients, clients that go
              away, oversize and bad requests, and hot swaps, all at once
kills         SIGTERM, and SIGKILL, at random moments under load
conformance   the protocol by its published description, by a client of Triton in an
              environment of its own, and by schemathesis
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError
from tools.bench.cli import surroundings


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 if something was not kept, or 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        result = _run(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1))
    if options.json is not None:
        facts = surroundings(arguments)
        facts["command"] = facts["command"].replace("tools.bench", "tools.siege")
        text = json.dumps({**facts, "results": result}, indent=1)
        options.json.write_text(text + "\n")
    return 0 if result["kept"] else 1


# ---- internals ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.siege",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["load", "kills", "conformance", "page"])
    parser.add_argument("artifact", type=Path, help="its folder")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="of load (default: 300)"
    )
    parser.add_argument(
        "--rate", type=float, default=300.0, help="requests a second (default: 300)"
    )
    parser.add_argument(
        "--bad", type=int, default=10_000, help="bad requests (default: 10000)"
    )
    parser.add_argument(
        "--count", type=int, default=50, help="kills by SIGTERM (default: 50)"
    )
    parser.add_argument(
        "--description",
        type=Path,
        help="open_inference_rest.yaml of github.com/kserve/open-inference-protocol",
    )
    parser.add_argument("--triton", help="a Python that has tritonclient[http]")
    parser.add_argument("--png", type=Path, help="file for a picture of the page")
    parser.add_argument("--schemathesis", help="the program schemathesis")
    return parser


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.command == "load":
        from tools.siege.load import besiege

        return besiege(
            options.artifact,
            options.seconds,
            options.rate,
            options.bad,
            options.seed,
        )
    if options.command == "kills":
        from tools.siege.kills import kill_often

        return kill_often(options.artifact, options.count, options.seed)
    if options.command == "page":
        from tools.siege.page import try_page

        return try_page(options.artifact, options.png)
    from tools.siege.conformance import conform

    return conform(
        options.artifact,
        options.description,
        options.triton,
        options.schemathesis,
    )
