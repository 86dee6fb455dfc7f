"""Speed, utilization and memory of a language model on one device, next to PyTorch.

`tools.bench lm`. Both train the same Llama shape (RMSNorm, rotary positions, SwiGLU,
grouped heads, tied head) on resident random tokens, with AdamW (b2 0.95, weight decay
0.1) behind clipping to a global norm of 1. In bfloat16 both keep parameters, gradients
and optimizer state in float32 and compute the model in bfloat16, the loss in float32.

  lepton    `Trainer.fit` as it comes, by a plan of its own planner
  torch     `torch.compile`, `scaled_dot_product_attention`, fused AdamW, autocast, in a
            process of its own; left out where the interpreter (--torch) has no PyTorch,
            and on TPUs

Slices and rounds are those of `timing.py`; figures are medians of the rounds. If both
are on one GPU, JAX takes half of its memory (XLA_CLIENT_MEM_FRACTION, unless it is set
already), and the plan is for that half. On a CPU PyTorch's threads wait without
spinning (OMP_WAIT_POLICY=passive, unless it is set already), since each would slow the
other down otherwise.

Without an accelerator it runs shrunken: a model of a million parameters in float32,
which shows that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import lepton_jax as lepton
from lepton_jax.errors import LeptonError, PlanError, SettingError
from lepton_jax.hardware import Topology, here
from lepton_jax.planner import Plan, ahead
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.show.text import grid
from tools.bench import options as checks
from tools.bench import step as bench_step
from tools.bench import timing

# Sizes of `models.transformer_size`, with their usual tokens a sample.
SIZES = {
    "1m": 128,
    "10m": 256,
    "124m": 1024,
    "1b": 2048,
    "8b": 2048,
}
ON_CPU = 8  # samples a step, unless --batch says otherwise
MOST_TOKENS = 2**17  # of a step, that --batch auto tries
SAMPLES = 512  # in the training data, at least

# A usual setting for models of this shape (Touvron et al. 2023, "LLaMA", section 2.3).
OPTIMIZER = {"b2": 0.95, "weight_decay": 0.1}
RATE = 3e-4
CLIP_NORM = 1.0

JAX_SHARE = 0.5  # of a GPU's memory that PyTorch uses, too
# Either of these variables says that a user decides JAX's share.
SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
FORMULA = (
    "MFU is (6 N + 6 layers x length x dim) x tokens/s / peak: N parameters that"
    " multiply (all but an untied embedding),\nattention with causal counted half,"
    " recomputation not counted"
)


@dataclass(frozen=True)
class Case:
    """Model and batch that all contenders train.

    Attributes:
      name: of the size.
      shape: arguments of `TransformerLM`.
      length: tokens a sample.
      precision: dtype that the model computes in.
    """

    name: str
    shape: dict[str, Any]
    length: int
    precision: str

    def recipe(self, batch: int) -> lepton.Recipe:
        """Return the recipe for batches of a size, on random tokens."""
        inputs, targets = bench_step.tokens(
            max(SAMPLES, batch),
            self.length,
            self.shape["vocab"],
        )
        never = bench_step.NEVER
        return lepton.Recipe(
            name="lm",
            model=partial(lepton.models.TransformerLM, **self.shape),
            loss=lepton.losses.cross_entropy,
            optimizer=partial(optax.adamw, **OPTIMIZER),
            learning_rate=RATE,
            clip_norm=CLIP_NORM,
            train=lepton.data.Arrays(inputs, targets),
            batch_size=batch,
            precision=self.precision,
            evaluate_every=never,
            save_every=never,
        )

    def flops(self, parameters: int) -> float:
        """Return the model FLOP of a token, forward and backward.

        6 N (Kaplan et al. 2020, section 2.1) and, for each layer, 12 x length x dim of
        attention (Chowdhery et al. 2022, "PaLM", appendix B), half of which a causal
        mask leaves. N leaves out an embedding that is only looked up.
        """
        dim = self.shape["dim"]
        looked_up = 0 if self.shape["tied"] else self.shape["vocab"] * dim
        projections = 6.0 * (parameters - looked_up)
        attention = 6.0 * self.shape["layers"] * self.length * dim
        return projections + attention


class Started(NamedTuple):
    """A trainer that has compiled its step, its plan, and notes for the user."""

    trainer: lepton.Trainer
    plan: Plan
    notes: list[str]


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `lm` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "lm",
        __doc__,
        "tokens/s, MFU and memory of a language model on one device, next to PyTorch",
    )
    checks.add_timing(parser, rounds=5, seconds=5.0)
    parser.add_argument(
        "--size",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(SIZES)} (default: 124m 1b; without an accelerator 1m)",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens a sample (default: 1024 for 124m, 2048 for 1b)",
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        help=(
            "samples a step; auto: the largest power of two whose plan fits without"
            " micro-batches and, if any does, without rematerialization (default:"
            f" auto; on a CPU {ON_CPU})"
        ),
    )
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        help="(default: bfloat16; on a CPU float32)",
    )
    parser.add_argument(
        "--loop",
        choices=("unrolled", "scan"),
        default="unrolled",
        help="over the layers, of Lepton's model (default: %(default)s)",
    )
    parser.add_argument(
        "--torch",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that has PyTorch; none: leave it out (default: this one)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the sizes asked for, and print a table for each as it ends.

    Raises:
      SettingError: no such size, or a number that can't be.
      PlanError: not even one sample fits.
    """
    batch = _checked(options)
    without = _no_torch(options.torch)
    if not without and not any(name in os.environ for name in SHARES):
        os.environ[SHARES[0]] = str(JAX_SHARE)  # read when JAX first looks for devices

    topology, devices = here(1)
    small = topology.platform == "cpu"
    if topology.platform not in ("cpu", "gpu"):
        without = f"not on a {topology.platform.upper()}"
    shrunken = "; no accelerator is here: shrunken, to show that it works"
    print(f"{devices[0].device_kind}, one device{shrunken if small else ''}")
    if without:
        print(f"without PyTorch: {without}")
    if batch is None:
        batch = ON_CPU if small else 0

    usual = ["1m"] if small else ["124m", "1b"]
    results = []
    for name in dict.fromkeys(options.size or usual):
        case = Case(
            name,
            lepton.models.transformer_size(name) | {"loop": options.loop},
            options.length or SIZES[name],
            options.precision or ("float32" if small else "bfloat16"),
        )
        python = None if without else options.torch
        results.append(
            measure(
                case,
                batch,
                options.rounds,
                options.seconds,
                topology,
                python,
            )
        )
        print("\n" + _table(results[-1]), flush=True)
    source = _source(topology, results[0]["precision"])
    print(f"\n{FORMULA};\nthe peak is {topology.chip.name}'s: {source}")
    return results


