"""`tools.bench lm`: tokens per second, model FLOP utilization and memory of a language
model on one device, beside PyTorch.

Both train the same Llama shape (RMSNorm, rotary positions, SwiGLU, grouped heads, tied
head) on resident random tokens, with AdamW (b2 0.95, weight decay 0.1) behind clipping
to a global norm of 1. In bfloat16 both keep parameters, gradients and optimizer state
in float32 and compute the model in bfloat16, the loss in float32.

  lepton    `Trainer.fit` as it comes, by a plan of its own planner
  torch     `torch.compile`, `scaled_dot_product_attention`, fused AdamW, autocast, in a process of its own; left out
            where the interpreter (--torch) has no PyTorch, and on TPUs

Everything is compiled before the rounds begin. In a round each runs a slice of
--seconds, in an order that rotates; figures are medians of the rounds, ratios are taken
within a round. If both are on one GPU, JAX takes half of its memory
(XLA_CLIENT_MEM_FRACTION, unless it is set already), and the plan is for that half. On a
CPU PyTorch's threads wait without spinning (OMP_WAIT_POLICY=passive, unless it is set
already), else each would slow the other down.

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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import lepton_jax as lepton
from lepton_jax.errors import LeptonError, PlanError, SettingError, nearest
from lepton_jax.hardware import Topology, here
from lepton_jax.planner import Plan, ahead
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.show.text import grid
from tools.bench import step as bench_step

# and their usual lengths
SIZES = {
    "1m": 128,
    "10m": 256,
    "124m": 1024,
    "1b": 2048,
    "8b": 2048,
}
ON_CPU = 8  # samples a step, unless --batch says otherwise
MOST_TOKENS = 2**17  # of a step, that --batch auto tries
SAMPLES = 512
OPTIMIZER = {"b2": 0.95, "weight_decay": 0.1}
RATE = 3e-4
CLIP_NORM = 1.0
JAX_SHARE = 0.5  # of a GPU's memory that PyTorch uses, too
# by either of which a user decides that
SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
FORMULA = (
    "MFU is (6 N + 6 layers x length x dim) x tokens/s / peak: N parameters that"
    " multiply (all but an untied embedding),\nattention with causal counted half,"
    " recomputation not counted"
)


@dataclass(frozen=True)
class Case:
    """What is trained: a size's name, its `TransformerLM` arguments, tokens a sample,
    and the dtype it computes in.
    """

    name: str
    shape: dict[str, Any]
    length: int
    precision: str

    def recipe(self, batch: int) -> lepton.Recipe:
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
        """Model FLOP of a token, forward and backward: 6 N (Kaplan et al. 2020, section
        2.1) and, for each layer, 12 x length x dim of attention (Chowdhery et al. 2022,
        "PaLM", appendix B), half of which a causal mask leaves.
        """
        s = self.shape
        multiplied = parameters - (0 if s["tied"] else s["vocab"] * s["dim"])
        return 6.0 * multiplied + 6.0 * s["layers"] * self.length * s["dim"]


class Started(NamedTuple):
    """A trainer that has compiled its step, by which plan, and what had to be said on
    the way.
    """

    trainer: lepton.Trainer
    plan: Plan
    notes: list[str]


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `lm` to the subcommands."""
    parser = commands.add_parser(
        "lm",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help=(
            "tokens/s, MFU and memory of a language model on one device, beside PyTorch"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="length of a slice (default: %(default)s)",
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
    print(
        f"{devices[0].device_kind}, one"
        f" device{'; no accelerator is here: shrunken, to show that it works' * small}"
    )
    if without:
        print(f"without PyTorch: {without}")
    if batch is None:
        batch = ON_CPU if small else 0
    results = []
    for name in dict.fromkeys(options.size or (["1m"] if small else ["124m", "1b"])):
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
    print(
        f"\n{FORMULA};\nthe peak is {topology.chip.name}'s:"
        f" {_source(topology, results[0]['precision'])}"
    )
    return results


def measure(
    case: Case,
    batch: int,
    rounds: int,
    seconds: float,
    topology: Topology,
    python: str | None,
) -> dict[str, Any]:
    """One size at one batch (0: found by the planner), beside the PyTorch of an
    interpreter, if one is given.
    """
    device = here(1)[1][0]
    before = _allocated(here(1)[1][0])
    trainer, plan, notes = _start(case, batch)
    program = trainer.program
    assert program is not None and program.trace is not None
    parameters = sum(
        math.prod(x.shape) for x in jax.tree.leaves(program.trace.state.params)
    )
    tokens = plan.batch_size * case.length
    print(f"\n{_title(case, plan, parameters)}", flush=True)
    with Torch(case, plan.batch_size, python, topology.platform) as torch:
        assert torch.about.get("parameters", parameters) == parameters, (
            "PyTorch's model is another one"
        )
        runs: dict[str, Callable[[int], Any]] = {
            "lepton": partial(bench_step._fit, trainer)
        }
        runs |= {"torch": torch.run} if torch.about else {}
        multiples = {"lepton": plan.steps_per_call, "torch": 1}
        steps = {
            name: bench_step._slice(f, seconds, multiples[name])
            for name, f in runs.items()
        }
        with bench_step.compilations() as compiled:
            ms = bench_step._rounds(runs, steps, rounds)
        assert not compiled, f"compiled while it was measured: {compiled}"
    peak = topology.chip.peak(case.precision)
    per_token = case.flops(parameters)
    after = _allocated(device)
    memory = {
        "lepton": {
            "predicted": plan.peak,
            "xla": ahead.compile_for(program.lower())[1].peak,
            # a peak of the process: of this size only if it has risen
            "allocated": after if after and after > (before or 0) else None,
        }
    }
    memory |= (
        {"torch": {"allocated": torch.last.get("peak")}} if "torch" in runs else {}
    )
    rates = {name: [tokens / t * 1e3 for t in times] for name, times in ms.items()}
    result = {
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
        "steps_a_slice": steps,
        "seconds": seconds,
        "ms_a_step": {name: bench_step._spread(times) for name, times in ms.items()},
        "tokens_per_second": {
            name: bench_step._spread(values) for name, values in rates.items()
        },
        "mfu": {
            name: statistics.median(values) * per_token / peak
            for name, values in rates.items()
        },
        "model_flop_a_token": per_token,
        "peak_flops": peak,
        "peak_source": _source(topology, case.precision),
        "peak_bytes": memory,
        "memory_limit": plan.memory,
        "predicted_ms_a_step": plan.step_seconds * 1e3,
        "measured_to_predicted": (
            statistics.median(ms["lepton"]) / plan.step_seconds / 1e3
        ),
        "torch": torch.about or None,
        "notes": [*notes, *torch.notes],
    }
    if "torch" in runs:
        result["lepton_to_torch"] = bench_step._spread(
            [a / b for a, b in zip(rates["lepton"], rates["torch"], strict=True)]
        )
    return result


# ---- Lepton ----


def _start(case: Case, batch: int) -> Started:
    """A trainer that has trained a first call; of a batch that was found and that XLA
    can't hold after all, the half.
    """
    given = batch
    notes: list[str] = []
    while True:
        plan = fitting(case) if not batch else planned(case, batch)
        trainer = lepton.Trainer(
            case.recipe(plan.batch_size),
            devices=1,
            plan=plan,
        )
        try:
            bench_step._fit(trainer, plan.steps_per_call)
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
    """The plan of a batch: plain if that fits, else with rematerialization and
    micro-batches as the planner will.
    """
    trainer = lepton.Trainer(case.recipe(batch), devices=1)
    try:
        return trainer.plan(remat="none", micro_batches=1)
    except PlanError:
        return trainer.plan()


def fitting(case: Case, on: str | None = None) -> Plan:
    """The plan of the largest batch, a power of two, that fits in one piece: without
    rematerialization if any batch does.

    Args:
      on: a topology by name; None: the live device.

    Raises:
      PlanError: not even one sample fits.
    """
    found: Plan | None = None
    for remat in ("none", None):
        for batch in (
            2**i for i in range(1 + int(math.log2(max(1, MOST_TOKENS // case.length))))
        ):
            try:
                found = lepton.Trainer(case.recipe(batch), devices=1).plan(
                    on, remat=remat, micro_batches=1
                )
            except PlanError:
                if batch == 1 and remat is None:
                    raise
                break
        if found is not None:
            break
    assert found is not None
    return found


def _allocated(device: jax.Device) -> int | None:
    """Greatest bytes that were ever in use on a device, of those whose allocator counts
    them.
    """
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


# ---- PyTorch ----


class Torch:
    """`torch_lm.py` in a process of its own; without an interpreter, or if PyTorch
    fails at the start, nothing.

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
        self._spec = {k: v for k, v in case.shape.items() if k != "loop"} | {
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
        self._process = subprocess.Popen(
            [
                self._python,
                str(Path(__file__).with_name("torch_lm.py")),
                json.dumps(self._spec),
            ],
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
                self.notes.append(
                    "PyTorch runs without torch.compile, for want of a compiler"
                )
        except SettingError as error:
            self.notes.append(f"without PyTorch: {error.what}")
        return self

    def run(self, steps: int) -> None:
        assert self._process.stdin is not None
        # it has ended, which the answer will tell
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
    """Why there is no PyTorch to compare with; empty if there is.

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
        found = (
            subprocess.run(
                [python, "-c", code], capture_output=True, check=False
            ).returncode
            == 0
        )
    except OSError as error:
        raise SettingError(
            f"{python!r} can't be run: {error.strerror}",
            where="--torch",
            remedy="name a Python interpreter, or none",
        ) from error
    return "" if found else f"{python} has none; --torch names another interpreter"


# ---- settings and the table ----


def _checked(options: argparse.Namespace) -> int | None:
    """The batch asked for: None: not said, 0: auto."""
    for name in ("rounds", "seconds", "length"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SettingError(
                f"--{name} is {value:g}",
                where="command line",
                remedy="give a number above 0",
            )
    for name in options.size or ():
        if name not in SIZES:
            raise SettingError(
                f"there is no size {name!r}{nearest(name, SIZES)}",
                where="--size",
                remedy=f"the sizes are {', '.join(SIZES)}",
            )
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
    chip = topology.chip
    source = chip.sources.get(f"peaks.{precision}") or chip.sources.get(
        "peaks.bfloat16", "no source"
    )
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
    rows = []
    for name, ms in result["ms_a_step"].items():
        held = result["peak_bytes"][name]
        what = (
            "torch"
            f" {result['torch']['torch']}{', compiled' * result['torch']['compiled']}"
            if name == "torch"
            else name
        )
        rows.append(
            [
                what,
                f"{ms['median']:.4g} ({ms['min']:.4g}-{ms['max']:.4g})",
                f"{result['tokens_per_second'][name]['median']:,.0f}",
                f"{result['mfu'][name]:.1%}",
                *(
                    size(held[kind]) if held.get(kind) else "-"
                    for kind in ("predicted", "xla", "allocated")
                ),
            ]
        )
    lines = grid(
        (
            "",
            "ms a step",
            "tokens/s",
            "MFU",
            "peak predicted",
            "by XLA",
            "by allocator",
        ),
        rows,
        "<>>>>>>",
    )
    if "lepton_to_torch" in result:
        r = result["lepton_to_torch"]
        lines.append(
            f"lepton trains {r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f}) times as"
            " many tokens a second as torch"
        )
    lines.append(
        f"the plan predicts {result['predicted_ms_a_step']:.4g} ms a step; it takes "
        f"{result['measured_to_predicted']:.2f} times that"
    )
    return "\n".join([*lines, *(f"! {note}" for note in result["notes"])])
