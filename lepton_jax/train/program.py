"""The plan compiled: one XLA executable each to train, to evaluate and to predict.

A train step is one program: forward, backward, gradient reduction, clipping, policies,
optimizer and metrics, with donated state. Nothing here waits for a device, except where
the devices are virtual ones of a CPU.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lepton_jax import losses
from lepton_jax.augment import step_key
from lepton_jax.checkpoint.adoption import (
    is_number,
    named_recipe_values,
    recipe_values,
    schedule_values,
)
from lepton_jax.compat import jit_on, placed, whole_axes
from lepton_jax.controller import Pieces, norm, select_weights
from lepton_jax.controller.signals import INPUTS, input_rms
from lepton_jax.data import Limit
from lepton_jax.errors import DataError, ModelError, pointing_at_user
from lepton_jax.hosts import agreement
from lepton_jax.planner import (
    Evaluation,
    Plan,
    Prediction,
    Trace,
    evaluated,
    laid_out,
    limits,
    nan_rows,
    rematerialized,
    rewrite,
)
from lepton_jax.planner.xla import flags
from lepton_jax.step.branches import on_one_cpu
from lepton_jax.step.embeddings import Rows, cast_late, compacted
from lepton_jax.step.optimizers import divided_over
from lepton_jax.step.state import State
from lepton_jax.step.training_loss import (
    ARGUMENTS,
    differentiated_sum,
    training_gradient,
)
from lepton_jax.train.compilation import Compilation, CompilationLog
from lepton_jax.train.recovery import WEIGHT
from lepton_jax.train.touched import Touching, micro_batches
from lepton_jax.trees import by_path, with_leaves


class _Gradients(NamedTuple):
    """The measurements of one batch.

    Attributes:
      gradients: of the loss that is differentiated (see `step.training_loss`).
      sums: (sum, weight) of loss and metrics, by name.
      variables: of the module, after the batch.
      squares: sum (in the end: mean) of the squared norms of the micro-batches'
        gradients, if a signal needs it.
    """

    gradients: Any
    sums: dict[str, tuple[Any, Any]]
    variables: Any
    squares: Any


class Program:
    """The compiled train step, evaluation and prediction of one plan.

    Args:
      trace: the traced recipe.
      plan: how it lies on the devices.
      devices: as many devices as the plan's mesh has: a list, or an array of the mesh's
        shape.
      on_compile: called after each compilation.

    Attributes:
      records: names of the values that a step records, in their order.
      state_sharding: where the state lies.
      block_sharding: where a block of batches lies.
      batch_sharding: where a batch of evaluation or prediction lies.
      replicated: where scalars lie.
    """

    def __init__(
        self,
        trace: Trace,
        plan: Plan,
        devices: Any,
        on_compile: Callable[[Compilation], None] = lambda compilation: None,
    ):
        self.recipe = trace.recipe
        self.trace = trace
        self.plan = plan
        self.controller = trace.controller
        weight = [WEIGHT] if trace.weighted else []
        self.records = [
            "loss",
            *self.recipe.metrics,
            *weight,
            *self.controller.records,
        ]

        self.mesh = plan.make_mesh(devices)
        rows = plan.batch_axes or None
        self._has_blocks = plan.steps_per_call > 1
        self.state_sharding = plan.state_shardings(self.mesh, trace.state)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(self.mesh, PartitionSpec(rows))
        self._touching = Touching(trace, plan, self.mesh)
        self.block_sharding = self.batch_sharding
        if self._has_blocks:
            self.block_sharding = NamedSharding(self.mesh, PartitionSpec(None, rows))

        first_device = self.mesh.devices.flat[0]
        self._is_rewritten = rewrite.applies(first_device.platform, self.mesh.size)
        are_virtual = self.mesh.size > 1 and first_device.platform == "cpu"
        self._is_one_cpu = self.mesh.size == 1 and first_device.platform == "cpu"
        self._log = CompilationLog(on_compile, waits=are_virtual)
        self._jit = partial(jit_on, self.mesh.devices.flat)
        known, self.refused_flags = flags.known(
            plan.flags, list(self.mesh.devices.flat)
        )
        for name in self.refused_flags:
            warnings.warn(
                f"this XLA has no flag {name}; the step runs without it", stacklevel=2
            )
        self._train = self._jit(
            self._steps if self._has_blocks else self._one_step,
            flags=known,
            donate_argnums=0,
            out_shardings=(self.state_sharding, self.replicated),
        )
        self._evaluate = self._jit(
            self._evaluate_batch, donate_argnums=0, out_shardings=self.replicated
        )
        self._resident: weakref.WeakKeyDictionary[Any, Any] = (
            weakref.WeakKeyDictionary()
        )
        self._predictors: dict[Callable, Callable] = {}
        self._predictions: dict[Callable, Prediction] = {}
        self._values: dict[str, float] | None = None
        self._given: dict[str, Any] | None = None

    @property
    def compilations(self) -> list[Compilation]:
        """The compilations so far."""
        return self._log.compilations

    # ---- the state ----

    def init(self, seed: int) -> State:
        """Return the state before the first step, laid out as planned."""

        def init(seed: Any) -> State:
            self._log.trace("init", seed)
            key = jax.random.key(seed)
            params, variables = self.trace.functional.init(key)
            return State(
                jnp.int32(0),
                params,
                variables,
                *self.controller.init(params, variables),
                key,
            )

        state = self._log.call(
            "init",
            self._jit(init, out_shardings=self.state_sharding),
            np.uint32(seed),
        )
        self._values = recipe_values(state)
        return state

    def init_with(
        self,
        seed: int,
        weights: Mapping[str, jax.Array],
    ) -> State:
        """Return the state before the first step of a run with given parameters.

        Args:
          seed: of all else.
          weights: parameters by path, laid out as planned; the others are new.
        """
        shardings = by_path(self.state_sharding.params)
        fresh = {path: x for path, x in shardings.items() if path not in weights}

        def init(seed: Any) -> Any:
            key = jax.random.key(seed)
            params, variables = self.trace.functional.init(key)
            leaves = by_path(params)
            # XLA drops the parameters that are not returned.
            return jnp.int32(0), variables, key, {path: leaves[path] for path in fresh}

        where = self.state_sharding
        own = (where.step, where.variables, where.key, fresh)
        step, variables, key, new = self._jit(init, out_shardings=own)(np.uint32(seed))
        shapes = self.trace.state
        params = _filled(shapes.params, {**weights, **new})
        rest = {"optimizer": shapes.optimizer, "controller": shapes.controller}
        made = _filled(rest, self.begun(params, variables, by_path(rest)))
        return State(
            step,
            params,
            variables,
            made["optimizer"],
            made["controller"],
            key,
        )

    def recipe_values(self) -> dict[str, float]:
        """Return the numbers that the recipe puts into its first state, by path.

        See `adoption.recipe_values`.
        """
        if self._values is None:

            def scalars() -> Any:
                params, variables = self.trace.functional.init(jax.random.key(0))
                optimizer, controller = self.controller.init(params, variables)
                leaves = by_path({"optimizer": optimizer, "controller": controller})
                return {path: x for path, x in leaves.items() if is_number(x)}

            # As only scalars are returned, XLA drops the arrays around them.
            self._values = named_recipe_values(jax.jit(scalars)())
        return self._values

    def given(self) -> dict[str, Any]:
        """Return the recipe's part in the state, in plain data, for a checkpoint.

        Returns:
          "values": see `recipe_values`; "policies": names, in their order; "schedule":
          values of a learning rate that is a schedule, else None.
        """
        if self._given is None:
            rate = self.recipe.learning_rate
            self._given = {
                "values": self.recipe_values(),
                "policies": [policy.name for policy in self.controller.policies],
                "schedule": schedule_values(rate) if callable(rate) else None,
            }
        return self._given

    def begun(
        self,
        params: Any,
        variables: Any,
        paths: Iterable[str],
    ) -> dict[str, Any]:
        """Make leaves of optimizer and controller as they are before a first step.

        Args:
          params: with which the training begins.
          variables: of the module, likewise.
          paths: of the wanted leaves in the state, e.g. "optimizer/0/mu/a/kernel".

        Returns:
          The leaves by path, laid out as planned.
        """
        wanted = set(paths)
        shardings = by_path(self.state_sharding)

        def begin(
            params: Any,
            variables: Any,
        ) -> dict[str, Any]:
            optimizer, controller = self.controller.init(params, variables)
            parts = {"optimizer": optimizer, "controller": controller}
            leaves = by_path(parts).items()
            # These are copies, because no result may be an argument's buffer.
            return {path: jnp.copy(leaf) for path, leaf in leaves if path in wanted}

        out = {path: shardings[path] for path in sorted(wanted)}
        return self._jit(begin, out_shardings=out)(params, variables)

    # ---- training ----

    def train(
        self,
        state: State,
        block: Any,
        start: int,
        stop: int,
        data: Any = None,
    ) -> tuple[State, jax.Array]:
        """Train on batches start to stop of a block; the state is donated.

        With resident `data`, a block holds indices.

        Returns:
          The state after them, and their records: float32 (steps a block, records), of
            which rows start to stop are filled. A step's values are measured with the
            parameters before its update.
        """
        bounds = (start, stop) if self._has_blocks else ()
        return self._log.call(
            "train",
            self._train,
            state,
            block,
            *bounds,
            data,
        )

    def lower(self) -> Any:
        """Lower the train step for the mesh's devices, which need not be there.

        `.compile()` of what this returns compiles it ahead of time.
        """
        trace = self.trace
        state = jax.tree.map(
            _shape_on,
            trace.state,
            self.state_sharding,
        )
        batch: Any = (trace.inputs, trace.targets)
        data = None
        if self.plan.data == "resident":
            data = jax.tree.map(self._resident_shape, batch)
            batch = jax.ShapeDtypeStruct((self.recipe.batch_size,), jnp.int32)
        block = jax.tree.map(self._block_shape, batch)
        bounds = (0, 1) if self._has_blocks else ()
        return self._train.lower(state, block, *bounds, data)

    def _resident_shape(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """Shape of a whole data set, of which `leaf` is a batch."""
        shape = (self.trace.samples, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self.replicated)

    def _block_shape(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """Shape of a block, of which `leaf` is a batch."""
        steps = (self.plan.steps_per_call,) if self._has_blocks else ()
        shape = (*steps, *leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self.block_sharding)

    def fingerprint(self) -> str:
        """Return the train step as it goes to the compiler, as text.

        It must be the same on all hosts. It costs one tracing, which the first step
        need not do again.
        """
        return self._log.lower("train", self.lower).as_text()

    def resident(self, train: Any) -> Any:
        """Return copies on each device of an `Arrays`' inputs and targets.

        They stay as long as the `Arrays` lives, those of one data set at a time.
        """
        if train not in self._resident:
            samples = (train.inputs, train.targets)
            copies = jax.tree.map(lambda x: placed(x, self.replicated), samples)
            self._resident = weakref.WeakKeyDictionary({train: copies})
        return self._resident[train]

    # ---- evaluating and predicting ----

    @cached_property
    def evaluation(self) -> Evaluation:
        """Loss and metrics of a test set, put together from its batches."""
        return Evaluation(self.trace)

    def rehearse(self, samples: int | None) -> None:
        """Trace what a run computes in addition to its steps.

        So what fails there fails before the first step.

        Args:
          samples: of the test set; None: there is none.

        Raises:
          ModelError: the model, the loss, a metric or `Recipe.decode` fails outside of
            training.
          DataError: see `Evaluation.check`.
        """
        if samples is not None:
            state = self.trace.state
            with pointing_at_user("evaluating"):
                run = partial(evaluated, self.trace)
                jax.eval_shape(
                    run,
                    state.params,
                    state.variables,
                    self.trace.inputs,
                )
            self.evaluation.check(samples)
            _ = self.evaluation.sums, self.evaluation.meeting
        if self.recipe.decode is not None:
            self.prediction()

    @cached_property
    def limits(self) -> list[Limit]:
        """Whole numbers that the data may hold."""
        return limits(self.trace)

    def prediction(self, decode: Callable | None = None) -> Prediction:
        """Predictions of many inputs, put together from batches."""
        decode = self._decoder(decode)
        if decode not in self._predictions:
            self._predictions[decode] = Prediction(self.trace, decode)
        return self._predictions[decode]

    def sharding_of(self, rows: int) -> NamedSharding:
        """Return where a batch of a number of rows lies, outside of training."""
        sizes = [self.mesh.shape[axis] for axis in self.plan.batch_axes]
        parts = math.prod(sizes)
        return self.replicated if rows % parts else self.batch_sharding

    def evaluate(
        self,
        sums: Any,
        state: State,
        batch: Any,
        valid: int,
    ) -> Any:
        """Add the first `valid` samples of a batch to the sums, which are donated.

        `sums=None` starts them.
        """
        return self.evaluate_and_keep(sums, state, batch, valid)[0]

    def evaluate_and_keep(
        self,
        sums: Any,
        state: State,
        batch: Any,
        valid: int,
    ) -> tuple[Any, Any]:
        """Add the first `valid` samples of a batch to the sums, which are donated.

        Args:
          sums: the result of the call before; None starts them.
          state: with the parameters.
          batch: (inputs, targets).
          valid: how many of its rows are real.

        Returns:
          The sums; and the batch's (outputs, targets) where a metric is one of the
          whole test set, else None.
        """
        if sums is None:
            sums = jax.tree.map(
                lambda x: placed(x, self.replicated), self.evaluation.sums
            )
        weights = select_weights(state, self.recipe)
        return self._log.call(
            "evaluate",
            self._evaluate,
            sums,
            *weights,
            batch,
            valid,
        )

    def metrics(
        self,
        sums: Any,
        parts: Sequence[tuple[Any, Any]] = (),
    ) -> dict[str, float]:
        """Return loss and metrics of a test set; this waits for the device.

        Args:
          sums: over all batches.
          parts: (outputs, targets) of each batch, without filling; needed where a
            metric is one of the whole test set.

        Raises:
          DataError: no sample has weight.
        """
        values = {}
        on_host = jax.tree.map(np.asarray, sums)
        for name, (total, weight) in on_host.items():
            if weight == 0:
                raise DataError(
                    f"nothing in the test data has weight: the weights that {name!r}"
                    " gives its samples are all 0",
                    where="evaluation",
                    remedy="evaluate on samples that count",
                )
            values[name] = float(self._finished(name, total, weight))
        if self.evaluation.whole:
            values |= self.evaluation.of_whole(parts)
        return {name: values[name] for name in ("loss", *self.recipe.metrics)}

    def predict(
        self,
        state: State,
        inputs: Any,
        decode: Callable | None = None,
    ) -> Any:
        """Return the decoded outputs of a batch of inputs."""
        return self.predict_and_look(state, inputs, decode)[0]

    def predict_and_look(
        self,
        state: State,
        inputs: Any,
        decode: Callable | None = None,
    ) -> tuple[Any, Any]:
        """Return the decoded outputs of a batch, and which rows hide a NaN.

        Returns:
          (decoded outputs, bool (rows,)); the latter is None where a NaN would show.
        """
        decode = self._decoder(decode)
        if decode not in self._predictors:
            self._predictors[decode] = self._predictor(decode)
        weights = select_weights(state, self.recipe)
        return self._log.call(
            "predict",
            self._predictors[decode],
            *weights,
            inputs,
        )

    def generate(self, state: State, seed: int, count: int) -> Any:
        """Return what the model's method `samples(key, count)` gives, replicated.

        Args:
          state: with the parameters.
          seed: of the random key.
          count: of samples.

        Raises:
          ModelError: the model has no such method, or it fails.
        """
        method = self.trace.functional.samples
        if method is None:
            raise ModelError(
                "the model generates nothing",
                where="Recipe.model",
                remedy="give the NNX module a method samples(key, count)",
            )

        def generate(params: Any, variables: Any, seed: Any) -> Any:
            self._log.trace("generate", seed)
            key = jax.random.key(seed)
            with pointing_at_user("generating samples"):
                return method(params, variables, key, count)

        run = self._jit(generate, out_shardings=self.replicated)
        weights = select_weights(state, self.recipe)
        return self._log.call("generate", run, *weights, np.uint32(seed))

    def _predictor(self, decode: Callable) -> Callable:
        prediction = self.prediction(decode)

        def predict(
            params: Any,
            variables: Any,
            inputs: Any,
        ) -> Any:
            self._log.trace("predict", inputs)
            with pointing_at_user("predicting"):
                outputs = self._forward(params, variables, inputs)
                decoded = whole_axes(decode)(outputs)
            if not prediction.hides:
                return decoded, None
            return decoded, _hidden(prediction, outputs, decoded, inputs)

        # The rows on another host's devices can't be read here.
        options: dict[str, Any] = {}
        if agreement.hosts() > 1:
            options = {"out_shardings": self.replicated}
        return self._jit(predict, **options)

    def _decoder(self, decode: Callable | None) -> Callable:
        return decode or self.recipe.decode or losses.decoder(self.recipe.loss)

    def _forward(
        self,
        params: Any,
        variables: Any,
        inputs: Any,
    ) -> Any:
        forward: Callable[..., Any] = partial(evaluated, self.trace)
        if self.trace.tables:
            forward = cast_late(forward, self.trace.tables)
        forward = self.plan.forms.of_model(forward)
        names = ("params", "variables", "inputs")
        forward = laid_out(
            rewrite.in_stages(forward, self.plan.pipeline, (names.index("inputs"),)),
            self.plan.layout,
            self.mesh,
            names,
        )
        return forward(params, variables, inputs)

    def _measured(
        self,
        params: Any,
        variables: Any,
        inputs: Any,
        targets: Any,
        rows: Any,
    ) -> dict[str, tuple[Any, Any]]:
        """Return the weighted sums of a batch whose logits are never there at once."""

        def measure(
            params: Any,
            variables: Any,
            inputs: Any,
            targets: Any,
            rows: Any,
        ) -> tuple[Any, dict[str, tuple[Any, Any]]]:
            outputs = evaluated(self.trace, params, variables, inputs)
            totals = losses.measure(self.recipe, outputs, targets, rows)
            return totals["loss"][0], totals

        names = ("params", "variables", "inputs", "targets", "rows")
        samples = tuple(names.index(name) for name in names[2:])
        in_pieces = self.plan.forms.of(measure)
        measure_in_pieces = laid_out(
            rewrite.in_stages(in_pieces, self.plan.pipeline, samples),
            self.plan.layout,
            self.mesh,
            names,
        )
        return measure_in_pieces(params, variables, inputs, targets, rows)[1]

    def _evaluate_batch(
        self,
        sums: Any,
        params: Any,
        variables: Any,
        batch: Any,
        valid: Any,
    ) -> Any:
        self._log.trace("evaluate", batch)
        inputs, targets = batch
        whole = self.evaluation.whole
        count = jax.tree.leaves(targets)[0].shape[0]
        rows = jnp.arange(count) < valid
        outputs = None
        with pointing_at_user("evaluating"):
            if self.plan.loss_pieces > 1 and not whole and not self.trace.tables:
                totals = self._measured(params, variables, inputs, targets, rows)
            else:
                outputs = self._forward(params, variables, inputs)
                totals = losses.measure(
                    self.recipe,
                    outputs,
                    targets,
                    rows,
                    without=whole,
                )

        def add(total: Any, more: Any) -> Any:
            return total + jnp.asarray(more, jnp.float32)

        sums = jax.tree.map(add, sums, totals)
        return sums, (outputs, targets) if whole else None

    # ---- the train step ----

    def _one_step(
        self,
        state: State,
        batch: Any,
        data: Any,
    ) -> tuple[State, jax.Array]:
        self._log.trace("train", batch)
        state, record = self._step(state, _gathered(batch, data))
        return state, record[None]

    def _steps(
        self,
        state: State,
        block: Any,
        start: Any,
        stop: Any,
        data: Any,
    ) -> tuple[State, jax.Array]:
        """Make the steps of a block.

        It is a loop whose bounds are arguments, so a block may be cut anywhere without
        another compilation.
        """
        self._log.trace("train", block)

        def body(carry: tuple) -> tuple:
            index, state, records = carry

            def take(leaf: Any) -> Any:
                return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)

            batch = jax.tree.map(take, block)
            state, record = self._step(state, _gathered(batch, data))
            records = jax.lax.dynamic_update_index_in_dim(records, record, index, 0)
            return index + 1, state, records

        shape = (self.plan.steps_per_call, len(self.records))
        records = jnp.zeros(shape, jnp.float32)
        _, state, records = jax.lax.while_loop(
            lambda carry: carry[0] < stop,
            body,
            (start, state, records),
        )
        return state, records

    def _step(
        self,
        state: State,
        batch: Any,
    ) -> tuple[State, jax.Array]:
        """Make one optimizer update from one batch.

        Of embeddings that are updated by rows, it sees the touched rows alone.
        """
        if not self.trace.tables:
            return self._updated(state, batch)
        rows = self._touching.rows(state, batch)
        after, record = self._updated(rows.taken(state), batch, rows)
        return rows.put(state, after), record

    def _updated(
        self,
        state: State,
        batch: Any,
        rows: Rows | None = None,
    ) -> tuple[State, jax.Array]:
        """Return state and record after an update; `rows` if the tables are compact."""
        gradients, sums, variables, squares = self._gradients(state, batch, rows)
        values = {
            name: self._finished(name, total, weight)
            for name, (total, weight) in sums.items()
        }
        if INPUTS in self.controller.signals.watched:
            values[INPUTS] = input_rms(batch[0])
        before = Pieces(state.params, state.variables, state.optimizer)

        is_short = self._is_one_cpu and self.controller.stride > 1

        def update() -> tuple[Pieces, Any, dict[str, Any]]:
            with divided_over(self.mesh), on_one_cpu(is_short):
                return self.controller.update(
                    state.step,
                    state.controller,
                    before,
                    variables,
                    gradients,
                    values,
                    squares,
                )

        def leave() -> tuple[Pieces, Any, dict[str, Any]]:
            record = jax.eval_shape(update)[2]
            return before, state.controller, self._still(state, record)

        if self.trace.weighted:
            # A batch of which nothing counts is no step: its mean is 0 / 0.
            weight = jnp.asarray(sums["loss"][1], jnp.float32)
            values[WEIGHT] = weight
            after, controller, record = jax.lax.cond(
                weight > 0,
                update,
                leave,
            )
        else:
            after, controller, record = update()

        values |= record
        counts = ~state.controller.halted if self.controller.halts else 1
        state = State(
            state.step + counts,
            after.params,
            after.variables,
            after.optimizer,
            controller,
            state.key,
        )
        row = [values[name] for name in self.records]
        row = [jnp.asarray(value, jnp.float32) for value in row]
        return state, jnp.stack(row)

    def _finished(
        self,
        name: str,
        total: Any,
        weight: Any,
    ) -> Any:
        """Return loss or metric from the sum and the weight of its samples."""
        mean = losses.mean(total, weight)
        return losses.finish(self.recipe, name, mean)

    def _still(
        self,
        state: State,
        record: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the record of a step that is none.

        Knobs are as they were; signals are unknown.
        """
        knobs = getattr(state.controller, "knobs", {})
        return {
            name: jnp.asarray(knobs.get(name, jnp.nan), shape.dtype)
            for name, shape in record.items()
        }

    # ---- the gradients of a batch ----

    def _gradients(
        self,
        state: State,
        batch: Any,
        rows: Rows | None = None,
    ) -> _Gradients:
        """Return the gradients of the mean loss over a batch, and what goes with them.

        With several micro-batches the gradients of their summed losses are added up,
        and divided by the summed weights.
        """
        knobs = self.controller.forward_knobs(state.controller)
        scale = knobs.get("loss_scale")
        key = jax.random.fold_in(state.key, state.step)
        count = self.plan.micro_batches
        gradient = self._gradient_of_loss(rows)
        keys = partial(step_key, self.recipe.preprocess, step=key)
        if count == 1:
            gradients, (sums, variables) = gradient(
                state.params, state.variables, keys(key, part=0), *batch, knobs
            )
            gradients = _ascent(_unscaled(gradients, scale))
            return _Gradients(gradients, sums, variables, None)

        def add(
            total: _Gradients,
            index: Any,
            micro_batch: Any,
        ) -> _Gradients:
            more, (more_sums, variables) = gradient(
                state.params,
                total.variables,
                keys(jax.random.fold_in(key, index), part=index),
                *micro_batch,
                knobs,
            )
            squares = total.squares
            if squares is not None:
                weight = differentiated_sum(more_sums)[1]
                squares = squares + (norm(_unscaled(more, scale)) / weight) ** 2
            gradients, sums = jax.tree.map(
                jnp.add,
                (total.gradients, total.sums),
                (more, more_sums),
            )
            return _Gradients(gradients, sums, variables, squares)

        total = self._add_up(add, self._zeros(state), batch)
        weight = differentiated_sum(total.sums)[1]
        gradients = jax.tree.map(
            lambda g: g / weight, _unscaled(total.gradients, scale)
        )
        squares = None if total.squares is None else total.squares / count
        return total._replace(gradients=_ascent(gradients), squares=squares)

    def _gradient_of_loss(self, rows: Rows | None) -> Callable[..., Any]:
        """Return the gradient of one micro-batch's loss, laid out as planned."""
        remade = partial(rematerialized, policy=self.plan.remat)
        around = self.plan.forms.around(remade)
        names: tuple[str, ...] = ARGUMENTS
        if rows is not None:
            around = partial(compacted, tables=self.trace.tables, around=around)
            names = (*names, "rows")
        traced = training_gradient(
            self.recipe,
            self.trace.functional,
            self.plan.micro_batches,
            around,
        )
        traced = self.plan.forms.after(traced)
        if self._is_rewritten:
            traced = rewrite.rewritten(traced)
        gradient = laid_out(
            traced,
            self.plan.layout,
            self.mesh,
            names,
            gradients=True,
        )
        if rows is None:
            return gradient
        return lambda *args: gradient(*args, rows.rows)

    def _add_up(
        self,
        add: Callable[[_Gradients, Any, Any], _Gradients],
        total: _Gradients,
        batch: Any,
    ) -> _Gradients:
        """Add the micro-batches of a batch to a total, one after the other."""
        count = self.plan.micro_batches
        parts = micro_batches(batch, count)
        if self.plan.unroll_micro_batches:
            for index in range(count):
                part = jax.tree.map(itemgetter(index), parts)
                total = add(total, index, part)
            return total

        def body(
            total: _Gradients,
            item: Any,
        ) -> tuple[_Gradients, None]:
            index, part = item
            return add(total, index, part), None

        items = (jnp.arange(count), parts)
        total, _ = jax.lax.scan(body, total, items)
        return total

    def _zeros(self, state: State) -> _Gradients:
        """Return the total of no micro-batch."""
        shapes = jax.eval_shape(
            partial(losses.measure, self.recipe),
            self.trace.outputs,
            self.trace.targets,
        )

        def zeros(leaf: Any) -> Any:
            return jnp.zeros(leaf.shape, jnp.float32)

        zero = (jnp.float32(0), jnp.float32(0))
        sums = jax.tree.map(zeros, shapes)
        sums |= dict.fromkeys(self.controller.measured_forward, zero)
        return _Gradients(
            jax.tree.map(jnp.zeros_like, state.params),
            sums,
            state.variables,
            jnp.float32(0) if self.controller.signals.by_micro_batch else None,
        )


