"""The call of a module: inputs, mode (training or not), random streams.

Flax has no one convention for the mode: modules call it `train`, `deterministic`,
`is_training`, `eval_mode`, ... Known names are taken by name. An unknown Boolean is
taken by what it does: the call is traced with it True and with it False, and the value
with which the module draws more random numbers, or writes more variables, is the one
for training.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.errors import ModelError, nearest

# As `_sense_of` reads them: without underscores, capitals, and a leading "is".
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
OUTSIDE = frozenset((
    "deterministic", "userunningaverage", "userunningaverages", "userunningstats",
    "userunningstatistics", "inference", "inferencemode", "eval", "evalmode",
    "evaluate", "evaluation", "evaluationmode", "evaluating", "infer", "inferring",
    "test", "testing", "testmode", "testtime", "validation", "validating",
    "disabledropout", "nodropout",
))  # fmt: skip
RNGS = ("rngs",)
# rng, key, prng_key, dropout_rng, z_rng, rng_0, ...
KEYS = re.compile(r"(\w+_)?(rng|prng|prngkey|key)(_?\d+)?")
BOOLEANS = re.compile(
    r"(typing\.|t\.|tp\.)?(bool|Optional\[bool\]|Union\[(bool, *None|None, *bool)\])"
)

# Names under which a call takes all arrays of a batch in one dict.
WHOLE = ("batch", "inputs", "data", "features", "example", "examples", "sample")

REQUIRED = inspect.Parameter.empty
POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
NAMED = (*POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


class Effect(NamedTuple):
    """Effects of a call, next to its outputs.

    Attributes:
      draws: random operations in its program.
      writes: paths of the variables that it changes.
    """

    draws: int
    writes: frozenset[str]

    def exceeds(self, other: Effect) -> bool:
        """Whether this call does all that the other does, and more."""
        at_least = self.draws >= other.draws and self.writes >= other.writes
        return at_least and self != other


class Mode(NamedTuple):
    """One way to call a module: the values of arguments that are no data.

    Attributes:
      train: whether the module's own switches are set to training.
      values: Booleans by name.
      random: names of the arguments that get random streams or a key.
    """

    train: bool
    values: Mapping[str, bool]
    random: frozenset[str]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a module's call.

    Attributes:
      where: the call, for messages.
      data: the parameter that takes an array; None: the first one, or the inputs are a
        dict.
      whole: whether a dict of inputs goes to one parameter, instead of its arrays by
        name.
      training: Boolean arguments and their values in training; outside of it they have
        the other one.
      random: arguments that take random streams or a key, and whether they get one
        (in training, outside of it).
      open: Boolean arguments whose sense is not known, and their defaults, or
        `REQUIRED`. `settled` finds out.
      open_random: arguments for randomness that may stay None; it finds out about
        these, too.
    """

    where: str
    data: str | None = None
    whole: bool = False
    training: Mapping[str, bool] = field(default_factory=dict)
    random: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    open: Mapping[str, Any] = field(default_factory=dict)
    open_random: tuple[str, ...] = ()

    def mode(self, train: bool) -> Mode:
        """The way to call the module in training, or outside of it."""
        # an argument that is not settled yet, and has no default, needs some value
        values = {n: False if d is REQUIRED else d for n, d in self.open.items()}
        values |= {name: train == sense for name, sense in self.training.items()}
        index = 0 if train else 1
        return Mode(
            train,
            values,
            frozenset(n for n, given in self.random.items() if given[index]),
        )

    def call(
        self,
        function: Callable,
        inputs: Any,
        mode: Mode,
        streams: Callable[[str], Any],
    ) -> Any:
        """Call a module with a batch's inputs.

        Args:
          function: the module.
          inputs: an array, or a dict of arrays by name.
          mode: see `Mode`.
          streams: the name of an argument to its random streams or its key.
        """
        options: dict[str, Any] = dict(mode.values)
        # in one order in every process: their keys are made in it
        options |= {name: streams(name) for name in sorted(mode.random)}
        if isinstance(inputs, dict) and not self.whole:
            return function(**inputs, **options)
        if self.data is not None:
            return function(**{self.data: inputs}, **options)
        return function(inputs, **options)


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
      train_argument: as of `Recipe`.

    Raises:
      ModelError: the call can't take the inputs, or needs more than them.
    """
    if function is None:
        raise ModelError(
            "the model has no __call__",
            where=where,
            remedy=(
                "give it one that takes what the samples (and preprocess) give: one "
                "array, or a dict's arrays by name"
            ),
        )
    parameters = dict(
        itertools.islice(
            _signature(function).items(),
            1,
            None,
        )
    )  # without self
    named = {n: p for n, p in parameters.items() if p.kind in NAMED}
    whole = isinstance(inputs, dict) and _takes_whole(parameters, inputs)
    by_name = isinstance(inputs, dict) and not whole
    names = set(inputs) if by_name else set()
    others = {n: p for n, p in named.items() if n not in names}

    data = None
    takes = names
    if not by_name:
        data = _data_parameter(parameters, where)
        takes = {data} if data is not None else set()
        others.pop(data or "", None)

    training = {
        n: sense for n, p in others.items() if (sense := _sense(n, p)) is not None
    }
    training |= _named_mode(train_argument, others, parameters, takes, where)
    streams = {
        n: p for n, p in others.items() if n not in training and _random(n, p, named)
    }
    unknown = {
        n: p
        for n, p in others.items()
        if n not in training and n not in streams and _boolean(p)
    }
    if train_argument is not None:  # the person has said which one it is
        unknown = {n: p for n, p in unknown.items() if _is_required(p)}

    missing = [
        n
        for n, p in others.items()
        if _is_required(p) and n not in {*training, *streams, *unknown}
    ]
    _check_inputs(parameters, names, missing, data, inputs, where)
    if unknown and train_argument is not None:
        name = next(iter(unknown))
        raise ModelError(
            f"the Boolean argument {name!r} has no default, and train_argument names "
            "another",
            where=where,
            remedy=f"give {name!r} a default in __call__",
        )

    first = next(iter(n for n, p in parameters.items() if p.kind in POSITIONAL), None)
    return Arguments(
        where,
        data=data if data != first else None,
        whole=whole,
        training=training,
        random={n: (True, True) for n, p in streams.items() if _is_required(p)},
        open={n: p.default for n, p in unknown.items()},
        open_random=tuple(n for n, p in streams.items() if not _is_required(p)),
    )


def settled(arguments: Arguments, effect: Callable[[Mode], Effect | None]) -> Arguments:
    """Find out what the open arguments do.

    Args:
      arguments: what `read` gave.
      effect: traces a call; None: it can't be traced.

    Raises:
      ModelError: it can't be told which value of an argument is for training.
    """
    for name in arguments.open_random:
        given = (
            _gains(arguments, name, True, effect),
            _gains(arguments, name, False, effect),
        )
        arguments = replace(arguments, random={**arguments.random, name: given})
    found = {name: _found(arguments, name, effect) for name in arguments.open}
    training = {name: sense for name, sense in found.items() if sense is not None}
    return replace(
        arguments,
        training={**arguments.training, **training},
        open={},
        open_random=(),
    )


def call_of(kind: type) -> Callable | None:
    """The `__call__` that a class has, not that of its metaclass."""
    return next(
        (
            vars(c)["__call__"]
            for c in kind.__mro__
            if c is not object and "__call__" in vars(c)
        ),
        None,
    )


def draws(jaxpr: Any) -> int:
    """Number of random operations in a jaxpr, counted once in a loop's body."""
    count = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        count += name in (
            "random_bits",
            "random_gamma",
            "rng_uniform",
            "rng_bit_generator",
            "threefry2x32",
        )
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    count += draws(inner)
    return count


