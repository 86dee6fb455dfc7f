"""What preparing costs over the same job written by hand.

`tools.bench prepare`. A table of texts and numbers is generated; its texts are cleaned,
rows without an amount dropped, the numbers standardized, rows with the text of an
earlier row dropped, and the rest written as Parquet. Once by a `Preparation`, once by
hand in Polars, in memory and with all its threads; a process each, in turns. Measured
are the seconds of the work, without the start of Python and imports, those of all
processors together, and the peak of the process's memory (VmHWM). The rows of both are
compared.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import LeptonError
from tools.bench import options as checks

ROOT = Path(__file__).resolve().parents[2]
ROWS = 10_000_000
CHUNK = 250_000  # rows that are generated, and written as a row group, at once
WORDS = 5_000  # different ones
WORDS_A_TEXT = 13  # 101 bytes on average with what is to be cleaned
SHARE_REPEATED = 0.05  # of rows whose text an earlier row has
SHARE_MISSING = 0.02  # of amounts
SEED = 0
GIB = 2**30
MEMORY_LIMIT = 2e9  # bytes, of the claim
RATIO_LIMIT = 1.15  # of the claim
NUMBERS = ("amount", "age")
JOBS = ("lepton", "hand")
# CleanText's own (`lepton_jax.data.prepare.steps.text`), so that both do the same.
LINE_ENDS = r"\r\n?|[\x0B\x0C\x{85}\x{2028}\x{2029}]"


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `prepare` to the subcommands."""
    parser = checks.add_command(
        commands, shared, "prepare", __doc__, "what preparing costs over Polars by hand"
    )
    checks.add_timing(parser, rounds=3)
    parser.add_argument(
        "--rows",
        type=int,
        default=ROWS,
        metavar="N",
        help="rows of the table (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where the table and what is made of it go (default: a temporary folder)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turns, and print a line for each round.

    Raises:
      SettingError: no rows or rounds.
      LeptonError: one of them fails, or their rows differ.
    """
    checks.check_positive(options, "rows", "rounds")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        table = folder / f"table-{options.rows}.parquet"
        if not table.exists():
            generate(table, options.rows)
        results: dict[str, Any] = {
            "rows": options.rows,
            "bytes": table.stat().st_size,
            "polars": version("polars"),
        }
        rounds = [_round(folder, table) for _ in range(options.rounds)]
    for job in JOBS:
        of_job = [one[job] for one in rounds]
        results[job] = {
            "seconds": [one["seconds"] for one in of_job],
            "median_seconds": statistics.median(one["seconds"] for one in of_job),
            "cpu_seconds": [one["cpu_seconds"] for one in of_job],
            "peak_bytes": max(one["peak_bytes"] for one in of_job),
            "out_rows": of_job[0]["out_rows"],
        }
    ratios = [one["lepton"]["seconds"] / one["hand"]["seconds"] for one in rounds]
    results["ratio"] = statistics.median(ratios)
    results["ratio_limit"] = RATIO_LIMIT
    results["memory_limit_bytes"] = MEMORY_LIMIT
    print(f"ratio {results['ratio']:.3f} (median of the rounds)")
    return results


def _round(folder: Path, table: Path) -> dict[str, dict[str, Any]]:
    made = {}
    for job in JOBS:
        out = folder / job
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "tools.bench.prepare", job, table, out]
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LeptonError(
                f"{job} ends with exit code {done.returncode}",
                where="prepare",
                remedy=f"see what it says: {done.stderr.strip()[-300:]}",
            )
        made[job] = json.loads(done.stdout.splitlines()[-1])
        print(_line(job, made[job]), flush=True)
    if made["lepton"]["sums"] != made["hand"]["sums"]:
        raise LeptonError(
            f"the rows differ: {made['lepton']['sums']} and {made['hand']['sums']}",
            where="prepare",
            remedy="find out which of the two is wrong",
        )
    return made


def _line(job: str, made: dict[str, Any]) -> str:
    return (
        f"{job:8} {made['seconds']:8.2f} s {made['cpu_seconds']:8.2f} s of processors"
        f" {made['peak_bytes'] / 1e9:6.2f} GB {made['out_rows']:12,} rows"
    )


# ---- the table ----


def generate(path: Path, rows: int) -> None:
    """Write the table, a chunk a row group."""
    import polars as pl
    import pyarrow.parquet as parquet

    random = np.random.default_rng(SEED)
    words = _words(random)
    writer = None
    path.parent.mkdir(parents=True, exist_ok=True)
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        table = _chunk(words, first, count, random)
        arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest())
        if writer is None:
            # as large as its values, so that nothing is gained by reading less
            writer = parquet.ParquetWriter(
                path, arrow.schema, compression="none", use_dictionary=False
            )
        writer.write_table(arrow, row_group_size=CHUNK)
    assert writer is not None
    writer.close()


def _words(random: np.random.Generator) -> Any:
    import polars as pl

    letters = np.array(list("abcdefghijklmnopqrstuvwxyzäöüé"))
    sizes = random.integers(2, 11, WORDS)
    return pl.Series(["".join(random.choice(letters, size)) for size in sizes])


def _chunk(
    words: Any,
    first: int,
    count: int,
    random: np.random.Generator,
) -> Any:
    """Return some rows of the table; the texts of some are those of earlier rows."""
    import polars as pl

    numbers = np.arange(first, first + count)
    repeated = random.random(count) < SHARE_REPEATED
    earlier = (numbers * random.random(count)).astype(np.int64)
    texts = np.where(repeated, earlier, numbers)
    # of each text the number decides its words
    seeds = pl.Series(texts.astype(np.uint64))
    columns = []
    for place in range(WORDS_A_TEXT):
        picks = seeds.hash(place) % WORDS
        columns.append(words.gather(picks).alias(str(place)))
    spaces = np.array([" ", "  ", " \t", "\u00a0"])[texts % 4]
    joined = pl.DataFrame(columns).select(
        pl.concat_str(
            pl.lit(" "),
            pl.concat_str(pl.nth(range(6)), separator=" "),
            pl.Series("space", spaces),
            pl.concat_str(pl.nth(range(6, WORDS_A_TEXT)), separator=" "),
            pl.lit(" "),
        ).alias("text")
    )
    amounts = random.lognormal(3.0, 1.0, count)
    missing = random.random(count) < SHARE_MISSING
    return joined.with_columns(
        pl.Series("amount", amounts).set(pl.Series(missing), None),
        pl.Series("age", random.integers(18, 90, count)),
        pl.Series("label", random.integers(0, 2, count).astype(np.int8)),
    )


# ---- the jobs ----


def by_lepton(table: Path, out: Path) -> list[Path]:
    """Do the job with a Preparation; return the files."""
    from lepton_jax.data.prepare import (
        CleanText,
        DropMissing,
        Duplicates,
        Preparation,
        Standardize,
        prepare,
    )

    preparation = Preparation(
        sources={"table": table},
        steps=[
            CleanText(["text"], noted=False),
            DropMissing(["amount"]),
            Standardize(list(NUMBERS)),
            Duplicates(["text"]),
        ],
        target="label",
    )
    return prepare(preparation, out).shards("train")


def by_hand(table: Path, out: Path) -> list[Path]:
    """Do the job with Polars alone; return the files."""
    import polars as pl

    from lepton_jax.data.prepare.steps.text import INVISIBLE

    text = (
        pl.col("text")
        .str.normalize("NFC")
        .str.replace_all(LINE_ENDS, "\n")
        .str.replace_all(INVISIBLE, "")
        .str.normalize("NFC")
        .str.replace_all(r"\s+", " ")
        .str.strip_chars()
    )
    rows = pl.scan_parquet(table).with_columns(text)
    rows = rows.filter(pl.col("amount").is_not_null())
    cleaned = rows.collect(engine="streaming")
    scaled = [
        (pl.col(name) - pl.col(name).mean()) / pl.col(name).std(ddof=0)
        for name in NUMBERS
    ]
    standardized = cleaned.with_columns(scaled)
    once = standardized.unique("text", keep="first", maintain_order=True)
    out.mkdir(parents=True)
    file = out / "rows.parquet"
    once.write_parquet(file, compression="zstd")
    return [file]


JOB: dict[str, Callable[[Path, Path], list[Path]]] = {
    "lepton": by_lepton,
    "hand": by_hand,
}


def work(name: str, table: Path, out: Path) -> dict[str, Any]:
    """Do a job; return what it took and sums of what came out."""
    import polars as pl

    import lepton_jax.data.prepare  # noqa: F401  imported before the clock starts

    began = time.perf_counter()
    busy = time.process_time()
    files = JOB[name](table, out)
    busy = time.process_time() - busy
    seconds = time.perf_counter() - began
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    rows = pl.scan_parquet(files).select(
        pl.len(),
        pl.col("text").str.len_bytes().cast(pl.UInt64).sum(),
        *(pl.col(name).abs().sum().round(3) for name in NUMBERS),
        pl.col("label").cast(pl.UInt64).sum(),
    )
    sums = rows.collect().row(0)
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_bytes": int(peak[1]) * 1024,
        "out_rows": sums[0],
        "sums": sums,
    }


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
