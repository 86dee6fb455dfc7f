"""Reading compiled modules: texts of each form, and programs with known collectives."""

import doctest
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lepton_jax.verify import collectives, hlo, hlo_loops, hlo_text

P = PartitionSpec
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def module(body, before="", parameters="p: f32[64,32]", tables=""):
    """Return a module of 8 devices whose entry is `body`."""
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return (
        f"HloModule jit_f, is_scheduled=true, num_partitions=8\n{tables}{ADD}{before}\n"
        f"ENTRY %main ({parameters}) -> f32[] {{\n{lines}\n}}\n"
    )


def only(text):
    [found] = hlo.read(text).collectives
    return found


# ---- groups and axes ----


@pytest.mark.parametrize(
    "written, groups, axes",
    [
        ("{{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("b",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("a",)),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], ("b",)),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], ("a",)),
        ("{}", [list(range(8))], ("a", "b")),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("a",)),
        ("mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))], ("a", "b")),
        ("mesh['z'=2,'y'=1,'x'=4] {'x'}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("b",)),
        ("mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("a",)),
        ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]], None),
        (
            "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            ("a",),
        ),
        (
            "mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
            None,
        ),
    ],
)
def test_every_form_of_groups_is_expanded_to_devices_and_mesh_axes(
    written, groups, axes
):
    found = only(
        module(
            f"""%p = f32[64,32]{{1,0}} parameter(0)
        ROOT %r = f32[64,32]{{1,0}} all-reduce(%p), channel_id=1, \
            replica_groups={written}, to_apply=%add"""
        )
    )
    assert [list(group) for group in found.groups] == groups
    assert found.axes({"a": 2, "b": 4}) == axes


def test_axes_are_those_of_the_mesh_that_the_numbers_lie_in():
    shape = {"a": 2, "b": 2, "c": 2}
    assert hlo.axes_of([[0, 5], [1, 4], [2, 7], [3, 6]], shape) is None  # diagonals
    assert hlo.axes_of([[0, 1, 4, 5], [2, 3, 6, 7]], shape) == ("a", "c")
    # groups along different axes
    assert hlo.axes_of([[0, 1], [2, 3], [4, 6], [5, 7]], shape) is None
    assert hlo.axes_of([[n] for n in range(8)], shape) == ()
    assert hlo.axes_of([[0, 9]], shape) is None
    shuffled = np.asarray([0, 2, 1, 3, 4, 6, 5, 7]).reshape(2, 2, 2)
    assert hlo.axes_of([[0, 1], [2, 3], [4, 5], [6, 7]], shape, shuffled) == ("b",)
    ring = [(n, (n + 1) % 8) for n in range(8)]
    assert hlo.axes_of(ring, {"a": 1, "b": 8}, permute=True) == ("b",)
    assert hlo.axes_of(ring, {"a": 2, "b": 4}, permute=True) == ("a", "b")


# ---- each collective once, with its whole buffer ----

KIB = 64 * 32 * 4  # bytes of f32[64,32]


@pytest.mark.parametrize(
    "line, kind, size",
    [
        (
            (
                "ROOT %r = f32[256,32]{1,0} all-gather(%p), replica_groups=[2,4]<=[8],"
                " dimensions={0}"
            ),
            "all-gather",
            4 * KIB,
        ),
        (
            (
                "ROOT %r = f32[16,32]{1,0} reduce-scatter(%p),"
                " replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add"
            ),
            "reduce-scatter",
            KIB,
        ),
        (
            (
                "ROOT %r = (f32[64,32], f32[64,32]) all-to-all(%p, %p),"
                " replica_groups={{0,1}}"
            ),
            "all-to-all",
            2 * KIB,
        ),
        (
            (
                "ROOT %r = f32[64,32]{1,0:T(8,128)S(1)} collective-permute(%p),"
                " source_target_pairs={{0,1},{1,0}}"
            ),
            "collective-permute",
            KIB,
        ),
        (
            (
                "ROOT %r = (f32[64,32], f32[64,32]) all-reduce(%p, /*index=1*/%p),"
                " replica_groups={}, to_apply=%add"
            ),
            "all-reduce",
            2 * KIB,
        ),
        (
            (
                "ROOT %r = f32[99,32] ragged-all-to-all(%p, %p, %p, %p, %p, %p),"
                " replica_groups={}"
            ),
            "ragged-all-to-all",
            KIB,
        ),
        (
            (
                "ROOT %r = (f32[64,32], token[]) send(%p, %p),"
                " frontend_attributes={_xla_send_recv_source_target_pairs={{0,1}}}"
            ),
            "collective-permute",
            KIB,
        ),
    ],
)
def test_bytes_are_those_of_the_whole_buffer(line, kind, size):
    found = only(module(f"%p = f32[64,32]{{1,0}} parameter(0)\n{line}"))
    assert (found.kind, found.bytes, found.times, found.exact) == (kind, size, 1, True)


