"""The signature of a module's call: which parameter takes what, by name and type.

A Boolean named like `train` or `deterministic` is the mode; a parameter named like
`rngs` or `key` takes randomness; the inputs go to the others. An example:

>>> import jax
>>> def call(self, x, mask=None, training: bool = False, rngs=None): ...
>>> inputs = {"x": jax.ShapeDtypeStruct((8, 4), "float32")}
>>> arguments = read(call, "Net.__call__", inputs, train_argument=None)
>>> arguments.training, arguments.open_random
({'training': True}, ('rngs',))

What names alone do not say stays open; `arguments.settled` finds it out.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lepton_jax.errors import ModelError, nearest
from lepton_jax.step.arguments import REQUIRED, Arguments, quoted

# names of a mode that is True in training, without underscores, capitals, and a leading
# "is"; see `_sense_of_name`
TRAINING = frozenset(
    (
        "train",
        "training",
        "trainmode",
        "trainingmode",
        "trainphase",
        "trainingphase",
        "intraining",
        "fortraining",
        "duringtraining",
        "enabledropout",
        "usedropout",
        "applydropout",
        "dodropout",
        "withdropout",
    )
)
# names of a mode that is False in training, likewise
OUTSIDE = frozenset(
    (
        "deterministic",
        "userunningaverage",
        "userunningaverages",
        "userunningstats",
        "userunningstatistics",
        "inference",
        "inferencemode",
        "eval",
        "evalmode",
        "evaluate",
        "evaluation",
        "evaluationmode",
        "evaluating",
        "infer",
        "inferring",
        "test",
        "testing",
        "testmode",
        "testtime",
        "validation",
        "validating",
        "disabledropout",
        "nodropout",
    )
)
# names of random streams
RNGS = ("rngs",)
# names of keys: rng, key, prng_key, dropout_rng, z_rng, rng_0, ...
KEYS = re.compile(r"(\w+_)?(rng|prng|prngkey|key)(_?\d+)?")
# annotations of a Boolean
BOOLEANS = re.compile(
    r"(typing\.|t\.|tp\.)?(bool|Optional\[bool\]|Union\[(bool, *None|None, *bool)\])"
)
# annotations that say nothing
ANY = ("Any", "typing.Any")
# names under which a call takes all arrays of a batch in one dict
WHOLE = ("batch", "inputs", "data", "features", "example", "examples", "sample")
# names of the inputs of an attention, next to which `key` is one, too
ATTENTION = ("query", "value", "q", "v")

# a remedy where the call and the samples do not fit
WRAP = "wrap the model in one that takes the inputs alone"

POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
NAMED = (*POSITIONAL, inspect.Parameter.KEYWORD_ONLY)

Parameters = Mapping[str, inspect.Parameter]


def read(
    function: Callable | None,
    where: str,
    inputs: Any,
    train_argument: str | None,
) -> Arguments:
    """Read the signature of a module's call.

    Args:
      function: the `__call__` of the module's class; None: it has none.
      where: the module, for messages.
      inputs: an array or its shape, or a dict of them by name.
      train_argument: as in `Recipe`.

    Raises:
      ModelError: the call can't take the inputs, or needs more than them.
    """
    if function is None:
        raise _without_call(where)
    parameters = _parameters(function)
    named = {n: p for n, p in parameters.items() if p.kind in NAMED}
    whole = isinstance(inputs, dict) and _takes_whole(parameters, inputs)
    by_name = isinstance(inputs, dict) and not whole
    names = set(inputs) if by_name else set()
    data = None if by_name else _data_parameter(parameters, where)

    # the parameters that take no input: the mode, randomness, or unknown
    taken = names if data is None else {data}
    others = _without(named, taken)
    training = _modes(others)
    training |= _named_mode(train_argument, others, parameters, taken, where)
    others = _without(others, training)
    streams = {n: p for n, p in others.items() if _is_random(n, p, named)}
    others = _without(others, streams)
    unknown = _unknown(others, train_argument)

    missing = _required(_without(others, unknown))
    _check_surplus(parameters, names, missing, inputs, where)
    _check_missing(missing, data, inputs, where)
    if train_argument is not None:
        _check_no_unknown(unknown, where)

    positional = (n for n, p in parameters.items() if p.kind in POSITIONAL)
    first = next(positional, None)
    required = _required(streams)
    return Arguments(
        where,
        data=data if data != first else None,
        whole=whole,
        training=training,
        random=dict.fromkeys(required, (True, True)),
        open={n: p.default for n, p in unknown.items()},
        open_random=tuple(n for n in streams if n not in required),
    )


def call_of(kind: type) -> Callable | None:
    """Return the `__call__` that a class has, not that of its metaclass."""
    for base in kind.__mro__:
        if base is not object and "__call__" in vars(base):
            return vars(base)["__call__"]
    return None


def _without_call(where: str) -> ModelError:
    return ModelError(
        "the model has no __call__",
        where=where,
        remedy=(
            "give it one that takes what the samples (and preprocess) give: one "
            "array, or a dict's arrays by name"
        ),
    )


# ---- parameters ----


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a method but for `self`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return {}
    return dict(
        itertools.islice(
            parameters.items(),
            1,
            None,
        )
    )


def _takes_whole(
    parameters: Parameters,
    inputs: Mapping[str, Any],
) -> bool:
    """Whether a dict of inputs goes to the only parameter there is.

    An example is a call that reads `batch["x"]`.
    """
    if _has_kind(parameters, inspect.Parameter.VAR_KEYWORD):
        return False
    if any(name in parameters for name in inputs):
        return False
    needed = [n for n in _plain(parameters) if _is_required(parameters[n])]
    return len(needed) == 1 and needed[0] in WHOLE


def _data_parameter(
    parameters: Parameters,
    where: str,
) -> str | None:
    """Return the parameter that takes an array without a name.

    Returns:
      None: the array is one of `*args`.

    Raises:
      ModelError: all parameters must be given by name.
    """
    positional = [n for n, p in parameters.items() if p.kind in POSITIONAL]
    plain = _plain(parameters)
    needed = [n for n in plain if _is_required(parameters[n])]
    for candidates in (needed, plain, positional):
        if candidates:
            return candidates[0]
    if not parameters or _has_kind(parameters, inspect.Parameter.VAR_POSITIONAL):
        return None
    named = [
        n
        for n, p in parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and _is_required(p)
    ]
    if named:
        raise ModelError(
            f"the model takes {quoted(named)} by name, but the samples' inputs are "
            "one array without a name",
            where=where,
            remedy=(
                f"give the inputs as a dict, {_as_dict(named)}, or take them by "
                "position"
            ),
        )
    return None


def _plain(parameters: Parameters) -> list[str]:
    """Return the positional parameters that are neither a mode nor randomness."""
    return [
        name
        for name, parameter in parameters.items()
        if parameter.kind in POSITIONAL
        and _sense(name, parameter) is None
        and not _is_random(name, parameter, parameters)
    ]


def _without(
    parameters: Parameters,
    names: Iterable[str],
) -> dict[str, inspect.Parameter]:
    return {n: p for n, p in parameters.items() if n not in names}


def _required(parameters: Parameters) -> list[str]:
    return [n for n, p in parameters.items() if _is_required(p)]


def _has_kind(parameters: Parameters, kind: Any) -> bool:
    return any(p.kind is kind for p in parameters.values())


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is REQUIRED and parameter.kind in NAMED


# ---- the mode ----


def _modes(parameters: Parameters) -> dict[str, bool]:
    """Return the parameters that are a mode by name, with their values in training."""
    modes = {}
    for name, parameter in parameters.items():
        sense = _sense(name, parameter)
        if sense is not None:
            modes[name] = sense
    return modes


def _unknown(
    parameters: Parameters, train_argument: str | None
) -> dict[str, inspect.Parameter]:
    """Return the Booleans whose sense their names do not say."""
    unknown = {n: p for n, p in parameters.items() if _is_boolean(p)}
    if train_argument is None:
        return unknown
    # a person has said which one is the mode: the others keep their defaults
    return {n: p for n, p in unknown.items() if _is_required(p)}


def _named_mode(
    train_argument: str | None,
    others: Parameters,
    parameters: Parameters,
    data: Iterable[str],
    where: str,
) -> dict[str, bool]:
    """Return the argument that the recipe names, with its value in training."""
    if train_argument is None:
        return {}
    name = train_argument.removeprefix("not ").strip()
    sense = {name: not train_argument.startswith("not ")}
    if name in data:
        raise ModelError(
            f"train_argument names {name!r}, which is an input of the model",
            where=where,
            remedy=(
                "name the Boolean argument that says whether the model trains, or "
                "leave train_argument out"
            ),
        )
    if name in others:
        default = others[name].default
        if isinstance(default, bool | np.bool_ | None) or _is_required(others[name]):
            return sense
        raise ModelError(
            f"train_argument names {name!r}, whose default is {default!r}: no Boolean",
            where=where,
            remedy="name the Boolean argument that says whether the model trains",
        )
    if _has_kind(parameters, inspect.Parameter.VAR_KEYWORD):
        return sense
    known = ", ".join(others) or "none besides the inputs"
    raise ModelError(
        f"train_argument names {name!r}, which the model's call does not have"
        f"{nearest(name, others)}",
        where=where,
        remedy=f"name one of its arguments: {known}",
    )


def _sense(
    name: str,
    parameter: inspect.Parameter,
) -> bool | None:
    """Return the value of a mode argument in training; None if it is none by name."""
    sense = _sense_of_name(name)
    if sense is None or parameter.kind not in NAMED:
        return None
    if _is_boolean(parameter):
        return sense
    annotation = parameter.annotation
    untyped = annotation is parameter.empty or str(annotation) in ANY
    open_default = parameter.default is None or _is_required(parameter)
    return sense if untyped and open_default else None


def _sense_of_name(name: str) -> bool | None:
    plain = name.replace("_", "").lower().removeprefix("is")
    if plain in TRAINING:
        return True
    return False if plain in OUTSIDE else None


def _is_boolean(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is a Boolean by its default or by its annotation."""
    default = parameter.default
    if isinstance(default, bool | np.bool_):
        return True
    if isinstance(default, int) and default in (0, 1):  # `train=1`
        return _sense_of_name(parameter.name) is not None
    if default is not None and not _is_required(parameter):
        return False
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    alternatives = [part.strip() for part in text.split("|")]
    kind = next((part for part in alternatives if part != "None"), "")
    return len(alternatives) <= 2 and BOOLEANS.fullmatch(kind) is not None


