"""Attention of all stages of a pipeline at once.

`attention.attend` is mapped over stages where a layer is. What comes out is an
operation of its own, whose arrays have the stages as their first dim: (stages, batch,
length, heads, width). The planner splits that dim, and each device computes what its
stages need as attention of more samples.

    >>> import jax, jax.numpy as jnp
    >>> from lepton_jax.planner.rewrite.attention import How, attend
    >>> q = k = v = jnp.ones((2, 1, 6, 2, 4))
    >>> how = How(causal=True, scale=0.5, kernel="blocks")
    >>> mapped = jax.vmap(lambda q, k, v: attend(q, k, v, how))
    >>> program = jax.make_jaxpr(jax.grad(lambda q: mapped(q, k, v).sum()))(q)
    >>> names = [eqn.primitive.name for eqn in program.eqns]
    >>> [name for name in names if "attention" in name]
    ['staged_attention', 'staged_attention_gradient']
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from lepton_jax.planner.rewrite.attention import attention_p, gradient_p

# the two operations
STAGED = "staged_attention"
STAGED_GRADIENT = "staged_attention_gradient"

STAGED_KERNELS = (STAGED, STAGED_GRADIENT)


def one_stage(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an array whose stages are more samples of one."""
    stages, samples, *rest = shape
    return (stages * samples, *rest)


# ---- internals ----


def _operation(name: str, single: Primitive) -> Primitive:
    """Return the operation of all stages, and let `single` be mapped to it."""

    def run(*arrays: Any, how: Any) -> list[Any]:
        stages, samples = arrays[0].shape[:2]
        merged = [x.reshape(one_stage(x.shape)) for x in arrays]
        results = single.bind(*merged, how=how)
        return [x.reshape(stages, samples, *x.shape[1:]) for x in results]

    def shapes(*arrays: Any, how: Any) -> list[Any]:
        stages, samples = arrays[0].shape[:2]
        merged = [jax.ShapeDtypeStruct(one_stage(x.shape), x.dtype) for x in arrays]
        results = jax.eval_shape(partial(single.bind, how=how), *merged)
        return [
            jax.core.ShapedArray((stages, samples, *x.shape[1:]), x.dtype)
            for x in results
        ]

    def run_now(*arrays: Any, how: Any) -> Any:
        return jax.jit(partial(primitive.bind, how=how))(*arrays)

    def mapped(arrays: Any, dims: Any, how: Any) -> tuple[Any, Any]:
        pairs = list(zip(arrays, dims, strict=True))
        size = next(x.shape[dim] for x, dim in pairs if dim is not None)
        first = [batching.bdim_at_front(x, dim, size) for x, dim in pairs]
        results = primitive.bind(*first, how=how)
        return results, [0] * len(results)

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    primitive.def_impl(run_now)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    batching.primitive_batchers[single] = mapped
    return primitive


staged_p = _operation(STAGED, attention_p)
staged_gradient_p = _operation(STAGED_GRADIENT, gradient_p)
