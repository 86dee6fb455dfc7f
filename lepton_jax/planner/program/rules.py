"""The rule of each primitive: what it does to the dims of its arrays.

A rule says which dims of the operands and the results are one, over which dims the
operation sums, and which ones it needs whole on each device. In a matrix product

    dot_general: (8, 4), (4, 3) -> (8, 3)

dim 0 of the left operand and of the result are one, and so are the two dims of extent
3. The dims of extent 4 are one too, and are summed over.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

from lepton_jax.planner.program.kernels import join_attention
from lepton_jax.planner.program.ragged import RAGGED, join_ragged
from lepton_jax.planner.program.ruled import join_own
from lepton_jax.planner.program.staged import join_staged_attention, join_stages
from lepton_jax.planner.rewrite.attention import ATTENTION, ATTENTION_GRADIENT
from lepton_jax.planner.rewrite.own import OWN, OWN_GRADIENT
from lepton_jax.planner.rewrite.stage_moves import MOVES
from lepton_jax.planner.rewrite.staged_attention import STAGED_KERNELS

# A rule is called with the graph, whose join(a, b) says that two nodes are one, and the
# operation, whose `whole` and `reduced` it fills. Dims that a rule does not join stay
# apart, and can then not be sharded beyond the operation.
Rule = Callable[[Any, Any], None]

ELEMENTWISE = [
    "abs",
    "add",
    "add_any",
    "and",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "bessel_i0e",
    "bessel_i1e",
    "cbrt",
    "ceil",
    "clamp",
    "clz",
    "complex",
    "conj",
    "convert_element_type",
    "copy",
    "copy_p",
    "cos",
    "cosh",
    "digamma",
    "div",
    "eq",
    "eq_to",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "ge",
    "gt",
    "igamma",
    "igamma_grad_a",
    "igammac",
    "imag",
    "integer_pow",
    "is_finite",
    "le",
    "le_to",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "lt",
    "lt_to",
    "max",
    "min",
    "mul",
    "ne",
    "neg",
    "nextafter",
    "not",
    "optimization_barrier",
    "or",
    "polygamma",
    "population_count",
    "pow",
    "random_gamma_grad",
    "real",
    "reduce_precision",
    "regularized_incomplete_beta",
    "rem",
    "round",
    "rsqrt",
    "select_n",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "stop_gradient",
    "sub",
    "tan",
    "tanh",
    "xor",
    "zeta",
    "name",
    "sharding_constraint",
    "device_put",
    "layout_constraint",
    "mul_add",
    "opaque_cast",
    "pvary",
    "reshard",
    "bitcast_convert_type",
    "nan_to_num",
    "random_clone",
    "log2",
    "mulhi",
    "one_minus_square",
]

REDUCTIONS = [
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "reduce_xor",
]

# Primitives that take no arrays of the model, or only keys and scalars: there is
# nothing to join.
SOURCES = [
    "iota",
    "random_bits",
    "random_seed",
    "random_wrap",
    "random_unwrap",
    "random_fold_in",
    "random_split",
    "threefry2x32",
    "empty",
    "create_token",
    "axis_index",
    "rng_uniform",
    "rng_bit_generator",
]


# ---- internals ----


def _join_pairs(
    graph: Any,
    left: Iterable[int],
    right: Iterable[int],
) -> None:
    """Join nodes one by one with as many others."""
    for a, b in zip(left, right, strict=True):
        graph.join(a, b)


def _without(
    nodes: tuple[int, ...],
    dims: Container[int],
) -> list[int]:
    """List the nodes of a value but for those of some dims."""
    return [node for dim, node in enumerate(nodes) if dim not in dims]


def _other_dims(value: Any, *excluded: Iterable[int]) -> list[int]:
    """List the dims of a value that are not in any of some tuples of dims."""
    taken = {dim for dims in excluded for dim in dims}
    return [dim for dim in range(len(value.shape)) if dim not in taken]


def _need_whole(op: Any) -> None:
    """Mark all dims of all operands as needed whole."""
    for number, value in enumerate(op.inputs):
        if value is not None:
            op.whole += [(number, dim) for dim in range(len(value.shape))]


# ---- rules without dims of their own ----


def unknown(graph: Any, op: Any) -> None:
    """Claim nothing about a primitive without a rule.

    It gets all of its operands on each device.
    """
    op.known = False
    _need_whole(op)


def _callback(graph: Any, op: Any) -> None:
    """Need all of each operand of a print and the like, on one host."""
    _need_whole(op)


def _source(graph: Any, op: Any) -> None:
    """Join nothing."""


# ---- dims that stay where they are ----


def _elementwise(graph: Any, op: Any) -> None:
    target = op.outputs[0]
    for value in op.inputs:
        if value is not None and len(value.shape) == len(target.shape):
            graph.join_all(value, target)


def _barrier(graph: Any, op: Any) -> None:
    pairs = zip(op.inputs, op.outputs, strict=True)
    for value, target in pairs:
        if value is not None:
            graph.join_all(value, target)


def _same_extent(graph: Any, op: Any) -> None:
    """Join the dims of a slice, a pad or the like that keep their extent."""
    target = op.outputs[0]
    count = 2 if op.name == "dynamic_update_slice" else 1
    for number, value in enumerate(op.inputs[:count]):
        if value is None:
            continue
        for dim, extent in enumerate(value.shape):
            if extent == target.shape[dim]:
                graph.join(value.nodes[dim], target.nodes[dim])
            else:
                op.whole.append((number, dim))


def _along(parameter: str) -> Rule:
    """Return the rule of operations that need one dim whole, and keep all.

    They are cumulative sums and the like, sorts and reversals.

    Args:
      parameter: names the dim, or the dims, in the equation.
    """

    def rule(graph: Any, op: Any) -> None:
        dims = op.params[parameter]
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        for number, value in enumerate(op.inputs):
            if value is None:
                continue
            for target in op.outputs:
                if len(value.shape) == len(target.shape):
                    graph.join_all(value, target)
            op.whole += [(number, dim) for dim in dims]

    return rule


def _fft(graph: Any, op: Any) -> None:
    """Transform the last dims, each from all of its elements; the others stay."""
    source = op.inputs[0]
    target = op.outputs[0]
    if source is None:
        return
    rank = len(source.shape)
    first = rank - len(op.params["fft_lengths"])
    _join_pairs(
        graph,
        source.nodes[:first],
        target.nodes[:first],
    )
    op.whole += [(0, dim) for dim in range(first, rank)]


def _windows(graph: Any, op: Any) -> None:
    """Keep the dims of pooling, and of its gradients, in which the window is 1."""
    window = op.params["window_dimensions"]
    target = op.outputs[0]
    for number, value in enumerate(op.inputs):
        if value is None or len(value.shape) != len(target.shape):
            continue
        for dim, size in enumerate(window):
            if size == 1 and value.shape[dim] == target.shape[dim]:
                graph.join(value.nodes[dim], target.nodes[dim])
            else:
                op.whole.append((number, dim))


# ---- dims that come, go or change places ----


def _drop_dims(
    graph: Any,
    op: Any,
    gone: tuple[int, ...],
) -> None:
    """Join the first operand's other dims with those of each result, in their order."""
    source = op.inputs[0]
    if source is None:
        return
    rest = _without(source.nodes, gone)
    for target in op.outputs:
        _join_pairs(graph, rest, target.nodes)