ASYNC = {
    "all-gather pair": (
        "",
        """
        %s = (f32[64,32], f32[256,32]) all-gather-start(%p), \
            replica_groups=[2,4]<=[8], dimensions={0}
        ROOT %d = f32[256,32] all-gather-done(%s)""",
        "all-gather",
        4 * KIB,
    ),
    "permute pair": (
        "",
        """
        %s = (f32[64,32], f32[64,32], u32[]{:S(2)}, \
            u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
        ROOT %d = f32[64,32] collective-permute-done(%s)""",
        "collective-permute",
        KIB,
    ),
    "wrapped": (
        """
%wrapped (w: f32[64,32]) -> f32[16,32] {
  %w = f32[64,32]{1,0} parameter(0)
  ROOT %inner = f32[16,32]{1,0} reduce-scatter(%w), replica_groups=[2,4]<=[8], \
      dimensions={0}, to_apply=%add
}
""",
        """
        %s = ((f32[64,32]), f32[16,32], u32[]) async-start(%p), calls=%wrapped
        %u = ((f32[64,32]), f32[16,32], u32[]) async-update(%s), calls=%wrapped
        ROOT %d = f32[16,32] async-done(%u), calls=%wrapped""",
        "reduce-scatter",
        KIB,
    ),
    "offloaded": (
        """
%called (w: f32[64,32]) -> f32[256,32] {
  %w = f32[64,32]{1,0} parameter(0)
  ROOT %inner = f32[256,32]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], \
      dimensions={0}
}, execution_thread="sparsecore"
""",
        """
        %s = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), \
            async_execution_thread="sparsecore", to_apply=%called
        %u = ((f32[64,32]), f32[256,32]) call-update(%s, %p)
        ROOT %d = f32[256,32] call-done(%u)""",
        "all-gather",
        4 * KIB,
    ),
    "a chain of fusions": (
        "".join(
            f"""
%{name} (w: f32[64,32]) -> f32[256,32] {{
  %w = f32[64,32]{{1,0}} parameter(0)
  ROOT %inner = f32[256,32]{{1,0}} all-gather(%w), channel_id=7, \
      replica_groups=[2,4]<=[8], frontend_attributes={{chain_id="3"}}
}}
"""
            for name in ("begin", "on", "end")
        ),
        """
        %a = f32[256,32] fusion(%p), kind=kCustom, calls=%begin
        %b = f32[256,32] fusion(%p), kind=kCustom, calls=%on
        ROOT %d = f32[256,32] fusion(%p), kind=kCustom, calls=%end""",
        "all-gather",
        4 * KIB,
    ),
}


@pytest.mark.parametrize("form", ASYNC)
def test_an_asynchronous_collective_counts_once(form):
    before, body, kind, size = ASYNC[form]
    found = only(module(f"%p = f32[64,32]{{1,0}} parameter(0)\n{body.strip()}", before))
    assert (found.kind, found.bytes, found.times) == (kind, size, 1)


SCATTER = """
%all-reduce-scatter.1 (q: f32[64,32]) -> f32[16,32] {
  %q = f32[64,32]{1,0} parameter(0)
  %inner = f32[64,32]{1,0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = f32[16,32]{1,0} dynamic-slice(%inner, %zero, %zero), \
      dynamic_slice_sizes={16,32}
}
"""


