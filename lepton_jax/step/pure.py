"""A module as pure functions: the parts that NNX and Linen share.

`NnxModule` and `LinenModule` say how a module of their kind is made and called. The
rest is common: how its arguments are settled by tracing, which random streams they get,
and which of its sown values are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lepton_jax.compat import whole_axes
from lepton_jax.errors import ModelError, nearest
from lepton_jax.step.arguments import Arguments, Effect, Mode, draws, settled
from lepton_jax.step.signature import call_of, read
from lepton_jax.trees import by_path, is_inexact

# Outside training each call draws the same random numbers: an evaluation can be
# repeated, and is the same on each host.
EVALUATION_SEED = 0


class Functional(NamedTuple):
    """A module without its objects.

    Attributes:
      kind: "nnx" or "linen".
      name: the name of the module's class.
      init: a random key to (params, variables), nested dicts of arrays.
      apply: (params, variables, inputs, key, train, dropout) to (outputs, variables
        after the call, sown). `key` feeds the random streams of Linen modules, and the
        arguments `rngs`, `rng`, `key` of either kind; NNX modules carry their own
        streams in `variables`. It is not used outside training, where all modules draw
        from `EVALUATION_SEED`. `dropout` is a factor of the rate of each nnx.Dropout;
        None: 1. `sown` holds the values sown in training under each of the names that
        were asked for.
      whole: (params, variables) to a module that holds them, in evaluation: an NNX
        module, or a Linen module bound to its variables.
      samples: (params, variables, key, count) to what the model's method `samples(key,
        count)` returns outside training: generated pictures; None: it has no such
        method, or is a Linen module.
    """

    kind: str
    name: str
    init: Callable[[Any], tuple[Any, Any]]
    apply: Callable[[Any, Any, Any, Any, bool, Any], tuple[Any, Any, dict[str, Any]]]
    whole: Callable[[Any, Any], Any]
    samples: Callable[[Any, Any, Any, int], Any] | None = None


class Request(NamedTuple):
    """The arguments of `module.functional`, for which a module is made pure."""

    inputs: Any
    train_argument: str | None
    sown: tuple[str, ...]
    seed: int | None


class PureModule:
    """A module that is made pure.

    Args:
      kind: the module's class.
      request: the arguments of `module.functional`.

    Attributes:
      name: the name of the module's class.
      arguments: the arguments of its call.
    """

    def __init__(self, kind: type, request: Request):
        self.name = kind.__name__
        self.request = request
        self._tried: dict[Any, Effect | None] = {}
        self.arguments: Arguments = self._settled(kind)

    def init(self, key: Any) -> tuple[Any, Any]:
        """Return (params, variables) of a new module."""
        raise NotImplementedError

    def variables_after(
        self,
        mode: Mode,
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
    ) -> Any:
        """Return the variables after a call in some mode."""
        raise NotImplementedError

    def random_streams(self, key: Any) -> Any:
        """Return the value of an argument `rngs`."""
        raise NotImplementedError

    def streams(self, key: Any) -> Callable[[str], Any]:
        """Return a function that makes random streams, or a key, for an argument.

        Each argument, by its name, has other numbers.
        """
        handed: list[str] = []

        def make(name: str) -> Any:
            if name not in handed:
                handed.append(name)
            index = handed.index(name)
            own = jax.random.fold_in(key, index) if index else key
            return self.random_streams(own) if name == "rngs" else own

        return make

    def collected(
        self,
        sown: Mapping[str, list[Any]],
        labels: set[str],
        asked: Sequence[str],
    ) -> dict[str, Any]:
        """Select the sown values that are asked for.

        Args:
          sown: values by the labels under which they were sown.
          labels: all labels that the module sows under.
          asked: labels.

        Raises:
          ModelError: there are none under a label.
        """
        for name in asked:
            if not jax.tree.leaves(sown.get(name, [])):
                known = ", ".join(sorted(labels)) or "nothing"
                raise ModelError(
                    f"auxiliary names {name!r}, under which the model sows nothing in "
                    f"training{nearest(name, labels)}",
                    where=self.name,
                    remedy=(
                        f"name what it sows under ({known}), or sow under it: "
                        f"self.sow({name!r}, 'name', value)"
                    ),
                )
        return {name: sown[name] for name in asked}

    # ---- settling the arguments ----

    def _settled(self, kind: type) -> Any:
        """Read the arguments of the call, and trace it to settle those that are open.

        Returns:
          None: there are no inputs, so the module is not called.
        """
        request = self.request
        if request.inputs is None:
            return None
        where = f"{self.name}.__call__"
        self.arguments = read(
            call_of(kind), where, request.inputs, request.train_argument
        )
        return settled(self.arguments, self._effect)

    def _effect(self, mode: Mode) -> Effect | None:
        """Return the effect of a call; None if it fails. Each mode is traced once."""
        known = (
            mode.train,
            frozenset(mode.values.items()),
            mode.random,
        )
        if known not in self._tried:
            try:
                self._tried[known] = self._traced_effect(mode)
            except Exception:  # of the user's code: e.g. `decode=True` has no cache
                self._tried[known] = None
        return self._tried[known]

    def _traced_effect(self, mode: Mode) -> Effect:
        def call(
            params: Any,
            variables: Any,
            inputs: Any,
            key: Any,
        ) -> Any:
            return self.variables_after(mode, params, variables, inputs, key)

        params, variables = jax.eval_shape(self.init, key_shape())
        program, after = jax.make_jaxpr(whole_axes(call), return_shape=True)(
            params, variables, self.request.inputs, key_shape()
        )
        jaxpr = program.jaxpr
        first = len(jax.tree.leaves(params))
        paths = list(by_path(variables))
        before = dict(
            zip(
                paths,
                jaxpr.invars[first : first + len(paths)],
                strict=True,
            )
        )
        results = zip(by_path(after), jaxpr.outvars, strict=True)
        written = {path for path, x in results if before.get(path) is not x}
        return Effect(draws(jaxpr), frozenset(written))


def key_shape() -> Any:
    """Return a random key as a shape: a key itself would start JAX's devices."""
    return jax.eval_shape(lambda: jax.random.key(0))


def check_trainable(params: Any, where: str) -> None:
    """Check that each parameter has a gradient, and is not empty.

    Raises:
      ModelError: it has none, or is empty.
    """
    for path, leaf in by_path(params).items():
        if not is_inexact(leaf):
            raise ModelError(
                f"the parameter {path!r} is {leaf.dtype}, which has no gradient",
                where=where,
                remedy=(
                    "make it floating-point or complex, or no nnx.Param but another "
                    "nnx.Variable"
                ),
            )
        if leaf.size == 0:
            raise ModelError(
                f"the parameter {path!r} has shape {leaf.shape}: it is empty",
                where=where,
                remedy="give the model sizes of at least 1",
            )