def measure(
    case: Case,
    batch: int,
    rounds: int,
    seconds: float,
    topology: Topology,
    python: str | None,
) -> dict[str, Any]:
    """Measure one size.

    Args:
      case: the size.
      batch: samples a step; 0: found by the planner.
      rounds: slices of each contender.
      seconds: length of a slice.
      topology: the live device.
      python: an interpreter with PyTorch; None: measure Lepton alone.
    """
    device = here(1)[1][0]
    before = _allocated(device)
    trainer, plan, notes = _start(case, batch)
    parameters = _parameters(trainer)
    print(f"\n{_title(case, plan, parameters)}", flush=True)

    with Torch(case, plan.batch_size, python, topology.platform) as torch:
        assert torch.about.get("parameters", parameters) == parameters, (
            "PyTorch's model is another one"
        )
        runs: dict[str, timing.Run] = {"lepton": partial(bench_step.fit, trainer)}
        if torch.about:
            runs["torch"] = torch.run
        steps, ms = _time(runs, plan, rounds, seconds)

    after = _allocated(device)
    memory: dict[str, dict[str, Any]] = {
        "lepton": {
            "predicted": plan.peak,
            "xla": _peak_by_xla(trainer),
            # a peak of the process: of this size only if it has risen
            "allocated": after if after and after > (before or 0) else None,
        }
    }
    if "torch" in runs:
        memory["torch"] = {"allocated": torch.last.get("peak")}
    return {
        **_settings(case, plan, parameters),
        "steps_a_slice": steps,
        "seconds": seconds,
        **_speeds(case, plan, parameters, ms, topology),
        "peak_bytes": memory,
        "memory_limit": plan.memory,
        "torch": torch.about or None,
        "notes": [*notes, *torch.notes],
    }


