"""The forms in which a loss is computed, and the rule that chooses them.

A form changes how the training loss is computed, before it is rematerialized and
differentiated, on any backend. (The passes of `rewrite.PASSES` change the gradient, on
one CPU device.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lepton_jax.compat import ClosedJaxpr, Jaxpr
from lepton_jax.planner.rewrite import experts, head, narrow, softmax, splash
from lepton_jax.planner.rewrite.pipeline import NO_STAGES, Stages
from lepton_jax.planner.rewrite.program import opened, parts
from lepton_jax.planner.rewrite.stages import in_stages
from lepton_jax.step.training_loss import ARGUMENTS

# Bytes of logits in float32 that a device may hold at once. Assumption: a hundredth of
# the memory of the chips that train language models (v5p 95 GiB, H200 141 GB).
MOST_LOGITS = 2**30
FLOAT32 = 4
# Tokens of a piece on each device, at least. A piece reads and writes the gradient of
# the head, 8 bytes a parameter, and computes 6 FLOP a parameter and token: on v5p (459
# TFLOP/s, 2.77 TB/s, `hardware/catalogue.toml`) that is the time of 221 tokens, 11 % of
# 2,048.
LEAST_TOKENS = 2048
# Micro-batches that a plan may choose without pieces below that. Assumption: plans of
# 8B and 70B on pods have 1 to 8 (`tools/plan.py recipes/lm.py --size 8b`).
USUAL_MICRO_BATCHES = 8
# Pieces of a loss. Assumption: what needs more fits nowhere, and is an error anyway.
MOST_PIECES = 4096


# Least length of attention that a kernel computes, by platform. On CPUs measured with
# the 10M model on one core: its forward and backward pass takes 1.04 (128 tokens), 0.93
# (256), 0.78 (512) and 0.73 (1,024) of the time of plain attention
# (`tools/attention.py`, benchmarks/attention-cpu.json). On TPUs an assumption: a block
# of the kernel. On GPUs, too: few blocks gain nothing.
LEAST_LENGTH = {"cpu": 256, "tpu": 512, "gpu": 1024}
# Bytes of scores in float32 on a device from which a GPU computes attention in blocks.
# Assumption: blocks cost more kernels, and save what scores take.
MOST_SCORES = 2**30
# Numbers of a training loss's arguments that hold samples.
SAMPLES = tuple(ARGUMENTS.index(name) for name in ("inputs", "targets"))


@dataclass(frozen=True)
class Forms:
    """The forms in which a loss is computed.

    Attributes:
      loss_pieces: pieces of the tokens whose logits are computed one after the other.
      attention: the kernel that computes attention, as in `attention.How`; "": the
        model's own operations.
      experts: whether mixtures that drop no token are operations with a rule.
      stages: the pipeline of a stack of equal layers.
      products: how large kernels are multiplied, as in `narrow.narrowed`; "": in the
        dtype that the model computes in.
    """

    loss_pieces: int = 1
    attention: str = ""
    experts: bool = False
    stages: Stages = NO_STAGES
    products: str = ""

    def of(self, loss: Callable) -> Callable:
        """Return a loss in these forms, but for its pipeline and its products.

        An evaluation multiplies in the dtype that the model computes in.
        """
        return head.in_pieces(self.of_model(loss), self.loss_pieces)

    def of_model(self, function: Callable) -> Callable:
        """Return a function of a model whose layers are in these forms."""
        function = experts.ruled(function) if self.experts else function
        return softmax.fused(function, self.attention)

    def around(self, remade: Callable[[Callable], Callable]) -> Callable:
        """Return a transformation of a loss that puts it into these forms first.

        Args:
          remade: the transformation, such as rematerialization.
        """
        if self == Forms():
            return remade
        return partial(_in_turn, self, remade)

    def after(self, gradient: Callable) -> Callable:
        """Return a gradient whose arrays are each rounded to 8 bits once."""
        return narrow.merged(gradient) if self.products else gradient


def forms_for(
    forward: ClosedJaxpr,
    traced: Callable[[], ClosedJaxpr],
    platform: str,
    devices: int,
    micro_batches: int | None,
    products: str = "",
) -> Forms:
    """Choose the forms of a loss.

    Args:
      forward: the model on a whole batch.
      traced: gives the training loss of it, with all that is measured.
      platform: JAX's name of the backend.
      devices: over which it is divided.
      micro_batches: in which the batch is taken; None: the plan decides.
      products: as in `Forms`.
    """
    pieces = 1
    if logits_bytes(_largest_product(forward.jaxpr), devices) > MOST_LOGITS:
        shape = head.logits_shape(traced())
        pieces = _loss_pieces(shape, devices, micro_batches)
    kernel = _kernel(forward, platform, devices)
    mixture = experts.has_mixture(forward.jaxpr)
    return Forms(pieces, kernel, mixture, products=products)


def logits_bytes(elements: int, devices: int) -> float:
    """Return the bytes of logits in float32 on each of some devices."""
    return elements * FLOAT32 / devices


# ---- internals ----


def _in_turn(forms: Forms, remade: Callable, loss: Callable) -> Callable:
    narrowed = narrow.narrowed(loss, forms.products)
    return in_stages(remade(forms.of(narrowed)), forms.stages, SAMPLES)


def _loss_pieces(
    shape: tuple[int, ...],
    devices: int,
    micro_batches: int | None,
) -> int:
    """Return the pieces of which each has few enough logits, and enough tokens."""
    held = logits_bytes(math.prod(shape), devices) if shape else 0.0
    if held <= MOST_LOGITS:
        return 1
    tokens = math.prod(shape[:-1]) / devices
    least = LEAST_TOKENS * (micro_batches or USUAL_MICRO_BATCHES)
    wanted = min(math.ceil(held / MOST_LOGITS), int(tokens // least))
    return max(1, min(wanted, MOST_PIECES))


def _kernel(forward: ClosedJaxpr, platform: str, devices: int) -> str:
    """Return the kernel for a model's attention; "": it has none, or needs none."""
    least = LEAST_LENGTH.get(platform, math.inf)
    if not _has_scores(forward.jaxpr, least):
        return ""
    kernel = "splash" if platform == "tpu" else "blocks"
    found = softmax.find_all(opened(forward))
    largest = 0.0
    for attention in found:
        batch, length, heads, _ = attention.shape
        keys = attention.keys
        if kernel == "splash" and not splash.takes(length, keys, attention.causal):
            return ""
        if platform == "cpu" and not attention.causal:
            return ""  # no block is skipped, and scores would be computed twice
        largest = max(largest, batch * heads * length * keys * FLOAT32 / devices)
    if not found or (platform == "gpu" and largest <= MOST_SCORES):
        return ""
    return kernel


def _has_scores(jaxpr: Jaxpr, least: float) -> bool:
    """Whether a program has products, head by head, of two long sequences."""
    eqn: Any
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            _, (batch, _) = eqn.params["dimension_numbers"]
            shape = eqn.outvars[0].aval.shape[len(batch) :]
            if batch and sum(extent >= least for extent in shape) > 1:
                return True
        if any(_has_scores(inner, least) for inner in parts(eqn)):
            return True
    return False


def _largest_product(jaxpr: Jaxpr) -> int:
    """Return the elements of the largest product of a program."""
    largest = 0
    eqn: Any
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            largest = max(largest, eqn.outvars[0].aval.size)
        for inner in parts(eqn):
            largest = max(largest, _largest_product(inner))
    return largest
