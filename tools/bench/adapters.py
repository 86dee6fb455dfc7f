"""Fine-tuning by adapters against fine-tuning of everything, on a text of its own.

`tools.bench adapters --folder DIR`. A language model learns bytes of one text from
scratch: by default the first 4 MB of Python's standard library. Then it goes on with
another text, by default the package asyncio, from the same weights and with the same
batches: once with all parameters, once with LoRA or DoRA on all linear layers. Each
learns at several rates, and its best one counts, by the loss on the held-out last tenth
of that text.

The runs are kept in DIR, and the same command goes on with them, wherever it was
stopped; `--minutes` stops it by itself.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax import adapt
from lepton_jax.errors import DataError
from tools.bench import options as checks

SEED = 0
TEST_SHARE = 0.1  # of the second text: its end
BASE_BYTES = 4_000_000
BASE_RATE = 1e-3  # as recipes/lm.py has it for 10m
# Rates that each kind of fine-tuning is tried at; assumption: their best lie within.
RATES = {
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "dora": (1e-3, 3e-3, 1e-2),
}
MOST_GAP = 0.03  # of the loss that may be lost to full fine-tuning
MOST_SHARE = 0.03  # of the parameters


@dataclass(frozen=True)
class Job:
    """One run of the campaign."""

    name: str
    recipe: lepton.Recipe
    begins_with: Path | None = None  # a run's folder


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `adapters` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "adapters",
        __doc__,
        "fine-tuning by adapters, next to fine-tuning of everything",
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, metavar="DIR", help="of the runs")
    add("--base", type=Path, metavar="FILE", help="text to learn first")
    add("--text", type=Path, metavar="FILE", help="text to go on with")
    add("--size", default="10m", help="of the model (default: %(default)s)")
    add("--rank", type=int, default=7, help="of the adapters (default: %(default)s)")
    add(
        "--kinds",
        default="full,lora",
        help="of full, lora, dora (default: %(default)s)",
    )
    add("--length", type=int, default=128, help="bytes of a row")
    add("--batch", type=int, default=16, help="rows of a step")
    add("--base-steps", type=int, default=4000, help="of the first training")
    add("--steps", type=int, default=600, help="of each fine-tuning")
    add("--minutes", type=float, help="after which no more steps are made")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the campaign as far as the time goes; print and return the figures."""
    until = time.monotonic() + 60 * (options.minutes or np.inf)
    kinds = options.kinds.split(",")
    checks.check_names(kinds, RATES, "--kinds", "kind")
    base, jobs = _jobs(options, kinds)
    trainer = _gone_on(base, options.folder, until)
    if trainer is None:
        return {"unfinished": base.name}
    total = _entries(trainer)
    test = jobs[0].recipe.test
    before = float(trainer.evaluate(test)[0])
    print(f"{'before':12} loss {before:.4f}, {total:,} parameters")

    losses: dict[str, float] = {}
    shares: dict[str, float] = {}
    for job in jobs:
        tuned = _gone_on(job, options.folder, until)
        if tuned is None:
            return {"unfinished": job.name, "losses": losses}
        losses[job.name] = float(tuned.evaluate()[0])
        trained = [row for row in _parts(tuned) if not row["frozen"]]
        entries = sum(row["entries"] for row in trained) or total
        shares[job.name] = entries / total
        print(
            f"{job.name:12} loss {losses[job.name]:.4f}, {shares[job.name]:.2%} trained"
        )
    return _compared(before, losses, shares, kinds)


def _compared(
    before: float,
    losses: dict[str, float],
    shares: dict[str, float],
    kinds: list[str],
) -> dict[str, Any]:
    """Return the best run of each kind, and how far it is from the full one."""
    best = {}
    for kind in kinds:
        own = {name: loss for name, loss in losses.items() if name.startswith(kind)}
        name = min(own, key=lambda name: own[name])
        best[kind] = {"run": name, "loss": own[name], "share": shares[name]}
    results: dict[str, Any] = {"before": before, "losses": losses, "best": best}
    if "full" in best:
        for kind in kinds:
            gap = best[kind]["loss"] / best["full"]["loss"] - 1
            best[kind]["gap"] = gap
            print(f"{kind:12} {gap:+.2%} of the loss of full fine-tuning")
    return results