def test_a_tpus_all_reduce_scatter_is_a_reduce_scatter_with_its_fusions_name():
    found = only(
        module(
            """%p = f32[64,32]{1,0} parameter(0)
        ROOT %f = f32[16,32] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, \
            metadata={op_name="jit(f)/dot_general"}""",
            SCATTER,
        )
    )
    assert (found.kind, found.bytes, found.sliced, found.op_name) == (
        "reduce-scatter",
        KIB,
        False,
        "jit(f)/dot_general",
    )


@pytest.mark.parametrize(
    "name, windowed",
    [("jit(f)/while/body/bsd,dh->bsh/dot_general", True), ("jit(f)/ppermute", False)],
)
def test_a_permute_in_a_matmuls_name_is_a_piece_of_a_window(name, windowed):
    found = only(
        module(
            f"""%p = f32[64,32]{{1,0}} parameter(0)
        ROOT %r = f32[64,32]{{1,0}} collective-permute(%p), \
            source_target_pairs={{{{0,1}},{{1,0}}}}, """
            f"""metadata={{op_name="{name}"}}"""
        )
    )
    assert found.windowed == windowed
    assert found.groups == ((0, 1), (1, 0))
    assert found.sent == KIB


def test_an_all_reduce_that_is_only_sliced_is_marked():
    sliced = module(
        """%p = f32[64,32]{1,0} parameter(0)
        %r = f32[64,32]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
        %c = bf16[64,32]{1,0} convert(%r)
        %zero = u32[] constant(0)
        ROOT %s = bf16[16,32]{1,0} dynamic-slice(%c, %zero, %zero), \
            dynamic_slice_sizes={16,32}"""
    )
    assert only(sliced).sliced
    assert not only(
        sliced.replace("dynamic-slice(%c,", "dynamic-slice(%c2,").replace(
            "%zero = u32[] constant(0)",
            "%c2 = bf16[64,32]{1,0} negate(%c)\n  %zero = u32[] constant(0)",
        )
    ).sliced


# ---- loops ----


def loop(
    start="constant(0)",
    step="constant(1)",
    limit="constant(5)",
    direction="LT",
    config="",
    carried="%a",
    op="add",
):
    """Return a module with a loop around an all-reduce and a 64x32 by 32x32 dot."""
    carry = "(s32[], f32[64,32], s32[])"
    return module(
        f"""%p = f32[64,32]{{1,0}} parameter(0)
        %n = s32[]{{:T(128)}} parameter(1)
        %start = s32[] {start}
        %limit = s32[] {limit}
        %init = {carry} tuple(%start, %p, %limit)
        %loop = {carry} while(%init), condition=%cond, body=%body{config}
        ROOT %out = f32[64,32] get-tuple-element(%loop), index=1""",
        f"""
%body (c: {carry}) -> {carry} {{
  %c = {carry} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[64,32]{{1,0}} get-tuple-element(%c), index=1
  %l = s32[] get-tuple-element(%c), index=2
  %by = s32[] {step}
  %a = s32[] {op}(%i, %by)
  %w = f32[32,32]{{1,0}} constant({{...}})
  %d = f32[64,32]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, \
      rhs_contracting_dims={{0}}
  %r = f32[64,32]{{1,0}} all-reduce(%d), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = {carry} tuple({carried}, %r, %l)
}}

%compare (u: s32[], v: s32[]) -> pred[] {{
  %u = s32[] parameter(0)
  %v = s32[] parameter(1)
  ROOT %less = pred[] compare(%u, %v), direction={direction}
}}

%cond (e: {carry}) -> pred[] {{
  %e = {carry} parameter(0)
  %j = s32[] get-tuple-element(%e), index=0
  %m = s32[] get-tuple-element(%e), index=2
  ROOT %go = pred[] fusion(%j, %m), kind=kLoop, calls=%compare
}}
""",
        "p: f32[64,32], n: s32[]",
    )