# ---- randomness ----


def _is_random(
    name: str,
    parameter: inspect.Parameter,
    parameters: Iterable[str],
) -> bool:
    """Whether a parameter takes random streams or a key, by its name."""
    if parameter.default is not None and not _is_required(parameter):
        return False
    if name in RNGS:
        return True
    # the key of an attention is an input
    attention = any(n in parameters for n in ATTENTION)
    return KEYS.fullmatch(name) is not None and not attention


# ---- checks ----


def _check_surplus(
    parameters: Parameters,
    names: set[str],
    missing: list[str],
    inputs: Any,
    where: str,
) -> None:
    """Check that the call takes all inputs."""
    if _has_kind(parameters, inspect.Parameter.VAR_KEYWORD):
        return
    surplus = sorted(n for n in names if n not in parameters)
    if surplus:
        free = [n for n, p in parameters.items() if p.kind in NAMED and n not in names]
        lacks = f" and lacks {quoted(missing)}" if missing else ""
        raise ModelError(
            f"the model takes no input {quoted(surplus)}{nearest(surplus[0], free)}"
            f"{lacks}; the inputs are {_described(inputs)}",
            where=where,
            remedy=(
                "the arrays of a dict go to the model by name: name them as its "
                f"arguments, {quoted(free)}, or {WRAP}"
            ),
        )


