"""The trace of a recipe: its loss as a jaxpr and its state as shapes.

Tracing allocates no array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax

from lepton_jax import losses
from lepton_jax.augment import step_key
from lepton_jax.compat import ClosedJaxpr, Jaxpr, whole_axes
from lepton_jax.controller import Controller, stride
from lepton_jax.errors import DataError, ModelError, pointing_at_user
from lepton_jax.hardware import Topology, convolution_flops
from lepton_jax.planner import rewrite
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.keeping import Kept
from lepton_jax.planner.program.products import products_on
from lepton_jax.planner.program.ragged import RAGGED, ragged_flops
from lepton_jax.planner.program.remat import keepable, rematerialized
from lepton_jax.planner.program.ruled import own_flops
from lepton_jax.planner.program.tables import find_tables
from lepton_jax.planner.rewrite.forms import SAMPLES
from lepton_jax.planner.rewrite.own import OWN
from lepton_jax.planner.rewrite.stages import layers_of
from lepton_jax.recipe import Recipe
from lepton_jax.step.embeddings import NO_TABLES, Tables, compacted
from lepton_jax.step.module import Functional, forward_sowing, functional, leaks
from lepton_jax.step.state import State
from lepton_jax.step.training_loss import (
    ARGUMENTS,
    argument_paths,
    training_gradient,
    whole_loss,
)
from lepton_jax.trees import by_path, nbytes

# FLOPs of a train step by those of its forward pass: the backward pass computes the
# gradients of both operands of each product.
STEP_BY_FORWARD = 3.0
# a loss as its author wrote it
PLAIN = rewrite.Forms()


@dataclass(frozen=True)
class Trace:
    """A recipe as far as it is known before it runs.

    Attributes:
      recipe: what was traced.
      controller: the recipe's policies at work; the program runs the same object.
      functional: the module as pure functions.
      state: a `State` of shapes.
      inputs, targets, outputs: shapes of one batch, batch dim first.
      jaxpr: (params, variables, key, inputs, targets) to the mean loss of one batch and
        the model's outputs.
      flops: floating-point operations of one train step: dots and convolutions of the
        jaxpr, times 3 for the backward pass.
      operations: how often each primitive occurs.
      samples: the number of samples in the training data, if that is arrays in memory.
      weighted: whether the loss gives weights, which may all be 0.
      tables: the embeddings that a step updates by rows.
      rewritten: whether its gradient is the faster form for a CPU; see `on`.
      forms: in which the loss is computed; see `on`.
    """

    recipe: Recipe
    controller: Controller
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
    tables: Tables = NO_TABLES
    rewritten: bool = False
    forms: rewrite.Forms = PLAIN
    # by the policy of rematerialization, whether it is rewritten, and its forms
    _gradients: dict[tuple[str, bool, rewrite.Forms], Graph] = field(
        default_factory=dict, repr=False, compare=False
    )

    def on(self, topology: Topology, micro_batches: int | None = None) -> Trace:
        """Return the trace of the program that runs on some devices.

        Its gradient is the one that the compiled step has: see `planner.rewrite`.

        Args:
          topology: the devices.
          micro_batches: in which a batch is taken, if the recipe doesn't say; None:
            not known yet.
        """
        rewritten = rewrite.applies(topology.platform, topology.devices)
        forms = PLAIN
        if self.jaxpr is not None:
            forms = rewrite.forms_for(
                self.jaxpr,
                self._traced_loss,
                topology.platform,
                topology.devices,
                self.recipe.micro_batches or micro_batches,
                products_on(self.recipe.precision, topology.device),
            )
        if (rewritten, forms) == (self.rewritten, self.forms):
            return self
        return replace(self, rewritten=rewritten, forms=forms)

    def staged(self, stages: rewrite.Stages) -> Trace:
        """Return the trace of the program with a pipeline of layers.

        Args:
          stages: the pipeline.
        """
        return replace(self, forms=replace(self.forms, stages=stages))

    def stack(self, parts: int) -> int:
        """Return the layers of the stack that a pipeline would divide; 0: none.

        Args:
          parts: micro-batches in flight.
        """
        loss, args = self._loss_and_shapes()
        return layers_of(self.forms.of(loss), parts, SAMPLES, args)

    def gradient(self, remat: str) -> Graph:
        """Return the graph of one batch's gradients, weighted sums and variables.

        Args:
          remat: a rematerialization policy, one of `remat.POLICIES` or of `keeping`.

        Returns:
          The graph, whose inputs are called as in `arguments`.
        """
        form = (remat, self.rewritten, self.forms)
        if form not in self._gradients:
            self._gradients[form] = self._trace_gradient(remat)
        return self._gradients[form]

    def keepable(self) -> list[Kept]:
        """List what rematerialization may keep of the loss, value by value."""
        program = self._traced_loss(self.forms)
        return keepable(program, len(jax.tree.leaves(self.state.params)))

    def _traced_loss(self, forms: rewrite.Forms = PLAIN) -> ClosedJaxpr:
        """Return the training loss of a batch, and all that is measured of it."""
        loss, shapes = self._loss_and_shapes()
        return jax.make_jaxpr(forms.of(loss))(*shapes)

    def _loss_and_shapes(self) -> tuple[Any, tuple]:
        """Return the training loss of a batch, and the shapes of its arguments."""
        state = self.state
        loss = whole_loss(self.recipe, self.functional, micro_batches=1)
        return loss, (
            state.params,
            state.variables,
            self.key,
            self.inputs,
            self.targets,
            self.controller.forward_knobs(state.controller),
        )

    def _trace_gradient(self, remat: str) -> Graph:
        state = self.state
        params = state.params
        rows = []
        remade = self.forms.around(partial(rematerialized, policy=remat))
        around = remade
        if self.tables:
            params = self.tables.compact(params)
            rows = [self.tables.rows()]
            around = partial(compacted, tables=self.tables, around=remade)
        gradient = training_gradient(
            self.recipe,
            self.functional,
            micro_batches=1,
            around=around,
        )
        gradient = self.forms.after(gradient)
        if self.rewritten:
            gradient = rewrite.rewritten(gradient)
        knobs = self.controller.forward_knobs(state.controller)
        program = jax.make_jaxpr(gradient)(
            params,
            state.variables,
            self.key,
            self.inputs,
            self.targets,
            knobs,
            *rows,
        )
        count = len(jax.tree.leaves(params))
        whole = {
            number: self.tables.sizes[path]
            for number, path in enumerate(by_path(params))
            if path in self.tables.sizes
        }
        return Graph(program, parameters=count, gradients=count, whole=whole)

    @property
    def key(self) -> Any:
        """Shapes of the random keys of a micro-batch (see `augment.step_key`)."""
        make = partial(step_key, self.recipe.preprocess, part=0)
        return jax.eval_shape(lambda key: make(key, key), self.state.key)

    @property
    def arguments(self) -> list[str]:
        """Paths of the inputs of `gradient`."""
        state = self.state
        given = (
            state.params,
            state.variables,
            self.key,
            self.inputs,
            self.targets,
            self.controller.forward_knobs(state.controller),
            self.tables.rows(),
        )
        return argument_paths((*ARGUMENTS, "rows"), given)

    @property
    def classes(self) -> int:
        """Size of the outputs' last dim."""
        return jax.tree.leaves(self.outputs)[0].shape[-1]

    def __str__(self) -> str:
        """Return a line for the program and one for each parameter."""
        params = by_path(self.state.params)
        size = sum(leaf.size for leaf in params.values())
        lines = [
            f"{self.functional.name} ({self.functional.kind}):"
            f" {size:,} parameters,"
            f" {sum(self.operations.values())} operations, {self.flops:.3g} FLOP a step"
        ]
        for path, leaf in params.items():
            lines.append(
                f"  {path:40s} {leaf.shape!s:20s} {leaf.dtype}  {nbytes(leaf):,} B"
            )
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
      samples: the number of samples to train on, if they are arrays in memory.

    Returns:
      The trace, for batches of the recipe's size.

    Raises:
      DataError: there are inputs but no targets.
      ModelError: the model, the loss or a metric fails on these shapes; the message
        points at the user's line.
    """
    with Patience("tracing the model"):
        return _trace(recipe, inputs, targets, samples)


# ---- internals ----


@dataclass(frozen=True)
class _TracedLoss:
    """The mean loss of a batch as a jaxpr, with the shapes of loss and outputs."""

    jaxpr: ClosedJaxpr
    loss: Any
    outputs: Any
    weighted: bool


def _trace(
    recipe: Recipe,
    inputs: Any,
    targets: Any,
    samples: int | None,
) -> Trace:
    if targets is None and inputs is not None:
        raise DataError(
            "the data has inputs but no targets",
            where="Recipe.train",
            remedy="give a pair (inputs, targets)",
        )
    inputs, targets = _batch_of(recipe.batch_size, (inputs, targets))
    prepared = _preprocessed(recipe, inputs)
    controller = Controller(recipe)
    if inputs is None:
        module, state = _module_and_state(controller, prepared, None)
        return _trace_of_state(controller, module, state)

    module, state, traced = _trace_model(
        controller,
        prepared,
        (inputs, targets),
    )
    if traced.loss.shape != ():
        raise ModelError(
            f"the loss of a batch has shape {traced.loss.shape}",
            where="Recipe.loss",
            remedy="return one value per sample",
        )
    operations: dict[str, int] = {}
    flops = STEP_BY_FORWARD * _count(traced.jaxpr.jaxpr, operations, 1)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    controller.stride = stride(flops, parameters)
    return Trace(
        recipe=recipe,
        controller=controller,
        functional=module,
        state=state,
        inputs=inputs,
        targets=targets,
        outputs=traced.outputs,
        jaxpr=traced.jaxpr,
        flops=flops,
        operations=operations,
        samples=samples,
        weighted=traced.weighted,
        tables=find_tables(
            controller,
            state,
            whole_loss(recipe, module, micro_batches=1),
            (inputs, targets),
            traced.jaxpr,
        ),
    )


def _batch_of(size: int, arrays: Any) -> Any:
    """Return the shapes of some arrays for a batch of another size."""

    def resized(x: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), dtype)

    return jax.tree.map(resized, arrays)


def _preprocessed(recipe: Recipe, inputs: Any) -> Any:
    """Return the shapes of a batch of inputs after `Recipe.preprocess`."""
    if inputs is None:
        return None
    preprocess = recipe.preprocess or (lambda x: x)
    with pointing_at_user("preprocess"):
        return jax.eval_shape(whole_axes(preprocess), inputs)


def _trace_of_state(
    controller: Controller,
    module: Functional,
    state: State,
) -> Trace:
    """Return the trace of a recipe whose data is not known yet."""
    return Trace(
        recipe=controller.recipe,
        controller=controller,
        functional=module,
        state=state,
        inputs=None,
        targets=None,
        outputs=None,
        jaxpr=None,
        flops=0.0,
        operations={},
        samples=None,
    )


def _trace_model(
    controller: Controller,
    prepared: Any,
    batch: tuple[Any, Any],
) -> tuple[Functional, State, _TracedLoss]:
    """Trace the model and the loss of a batch.

    A module that holds an array from when it was built in a function (see `leaks`) is
    traced once more, then built anew from the recipe's seed in each program.
    """
    recipe = controller.recipe
    module, state = _module_and_state(controller, prepared, None)
    try:
        traced = _trace_loss(recipe, module, state, batch)
        leaking = leaks(traced.jaxpr)
    except ModelError as error:
        if not isinstance(error.__cause__, jax.errors.UnexpectedTracerError):
            raise
        leaking = True
    if leaking:
        module, state = _module_and_state(controller, prepared, recipe.seed)
        traced = _trace_loss(recipe, module, state, batch)
    return module, state, traced


def _module_and_state(
    controller: Controller,
    prepared: Any,
    seed: int | None,
) -> tuple[Functional, State]:
    """Return the module as functions and the state's shapes.

    Args:
      controller: the recipe and its policies.
      prepared: shapes of the inputs after preprocessing.
      seed: as in `functional`.
    """
    recipe = controller.recipe
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
        optimizer, controlled = controller.init(params, variables)
        return State(
            jax.numpy.int32(0),
            params,
            variables,
            optimizer,
            controlled,
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


def _trace_loss(
    recipe: Recipe,
    module: Functional,
    state: State,
    batch: tuple[Any, Any],
) -> _TracedLoss:
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
        sums = losses.with_auxiliary(sums, recipe.auxiliary, sown)
        total, weight = sums["loss"]
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
    value, outputs = shapes
    return _TracedLoss(jaxpr, value, outputs, weighted)


def _check_variables(
    name: str,
    before: Any,
    after: Any,
) -> None:
    """Check that a call of the model keeps shape and dtype of each variable."""
    old = by_path(before)
    new = by_path(after)
    for path in old.keys() | new.keys():
        was = _described(old.get(path))
        becomes = _described(new.get(path))
        if was != becomes:
            raise ModelError(
                f"a call changes the variable {path!r} from {was} to {becomes}",
                where=name,
                remedy=(
                    "keep shape and dtype, so that one compiled step fits every step"
                ),
            )


def _described(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


# ---- counting ----


def _count(
    jaxpr: Jaxpr,
    operations: dict[str, int],
    times: int,
) -> float:
    """Return the FLOPs of dots and convolutions, and count the primitives.

    Args:
      jaxpr: the jaxpr; those in its equations' parameters count too.
      operations: primitive name to count, added to.
      times: how often the jaxpr runs.
    """
    flops = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        operations[name] = operations.get(name, 0) + 1
        flops += _product_flops(eqn, times)

        inner_times = times * eqn.params["length"] if name == "scan" else times
        for inner in _inner_jaxprs(eqn):
            flops += _count(inner, operations, inner_times)
    return flops


def _product_flops(eqn: Any, times: int) -> float:
    """Return the FLOPs of a dot or a convolution, 0 for another operation."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        out = eqn.outvars[0].aval.shape
        terms = math.prod(left[d] for d in contracted)
        return 2.0 * times * math.prod(out) * terms
    if name == "conv_general_dilated":
        left, right = eqn.invars[:2]
        arrays = (left, right, eqn.outvars[0])
        shapes = [variable.aval.shape for variable in arrays]
        return times * convolution_flops(eqn.params, *shapes)
    if name == OWN:
        return times * own_flops(eqn)
    if name == RAGGED:
        return times * ragged_flops(eqn)
    return 0.0


def _inner_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        candidates = value if isinstance(value, tuple | list) else (value,)
        for candidate in candidates:
            if isinstance(candidate, ClosedJaxpr):
                yield candidate.jaxpr
            elif isinstance(candidate, Jaxpr):
                yield candidate
