"""Embeddings that are updated by rows: right to rounding, and never the whole table."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.errors import RecipeError
from lepton_jax.step.embeddings import Verdict, touched
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 64
DIM = 8
BATCH = 16
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}


def plain(table, ids):
    return table[ids]


class Model(nnx.Module):
    """A dense head on looked-up rows."""

    def __init__(self, look_up=plain, size=SIZE, *, rngs):
        self.look_up = look_up
        self.table = nnx.Param(jax.random.normal(rngs.params(), (size, DIM)))
        self.head = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, ids):
        rows = self.look_up(self.table[...], ids)
        if rows.ndim == 3:
            rows = rows.sum(1)
        return self.head(jnp.tanh(rows))[:, 0]


def data(ids=(), size=SIZE, samples=4 * BATCH):
    generator = np.random.default_rng(0)
    # half of the rows are never seen, and some are often
    ids = generator.integers(0, size // 2, (samples, *ids)) ** 2 // (size // 2)
    return lepton.data.Arrays(
        ids.astype(np.int32), generator.normal(size=samples).astype(np.float32)
    )


def recipe(optimizer, model=Model, train=None, **fields):
    fields = {"learning_rate": 0.1, "steps": 6, "batch_size": BATCH, **fields}
    return lepton.Recipe(
        model=model,
        loss=lepton.losses.squared_error,
        optimizer=optimizer,
        train=train or data(),
        **fields,
    )


def trained(optimizer, devices=1, plan=None, **fields):
    trainer = lepton.Trainer(recipe(optimizer, **fields), devices=devices, plan=plan)
    trainer.fit()
    return trainer


def assert_alike(left, right, kinds=("params",)):
    theirs = by_path(right.state)
    for path, mine in by_path(left.state).items():
        if path.startswith(kinds) and path in theirs:
            np.testing.assert_allclose(mine, theirs[path], err_msg=path, **ROUNDING)


# ---- the same as dense, where it is ----


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd, optax.adagrad, lepton.optimizers.rowwise_adagrad],
    ids=["sgd", "adagrad", "rowwise_adagrad"],
)
@pytest.mark.parametrize("fields", [{}, {"micro_batches": 4, "clip_norm": 0.1}])
def test_rows_without_a_gradient_stay_so_updates_by_rows_are_the_same(
    optimizer, fields
):
    by_rows = trained(lepton.optimizers.rowwise(optimizer), **fields)
    dense = trained(optimizer, **fields)
    assert list(by_rows.trace.tables.sizes) == ["table"]
    assert not by_rows.trace.tables.tables["table"].lazy
    assert not dense.trace.tables
    assert_alike(by_rows, dense)


def clipped(table, ids):
    return jnp.take(table, ids - 5, axis=0, mode="clip")


def padded(table, ids):
    ids = jnp.where(ids % 3 == 0, SIZE, ids)
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=0)


def from_the_end(table, ids):
    return jnp.take(table, -1 - ids, axis=0)


def twice(table, ids):
    return table[ids] + 2 * table[(ids * 7) % SIZE]


def mapped(table, ids):
    return jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(table, i, keepdims=False))(
        ids
    )


def narrow(table, ids):
    return jnp.take(table, ids.astype(jnp.uint8), axis=0)


def one_row(table, ids):
    return table[ids].at[0].add(table[ids[1]])


def again(table, ids):
    @jax.checkpoint
    def look_up(table, ids):
        return jnp.sin(table[ids])

    return look_up(table, ids)


def called(table, ids):
    return jax.jit(lambda table, ids: -table[ids])(table, ids)


def some_columns(table, ids):
    return jnp.concatenate([table[ids, : DIM // 2], table[ids, DIM // 2 :]], -1)


@pytest.mark.parametrize(
    "look_up",
    [
        clipped,
        padded,
        from_the_end,
        twice,
        mapped,
        narrow,
        one_row,
        again,
        called,
        some_columns,
    ],
    ids=lambda f: f.__name__,
)
def test_each_way_to_look_rows_up_is_followed(look_up):
    fields = {"model": partial(Model, look_up), "steps": 4}
    by_rows = trained(lepton.optimizers.rowwise(optax.sgd), **fields)
    dense = trained(optax.sgd, **fields)
    assert by_rows.trace.tables
    assert_alike(by_rows, dense)


def test_a_bag_of_ids_and_a_table_smaller_than_a_batch():
    fields = {"train": data(ids=(5,)), "steps": 4}
    by_rows = trained(lepton.optimizers.rowwise(optax.adagrad), **fields)
    assert by_rows.trace.tables.tables["table"].slots == SIZE
    assert_alike(by_rows, trained(optax.adagrad, **fields))


def test_ids_that_are_drawn_in_the_model_are_the_ones_of_the_step():
    class Sampled(Model):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.rngs = rngs

        def __call__(self, ids):
            drawn = jax.random.randint(self.rngs.negatives(), ids.shape, 0, SIZE)
            return super().__call__(ids) - super().__call__(drawn)

    fields = {"model": Sampled, "micro_batches": 1}
    by_rows = trained(lepton.optimizers.rowwise(optax.sgd), **fields)
    assert_alike(by_rows, trained(optax.sgd, **fields))
    with pytest.raises(RecipeError, match="depend on the variable rngs"):
        trained(lepton.optimizers.rowwise(optax.sgd), model=Sampled)


# ---- lazy, as written down in numpy ----


class Sum(nnx.Module):
    """The sum of a row: its gradient is easily written down."""

    def __init__(self, *, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (SIZE, DIM)))

    def __call__(self, ids):
        return self.table[ids].sum(-1)


def row_gradients(table, ids, targets):
    """Return the rows that a batch touches, and their gradients."""
    each = 2 * (table[ids].sum(-1) - targets) / len(ids)
    rows = np.unique(ids)
    sums = np.array([each[ids == row].sum() for row in rows])
    return rows, np.repeat(sums[:, None], DIM, 1)


def lazy_adam(table, batches, rate=0.1, b1=0.9, b2=0.999):
    mu, nu = np.zeros_like(table), np.zeros_like(table)
    for t, (ids, targets) in enumerate(batches, 1):
        rows, g = row_gradients(table, ids, targets)
        mu[rows] = b1 * mu[rows] + (1 - b1) * g
        nu[rows] = b2 * nu[rows] + (1 - b2) * g**2
        up = mu[rows] / (1 - b1**t)
        table[rows] -= rate * up / (np.sqrt(nu[rows] / (1 - b2**t)) + 1e-8)
    return table


def rowwise_adagrad(table, batches, rate=0.1):
    sums = np.zeros(len(table))
    for ids, targets in batches:
        rows, g = row_gradients(table, ids, targets)
        sums[rows] += (g**2).mean(1)
        table[rows] -= rate * g / (np.sqrt(sums[rows])[:, None] + 1e-8)
    return table


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (lepton.optimizers.sparse_adam, lazy_adam),
        (lepton.optimizers.rowwise_adagrad, rowwise_adagrad),
    ],
)
def test_the_update_is_that_of_ten_lines_of_numpy(optimizer, reference):
    arrays = data()
    trainer = lepton.Trainer(
        recipe(optimizer, Sum, arrays, shuffle=False, steps=8), devices=1
    )
    program = lepton.Program(trainer._tracing(None), trainer.plan(), jax.devices()[:1])
    table = np.array(program.init(0).params["table"], np.float64)
    trainer.fit()
    batches = [
        (np.asarray(arrays.inputs[i : i + BATCH]), arrays.targets[i : i + BATCH])
        for i in range(0, 4 * BATCH, BATCH)
    ]
    expected = reference(table, batches * 2)
    np.testing.assert_allclose(trainer.state.params["table"], expected, 2e-4, 1e-5)


# ---- devices, checkpoints, signals, precision ----


@pytest.mark.parametrize(
    "spec",
    [P("x", None), P(None, "x")],
    ids=["rows", "columns"],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_table_split_over_devices_is_trained_as_on_one(spec, micro_batches):
    fields = {"micro_batches": micro_batches}
    optimizer = lepton.optimizers.sparse_adam
    one = trained(optimizer, **fields)
    mesh = {"x": 4, "y": 2}
    trace = one.trace
    plan = lepton.plan(trace, lepton.topology("cpu:8"), mesh=mesh, pins={"table": spec})
    several = trained(optimizer, devices=8, plan=plan, **fields)
    array = next(a for a in plan.arrays if a.path == "params/table")
    assert array.spec == (*spec,) or array.spec == ("x",)
    assert_alike(several, one, ("params", "optimizer"))


def test_a_run_that_is_resumed_equals_one_left_alone(tmp_path):
    optimizer = lepton.optimizers.sparse_adam
    alone = trained(optimizer, steps=8)
    first = lepton.Trainer(recipe(optimizer, steps=8), devices=1, run_dir=tmp_path)
    first.fit(steps=3)
    second = lepton.Trainer(recipe(optimizer, steps=8), devices=1, run_dir=tmp_path)
    second.resume().fit()
    for path, leaf in by_path(alone.state).items():
        if path.startswith(("params", "optimizer")):
            np.testing.assert_array_equal(leaf, by_path(second.state)[path])


def test_norms_of_gradients_are_exact():
    watching = controllers.Policy(
        "watching",
        lambda: (),
        lambda signals, state: ({}, state),
        watches=("gradient_norm", "finite", "update_norm"),
    )
    norms = []
    for optimizer in (lepton.optimizers.rowwise(optax.sgd), optax.sgd):
        trainer = lepton.Trainer(recipe(optimizer, controller=watching), devices=1)
        history = trainer.fit()
        norms.append([history[name] for name in ("gradient_norm", "update_norm")])
    np.testing.assert_allclose(*norms, rtol=1e-5)


def compiled(trainer):
    trace = trainer._tracing(None)
    program = lepton.Program(trace, trainer.plan(), jax.devices()[:1])
    return program.lower().compile()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_operation_of_a_step_is_as_large_as_the_table(precision):
    size = 50_021
    trainer = lepton.Trainer(
        recipe(
            lepton.optimizers.sparse_adam,
            partial(Model, size=size),
            precision=precision,
            clip_norm=1.0,
        ),
        devices=1,
    )
    program = compiled(trainer)
    text = program.as_text()
    assert "while" in text  # several steps a call
    made = re.findall(rf"= \w+\[{size},[^=]*? ([\w-]+)\(", text)
    assert set(made) <= {
        "parameter",
        "get-tuple-element",
        "scatter",
        "dynamic-update-slice",  # as XLA's CPU backend writes a scatter
        "fusion",
        "call",
    }
    held = program.memory_analysis()
    beyond = held.temp_size_in_bytes
    beyond += held.output_size_in_bytes - held.alias_size_in_bytes
    assert beyond < size * DIM


def test_evaluation_casts_rows_and_not_the_table():
    size = 50_021
    trainer = lepton.Trainer(
        recipe(
            lepton.optimizers.sparse_adam,
            partial(Model, size=size),
            precision="bfloat16",
        ),
        devices=1,
    )
    trace = trainer._tracing(None)
    program = lepton.Program(trace, trainer.plan(), jax.devices()[:1])
    state = trace.state
    forward = jax.jit(program._forward)
    lowered = forward.lower(state.params, state.variables, trace.inputs)
    assert f"{size}x{DIM}xf32" in lowered.as_text()
    assert f"{size}x{DIM}xbf16" not in lowered.as_text()


# ---- what stands against it ----


class Tied(Model):
    def __call__(self, ids):
        return super().__call__(ids) + (self.table[...] ** 2).sum()


class Looped(Model):
    def __call__(self, ids):
        table = self.table[...]
        _, rows = jax.lax.scan(lambda c, i: (c, table[i]), 0, ids)
        return self.head(rows)[:, 0]


class Chosen(Model):
    def __call__(self, ids):
        best = jnp.argmax(self.head(self.table[ids])) + ids
        return self.head(self.table[best])[:, 0]


def averaging():
    return {"controller": controllers.averaging()}


REFUSED = {
    "tied": (optax.sgd, {"model": Tied}, r"takes all of it, .*test_embeddings.py"),
    "looped": (optax.sgd, {"model": Looped}, "inside of a scan"),
    "chosen": (optax.sgd, {"model": Chosen}, "depend on the parameters"),
    "lamb": (optax.lamb, {}, "depends on other rows"),
    "average": (optax.adam, averaging(), "keeps an array for all of its rows.*average"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_updated_by_rows_is_an_error_that_says_why(name):
    optimizer, fields, why = REFUSED[name]
    with pytest.raises(RecipeError, match=why) as caught:
        trained(lepton.optimizers.rowwise(optimizer), **fields)
    assert caught.value.remedy.startswith("change that, or give lepton.optimizers")


def test_optimizers_that_take_turns_begin_anew_in_all_rows():
    rowwise = lepton.optimizers.rowwise(optax.sgd)
    optimizer = lepton.optimizers.switchable(rowwise, optax.adam)
    with pytest.raises(RecipeError, match="begins anew"):
        trained(optimizer)


def test_or_it_is_updated_as_a_whole_with_a_warning():
    class Heard:
        def __init__(self):
            self.events = []

        def event(self, event):
            self.events.append(event)

        def close(self):
            pass

    heard = Heard()
    optimizer = lepton.optimizers.rowwise(optax.adam, otherwise="dense")
    trainer = lepton.Trainer(recipe(optimizer, Tied), devices=1, sinks=[heard])
    trainer.fit()
    warnings = [e["text"] for e in heard.events if e["kind"] == "warning"]
    assert any("table: each step updates all 64 rows" in text for text in warnings)
    assert_alike(trainer, trained(optax.adam, model=Tied))


def test_a_row_wise_optimizer_without_an_embedding_is_an_error():
    rowwise = lepton.optimizers.rowwise(optax.sgd)
    parts = lepton.optimizers.by_part({"table": optax.sgd}, default=rowwise)
    with pytest.raises(RecipeError, match="looks no rows up"):
        trained(parts)


def test_a_part_of_the_model_may_be_updated_by_rows_alone():
    rowwise = lepton.optimizers.sparse_adam
    parts = lepton.optimizers.by_part({"table": rowwise}, default=optax.adam)
    by_part = trained(parts)
    assert by_part.trace.tables.tables["table"].lazy
    assert_alike(by_part, trained(rowwise))


def test_a_frozen_table_stays_as_it_is():
    rowwise = lepton.optimizers.rowwise(optax.adam)
    parts = lepton.optimizers.by_part({"head/*": optax.adam}, default="frozen")
    assert not trained(parts).trace.tables
    with pytest.raises(RecipeError, match="looks no rows up"):
        trained(lepton.optimizers.by_part({"head/*": rowwise}, default="frozen"))


# ---- by itself, where nothing changes ----


def shapes_alone(optimizer, size=2_000_000):
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    ratings = jax.ShapeDtypeStruct((1,), jnp.float32)
    return lepton.trace(
        lepton.Recipe(
            model=partial(Model, size=size),
            loss=lepton.losses.squared_error,
            optimizer=optimizer,
            learning_rate=0.1,
            batch_size=256,
        ),
        ids,
        ratings,
    )


def test_a_large_table_is_updated_by_rows_if_that_changes_nothing():
    plan = lepton.plan(shapes_alone(optax.sgd), lepton.topology("cpu:1"))
    assert "at most 256 of 2,000,000" in plan.reasons["rows of table"]
    rows = plan.bytes_per_device["gradients"] + plan.bytes_per_device["temporaries"]
    assert rows < 2**20 < plan.bytes_per_device["params"]

    dense = lepton.plan(shapes_alone(optax.adam), lepton.topology("cpu:1"))
    assert any("rowwise would update these alone" in note for note in dense.notes)
    assert dense.bytes_per_device["gradients"] >= 2_000_000 * DIM * 4
    assert dense.step_seconds > 10 * plan.step_seconds


VERDICTS = {
    "momentum": (partial(optax.sgd, momentum=0.9), Verdict.LAZY),
    "decayed": (partial(optax.adamw, weight_decay=0.1), Verdict.LAZY),
    "clipped": (
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate)),
        Verdict.EXACT,
    ),
    "factored": (optax.adafactor, Verdict.UNFIT),
    "in_turns": (lambda rate: optax.MultiSteps(optax.sgd(rate), 2), Verdict.UNFIT),
}


@pytest.mark.parametrize("name", VERDICTS)
@pytest.mark.parametrize("late", [False, True], ids=["", "warmed_up"])
def test_an_optimizer_is_judged_by_what_it_does(name, late):
    from lepton_jax.step import optimizers
    from lepton_jax.step.embeddings import tried

    make, verdict = VERDICTS[name]
    rate = optax.linear_schedule(0.0, 0.1, 100) if late else 0.1
    built = optimizers.build(recipe(make, learning_rate=rate))
    params = {"table": jax.ShapeDtypeStruct((1000, 200), jnp.float32)}
    state = jax.eval_shape(built.init, params)
    assert tried(built, params, state, ["table"]) == {"table": verdict}


@given(st.lists(st.integers(0, 12), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_each_touched_row_has_one_slot(ids):
    rows = np.asarray(touched(jnp.array(ids, jnp.int32), 12))
    assert list(rows[rows < 12]) == sorted({i for i in ids if i < 12})
    free = rows[rows >= 12]
    assert len(set(free)) == len(free)
    assert (np.diff(rows) > 0).all()