@pytest.mark.parametrize(
    "options, turns",
    [
        ({}, 5),
        ({"start": "constant(2)"}, 3),
        ({"step": "constant(2)"}, 3),
        ({"direction": "LE"}, 6),
        (
            {
                "start": "constant(6)",
                "step": "constant(-1)",
                "limit": "constant(0)",
                "direction": "GE",
            },
            7,
        ),
        (
            {
                "start": "constant(4)",
                "limit": "constant(0)",
                "direction": "GT",
                "op": "subtract",
            },
            4,
        ),
        ({"start": "constant(9)"}, 0),
        (
            {
                "start": "copy(%n)",
                "config": ', backend_config={"known_trip_count":{"n":"7"}}',
            },
            7,
        ),
    ],
)
def test_what_a_loop_holds_counts_as_often_as_it_turns(options, turns):
    compiled = hlo.read(loop(**options))
    assert [(c.times, c.exact) for c in compiled.collectives] == [(turns, True)]
    assert compiled.dot_flops == turns * 2 * 64 * 32 * 32
    assert not compiled.unknown_loops


@pytest.mark.parametrize(
    "options",
    [
        {"start": "copy(%n)"},
        {"limit": "copy(%n)"},
        {"step": "multiply(%i, %i)"},
        {"carried": "%l"},
        {"direction": "GT"},
    ],
)
def test_a_loop_of_unknown_turns_counts_once_and_is_named(options):
    compiled = hlo.read(loop(**options))
    assert [(c.times, c.exact) for c in compiled.collectives] == [(1, False)]
    assert compiled.unknown_loops == ["loop"]
    assert compiled.dot_flops == 2 * 64 * 32 * 32


def test_of_a_conditional_the_costliest_branch_computes_and_all_communicate():
    branch = """
%{name} (c: f32[64,32]) -> f32[64,32] {{
  %c = f32[64,32]{{1,0}} parameter(0)
  %w = f32[32,{size}]{{1,0}} constant({{...}})
  %d = f32[64,{size}]{{1,0}} dot(%c, %w), lhs_contracting_dims={{1}}, \
      rhs_contracting_dims={{0}}
  ROOT %r = f32[64,32]{{1,0}} all-reduce(%c), replica_groups={{}}, to_apply=%add
}}
"""
    compiled = hlo.read(
        module(
            """%p = f32[64,32]{1,0} parameter(0)
        %i = s32[] constant(0)
        ROOT %r = f32[64,32]{1,0} conditional(%i, %p, %p), branch_computations={%one, \
            %two}""",
            branch.format(name="one", size=8) + branch.format(name="two", size=16),
        )
    )
    assert compiled.dot_flops == 2 * 64 * 32 * 16
    assert [(c.times, c.exact) for c in compiled.collectives] == [(1, False)] * 2


# ---- flops ----


def flops(line, *shapes):
    body = "\n".join(
        f"%p{i} = {shape} parameter({i})" for i, shape in enumerate(shapes)
    )
    return hlo.read(module(f"{body}\n{line}"))


def test_flops_of_a_convolution_leave_out_padding_and_holes():
    same = flops(
        "ROOT %r = f32[2,8,8,5] convolution(%p0, %p1), window={size=3x3 pad=1_1x1_1},"
        " dim_labels=b01f_01io->b01f",
        "f32[2,8,8,4]",
        "f32[3,3,4,5]",
    )
    assert same.dot_flops == 2 * 2 * 4 * 5 * (3 * 8 - 2) ** 2
    # how a TPU writes a dot with a batch dim of 8: of each window of 8 taps one meets
    # an element
    batched = flops(
        "ROOT %r = bf16[8,2,512,64]{2,3,1,0:T(8,128)(2,1)} convolution(%p0, %p1), "
        "window={size=8x2 stride=7x1 lhs_dilate=8x2}, dim_labels=0b1f_0o1i->01bf",
        "bf16[8,512,2,128]",
        "bf16[8,64,2,128]",
    )
    assert batched.dot_flops == 8 * 2 * (2 * 512 * 128 * 64)
    grouped = flops(
        "ROOT %r = f32[2,8,8,4] convolution(%p0, %p1), window={size=1x1},"
        " dim_labels=b01f_01io->b01f, feature_group_count=4",
        "f32[2,8,8,4]",
        "f32[1,1,1,4]",
    )
    assert grouped.dot_flops == 2 * 2 * 64 * 4