# ---- reading a signature ----


def _signature(function: Callable) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return {}


def _takes_whole(
    parameters: Mapping[str, inspect.Parameter], inputs: Mapping[str, Any]
) -> bool:
    """Whether a dict of inputs goes to the only parameter there is, as in
    `batch["x"]`.
    """
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return False
    if any(name in parameters for name in inputs):
        return False
    needed = [
        name
        for name, p in parameters.items()
        if p.kind in POSITIONAL
        and _is_required(p)
        and _sense(name, p) is None
        and not _random(name, p, parameters)
    ]
    return len(needed) == 1 and needed[0] in WHOLE


def _data_parameter(
    parameters: Mapping[str, inspect.Parameter], where: str
) -> str | None:
    """The parameter that takes an array without a name; None: it is one of `*args`."""
    positional = [n for n, p in parameters.items() if p.kind in POSITIONAL]
    plain = [
        n
        for n in positional
        if _sense(n, parameters[n]) is None
        and not _random(n, parameters[n], parameters)
    ]
    needed = [n for n in plain if _is_required(parameters[n])]
    for candidates in (needed, plain, positional):
        if candidates:
            return candidates[0]
    if not parameters or any(
        p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()
    ):
        return None
    named = [
        n
        for n, p in parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and _is_required(p)
    ]
    if named:
        raise ModelError(
            f"the model takes {_listed(named)} by name, but the samples' inputs are "
            "one array without a name",
            where=where,
            remedy=(
                f"give the inputs as a dict, {_dict(named)}, or take them by position"
            ),
        )
    return None