def _gathered(batch: Any, data: Any) -> Any:
    """Return the rows of resident data that a batch of indices names.

    Without such data it is the batch itself.
    """
    if data is None:
        return batch

    def rows(leaf: Any) -> Any:
        return leaf.at[batch].get(mode="promise_in_bounds")

    return jax.tree.map(rows, data)


def _filled(
    shapes: Any,
    leaves: Mapping[str, Any],
) -> Any:
    """Return a pytree of leaves by path."""
    ordered = [leaves[path] for path in by_path(shapes)]
    return with_leaves(shapes, ordered)


def _shape_on(
    leaf: Any,
    sharding: Any,
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _hidden(
    prediction: Prediction,
    outputs: Any,
    decoded: Any,
    inputs: Any,
) -> Any:
    """Samples whose outputs hold a NaN that none of their decoded outputs shows."""
    count = jax.tree.leaves(inputs)[0].shape[0]
    leaves = jax.tree.leaves(outputs)
    described = zip(
        leaves,
        prediction.outputs,
        prediction.used,
        strict=True,
    )
    used = [(leaf, dims) for leaf, dims, is_used in described if is_used]
    is_nan = nan_rows(
        [leaf for leaf, _ in used],
        [dims for _, dims in used],
        count,
    )
    shows = nan_rows(
        jax.tree.leaves(decoded),
        prediction.dims,
        count,
    )
    return is_nan & ~shows


def _unscaled(gradients: Any, scale: Any) -> Any:
    if scale is None:
        return gradients
    return jax.tree.map(lambda g: g / scale, gradients)


def _ascent(gradients: Any) -> Any:
    """Return the direction of steepest ascent in each parameter.

    JAX's gradient with respect to a complex parameter is the conjugate of that.
    """

    def conjugated(gradient: Any) -> Any:
        return gradient.conj() if jnp.iscomplexobj(gradient) else gradient

    return jax.tree.map(conjugated, gradients)