def _reduction(graph: Any, op: Any) -> None:
    axes = tuple(op.params["axes"])
    _drop_dims(graph, op, axes)
    if op.inputs[0] is not None:
        op.reduced += [(0, dim) for dim in axes]


def _arg_reduction(graph: Any, op: Any) -> None:
    axes = tuple(op.params["axes"])
    _drop_dims(graph, op, axes)
    op.whole += [(0, dim) for dim in axes]


def _squeeze(graph: Any, op: Any) -> None:
    _drop_dims(graph, op, tuple(op.params["dimensions"]))


def _expand_dims(graph: Any, op: Any) -> None:
    target = op.outputs[0]
    rank = len(target.shape)
    new = [dim % rank for dim in op.params["dimensions"]]
    rest = _without(target.nodes, new)
    _join_pairs(graph, op.inputs[0].nodes, rest)


def _transpose(graph: Any, op: Any) -> None:
    nodes = op.inputs[0].nodes
    permuted = [nodes[dim] for dim in op.params["permutation"]]
    _join_pairs(graph, permuted, op.outputs[0].nodes)


def _broadcast_in_dim(graph: Any, op: Any) -> None:
    source = op.inputs[0]
    target = op.outputs[0]
    if source is None:
        return
    for dim, place in enumerate(op.params["broadcast_dimensions"]):
        if source.shape[dim] == target.shape[place]:
            graph.join(source.nodes[dim], target.nodes[place])


def _reshape(graph: Any, op: Any) -> None:
    """Join a merged dim with its major factor, a divided one with its major part.

    Sharding that one leaves each device a contiguous part of the whole. From (8, 6, 5)
    to (48, 5), dim 0 of the result is dim 0 of the operand, and dim 1 of the operand is
    needed whole; 5 stays what it is.
    """
    source = op.inputs[0]
    target = op.outputs[0]
    if source is None:
        return
    if 0 in source.shape or 0 in target.shape:
        _need_whole(op)
        return

    order = op.params.get("dimensions")  # in which the dims are read
    order = range(len(source.shape)) if order is None else order
    extents = [source.shape[dim] for dim in order]
    for lefts, rights in _equal_products(extents, target.shape):
        if lefts and rights:
            major, *minor = (order[dim] for dim in lefts)
            graph.join(source.nodes[major], target.nodes[rights[0]])
            op.whole += [(0, dim) for dim in minor]


