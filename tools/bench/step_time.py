"""The planner's predicted step time and FLOP, next to what virtual CPU devices take.

`tools.bench planner-time`. Programs of `tools.bench.families`, of sizes for a CPU, are
planned, compiled and run on 1, 2 and 4 virtual devices. Kendall's tau says whether the
slower programs are predicted to be slower. The FLOP of a plan are set next to those of
the matmuls and convolutions in XLA's program. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
from typing import Any

from lepton_jax.errors import SettingError
from tools.bench import options as checks
from tools.bench.families import command, figures, history, timing, workers

# of a half, unless --programs says otherwise; the claim asks for 40
PROGRAMS = 48
STEPS = 8  # of each that are timed in a round


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `planner-time` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "planner-time",
        __doc__,
        "predicted step time and FLOP next to measured, on virtual CPU devices",
    )
    command.add_options(parser, PROGRAMS)
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="predict with figures of this machine, measured first",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help="steps of each program in a round (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure programs of one half.

    Returns:
      The aggregate figures; with the programs if they are for tuning.

    Raises:
      SettingError: no half is given, or no such family.
    """
    if options.half is None:
        raise SettingError(
            "no half is given",
            where="--half",
            remedy="say --half tuning, or --half judging",
        )
    checks.check_at_least(options, steps=1)
    names = command.chosen(options)
    chip = workers.once(timing.calibrated) if options.calibrate else None
    calls = [(*name, options.steps, chip) for name in names]
    rows = command.collect(
        options,
        workers.rows(
            timing.measure,
            calls,
            command.judging(options),
            # what a process kept of the memory of an earlier program slows the next
            a_process=1,
        ),
        len(calls),
        timing.line,
    )
    found = timing.summary(rows)
    print(timing.text(found))
    if command.judging(options):
        if not options.no_history:
            history.append(history.TIME, found, options.arguments)
        return {"figures": found}
    for name, group in figures.by(rows, figures.family).items():
        print(f"{name:14} {timing.text(timing.summary(group))}")
    return {"figures": found, "programs": rows}