def _time(
    runs: dict[str, timing.Run], plan: Plan, rounds: int, seconds: float
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Return steps a slice, and milliseconds a step in each round, by contender."""
    multiples = {"lepton": plan.steps_per_call, "torch": 1}
    steps = {
        name: timing.steps_of_slice(run, seconds, multiples[name])
        for name, run in runs.items()
    }
    with timing.compilations() as compiled:
        ms = timing.time_in_rounds(runs, steps, rounds)
    assert not compiled, f"compiled while it was measured: {compiled}"
    return steps, ms


def _settings(
    case: Case,
    plan: Plan,
    parameters: int,
) -> dict[str, Any]:
    return {
        "size": case.name,
        "parameters": parameters,
        "length": case.length,
        "batch_size": plan.batch_size,
        "loop": case.shape["loop"],
        "precision": case.precision,
        "plan": plan.name,
        "remat": plan.remat,
        "micro_batches": plan.micro_batches,
        "steps_per_call": plan.steps_per_call,
    }


def _speeds(
    case: Case,
    plan: Plan,
    parameters: int,
    ms: dict[str, list[float]],
    topology: Topology,
) -> dict[str, Any]:
    """Return what follows from the milliseconds: tokens a second, MFU, ratios."""
    peak = topology.chip.peak(case.precision)
    per_token = case.flops(parameters)
    tokens = plan.batch_size * case.length
    rates = {name: [tokens / t * 1e3 for t in times] for name, times in ms.items()}
    utilization = {
        name: statistics.median(values) * per_token / peak
        for name, values in rates.items()
    }
    predicted = plan.step_seconds * 1e3
    speeds = {
        "ms_a_step": {name: timing.spread(times) for name, times in ms.items()},
        "tokens_per_second": {
            name: timing.spread(values) for name, values in rates.items()
        },
        "mfu": utilization,
        "model_flop_a_token": per_token,
        "peak_flops": peak,
        "peak_source": _source(topology, case.precision),
        "predicted_ms_a_step": predicted,
        "measured_to_predicted": statistics.median(ms["lepton"]) / predicted,
    }
    if "torch" in rates:
        ratios = timing.spread_of_ratios(rates["lepton"], rates["torch"])
        speeds["lepton_to_torch"] = ratios
    return speeds


# ---- Lepton ----


def _start(case: Case, batch: int) -> Started:
    """Return a trainer that has run a first call.

    If the planner found the batch and XLA can't hold it after all, half of it is tried.
    """
    given = batch
    notes: list[str] = []
    while True:
        plan = planned(case, batch) if batch else fitting(case)
        trainer = lepton.Trainer(case.recipe(plan.batch_size), devices=1, plan=plan)
        try:
            bench_step.fit(trainer, plan.steps_per_call)
            return Started(trainer, plan, notes)
        except (LeptonError, jax.errors.JaxRuntimeError) as error:
            if given or plan.batch_size == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            batch = plan.batch_size // 2
            notes.append(
                f"a batch of {plan.batch_size} was planned to fit, at {size(plan.peak)}"
                f" of {size(plan.memory)}, but did not"
            )
        del trainer
        gc.collect()


def planned(case: Case, batch: int) -> Plan:
    """Return the plan for a batch: plain, if that fits."""
    trainer = lepton.Trainer(case.recipe(batch), devices=1)
    try:
        return trainer.plan(remat="none", micro_batches=1)
    except PlanError:
        return trainer.plan()


def fitting(
    case: Case,
    on: str | None = None,
) -> Plan:
    """Return the plan of the largest batch, a power of two, that fits in one piece.

    Args:
      case: what is trained.
      on: a topology by name; None: the live device.

    Returns:
      A plan without rematerialization if any batch fits so, else with it.

    Raises:
      PlanError: not even one sample fits.
    """
    plain = _largest(case, on, "none")
    if plain is not None:
        return plain
    plan = _largest(case, on, None)
    if plan is None:  # once more, for the error that says why
        plan = _plan_in_one_piece(case, 1, on, None)
    return plan


def _largest(
    case: Case,
    on: str | None,
    remat: str | None,
) -> Plan | None:
    """Return the plan of the largest batch that fits; None if none does."""
    most = max(1, MOST_TOKENS // case.length)
    largest = None
    batch = 1
    while batch <= most:
        try:
            largest = _plan_in_one_piece(case, batch, on, remat)
        except PlanError:
            break
        batch *= 2
    return largest


def _plan_in_one_piece(
    case: Case, batch: int, on: str | None, remat: str | None
) -> Plan:
    trainer = lepton.Trainer(case.recipe(batch), devices=1)
    return trainer.plan(on, remat=remat, micro_batches=1)


def _parameters(trainer: lepton.Trainer) -> int:
    assert trainer.trace is not None
    leaves = jax.tree.leaves(trainer.trace.state.params)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _peak_by_xla(trainer: lepton.Trainer) -> int:
    assert trainer.program is not None
    return ahead.compile_for(trainer.program.lower())[1].peak


def _allocated(device: jax.Device) -> int | None:
    """Return the most bytes that were ever in use on a device, if it counts them."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


# ---- PyTorch ----


class Torch:
    """`torch_lm.py` in a process of its own.

    Without an interpreter, or if PyTorch fails at the start, nothing runs.

    Attributes:
      about: what runs, as the process says; empty if nothing does.
      last: its last answer.
      notes: why nothing does.
    """

    def __init__(
        self,
        case: Case,
        batch: int,
        python: str | None,
        platform: str,
    ):
        self.about: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.notes: list[str] = []
        shape = {name: x for name, x in case.shape.items() if name != "loop"}
        self._spec = {
            **shape,
            "length": case.length,
            "batch": batch,
            "samples": max(SAMPLES, batch),
            "precision": case.precision,
            "device": "cpu" if platform == "cpu" else "cuda",
            "learning_rate": RATE,
            "clip_norm": CLIP_NORM,
            **OPTIMIZER,
        }
        self._python = python

    def __enter__(self) -> Torch:
        if self._python is None:
            return self
        self._errors = tempfile.TemporaryFile("w+")
        program = Path(__file__).with_name("torch_lm.py")
        self._process = subprocess.Popen(
            [self._python, str(program), json.dumps(self._spec)],
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"OMP_WAIT_POLICY": "passive"} | os.environ,
        )
        try:
            self.about = self._answer()
            if not self.about["compiled"]:
                note = "PyTorch runs without torch.compile, for want of a compiler"
                self.notes.append(note)
        except SettingError as error:
            self.notes.append(f"without PyTorch: {error.what}")
        return self

    def run(self, steps: int) -> None:
        """Run steps, and wait for them."""
        assert self._process.stdin is not None
        # if the process has ended, there will be no answer, and that is an error
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{steps}\n")
        self.last = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = [text.strip() for text in self._errors if text.strip()]
        raise SettingError(
            f"its process ended with code {code}: {said[-1] if said else 'no word'}",
            where=self._python,
            remedy="measure without it, --torch none, or a smaller --batch",
        )

    def __exit__(self, *unused: Any) -> None:
        if self._python is None:
            return
        self._process.communicate()  # ends its input
        self._errors.close()


