"""What each primitive does to the dims of its arrays: which of them are one, which it
sums over, which it needs whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# A rule is called with the graph, whose join(a, b) says that two nodes are one, and the
# operation, whose `whole` and `reduced` it fills. What a rule does not join stays
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

# no arrays of the model go in, or only keys and scalars: nothing to join
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


def unknown(graph: Any, op: Any) -> None:
    """Nothing is claimed about a primitive without a rule: it gets all of its operands
    on each device.
    """
    op.known = False
    _all_whole(op)


def _all_whole(op: Any) -> None:
    op.whole += [
        (i, d)
        for i, value in enumerate(op.inputs)
        if value is not None
        for d in range(len(value.shape))
    ]


def _told(graph: Any, op: Any) -> None:
    """A print and the like: one host is given all of each operand."""
    _all_whole(op)


def _elementwise(graph: Any, op: Any) -> None:
    for target in op.outputs[:1] if op.name != "optimization_barrier" else ():
        for value in op.inputs:
            if value is not None and len(value.shape) == len(target.shape):
                graph.join_all(value, target)
    if op.name == "optimization_barrier":
        for value, target in zip(op.inputs, op.outputs, strict=True):
            if value is not None:
                graph.join_all(value, target)


def _kept(
    graph: Any,
    op: Any,
    gone: tuple[int, ...],
) -> None:
    """Dims of the first operand that are not gone are those of each result, in their
    order.
    """
    source = op.inputs[0]
    if source is None:
        return
    kept = [n for d, n in enumerate(source.nodes) if d not in gone]
    for target in op.outputs:
        for a, b in zip(kept, target.nodes, strict=True):
            graph.join(a, b)


def _reduction(graph: Any, op: Any) -> None:
    axes = tuple(op.params["axes"])
    _kept(graph, op, axes)
    op.reduced += [(0, d) for d in axes] if op.inputs[0] is not None else []


def _arg_reduction(graph: Any, op: Any) -> None:
    axes = tuple(op.params["axes"])
    _kept(graph, op, axes)
    op.whole += [(0, d) for d in axes]


def _squeeze(graph: Any, op: Any) -> None:
    _kept(
        graph,
        op,
        tuple(op.params["dimensions"]),
    )


def _expand_dims(graph: Any, op: Any) -> None:
    source = op.inputs[0]
    target = op.outputs[0]
    new = {d % len(target.shape) for d in op.params["dimensions"]}
    for a, b in zip(
        source.nodes,
        [n for d, n in enumerate(target.nodes) if d not in new],
        strict=True,
    ):
        graph.join(a, b)


def _transpose(graph: Any, op: Any) -> None:
    for b, d in zip(op.outputs[0].nodes, op.params["permutation"], strict=True):
        graph.join(op.inputs[0].nodes[d], b)


def _broadcast_in_dim(graph: Any, op: Any) -> None:
    source = op.inputs[0]
    target = op.outputs[0]
    if source is None:
        return
    for d, t in enumerate(op.params["broadcast_dimensions"]):
        if source.shape[d] == target.shape[t]:
            graph.join(source.nodes[d], target.nodes[t])


def _reshape(graph: Any, op: Any) -> None:
    """A merged dim is its major factor: sharding that one leaves each device a
    contiguous part of the whole.
    """
    source = op.inputs[0]
    target = op.outputs[0]
    if source is None:
        return
    order = op.params.get("dimensions")  # in which the dims are read
    order = range(len(source.shape)) if order is None else order
    a = [source.shape[d] for d in order]
    b = target.shape
    i = 0
    j = 0
    if 0 in a or 0 in b:
        _all_whole(op)
        return
    while i < len(a) and j < len(b):
        left = a[i]
        right = b[j]
        i0 = i
        j0 = j
        while left != right:
            if left < right:
                i += 1
                left *= a[i]
            else:
                j += 1
                right *= b[j]
        # trailing ones belong to the group only if nothing else does
        lefts = [d for d in range(i0, i + 1) if a[d] != 1]
        rights = [d for d in range(j0, j + 1) if b[d] != 1]
        if lefts and rights:
            graph.join(source.nodes[order[lefts[0]]], target.nodes[rights[0]])
            op.whole += [(0, order[d]) for d in lefts[1:]]
        i = i + 1
        j = j + 1


def _dot(graph: Any, op: Any) -> None:
    (lc, rc), (lb, rb) = op.params["dimension_numbers"]
    left, right = op.inputs[:2]
    if left is None or right is None:
        return
    out = op.outputs[0].nodes
    for a, b in zip((*lc, *lb), (*rc, *rb), strict=True):
        graph.join(left.nodes[a], right.nodes[b])
    free = [left.nodes[d] for d in lb]
    free += [n for d, n in enumerate(left.nodes) if d not in (*lc, *lb)]
    free += [n for d, n in enumerate(right.nodes) if d not in (*rc, *rb)]
    for a, b in zip(free, out, strict=True):
        graph.join(a, b)
    op.reduced += [(0, d) for d in lc]


def _conv(graph: Any, op: Any) -> None:
    """Groups (of channels, as in a depthwise convolution, or of the batch) are the
    major factor of the dims they divide.
    """
    left = op.inputs[0]
    right = op.inputs[1]
    out = op.outputs[0]
    numbers = op.params["dimension_numbers"]
    channels = op.params["feature_group_count"]
    batches = op.params["batch_group_count"]
    batch, feature, *space = numbers.lhs_spec
    out_feature, in_feature, *window = numbers.rhs_spec
    out_batch, out_channel, *_ = numbers.out_spec
    op.whole += [(0, d) for d in space] + [(1, d) for d in window]
    if left is None or right is None:
        return
    graph.join(right.nodes[out_feature], out.nodes[out_channel])
    if batches == 1:
        graph.join(left.nodes[batch], out.nodes[out_batch])
    if channels == 1:
        graph.join(left.nodes[feature], right.nodes[in_feature])
        op.reduced.append((0, feature))
    if channels > 1 or batches > 1:
        graph.join(
            left.nodes[feature if channels > 1 else batch], out.nodes[out_channel]
        )
        graph.pieces[out.nodes[out_channel]] = max(channels, batches)
    if channels > 1:
        op.whole.append((1, in_feature))


def _gather(graph: Any, op: Any) -> None:
    source, indices = op.inputs[:2]
    numbers = op.params["dimension_numbers"]
    sizes = op.params["slice_sizes"]
    out = op.outputs[0]
    if source is None:
        return
    batching = tuple(numbers.operand_batching_dims)
    kept = [
        d
        for d in range(len(source.shape))
        if d not in (*numbers.collapsed_slice_dims, *batching)
    ]
    for d, o in zip(kept, numbers.offset_dims, strict=True):
        if sizes[d] == source.shape[d]:
            graph.join(source.nodes[d], out.nodes[o])
        else:
            op.whole.append((0, d))
    # rows that are elsewhere count as zero
    op.reduced += [(0, d) for d in numbers.collapsed_slice_dims]
    if indices is None:
        return
    places = [n for d, n in enumerate(out.nodes) if d not in numbers.offset_dims]
    for a, b in zip(indices.nodes[:-1], places, strict=True):
        graph.join(a, b)
    for d, i in zip(batching, numbers.start_indices_batching_dims, strict=True):
        graph.join(source.nodes[d], indices.nodes[i])


def _scatter(graph: Any, op: Any) -> None:
    target, indices, updates = op.inputs[:3]
    numbers = op.params["dimension_numbers"]
    out = op.outputs[0]
    if target is not None:
        graph.join_all(target, out)
    if updates is None:
        return
    batching = tuple(numbers.operand_batching_dims)
    kept = [
        d
        for d in range(len(out.shape))
        if d not in (*numbers.inserted_window_dims, *batching)
    ]
    for d, u in zip(kept, numbers.update_window_dims, strict=True):
        if updates.shape[u] == out.shape[d]:
            graph.join(out.nodes[d], updates.nodes[u])
        else:
            op.whole.append((2, u))
    places = [
        d for d in range(len(updates.shape)) if d not in numbers.update_window_dims
    ]
    joined = set()
    if indices is not None:
        for d, i in zip(batching, numbers.scatter_indices_batching_dims, strict=True):
            graph.join(out.nodes[d], indices.nodes[i])
            joined.add(i)
        for i, u in enumerate(places):
            graph.join(indices.nodes[i], updates.nodes[u])
    # each device adds its updates to its own copy; the copies are then summed
    missing = [(2, u) for i, u in enumerate(places) if i not in joined]
    (op.reduced if op.name in ("scatter-add", "scatter_add") else op.whole).extend(
        missing
    )


def _same_extent(graph: Any, op: Any) -> None:
    """Slices, pads and the like: a dim that keeps its extent is the same dim."""
    target = op.outputs[0]
    for i, value in enumerate(
        op.inputs[:2] if op.name == "dynamic_update_slice" else op.inputs[:1]
    ):
        if value is None:
            continue
        for d, (m, n) in enumerate(zip(value.shape, target.shape, strict=True)):
            if m == n:
                graph.join(value.nodes[d], target.nodes[d])
            else:
                op.whole.append((i, d))


def _split(graph: Any, op: Any) -> None:
    axis = op.params["axis"]
    source = op.inputs[0]
    for target in op.outputs:
        for d, (a, b) in enumerate(zip(source.nodes, target.nodes, strict=True)):
            if d != axis:
                graph.join(a, b)
    op.whole.append((0, axis))


def _concatenate(graph: Any, op: Any) -> None:
    axis = op.params["dimension"]
    target = op.outputs[0]
    for i, value in enumerate(op.inputs):
        if value is None:
            continue
        for d, (a, b) in enumerate(zip(value.nodes, target.nodes, strict=True)):
            if d != axis:
                graph.join(a, b)
        op.whole.append((i, axis))


def _stack(graph: Any, op: Any) -> None:
    """One dim more, or (unstack) one less: it steps from array to array."""
    axis = op.params["axis"]
    wide = (op.outputs if op.name == "stack" else op.inputs)[0]
    if wide is None:
        return
    nodes = [n for d, n in enumerate(wide.nodes) if d != axis % len(wide.nodes)]
    for thin in op.inputs if op.name == "stack" else op.outputs:
        if thin is not None:
            for a, b in zip(thin.nodes, nodes, strict=True):
                graph.join(a, b)
    if op.name == "unstack":
        op.whole.append((0, axis % len(wide.nodes)))


def _along(name: str) -> Rule:
    """Operations that need one dim whole, and keep all: cumulative ones, sort,
    reversal.
    """

    def rule(graph: Any, op: Any) -> None:
        dims = op.params[name]
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        for i, value in enumerate(op.inputs):
            for target in op.outputs:
                if value is not None and len(value.shape) == len(target.shape):
                    graph.join_all(value, target)
            op.whole += [(i, d) for d in dims] if value is not None else []

    return rule


def _fft(graph: Any, op: Any) -> None:
    """The last dims are transformed, each from all of its elements; the others stay."""
    source = op.inputs[0]
    target = op.outputs[0]
    if source is None:
        return
    kept = len(source.shape) - len(op.params["fft_lengths"])
    for a, b in zip(source.nodes[:kept], target.nodes[:kept], strict=True):
        graph.join(a, b)
    op.whole += [(0, d) for d in range(kept, len(source.shape))]


def _top_k(graph: Any, op: Any) -> None:
    axis = op.params.get("axis", -1) % len(op.inputs[0].shape)
    for target in op.outputs:
        for d, (a, b) in enumerate(zip(op.inputs[0].nodes, target.nodes, strict=True)):
            if d != axis:
                graph.join(a, b)
    op.whole.append((0, axis))


def _windows(graph: Any, op: Any) -> None:
    """Pooling and its gradients: dims in which the window is 1 stay."""
    window = op.params["window_dimensions"]
    target = op.outputs[0]
    for i, value in enumerate(op.inputs):
        if value is None or len(value.shape) != len(target.shape):
            continue
        for d, size in enumerate(window):
            if size == 1 and value.shape[d] == target.shape[d]:
                graph.join(value.nodes[d], target.nodes[d])
            else:
                op.whole.append((i, d))


def _nothing(graph: Any, op: Any) -> None:
    pass


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(SOURCES, _nothing),
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
    "debug_callback": _told,
    "debug_print": _told,
    "dot_general": _dot,
    "dynamic_slice": _same_extent,
    "dynamic_update_slice": _same_extent,
    "expand_dims": _expand_dims,
    "fft": _fft,
    "gather": _gather,
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