def _check_missing(
    missing: list[str],
    data: str | None,
    inputs: Any,
    where: str,
) -> None:
    """Check that the inputs fill all that the call requires."""
    if not missing:
        return
    taken = [] if data is None else [data]
    if isinstance(inputs, dict):
        taken = sorted(inputs) if data is None else []
    raise ModelError(
        f"the model's call requires {quoted(missing)}, which the samples' inputs "
        f"don't have; they are {_described(inputs)}",
        where=where,
        remedy=(
            "give the inputs as a dict's arrays by name,"
            f" {_as_dict([*taken, *missing])}, or give {quoted(missing)} a default,"
            f" e.g. None, or {WRAP}; if {missing[-1]!r} says whether the model"
            " trains, name it as Recipe.train_argument"
        ),
    )


def _check_no_unknown(unknown: Parameters, where: str) -> None:
    for name in unknown:
        raise ModelError(
            f"the Boolean argument {name!r} has no default, and train_argument names "
            "another",
            where=where,
            remedy=f"give {name!r} a default in __call__",
        )


# ---- words for messages ----


def _as_dict(names: Iterable[str]) -> str:
    return "{" + ", ".join(f'"{n}": ...' for n in names) + "}"


def _described(inputs: Any) -> str:
    if isinstance(inputs, dict):
        return ", ".join(f"{n} {_described(x)}" for n, x in inputs.items())
    if hasattr(inputs, "dtype"):
        return f"{inputs.dtype}{list(inputs.shape)}"
    return type(inputs).__name__
