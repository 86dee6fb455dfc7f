"""Train a small language model in each precision, and compare the held-out losses.

    python tools/precision.py --steps 1000 --out benchmarks/precision-cpu.json

It is the 1m model of `recipes/lm.py`, on a CPU, which emulates products of 8 bits with
the rounding that other devices have. A second seed of bfloat16 says how far two runs
are apart that differ in nothing else. Runs that the file has already are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lepton_jax as lepton
from recipes import lm

RUNS = (("bfloat16", 0), ("bfloat16", 1), ("fp8", 0), ("int8", 0))


def trained(precision: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once, and return the loss on the held-out text."""
    trainer = lepton.Trainer(lm.recipe(precision=precision, seed=seed, steps=steps))
    start = time.perf_counter()
    trainer.fit()
    return {
        "precision": precision,
        "seed": seed,
        "products": trainer.plan().products,
        "loss": round(float(trainer.evaluate().loss), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Train in each precision, print the losses and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="a JSON file for the losses")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.out is not None and options.out.exists():
        rows = json.loads(options.out.read_text())["rows"]
    done = {(row["precision"], row["seed"]) for row in rows}
    for precision, seed in RUNS:
        if (precision, seed) in done:
            continue
        row = trained(precision, seed, options.steps)
        row["over_bfloat16"] = round(row["loss"] / (rows or [row])[0]["loss"] - 1, 4)
        rows.append(row)
        print(row, flush=True)
        if options.out is not None:
            record = {"model": "recipes/lm.py, 1m", "steps": options.steps}
            options.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