def _jobs(
    options: argparse.Namespace,
    kinds: list[str],
) -> tuple[Job, list[Job]]:
    """Return the first training, and the fine-tunings."""
    shape = lepton.models.transformer_size(options.size)
    model = partial(lepton.models.TransformerLM, **shape)
    first = _rows(_read(options.base, _standard_library), options.length)
    second = _rows(_read(options.text, _asyncio), options.length)
    cut = max(1, round(TEST_SHARE * len(second[0])))
    recipe = lepton.Recipe(
        name="base",
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=partial(optax.adamw, b2=0.95, weight_decay=0.1),
        learning_rate=_schedule(BASE_RATE, options.base_steps),
        clip_norm=1.0,
        train=first,
        batch_size=options.batch,
        steps=options.base_steps,
        save_every=100,
        seed=SEED,
    )
    base = Job(f"base-{options.base_steps}", recipe)
    tuning = recipe.with_(
        train=tuple(x[:-cut] for x in second),
        test=tuple(x[-cut:] for x in second),
        steps=options.steps,
        evaluate_every=options.steps,
    )
    jobs = []
    for kind in kinds:
        for rate in RATES[kind]:
            changes: dict[str, Any] = {"learning_rate": _schedule(rate, options.steps)}
            if kind != "full":
                make = getattr(adapt, kind)
                changes["model"] = make(model, rank=options.rank)
                # adapters are small: nothing has to be decayed
                changes["optimizer"] = adapt.only(partial(optax.adamw, b2=0.95))
            name = f"{kind}-{rate:g}"
            jobs.append(Job(name, tuning.with_(**changes), options.folder / base.name))
    return base, jobs


def _schedule(
    peak: float,
    steps: int,
) -> Any:
    warmup = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, 0.1 * peak)


def _gone_on(
    job: Job,
    folder: Path,
    until: float,
) -> Any:
    """Go on with a run to its end; return its trainer, or None if time is up."""
    place = folder / job.name
    trainer = lepton.Trainer(job.recipe, run_dir=place, devices=1)
    if list((place / "checkpoints").glob("*")):
        trainer.resume()
    elif job.begins_with is not None:
        fresh = [] if job.name.startswith("full") else [adapt.PATTERN]
        trainer.load(job.begins_with, fresh=fresh)
    assert job.recipe.steps is not None
    while trainer.step < job.recipe.steps:
        if time.monotonic() > until:
            print(f"{job.name:12} step {trainer.step}; the same command goes on")
            return None
        left = job.recipe.steps - trainer.step
        assert job.recipe.save_every is not None
        trainer.fit(steps=min(job.recipe.save_every, left))
    return trainer


def _entries(trainer: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))


def _parts(trainer: Any) -> list[dict[str, Any]]:
    table = getattr(trainer.recipe.optimizer, "table", None)
    return table(trainer.state.params) if table else []


# ---- texts ----


def _read(
    path: Path | None,
    otherwise: Any,
) -> bytes:
    return otherwise() if path is None else path.read_bytes()


def _standard_library() -> bytes:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return b"".join(file.read_bytes() for file in files)[:BASE_BYTES]


def _asyncio() -> bytes:
    files = sorted(Path(sysconfig.get_paths()["stdlib"], "asyncio").glob("*.py"))
    return b"".join(file.read_bytes() for file in files)


def _rows(
    text: bytes,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    count = (len(tokens) - 1) // length
    if count < 2:
        raise DataError(
            f"the text has {len(tokens)} bytes",
            where="--text",
            remedy=f"give one of more than {2 * length} bytes",
        )
    inputs = tokens[: count * length].reshape(count, length)
    targets = tokens[1 : count * length + 1].reshape(count, length)
    return inputs, targets
