"""A recipe's loss as a jaxpr and its state as shapes; no array is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax

from lepton_jax import losses
from lepton_jax.compat import ClosedJaxpr, Jaxpr, whole_axes
from lepton_jax.controller import Controller
from lepton_jax.errors import DataError, ModelError, pointing_at_user
from lepton_jax.hardware import convolution_flops
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.remat import rematerialized
from lepton_jax.recipe import Recipe
from lepton_jax.step.module import Functional, forward_sowing, functional, leaks
from lepton_jax.step.state import State
from lepton_jax.step.training_loss import ARGUMENTS, argument_paths, training_loss
from lepton_jax.trees import by_path, nbytes


@dataclass(frozen=True)
class Trace:
    """What is known of a recipe before it runs.

    Attributes:
      recipe: what was traced.
      functional: the module as pure functions.
      state: a `State` of shapes.
      inputs, targets, outputs: shapes of one batch, batch dim first.
      jaxpr: (params, variables, key, inputs, targets) to the mean loss of one batch and
        the model's outputs.
      flops: floating-point operations of one train step: dots and convolutions of the
        jaxpr, times 3 for the backward.
      operations: how often each primitive occurs.
      samples: in the training data, if that is arrays in memory.
      weighted: whether the loss gives weights, which may all be 0.
    """

    recipe: Recipe
    functional: Functional
    state: State
    inputs: Any
    targets: Any
    outputs: Any
    jaxpr: ClosedJaxpr | None
    flops: float
    operations: dict[str, int]
    samples: int | None
    weighted: bool = False
    _gradients: dict[str, Graph] = field(
        default_factory=dict, repr=False, compare=False
    )

    def gradient(self, remat: str) -> Graph:
        """Loss and gradients of one batch as a graph, under a rematerialization policy;
        `arguments` names its inputs.
        """
        if remat not in self._gradients:
            function = jax.grad(
                rematerialized(training_loss(self.recipe, self.functional, 1), remat),
                has_aux=True,
            )
            state = self.state
            knobs = Controller(self.recipe).forward_knobs(self.state.controller)
            program = jax.make_jaxpr(function)(
                state.params,
                state.variables,
                state.key,
                self.inputs,
                self.targets,
                knobs,
            )
            count = len(jax.tree.leaves(state.params))
            self._gradients[remat] = Graph(program, count, count)
        return self._gradients[remat]

    @property
    def arguments(self) -> list[str]:
        """Paths of the inputs of `gradient`."""
        return argument_paths(
            ARGUMENTS,
            (
                self.state.params,
                self.state.variables,
                self.state.key,
                self.inputs,
                self.targets,
            ),
        )

    @property
    def classes(self) -> int:
        """Size of the outputs' last dim."""
        return jax.tree.leaves(self.outputs)[0].shape[-1]

    def __str__(self) -> str:
        params = by_path(self.state.params)
        lines = [
            f"{self.functional.name} ({self.functional.kind}):"
            f" {sum(p.size for p in params.values()):,} parameters,"
            f" {sum(self.operations.values())} operations, {self.flops:.3g} FLOP a step"
        ]
        lines += [
            f"  {path:40s} {leaf.shape!s:20s} {leaf.dtype}  {nbytes(leaf):,} B"
            for path, leaf in params.items()
        ]
        return "\n".join(lines)


def trace(
    recipe: Recipe,
    inputs: Any,
    targets: Any,
    samples: int | None = None,
) -> Trace:
    """Trace a recipe on the shapes of one sample.

    Args:
      recipe: the recipe.
      inputs: arrays or shapes of a batch of inputs (any batch size), before
        `preprocess`; None where they are not known yet: only the state of an NNX model
        is traced then.
      targets: the same of the targets.
      samples: how many there are to train on, if they are arrays in memory.

    Raises:
      ModelError: the model, the loss or a metric fails on these shapes; the message
        points at the user's line.
    """
    with Patience("tracing the model"):
        return _traced(recipe, inputs, targets, samples)


