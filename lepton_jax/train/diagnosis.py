"""The search for the origin of a number that is not finite.

A batch is computed once more, one operation at a time.

Example: a row of attention whose mask is false everywhere.

    scores = jnp.where(mask, q @ k.T, -jnp.inf)     a row of -inf: asked for, no fault
    weights = jax.nn.softmax(scores)                -inf - (-inf) is nan: found here

The first operation that makes NaN of numbers without NaN is named, and the first one
before it that made infinity of finite numbers, for that is where an overflow begins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.augment import Augmented, loss_of, step_key
from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, scan_counts, source_line
from lepton_jax.planner.program.graph import CALLS
from lepton_jax.step.module import forward
from lepton_jax.step.state import State
from lepton_jax.step.training_loss import changed, prepared, training_loss
from lepton_jax.train.program import Program
from lepton_jax.trees import by_path, is_inexact, is_real

# Seconds after which the search is given up: a person waits for the message
# (assumption).
MOST_SECONDS = 60.0
# Samples that a message names (assumption).
MOST_SAMPLES = 5


@dataclass
class Origin:
    """An operation, and where it stands.

    Attributes:
      primitive: its name in JAX.
      line: the user's source line, "model.py:12 (Net.__call__)".
      value: "nan" or "inf".
      rows: of the batch, whose part of the result is not finite; None: not known.
    """

    primitive: str
    line: str
    value: str
    rows: np.ndarray | None

    def __str__(self) -> str:
        return f"{self.value} first comes out of {self.primitive!r} at {self.line}"


@dataclass
class Finding:
    """The result of a search in one batch.

    Attributes:
      origins: the first infinity and the first NaN, in the order of the computation.
      loss: of the batch.
      samples: positions in the batch of the samples whose loss, or whose part of an
        origin, is not finite; None: they can't be told apart.
      inputs: paths of inputs or targets that themselves hold what is not finite.
    """

    origins: list[Origin] = field(default_factory=list)
    loss: float = float("nan")
    samples: np.ndarray | None = None
    inputs: list[str] = field(default_factory=list)

    @property
    def is_of_the_batch(self) -> bool:
        """Whether this batch alone, with these parameters, shows the fault."""
        return bool(self.origins or self.inputs) or not np.isfinite(self.loss)


def diagnose(
    program: Program,
    state: State,
    batch: tuple[Any, Any],
) -> Finding:
    """Compute loss and gradient of one batch, one operation at a time.

    Args:
      program: with the recipe and the module.
      state: with parameters that are finite.
      batch: inputs and targets, batch dim first.
    """
    recipe = program.recipe
    functional = program.trace.functional
    knobs = program.controller.forward_knobs(state.controller)
    key = jax.random.fold_in(state.key, state.step)
    bad_inputs = _bad_inputs(batch)
    if bad_inputs:
        samples = _bad_rows(jax.tree.leaves(batch))
        return Finding(samples=samples, inputs=bad_inputs)

    if isinstance(recipe.preprocess, Augmented):
        step = step_key(recipe.preprocess, key, key, 0)
        batch = changed(recipe, step, batch, 1)
        recipe = prepared(recipe)
    gradient = jax.value_and_grad(training_loss(recipe, functional, 1), has_aux=True)
    args = (
        state.params,
        state.variables,
        key,
        *batch,
        knobs,
    )
    traced = jax.make_jaxpr(gradient)(*args)
    search = _Search(rows=_row_count(batch))
    leaves = jax.tree.leaves(args)
    results = search.run(
        traced.jaxpr,
        traced.consts,
        leaves,
        (),
    )

    finding = Finding(origins=search.origins)
    if results is not None:
        finding.loss = float(results[0])
    finding.samples = _samples(
        program,
        state,
        batch,
        key,
        search.origins,
    )
    return finding


def described(
    finding: Finding,
    names: Sequence[str] | None,
) -> str:
    """Describe a finding in a sentence.

    Args:
      finding: about a batch.
      names: of the batch's samples, in their order; None: they have none.
    """
    parts = []
    if finding.inputs:
        parts.append(
            f"{', '.join(finding.inputs)} of the batch are not finite themselves"
        )
    parts += [str(origin) for origin in finding.origins]
    if finding.samples is not None and len(finding.samples):
        shown = finding.samples[:MOST_SAMPLES]
        left = len(finding.samples) - len(shown)
        more = f" and {left} more" if left else ""
        if names is None:
            parts.append(f"rows {', '.join(map(str, shown))}{more}")
        else:
            listed = ", ".join(names[row] for row in shown)
            parts.append(f"samples {listed}{more}")
    return "; ".join(parts)


class _Search:
    """An interpreter of jaxprs that looks at each result.

    Attributes:
      origins: found so far. The search ends with the first NaN.
    """

    def __init__(self, rows: int):
        self.origins: list[Origin] = []
        self._rows = rows
        self._until = time.monotonic() + MOST_SECONDS
        self._over = False

    def run(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        callers: tuple,
    ) -> list[Any] | None:
        """Return the results of a jaxpr; None once the search is over."""
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        last_use = _last_uses(jaxpr)

        def value(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else env[var]

        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [value(v) for v in eqn.invars]
            results = self._equation(eqn, inputs, callers)
            if results is None:
                return None
            env.update(zip(eqn.outvars, results, strict=True))
            # A value that no later equation needs gives its memory back.
            for var in eqn.invars:
                if not isinstance(var, Literal) and last_use.get(var) == index:
                    env.pop(var, None)
        return [value(v) for v in jaxpr.outvars]

    def _equation(
        self,
        eqn: Any,
        inputs: list[Any],
        callers: tuple,
    ) -> list[Any] | None:
        """Return the results of an equation; None once the search is over."""
        inner = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
        if inner is not None:
            is_closed = isinstance(inner, ClosedJaxpr)
            jaxpr = inner.jaxpr if is_closed else inner
            consts = inner.consts if is_closed else ()
            if len(jaxpr.invars) == len(inputs):
                return self.run(
                    jaxpr,
                    consts,
                    inputs,
                    (*callers, eqn),
                )

        params = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*inputs, **params)
        results = list(out) if eqn.primitive.multiple_results else [out]
        fault = self._fault(inputs, results)
        if fault is not None and eqn.primitive.name == "scan":
            self._inside_scan(eqn, inputs, callers)
        if fault is not None and not self._known(fault):
            self._note(eqn, callers, fault, results)
        if fault == "nan" or time.monotonic() > self._until:
            self._over = True
        return None if self._over else results

    def _inside_scan(
        self,
        eqn: Any,
        inputs: list[Any],
        callers: tuple,
    ) -> None:
        """Run the loop's body, iteration by iteration, to find the operation in it."""
        consts, carried = scan_counts(eqn)
        closed = eqn.params["jaxpr"]
        length = eqn.params["length"]
        carry = inputs[consts : consts + carried]
        stacked = inputs[consts + carried :]
        inner_callers = (*callers, eqn)
        order = list(range(length))
        if eqn.params["reverse"]:
            order.reverse()
        for index in order:
            items = [leaf[index] for leaf in stacked]
            args = [*inputs[:consts], *carry, *items]
            results = self.run(
                closed.jaxpr,
                closed.consts,
                args,
                inner_callers,
            )
            if results is None:
                return
            carry = results[:carried]

    def _fault(
        self,
        inputs: list[Any],
        results: list[Any],
    ) -> str | None:
        """Return the first fault of results, "nan" or "inf", that the inputs lack."""
        if any(map(_holds_nan, inputs)):
            return None
        if any(map(_holds_nan, results)):
            return "nan"
        if any(map(_holds_inf, inputs)):
            return None
        return "inf" if any(map(_holds_inf, results)) else None

    def _known(self, fault: str) -> bool:
        return any(origin.value == fault for origin in self.origins)

    def _note(
        self,
        eqn: Any,
        callers: tuple,
        fault: str,
        results: list[Any],
    ) -> None:
        bad = next(value for value in results if not _is_finite(value))
        rows = None
        if jnp.ndim(bad) and bad.shape[0] == self._rows:
            rows = _not_finite_rows(bad)
        line = source_line(eqn, callers)
        self.origins.append(
            Origin(
                eqn.primitive.name,
                line,
                fault,
                rows,
            )
        )