def _check_inputs(
    parameters: Mapping[str, inspect.Parameter],
    names: set[str],
    missing: list[str],
    data: str | None,
    inputs: Any,
    where: str,
) -> None:
    """Check that the inputs fill all that the call requires, and that it takes them."""
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    surplus = [] if anything else sorted(n for n in names if n not in parameters)
    wrap = "wrap the model in one that takes the inputs alone"
    if surplus:
        free = [n for n, p in parameters.items() if p.kind in NAMED and n not in names]
        lacks = f" and lacks {_listed(missing)}" if missing else ""
        raise ModelError(
            f"the model takes no input {_listed(surplus)}{nearest(surplus[0], free)}"
            f"{lacks}; the inputs are {_described(inputs)}",
            where=where,
            remedy=(
                "the arrays of a dict go to the model by name: name them as its "
                f"arguments, {_listed(free)}, or {wrap}"
            ),
        )
    if missing:
        taken = sorted(names) if isinstance(inputs, dict) else [data] if data else []
        raise ModelError(
            f"the model's call requires {_listed(missing)}, which the samples' inputs "
            f"don't have; they are {_described(inputs)}",
            where=where,
            remedy=(
                "give the inputs as a dict's arrays by name,"
                f" {_dict([*taken, *missing])}, or give {_listed(missing)} a default,"
                f" e.g. None, or {wrap}; if {missing[-1]!r} says whether the model"
                " trains, name it as Recipe.train_argument"
            ),
        )


def _named_mode(
    train_argument: str | None,
    others: Mapping[str, inspect.Parameter],
    parameters: Mapping[str, inspect.Parameter],
    data: Iterable[str],
    where: str,
) -> dict[str, bool]:
    """The argument that the recipe names, with its value in training."""
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
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return sense
    known = ", ".join(others) or "none besides the inputs"
    raise ModelError(
        f"train_argument names {name!r}, which the model's call does not have"
        f"{nearest(name, others)}",
        where=where,
        remedy=f"name one of its arguments: {known}",
    )


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is REQUIRED and parameter.kind in NAMED