def test_flops_of_a_gpu_librarys_calls():
    gemm = flops(
        "ROOT %r = (bf16[4,64,16], s8[4096]) custom-call(%p0, %p1),"
        ' custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}',
        "bf16[4,64,32]",
        "bf16[4,32,16]",
    )
    assert gemm.dot_flops == 2 * 4 * 64 * 16 * 32
    assert not gemm.custom_calls
    backward = flops(
        "ROOT %r = (f32[3,3,4,5], u8[0]) custom-call(%p0, %p1), window={size=3x3"
        " pad=1_1x1_1}, dim_labels=b01f_01io->b01f,"
        ' custom_call_target="__cudnn$convBackwardFilter"',
        "f32[2,8,8,4]",
        "f32[2,8,8,5]",
    )
    assert backward.dot_flops == 2 * 2 * 4 * 5 * (3 * 8 - 2) ** 2
    kernel = flops(
        'ROOT %r = f32[8] custom-call(%p0), custom_call_target="__cudnn$fmhaSoftmax"',
        "f32[8]",
    )
    assert kernel.dot_flops == 0
    assert kernel.custom_calls == {"__cudnn$fmhaSoftmax": 1}


def test_xlas_own_rematerialization_is_counted():
    text = module("""%p = f32[64,32]{1,0} parameter(0)
        %n.remat2 = f32[64,32] negate(%p)
        ROOT %m = f32[64,32] negate(%n.remat2)""")
    assert hlo.read(text).rematerialized == 1


# ---- source lines ----

TABLES = """
FileNames
1 "/home/me/recipe.py"
2 "/usr/lib/site-packages/flax/linear.py"

FunctionNames
1 "loss"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=2}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=2 end_column=2}
3 {file_name_id=2 function_name_id=1 line=500 end_line=500 column=2 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=PARENT1}
2 {file_location_id=2 parent_frame_id=PARENT2}
3 {file_location_id=3 parent_frame_id=PARENT3}

"""


@pytest.mark.parametrize("parents", ["123", "012"], ids=["plus one", "plain"])
@pytest.mark.parametrize("frame, line", [(1, 7), (2, 9), (3, 9)])
def test_a_stack_frame_leads_to_the_users_innermost_line(parents, frame, line):
    tables = TABLES
    for number, parent in enumerate(parents, 1):
        tables = tables.replace(f"PARENT{number}", parent)
    found = only(
        module(
            f"""%p = f32[64,32]{{1,0}} parameter(0)
        ROOT %r = f32[64,32]{{1,0}} all-reduce(%p), replica_groups={{}}, \
            to_apply=%add, metadata={{op_name="jit(f)/x" """
            f"stack_frame_id={frame}}}",
            tables=tables,
        )
    )
    assert (found.file, found.line, found.op_name) == (
        "/home/me/recipe.py",
        line,
        "jit(f)/x",
    )


def test_a_line_written_in_place_is_read():
    found = only(
        module(
            """%p = f32[64,32]{1,0} parameter(0)
        ROOT %r = f32[64,32]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add,\
 metadata={op_type="psum" op_name="jit(f)/psum" \
 source_file="/home/me/model.py" source_line=42}"""
        )
    )
    assert (found.file, found.line) == ("/home/me/model.py", 42)


# ---- real programs ----

MESH_SHAPE = {"a": 2, "b": 4}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(
        np.asarray(jax.devices()[:8]).reshape(2, 4),
        ("a", "b"),
        axis_types=(AxisType.Auto,) * 2,
    )


def compiled_text(mesh, function, *arguments):
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    return hlo.read(jax.jit(function).lower(*shapes).compile().as_text())


