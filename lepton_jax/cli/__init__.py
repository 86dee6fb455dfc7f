"""Command lines: `lepton launch | plan | control`.

Each command has a module of its own with a `main(arguments)` that returns the exit
code. `tools/launch.py`, `tools/plan.py` and `tools/control.py` are doors to the same
functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lepton_jax.errors import nearest

COMMANDS = {
    "launch": "train a recipe, here or on many hosts",
    "plan": "show what a step would cost, on hardware that need not be there",
    "control": "ask a run that is under way for something",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns its exit code, 2 for a mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    usage = _usage()
    if not given:
        print(usage, file=sys.stderr)
        return 2
    name, *rest = given
    if name in ("-h", "--help"):
        print(usage)
        return 0
    if name not in COMMANDS:
        print(
            f"{usage}\n\nerror: no command {name!r}{nearest(name, COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    # imported here, as each command brings along what the others don't need
    if name == "launch":
        from lepton_jax.cli.launch import main as command
    elif name == "plan":
        from lepton_jax.cli.plan import main as command
    else:
        from lepton_jax.cli.control import main as command
    return command(rest)


def _usage() -> str:
    lines = [f"  {name:<9}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lepton COMMAND ...",
            "",
            *lines,
            "",
            "lepton COMMAND --help says more.",
        ]
    )