def _no_torch(python: str) -> str:
    """Return why there is no PyTorch to compare with; empty if there is.

    Raises:
      SettingError: there is no such interpreter.
    """
    if python == "none":
        return "as asked for"
    code = (
        "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is"
        " None)"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, check=False)
    except OSError as error:
        raise SettingError(
            f"{python!r} can't be run: {error.strerror}",
            where="--torch",
            remedy="name a Python interpreter, or none",
        ) from error
    if done.returncode == 0:
        return ""
    return f"{python} has none; --torch names another interpreter"


# ---- settings and the table ----


def _checked(options: argparse.Namespace) -> int | None:
    """Check the options; return the batch: None: not given, 0: auto."""
    checks.check_positive(options, "rounds", "seconds", "length")
    checks.check_names(options.size or (), SIZES, "--size", "size")
    if options.batch in (None, "auto"):
        return 0 if options.batch else None
    if not options.batch.isdecimal() or int(options.batch) < 1:
        raise SettingError(
            f"--batch is {options.batch!r}",
            where="command line",
            remedy="give auto, or a number above 0",
        )
    return int(options.batch)


def _source(topology: Topology, precision: str) -> str:
    """Return the chip's peak, and where that figure is from."""
    chip = topology.chip
    otherwise = chip.sources.get("peaks.bfloat16", "no source")
    source = chip.sources.get(f"peaks.{precision}") or otherwise
    return f"{chip.peak(precision) / 1e12:.5g} TFLOP/s dense in {precision} ({source})"


