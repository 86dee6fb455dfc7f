"""The arguments of a module's call: inputs, mode (training or not), random streams.

Flax has no one convention for the mode: modules call it `train`, `deterministic`,
`is_training`, `eval_mode`, ... Names that say it are taken by name (see signature.py).
A Boolean with any other name is taken by its effect: the call is traced with it True
and with it False, and the value with which the module draws more random numbers, or
writes more variables, is the one for training. A small example:

>>> import jax
>>> from lepton_jax.step.signature import read
>>> def call(self, x, frozen=False, *, deterministic, key): ...
>>> inputs = jax.ShapeDtypeStruct((8, 4), "float32")
>>> arguments = read(call, "Net.__call__", inputs, train_argument=None)

`deterministic` says by its name that it is False in training; `key` gets a key, in
training and outside it; `frozen` is open.

>>> arguments.training, arguments.random, arguments.open
({'deterministic': False}, {'key': (True, True)}, {'frozen': False})

Let the module write its batch statistics unless it is frozen or deterministic. Then
`frozen=False` does all that `frozen=True` does, and more:

>>> def effect(mode):
...     writing = not (mode.values["frozen"] or mode.values["deterministic"])
...     return Effect(draws=1, writes=frozenset({"mean"} if writing else ()))
>>> arguments = settled(arguments, effect)
>>> arguments.mode(train=True).values
{'deterministic': False, 'frozen': False}
>>> arguments.mode(train=False).values
{'deterministic': True, 'frozen': True}
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lepton_jax.errors import ModelError

# the default of an argument that has none
REQUIRED = inspect.Parameter.empty

# primitives of JAX that draw random numbers
DRAWING = (
    "random_bits",
    "random_gamma",
    "rng_uniform",
    "rng_bit_generator",
    "threefry2x32",
)


class Effect(NamedTuple):
    """Effects of a call, next to its outputs.

    Attributes:
      draws: number of random operations in its program.
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
      training: Boolean arguments and their values in training; outside it they have the
        other one.
      random: arguments that take random streams or a key, and whether they get one (in
        training, outside it).
      open: Boolean arguments whose sense is not known, and their defaults, or
        `REQUIRED`. `settled` finds it out.
      open_random: arguments for randomness that may stay None. `settled` finds out
        whether they do.
    """

    where: str
    data: str | None = None
    whole: bool = False
    training: Mapping[str, bool] = field(default_factory=dict)
    random: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    open: Mapping[str, Any] = field(default_factory=dict)
    open_random: tuple[str, ...] = ()

    def mode(self, train: bool) -> Mode:
        """Return the way to call the module in training, or outside it."""
        values = {}
        for name, default in self.open.items():
            # an argument that is not settled yet, and has no default, needs some value
            values[name] = False if default is REQUIRED else default
        for name, sense in self.training.items():
            values[name] = train == sense
        index = 0 if train else 1
        random = frozenset(name for name, given in self.random.items() if given[index])
        return Mode(train, values, random)

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
        for name in sorted(mode.random):
            options[name] = streams(name)
        if isinstance(inputs, dict) and not self.whole:
            return function(**inputs, **options)
        if self.data is not None:
            return function(**{self.data: inputs}, **options)
        return function(inputs, **options)


def settled(
    arguments: Arguments,
    effect: Callable[[Mode], Effect | None],
) -> Arguments:
    """Find out what the open arguments do.

    Args:
      arguments: the arguments that `signature.read` returned.
      effect: traces a call; None: it can't be traced.

    Raises:
      ModelError: it can't be told which value of an argument is for training.
    """
    for name in arguments.open_random:
        in_training = _gains(arguments, name, True, effect)
        outside = _gains(arguments, name, False, effect)
        random = {**arguments.random, name: (in_training, outside)}
        arguments = replace(arguments, random=random)

    training = dict(arguments.training)
    for name in arguments.open:
        sense = _sense_by_effect(arguments, name, effect)
        if sense is not None:
            training[name] = sense
    return replace(
        arguments,
        training=training,
        open={},
        open_random=(),
    )


def draws(jaxpr: Any) -> int:
    """Return the number of random operations in a jaxpr, a loop's body counted once."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name in DRAWING
        count += sum(draws(inner) for inner in _inner_jaxprs(eqn))
    return count


def quoted(names: Iterable[str]) -> str:
    """Return names for a message: 'a', 'b'."""
    return ", ".join(repr(n) for n in names) or "nothing"


# ---- internals ----


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


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
    if given is None:
        return False
    return without is None or given.draws > without.draws


def _sense_by_effect(
    arguments: Arguments,
    name: str,
    effect: Callable[[Mode], Effect | None],
) -> bool | None:
    """Return the value of a Boolean argument in training, by its effect.

    Returns:
      None: it has nothing to do with training.
    """
    where = arguments.where
    required = arguments.open[name] is REQUIRED
    with_true, with_false = _effects(arguments, name, effect)
    if with_true is None or with_false is None:
        if required:
            raise _unsettled(name, where, "can't be traced with both of its values")
        return None
    if with_true == with_false:
        if required:
            raise _unsettled(
                name,
                where,
                "draws no random numbers and writes no variables with either value",
            )
        return None
    if with_true.exceeds(with_false):
        return True
    if with_false.exceeds(with_true):
        return False
    raise _unsettled(
        name,
        where,
        f"{_in_words(with_true)} if it is True, {_in_words(with_false)} if it is False",
    )


def _effects(
    arguments: Arguments,
    name: str,
    effect: Callable[[Mode], Effect | None],
) -> tuple[Effect | None, Effect | None]:
    """Trace the call with a Boolean argument True and False.

    Other open arguments that have no default get values with which it can be traced.
    """
    mode = arguments.mode(True)
    others = [
        other
        for other, default in arguments.open.items()
        if default is REQUIRED and other != name
    ]
    for values in itertools.product((False, True), repeat=len(others)):
        base = dict(mode.values) | dict(
            zip(
                others,
                values,
                strict=True,
            )
        )
        with_true = effect(mode._replace(values={**base, name: True}))
        with_false = effect(mode._replace(values={**base, name: False}))
        if with_true is not None or with_false is not None:
            break
    return with_true, with_false


def _in_words(effect: Effect) -> str:
    written = quoted(sorted(effect.writes))
    return f"draws {effect.draws} times and writes {written}"


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