def test_known_collectives_of_a_shard_map(mesh):
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("a", "b"), P("b")),
        out_specs=(P("a", "b"), P("a"), P()),
        check_vma=False,
    )
    def function(x, w):  # on a device (64, 32) and (8, 32)
        def body(x, _):
            y = jnp.tanh(x @ jax.lax.all_gather(w * x.sum(), "b", axis=0, tiled=True))
            y = jax.lax.psum_scatter(
                jnp.concatenate([y, y, y, y], 1), "b", scatter_dimension=1, tiled=True
            )
            return jax.lax.ppermute(y, "b", [(i, (i + 1) % 4) for i in range(4)]), None

        x, _ = jax.lax.scan(body, x, None, length=7)
        return (
            x,
            jax.lax.all_to_all(x, "a", split_axis=0, concat_axis=1, tiled=True),
            jax.lax.psum(x.sum(), ("a", "b")),
        )

    compiled = compiled_text(
        mesh, function, ((128, 128), P("a", "b")), ((32, 32), P("b"))
    )
    found = {
        (c.kind, c.bytes, c.times, c.axes(MESH_SHAPE)) for c in compiled.collectives
    }
    assert found == {
        ("all-gather", 32 * 32 * 4, 7, ("b",)),
        ("reduce-scatter", 64 * 128 * 4, 7, ("b",)),
        ("collective-permute", 64 * 32 * 4, 7, ("b",)),
        ("all-to-all", 64 * 32 * 4, 1, ("a",)),
        ("all-reduce", 4, 1, ("a", "b")),
    }
    assert len(compiled.collectives) == 5
    assert all(c.exact and c.file == __file__ for c in compiled.collectives)
    assert compiled.dot_flops == 7 * 2 * 64 * 32 * 32
    assert compiled.partitions == 8
    scatter = next(c for c in compiled.collectives if c.kind == "reduce-scatter")
    assert scatter.sent == 7 * 64 * 128 * 4 * 3 / 4
    assert "psum_scatter" in Path(__file__).read_text().splitlines()[scatter.line - 1]


def test_a_loop_of_gathered_layers_and_its_gradient(mesh):
    """Seven layers of FSDP along a, matmuls split along b, by shardings alone."""
    batch = 64
    width = 32
    hidden = 128
    pin = jax.lax.with_sharding_constraint

    def loss(weights, x):
        def layer(x, w):
            up, down = (
                pin(part, NamedSharding(mesh, spec))
                for part, spec in zip(w, (P(None, "b"), P("b")), strict=True)
            )
            return (
                pin(
                    x + pin(jnp.tanh(x @ up), NamedSharding(mesh, P("a", "b"))) @ down,
                    NamedSharding(mesh, P("a")),
                ),
                None,
            )

        return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)

    weights = tuple(
        jax.ShapeDtypeStruct(
            (7, *shape), jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        for shape, spec in (
            ((width, hidden), P(None, "a", "b")),
            ((hidden, width), P(None, "b", "a")),
        )
    )
    x = jax.ShapeDtypeStruct(
        (batch, width), jnp.float32, sharding=NamedSharding(mesh, P("a"))
    )
    out = tuple(w.sharding for w in weights)
    compiled = hlo.read(
        jax.jit(jax.grad(loss), out_shardings=out).lower(weights, x).compile().as_text()
    )
    assert compiled.dot_flops == 7 * 3 * 2 * (2 * batch * width * hidden) / 8
    loops = [c for c in compiled.collectives if c.times == 7]
    gathers = [c for c in loops if c.kind == "all-gather"]
    weight = width * hidden // 4 * 4
    activation = batch // 2 * width * 4
    assert {(c.bytes, c.axes(MESH_SHAPE)) for c in gathers} == {(weight, ("a",))}
    assert len(gathers) >= 2
    sums = [c for c in loops if c.kind == "all-reduce" and c.axes(MESH_SHAPE) == ("a",)]
    assert sum(c.bytes for c in sums) == 2 * weight
    assert all(c.sliced for c in sums)
    sums = [c for c in loops if c.kind == "all-reduce" and c.axes(MESH_SHAPE) == ("b",)]
    assert sum(c.bytes for c in sums) == 2 * activation
    assert not any(c.sliced for c in sums)


def test_a_loop_whose_turns_are_an_argument(mesh):
    def function(x, n):
        return jax.lax.fori_loop(0, n.astype(int)[0], lambda _, x: x @ x, x)

    compiled = compiled_text(mesh, function, ((8, 8), P()), ((1,), P()))
    assert compiled.dot_flops == 2 * 8**3
    assert len(compiled.unknown_loops) == 1


def test_text_that_is_no_module_is_refused():
    with pytest.raises(AssertionError, match="not the text"):
        hlo.read(re.sub("ENTRY", "", module("%p = f32[64,32] parameter(0)")))


@pytest.mark.parametrize(
    "reader", [collectives, hlo_loops, hlo_text], ids=lambda reader: reader.__name__
)
def test_the_examples_of_the_readers_hold(reader):
    failed, tried = doctest.testmod(reader)

    assert tried > 0
    assert failed == 0