def _boolean(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is a Boolean by its default or by its annotation."""
    if isinstance(parameter.default, bool | np.bool_):
        return True
    if isinstance(parameter.default, int) and parameter.default in (0, 1):
        return _sense_of(parameter.name) is not None  # `train=1`
    if not (parameter.default is None or _is_required(parameter)):
        return False
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    alternatives = [part.strip() for part in text.split("|")]
    return (
        BOOLEANS.fullmatch(next((a for a in alternatives if a != "None"), ""))
        is not None
        and len(alternatives) <= 2
    )


def _sense(name: str, parameter: inspect.Parameter) -> bool | None:
    """The value of a mode argument in training; None for what is none by its name."""
    sense = _sense_of(name)
    if sense is None or parameter.kind not in NAMED:
        return None
    untyped = parameter.annotation is parameter.empty or str(parameter.annotation) in (
        "Any",
        "typing.Any",
    )
    open_default = parameter.default is None or _is_required(parameter)
    return sense if _boolean(parameter) or (untyped and open_default) else None


def _sense_of(name: str) -> bool | None:
    plain = name.replace("_", "").lower().removeprefix("is")
    if plain in TRAINING:
        return True
    return False if plain in OUTSIDE else None


def _random(
    name: str,
    parameter: inspect.Parameter,
    parameters: Iterable[str],
) -> bool:
    """Whether a parameter takes random streams or a key: by its name."""
    if parameter.default is not None and not _is_required(parameter):
        return False
    if name in RNGS:
        return True
    # the key of an attention is an input
    attention = any(n in parameters for n in ("query", "value", "q", "v"))
    return KEYS.fullmatch(name) is not None and not attention


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(n) for n in names) or "nothing"


def _dict(names: Iterable[str]) -> str:
    return "{" + ", ".join(f'"{n}": ...' for n in names) + "}"


def _described(inputs: Any) -> str:
    if isinstance(inputs, dict):
        return ", ".join(f"{n} {_described(x)}" for n, x in inputs.items())
    return (
        f"{inputs.dtype}{list(inputs.shape)}"
        if hasattr(inputs, "dtype")
        else type(inputs).__name__
    )


# ---- finding out ----


def _gains(
    arguments: Arguments,
    name: str,
    train: bool,
    effect: Callable[[Mode], Effect | None],
) -> bool:
    """Whether the call fails, or draws less, without an argument for randomness."""
    mode = arguments.mode(train)
    without = effect(mode)
    if without is not None and not train:
        return False
    given = effect(mode._replace(random=mode.random | {name}))
    return given is not None and (without is None or given.draws > without.draws)


def _found(
    arguments: Arguments,
    name: str,
    effect: Callable[[Mode], Effect | None],
) -> bool | None:
    """The value of a Boolean argument in training, by what it does.

    Returns:
      None: it has nothing to do with training.
    """
    mode = arguments.mode(True)
    others = [
        n for n, default in arguments.open.items() if default is REQUIRED and n != name
    ]
    with_true = None
    with_false = None
    for values in itertools.product((False, True), repeat=len(others)):
        base = {
            **mode.values,
            **dict(
                zip(
                    others,
                    values,
                    strict=True,
                )
            ),
        }
        with_true = effect(mode._replace(values={**base, name: True}))
        with_false = effect(mode._replace(values={**base, name: False}))
        if with_true is not None or with_false is not None:
            break
    required = arguments.open[name] is REQUIRED
    if with_true is None or with_false is None:
        if required:
            raise _unsettled(
                name, arguments.where, "can't be traced with both of its values"
            )
        return None
    if with_true == with_false:
        if required:
            raise _unsettled(
                name,
                arguments.where,
                "draws no random numbers and writes no variables with either value",
            )
        return None
    for sense, more, less in (
        (True, with_true, with_false),
        (False, with_false, with_true),
    ):
        if more.exceeds(less):
            return sense
    raise _unsettled(
        name,
        arguments.where,
        f"draws {with_true.draws} times and writes {_listed(sorted(with_true.writes))} "
        f"if it is True, {with_false.draws} times and "
        f"{_listed(sorted(with_false.writes))} if it is False",
    )


def _unsettled(
    name: str,
    where: str,
    why: str,
) -> ModelError:
    return ModelError(
        f"it can't be told whether the Boolean argument {name!r} says that the model "
        f"trains: its call {why}",
        where=where,
        remedy=(
            f"if it does, set Recipe.train_argument to {name!r}, or to 'not {name}' "
            "if it is True outside of training; if it doesn't, give it a default in "
            "__call__ and name the one that does"
        ),
    )
