"""Where a number that is not finite comes from: a batch computed once more, one
operation at a time.

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

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, scan_counts, source_line
from lepton_jax.planner.program.graph import CALLS
from lepton_jax.step.module import forward
from lepton_jax.step.state import State
from lepton_jax.step.training_loss import training_loss
from lepton_jax.train.program import Program
from lepton_jax.trees import by_path

# Seconds after which the search is given up: a person waits for the message
# (assumption).
MOST_SECONDS = 60.0
MOST_SAMPLES = 5  # that are named


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
    """Findings about a batch.

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
      program: whose recipe and module they are.
      state: with parameters that are finite.
      batch: inputs and targets, batch dim first.
    """
    recipe = program.recipe
    functional = program.trace.functional
    knobs = program.controller.forward_knobs(state.controller)
    key = jax.random.fold_in(state.key, state.step)
    finding = Finding()

    for path, leaf in by_path({"inputs": batch[0], "targets": batch[1]}).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(
            jnp.isfinite(leaf).all()
        ):
            finding.inputs.append(path)
    if finding.inputs:
        finding.samples = _bad_rows(jax.tree.leaves(batch))
        return finding

    gradient = jax.value_and_grad(training_loss(recipe, functional, 1), has_aux=True)
    args = (
        state.params,
        state.variables,
        key,
        *batch,
        knobs,
    )
    traced = jax.make_jaxpr(gradient)(*args)
    search = _Search(rows=jax.tree.leaves(batch)[0].shape[0])
    results = search.run(
        traced.jaxpr,
        traced.consts,
        jax.tree.leaves(args),
        (),
    )
    finding.origins = search.origins
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


def described(finding: Finding, names: Sequence[str] | None) -> str:
    """The finding in a sentence.

    Args:
      finding: to be described.
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
        listed = ", ".join(str(i) if names is None else names[i] for i in shown)
        more = f" and {len(finding.samples) - len(shown)} more" * (
            len(finding.samples) > len(shown)
        )
        what = "rows" if names is None else "samples"
        parts.append(f"{what} {listed}{more}")
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
        """The results of a jaxpr; None once the search is over."""
        env: dict[Any, Any] = dict(
            zip(
                jaxpr.constvars,
                consts,
                strict=True,
            )
        )
        env.update(
            zip(
                jaxpr.invars,
                args,
                strict=True,
            )
        )
        last_use = _last_uses(jaxpr)

        def value(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else env[var]

        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [value(v) for v in eqn.invars]
            results = self._equation(eqn, inputs, callers)
            if results is None:
                return None
            env.update(
                zip(
                    eqn.outvars,
                    results,
                    strict=True,
                )
            )
            # a value that nothing needs any more gives its memory back
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
        inner = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
        if inner is not None:
            closed = isinstance(inner, ClosedJaxpr)
            jaxpr = inner.jaxpr if closed else inner
            consts = inner.consts if closed else ()
            if len(jaxpr.invars) == len(inputs):
                return self.run(
                    jaxpr,
                    consts,
                    inputs,
                    (*callers, eqn),
                )

        out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
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
        order = range(length)
        for i in reversed(order) if eqn.params["reverse"] else order:
            args = [
                *inputs[:consts],
                *carry,
                *(x[i] for x in stacked),
            ]
            results = self.run(
                closed.jaxpr,
                closed.consts,
                args,
                (*callers, eqn),
            )
            if results is None:
                return
            carry = results[:carried]

    def _fault(
        self,
        inputs: list[Any],
        results: list[Any],
    ) -> str | None:
        if not any(_holds_nan(x) for x in inputs):
            if any(_holds_nan(x) for x in results):
                return "nan"
            if any(_holds_inf(x) for x in results):
                return None if any(_holds_inf(x) for x in inputs) else "inf"
        return None

    def _known(self, fault: str) -> bool:
        return any(origin.value == fault for origin in self.origins)

    def _note(
        self,
        eqn: Any,
        callers: tuple,
        fault: str,
        results: list[Any],
    ) -> None:
        bad = next(x for x in results if not _finite(x))
        rows = None
        if jnp.ndim(bad) and bad.shape[0] == self._rows:
            rows = np.flatnonzero(~np.asarray(_finite_rows(bad)))
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
    """Rows of the batch that the fault belongs to."""
    recipe = program.recipe
    inputs, targets = batch
    args = (
        state.params,
        state.variables,
        inputs,
        key,
        True,
    )
    outputs, _ = forward(
        recipe,
        program.trace.functional,
        *args,
    )
    result = recipe.loss(outputs, targets)
    values = result[0] if isinstance(result, tuple) else result
    count = jax.tree.leaves(inputs)[0].shape[0]
    leaves = [values, *jax.tree.leaves(outputs)]
    rows = _bad_rows([x for x in leaves if jnp.ndim(x) and x.shape[0] == count])
    if rows is not None:
        return rows
    return next((o.rows for o in reversed(origins) if o.rows is not None), None)


def _bad_rows(leaves: Sequence[Any]) -> np.ndarray | None:
    """Rows of the first array that has some that are not finite; None if none has."""
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            rows = np.flatnonzero(~np.asarray(_finite_rows(leaf)))
            if len(rows):
                return rows
    return None


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _holds_nan(x: Any) -> bool:
    return _has_dtype(x) and _is_float(x) and bool(jnp.isnan(x).any())


def _holds_inf(x: Any) -> bool:
    return _has_dtype(x) and _is_float(x) and bool(jnp.isinf(x).any())


def _finite(x: Any) -> bool:
    return not (_holds_nan(x) or _holds_inf(x))


def _has_dtype(x: Any) -> bool:
    # random keys and tokens have no numbers to look at
    dtype = getattr(x, "dtype", None)
    return not (dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended))


def _finite_rows(x: Any) -> Any:
    return jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
