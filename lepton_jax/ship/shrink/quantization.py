"""Quantization: a model whose weights, and perhaps arithmetic, are of 8 or 4 bits.

    kind    weights                       activations           where
    w8a8    8 bits, a scale an output     8 bits, by the row    products, convolutions
    w8      8 bits, a scale an output     as they were          everywhere
    w4      4 bits, a scale a group       as they were          everywhere

With "w8a8" the products and convolutions are those of qwix, in whole numbers; weights
that no layer of Flax multiplies with, such as embeddings, and those of recurrent cells,
are stored as with "w8". Weights of "w8" and "w4" become floats when the program begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from lepton_jax.compat import Literal
from lepton_jax.errors import ModelError, SettingError, nearest
from lepton_jax.ship.programs import LOOPS, inner_jaxprs
from lepton_jax.ship.shrink.calls import called, some_inputs
from lepton_jax.ship.shrink.forms import Form, by_outputs, by_rows
from lepton_jax.ship.shrink.library import qwix
from lepton_jax.ship.shrink.packed import (
    is_packed,
    name_of,
    packed,
    plain,
    rounding,
)
from lepton_jax.trees import is_real, matches

# Inputs that share a scale of 4-bit weights. 32, as GGML's Q4_0 has it: 4.5 bits a
# weight with scales of 16 bits, 5 with ours of 32.
GROUP = 32

# Entries of the smallest weight that is quantized. Assumption: a smaller one is no
# part of the size, but may well be one of the metric.
SMALLEST = 256

# Layers of Flax whose products qwix can do in whole numbers.
LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.Einsum)
# Operations in which an error of an array is one of the result, in proportion, and
# those that change its type or shape alone.
FACTORS = frozenset(("mul", "dot_general", "conv_general_dilated", "gather"))
FORMS_ALONE = frozenset(
    (
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "reshape",
        "squeeze",
        "transpose",
    )
)
EMBEDDING = "embedding"  # last part of the path of nnx.Embed's table


class Kind(NamedTuple):
    """A way to quantize.

    Attributes:
      bits: of the weights.
      group: inputs that share a scale; None: all.
      integer: whether activations are quantized, too.
    """

    bits: int
    group: int | None
    integer: bool


KINDS = {
    "w8a8": Kind(8, None, True),
    "w8": Kind(8, None, False),
    "w4": Kind(4, GROUP, False),
}


def quantize(
    trainer: Any,
    kind: str = "w8",
    *,
    spare: Sequence[str] = (),
) -> Any:
    """Return a trainer with a quantized copy of a trained model, to predict with.

    It evaluates, predicts and becomes an artifact as any other, but trains no more. Of
    one that `aware` has made, the rounded weights become stored ones.

    Args:
      trainer: with the trained model, an NNX module.
      kind: "w8a8", "w8" or "w4".
      spare: patterns of paths of weights that are stored with 8 bits where the kind has
        4, and as they are where it has 8.

    Returns:
      A `Trainer`.

    Raises:
      SettingError: there is no such kind, or a pattern matches nothing.
      ModelError: the model is no NNX module, is quantized already, or can't be called
        in whole numbers.
      MissingExtraError: qwix is not installed.
    """
    how = kind_of(kind)
    module = plain(nnx_module(trainer))
    constants = scaling_constants(module, some_inputs(trainer))
    forms = forms_of(module, how, spare, constants)
    if how.integer:
        with_integers, covered = in_whole_numbers(trainer, module, forms)
        forms = {path: form for path, form in forms.items() if path not in covered}
        return trainer.with_module(packed(with_integers, forms))
    return trainer.with_module(packed(module, forms))


def aware(
    trainer: Any,
    kind: str = "w8",
    *,
    spare: Sequence[str] = (),
    **changes: Any,
) -> Any:
    """Return a trainer whose model computes as if it were quantized, to train it so.

    The gradient passes through the rounding (Jacob et al. 2018, "Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference").

    >>> tuned = shrink.aware(trainer, "w4")  # doctest: +SKIP
    >>> tuned.fit(epochs=1)  # doctest: +SKIP
    >>> small = shrink.quantize(tuned, "w4")  # doctest: +SKIP

    Args:
      trainer: with the trained model.
      kind: as in `quantize`.
      spare: as in `quantize`.
      **changes: fields of the recipe: a smaller learning rate, for example.

    Raises:
      SettingError, ModelError, MissingExtraError: as `quantize`.
    """
    how = kind_of(kind)
    module = plain(nnx_module(trainer))
    constants = scaling_constants(module, some_inputs(trainer))
    forms = forms_of(module, how, spare, constants)
    if how.integer:
        rules = _rules(trainer, module, forms)
        provider = qwix().QtProvider(rules)
        module = _by_qwix(trainer, module, provider)
    else:
        module = rounding(module, forms)
    return trainer.with_module(module, **changes)


def kind_of(name: str) -> Kind:
    """Return a way to quantize by its name.

    Raises:
      SettingError: there is none.
    """
    if name not in KINDS:
        raise SettingError(
            f"there is no quantization {name!r}{nearest(str(name), KINDS)}",
            where="kind",
            remedy=f"use one of {', '.join(KINDS)}",
        )
    return KINDS[name]


def nnx_module(trainer: Any) -> nnx.Module:
    """Return the trained model as an NNX module.

    Raises:
      ModelError: it is none, or its weights are quantized already.
    """
    module = trainer.module()
    if not isinstance(module, nnx.Module):
        raise ModelError(
            f"{type(module).__name__} is a Linen module",
            where="Recipe.model",
            remedy="shrink an NNX module; a Linen model can be exported as it is",
        )
    if is_packed(module):
        raise ModelError(
            "the model is quantized already",
            where="Recipe.model",
            remedy="shrink the trained model that it was made of",
        )
    return module


def forms_of(
    module: nnx.Module,
    kind: Kind,
    spare: Sequence[str] = (),
    constants: Iterable[str] = (),
) -> dict[str, Form]:
    """Return the form of each weight that is quantized, by its path.

    Args:
      module: the model.
      kind: how.
      spare: as in `quantize`.
      constants: paths of variables that are no parameters, and are quantized as well.

    Raises:
      SettingError: a pattern matches nothing.
      ModelError: no weight is large enough.
    """
    weights = quantizable(module, constants)
    if not weights:
        raise ModelError(
            f"no weight has {SMALLEST} entries: there is nothing to save",
            where=type(module).__name__,
            remedy="leave the model as it is",
        )
    spared = _matching(spare, weights)
    forms = {}
    for path, shape in weights.items():
        bits = kind.bits
        if path in spared:
            if bits == 8:
                continue
            bits = 8
        group = kind.group if bits == kind.bits else None
        make = by_rows if path.endswith(EMBEDDING) else by_outputs
        forms[path] = make(shape, bits, group)
    return forms


def quantizable(
    module: nnx.Module,
    constants: Iterable[str] = (),
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that can be quantized, by path.

    Args:
      module: the model.
      constants: paths of variables that are no parameters, and count as well.
    """
    also = set(constants)
    weights = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name = name_of(path)
        if not isinstance(variable, nnx.Param) and name not in also:
            continue
        value = variable.get_value()
        is_float = is_real(value)
        if is_float and value.ndim >= 2 and value.size >= SMALLEST:
            weights[name] = tuple(value.shape)
    return weights