def _equal_products(
    left: Sequence[int],
    right: Sequence[int],
) -> Iterator[tuple[list[int], list[int]]]:
    """Divide two shapes into the smallest runs of dims with equal products.

    (8, 6, 5) and (48, 5) are divided into 8 * 6 = 48 and 5 = 5.

    Yields:
      The dims of a run in each shape, but for those of extent 1.
    """
    i = 0
    j = 0
    while i < len(left) and j < len(right):
        first_i = i
        first_j = j
        left_product = left[i]
        right_product = right[j]
        while left_product != right_product:
            if left_product < right_product:
                i += 1
                left_product *= left[i]
            else:
                j += 1
                right_product *= right[j]
        i += 1
        j += 1
        lefts = [dim for dim in range(first_i, i) if left[dim] != 1]
        rights = [dim for dim in range(first_j, j) if right[dim] != 1]
        yield lefts, rights


# ---- products ----


def _dot(graph: Any, op: Any) -> None:
    contracted, batched = op.params["dimension_numbers"]
    left, right = op.inputs[:2]
    if left is None or right is None:
        return
    for left_dims, right_dims in (contracted, batched):
        for a, b in zip(left_dims, right_dims, strict=True):
            graph.join(left.nodes[a], right.nodes[b])

    # the result: batch dims, then the free ones of the left and of the right operand
    nodes = [left.nodes[dim] for dim in batched[0]]
    nodes += _without(left.nodes, (*contracted[0], *batched[0]))
    nodes += _without(right.nodes, (*contracted[1], *batched[1]))
    _join_pairs(graph, nodes, op.outputs[0].nodes)
    op.reduced += [(0, dim) for dim in contracted[0]]


def _conv(graph: Any, op: Any) -> None:
    """Join the dims of a convolution.

    Groups (of channels, as in a depthwise convolution, or of the batch) are the major
    factor of the dims that they divide.
    """
    numbers = op.params["dimension_numbers"]
    batch, feature, *space = numbers.lhs_spec
    out_feature, in_feature, *window = numbers.rhs_spec
    out_batch, out_channel, *_ = numbers.out_spec
    op.whole += [(0, dim) for dim in space]
    op.whole += [(1, dim) for dim in window]
    left, right = op.inputs[:2]
    if left is None or right is None:
        return

    out = op.outputs[0].nodes
    channel = out[out_channel]
    feature_groups = op.params["feature_group_count"]
    batch_groups = op.params["batch_group_count"]
    graph.join(right.nodes[out_feature], channel)
    if batch_groups == 1:
        graph.join(left.nodes[batch], out[out_batch])
    if feature_groups == 1:
        graph.join(left.nodes[feature], right.nodes[in_feature])
        op.reduced.append((0, feature))
    else:
        op.whole.append((1, in_feature))

    groups = max(feature_groups, batch_groups)
    if groups > 1:
        grouped = feature if feature_groups > 1 else batch
        graph.join(left.nodes[grouped], channel)
        graph.pieces[channel] = groups


# ---- lookups and scattered updates ----


def _gather(graph: Any, op: Any) -> None:
    source, indices = op.inputs[:2]
    if source is None:
        return
    numbers = op.params["dimension_numbers"]
    sizes = op.params["slice_sizes"]
    out = op.outputs[0]
    looked_up = numbers.collapsed_slice_dims
    batched = numbers.operand_batching_dims

    sliced = _other_dims(source, looked_up, batched)
    pairs = zip(sliced, numbers.offset_dims, strict=True)
    for dim, place in pairs:
        if sizes[dim] == source.shape[dim]:
            graph.join(source.nodes[dim], out.nodes[place])
        else:
            op.whole.append((0, dim))
    # rows that are elsewhere count as zero
    op.reduced += [(0, dim) for dim in looked_up]

    if indices is not None:
        rows = _without(out.nodes, numbers.offset_dims)
        _join_pairs(graph, indices.nodes[:-1], rows)
        index_dims = numbers.start_indices_batching_dims
        for dim, index_dim in zip(batched, index_dims, strict=True):
            graph.join(source.nodes[dim], indices.nodes[index_dim])