def _traced(
    recipe: Recipe,
    inputs: Any,
    targets: Any,
    samples: int | None,
) -> Trace:
    def batched(x: Any) -> Any:
        return jax.ShapeDtypeStruct(
            (recipe.batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
        )

    if targets is None and inputs is not None:
        raise DataError(
            "the data has inputs but no targets",
            where="Recipe.train",
            remedy="give a pair (inputs, targets)",
        )
    inputs, targets = jax.tree.map(batched, (inputs, targets))
    with pointing_at_user("preprocess"):
        prepared = (
            jax.eval_shape(whole_axes(recipe.preprocess or (lambda x: x)), inputs)
            if inputs is not None
            else None
        )
    controller = Controller(recipe)
    module, state = _module_and_state(recipe, prepared, controller, None)

    if inputs is None:
        return Trace(
            recipe,
            module,
            state,
            None,
            None,
            None,
            None,
            0.0,
            {},
            None,
        )

    given = (inputs, targets)
    try:
        jaxpr, shapes, weighted = _traced_loss(
            recipe,
            module,
            state,
            given,
        )
        leaking = leaks(jaxpr)
    except ModelError as error:
        if not isinstance(error.__cause__, jax.errors.UnexpectedTracerError):
            raise
        leaking = True
    if leaking:
        module, state = _module_and_state(
            recipe,
            prepared,
            controller,
            recipe.seed,
        )
        jaxpr, shapes, weighted = _traced_loss(
            recipe,
            module,
            state,
            given,
        )
    if shapes[0].shape != ():
        raise ModelError(
            f"the loss of a batch has shape {shapes[0].shape}",
            where="Recipe.loss",
            remedy="return one value per sample",
        )
    operations: dict[str, int] = {}
    flops = _count(jaxpr.jaxpr, operations, 1)
    return Trace(
        recipe,
        module,
        state,
        inputs,
        targets,
        shapes[1],
        jaxpr,
        3.0 * flops,
        operations,
        samples,
        weighted,
    )


def _module_and_state(
    recipe: Recipe,
    prepared: Any,
    controller: Controller,
    seed: int | None,
) -> tuple[Functional, State]:
    """The module as functions, and the state's shapes; `seed` is as in `functional`."""
    module = functional(
        recipe.model,
        prepared,
        train_argument=recipe.train_argument,
        sown=tuple(recipe.auxiliary),
        seed=seed,
    )

    def init() -> State:
        key = jax.random.key(recipe.seed)
        params, variables = module.init(key)
        optimizer, held = controller.init(params, variables)
        return State(
            jax.numpy.int32(0),
            params,
            variables,
            optimizer,
            held,
            key,
        )

    with pointing_at_user("building the model"):
        state = jax.eval_shape(init)
    if not jax.tree.leaves(state.params):
        raise ModelError(
            "the model has no parameters",
            where=module.name,
            remedy="give it at least one nnx.Param",
        )
    return module, state


def _traced_loss(
    recipe: Recipe,
    module: Functional,
    state: State,
    batch: tuple[Any, Any],
) -> tuple[Any, Any, bool]:
    """The jaxpr of a batch's mean loss and outputs, their shapes, whether it is
    weighted.
    """
    weighted = False

    def loss(
        params: Any,
        variables: Any,
        key: Any,
        inputs: Any,
        targets: Any,
    ) -> Any:
        nonlocal weighted
        outputs, after, sown = forward_sowing(
            recipe, module, params, variables, inputs, key, True
        )
        _check_variables(module.name, variables, after)
        sums = losses.measure(recipe, outputs, targets)
        total, weight = losses.with_auxiliary(sums, recipe.auxiliary, sown)["loss"]
        weighted = isinstance(weight, jax.Array)
        return total / weight, outputs

    with pointing_at_user("tracing model, loss and metrics"):
        make = jax.make_jaxpr(loss, return_shape=True)
        jaxpr, shapes = make(
            state.params,
            state.variables,
            state.key,
            *batch,
        )
    return jaxpr, shapes, weighted


def _check_variables(
    name: str,
    before: Any,
    after: Any,
) -> None:
    old = by_path(before)
    new = by_path(after)
    for path in old.keys() | new.keys():
        a = old.get(path)
        b = new.get(path)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            describe = lambda x: "absent" if x is None else f"{x.dtype}{list(x.shape)}"
            raise ModelError(
                f"a call changes the variable {path!r} from {describe(a)} to"
                f" {describe(b)}",
                where=name,
                remedy=(
                    "keep shape and dtype, so that one compiled step fits every step"
                ),
            )


def _count(
    jaxpr: Jaxpr,
    operations: dict[str, int],
    times: int,
) -> float:
    """FLOPs of dots and convolutions, loops multiplied out; primitives are counted into
    `operations`.
    """
    flops = 0.0
    eqn: Any
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        operations[name] = operations.get(name, 0) + 1
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            flops += (
                2.0
                * times
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(shape[d] for d in contract)
            )
        elif name == "conv_general_dilated":
            flops += times * convolution_flops(
                eqn.params, *(v.aval.shape for v in (*eqn.invars[:2], eqn.outvars[0]))
            )
        inner_times = times * eqn.params["length"] if name == "scan" else times
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                if isinstance(sub, ClosedJaxpr):
                    flops += _count(sub.jaxpr, operations, inner_times)
                elif isinstance(sub, Jaxpr):
                    flops += _count(sub, operations, inner_times)
    return flops