def _title(
    case: Case,
    plan: Plan,
    parameters: int,
) -> str:
    pieces = (
        "in one piece"
        if plan.micro_batches == 1
        else f"in {plan.micro_batches} micro-batches"
    )
    return (
        f"{case.name}: {parameters:,} parameters, {case.precision}, batches of"
        f" {plan.batch_size} x {case.length:,} tokens {pieces}, remat {plan.remat},"
        f" layers {case.shape['loop']}"
    )


def _table(result: dict[str, Any]) -> str:
    titles = (
        "",
        "ms a step",
        "tokens/s",
        "MFU",
        "peak predicted",
        "by XLA",
        "by allocator",
    )
    rows = [_row(result, name) for name in result["ms_a_step"]]
    lines = grid(titles, rows, "<>>>>>>")
    if "lepton_to_torch" in result:
        ratio = result["lepton_to_torch"]
        bounds = f"{ratio['min']:.2f}-{ratio['max']:.2f}"
        lines.append(
            f"lepton trains {ratio['median']:.2f} ({bounds}) times as many tokens a"
            " second as torch"
        )
    lines.append(
        f"the plan predicts {result['predicted_ms_a_step']:.4g} ms a step; it takes "
        f"{result['measured_to_predicted']:.2f} times that"
    )
    return "\n".join([*lines, *(f"! {note}" for note in result["notes"])])


def _row(
    result: dict[str, Any],
    name: str,
) -> list[str]:
    """Return a contender's row of the table."""
    title = name
    if name == "torch":
        about = result["torch"]
        title = f"torch {about['torch']}{', compiled' if about['compiled'] else ''}"

    ms = result["ms_a_step"][name]
    rate = result["tokens_per_second"][name]["median"]
    held = result["peak_bytes"][name]
    peaks = [held.get(kind) for kind in ("predicted", "xla", "allocated")]
    return [
        title,
        f"{ms['median']:.4g} ({ms['min']:.4g}-{ms['max']:.4g})",
        f"{rate:,.0f}",
        f"{result['mfu'][name]:.1%}",
        *(size(peak) if peak else "-" for peak in peaks),
    ]