def _scatter(graph: Any, op: Any) -> None:
    target, indices, updates = op.inputs[:3]
    out = op.outputs[0]
    if target is not None:
        graph.join_all(target, out)
    if updates is None:
        return

    numbers = op.params["dimension_numbers"]
    batched = numbers.operand_batching_dims
    window = _other_dims(out, numbers.inserted_window_dims, batched)
    pairs = zip(window, numbers.update_window_dims, strict=True)
    for dim, place in pairs:
        if updates.shape[place] == out.shape[dim]:
            graph.join(out.nodes[dim], updates.nodes[place])
        else:
            op.whole.append((2, place))

    rows = _other_dims(updates, numbers.update_window_dims)
    if indices is not None:
        rows = _join_scattered_rows(graph, op, rows)
    # each device adds its updates to its own copy; the copies are then summed
    adds = op.name in ("scatter-add", "scatter_add")
    places = op.reduced if adds else op.whole
    places += [(2, place) for place in rows]


def _join_scattered_rows(
    graph: Any,
    op: Any,
    rows: list[int],
) -> list[int]:
    """Join the dims of a scatter's updates that number its rows.

    Returns:
      Those of `rows`, which are these dims, with which no batch dim of the target goes.
    """
    numbers = op.params["dimension_numbers"]
    _, indices, updates = op.inputs[:3]
    index_dims = numbers.scatter_indices_batching_dims
    pairs = zip(numbers.operand_batching_dims, index_dims, strict=True)
    for dim, index_dim in pairs:
        graph.join(op.outputs[0].nodes[dim], indices.nodes[index_dim])
    for index_dim, place in enumerate(rows):
        graph.join(indices.nodes[index_dim], updates.nodes[place])
    return [place for i, place in enumerate(rows) if i not in index_dims]


# ---- several arrays in one ----


def _join_but_one(
    graph: Any,
    source: Any,
    target: Any,
    axis: int,
) -> None:
    """Join the dims of two values but for one dim."""
    pairs = zip(source.nodes, target.nodes, strict=True)
    for dim, (a, b) in enumerate(pairs):
        if dim != axis:
            graph.join(a, b)


def _split(graph: Any, op: Any) -> None:
    axis = op.params["axis"]
    for target in op.outputs:
        _join_but_one(graph, op.inputs[0], target, axis)
    op.whole.append((0, axis))


def _concatenate(graph: Any, op: Any) -> None:
    axis = op.params["dimension"]
    for number, value in enumerate(op.inputs):
        if value is not None:
            _join_but_one(graph, value, op.outputs[0], axis)
            op.whole.append((number, axis))


def _top_k(graph: Any, op: Any) -> None:
    source = op.inputs[0]
    axis = op.params.get("axis", -1) % len(source.shape)
    for target in op.outputs:
        _join_but_one(graph, source, target, axis)
    op.whole.append((0, axis))


def _stack(graph: Any, op: Any) -> None:
    """Join arrays with the one that they are stacked to, or that they are parts of.

    It has one dim more, which steps from array to array.
    """
    stacks = op.name == "stack"
    wide = op.outputs[0] if stacks else op.inputs[0]
    if wide is None:
        return
    axis = op.params["axis"] % len(wide.nodes)
    rest = _without(wide.nodes, (axis,))
    for narrow in op.inputs if stacks else op.outputs:
        if narrow is not None:
            _join_pairs(graph, narrow.nodes, rest)
    if not stacks:
        op.whole.append((0, axis))


# ---- the rule of each primitive ----

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(SOURCES, _source),
    **dict.fromkeys(MOVES, join_stages),
    **dict.fromkeys(STAGED_KERNELS, join_staged_attention),
    ATTENTION: join_attention,
    ATTENTION_GRADIENT: join_attention,
    OWN: join_own,
    RAGGED: join_ragged,
    OWN_GRADIENT: join_own,
    "argmax": _arg_reduction,
    "argmin": _arg_reduction,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "cumlogsumexp": _along("axis"),
    "cummax": _along("axis"),
    "cummin": _along("axis"),
    "cumprod": _along("axis"),
    "cumsum": _along("axis"),
    "debug_callback": _callback,
    "debug_print": _callback,
    "dot_general": _dot,
    "dynamic_slice": _same_extent,
    "dynamic_update_slice": _same_extent,
    "expand_dims": _expand_dims,
    "fft": _fft,
    "gather": _gather,
    "optimization_barrier": _barrier,
    "pad": _same_extent,
    "reduce_window_max": _windows,
    "reduce_window_min": _windows,
    "reduce_window_sum": _windows,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter_add": _scatter,
    "scatter-max": _scatter,
    "scatter-min": _scatter,
    "scatter-mul": _scatter,
    "scatter-sub": _scatter,
    "select_and_gather_add": _windows,
    "select_and_scatter_add": _windows,
    "slice": _same_extent,
    "sort": _along("dimension"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _same_extent,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _stack,
}
