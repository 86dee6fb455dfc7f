"""Read mixed sources in a process of its own, and print what it took as JSON.

python -m tools.bench.data_mixture FOLDER BATCHES
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path

import jax

import lepton_jax as lepton

BATCH = 128
KIB = 1024  # bytes in the unit of /proc/self/status


def main() -> None:
    """Read batches of the sources in a folder's folders."""
    folder = Path(sys.argv[1])
    batches = int(sys.argv[2])
    sources = {
        inner.name: lepton.data.shards(inner, target="label")
        for inner in sorted(folder.iterdir())
    }
    train = lepton.data.mix(sources, weights=dict.fromkeys(sources, 1))
    feed = lepton.data.open_feed(
        train.within(memory=256 * 2**20),
        batch_size=BATCH,
        steps=1,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        shuffle=True,
    )
    began = time.perf_counter()
    threads = 0
    for batch in islice(feed, batches):
        jax.block_until_ready(batch)
        threads = max(threads, status("Threads"))
    seconds = time.perf_counter() - began
    result = {
        "threads": threads,
        "bytes": status("VmHWM") * KIB,
        "seconds": seconds,
        "feed": feed.measured(),
    }
    feed.close()
    print(json.dumps(result))


def status(name: str) -> int:
    """Return a number of this process that Linux knows."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise AssertionError(f"Linux does not say {name}")


if __name__ == "__main__":
    main()