def in_whole_numbers(
    trainer: Any,
    module: nnx.Module,
    forms: Mapping[str, Form],
) -> tuple[nnx.Module, set[str]]:
    """Return a copy whose layers multiply whole numbers, and the weights it covers.

    Raises:
      ModelError: qwix can't call it so.
    """
    rules = _rules(trainer, module, forms)
    made = _by_qwix(trainer, module, qwix().PtqProvider(rules))
    state = nnx.to_flat_state(nnx.state(made))
    after = {name_of(path) for path, _ in state}
    covered = {path for path in forms if path not in after}
    return made, covered


# ---- internals ----


def _matching(
    patterns: Iterable[str],
    paths: Iterable[str],
) -> set[str]:
    found = set()
    known = list(paths)
    for pattern in patterns:
        hits = {path for path in known if matches(path, pattern)}
        if not hits:
            raise SettingError(
                f"no weight matches {pattern!r}{nearest(pattern, known)}",
                where="spare",
                remedy=f"the weights are {', '.join(known)}",
            )
        found |= hits
    return found


def _rules(
    trainer: Any,
    module: nnx.Module,
    forms: Mapping[str, Form],
) -> list[Any]:
    """Return qwix's rules: the layers with a quantized kernel, outside of loops.

    Recurrent cells are left out: in qwix 0.1.8 the quantized parameters change the
    structure of what a scan carries.
    """
    looped = weights_in_loops(module, some_inputs(trainer))
    paths = []
    for path, node in nnx.iter_modules(module):
        kernel = f"{name_of(path)}/kernel"
        is_layer = isinstance(node, LAYERS) and kernel in forms
        if is_layer and kernel not in looped:
            paths.append(re.escape(name_of(path)))
    if not paths:
        raise ModelError(
            "the model has no layer that can multiply whole numbers",
            where=type(module).__name__,
            remedy='quantize its weights alone: "w8"',
        )
    rule = qwix().QuantizationRule(
        module_path="|".join(paths),
        weight_qtype="int8",
        act_qtype="int8",
    )
    return [rule]


