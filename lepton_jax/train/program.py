"""The plan compiled: one XLA executable for training, one for evaluation, one for
prediction.

A train step is one program: forward, backward, gradient reduction, clipping, policies,
optimizer and metrics, with donated state. Nothing here waits for a device, virtual ones
of a CPU apart.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lepton_jax import losses
from lepton_jax.checkpoint.adoption import (
    is_number,
    named_recipe_values,
    recipe_values,
    schedule_values,
)
from lepton_jax.compat import cache_hits, jit_on, placed, whole_axes
from lepton_jax.controller import Controller, Pieces, norm, select_weights
from lepton_jax.data import Limit
from lepton_jax.errors import DataError, pointing_at_user
from lepton_jax.hosts import agreement, phase
from lepton_jax.planner import (
    ARGUMENTS,
    Evaluation,
    Plan,
    Prediction,
    Trace,
    evaluated,
    laid_out,
    limits,
    nan_rows,
    objective,
    rematerialized,
)
from lepton_jax.step.state import State
from lepton_jax.train.recovery import WEIGHT
from lepton_jax.trees import by_path


@dataclass(frozen=True)
class Compilation:
    """One compilation of one of the programs; `count` is 1 for its first, `changed`
    says what a later one is due to, and `cached` by host whether the executable came
    from JAX's compilation cache.
    """

    program: str
    count: int
    seconds: float
    changed: str | None
    cached: list[bool]


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
      state_sharding, block_sharding, batch_sharding, replicated: where the state, a
        block of batches, a batch of evaluation or prediction, and scalars lie.
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
        self.mesh = plan.make_mesh(devices)
        self.state_sharding = plan.state_shardings(self.mesh, trace.state)
        rows = plan.batch_axes or None
        self.batch_sharding = NamedSharding(self.mesh, PartitionSpec(rows))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        many = plan.steps_per_call > 1
        self.block_sharding = (
            NamedSharding(self.mesh, PartitionSpec(None, rows))
            if many
            else self.batch_sharding
        )
        self.controller = Controller(self.recipe)
        weight = [WEIGHT] if trace.weighted else []
        self.records = [
            "loss",
            *self.recipe.metrics,
            *weight,
            *self.controller.records,
        ]
        self.compilations: list[Compilation] = []
        self._on_compile = on_compile
        self._traced = 0
        self._lowered = ""
        self._signatures: dict[str, list[dict[str, str]]] = {}
        # programs that wait for each other's collectives can use up the threads that
        # XLA's virtual CPU devices share
        self._one_at_a_time = (
            self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu"
        )
        out = (self.state_sharding, self.replicated)
        jit = self._jit = partial(jit_on, self.mesh.devices.flat)
        self._train = jit(
            self._steps if many else self._one_step,
            donate_argnums=0,
            out_shardings=out,
        )
        self._evaluate = jit(
            self._evaluate_batch, donate_argnums=0, out_shardings=self.replicated
        )
        self._resident: weakref.WeakKeyDictionary[Any, Any] = (
            weakref.WeakKeyDictionary()
        )
        self._predictors: dict[Callable, Callable] = {}
        self._values: dict[str, float] | None = None
        self._given: dict[str, Any] | None = None
        self._predictions: dict[Callable, Prediction] = {}

    def init(self, seed: int) -> State:
        """The state before the first step, laid out as planned."""

        def init(seed: Any) -> State:
            self._note("init", seed)
            key = jax.random.key(seed)
            params, variables = self.trace.functional.init(key)
            return State(
                jnp.int32(0),
                params,
                variables,
                *self.controller.init(params, variables),
                key,
            )

        state = self._call(
            "init",
            self._jit(init, out_shardings=self.state_sharding),
            np.uint32(seed),
        )
        self._values = recipe_values(state)
        return state

    def recipe_values(self) -> dict[str, float]:
        """Numbers that the recipe puts into its first state, by path.

        See `adoption.recipe_values`.
        """
        if self._values is None:

            def scalars() -> Any:
                params, variables = self.trace.functional.init(jax.random.key(0))
                optimizer, controller = self.controller.init(params, variables)
                parts = {"optimizer": optimizer, "controller": controller}
                return {k: x for k, x in by_path(parts).items() if is_number(x)}

            # scalars alone: XLA drops the arrays around them
            self._values = named_recipe_values(jax.jit(scalars)())
        return self._values

    def given(self) -> dict[str, Any]:
        """The recipe's part in the state, in plain data, for a checkpoint's record.

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
          params, variables: from which the training begins.
          paths: of the wanted leaves in the state, e.g. "optimizer/0/mu/a/kernel".

        Returns:
          The leaves by path, laid out as planned.
        """
        wanted = set(paths)
        shardings = by_path(self.state_sharding)

        def begin(params: Any, variables: Any) -> dict[str, Any]:
            optimizer, controller = self.controller.init(params, variables)
            parts = {"optimizer": optimizer, "controller": controller}
            # copies, as nothing may be an argument's buffer
            return {k: jnp.copy(x) for k, x in by_path(parts).items() if k in wanted}

        out = {path: shardings[path] for path in sorted(wanted)}
        return self._jit(begin, out_shardings=out)(params, variables)

    def train(
        self,
        state: State,
        block: Any,
        start: int,
        stop: int,
        data: Any = None,
    ) -> tuple[State, jax.Array]:
        """Train on batches start to stop of a block; the state is donated. With
        resident `data`, a block holds indices.

        Returns:
          The state after them, and their records: float32 (steps a block, records), of
            which rows start to stop are
          filled. A step's values are measured with the parameters before its update.
        """
        if self.plan.steps_per_call == 1:
            return self._call(
                "train",
                self._train,
                state,
                block,
                data,
            )
        return self._call(
            "train",
            self._train,
            state,
            block,
            start,
            stop,
            data,
        )

    def lower(self) -> Any:
        """The train step lowered for the mesh's devices, which need not be there:
        `.compile()` compiles it ahead of time.
        """
        trace = self.trace
        plan = self.plan
        placed = lambda x, s: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=s,
        )
        state = jax.tree.map(
            placed,
            trace.state,
            self.state_sharding,
        )
        many = () if plan.steps_per_call == 1 else (plan.steps_per_call,)
        batch = (trace.inputs, trace.targets)
        data = None
        if plan.data == "resident":
            rows = lambda x: jax.ShapeDtypeStruct(
                (trace.samples, *x.shape[1:]),
                x.dtype,
                sharding=self.replicated,
            )
            data = jax.tree.map(rows, batch)
            batch = jax.ShapeDtypeStruct((self.recipe.batch_size,), jnp.int32)  # type: ignore[assignment]
        block = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (*many, *x.shape),
                x.dtype,
                sharding=self.block_sharding,
            ),
            batch,
        )
        bounds = () if plan.steps_per_call == 1 else (0, 1)
        return self._train.lower(
            state,
            block,
            *bounds,
            data,
        )

    def fingerprint(self) -> str:
        """The train step as it goes to the compiler, in words: what must be the same on
        all hosts. It costs one tracing, which the first step need not do again.
        """
        traced = self._traced
        before = phase.where().phase
        text = self.lower().as_text()
        if self._traced != traced:
            self._traced = traced
            self._lowered = "train"
            phase.reached(phase=before)
        return text

    def resident(self, train: Any) -> Any:
        """Copies on each device of an `Arrays`' inputs and targets, kept as long as it
        lives.
        """
        if train not in self._resident:
            # the copies of one data set at a time
            self._resident = weakref.WeakKeyDictionary(
                {
                    train: jax.tree.map(
                        lambda x: placed(x, self.replicated),
                        (train.inputs, train.targets),
                    )
                }
            )
        return self._resident[train]

    @cached_property
    def evaluation(self) -> Evaluation:
        """The loss and metrics of a test set, put together from its batches."""
        return Evaluation(self.trace)

    def rehearse(self, samples: int | None) -> None:
        """Trace what a run computes besides its steps, so that it fails before the
        first.

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
        """Which whole numbers the data may hold."""
        return limits(self.trace)

    def prediction(self, decode: Callable | None = None) -> Prediction:
        """Predictions of many inputs, put together from batches."""
        decode = self._decoder(decode)
        if decode not in self._predictions:
            self._predictions[decode] = Prediction(self.trace, decode)
        return self._predictions[decode]

    def sharding_of(self, rows: int) -> NamedSharding:
        """Where a batch of so many rows lies in evaluation and prediction."""
        parts = math.prod(self.mesh.shape[axis] for axis in self.plan.batch_axes)
        return self.replicated if rows % parts else self.batch_sharding

    def evaluate(
        self,
        sums: Any,
        state: State,
        batch: Any,
        valid: int,
    ) -> Any:
        """Add the first `valid` samples of a batch to the sums, which are donated; None
        starts them.
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
          sums: what the call before returned; None starts them.
          state: which parameters.
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
        return self._call(
            "evaluate",
            self._evaluate,
            sums,
            *select_weights(state, self.recipe),
            batch,
            valid,
        )

    def metrics(
        self,
        sums: Any,
        parts: Sequence[tuple[Any, Any]] = (),
    ) -> dict[str, float]:
        """Loss and metrics of a test set; this waits for the device.

        Args:
          sums: over all batches.
          parts: (outputs, targets) of each batch, without filling; needed where a
            metric is one of the whole test set.

        Raises:
          DataError: no sample has weight.
        """
        found = {}
        for name, (total, weight) in jax.tree.map(np.asarray, sums).items():
            if weight == 0:
                raise DataError(
                    f"nothing in the test data has weight: the weights that {name!r}"
                    " gives its samples are all 0",
                    where="evaluation",
                    remedy="evaluate on samples that count",
                )
            value = losses.finish(
                self.recipe,
                name,
                losses.mean(total, weight),
            )
            found[name] = float(value)
        if self.evaluation.whole:
            found |= self.evaluation.of_whole(parts)
        return {name: found[name] for name in ("loss", *self.recipe.metrics)}

    def predict(
        self,
        state: State,
        inputs: Any,
        decode: Callable | None = None,
    ) -> Any:
        """Decoded outputs of a batch of inputs."""
        return self.predict_and_look(state, inputs, decode)[0]

    def predict_and_look(
        self,
        state: State,
        inputs: Any,
        decode: Callable | None = None,
    ) -> tuple[Any, Any]:
        """Decoded outputs of a batch, and which rows hide a NaN by being decoded.

        Returns:
          (decoded outputs, bool (rows,)); the latter is None where a NaN would show.
        """
        decode = self._decoder(decode)
        if decode not in self._predictors:
            prediction = self.prediction(decode)

            def predict(
                params: Any,
                variables: Any,
                inputs: Any,
            ) -> Any:
                self._note("predict", inputs)
                with pointing_at_user("predicting"):
                    outputs = self._forward(params, variables, inputs)
                    decoded = whole_axes(decode)(outputs)
                if not prediction.hides:
                    return decoded, None
                return decoded, _hidden(prediction, outputs, decoded, inputs)

            # the rows of another host's devices can't be read here
            options = (
                {"out_shardings": self.replicated} if agreement.hosts() > 1 else {}
            )
            self._predictors[decode] = self._jit(predict, **options)
        return self._call(
            "predict",
            self._predictors[decode],
            *select_weights(state, self.recipe),
            inputs,
        )

    def _decoder(self, decode: Callable | None) -> Callable:
        return decode or self.recipe.decode or losses.decoder(self.recipe.loss)

    def _forward(
        self,
        params: Any,
        variables: Any,
        inputs: Any,
    ) -> Any:
        run = lambda p, v, x: evaluated(self.trace, p, v, x)
        return laid_out(
            run,
            self.plan.layout,
            self.mesh,
            ("params", "variables", "inputs"),
        )(params, variables, inputs)

    # ---- the train step ----

    def _one_step(
        self,
        state: State,
        batch: Any,
        data: Any,
    ) -> tuple[State, jax.Array]:
        self._note("train", batch)
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
        """A loop whose bounds are arguments: a block may be cut anywhere without
        another compilation.
        """
        self._note("train", block)

        def body(carry: tuple) -> tuple:
            index, state, records = carry
            batch = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(
                    x,
                    index,
                    0,
                    keepdims=False,
                ),
                block,
            )
            state, record = self._step(state, _gathered(batch, data))
            return (
                index + 1,
                state,
                jax.lax.dynamic_update_index_in_dim(records, record, index, 0),
            )

        records = jnp.zeros((self.plan.steps_per_call, len(self.records)), jnp.float32)
        return jax.lax.while_loop(
            lambda carry: carry[0] < stop,
            body,
            (start, state, records),
        )[1:]

    def _step(
        self,
        state: State,
        batch: Any,
    ) -> tuple[State, jax.Array]:
        """One optimizer update from one batch."""
        gradients, sums, variables, parts = self._gradients(state, batch)
        values = {
            name: losses.finish(
                self.recipe,
                name,
                losses.mean(total, weight),
            )
            for name, (total, weight) in sums.items()
        }
        before = Pieces(
            state.params,
            state.variables,
            state.optimizer,
        )

        def update() -> tuple[Pieces, Any, dict[str, Any]]:
            return self.controller.update(
                state.step,
                state.controller,
                before,
                variables,
                gradients,
                values,
                parts,
            )

        if self.trace.weighted:
            # a batch of which nothing counts is no step: its mean is 0 / 0
            weight = values[WEIGHT] = jnp.asarray(sums["loss"][1], jnp.float32)

            def leave() -> tuple[Pieces, Any, dict[str, Any]]:
                record = jax.eval_shape(update)[2]
                return before, state.controller, self._still(state, record)

            after, controller, record = jax.lax.cond(
                weight > 0,
                update,
                leave,
            )
        else:
            after, controller, record = update()
        values |= record
        on = ~state.controller.halted if self.controller.halts else 1
        state = State(
            state.step + on,
            after.params,
            after.variables,
            after.optimizer,
            controller,
            state.key,
        )
        return state, jnp.stack(
            [jnp.asarray(values[name], jnp.float32) for name in self.records]
        )

    def _still(
        self,
        state: State,
        record: dict[str, Any],
    ) -> dict[str, Any]:
        """The record of a step that is none: knobs as they were, signals unknown."""
        knobs = getattr(state.controller, "knobs", {})
        still = {}
        for name, shape in record.items():
            value = knobs.get(name, jnp.nan if name not in knobs else 0)
            still[name] = jnp.asarray(value, shape.dtype)
        return still

    def _gradients(
        self, state: State, batch: Any
    ) -> tuple[Any, dict[str, tuple[Any, Any]], Any, Any]:
        """Gradients of the mean loss (of what is kept of it, where samples are
        discounted), sums of loss and metrics, the variables after the batch, and the
        mean squared norm of the micro-batches' gradients, where a signal needs it.
        """
        knobs = self.controller.forward_knobs(state.controller)
        scale = knobs.get("loss_scale")
        key = jax.random.fold_in(state.key, state.step)
        count = self.plan.micro_batches

        value = rematerialized(
            objective(self.recipe, self.trace.functional, count), self.plan.remat
        )
        gradient = laid_out(
            jax.grad(value, has_aux=True),
            self.plan.layout,
            self.mesh,
            ARGUMENTS,
            gradients=True,
        )
        if count == 1:
            gradients, (sums, variables) = gradient(
                state.params, state.variables, key, *batch, knobs
            )
            return _descending(_unscaled(gradients, scale)), sums, variables, None

        def add(
            carry: tuple,
            index: Any,
            micro_batch: Any,
        ) -> tuple:
            gradients, sums, variables, squares = carry
            more, (more_sums, variables) = gradient(
                state.params,
                variables,
                jax.random.fold_in(key, index),
                *micro_batch,
                knobs,
            )
            if squares is not None:
                squares = (
                    squares
                    + (norm(_unscaled(more, scale)) / losses.objective(more_sums)[1])
                    ** 2
                )
            return (
                *jax.tree.map(jnp.add, (gradients, sums), (more, more_sums)),
                variables,
                squares,
            )

        # strided, so that each device's rows are spread over the micro-batches without
        # leaving the device
        parts = jax.tree.map(
            lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = self._zero_sums()
        squares = jnp.float32(0) if self.controller.signals.by_micro_batch else None
        carry = (
            jax.tree.map(jnp.zeros_like, state.params),
            zeros,
            state.variables,
            squares,
        )
        if self.plan.unroll_micro_batches:
            for index in range(count):
                carry = add(
                    carry,
                    index,
                    jax.tree.map(lambda x: x[index], parts),  # noqa: B023
                )
        else:
            carry, _ = jax.lax.scan(
                lambda c, x: (add(c, *x), None),
                carry,
                (jnp.arange(count), parts),
            )
        gradients, sums, variables, squares = carry
        weight = losses.objective(sums)[1]
        gradients = jax.tree.map(lambda g: g / weight, _unscaled(gradients, scale))
        return (
            _descending(gradients),
            sums,
            variables,
            None if squares is None else squares / count,
        )

    def _zero_sums(self) -> dict[str, tuple[Any, Any]]:
        """The (sum, weight) pairs of no micro-batch."""
        measure = partial(losses.measure, self.recipe)
        shapes = jax.eval_shape(
            measure,
            self.trace.outputs,
            self.trace.targets,
        )
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        zero = (jnp.float32(0), jnp.float32(0))
        return sums | dict.fromkeys(self.controller.measured_forward, zero)

    # ---- evaluation ----

    def _evaluate_batch(
        self,
        sums: Any,
        params: Any,
        variables: Any,
        batch: Any,
        valid: Any,
    ) -> Any:
        self._note("evaluate", batch)
        inputs, targets = batch
        with pointing_at_user("evaluating"):
            outputs = self._forward(params, variables, inputs)
            rows = jnp.arange(jax.tree.leaves(targets)[0].shape[0]) < valid
            whole = self.evaluation.whole
            totals = losses.measure(
                self.recipe,
                outputs,
                targets,
                rows,
                without=whole,
            )
        sums = jax.tree.map(
            lambda s, x: s + jnp.asarray(x, jnp.float32),
            sums,
            totals,
        )
        return sums, (outputs, targets) if whole else None

    # ---- compilations ----

    def _note(
        self,
        program: str,
        batch: Any,
    ) -> None:
        """Called while tracing, and only then: a trace is a compilation."""
        shapes = {
            path or "value": f"{x.dtype}{list(x.shape)}"
            for path, x in by_path(batch).items()
        }
        self._signatures.setdefault(program, []).append(shapes)
        self._traced += 1
        phase.reached(phase="compile")

    def _call(
        self,
        program: str,
        function: Callable,
        *args: Any,
    ) -> Any:
        traced = self._traced
        begun = time.perf_counter()
        before = phase.where().phase
        hits = cache_hits()
        if program == self._lowered:
            self._lowered = ""
            traced = -1
            phase.reached(phase="compile")
        with pointing_at_user(
            f"the {program} program",
            "mend the line that is named, if one is; where memory is short, "
            "lower batch_size or raise micro_batches",
            where=f"program {program!r}",
        ):
            result = function(*args)
            if self._traced != traced:
                phase.reached(phase=before)
            if self._one_at_a_time:
                jax.block_until_ready(result)
        if self._traced != traced:
            signatures = self._signatures[program]
            changed = None
            if len(signatures) > 1:
                old, new = signatures[-2:]
                changed = ", ".join(
                    f"{path or 'inputs'}: {old.get(path, 'absent')} to"
                    f" {new.get(path, 'absent')}"
                    for path in old | new
                    if old.get(path) != new.get(path)
                )
                changed = changed or "another function or layout with the same shapes"
            cached = agreement.every(lambda: cache_hits() > hits)
            compilation = Compilation(
                program,
                len(signatures),
                time.perf_counter() - begun,
                changed,
                cached,
            )
            self.compilations.append(compilation)
            self._on_compile(compilation)
        return result


def _gathered(batch: Any, data: Any) -> Any:
    """The rows of resident data that a batch of indices names; without such data the
    batch itself.
    """
    if data is None:
        return batch
    return jax.tree.map(lambda x: x.at[batch].get(mode="promise_in_bounds"), data)


def _hidden(
    prediction: Prediction,
    outputs: Any,
    decoded: Any,
    inputs: Any,
) -> Any:
    """Samples whose outputs hold a NaN that none of their decoded outputs shows."""
    rows = jax.tree.leaves(inputs)[0].shape[0]
    triples = zip(
        jax.tree.leaves(outputs),
        prediction.outputs,
        prediction.used,
        strict=True,
    )
    used = [(leaf, dims) for leaf, dims, needed in triples if needed]
    made = nan_rows(
        [leaf for leaf, _ in used],
        [dims for _, dims in used],
        rows,
    )
    return made & ~nan_rows(
        jax.tree.leaves(decoded),
        prediction.dims,
        rows,
    )


def _unscaled(gradients: Any, scale: Any) -> Any:
    return gradients if scale is None else jax.tree.map(lambda g: g / scale, gradients)


def _descending(gradients: Any) -> Any:
    """The direction of steepest ascent in each parameter.

    JAX's gradient with respect to a complex parameter is the conjugate of that.
    """
    return jax.tree.map(lambda g: g.conj() if jnp.iscomplexobj(g) else g, gradients)
