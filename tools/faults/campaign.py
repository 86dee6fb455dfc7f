"""Break runs on several hosts in every way that clusters do, and judge the outcome.

A trial starts a real run of several processes, makes one fault come true in it that was
drawn from the seed, and holds what follows against that fault's promise. What is
expected of an undisturbed run is taken from one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError, SettingError
from tools.bench.cli import surroundings
from tools.faults import network
from tools.faults.ending import Ending
from tools.faults.forms import FORMS
from tools.faults.kinds import Fault, draw, kinds
from tools.faults.promises import ROUNDING
from tools.faults.trial import Trial, reference

# Of the times to the next step; "worst" is the largest.
SHARES = {"median": 0.5, "p95": 0.95, "worst": 1.0}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
      0 if every promise was kept, 1 if not, 2 for a mistake of the user's.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(arguments)
        _check(options)
        rows = campaign(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    totals = summary(rows)
    print(
        f"{totals['kept']} of {totals['trials']} as promised; all, with the seconds"
        f" from a fault to the next step: {totals}"
    )
    if options.json is not None:
        command = f"python -m tools.faults {' '.join(arguments)}"
        record = {
            **surroundings([]),
            "command": command,
            "summary": totals,
            "results": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if totals["kept"] == totals["trials"] else 1


def campaign(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the trials that are not done yet, and print a line for each."""
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / f"seed{options.seed}.jsonl"
    done = _read_results(results)
    expected = reference(options.folder, options.hosts, options.devices, _form(options))

    for number in range(options.count):
        if number in done:
            continue
        fault = draw(options.seed, number, options.hosts, options.only)
        forbidden = network.forbidden() if fault.network else ""
        if forbidden:
            done[number] = _skipped(number, fault, forbidden)
        else:
            done[number] = _tried(number, fault, expected, options)
            with results.open("a") as file:
                file.write(json.dumps(done[number]) + "\n")
    return [done[number] for number in range(options.count)]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count the promises that were kept; give quantiles of the recovery times.

    Recovery times are seconds from a fault to the next step; those whose names begin
    with "away_" are of links that were away.
    """
    skipped = sum("skipped" in row for row in rows)
    totals: dict[str, Any] = {
        "trials": len(rows) - skipped,
        "skipped": skipped,
        "kept": sum(row["kept"] is True for row in rows),
    }
    for prefix, of_links in (("", False), ("away_", True)):
        times = sorted(
            row["to_next_step"]
            for row in rows
            if row["to_next_step"] is not None
            and row["promise"] == "recovered"
            and row["fault"].startswith("network away") == of_links
        )
        totals[f"{prefix}recoveries"] = len(times)
        for name, share in SHARES.items() if times else ():
            position = min(len(times) - 1, int(share * len(times)))
            totals[f"{prefix}{name}"] = times[position]
    return totals


# ---- internals ----


def _read_results(file: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of trials that are done, by number."""
    if not file.exists():
        return {}
    rows = map(json.loads, file.read_text().splitlines())
    return {row["number"]: row for row in rows}


def _skipped(
    number: int,
    fault: Fault,
    why: str,
) -> dict[str, Any]:
    print(
        f"{number:4}  {fault.name:32} {fault.promise:26} skipped: no networks of its"
        f" own here: {why}",
        flush=True,
    )
    return {
        "number": number,
        "fault": fault.name,
        "promise": fault.promise,
        "kept": None,
        "skipped": why,
        "to_next_step": None,
    }


def _tried(
    number: int,
    fault: Fault,
    expected: Ending,
    options: argparse.Namespace,
) -> dict[str, Any]:
    folder = options.folder / f"seed{options.seed}-{number}"
    form = _form(options)
    rounding = FORMS[options.form].rounding if options.form else ROUNDING
    trial = Trial(folder, options.hosts, options.devices, fault, form, rounding)
    row = {"number": number, **trial.run(expected)}

    verdict = "as promised"
    if not row["kept"]:
        verdict = f"NOT as promised: {row['wrong']} (see {folder}/log.txt)"
    seconds = row["to_next_step"]
    took = "" if seconds is None else f", {seconds:.1f} s to the next step"
    print(
        f"{number:4}  {row['fault']:32} {row['promise']:26} {verdict}{took}", flush=True
    )

    if row["kept"] and not options.keep:
        shutil.rmtree(folder)
    return row


def _form(options: argparse.Namespace) -> list[str]:
    """Return the options of the form that the runs have."""
    if options.form is None:
        return []
    devices = options.hosts * options.devices
    return FORMS[options.form].options(options.folder, devices)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.faults",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--count",
        type=int,
        default=100,
        metavar="N",
        help="trials (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=1,
        metavar="S",
        help="decides which faults are drawn (default: %(default)s)",
    )
    add(
        "--hosts",
        type=int,
        default=4,
        metavar="N",
        help="processes of a run (default: %(default)s)",
    )
    add(
        "--devices",
        type=int,
        default=2,
        metavar="N",
        help="virtual devices of each (default: %(default)s)",
    )
    add("--only", nargs="+", metavar="KIND", help=f"of {', '.join(kinds(4))}")
    add(
        "--form",
        choices=list(FORMS),
        help=(
            "train a Transformer in this form of a step, by a plan for all devices"
            " (default: two layers, and the planner's plan)"
        ),
    )
    add(
        "--folder",
        type=Path,
        metavar="DIR",
        default=Path(tempfile.gettempdir()) / "lepton-faults",
        help=(
            "for the runs, of one form; trials that are done are not repeated (default:"
            " %(default)s)"
        ),
    )
    add(
        "--keep",
        action="store_true",
        help="keep the runs that ended as promised, too",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write results, machine and versions to FILE",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise a SettingError for a campaign that can't be."""
    if options.count < 1 or options.hosts < 2 or options.devices < 1:
        raise SettingError(
            "there is nothing to break",
            where="command line",
            remedy="give 1 trial and 2 hosts or more",
        )
    unknown = set(options.only or ()) - kinds(4).keys()
    if unknown:
        raise SettingError(
            f"there is no kind {', '.join(sorted(unknown))}",
            where="--only",
            remedy=f"the kinds are {', '.join(kinds(4))}",
        )