def weights_in_loops(
    module: nnx.Module,
    inputs: Any,
) -> set[str]:
    """Return the paths of the weights that a loop of the model's program reads."""
    uses = uses_of(module, inputs)
    return {path for path, names in uses.items() if names & set(LOOPS)}


def scaling_constants(
    module: nnx.Module,
    inputs: Any,
) -> set[str]:
    """Return the paths of variables, no parameters, that are factors or looked up.

    Those may be rounded as weights are. Others may not: the edges of a number's bins
    are compared with it, and an error of a hundredth of the largest is large there.
    """
    uses = uses_of(module, inputs)
    params = {
        name_of(path) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    return {
        path
        for path, names in uses.items()
        if path not in params and names and names <= FACTORS
    }


def uses_of(
    module: nnx.Module,
    inputs: Any,
) -> dict[str, set[str]]:
    """Return the operations that read each array of a module, by its path.

    Args:
      module: in evaluation.
      inputs: a batch of it.
    """
    graph, state = nnx.split(module)

    def call(
        state: Any,
        inputs: Any,
    ) -> Any:
        return called(nnx.merge(graph, state, copy=True), inputs)

    program = jax.make_jaxpr(call)(state, inputs).jaxpr
    names = [name_of(path) for path, _ in nnx.to_flat_state(state)]
    origins = dict(zip(program.invars, names, strict=False))
    uses: dict[str, set[str]] = {name: set() for name in names}
    _follow(program, origins, uses)
    return uses


def _follow(
    program: Any,
    origins: dict[Any, str],
    uses: dict[str, set[str]],
) -> None:
    """Collect the operations that read arrays.

    Args:
      program: a jaxpr.
      origins: the array that a variable is, cast or with another shape; added to.
      uses: added to.
    """
    for eqn in program.eqns:
        known = {
            number: origins[x]
            for number, x in enumerate(eqn.invars)
            if not isinstance(x, Literal) and x in origins
        }
        if not known:
            continue
        if eqn.primitive.name in FORMS_ALONE:
            origins[eqn.outvars[0]] = known[0]
            continue
        alike = [j for j in inner_jaxprs(eqn) if len(j.invars) == len(eqn.invars)]
        if not alike or eqn.primitive.name in LOOPS:
            for name in known.values():
                uses[name].add(eqn.primitive.name)
        for inner in alike:
            of_inner = {inner.invars[n]: name for n, name in known.items()}
            _follow(inner, of_inner, uses)


def _by_qwix(
    trainer: Any,
    module: nnx.Module,
    provider: Any,
) -> nnx.Module:
    """Let qwix change a module, which it calls once.

    Raises:
      ModelError: it can't.
    """
    inputs = some_inputs(trainer)
    arguments: tuple[Any, ...] = (inputs,)
    named: dict[str, Any] = {}
    if isinstance(inputs, dict):
        arguments, named = (), inputs
    module.eval()
    try:
        return qwix().quantize_model(module, provider, *arguments, **named)
    except Exception as error:  # whatever the library says of a layer it can't do
        raise ModelError(
            f"qwix can't quantize the activations: {type(error).__name__}: {error}",
            where=type(module).__name__,
            remedy='quantize the weights alone: "w8"',
        ) from error
