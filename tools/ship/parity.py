"""Export each recipe's model to each target, and compare them with the trainer.

    python -m tools.ship.parity [RECIPE ...] [--to TARGET ...] [--runtimes FOLDER]

Each recipe is trained for some steps. 200 held-out rows, a quarter of which have
missing values, unseen categories or broken pictures where they are raw, are then
replayed by each exported model in its target's own runtime, and by the artifact in a
process that knows neither the recipe nor the model's code. With `--runtimes` these
processes run in the environments that `tools.ship.environments` has made, which hold
nothing else. Results are merged into a JSON file, and `--table` prints them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import LeptonError
from lepton_jax.ship.export import (
    LEPTON,
    TARGETS,
    Options,
    Source,
    export,
    live_source,
)
from lepton_jax.ship.export.parity import TOLERANCE, compared
from tools.ship.cases import CASES, DATA, ROOT, Case
from tools.ship.environments import python_of

ROWS = 200
RESULTS = ROOT / "benchmarks" / "ship-parity.json"
BATCH = 32  # of targets with a fixed one; assumption: it needs filling for 200 rows
# What the process does that opens an artifact: its arguments are the artifact, and
# where its outputs go.
FRESH = """
import sys
import numpy as np
import lepton_jax as lepton
artifact = lepton.Artifact.open(sys.argv[1])
stored = artifact.stored
inputs = stored.inputs if stored.rows is None else artifact.prepare(stored.rows)
refused = 0
if stored.refused is not None:
    for number in range(stored.refused.height):
        try:
            artifact.predict(stored.refused.slice(number, 1))
        except lepton.LeptonError:
            refused += 1
    assert refused == stored.refused.height, "it predicts rows that the trainer refuses"