def _last_uses(jaxpr: Jaxpr) -> dict[Any, int]:
    """Return the index of the last equation that needs a variable."""
    uses: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for var in eqn.invars:
            if not isinstance(var, Literal):
                uses[var] = index
    for var in jaxpr.outvars:
        if not isinstance(var, Literal):
            uses[var] = len(jaxpr.eqns)
    return uses


def _samples(
    program: Program,
    state: State,
    batch: tuple[Any, Any],
    key: Any,
    origins: Sequence[Origin],
) -> np.ndarray | None:
    """Return the rows of the batch that the fault belongs to; None: not known."""
    recipe = prepared(program.recipe)
    functional = program.trace.functional
    inputs, targets = batch
    outputs, _ = forward(
        recipe, functional, state.params, state.variables, inputs, key, True
    )
    result = loss_of(recipe.loss, targets)(outputs, targets)
    values = result[0] if isinstance(result, tuple) else result
    count = _row_count(batch)
    by_sample = [
        leaf
        for leaf in (values, *jax.tree.leaves(outputs))
        if jnp.ndim(leaf) and leaf.shape[0] == count
    ]
    rows = _bad_rows(by_sample)
    if rows is not None:
        return rows
    known = [origin.rows for origin in origins if origin.rows is not None]
    return known[-1] if known else None


def _row_count(batch: tuple[Any, Any]) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _bad_inputs(batch: tuple[Any, Any]) -> list[str]:
    """Return the paths of inputs and targets that hold what is not finite."""
    inputs, targets = batch
    leaves = by_path({"inputs": inputs, "targets": targets})
    floats = {path: leaf for path, leaf in leaves.items() if is_real(leaf)}
    return [path for path, leaf in floats.items() if not jnp.isfinite(leaf).all()]


def _bad_rows(leaves: Sequence[Any]) -> np.ndarray | None:
    """Return the rows of the first array with some that are not finite.

    It is None if no array has such rows.
    """
    for leaf in leaves:
        if not is_inexact(leaf):
            continue
        rows = _not_finite_rows(leaf)
        if len(rows):
            return rows
    return None


def _holds_nan(value: Any) -> bool:
    if not _is_inexact(value):
        return False
    return bool(jnp.isnan(value).any())


def _holds_inf(value: Any) -> bool:
    if not _is_inexact(value):
        return False
    return bool(jnp.isinf(value).any())


def _is_finite(value: Any) -> bool:
    return not (_holds_nan(value) or _holds_inf(value))


def _is_inexact(value: Any) -> bool:
    """Whether a value is floating-point or complex numbers."""
    dtype = getattr(value, "dtype", None)
    is_typed = dtype is not None
    if is_typed and jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return False  # random keys and tokens have no numbers to look at
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def _not_finite_rows(leaf: Any) -> np.ndarray:
    by_row = jnp.isfinite(leaf).reshape(leaf.shape[0], -1)
    is_finite = np.asarray(by_row.all(axis=1))
    return np.flatnonzero(~is_finite)