assert "recipes" not in str(sorted(sys.modules))
np.savez(sys.argv[2], refused=refused, **artifact.run(inputs))
"""


def results_of(
    case: Case,
    targets: Sequence[str],
    data: Path,
    runtimes: Path | None,
) -> dict[str, dict[str, Any]]:
    """Return the comparison of each target, as plain data.

    Args:
      case: the recipe.
      targets: names.
      data: folder of the data sets.
      runtimes: folder of environments; None: this interpreter runs everything.
    """
    trainer = case.train(data)
    rows = case.raw_rows(trainer, data, ROWS)
    artifact = lepton.Artifact.of(
        trainer,
        name=case.recipe,
        rows=ROWS if rows is None else rows,
    )
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = live_source(artifact, trainer)
        for target in targets:
            began = time.monotonic()
            python = None if runtimes is None else python_of(runtimes, target)
            try:
                if target == LEPTON:
                    result = _opened_elsewhere(artifact, folder, python)
                else:
                    result = _exported(artifact, target, source, folder, python)
            except LeptonError as error:
                result = {"refused_because": error.what}
            result["seconds"] = round(
                time.monotonic() - began,
                1,
            )
            result["is_fresh"] = python is not None
            found[target] = result
            print(f"{case.name}: {target}: {_short(result)}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, write the results, and return 1 if a comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument(
        "--to",
        nargs="*",
        default=[LEPTON, *TARGETS],
        metavar="TARGET",
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="(default: %(default)s)"
    )
    parser.add_argument("--runtimes", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FILE",
    )
    parser.add_argument("--table", action="store_true", help="print what FILE holds")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return 0

    failed = 0
    for case in CASES:
        if options.recipes and case.recipe not in options.recipes:
            continue
        try:
            found = results_of(
                case,
                options.to,
                options.data,
                options.runtimes,
            )
        except Exception as error:  # of one case: the others go on
            traceback.print_exc()
            found = {LEPTON: {"failed": repr(error)}}
            failed += 1
        failed += sum(
            not result.get(
                "passes",
                True,
            )
            for result in found.values()
        )
        _merge(options.out, case.name, found)
    return int(failed > 0)


def table(content: Mapping[str, Any]) -> str:
    """Return the results as a table for docs/ship.md."""
    targets = [LEPTON, *TARGETS]
    lines = [
        f"| recipe | {' | '.join(targets)} |",
        f"|---|{'---|' * len(targets)}",
    ]
    reasons: dict[str, int] = {}
    for name, results in content["cases"].items():
        cells = [
            _cell(
                results.get(target, {}),
                reasons,
            )
            for target in targets
        ]
        lines.append(f"| {name.replace(' on ', ' on `', 1)}{_quote(name)} | ")
        lines[-1] += f"{' | '.join(cells)} |"
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


# ---- internals ----


def _opened_elsewhere(
    artifact: lepton.Artifact,
    folder: Path,
    python: Path | None,
) -> dict[str, Any]:
    """Return the comparison of an artifact that another process opens."""
    place = artifact.save(folder / "model.zip")
    outputs = folder / "outputs.npz"
    # -I: neither the checkout nor PYTHONPATH may lend it the recipe
    command = [str(python), "-I"] if python else [sys.executable]
    done = subprocess.run(
        [*command, "-c", FRESH, str(place), str(outputs)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LeptonError(
            f"the artifact can't be opened: {done.stderr.strip().splitlines()[-1]}",
            remedy="see the process's own error",
        )
    with np.load(outputs, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    refused = int(found.pop("refused"))
    result = compared(
        LEPTON,
        artifact.stored.outputs,
        found,
    ).to_fields()
    left = artifact.measure(artifact.stored.outputs)
    right = artifact.measure(found)
    return result | {
        "are_raw": artifact.stored.rows is not None,
        "refused": refused,
        "runtime": "Lepton, without recipes and models",
        "metrics": {name: (value, right[name]) for name, value in left.items()},
        "notes": list(artifact.manifest.notes),
    }


def _exported(
    artifact: lepton.Artifact,
    target: str,
    source: Source,
    folder: Path,
    python: Path | None,
) -> dict[str, Any]:
    fixed = None
    if not TARGETS[target].has_any_batch:
        fixed = source.batch_size if source.draws else BATCH
    parity = export(
        artifact,
        target,
        folder / target,
        source=source,
        options=Options(fixed),
        python=None if python is None else str(python),
    )
    assert parity is not None
    written = sum(file.stat().st_size for file in (folder / target).rglob("model*"))
    return parity.to_fields() | {"bytes": written, "batch": fixed}


def _merge(
    file: Path,
    name: str,
    found: dict[str, Any],
) -> None:
    """Put the results of a case into the file; those of other targets stay."""
    content: dict[str, Any] = {"cases": {}}
    if file.exists():
        content = json.loads(file.read_text())
    content |= {
        "command": "python -m tools.ship.parity --runtimes FOLDER",
        "rows": ROWS,
        "tolerance": TOLERANCE,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
    }
    content["cases"][name] = (
        content["cases"].get(
            name,
            {},
        )
        | found
    )
    file.write_text(
        json.dumps(
            content,
            indent=1,
            default=float,
        )
        + "\n"
    )


def _short(result: Mapping[str, Any]) -> str:
    if "refused_because" in result:
        return f"can't: {result['refused_because']}"
    verdict = "equal" if result["passes"] else "NOT EQUAL"
    return f"{verdict}, {result['scaled']:.1e}, {result['labels']} labels differ"


def _cell(
    result: Mapping[str, Any],
    reasons: dict[str, int],
) -> str:
    if not result:
        return ""
    if "refused_because" in result:
        number = reasons.setdefault(
            result["refused_because"],
            len(reasons) + 1,
        )
        return f"no ({number})"
    if not result["rows"]:
        return "bit by bit" if result["passes"] else "**differs**"
    value = "0" if not result["scaled"] else f"{result['scaled']:.0e}"
    if result["passes"]:
        return value
    number = reasons.setdefault(
        result["departs"],
        len(reasons) + 1,
    )
    return f"**{value}** ({number})"


def _quote(name: str) -> str:
    return "`" if " on " in name else ""


if __name__ == "__main__":
    sys.exit(main())
